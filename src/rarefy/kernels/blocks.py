"""The topology of a matrix of which whole blocks are active; README.md in this directory describes the layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import native, selection


@dataclass(frozen=True, slots=True)
class BlockTopology:
    """Which blocks of a matrix [rows, columns] are active, by block row and by block column.

    Values [blocks, height, width] are kept by whoever owns them, ordered by block row, then block column.

    Args:
        rows, columns: shape of the matrix.
        height, width: shape of a block, which divides that of the matrix.
        starts: int32 [block rows + 1], first block of each block row.
        indices: int32 [blocks], block column of each block.
        transposed_starts: int32 [block columns + 1], first of `transposed_indices` for each block column.
        transposed_indices: int32 [blocks], block row of each block, by block column.
        order: int32 [blocks], place among the values of each of `transposed_indices`.
    """

    rows: int
    columns: int
    height: int
    width: int
    starts: Tensor
    indices: Tensor
    transposed_starts: Tensor
    transposed_indices: Tensor
    order: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, block: tuple[int, int]) -> BlockTopology:
        """The topology of a mask whose blocks are active as a whole.

        Args:
            mask: bool [rows, columns] on any device.
            block: height and width of a block.

        Raises:
            RarefyError: no bool matrix, blocks that do not divide it, or one that is active in part.

        Example:
            >>> mask = torch.tensor([[True, True, False, False], [True, True, False, False]])
            >>> BlockTopology.from_mask(mask, (2, 2)).indices
            tensor([0], dtype=torch.int32)
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            given = f"{mask.dtype} with shape {tuple(mask.shape)}"
            raise RarefyError(f"mask: {given} is not allowed; give a bool matrix")
        selection.check_blocks(mask, block)
        active = whole_blocks(mask, block)
        if active is None:
            raise RarefyError(
                f"mask: blocks {tuple(block)} that are active in part are not allowed; give whole ones"
            )
        return cls.from_blocks(active, block)

    @classmethod
    def from_blocks(cls, active: Tensor, block: tuple[int, int]) -> BlockTopology:
        """The topology of a bool matrix with one entry a block.

        Example:
            >>> topology = BlockTopology.from_blocks(torch.tensor([[True, False], [True, True]]), (8, 16))
            >>> (topology.rows, topology.columns), topology.order
            ((16, 32), tensor([0, 1, 2], dtype=torch.int32))
        """
        height, width = block
        row, column = active.nonzero().unbind(1)
        # Stable, so that within a block column the block rows rise.
        order = column.argsort(stable=True)
        return cls(
            rows=active.shape[0] * height,
            columns=active.shape[1] * width,
            height=height,
            width=width,
            starts=_starts(active.sum(1)),
            indices=column.to(torch.int32),
            transposed_starts=_starts(active.sum(0)),
            transposed_indices=row[order].to(torch.int32),
            order=order.to(torch.int32),
        )

    @property
    def blocks(self) -> int:
        """Number of active blocks."""
        return self.indices.numel()

    @property
    def nonzeros(self) -> int:
        """Number of active connections."""
        return self.blocks * self.height * self.width

    @property
    def density(self) -> float:
        """Share of active connections; 0 for an empty matrix."""
        return self.nonzeros / (self.rows * self.columns) if self.rows * self.columns else 0.0

    @property
    def values_shape(self) -> tuple[int, int, int]:
        """The shape of the values: [blocks, height, width]."""
        return self.blocks, self.height, self.width

    @property
    def sizes(self) -> list[int]:
        """The four whole numbers, in the order in which the operations take them."""
        return [self.rows, self.columns, self.height, self.width]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five index tensors, in the order in which the operations take them."""
        return self.starts, self.indices, self.transposed_starts, self.transposed_indices, self.order

    def active(self) -> Tensor:
        """The blocks as a bool matrix [block rows, block columns].

        Example:
            >>> BlockTopology.from_blocks(torch.tensor([[True, False]]), (8, 8)).active()
            tensor([[ True, False]])
        """
        shape = (self.rows // self.height, self.columns // self.width)
        active = torch.zeros(shape, dtype=torch.bool, device=self.indices.device)
        active[block_rows(self.starts, self.blocks), self.indices.long()] = True
        return active

    def mask(self) -> Tensor:
        """The mask, bool [rows, columns].

        Example:
            >>> BlockTopology.from_blocks(torch.tensor([[True, False]]), (1, 2)).mask()
            tensor([[ True,  True, False, False]])
        """
        spread = self.active()[:, None, :, None].expand(-1, self.height, -1, self.width)
        return spread.reshape(self.rows, self.columns)

    def positions(self) -> Tensor:
        """int64 [blocks, height, width]: row · columns + column of each connection, in the order of the values.

        Example:
            >>> BlockTopology.from_blocks(torch.tensor([[False, True]]), (2, 2)).positions()
            tensor([[[2, 3],
                     [6, 7]]])
        """
        device = self.indices.device
        first = (
            block_rows(self.starts, self.blocks) * (self.height * self.columns) + self.indices * self.width
        )
        down = torch.arange(self.height, device=device) * self.columns
        return first[:, None, None] + down[:, None] + torch.arange(self.width, device=device)

    def dense(self, values: Tensor) -> Tensor:
        """The matrix [rows, columns] with these values, zero elsewhere; differentiable.

        Example:
            >>> topology = BlockTopology.from_blocks(torch.tensor([[False, True]]), (1, 2))
            >>> topology.dense(torch.tensor([[[1.0, 2.0]]]))
            tensor([[0., 0., 1., 2.]])
        """
        return dense(values, self.starts, self.indices, self.sizes)

    def gather(self, matrix: Tensor) -> Tensor:
        """The active blocks of a dense matrix [rows, columns], in the order of the values; differentiable.

        Example:
            >>> topology = BlockTopology.from_blocks(torch.tensor([[False, True]]), (1, 2))
            >>> topology.gather(torch.tensor([[9.0, 9.0, 1.0, 2.0]]))
            tensor([[[1., 2.]]])
        """
        return gather(matrix, self.starts, self.indices, self.sizes)

    def sources_in(self, previous: BlockTopology) -> Tensor:
        """int64 [blocks]: the place of each block among those of `previous`, −1 where it is new.

        Example:
            >>> old, new = torch.tensor([[True, True, False]]), torch.tensor([[False, True, True]])
            >>> BlockTopology.from_blocks(new, (8, 8)).sources_in(BlockTopology.from_blocks(old, (8, 8)))
            tensor([ 1, -1])
        """
        place = torch.full(
            (self.rows // self.height, self.columns // self.width), -1, device=self.indices.device
        )
        count = torch.arange(previous.blocks, device=place.device)
        place[block_rows(previous.starts, previous.blocks), previous.indices.long()] = count
        return place[block_rows(self.starts, self.blocks), self.indices.long()]


def whole_blocks(mask: Tensor, block: tuple[int, int]) -> Tensor | None:
    """The active blocks of a mask as a bool matrix; None where it does not consist of whole ones.

    Example:
        >>> whole_blocks(torch.tensor([[True, True, False, False]]), (1, 2))
        tensor([[ True, False]])
        >>> whole_blocks(torch.tensor([[True, False, False, False]]), (1, 2)) is None
        True
    """
    if mask.shape[0] % block[0] or mask.shape[1] % block[1]:
        return None
    active = active_blocks(mask, block)
    idle = active_blocks(~mask, block)
    return None if bool((active & idle).any()) else active


def active_blocks(mask: Tensor, block: tuple[int, int]) -> Tensor:
    """Which blocks of a mask have an active connection, as a bool matrix.

    Args:
        mask: bool [rows, columns].
        block: height and width of a block; each divides its dimension.

    Raises:
        RarefyError: the blocks do not divide the mask.

    Example:
        >>> active_blocks(torch.tensor([[True, False, False, False]]), (1, 2))
        tensor([[ True, False]])
    """
    selection.check_blocks(mask, block)
    down, across = (size // side for size, side in zip(mask.shape, block, strict=True))
    # The highest byte of each: whole rows first, which torch compares by vectors.
    rows = mask.view(torch.uint8).reshape(down, block[0], mask.shape[1]).amax(1)
    return rows.view(down, across, block[1]).amax(2).bool()


def block_rows(starts: Tensor, blocks: int) -> Tensor:
    """int64 [blocks]: block row of each block.

    Example:
        >>> block_rows(torch.tensor([0, 1, 1, 3]), 3)
        tensor([0, 2, 2])
    """
    counts = starts.diff()
    rows = torch.arange(counts.numel(), device=starts.device)
    # With the size given, nobody has to wait for a GPU to count.
    return torch.repeat_interleave(rows, counts, output_size=blocks)


def dense(values: Tensor, starts: Tensor, indices: Tensor, sizes: list[int]) -> Tensor:
    """`BlockTopology.dense`, from the parts of a topology.

    Example:
        >>> dense(torch.ones(1, 1, 2), torch.tensor([0, 1]), torch.tensor([1]), [1, 4, 1, 2])
        tensor([[0., 0., 1., 1.]])
    """
    rows, columns, height, width = sizes
    # With int64, as torch takes no other index.
    places = (block_rows(starts, indices.numel()), indices.long())
    if native.unwatched(values):
        matrix = values.new_zeros(rows, columns)
        blocks = matrix.view(rows // height, height, columns // width, width).transpose(1, 2)
        blocks.index_put_(places, values)
        return matrix
    # Not in place, so that the gradient finds its way to the values.
    blocks = values.new_zeros(rows // height, columns // width, height, width).index_put(places, values)
    return blocks.transpose(1, 2).reshape(rows, columns)


def gather(matrix: Tensor, starts: Tensor, indices: Tensor, sizes: list[int]) -> Tensor:
    """`BlockTopology.gather`, from the parts of a topology.

    Example:
        >>> gather(torch.arange(4).view(1, 4), torch.tensor([0, 1]), torch.tensor([1]), [1, 4, 1, 2])
        tensor([[[2, 3]]])
    """
    rows, columns, height, width = sizes
    blocks = matrix.reshape(rows // height, height, columns // width, width).transpose(1, 2)
    return blocks[block_rows(starts, indices.numel()), indices.long()]


def _starts(counts: Tensor) -> Tensor:
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    starts[1:] = counts.cumsum(0)
    return starts
