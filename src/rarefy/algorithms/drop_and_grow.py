"""The shape that SET, RigL and their kin share: drop a fraction of the active connections, grow others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.algorithms.options import parse_fraction
from rarefy.distributions import DISTRIBUTIONS
from rarefy.errors import RarefyError
from rarefy.filters import Candidate
from rarefy.gradients import Shortlist
from rarefy.masks import drop_lowest, grow_highest, keep_top, kept_count
from rarefy.parameter import SparseParameter
from rarefy.schedules import FromFunction


class DropAndGrow(DynamicSparsityAlgorithm):
    """Rewires at (nearly) constant sparsity; a subclass supplies the grow score, maybe a drop score.

    On an update step with drop fraction f, active − round(f·active) connections with the highest drop score
    stay; then those with the highest grow score are added, up to the target, from all that did not stay.
    A weight that is still dense is pruned straight to the target by drop score.

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
        active = int(mask.count_nonzero())
        stay, target = self._stay_and_target(active, mask.numel(), sparsity)
        score = self.drop_score(weight, dense_grad)
        if active == mask.numel():
            return keep_top(score, target)
        kept = drop_lowest(mask, score, active - stay)
        return grow_highest(kept, self.grow_score(weight, dense_grad), target - stay)

    def _stay_and_target(self, active: int, size: int, sparsity: float, ahead: int = 0) -> tuple[int, int]:
        """How many of `active` connections an update keeps, and how many there are after it."""
        target = kept_count(size, sparsity)
        return min(active - round(self.current(self.drop_fraction, ahead) * active), target), target

    # ---- the dense gradient in compact storage ----

    def _adopt(self, candidate: Candidate) -> SparseParameter:
        parameter = super()._adopt(candidate)
        if vars(type(self)).get("grows_by_gradient_alone"):
            parameter.dense_gradient.shorten = partial(self._shorten, parameter)
        return parameter

    def _shorten(self, parameter: SparseParameter, grad: Tensor) -> Tensor | Shortlist:
        """What the update after this step can need of `grad`: all of it, unless it is known to be less."""
        if self.accumulates or not self.autoupdate or self._has_functions:
            return grad
        mask, pattern = parameter.mask, parameter.pattern
        counts = self._grow_counts(pattern.split(mask), self._coming_sparsity(parameter), ahead=1)
        if not Shortlist.is_smaller(grad, int(mask.count_nonzero()) + sum(counts)):
            return grad
        return Shortlist.of(grad, mask, pattern, counts, lambda part: self.grow_score(part, part))

    @property
    def _has_functions(self) -> bool:
        """Whether a schedule may give another value when it is asked again."""
        return any(isinstance(schedule, FromFunction) for schedule in (self.sparsity, self.drop_fraction))

    def _coming_sparsity(self, parameter: SparseParameter) -> float:
        shapes = [other.shape for other in self.parameters.values()]
        shares = DISTRIBUTIONS[self.distribution](self.current(self.sparsity, ahead=1), shapes)
        return dict(zip(self.parameters, shares, strict=True))[parameter.name]

    def _grow_counts(self, masks: Sequence[Tensor], sparsity: float, ahead: int = 0) -> list[int]:
        """How many connections an update adds to those that stay, at most, in each piece."""
        pairs = (
            self._stay_and_target(int(mask.count_nonzero()), mask.numel(), sparsity, ahead) for mask in masks
        )
        return [target - stay for stay, target in pairs]

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
