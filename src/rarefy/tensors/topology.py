"""Where the connections of one weight are; the values are kept elsewhere, in the order that this says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    infer_gradients,
    sources_between,
)

Index = Panels | BlockIndex


class Facts(NamedTuple):
    """What a topology is beside its parts, for compilers and other processes.

    Args:
        sizes: of the index, but for those that change with the number of connections (`Topology.label`).
        has_blocks: whether it is a `BlockIndex`.
        is_transposed: as of `Topology`.
        block: as of `Topology`.
        half: as of `Panels`.
    """

    sizes: tuple[int, ...]
    has_blocks: bool
    is_transposed: bool
    block: tuple[int, int] | None
    half: bool = False


# By identity or `equals`: compared field by field, index tensors would give a tensor where a bool is wanted.
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
    def of_parts(cls, facts: Facts, parts: Sequence[Tensor]) -> Topology:
        """The topology of `facts` and `parts`."""
        starts, indices, back_starts, back_indices, order, label = parts
        sizes = [*facts.sizes, *label.shape[2:]]
        first, second, third, fourth = sizes
        given = (first, second, third, fourth, starts, indices, back_starts, back_indices, order)
        index = BlockIndex(BlockTopology(*given)) if facts.has_blocks else Panels(*given, half=facts.half)
        topology = cls(index, facts.is_transposed, facts.block)
        # Made anew it would read an address, and a compiler's tensors have none.
        vars(topology)["label"] = label
        return topology

    @classmethod
    def of_copies(cls, facts: Facts, parts: Sequence[Tensor]) -> Topology:
        """The topology of `facts` and of `parts` that are in another place of memory than those they were made of."""
        topology = cls.of_parts(facts, parts)
        topology.forget_label()
        return topology

    def with_mask(self, mask: Tensor) -> Topology:
        """The topology of another mask, of the same kind of weight."""
        topology = Topology.from_mask(mask, self.is_transposed, self.block)
        return topology.in_half() if self.half else topology

    @property
    def half(self) -> bool:
        """Whether products are computed with tiles in float16, where they can be; see `Panels`."""
        return isinstance(self.index, Panels) and self.index.half

    def in_half(self) -> Topology:
        """The same connections, with `half`; blocks, which have matrix units, as they are."""
        if not isinstance(self.index, Panels):
            return self
        return Topology(replace(self.index, half=True), self.is_transposed, self.block)

    @property
    def facts(self) -> Facts:
        """What there is beside the parts."""
        sizes = tuple(self.index.sizes)
        sizes = sizes if self.has_blocks else sizes[:2]
        return Facts(sizes, self.has_blocks, self.is_transposed, self.block, self.half)

    @cached_property
    def label(self) -> Tensor:
        """A tensor without elements, whose sizes tell which topology this is, and the widths of its panels.

        Both change with the connections, and compilers take numbers for fixed, but let sizes change: what they find out
        about two sizes, for example that they are equal, they look at again at each call. Blocks have one width.
        """
        first = self.index.tensors[0]
        widths = () if self.has_blocks else self.index.sizes[2:]
        # Where its memory is; allocations begin at multiples of 64 bytes.
        return first.new_empty(first.data_ptr() >> 6, 0, *widths)

    def forget_label(self) -> None:
        """Called when the index tensors were moved to another place of memory, which the label tells."""
        vars(self).pop("label", None)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The index tensors and `label`: with `facts`, all that makes this topology."""
        return (*self.index.tensors, self.label)

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
        """int32 [connections]: the place of each connection among those of `previous`, −1 where it is new there."""
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
        """Whether these are the same index tensors; what a compiler makes of the answer it asks for at each call."""
        if self is other:
            return True
        # In which precision they are multiplied changes nothing about the connections.
        if self.facts != other.facts._replace(half=self.half):
            return False
        # two of one kind and size, built apart, count as different: what follows is slower, and right
        if self.is_real and other.is_real:
            return self.index.tensors[0].data_ptr() == other.index.tensors[0].data_ptr()
        return bool(self.label.shape[0] == other.label.shape[0])

    def to(self, device: torch.device) -> Topology:
        """The same topology on a device."""
        return Topology.of_copies(self.facts, [part.to(device) for part in self.parts])

    def infer(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor | None:
        """The product by the shortest way, where neither gradients nor anything else has to see it; else None."""
        if isinstance(self.index, BlockIndex):
            return self.index.infer(x, values, bias)
        return None if self.layout is None else infer(x, values, bias, self.layout, self.half)

    def gradients(
        self, grad: Tensor, x: Tensor, values: Tensor, needs: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, values and bias of the product; those that are not needed are of any content."""
        index = self.index
        if isinstance(index, BlockIndex):
            found = index.infer_gradients(grad, x, values, needs)
        else:
            found = infer_gradients(grad, x, values, index, needs)
        return index.gradients(grad, x, values, needs) if found is None else found

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
