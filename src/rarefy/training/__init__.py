"""Trainer, callbacks and checkpoints."""
