"""Kernels for GPUs, in Triton, which comes with torch's builds for CUDA and is imported with the first use."""

from rarefy.kernels.gpu.block_calls import float32_precision, obstacle

__all__ = ["float32_precision", "obstacle"]
