"""Rigging the lottery (Evci et al., arXiv:1911.11134)."""

from __future__ import annotations

from typing import ClassVar

from rarefy.algorithms.drop_and_grow import DropAndGrow, by_size
from rarefy.algorithms.view import Needs


class RigL(DropAndGrow):
    """Drops the smallest weights and grows where the dense gradient is largest.

    drop score = |w|, grow score = |dense gradient|, the mean over micro-batches and ranks of the update step.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        drop_fraction: share of the active connections dropped per update, a number in [0, 1] or a schedule.
        **options: the options of `DynamicSparsityAlgorithm`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(10, 10)
        >>> algorithm = RigL(0.9, update={"freq": 1})
        >>> algorithm.apply(layer)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> algorithm.apply(optimizer)
        >>> layer(torch.ones(1, 10)).sum().backward()
        >>> optimizer.step()
        >>> algorithm.step, int(layer.weight_mask.sum())
        (1, 10)
    """

    name: ClassVar[str] = "rigl"
    by_pieces: ClassVar[bool] = True
    needs: ClassVar[Needs] = "dense"

    gradient_score = by_size
