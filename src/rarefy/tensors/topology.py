"""Where the connections of one weight are; the values are kept elsewhere, in the order that this says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import Layout, Panels


def move_entries(tensor: Tensor, sources: Tensor) -> Tensor:
    """Moves per-connection entries (values, gradients, optimizer state) to a new topology; new ones are zero.

    Args:
        tensor: [old connections].
        sources: int64 [new connections], from `Topology.sources_in`: old place, −1 = new connection.

    Returns:
        [new connections], the dtype of tensor.

    Example:
        >>> move_entries(torch.tensor([5.0, 7.0]), torch.tensor([1, -1, 0]))
        tensor([7., 0., 5.])
    """
    padded = torch.cat([tensor.new_zeros(1), tensor])
    return padded.index_select(0, sources + 1)


@dataclass(frozen=True, eq=False)
class Topology:
    """The active connections of a weight matrix.

    It never changes: a weight with other connections gets another topology. So any number of tensors may share one.

    Args:
        panels: the index tensors, of the matrix that multiplies from the right once it is transposed: [out, in].
        is_transposed: whether the weight is the transpose of that matrix, [in, out], as in Hugging Face's Conv1D.
    """

    panels: Panels
    is_transposed: bool = False

    @classmethod
    def from_mask(cls, mask: Tensor, is_transposed: bool = False) -> Topology:
        """The topology of a mask.

        Args:
            mask: bool, the shape of the weight.
            is_transposed: see the class.

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
        return cls(Panels.from_mask(mask.t() if is_transposed else mask), is_transposed)

    @classmethod
    def of_parts(cls, sizes: Sequence[int], tensors: Sequence[Tensor], is_transposed: bool) -> Topology:
        """The topology of whole numbers and index tensors as `Panels` lists them."""
        rows, columns, width, transposed_width = sizes
        starts, offsets, back_starts, back_offsets, order = tensors
        back = (back_starts, back_offsets, order)
        return cls(Panels(rows, columns, width, transposed_width, starts, offsets, *back), is_transposed)

    @cached_property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        shape = (self.panels.rows, self.panels.columns)
        return torch.Size(reversed(shape) if self.is_transposed else shape)

    @cached_property
    def layout(self) -> Layout:
        """The part of it that the kernels of the forward pass take."""
        return self.panels.layout

    @property
    def connections(self) -> int:
        """How many there are."""
        return self.panels.nonzeros

    @property
    def index_bytes(self) -> int:
        """The memory of the index tensors, of those of the transpose too."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.panels.tensors)

    @property
    def is_real(self) -> bool:
        """Whether the indices can be looked at: False while a compiler traces."""
        return type(self.panels.starts) is Tensor and not self.panels.starts.is_meta

    def mask(self) -> Tensor:
        """Bool, the shape of the weight; built on each call."""
        return self._as_weight(self.panels.mask())

    def dense(self, values: Tensor) -> Tensor:
        """The weight with `values` at the connections and zeros elsewhere."""
        return self._as_weight(self.panels.dense(values))

    def gather(self, weight: Tensor) -> Tensor:
        """The entries of a tensor of the weight's shape at the connections."""
        return self.panels.gather(weight.t() if self.is_transposed else weight)

    def sources_in(self, previous: Topology) -> Tensor:
        """int64 [connections]: the place of each connection among those of `previous`, −1 where it is new there."""
        return self.panels.sources_in(previous.panels)

    def covers(self, other: Topology) -> bool:
        """Whether each connection of `other` is one of these."""
        return bool((other.sources_in(self) >= 0).all())

    def united(self, mask: Tensor) -> Topology:
        """The topology that has the connections of `mask` too."""
        return Topology.from_mask(self.mask() | mask, self.is_transposed)

    def equals(self, other: Topology) -> bool:
        """Whether these are the same index tensors; while a compiler traces, whether they could be."""
        if self is other:
            return True
        mine, theirs = self.panels, other.panels
        if self.is_transposed != other.is_transposed or mine.offsets.shape != theirs.offsets.shape:
            return False
        if self.is_real and other.is_real:
            return mine.starts.data_ptr() == theirs.starts.data_ptr()
        return mine.sizes == theirs.sizes

    def to(self, device: torch.device) -> Topology:
        """The same topology on a device."""
        moved = [tensor.to(device) for tensor in self.panels.tensors]
        return Topology.of_parts(self.panels.sizes, moved, self.is_transposed)

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
