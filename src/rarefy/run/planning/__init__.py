"""Runs whose model does not fit into memory, planned without it."""
