"""The shape that SET, RigL and their kin share: drop a fraction of the active connections, grow others."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.algorithms.options import parse_fraction


class DropAndGrow(DynamicSparsityAlgorithm):
    """Rewires at (nearly) constant sparsity; a subclass supplies the grow score, maybe a drop score.

    On an update step with drop fraction f, active − round(f·active) connections with the highest drop score
    stay; then those with the highest grow score are added, up to the target, from all that did not stay.
    A weight that is still dense is pruned straight to the target by drop score. A pattern {n, m} does so in each
    group of m, a pattern {block} with whole blocks by the sums of their scores.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        drop_fraction: share of the active connections dropped per update, a number in [0, 1] or a schedule.
        **options: the options of `DynamicSparsityAlgorithm`.
    """

    def __init__(self, sparsity: Any, *, drop_fraction: Any = 0.3, **options: Any) -> None:
        super().__init__(sparsity, **options)
        self.drop_fraction = parse_fraction(drop_fraction, "drop_fraction")

    def drop_score(self, weight: Tensor, dense_grad: Tensor | None) -> Tensor:
        """Ranks active connections; the lowest are dropped. Here: |weight|."""
        return weight.abs()

    @abstractmethod
    def grow_score(self, weight: Tensor, dense_grad: Tensor | None) -> Tensor:
        """Ranks connections that were not kept; the highest are grown.

        Args:
            weight: dense, with exact zeros.
            dense_grad: the shape of `weight`, if `needs_dense_grad`; else None.

        Returns:
            Scores of the shape of `weight`.
        """

    def update_mask(self, weight: Tensor, mask: Tensor, sparsity: float, dense_grad: Tensor | None) -> Tensor:
        """Drops, then grows; see the class."""
        score = self.drop_score(weight, dense_grad)
        if mask.all():
            return self.keep_top(score, sparsity)
        grow, fraction = self.grow_score(weight, dense_grad), self.current(self.drop_fraction)
        return self.pattern.structure.drop_and_grow(mask, score, grow, sparsity, fraction)
