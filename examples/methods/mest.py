"""MEST (Yuan et al., arXiv:2110.14032): drops what is small and hardly changes, grows at random."""

from typing import Any

from torch import Tensor

import rarefy


class MEST(rarefy.SET):
    """drop score = |w| + λ·|g| with the gradient of active connections, grow score = uniform random.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        gradient_share: λ, ≥ 0.
    """

    name = "mest"
    needs = "active"

    def __init__(self, sparsity: Any, *, gradient_share: float = 1.0, **options: Any) -> None:
        super().__init__(sparsity, **options)
        self.gradient_share = gradient_share

    def drop_score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """How much a connection is worth, by its weight and by what it is about to learn."""
        assert gradient is not None
        return weight.abs() + self.gradient_share * gradient.abs()
