"""The shape that SET, RigL and their kin share: drop a fraction of the active connections, grow others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.algorithms.options import parse_fraction
from rarefy.distributions import share_out
from rarefy.errors import RarefyError
from rarefy.filters import Candidate
from rarefy.gradients import Shortlist
from rarefy.masks import grow_highest, kept_count
from rarefy.parameter import SparseParameter
from rarefy.schedules import FromFunction
from rarefy.structures import FREE


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

    Attributes:
        grows_by_gradient_alone: set it to True in a class whose `grow_score` ranks each position by its own entry of
            the dense gradient alone, and whose `drop_score` does not read that gradient; in compact storage it may
            then hold NaN where it cannot matter. It is not inherited, as a subclass may rank otherwise.
    """

    grows_by_gradient_alone: ClassVar[bool] = False

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
        if int(mask.count_nonzero()) == mask.numel():
            return self.keep_top(score, sparsity)
        grow, fraction = self.grow_score(weight, dense_grad), self.current(self.drop_fraction)
        return self.pattern.structure.drop_and_grow(mask, score, grow, sparsity, fraction)

    # ---- the dense gradient in compact storage ----

    def _adopt(self, candidate: Candidate) -> SparseParameter:
        parameter = super()._adopt(candidate)
        if vars(type(self)).get("grows_by_gradient_alone") and self.pattern.structure == FREE:
            parameter.dense_gradient.shorten = partial(self._shorten, parameter)
        return parameter

    def _shorten(self, parameter: SparseParameter, grad: Tensor) -> Tensor | Shortlist:
        """What an update now or after this step can need of `grad`: all of it, unless it is known to be less."""
        if self.accumulates or not self.autoupdate or self._has_functions:
            return grad
        mask, pattern = parameter.mask, parameter.pattern
        by_step = [self._grow_counts_at(parameter, mask, ahead) for ahead in (0, 1)]
        counts = [max(both) for both in zip(*by_step, strict=True)]
        if not Shortlist.is_smaller(grad, int(mask.count_nonzero()) + sum(counts)):
            return grad
        pieces = zip(pattern.split(mask), pattern.split(grad), counts, strict=True)
        listed = pattern.merge([grow_highest(m, self.grow_score(g, g), count) for m, g, count in pieces])
        return Shortlist.of(grad, mask, listed, counts, lambda part: self.grow_score(part, part))

    def _grow_counts_at(self, parameter: SparseParameter, mask: Tensor, ahead: int) -> list[int]:
        """What an update now, or after this step, adds in each piece."""
        shapes = {name: other.shape for name, other in self.parameters.items()}
        target = self.target_at(self.step + ahead, self.updates)
        sparsity = share_out(self.distribution, target, shapes)[parameter.name]
        return self._grow_counts(parameter.pattern.split(mask), sparsity, ahead)

    @property
    def _has_functions(self) -> bool:
        """Whether a schedule may give another value when it is asked again."""
        return any(isinstance(schedule, FromFunction) for schedule in (self.sparsity, self.drop_fraction))

    def _grow_counts(self, masks: Sequence[Tensor], sparsity: float, ahead: int = 0) -> list[int]:
        """How many connections an update adds to those that stay in each piece."""
        fraction, counts = self.current(self.drop_fraction, ahead), list[int]()
        for mask in masks:
            active, target = int(mask.count_nonzero()), kept_count(mask.numel(), sparsity)
            counts.append(target - min(active - round(fraction * active), target))
        return counts

    def _update_parameter(self, parameter: SparseParameter, sparsity: float) -> None:
        held = parameter.dense_gradient.value
        if isinstance(held, Shortlist):
            needed = self._grow_counts(parameter.pattern.split(parameter.mask), sparsity)
            if not held.covers(needed):
                raise RarefyError(
                    f"sparsity or drop_fraction of {parameter.name} was raised or lowered between the backward pass "
                    "and the update, which is not allowed with accumulates = False; set accumulates = True"
                )
        super()._update_parameter(parameter, sparsity)
