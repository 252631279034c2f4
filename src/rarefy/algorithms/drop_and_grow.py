"""The shape that SET, RigL and their kin share: drop a fraction of the active connections, grow others."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.algorithms.options import parse_fraction
from rarefy.distributions import share_out
from rarefy.errors import RarefyError
from rarefy.filters import Candidate
from rarefy.masks import grow_highest, kept_count
from rarefy.patterns.structures import FREE
from rarefy.schedules import FromFunction
from rarefy.storage.gradients import Shortlist
from rarefy.storage.parameter import SparseParameter
from rarefy.storage.ranking import highest, ranked_in_place
from rarefy.ties import TieOrder


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
            the dense gradient alone, and whose `drop_score` does not read that gradient; it may then be given any
            part of it, also as the weight, or NaN where the gradient cannot matter. It is not inherited, as a
            subclass may rank otherwise.
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
        order = TieOrder.of(self.generator)
        return self.pattern.structure.drop_and_grow(mask, score, grow, sparsity, fraction, order)

    # ---- connections that are ranked one by one ----

    @property
    def _grows_one_by_one(self) -> bool:
        """Whether the very class whose rule it is says that it grows by the gradient alone; no structure."""
        is_own = "grow_score" not in vars(self)
        says_so = is_own and vars(type(self)).get("grows_by_gradient_alone", False)
        return says_so and self.needs_dense_grad and self.pattern.structure == FREE

    @property
    def _drops_one_by_one(self) -> bool:
        """Whether the weights of active connections alone say which of them stay."""
        pairs = (self.update_mask, DropAndGrow.update_mask), (self.drop_score, DropAndGrow.drop_score)
        is_ours = all(getattr(own, "__func__", None) is base for own, base in pairs)
        return is_ours and self.pattern.axis is None

    def _next_mask(self, parameter: SparseParameter, sparsity: float) -> Tensor | None:
        """The same as by `update_mask`, without the dense weight where connections are ranked one by one."""
        held = parameter.dense_gradient.value
        if isinstance(held, Shortlist):
            self._check_covers(parameter, held, sparsity)
        is_dense = parameter.active == parameter.shape.numel()
        if is_dense or not (self._drops_one_by_one and self._grows_one_by_one):
            return super()._next_mask(parameter, sparsity)
        grad = self._dense_gradient(parameter)
        return None if grad is None else self._drop_and_grow(parameter, sparsity, grad)

    def _drop_and_grow(self, parameter: SparseParameter, sparsity: float, grad: Tensor | Shortlist) -> Tensor:
        (count,) = self._grow_counts(parameter, sparsity)
        order = TieOrder.of(self.generator)
        stay = kept_count(parameter.shape.numel(), sparsity) - count
        kept = parameter.keep_top(torch.abs, stay, order)
        if isinstance(grad, Shortlist):
            return grad.grow(kept, count, self._score, order.other())
        return grow_highest(kept, ranked_in_place(grad, self._score), count, order.other())

    def _score(self, part: Tensor) -> Tensor:
        """The grow score of some entries of the gradient."""
        return self.grow_score(part, part)

    def _adopt(self, candidate: Candidate) -> SparseParameter:
        parameter = super()._adopt(candidate)
        if self._grows_one_by_one:
            parameter.dense_gradient.shorten = partial(self._shorten, parameter)
        return parameter

    def _shorten(self, parameter: SparseParameter, grad: Tensor) -> Tensor | Shortlist:
        """What an update now or after this step can need of `grad`: all of it, unless it is known to be less."""
        if self.accumulates or not self.autoupdate or self._has_functions or not self._grows_one_by_one:
            return grad
        by_step = [self._grow_counts_at(parameter, ahead) for ahead in (0, 1)]
        counts = [max(both) for both in zip(*by_step, strict=True)]
        split, merge = parameter.pattern.split, parameter.pattern.merge
        pieces = zip(split(grad), split(parameter.mask), counts, strict=True)
        listed = merge([highest(g, mask, count, self._score) for g, mask, count in pieces])
        is_smaller = Shortlist.is_smaller(grad, int(listed.count_nonzero()))
        return Shortlist.of(grad, listed, counts) if is_smaller else grad

    def _grow_counts_at(self, parameter: SparseParameter, ahead: int) -> list[int]:
        """What an update now, or after this step, adds in each piece."""
        shapes = {name: other.shape for name, other in self.parameters.items()}
        target = self.target_at(self.step + ahead, self.updates)
        shares = share_out(self.distribution, target, shapes)
        sparsity = self.within_reach(shares, shapes)[parameter.name]
        return self._grow_counts(parameter, sparsity, ahead)

    @property
    def _has_functions(self) -> bool:
        """Whether a schedule may give another value when it is asked again."""
        return any(isinstance(schedule, FromFunction) for schedule in (self.sparsity, self.drop_fraction))

    def _grow_counts(self, parameter: SparseParameter, sparsity: float, ahead: int = 0) -> list[int]:
        """How many connections an update adds to those that stay in each piece."""
        target = kept_count(parameter.shape.numel() // parameter.pattern.groups, sparsity)
        fraction = self.current(self.drop_fraction, ahead)
        return [
            target - min(active - round(fraction * active), target) for active in parameter.active_in_pieces
        ]

    def _check_covers(self, parameter: SparseParameter, held: Shortlist, sparsity: float) -> None:
        """Refuses an update that would grow more than was listed."""
        if not held.covers(self._grow_counts(parameter, sparsity)):
            raise RarefyError(
                f"sparsity or drop_fraction of {parameter.name} was raised or lowered between the backward pass "
                "and the update, which is not allowed with accumulates = False; set accumulates = True"
            )
