"""Movement pruning (Sanh et al., arXiv:2005.07683): keeps what moves away from zero, whatever its size."""

from typing import ClassVar

import torch

import rarefy
from rarefy.algorithms.view import StepView, WeightView


class Movement(rarefy.GMP):
    """Prunes to a growing sparsity by the sum of −w·∂L/∂w over all steps so far.

    movement ← movement − w · g before each optimizer step; mask = top of movement over the active connections.
    """

    name = "movement"
    connection_state: ClassVar = {"movement": 0.0}

    def observe(self, view: StepView) -> None:
        """Adds up by how much each weight is about to move away from zero."""
        view.state["movement"].sub_(view.weight * view.gradient)

    def update_mask(self, view: WeightView) -> torch.Tensor:
        """The connections that moved away from zero most."""
        return self.keep_top(view.state["movement"].masked_fill(~view.mask, -torch.inf), view.sparsity)
