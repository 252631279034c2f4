"""How the connections of one piece are chosen: one by one, n of m neighbours, as many an output, or in whole blocks.

A structure folds a piece of a weight to rows of units and keeps the same number of units in every row. All
selection happens on these rows, so a new structure says how to fold and how to unfold, and nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rarefy import kernels, masks
from rarefy.distributed import is_cut
from rarefy.errors import ConfigError, RarefyError
from rarefy.patterns.matrices import from_matrix, to_matrix
from rarefy.patterns.tiles import fullest_row
from rarefy.ties import DEFAULT_ORDER, TieOrder

# Half of the third digit, in which 1 − n/m may be written: 0.667 for 1 of 3.
TOLERANCE = 5e-4


class Structure(ABC):
    """What a mask may look like inside one piece of a weight [out, in, …]."""

    @property
    def highest_sparsity(self) -> float:
        """The highest sparsity that may be asked for."""
        return 1.0

    @property
    def counted_axis(self) -> int | None:
        """The dimension, 0 of outputs or 1 of inputs, each entry of which has as many connections; None without one."""
        return None

    @abstractmethod
    def layout(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many rows a piece of a shape has, and how many units in each."""

    @abstractmethod
    def fold(self, scores: Tensor) -> Tensor:
        """The scores of the units, [rows, units]; a unit's score is made of those of its connections."""

    @abstractmethod
    def unfold(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """The mask of a piece from the mask of its units."""

    @abstractmethod
    def holds(self, mask: Tensor, sparsity: float) -> bool:
        """Whether the mask of a piece has this structure at a sparsity."""

    @abstractmethod
    def check(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a piece that cannot have this structure.

        Raises:
            ConfigError: a dimension is missing or is not divided.
        """

    def fold_mask(self, mask: Tensor) -> Tensor:
        """Bool [rows, units]: which units have an active connection."""
        return self.fold(mask.float()) > 0

    def within_reach(self, shape: Sequence[int], sparsity: float) -> float:
        """The sparsity, lowered where rounding would leave a row of a piece without any unit.

        Example:
            >>> Free().within_reach((1, 16), 0.98), Free().within_reach((1, 16), 1.0)
            (0.9375, 1.0)
        """
        units = self.layout(shape)[1]
        is_empty = units > 0 and masks.kept_count(units, sparsity) == 0
        return 1.0 - 1.0 / units if is_empty and sparsity < 1.0 else sparsity

    def kept(self, shape: Sequence[int], sparsity: float) -> int:
        """How many connections of a piece are active at a sparsity.

        Example:
            >>> Blocks(4, 4).kept((8, 8), 0.75)
            16
        """
        rows, units = self.layout(shape)
        return rows * masks.kept_count(units, sparsity) * (math.prod(shape) // max(rows * units, 1))

    def keep_top(self, scores: Tensor, sparsity: float, order: TieOrder = DEFAULT_ORDER) -> Tensor:
        """The mask of the highest scores of a piece.

        Args:
            scores: of every connection; higher = keep.
            sparsity: fraction of inactive connections, in [0, 1].
            order: decides among units of equal scores.

        Example:
            >>> import torch
            >>> NOfM(1, 2).keep_top(torch.tensor([[1.0, 2.0, 9.0, 8.0]]), 0.5).int()
            tensor([[0, 1, 1, 0]], dtype=torch.int32)
        """
        rows = self.fold(scores)
        count = masks.kept_count(rows.shape[1], sparsity)
        return self.unfold(masks.keep_top_in_rows(rows, count, order), scores.shape)

    def drop_and_grow(
        self,
        mask: Tensor,
        drop_scores: Tensor,
        grow_scores: Tensor,
        sparsity: float,
        fraction: float,
        order: TieOrder = DEFAULT_ORDER,
    ) -> Tensor:
        """The mask of a piece after one update; see `masks.drop_and_grow`.

        Example:
            >>> import torch
            >>> mask, scores = torch.tensor([[True, False, True, False]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
            >>> NOfM(1, 2).drop_and_grow(mask, scores, scores, 0.5, fraction=1.0).int()
            tensor([[0, 1, 0, 1]], dtype=torch.int32)
        """
        units = self.fold_mask(mask)
        count = masks.kept_count(units.shape[1], sparsity)
        folded = self.fold(drop_scores), self.fold(grow_scores)
        return self.unfold(masks.drop_and_grow(units, *folded, count, fraction, order), mask.shape)

    def dropped(
        self,
        mask: Tensor,
        scores: Tensor,
        sparsity: float,
        fraction: float,
        order: TieOrder = DEFAULT_ORDER,
        *,
        by_size: bool = False,
    ) -> Tensor:
        """What `drop_and_grow` leaves before it grows; `by_size` if scores count without their signs.

        Example:
            >>> import torch
            >>> Free().dropped(torch.tensor([True, True, False]), torch.tensor([1.0, 2.0, 9.0]), 0.5, 0.5).tolist()
            [False, True, False]
        """
        units = self.fold_mask(mask)
        count = masks.kept_count(units.shape[1], sparsity)
        folded = self.fold(scores.abs() if by_size else scores)
        return self.unfold(masks.drop_in_rows(units, folded, count, fraction, order), mask.shape)

    def require(self, mask: Tensor, sparsity: float, source: str, advice: str) -> Tensor:
        """The mask of a piece, if it has this structure.

        Args:
            mask: bool, of a piece.
            sparsity: that was asked for.
            source: what made the mask, for the message.
            advice: what to do instead.

        Raises:
            RarefyError: it has another structure.
        """
        if not self.holds(mask, sparsity):
            raise RarefyError(f"{source} returned a mask that does not obey the pattern {self}; {advice}")
        return mask


@dataclass(frozen=True)
class Free(Structure):
    """Any connection may be active."""

    def __str__(self) -> str:
        return "unstructured"

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Takes any shape."""

    def keep_top(self, scores: Tensor, sparsity: float, order: TieOrder = DEFAULT_ORDER) -> Tensor:
        """The mask of the highest scores of a piece, or of a whole weight that is cut over processes."""
        if is_cut(scores):
            return masks.keep_top(scores, masks.kept_count(scores.numel(), sparsity), order)
        return super().keep_top(scores, sparsity, order)

    def drop_and_grow(
        self,
        mask: Tensor,
        drop_scores: Tensor,
        grow_scores: Tensor,
        sparsity: float,
        fraction: float,
        order: TieOrder = DEFAULT_ORDER,
    ) -> Tensor:
        """The mask of a piece after one update, or of a whole weight that is cut over processes."""
        scores = drop_scores, grow_scores
        if is_cut(mask):
            count = masks.kept_count(mask.numel(), sparsity)
            return masks.drop_and_grow_in_pieces(mask, *scores, count, fraction, order)
        return super().drop_and_grow(mask, *scores, sparsity, fraction, order)

    def dropped(
        self,
        mask: Tensor,
        scores: Tensor,
        sparsity: float,
        fraction: float,
        order: TieOrder = DEFAULT_ORDER,
        *,
        by_size: bool = False,
    ) -> Tensor:
        """What `drop_and_grow` leaves before it grows."""
        if is_cut(mask):
            count = masks.kept_count(mask.numel(), sparsity)
            return masks.drop_in_pieces(mask, scores.abs() if by_size else scores, count, fraction, order)[0]
        return super().dropped(mask, scores, sparsity, fraction, order, by_size=by_size)

    def layout(self, shape: Sequence[int]) -> tuple[int, int]:
        """One row of connections."""
        return 1, math.prod(shape)

    def fold(self, scores: Tensor) -> Tensor:
        """Flat."""
        return scores.reshape(1, -1)

    def fold_mask(self, mask: Tensor) -> Tensor:
        """Flat."""
        return mask.reshape(1, -1)

    def unfold(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """In shape again."""
        return units.view(tuple(shape))

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class NOfM(Structure):
    """Of every m consecutive inputs of an output, n are active (Zhou et al., arXiv:2102.04010).

    Inputs are dimension 1 of a weight [out, in, …]; the groups of a convolution are input channels at one position
    of its kernel.

    Args:
        n: active connections of a group, 1 ≤ n < m.
        m: size of a group.

    Example:
        >>> import torch
        >>> NOfM(2, 4).keep_top(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 0.5).tolist()
        [[False, True, True, False]]
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{{n: {self.n}, m: {self.m}}}"

    @property
    def highest_sparsity(self) -> float:
        """The sparsity at which n of m are active."""
        return 1.0 - self.n / self.m

    def reached_at(self, sparsity: float) -> bool:
        """Whether n of m are active at a sparsity, which may be written to three digits.

        Example:
            >>> NOfM(1, 3).reached_at(0.667), NOfM(1, 3).reached_at(0.7)
            (True, False)
        """
        is_near = abs(sparsity - self.highest_sparsity) <= TOLERANCE
        return is_near and masks.kept_count(self.m, sparsity) == self.n

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a weight whose inputs are no multiple of m."""
        inputs = shape[1] if len(shape) > 1 else 0
        if not inputs or inputs % self.m:
            what = f"an m that divides the {inputs} input features of {name} {list(shape)}"
            raise ConfigError("pattern", self, what)

    def layout(self, shape: Sequence[int]) -> tuple[int, int]:
        """A row for each group."""
        return math.prod(shape) // self.m, self.m

    def fold(self, scores: Tensor) -> Tensor:
        """A row for each group."""
        return to_matrix(scores).reshape(-1, self.m)

    def fold_mask(self, mask: Tensor) -> Tensor:
        """A row for each group."""
        return to_matrix(mask).reshape(-1, self.m)

    def unfold(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """The groups in their places."""
        return from_matrix(units, shape)

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        """Whether no group has more active connections than it may."""
        most = masks.kept_count(self.m, sparsity)
        return fullest_row(self.fold_mask(mask), self.m) <= most


def _norms(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """Root of the sum of squares; of negative scores the squares count as negative, so that higher stays better."""
    wide = matrix.double()  # squares of small gradients would vanish
    sums = kernels.block_sums(wide * wide.abs(), block)
    return sums.sign() * sums.abs().sqrt()


def _highest(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    kernels.check_blocks(matrix, block)
    return matrix.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax((1, 3))


BLOCK_SCORES = {"sum": kernels.block_sums, "norm": _norms, "max": _highest}


def refuse_indivisible(
    structure: Structure, name: str, shape: Sequence[int], block: tuple[int, int], wanted: str
) -> None:
    """Refuses a weight whose outputs and inputs cannot be cut in blocks.

    Raises:
        ConfigError: they cannot; it asks for what is `wanted`.
    """
    # A bias has outputs alone.
    outputs, inputs = (*shape, 0)[:2]
    if not inputs or outputs % block[0] or inputs % block[1]:
        sides = f"{outputs} output and the {inputs} input features"
        raise ConfigError("pattern", structure, f"{wanted} the {sides} of {name} {list(shape)}")


@dataclass(frozen=True)
class Blocks(Structure):
    """Connections are active in whole blocks of outputs × inputs.

    Blocks lie in dimensions 0 and 1 of a weight [out, in, …]; each position of a convolution's kernel has its own.

    Args:
        rows: outputs of a block.
        columns: inputs of a block.
        score: what a block's score is of those of its connections, a name in `BLOCK_SCORES`.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[3.0, 3.0, 5.0, 0.0]])
        >>> [Blocks(1, 2, score).fold(scores).tolist() for score in ("sum", "max")]
        [[[6.0, 5.0]], [[3.0, 5.0]]]
    """

    rows: int
    columns: int
    score: str = "sum"

    def __str__(self) -> str:
        score = "" if self.score == "sum" else f", score: {self.score}"
        return f"{{block: [{self.rows}, {self.columns}]{score}}}"

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a weight that the blocks do not divide."""
        refuse_indivisible(self, name, shape, (self.rows, self.columns), "blocks that divide")

    def layout(self, shape: Sequence[int]) -> tuple[int, int]:
        """One row of blocks."""
        return 1, math.prod(shape) // (self.rows * self.columns)

    def fold(self, scores: Tensor) -> Tensor:
        """The scores of the blocks."""
        matrix = to_matrix(scores)
        if matrix.numel() == 0:
            return matrix.reshape(1, 0)
        return BLOCK_SCORES[self.score](matrix, (self.rows, self.columns)).reshape(1, -1)

    def fold_mask(self, mask: Tensor) -> Tensor:
        """The blocks that have an active connection."""
        matrix = to_matrix(mask)
        if matrix.numel() == 0:
            return matrix.reshape(1, 0)
        return kernels.active_blocks(matrix, (self.rows, self.columns)).reshape(1, -1)

    def unfold(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Each block all active or all inactive."""
        height = math.prod(shape) // shape[1] // self.rows
        width = shape[1] // self.columns
        blocks = units.view(height, 1, width, 1).expand(height, self.rows, width, self.columns)
        return from_matrix(blocks, shape)

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        """Whether no block is active in part only."""
        return kernels.whole_blocks(to_matrix(mask), (self.rows, self.columns)) is not None


FREE = Free()
