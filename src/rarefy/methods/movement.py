"""Movement pruning (Sanh et al., arXiv:2005.07683)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.algorithms.view import StepView, WeightView
from rarefy.masks import fill_inactive_
from rarefy.methods.gmp import GMP


class Movement(GMP):
    """Prunes gradually what moves towards zero, whatever its size: for fine-tuning, where weights hardly change size.

    S ← S − w · g before each optimizer step; mask = top of S over the active connections.

    The paper's hard movement pruning; what is pruned stays so, as no storage keeps its weight.

    Args:
        sparsity: a schedule, for example `{type: polynomial, init: 0, final: 0.9, start: 0, stop: 5000}`.
        **options: the options of `DynamicSparsityAlgorithm`.

    Raises:
        ConfigError: a constant sparsity.

    Example:
        >>> layer = torch.nn.Linear(10, 10)
        >>> algorithm = Movement([0.0, 0.5], update={"freq": 1})
        >>> algorithm.apply(layer)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> algorithm.apply(optimizer)
        >>> layer(torch.ones(1, 10)).sum().backward()
        >>> optimizer.step()
        >>> int(layer.weight_mask.sum())
        50
    """

    name: ClassVar[str] = "movement"
    connection_state: ClassVar[Mapping[str, float]] = {"movement": 0.0}

    def observe(self, view: StepView) -> None:
        """Adds up by how much each weight is about to move away from zero."""
        # Descent moves a weight by −g: away from zero where w · g is negative.
        view.state["movement"].sub_(view.weight * view.gradient)

    def score(self, view: WeightView) -> Tensor:
        """The sum so far; nothing for what is inactive."""
        return fill_inactive_(view.state["movement"].clone(), view.mask, -torch.inf)
