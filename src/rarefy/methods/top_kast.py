"""Top-KAST (Jayakumar et al., arXiv:2106.03517): always sparse training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.algorithms.option_checks import parse_fraction
from rarefy.algorithms.options import FractionSchedule, Sparsity
from rarefy.algorithms.view import WeightView
from rarefy.errors import ConfigError
from rarefy.initializers import random_scores
from rarefy.masks import fill_inactive_
from rarefy.patterns import NOfM
from rarefy.schedules import Constant
from rarefy.ties import TieOrder


class TopKAST(DynamicSparsityAlgorithm):
    """Computes with few connections, and trains some more, of which the largest come in.

    forward set A = top of |w| at `forward_sparsity`; trained set B = A and candidates drawn at random, at `sparsity`.

    What is not in B has no weight here, so the candidates are those of the paper's random variant. Its loss on the size
    of weights is left to the optimizer's weight decay.

    Args:
        sparsity: fraction of connections that are not trained, a number in [0, 1) or a schedule.
        forward_sparsity: fraction of connections that forward passes, and the finished model, leave out; larger than
            `sparsity`. A number in [0, 1] or a schedule, which counts as `sparsity` where it is smaller.
        **options: the options of `DynamicSparsityAlgorithm`.

    Raises:
        ConfigError: a `forward_sparsity` below `sparsity`, or a pattern that leaves no room for candidates.

    Example:
        >>> layer = torch.nn.Linear(10, 10)
        >>> TopKAST(0.5, forward_sparsity=0.8).apply(layer)
        >>> int((layer.weight != 0).sum()), int(layer.weight_mask.sum())
        (20, 50)
    """

    name: ClassVar[str] = "top_kast"

    def __init__(self, sparsity: Sparsity, *, forward_sparsity: FractionSchedule, **options: Any) -> None:
        super().__init__(sparsity, **options)
        self.forward_sparsity = parse_fraction(forward_sparsity, "forward_sparsity")
        forward = self.forward_sparsity
        trained = self.sparsity
        if isinstance(forward, Constant) and isinstance(trained, Constant) and forward(0) < trained(0):
            allowed = f"at least the sparsity, {trained(0):g}: forward passes use a part of what is trained"
            raise ConfigError("forward_sparsity", f"{forward(0):g}", allowed, "forward_sparsity: 0.9")
        structure = self.pattern.structure
        if isinstance(structure, NOfM) and structure.n == 1:
            allowed = (
                "an n of at least 2 for top_kast: forward passes use one of them, candidates are beside it"
            )
            raise ConfigError("pattern", structure, allowed, "pattern: {n: 2, m: 4}")

    def update_mask(self, view: WeightView) -> Tensor:
        """The forward set, and candidates drawn anew."""
        scores = random_scores(view.weight, view.generator)
        # Infinite, so that the forward set is trained whatever was drawn.
        fill_inactive_(scores, ~self.forward_mask(view), torch.inf)
        return self.keep_top(scores, view.sparsity)

    def forward_mask(self, view: WeightView) -> Tensor:
        """The largest of the connections that are trained."""
        structure = self.pattern.structure
        wanted = max(self.current(self.forward_sparsity), view.sparsity)
        reached = structure.within_reach(view.mask.shape, wanted)
        order = TieOrder.of(view.generator)
        return structure.dropped(view.mask, view.weight, reached, fraction=0.0, order=order, by_size=True)
