"""Sparse evolutionary training (Mocanu et al., arXiv:1707.04780)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rarefy.algorithms.drop_and_grow import DropAndGrow
from rarefy.initializers import random_scores


class SET(DropAndGrow):
    """Drops the smallest weights and grows at random.

    drop score = |w|, grow score = uniform random.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        drop_fraction: share of the active connections dropped per update, a number in [0, 1] or a schedule.
        **options: the options of `DynamicSparsityAlgorithm`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(10, 10)
        >>> algorithm = SET(0.9, update={"freq": 100})
        >>> algorithm.apply(layer)
        >>> algorithm.update()
        >>> int(layer.weight_mask.sum())
        10
    """

    name: ClassVar[str] = "set"
    by_pieces: ClassVar[bool] = True

    def grow_score(self, weight: Tensor, dense_grad: Tensor | None) -> Tensor:
        """Uniform random float32, whatever the weight's dtype."""
        return random_scores(weight, self.generator)
