"""A trained model is pruned once, without training."""
