"""Top-KAST (Jayakumar et al., arXiv:2106.03517): computes with few connections, trains some more."""

from typing import Any

import torch

import rarefy
from rarefy.algorithms.option_checks import parse_fraction
from rarefy.algorithms.view import WeightView


class TopKAST(rarefy.DynamicSparsityAlgorithm):
    """Forward passes use the largest weights; candidates beside them get gradients too.

    forward set = top of |w| at `forward_sparsity`; active = forward set + random candidates, up to `sparsity`.

    Args:
        sparsity: fraction of connections that are not trained, a number in [0, 1) or a schedule.
        forward_sparsity: fraction of connections that forward passes leave out, larger than `sparsity`.
    """

    name = "top_kast"

    def __init__(self, sparsity: Any, *, forward_sparsity: Any, **options: Any) -> None:
        super().__init__(sparsity, **options)
        self.forward_sparsity = parse_fraction(forward_sparsity, "forward_sparsity")

    def update_mask(self, view: WeightView) -> torch.Tensor:
        """The forward set, and candidates drawn anew."""
        scores = torch.rand(view.weight.shape, generator=view.generator).to(view.weight.device)
        return self.keep_top(scores.masked_fill(self.forward_mask(view), 2.0), view.sparsity)

    def forward_mask(self, view: WeightView) -> torch.Tensor:
        """The largest weights."""
        scores = view.weight.abs().masked_fill(~view.mask, -1.0)
        return self.keep_top(scores, max(self.current(self.forward_sparsity), view.sparsity))
