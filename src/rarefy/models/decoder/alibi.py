"""Attention with linear biases: a score falls with the distance, in each head at another rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Alibi(nn.Module):
    """The bias −slope · distance of every head.

    Args:
        num_heads: number of heads.
        scaling: distances are divided by it.
        trainable: whether the slopes are trained; they then start at random.

    Example:
        >>> Alibi(2)(2)[0].tolist()
        [[-0.0, -0.0625], [-0.0625, -0.0]]

    Reference:
        Press et al., arXiv 2108.12409.
    """

    def __init__(self, num_heads: int, scaling: float = 1.0, trainable: bool = False) -> None:
        super().__init__()
        self.scaling = scaling
        # A parameter even when fixed, as in the Model Zoo's checkpoints.
        self.slopes = nn.Parameter(torch.tensor(slopes(num_heads)).unsqueeze(1), requires_grad=trainable)
        if trainable:
            nn.init.xavier_uniform_(self.slopes)

    def forward(self, length: int) -> Tensor:
        """The biases [heads, length, length]."""
        positions = torch.arange(length, device=self.slopes.device)
        distances = (positions.unsqueeze(1) - positions).abs()
        return -self.slopes.unsqueeze(2) / self.scaling * distances


def slopes(num_heads: int) -> list[float]:
    """The slopes of the paper: 2^(−8/n), its square, …; for other n than powers of two, every second of the next one's.

    Example:
        >>> slopes(4), slopes(3)
        ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    power = 2 ** math.floor(math.log2(num_heads))
    own = [2.0 ** (-8 * step / power) for step in range(1, power + 1)]
    if power == num_heads:
        return own
    return own + slopes(2 * power)[::2][: num_heads - power]
