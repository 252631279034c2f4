"""Modules with compact storage: values and indices instead of a dense weight."""

from rarefy.nn.conv1d import SparseConv1D
from rarefy.nn.entries import move_entries
from rarefy.nn.linear import SparseLinear

__all__ = ["SparseConv1D", "SparseLinear", "move_entries"]
