"""Layers with a sparse weight, and how a module's weight becomes one and dense again."""

from rarefy.nn.conv1d import SparseConv1D
from rarefy.nn.conversion import CopiedMask, WeightMask, is_conv1d, make_compact, make_dense, show_mask
from rarefy.nn.linear import SparseLinear
from rarefy.tensors import move_entries

__all__ = [
    "CopiedMask",
    "SparseConv1D",
    "SparseLinear",
    "WeightMask",
    "is_conv1d",
    "make_compact",
    "make_dense",
    "move_entries",
    "show_mask",
]
