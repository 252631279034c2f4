"""What processes that train together must agree on; without a process group these exchange nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rarefy.distributed.membership import ranks

T = TypeVar("T")


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all ranks, in place.

    Example:
        >>> import torch
        >>> mean_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if ranks() > 1:
        # Summed and divided: gloo has no mean.
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
    # As an object: torch's seeds have up to 64 bits without a sign, which no int64 tensor holds.
    box: list[int] = [seed]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def of_first(numbers: Sequence[int], device: torch.device) -> list[int]:
    """The numbers that the first process brings; all bring as many.

    Args:
        numbers: whole numbers below 2^63.
        device: one that the process group can send from.

    Example:
        >>> of_first([3, 1], torch.device("cpu"))
        [3, 1]
    """
    if ranks() == 1 or not numbers:
        return list(numbers)
    box = torch.tensor(numbers, device=device)
    dist.broadcast(box, 0)
    return box.tolist()


def highest_of_all(number: int) -> int:
    """The highest of the numbers that all processes bring.

    Example:
        >>> highest_of_all(3)
        3
    """
    return max(from_all(number))


def from_all(value: T) -> list[T]:
    """What each process brings, by rank; something small that pickle knows.

    Example:
        >>> from_all("here")
        ['here']
    """
    if ranks() == 1:
        return [value]
    box = [value] * ranks()
    dist.all_gather_object(box, value)
    return box


def differing(numbers: Mapping[str, int], device: torch.device, group: Any = None) -> list[str]:
    """The names whose number is not the same in all processes; each brings the same names.

    Args:
        numbers: whole numbers below 2^63 by name.
        device: one that the process group can send from.
        group: of processes; None for all.

    Example:
        >>> differing({"fc.weight": 3}, torch.device("cpu"))
        []
    """
    if ranks() == 1 or not numbers:
        return []
    own = torch.tensor(list(numbers.values()), device=device)
    # One exchange for both bounds: the highest of −x is minus the lowest of x.
    bounds = torch.stack([own, -own])
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    differs = bounds[0] != -bounds[1]
    return [name for name, found in zip(numbers, differs.tolist(), strict=True) if found]
