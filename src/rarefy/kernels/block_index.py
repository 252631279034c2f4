"""Whole blocks seen as connections, so that a weight of blocks is held like any other: one value a connection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.kernels import block_native, native, reference
from rarefy.kernels.blocks import BlockTopology, whole_blocks
from rarefy.kernels.panels import Panels

_UNIT = 8  # heights and widths that the compiled kernels take are multiples of this


@dataclass(frozen=True, slots=True)
class BlockIndex:
    """A `BlockTopology` with the surface of `Panels`: values are flat, block after block, each in row-major order.

    Args:
        blocks: which blocks are active.

    Example:
        >>> index = BlockIndex(BlockTopology.from_blocks(torch.tensor([[False, True]]), (1, 2)))
        >>> index.nonzeros, index.dense(torch.tensor([1.0, 2.0]))
        (2, tensor([[0., 0., 1., 2.]]))
    """

    blocks: BlockTopology

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.blocks.rows

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return self.blocks.columns

    @property
    def nonzeros(self) -> int:
        """Number of active connections."""
        return self.blocks.nonzeros

    @property
    def sizes(self) -> list[int]:
        """The four whole numbers, in the order in which the operations take them."""
        return self.blocks.sizes

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five index tensors, in the order in which the operations take them."""
        return self.blocks.tensors

    def positions(self) -> Tensor:
        """int64 [connections]: row · columns + column of each connection, in the order of the values."""
        return self.blocks.positions().reshape(-1)

    def mask(self) -> Tensor:
        """The mask, bool [rows, columns]."""
        return self.blocks.mask()

    def dense(self, values: Tensor) -> Tensor:
        """The matrix [rows, columns] with `values` at the connections and zeros elsewhere; differentiable."""
        return self.blocks.dense(self._in_blocks(values))

    def gather(self, matrix: Tensor) -> Tensor:
        """The entries of a dense matrix [rows, columns] at the connections; differentiable."""
        return self.blocks.gather(matrix).reshape(-1)

    def sources_in(self, previous: Panels | BlockIndex) -> Tensor:
        """int32 [connections]: the place of each connection among the values of `previous`, −1 where it is new.

        Example:
            >>> old, new = (torch.tensor([blocks]) for blocks in ([True, True, False], [False, True, True]))
            >>> old, new = (BlockIndex(BlockTopology.from_blocks(one, (1, 2))) for one in (old, new))
            >>> new.sources_in(old)
            tensor([ 2,  3, -1, -1], dtype=torch.int32)
        """
        if not isinstance(previous, BlockIndex) or previous.block != self.block:
            return sources_between(self, previous)
        # whole blocks move: what holds for the block holds for its connections
        size = self.blocks.height * self.blocks.width
        # Panels have fewer than 2³¹ connections; blocks may have more.
        dtype = torch.int32 if previous.nonzeros < 2**31 else torch.int64
        first = self.blocks.sources_in(previous.blocks)[:, None].to(dtype) * size
        inside = torch.arange(size, dtype=dtype, device=first.device)
        return torch.where(first < 0, -1, first + inside).reshape(-1)

    @property
    def block(self) -> tuple[int, int]:
        """Height and width of a block."""
        return self.blocks.height, self.blocks.width

    # ---- products ----

    def linear(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """X · Wᵀ + bias as an operation; sizes and dtypes fit together already."""
        operation = torch.ops.rarefy.block_linear
        return operation(x, self._in_blocks(values), bias, None, *self.tensors, self.sizes)

    def gradients(
        self, grad: Tensor, x: Tensor, values: Tensor, needs: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, values and bias; those that are not needed are of any content."""
        operation = torch.ops.rarefy.block_linear_backward
        parts = (*self.tensors, self.sizes, needs)
        of_x, of_values, of_bias = operation(grad, x, self._in_blocks(values), *parts)
        return of_x, of_values.reshape(-1), of_bias

    def infer(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor | None:
        """What `linear` returns, past the dispatcher, where nobody has to see it; else None."""
        tensors = (x, values) if bias is None else (x, values, bias)
        if torch.compiler.is_compiling() or not native.unwatched(*tensors):
            return None
        sizes = self.sizes
        is_full = all(one.dtype is torch.float32 and one.is_contiguous() for one in tensors[1:])
        fits = x.dim() > 0 and x.shape[-1] == sizes[1] and values.numel() == self.nonzeros
        if not (is_full and fits and (bias is None or bias.shape == (sizes[0],))):
            return None
        if not block_native.serves(sizes, x, values) or (bias is not None and not bias.is_cpu):
            return None
        return block_native.forward(x.contiguous(), values, bias, *self.tensors[:2], sizes)

    def infer_gradients(
        self, grad: Tensor, x: Tensor, values: Tensor, needs: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What `gradients` returns, past the dispatcher, where nobody has to see it; else None."""
        if torch.compiler.is_compiling() or not native.unwatched(grad, x, values):
            return None
        sizes = self.sizes
        is_full = values.dtype is torch.float32 and values.is_contiguous() and values.numel() == self.nonzeros
        if not is_full or grad.dtype is not x.dtype or not native.fits(grad, x, *sizes[:2]):
            return None
        if not block_native.serves(sizes, grad, x, values):
            return None
        transpose = self.tensors[2:]
        return block_native.backward(grad.contiguous(), x.contiguous(), values, transpose, sizes, needs)

    def _in_blocks(self, values: Tensor) -> Tensor:
        return values.view(-1, *self.block)


def index_of(mask: Tensor, block: tuple[int, int] | None = None) -> Panels | BlockIndex:
    """The index of a mask: by blocks where it consists of whole ones that the kernels take, else by panels.

    Args:
        mask: bool [rows, columns] on any device.
        block: height and width of the blocks that it may consist of.

    Raises:
        RarefyError: the mask is not a bool matrix, or has too many active connections.

    Example:
        >>> type(index_of(torch.ones(16, 8, dtype=torch.bool), (8, 8))).__name__
        'BlockIndex'
        >>> type(index_of(torch.eye(16, dtype=torch.bool), (8, 8))).__name__
        'Panels'
    """
    if block is not None and takes_blocks(block):
        active = whole_blocks(mask, block)
        if active is not None:
            return BlockIndex(BlockTopology.from_blocks(active, block))
    return Panels.from_mask(mask)


def takes_blocks(block: tuple[int, int]) -> bool:
    """Whether there are kernels for blocks of this height and width.

    Example:
        >>> takes_blocks((8, 24)), takes_blocks((4, 8))
        (True, False)
    """
    return not any(size % _UNIT for size in block)


def sources_between(new: Panels | BlockIndex, previous: Panels | BlockIndex) -> Tensor:
    """`sources_in` for two indices of any kind.

    Example:
        >>> mask = torch.ones(8, 8, dtype=torch.bool)
        >>> torch.equal(sources_between(index_of(mask, (8, 8)), index_of(mask)), torch.arange(64))
        True
    """
    return reference.sources(new.rows * new.columns, new.positions(), previous.positions())
