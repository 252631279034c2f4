"""Sparse weights as tensors: storage, topology and kernels apart, so that each may be another."""

from rarefy.kernels import move_entries
from rarefy.tensors.gradient import came_through_its_hook
from rarefy.tensors.stored import Cell, Role, are_known_to_compilers, as_array, in_mode_of
from rarefy.tensors.topology import Topology
from rarefy.tensors.weight import SparseWeight, become
from rarefy.tensors.writes import set_topology

__all__ = [
    "Cell",
    "Role",
    "SparseWeight",
    "Topology",
    "are_known_to_compilers",
    "as_array",
    "become",
    "came_through_its_hook",
    "in_mode_of",
    "move_entries",
    "set_topology",
]
