"""What ranks of one training run must agree on; without a process group these are no-ops."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """How many processes train together.

    Example:
        >>> ranks()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all ranks, in place.

    Example:
        >>> import torch
        >>> mean_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if ranks() > 1:
        dist.all_reduce(tensor)
        tensor /= ranks()
    return tensor


def agreed_seed(seed: int) -> int:
    """The seed of rank 0, so that every rank draws the same masks.

    Example:
        >>> agreed_seed(7)
        7
    """
    if ranks() == 1:
        return seed
    box: list[int] = [seed]
    dist.broadcast_object_list(box, src=0)
    return box[0]
