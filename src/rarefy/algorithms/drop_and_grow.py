"""The shape that SET, RigL and their kin share: drop a fraction of the active connections, grow others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.algorithms.option_checks import check_flag, parse_fraction
from rarefy.algorithms.options import Flag, FractionSchedule, Sparsity
from rarefy.algorithms.view import WeightView, also_by_parts, is_replaced
from rarefy.distributed import merged, ranks
from rarefy.errors import ConfigError, RarefyError
from rarefy.initializers import check_scores
from rarefy.masks import active_count, grow_highest, kept_count
from rarefy.patterns.constant_fan import FanIn
from rarefy.patterns.diagonals import Diagonals
from rarefy.patterns.structures import FREE, NOfM
from rarefy.schedules import FromFunction
from rarefy.storage.gradients import Shortlist
from rarefy.storage.growth import GrowthRequest
from rarefy.storage.parameter import SparseParameter
from rarefy.storage.ranking import ranked_in_place
from rarefy.ties import TieOrder, settle_rows


class DropAndGrow(DynamicSparsityAlgorithm):
    """Rewires at (nearly) constant sparsity; a subclass supplies a grow score, maybe a drop score.

    On an update step with drop fraction f, active − round(f·active) connections with the highest drop score
    stay; then those with the highest grow score are added, up to the target, from all that did not stay.
    A weight that is still dense is pruned straight to the target by drop score. A pattern {n, m} does so in each
    group of m, a pattern {block} with whole blocks by the sums of their scores.

    A subclass writes `grow_score`; or `gradient_score` where each connection is ranked by its own entry of the dense
    gradient alone. Of the gradient no more is then held than growing can need.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        drop_fraction: share of the active connections dropped per update, a number in [0, 1] or a schedule.
        keep_rows: whether the strongest connection of each output stays, and an output without any is the first that
            grows one, as far as counts allow. The methods' papers have no such rule.
        **options: the options of `DynamicSparsityAlgorithm`.

    Raises:
        RarefyError: a class without a grow score, or one that ranks by a gradient that it does not ask for.
    """

    def __init__(
        self,
        sparsity: Sparsity,
        *,
        drop_fraction: FractionSchedule = 0.3,
        keep_rows: Flag = False,
        **options: Any,
    ) -> None:
        super().__init__(sparsity, **options)
        self.drop_fraction = parse_fraction(drop_fraction, "drop_fraction")
        self.keep_rows = check_flag(keep_rows, "keep_rows")
        if self.keep_rows and isinstance(self.pattern.structure, Diagonals):
            allowed = "false: each diagonal has a connection of every feature of the weight's shorter side"
            raise ConfigError("keep_rows", f"true with the pattern {self.pattern.structure}", allowed)
        # Of these every output has connections in any case.
        self._spares = self.keep_rows and not isinstance(self.pattern.structure, NOfM | FanIn)
        name = type(self).__name__
        if not any(
            is_replaced(self, DropAndGrow, m) for m in ("update_mask", "grow_score", "gradient_score")
        ):
            raise RarefyError(f"{name} cannot grow connections: write grow_score, or gradient_score")
        if is_replaced(self, DropAndGrow, "gradient_score") and self.needs != "dense":
            raise RarefyError(f'{name}.gradient_score ranks by the dense gradient; set needs = "dense"')

    # By position only, so that a subclass may call its arguments what it likes.
    def drop_score(self, weight: Tensor, dense_grad: Tensor | None, /) -> Tensor:
        """Ranks active connections; the lowest are dropped. Here: |weight|."""
        return weight.abs()

    def grow_score(self, weight: Tensor, dense_grad: Tensor | None, /) -> Tensor:
        """Ranks connections that were not kept; the highest are grown. Here: by `gradient_score`.

        Args:
            weight: dense, with exact zeros.
            dense_grad: the shape of `weight`: the gradient that the class asks for by `needs`, or None.

        Returns:
            Scores of the shape of `weight`.
        """
        # `needs` is "dense" wherever `gradient_score` is written, or the constructor would have refused.
        assert dense_grad is not None
        return self.gradient_score(dense_grad)

    def gradient_score(self, gradient: Tensor) -> Tensor:
        """Ranks connections by their own entries of the dense gradient, any part of which it may be given."""
        raise NotImplementedError

    def _checked(self, scores: Tensor, like: Tensor, method: str) -> Tensor:
        return check_scores(scores, like, f"{type(self).__name__}.{method}")

    def _ranked(self, gradient: Tensor) -> Tensor:
        return self._checked(self.gradient_score(gradient), gradient, "gradient_score")

    @also_by_parts
    def update_mask(self, view: WeightView) -> Tensor:
        """Drops, then grows; see the class."""
        score = self._checked(self.drop_score(view.weight, view.gradient), view.weight, "drop_score")
        if active_count(view.mask) == view.mask.numel():
            return self.keep_top(self.favoured(view, view.mask, score), view.sparsity)
        return self.exchanged(view, view.mask, score)

    def exchanged(self, view: WeightView, mask: Tensor, score: Tensor) -> Tensor:
        """The mask after a drop by `score` and growth by `grow_score`, from a mask that is not all active.

        Args:
            view: of the weight.
            mask: bool, the connections to start from.
            score: of dropping.
        """
        grow = self._checked(self.grow_score(view.weight, view.gradient), view.weight, "grow_score")
        fraction = self.current(self.drop_fraction)
        order = TieOrder.of(self.generator)
        structure = self.pattern.structure
        if self._spares:
            score = self.favoured(view, mask, score)
            kept = structure.dropped(mask, score, view.sparsity, fraction, order)
            grow = self.favoured(view, kept, grow, grows=True)
        return structure.drop_and_grow(mask, score, grow, view.sparsity, fraction, order)

    def favoured(self, view: WeightView, mask: Tensor, scores: Tensor, *, grows: bool = False) -> Tensor:
        """The scores, with `keep_rows` ∞ for one connection of each output: first to stay, or first to grow.

        Args:
            view: of the weight.
            mask: bool, the connections that it has.
            scores: of dropping, or of growing; the shape of the weight.
            grows: whether outputs without connections are meant, instead of those that have some.
        """
        if not self._spares or not mask.numel() or not mask.dim():
            return scores
        pattern = self._patterns.get(view.name, self.pattern)
        # By output in dimension 0, wherever the module has it; outputs that blocks hold together are one.
        turned = scores.transpose(0, pattern.outputs)
        outputs = len(turned) // (pattern.block or (1, 1))[0]
        rows = turned.reshape(outputs, -1)
        active = mask.transpose(0, pattern.outputs).reshape(outputs, -1)
        # NaN would be the highest of all to argmax.
        candidates = torch.where(active | grows, rows, -torch.inf).nan_to_num(nan=-torch.inf)
        is_meant = active.any(1) != grows
        best = torch.zeros_like(active).scatter_(1, candidates.argmax(1, keepdim=True), is_meant[:, None])
        contested = is_meant & ((candidates == candidates.amax(1, keepdim=True)).sum(1) > 1)
        best = settle_rows(best, candidates, None, contested, TieOrder.of(self.generator))
        return rows.masked_fill(best, torch.inf).view(turned.shape).transpose(0, pattern.outputs)

    def _takes_pieces(self, parameter: SparseParameter) -> bool:
        """An output may be cut in pieces, so that only the whole weight shows what it has."""
        return super()._takes_pieces(parameter) and not self.keep_rows

    # ---- connections that are ranked one by one ----

    @property
    def _merges(self) -> bool:
        """Whether several processes exchange what may be largest in place of all entries."""
        is_by_size = type(self).gradient_score is by_size and "gradient_score" not in vars(self)
        return is_by_size and 1 < ranks() <= merged.MOST

    @property
    def _ranks_one_by_one(self) -> bool:
        """Whether the weights of active connections say which of them stay, and entries of the gradient what grows."""
        rules = ("update_mask", "drop_score", "grow_score")
        is_own = not any(is_replaced(self, DropAndGrow, rule) for rule in rules)
        return is_own and self.pattern.structure == FREE and not self.keep_rows

    def gradient_request(self) -> GrowthRequest | None:
        """The entries that growing can need, where they are known before the update; else the whole gradient."""
        schedules = (self.sparsity, self.drop_fraction)
        # A function may give another value when it is asked again.
        is_known = self.autoupdate and not any(isinstance(schedule, FromFunction) for schedule in schedules)
        # The mean over processes may rank an entry first that none of them ranks high.
        if ranks() > 1 or self.accumulates or not is_known or not self._ranks_one_by_one:
            return None
        return GrowthRequest(self._ranked, self._most_grown)

    def _next_mask(self, parameter: SparseParameter, sparsity: float) -> Tensor | None:
        """The same as by `update_mask`, without the dense weight where connections are ranked one by one."""
        held = parameter.dense_gradient.value
        if isinstance(held, Shortlist) and not held.covers(self._grow_counts(parameter, sparsity)):
            raise RarefyError(
                f"sparsity or drop_fraction of {parameter.name} was raised or lowered between the backward pass "
                "and the update, which is not allowed with accumulates = False; set accumulates = True"
            )
        # Connections that are ranked one by one are chosen in the storage itself; all else goes by `update_mask`.
        is_dense = parameter.active == parameter.shape.numel()
        if (
            is_dense
            or self.needs != "dense"
            or not self._ranks_one_by_one
            or parameter.pattern.axis is not None
            or parameter.is_sharded
        ):
            return super()._next_mask(parameter, sparsity)
        grad = self._own_dense_gradient(parameter) if self._merges else self._dense_gradient(parameter)
        return None if grad is None else self._drop_and_grow(parameter, sparsity, grad)

    def _drop_and_grow(self, parameter: SparseParameter, sparsity: float, grad: Tensor | Shortlist) -> Tensor:
        (count,) = self._grow_counts(parameter, sparsity)
        order = TieOrder.of(self.generator)
        kept = parameter.keep_top(torch.abs, kept_count(parameter.shape.numel(), sparsity) - count, order)
        if self._merges and isinstance(grad, Tensor):
            grad = Shortlist.merged(grad, ~kept, count, merged.Exchange.of_all(self.traffic))
        if isinstance(grad, Shortlist):
            return grad.grow(kept, count, self._ranked, order.other())
        return grow_highest(kept, ranked_in_place(grad, self._ranked), count, order.other())

    def _most_grown(self, parameter: SparseParameter) -> list[int]:
        """The most that an update now or after this step adds in each piece."""
        counts = []
        for ahead in (0, 1):
            share = self.shares(self.target_at(self.step + ahead, self.updates))[parameter.name]
            sparsity = parameter.pattern.within_reach(parameter.shape, share)
            counts.append(self._grow_counts(parameter, sparsity, ahead))
        return [max(both) for both in zip(*counts, strict=True)]

    def _grow_counts(self, parameter: SparseParameter, sparsity: float, ahead: int = 0) -> list[int]:
        """How many connections an update adds to those that stay in each piece."""
        # Of one group: all have the same count.
        target = kept_count(parameter.shape.numel() // parameter.pattern.groups, sparsity)
        fraction = self.current(self.drop_fraction, ahead)
        return [
            target - min(active - round(fraction * active), target) for active in parameter.active_in_pieces
        ]


def by_size(self: DropAndGrow, gradient: Tensor) -> Tensor:
    """A `gradient_score`: the size of the dense gradient, of which processes know what may be largest in their mean."""
    return gradient.abs()
