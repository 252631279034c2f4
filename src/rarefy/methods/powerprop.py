"""Powerpropagation (Schwarz et al., arXiv:2110.00296) with gradual magnitude pruning."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rarefy.algorithms.option_checks import check_factor
from rarefy.algorithms.options import Factor, Sparsity
from rarefy.algorithms.view import WeightView
from rarefy.errors import ConfigError, RarefyError
from rarefy.methods.gmp import GMP
from rarefy.methods.rising import refuse_approximation, refuse_falling


class Powerprop(GMP):
    """Prunes gradually while large weights learn fast and small ones slowly, so that more of them are near zero.

    w = θ·|θ|^(α−1), where θ is what the optimizer trains, from θ = sign(w)·|w|^(1/α); mask = top of |w| over the active
    connections. Learning rate, weight decay and the optimizer's states are those of θ, as ∂L/∂θ = α·|θ|^(α−1)·∂L/∂w.

    Args:
        sparsity: a schedule that rises: `{type: polynomial, init: 0, final: 0.9, start: 0, stop: 100}`.
        alpha: the paper's α, ≥ 1; 1 trains the weights themselves.
        **options: the options of `DynamicSparsityAlgorithm`.

    Raises:
        ConfigError: a constant sparsity, one that falls, or an `alpha` below 1.

    Example:
        >>> layer = torch.nn.Linear(10, 10)
        >>> algorithm = Powerprop([0.0, 0.5], update={"freq": 1})
        >>> algorithm.apply(layer)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> algorithm.apply(optimizer)
        >>> layer(torch.ones(1, 10)).sum().backward()
        >>> optimizer.step()
        >>> int(layer.weight_mask.sum())
        50
    """

    name: ClassVar[str] = "powerprop"
    only_rises: ClassVar[str] = "what comes back at zero never learns"

    def __init__(self, sparsity: Sparsity, *, alpha: Factor = 2.0, **options: Any) -> None:
        super().__init__(sparsity, **options)
        refuse_falling(self.sparsity, "powerprop", self.only_rises)
        refuse_approximation(self.pattern.structure, "powerprop", self.only_rises)
        self.alpha = check_factor(alpha, "alpha")
        if self.alpha < 1:
            raise ConfigError("alpha", f"{self.alpha:g}", "a number ≥ 1", "alpha: 2.0")

    def trained_form(self, weight: Tensor) -> Tensor:
        """θ."""
        return weight.sign() * weight.abs().pow(1 / self.alpha)

    def weight_of(self, trained: Tensor) -> Tensor:
        """θ·|θ|^(α−1)."""
        return trained * trained.abs().pow(self.alpha - 1)

    def slope(self, trained: Tensor) -> Tensor:
        """α·|θ|^(α−1)."""
        return self.alpha * trained.abs().pow(self.alpha - 1)

    def score(self, view: WeightView) -> Tensor:
        """|w|; nothing for what is inactive."""
        return view.weight.abs().masked_fill(~view.mask, -torch.inf)

    def update_mask(self, view: WeightView) -> Tensor:
        """The largest of the active connections; a target sparsity that falls is an error."""
        mask = super().update_mask(view)
        if int(mask.sum()) > int(view.mask.sum()):
            falls = f"{view.name}: its sparsity falls to {view.sparsity:g} at step {view.step}"
            allowed = f"{self.only_rises}; let the schedule rise, or take gmp"
            raise RarefyError(f"{falls}, which powerprop does not allow: {allowed}")
        return mask
