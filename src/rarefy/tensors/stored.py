"""The structure of a sparse weight as a tensor: a shape outside, a cell inside. What it computes is said elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rarefy.tensors.cell import Cell, Role
from rarefy.tensors.topology import Topology
from rarefy.torch_private import make_wrapper, not_compiled

PARTS = ("_entries", "_starts", "_places", "_back_starts", "_back_places", "_order")


class _Flatten:
    """`__tensor_flatten__`, by which compilers take a tensor apart.

    A tensor that a module is about to put in the place of a parameter does not show it: torch then assigns it to
    `.data`, which keeps references, hooks and graphs, and does not swap the two, which fails where there are any.
    """

    def __get__(self, tensor: StoredWeight | None, owner: type) -> Any:
        if tensor is not None and "_replaces_data" in vars(tensor):
            raise AttributeError("__tensor_flatten__")
        return owner._flatten if tensor is None else tensor._flatten


class StoredWeight(Tensor):
    """A tensor [rows, columns] that holds values and a topology in place of memory."""

    _cell: Cell
    __tensor_flatten__ = _Flatten()

    @staticmethod
    def __new__(cls, cell: Cell, requires_grad: bool = False) -> Any:
        """A wrapper of the shape, dtype and place that the dense weight would have."""
        values = cell.values
        facts = {"dtype": values.dtype, "device": values.device, "requires_grad": requires_grad}
        return make_wrapper(cls, cell.topology.shape, **facts)

    @not_compiled
    def __init__(self, cell: Cell, requires_grad: bool = False) -> None:
        self._cell = cell

    @property
    def topology(self) -> Topology:
        """Where the active connections are."""
        return self._cell.topology

    @property
    def entries(self) -> Tensor:
        """[connections], in the order of the topology; a write to it is a write to the weight."""
        return self._cell.values

    @property
    def connections(self) -> int:
        """How many are active."""
        return self._cell.values.numel()

    @property
    def role(self) -> Role:
        """Who decides on its connections."""
        return self._cell.role

    def dense(self) -> Tensor:
        """The dense weight, without gradient; built on each call."""
        return self._cell.dense()

    def alias(self) -> StoredWeight:
        """Another tensor of the same cell."""
        return type(self)(self._cell)

    def like(self, values: Tensor, role: Role | None = None) -> StoredWeight:
        """A tensor with other values of the same connections.

        Args:
            values: [connections].
            role: None for that of a result: a companion's is one too, everything else is free.
        """
        derived = Role.COMPANION if self._cell.role is Role.COMPANION else Role.FREE
        return type(self)(Cell(values, self._cell.topology, role or derived))

    def companion(self, values: Tensor) -> StoredWeight:
        """A tensor that belongs to this weight: a gradient, or an optimizer's state."""
        return self.like(values, Role.COMPANION)

    # ---- the parts, for compilers ----

    _entries = property(lambda self: self._cell.values)
    _starts = property(lambda self: self._cell.topology.index.tensors[0])
    _places = property(lambda self: self._cell.topology.index.tensors[1])
    _back_starts = property(lambda self: self._cell.topology.index.tensors[2])
    _back_places = property(lambda self: self._cell.topology.index.tensors[3])
    _order = property(lambda self: self._cell.topology.index.tensors[4])

    def _flatten(self) -> tuple[list[str], Any]:
        cell = self._cell
        topology = cell.topology
        # Compilers guard on these: whether the dense gradient is wanted makes another graph.
        return list(PARTS), (topology.facts, cell.role.value, cell.collect is not None)

    @classmethod
    def __metadata_guard__(cls, compiled: Any, found: Any) -> bool:
        """Whether a graph that was compiled for some facts serves a weight with others."""
        # Without gradients nobody asks for the dense one, and compilers have a graph of its own for that.
        serves = not torch.is_grad_enabled() or compiled[2] == found[2]
        return serves and compiled[:2] == found[:2]

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Tensor], facts: Any, outer_size: Any, outer_stride: Any
    ) -> StoredWeight:
        of_topology, role, wants_dense = facts
        values, *tensors = (parts[name] for name in PARTS)
        cell = Cell(values, Topology.of_parts(of_topology, tensors), Role(role))
        if wants_dense:
            cell.collect = _ignore
        return cls(cell)


def _ignore(gradient: Tensor) -> None:
    """Takes a dense gradient while a compiler traces; the real one goes to the real weight's cell."""


def as_array(dense: Tensor, options: Mapping[str, Any]) -> Any:
    """A copy as an array that nobody may write to: as one of a dense tensor, it would be taken for the weight's memory.

    Args:
        dense: a copy of its own.
        options: of `Tensor.numpy`.

    Example:
        >>> as_array(torch.ones(2), {}).flags.writeable
        False
    """
    array = dense.numpy(**options)
    array.flags.writeable = False
    return array


def is_tracing() -> bool:
    """Whether a compiler builds a graph just now."""
    return torch.compiler.is_compiling()
