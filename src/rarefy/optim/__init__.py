"""Optimizers and learning-rate schedules by their Model Zoo names."""
