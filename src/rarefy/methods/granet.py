"""Gradual pruning with neuroregeneration (Liu et al., arXiv:2106.10404)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from rarefy.algorithms.drop_and_grow import DropAndGrow
from rarefy.algorithms.option_checks import refuse_constant
from rarefy.algorithms.options import FractionSchedule, Sparsity
from rarefy.algorithms.view import Needs, WeightView, also_by_parts
from rarefy.ties import TieOrder


class GraNet(DropAndGrow):
    """Prunes gradually, and lets as many connections grow as it drops beyond that.

    On an update step: keep the top of |w| of the active connections at the scheduled sparsity; of these drop the share
    `drop_fraction` with the smallest |w|; grow as many where |dense gradient| is largest.

    From a sparse start (`init: 0.5`) it is the paper's sparse-to-sparse form.

    Args:
        sparsity: a schedule, for example `{type: polynomial, init: 0.5, final: 0.9, start: 0, stop: 5000}`.
        drop_fraction: share of the connections left that is dropped and grown anew per update, a number in [0, 1] or a
            schedule; the paper lets it fall from 0.5 by a cosine.
        **options: the options of `DynamicSparsityAlgorithm`.

    Raises:
        ConfigError: a constant sparsity.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(10, 10)
        >>> algorithm = GraNet([0.0, 0.5, 0.9], update={"freq": 1})
        >>> algorithm.apply(layer)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> algorithm.apply(optimizer)
        >>> layer(torch.ones(1, 10)).sum().backward()
        >>> optimizer.step()
        >>> int(layer.weight_mask.sum())
        50
    """

    name: ClassVar[str] = "granet"
    by_pieces: ClassVar[bool] = True
    needs: ClassVar[Needs] = "dense"

    def __init__(self, sparsity: Sparsity, *, drop_fraction: FractionSchedule = 0.5, **options: Any) -> None:
        super().__init__(sparsity, drop_fraction=drop_fraction, **options)
        refuse_constant(self.sparsity, self.label)

    def gradient_score(self, gradient: Tensor) -> Tensor:
        """The size of the dense gradient."""
        return gradient.abs()

    @also_by_parts
    def update_mask(self, view: WeightView) -> Tensor:
        """Prunes, then drops and grows; see the class."""
        size = self.favoured(view, view.mask, self.drop_score(view.weight, view.gradient))
        # Among active ones alone: one of zero weight goes before an inactive one, whose weight is zero too.
        structure = self.pattern.structure
        reached = structure.within_reach(size.shape, view.sparsity)
        pruned = structure.dropped(view.mask, size, reached, 0.0, TieOrder.of(self.generator))
        return self.exchanged(view, pruned, size)
