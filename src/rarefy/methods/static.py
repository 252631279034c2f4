"""Static sparsity: one mask for the whole training."""

from __future__ import annotations

from typing import Any, ClassVar

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.algorithms.option_checks import require_constant
from rarefy.algorithms.options import Sparsity


class Static(SparsityAlgorithm):
    """A mask drawn once and kept.

    mask(k) = mask(0) for every step k.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1).
        **options: the options of `SparsityAlgorithm`.

    Raises:
        ConfigError: a schedule in place of the number.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(10, 10)
        >>> Static(0.9, seed=0).apply(layer)
        >>> int(layer.weight_mask.sum()), int((layer.weight != 0).sum())
        (10, 10)
    """

    name: ClassVar[str] = "static"

    def __init__(self, sparsity: Sparsity, **options: Any) -> None:
        super().__init__(sparsity, **options)
        require_constant(self.sparsity)

    def update(self) -> None:
        """Does nothing: the mask never changes."""
