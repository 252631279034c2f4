"""A sparse weight as a tensor: a shape outside, and inside a cell that all its aliases share.

What it computes is said elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import move_entries
from rarefy.tensors.topology import Topology
from rarefy.torch_private import make_wrapper, not_compiled, times_written
from rarefy.torch_private.compiled import let_sizes_change, sizes_may_change


class Role(Enum):
    """Who decides on the connections of a tensor, so what a foreign write may do to them.

    - `FREE`: nobody; a copy. It holds whatever is written, and gets the connections that it takes.
    - `MANAGED`: an algorithm or a layer. Dense writes reach the active connections only, a sparse tensor with other
      connections is refused.
    - `COMPANION`: the weight that it belongs to, as a gradient or an optimizer's state. Dense writes reach the active
      connections only, a sparse tensor brings its own.
    """

    FREE = "free"
    MANAGED = "managed"
    COMPANION = "companion"


class Cell:
    """Values and topology of one weight.

    `detach()`, `.data` and whatever else is an alias of a weight holds the same cell, so that a new topology reaches
    them all.

    Args:
        values: [connections].
        topology: where they are.
        role: what a write may do to the topology.

    Attributes:
        inactive: what a companion holds at inactive positions, after something was computed with it in place; a number,
            0 in every other tensor.
        collect: called with every dense gradient of the weight, while it is wanted; else None.
    """

    __slots__ = (
        "__weakref__",
        "_seen",
        "_snapshot",
        "collect",
        "inactive",
        "role",
        "topology",
        "values",
        "writes",
    )

    def __init__(self, values: Tensor, topology: Topology, role: Role = Role.FREE) -> None:
        self.values = values
        self.topology = topology
        self.role = role
        self.inactive: Any = 0
        self.collect: Callable[[Tensor], None] | None = None
        self.writes = 0
        self._snapshot: Tensor | None = None
        self._seen = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> Cell:
        """Values of its own, the same topology; nobody decides on its connections."""
        role = Role.COMPANION if self.role is Role.COMPANION else Role.FREE
        copied = Cell(self.values.detach().clone(), self.topology, role)
        copied.inactive = self.inactive
        return copied

    def dense(self) -> Tensor:
        """The dense weight; built on each call."""
        dense = self.topology.dense(self.values)
        return dense.masked_fill(~self.topology.mask(), self.inactive) if self.is_filled else dense

    @property
    def is_filled(self) -> bool:
        """Whether inactive positions hold another number than zero."""
        return self.inactive != 0

    def move_to(self, topology: Topology) -> Tensor:
        """Takes another topology: connections that stay keep their value, new ones are zero.

        Returns:
            int32 [new connections]: the old place of each, −1 = new; for `move_entries`.
        """
        sources = topology.sources_in(self.topology)
        self.values = move_entries(self.values, sources)
        if self.is_filled:
            self.values.masked_fill_(sources < 0, self.inactive)
        self.topology = topology
        self.written()
        return sources

    def written(self) -> None:
        """Called after each write: below autograd the version of the values does not tell."""
        self.writes += 1
        self._snapshot = None

    def snapshot(self) -> Tensor:
        """The dense weight for code that reads memory; the same one until the next write or forward pass."""
        # a compiled graph writes past the dispatcher, but raises the version
        version = times_written(self.values)
        if self._snapshot is None or self._seen != version:
            with torch.no_grad():
                self._snapshot = self.dense()
            self._seen = version
        return self._snapshot

    def forget_snapshot(self) -> None:
        """Frees the snapshot.

        Raises:
            RarefyError: somebody wrote to its memory, which does not reach the weight.
        """
        if self._snapshot is not None:
            self._refuse_writes_to(self._snapshot)
            self._snapshot = None

    @torch.no_grad()
    def _refuse_writes_to(self, snapshot: Tensor) -> None:
        if self._seen != times_written(self.values):
            return
        found = self.topology.gather(snapshot)
        is_same = (found == self.values) | (found.isnan() & self.values.isnan())
        if not bool(is_same.all()):
            self._snapshot = None
            raise RarefyError(
                "something wrote to the memory of a sparse weight by its address (data_ptr, untyped_storage), where a "
                "dense copy is; that does not reach the weight: write to it with copy_, or set compute: masked"
            )

    @property
    def has_snapshot(self) -> bool:
        """Whether a snapshot takes memory."""
        return self._snapshot is not None


_PREFIX = "_rarefy_"
# The values, then what `Topology.parts` has, in its order.
_NAMES = ("entries", "starts", "places", "back_starts", "back_places", "order", "label")
PARTS = tuple(_PREFIX + name for name in _NAMES)


class _Flatten:
    """`__tensor_flatten__`, by which compilers take a tensor apart.

    They ask the class for it before they decide which sizes are fixed.

    A tensor that a module is about to put in the place of a parameter does not show it: torch then assigns it to
    `.data`, which keeps references, hooks and graphs, and does not swap the two, which fails where there are any.
    """

    def __get__(self, tensor: StoredWeight | None, owner: type) -> Any:
        if tensor is not None and "_replaces_data" in vars(tensor):
            raise AttributeError("__tensor_flatten__")
        if tensor is None:
            let_sizes_change(_PREFIX)
        return owner._flatten if tensor is None else tensor._flatten


def are_known_to_compilers() -> bool:
    """Whether a compiler may have taken a sparse weight apart in this process."""
    return sizes_may_change(_PREFIX)


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
            role: None for that of a result: a companion's is one too, if it has numbers and no truth values;
                everything else is free.
        """
        is_companion = self._cell.role is Role.COMPANION and values.dtype is not torch.bool
        derived = Role.COMPANION if is_companion else Role.FREE
        result = type(self)(Cell(values, self._cell.topology, role or derived))
        if role is None:
            result.pass_dense_gradients_of(self)
        return result

    def pass_dense_gradients_of(self, *origins: StoredWeight) -> None:
        """Has products with this tensor give a dense gradient, if a weight that it was made of wants to see that."""
        if self._cell.collect is None and any(one._cell.collect is not None for one in origins):
            self._cell.collect = _ignore

    def companion(self, values: Tensor) -> StoredWeight:
        """A tensor that belongs to this weight: a gradient, or an optimizer's state."""
        return self.like(values, Role.COMPANION)

    # ---- the parts, for compilers ----

    _rarefy_entries = property(lambda self: self._cell.values)
    _rarefy_starts = property(lambda self: self._cell.topology.parts[0])
    _rarefy_places = property(lambda self: self._cell.topology.parts[1])
    _rarefy_back_starts = property(lambda self: self._cell.topology.parts[2])
    _rarefy_back_places = property(lambda self: self._cell.topology.parts[3])
    _rarefy_order = property(lambda self: self._cell.topology.parts[4])
    _rarefy_label = property(lambda self: self._cell.topology.parts[5])

    @property
    def parts(self) -> list[Tensor]:
        """What it is made of."""
        return [getattr(self, name) for name in PARTS]

    def _flatten(self) -> tuple[list[str], Any]:
        cell = self._cell
        topology = cell.topology
        # A graph knows no number at inactive positions, and writes past one.
        cell.inactive = 0
        # Compilers guard on these: whether the dense gradient is wanted makes another graph.
        return list(PARTS), (topology.facts, cell.role.value, cell.collect is not None)

    @classmethod
    def __metadata_guard__(cls, compiled: Any, found: Any) -> bool:
        """Whether a graph that was compiled for some facts serves a weight with others."""
        # Without gradients nobody asks for the dense one, and compilers have a graph of its own for that.
        serves = not torch.is_grad_enabled() or compiled[2] == found[2]
        return serves and compiled[:2] == found[:2]

    @classmethod
    @not_compiled
    def __tensor_unflatten__(
        cls, parts: dict[str, Tensor], facts: Any, outer_size: Any, outer_stride: Any
    ) -> StoredWeight:
        of_topology, role, wants_dense = facts
        values, *of_index = (parts[name] for name in PARTS)
        cell = Cell(values, Topology.of_parts(of_topology, of_index), Role(role))
        if wants_dense:
            cell.collect = _ignore
        return cls(cell)


def _ignore(gradient: Tensor) -> None:
    """Takes a dense gradient that goes on to another weight's cell: a compiler's stand-in, something computed."""


def in_mode_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """In inference mode, the mode in which an alias of this tensor is to be made.

    A view of a normal tensor is a normal one there too, and torch lets the two share the count of their writes.

    Args:
        tensor: of either kind.

    Example:
        >>> normal = torch.ones(1)
        >>> with torch.inference_mode(), in_mode_of(normal):
        ...     torch.is_inference_mode_enabled()
        False
    """
    if not torch.is_inference_mode_enabled() or tensor.is_inference():
        return nullcontext()
    return torch.inference_mode(False)


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
