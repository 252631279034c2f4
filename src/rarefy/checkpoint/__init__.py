"""Bytes on a disk: checkpoints, their manifests and tensor files."""
