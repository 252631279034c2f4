"""Adapters to trainers that people have already; each module needs its own package and is imported by name."""
