"""Memory-economic sparse training (Yuan et al., arXiv:2110.14032)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from rarefy.algorithms.option_checks import check_factor
from rarefy.algorithms.options import Factor, Sparsity
from rarefy.algorithms.view import Needs
from rarefy.methods.set import SET


class MEST(SET):
    """Drops what is small and hardly changes, grows at random; no dense gradient is ever needed.

    drop score = |w| + λ·|g| with the gradient of active connections, grow score = uniform random.

    The paper's elastic mutation is a `drop_fraction` that falls.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        gradient_share: the λ of the formula, ≥ 0; 0 is SET.
        **options: the options of `DropAndGrow`.

    Raises:
        ConfigError: a `gradient_share` that is no number ≥ 0.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(10, 10)
        >>> algorithm = MEST(0.9, update={"freq": 1})
        >>> algorithm.apply(layer)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> algorithm.apply(optimizer)
        >>> layer(torch.ones(1, 10)).sum().backward()
        >>> optimizer.step()
        >>> algorithm.step, int(layer.weight_mask.sum())
        (1, 10)
    """

    name: ClassVar[str] = "mest"
    by_pieces: ClassVar[bool] = True
    needs: ClassVar[Needs] = "active"

    def __init__(self, sparsity: Sparsity, *, gradient_share: Factor = 1.0, **options: Any) -> None:
        super().__init__(sparsity, **options)
        self.gradient_share = check_factor(gradient_share, "gradient_share")

    def drop_score(self, weight: Tensor, gradient: Tensor | None, /) -> Tensor:
        """How much a connection is worth, by its weight and by what it is about to learn."""
        assert gradient is not None
        # In place: two matrices of the weight's size less, and the same sums.
        return weight.abs().add_(gradient.abs().mul_(self.gradient_share))
