"""Where the connections of one weight are; the values are kept elsewhere, in the order that this says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import (
    BlockIndex,
    BlockTopology,
    Layout,
    Panels,
    index_of,
    infer,
    sources_between,
)

Index = Panels | BlockIndex


class Facts(NamedTuple):
    """What a topology is beside its index tensors, for compilers and other processes.

    Args:
        sizes: of the index.
        has_blocks: whether it is a `BlockIndex`.
        is_transposed: as of `Topology`.
        block: as of `Topology`.
    """

    sizes: tuple[int, ...]
    has_blocks: bool
    is_transposed: bool
    block: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Topology:
    """The active connections of a weight matrix.

    It never changes: a weight with other connections gets another topology. So any number of tensors may share one.

    Args:
        index: the index tensors, of the matrix that multiplies from the right once it is transposed: [out, in].
        is_transposed: whether the weight is the transpose of that matrix, [in, out], as in Hugging Face's Conv1D.
        block: outputs and inputs of the blocks in which its masks come; a mask that does not consist of whole ones
            is indexed by connections all the same.
    """

    index: Index
    is_transposed: bool = False
    block: tuple[int, int] | None = None

    @classmethod
    def from_mask(
        cls, mask: Tensor, is_transposed: bool = False, block: tuple[int, int] | None = None
    ) -> Topology:
        """The topology of a mask.

        Args:
            mask: bool, the shape of the weight.
            is_transposed: see the class.
            block: see the class.

        Raises:
            RarefyError: the mask is not a bool matrix, or has too many active connections.

        Example:
            >>> Topology.from_mask(torch.ones(3, 2, dtype=torch.bool), is_transposed=True).shape
            torch.Size([3, 2])
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise RarefyError(
                f"mask: {mask.dtype} with shape {tuple(mask.shape)} is not allowed; give a bool matrix"
            )
        return cls(index_of(mask.t() if is_transposed else mask, block), is_transposed, block)

    @classmethod
    def of_parts(cls, facts: Facts, tensors: Sequence[Tensor]) -> Topology:
        """The topology of `facts` and of index tensors as its index lists them."""
        starts, indices, back_starts, back_indices, order = tensors
        first, second, third, fourth = facts.sizes
        parts = (first, second, third, fourth, starts, indices, back_starts, back_indices, order)
        index = BlockIndex(BlockTopology(*parts)) if facts.has_blocks else Panels(*parts)
        return cls(index, facts.is_transposed, facts.block)

    def with_mask(self, mask: Tensor) -> Topology:
        """The topology of another mask, of the same kind of weight."""
        return Topology.from_mask(mask, self.is_transposed, self.block)

    @property
    def facts(self) -> Facts:
        """What there is beside the index tensors."""
        return Facts(tuple(self.index.sizes), self.has_blocks, self.is_transposed, self.block)

    @property
    def has_blocks(self) -> bool:
        """Whether whole blocks are stored and multiplied."""
        return isinstance(self.index, BlockIndex)

    @cached_property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        shape = (self.index.rows, self.index.columns)
        return torch.Size(reversed(shape) if self.is_transposed else shape)

    @cached_property
    def layout(self) -> Layout | None:
        """The part of it that the kernels of the forward pass take; None for blocks."""
        return self.index.layout if isinstance(self.index, Panels) else None

    @property
    def connections(self) -> int:
        """How many there are."""
        return self.index.nonzeros

    @property
    def index_bytes(self) -> int:
        """The memory of the index tensors, of those of the transpose too."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.index.tensors)

    @property
    def is_real(self) -> bool:
        """Whether the indices can be looked at: False while a compiler traces."""
        starts = self.index.tensors[0]
        return type(starts) is Tensor and not starts.is_meta

    def mask(self) -> Tensor:
        """Bool, the shape of the weight; built on each call."""
        return self._as_weight(self.index.mask())

    def dense(self, values: Tensor) -> Tensor:
        """The weight with `values` at the connections and zeros elsewhere."""
        return self._as_weight(self.index.dense(values))

    def gather(self, weight: Tensor) -> Tensor:
        """The entries of a tensor of the weight's shape at the connections."""
        return self.index.gather(weight.t() if self.is_transposed else weight)

    def sources_in(self, previous: Topology) -> Tensor:
        """int64 [connections]: the place of each connection among those of `previous`, −1 where it is new there."""
        mine = self.index
        theirs = previous.index
        if isinstance(mine, Panels) and isinstance(theirs, Panels):
            return mine.sources_in(theirs)
        return mine.sources_in(theirs) if isinstance(mine, BlockIndex) else sources_between(mine, theirs)

    def covers(self, other: Topology) -> bool:
        """Whether each connection of `other` is one of these."""
        return bool((other.sources_in(self) >= 0).all())

    def united(self, mask: Tensor) -> Topology:
        """The topology that has the connections of `mask` too."""
        return self.with_mask(self.mask() | mask)

    def equals(self, other: Topology) -> bool:
        """Whether these are the same index tensors; while a compiler traces, whether they could be."""
        if self is other:
            return True
        mine = self.index.tensors
        theirs = other.index.tensors
        if self.facts != other.facts or mine[1].shape != theirs[1].shape:
            return False
        # two of one kind and size, built apart, count as different: what follows is slower, and right
        return mine[0].data_ptr() == theirs[0].data_ptr() if self.is_real and other.is_real else True

    def to(self, device: torch.device) -> Topology:
        """The same topology on a device."""
        return Topology.of_parts(self.facts, [tensor.to(device) for tensor in self.index.tensors])

    def infer(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor | None:
        """The product by the shortest way, where neither gradients nor anything else has to see it; else None."""
        if isinstance(self.index, BlockIndex):
            return self.index.infer(x, values, bias)
        return None if self.layout is None else infer(x, values, bias, self.layout)

    def in_row_major_order(self, values: Tensor) -> Tensor:
        """Values by row and column of the weight, an order that does not depend on the machine."""
        return self.dense(values)[self.mask()]

    def from_row_major_order(self, entries: Tensor) -> Tensor:
        """The reverse of `in_row_major_order`."""
        weight = entries.new_zeros(self.shape)
        weight[self.mask()] = entries
        return self.gather(weight)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t().contiguous() if self.is_transposed else matrix
