"""The structure of n of m in both directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rarefy import masks
from rarefy.patterns.matrices import from_matrix, to_matrix
from rarefy.patterns.structures import NOfM, refuse_indivisible
from rarefy.patterns.tiles import from_tiles, fullest_column, fullest_row, keep_regular_in, to_tiles
from rarefy.ties import DEFAULT_ORDER, TieOrder


@dataclass(frozen=True)
class Transposable(NOfM):
    """In every tile of m × m, each row and each column has n active connections (Hubara et al., arXiv:2102.08124).

    So the transposed weight, by which the backward pass multiplies, is n of m as well. What is kept is the best of all
    masks of a tile up to m = 4, and an approximation above; see `tiles.keep_regular`.

    Args:
        n: active connections of a row and of a column, 1 ≤ n < m.
        m: side of a tile.

    Example:
        >>> import torch
        >>> Transposable(1, 2).keep_top(torch.tensor([[9.0, 8.0], [7.0, 1.0]]), 0.5).int().tolist()
        [[0, 1], [1, 0]]
    """

    def __str__(self) -> str:
        return f"{{n: {self.n}, m: {self.m}, transposable: true}}"

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a weight whose outputs or inputs are no multiple of m."""
        refuse_indivisible(self, name, shape, (self.m, self.m), "an m that divides")

    def layout(self, shape: Sequence[int]) -> tuple[int, int]:
        """A row for each tile."""
        return math.prod(shape) // self.m**2, self.m**2

    def within_reach(self, shape: Sequence[int], sparsity: float) -> float:
        """The sparsity, lowered where rounding would leave a row of a tile without any connection."""
        is_empty = math.prod(shape) > 0 and masks.kept_count(self.m, sparsity) == 0
        return 1.0 - 1.0 / self.m if is_empty and sparsity < 1.0 else sparsity

    def kept(self, shape: Sequence[int], sparsity: float) -> int:
        """How many connections of a piece are active at a sparsity."""
        return math.prod(shape) // self.m * masks.kept_count(self.m, sparsity)

    def fold(self, scores: Tensor) -> Tensor:
        """A row for each tile."""
        return to_tiles(to_matrix(scores), self.m)

    def fold_mask(self, mask: Tensor) -> Tensor:
        """A row for each tile."""
        return self.fold(mask)

    def unfold(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """The tiles in their places."""
        return from_matrix(from_tiles(units, self.m, shape[1]), shape)

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        """Whether no row and no column of a tile has more active connections than it may."""
        most = masks.kept_count(self.m, sparsity)
        matrix = to_matrix(mask)
        return fullest_row(matrix, self.m) <= most and fullest_column(matrix, self.m) <= most

    def keep_top(self, scores: Tensor, sparsity: float, order: TieOrder = DEFAULT_ORDER) -> Tensor:
        """The mask of the highest sums of scores of a piece; see `Structure.keep_top`."""
        count = masks.kept_count(self.m, sparsity)
        return from_matrix(keep_regular_in(to_matrix(scores), self.m, count, order), scores.shape)

    def drop_and_grow(
        self,
        mask: Tensor,
        drop_scores: Tensor,
        grow_scores: Tensor,
        sparsity: float,
        fraction: float,
        order: TieOrder = DEFAULT_ORDER,
    ) -> Tensor:
        """The mask of a piece after one update: of n in each row and column, n − round(fraction · n) stay.

        Above m = 4, where masks are approximated, a few that should stay may have to give way.

        Example:
            >>> import torch
            >>> mask, scores = torch.eye(2, dtype=torch.bool), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
            >>> Transposable(1, 2).drop_and_grow(mask, scores, scores, 0.5, fraction=1.0).int().tolist()
            [[0, 1], [1, 0]]
        """
        kept = to_matrix(self.dropped(mask, drop_scores, sparsity, fraction, order))
        count = masks.kept_count(self.m, sparsity)
        grow = to_matrix(grow_scores)
        return from_matrix(keep_regular_in(grow, self.m, count, order.other(), kept, math.inf), mask.shape)

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
        active = to_matrix(mask)
        # The fullest row says how many a row has: masks that were made elsewhere may have rows with fewer.
        before = fullest_row(active, self.m)
        count = masks.kept_count(self.m, sparsity)
        stay = count if before == self.m else min(before - round(fraction * before), count)
        kept = keep_regular_in(to_matrix(scores), self.m, stay, order, ~active, -math.inf, by_size)
        # Where too few are active, others came along.
        return from_matrix(kept.logical_and_(active), mask.shape)
