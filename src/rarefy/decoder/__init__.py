"""The parts of the decoder family: its keys, positions, attention, feed-forward parts, layers."""
