"""What all aliases of one sparse weight share: its values, its topology, and what may be done to them."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.tensors.topology import Topology, move_entries
from rarefy.torch_private import times_written


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
        collect: called with every dense gradient of the weight, while it is wanted; else None.
    """

    __slots__ = ("_seen", "_snapshot", "collect", "role", "topology", "values", "writes")

    def __init__(self, values: Tensor, topology: Topology, role: Role = Role.FREE) -> None:
        self.values = values
        self.topology = topology
        self.role = role
        self.collect: Callable[[Tensor], None] | None = None
        self.writes = 0
        self._snapshot: Tensor | None = None
        self._seen = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> Cell:
        """Values of its own, the same topology; nobody decides on its connections."""
        role = Role.COMPANION if self.role is Role.COMPANION else Role.FREE
        return Cell(self.values.detach().clone(), self.topology, role)

    def dense(self) -> Tensor:
        """The dense weight; built on each call."""
        return self.topology.dense(self.values)

    def move_to(self, topology: Topology) -> None:
        """Takes another topology: connections that stay keep their value, new ones are zero."""
        self.values = move_entries(self.values, topology.sources_in(self.topology))
        self.topology = topology
        self.written()

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
