"""Gradual magnitude pruning (Zhu & Gupta, arXiv:1710.01878)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.algorithms.option_checks import refuse_constant
from rarefy.algorithms.options import Sparsity
from rarefy.algorithms.view import WeightView, also_by_parts


class GMP(DynamicSparsityAlgorithm):
    """Prunes by magnitude to a sparsity that grows with the step.

    mask = top of |w| over all positions, at the scheduled sparsity.

    Args:
        sparsity: a schedule, for example `{type: polynomial, init: 0, final: 0.9, start: 0, stop: 5000}`.
        **options: the options of `DynamicSparsityAlgorithm`.

    Raises:
        ConfigError: a constant sparsity.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(10, 10)
        >>> GMP([0.5, 0.9], init_method="topk").apply(layer)
        >>> int(layer.weight_mask.sum())
        50
    """

    name: ClassVar[str] = "gmp"
    by_pieces: ClassVar[bool] = True
    competes: ClassVar[bool] = True

    def __init__(self, sparsity: Sparsity, **options: Any) -> None:
        super().__init__(sparsity, **options)
        refuse_constant(self.sparsity, self.label)

    def score(self, view: WeightView) -> Tensor:
        """Ranks all positions; the highest stay. Here: |w|."""
        return view.weight.abs()

    @also_by_parts
    def update_mask(self, view: WeightView) -> Tensor:
        """The highest scores at the target sparsity."""
        return self.keep_top(self.score(view), view.sparsity)
