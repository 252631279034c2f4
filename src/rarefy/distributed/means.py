"""Means of many small tensors over the processes, in few exchanges."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 25 << 20
"""Bytes of one exchange, as in `DistributedDataParallel`: large enough for the network, small enough for memory."""


@dataclass
class Traffic:
    """What a process gave into exchanges so far.

    Args:
        bytes: of the tensors; what the network carries depends on how it sums them.
        seconds: spent waiting.
    """

    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.seconds + other.seconds)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes - other.bytes, self.seconds - other.seconds)


def means_over_ranks(
    entries: Sequence[Tensor], present: Sequence[bool], group: Any, traffic: Traffic
) -> list[bool]:
    """Makes each tensor the mean over the processes of a group, in place.

    Args:
        entries: one-dimensional, of the same sizes and dtypes in every process; zeros where nothing is present.
        present: whether this process has something to bring, for each tensor.
        group: of torch's processes; None for all.
        traffic: what is exchanged is added to it.

    Returns:
        Whether some process brought something, for each tensor; zeros where none did.

    Example:
        >>> means_over_ranks([], [], None, Traffic())
        []
    """
    share = 1 / dist.get_world_size(group) if entries else 1.0
    buckets = list(_buckets(entries))
    flat = [_filled(entries, present, bucket, share) for bucket in buckets]
    start = time.perf_counter()
    # All of them on their way before the first is waited for.
    works = [dist.all_reduce(one, group=group, async_op=True) for one in flat]
    for work in works:
        if work is not None:
            work.wait()
    traffic.seconds += time.perf_counter() - start
    traffic.bytes += sum(one.numel() * one.element_size() for one in flat)
    found = [False] * len(entries)
    for bucket, one in zip(buckets, flat, strict=True):
        brought = one[-len(bucket) :].tolist()
        means = one.split([*(entries[index].numel() for index in bucket), len(bucket)])
        for index, mean, number in zip(bucket, means[:-1], brought, strict=True):
            entries[index].copy_(mean)
            found[index] = number > 0
    return found


def _buckets(entries: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of tensors that go together: of one dtype and device, up to `BUCKET` bytes, or a single larger one."""
    kinds = dict.fromkeys((one.dtype, one.device) for one in entries)
    for kind in kinds:
        yield from _parts(entries, [i for i, one in enumerate(entries) if (one.dtype, one.device) == kind])


def _parts(entries: Sequence[Tensor], places: Iterable[int]) -> Iterator[list[int]]:
    part: list[int] = []
    size = 0
    for place in places:
        bytes_here = entries[place].numel() * entries[place].element_size()
        if part and size + bytes_here > BUCKET:
            yield part
            part = []
            size = 0
        part.append(place)
        size += bytes_here
    if part:
        yield part


def _filled(
    entries: Sequence[Tensor], present: Sequence[bool], bucket: Sequence[int], share: float
) -> Tensor:
    """The tensors of a bucket in one, each times `share`, and after them one number each: whether it is present."""
    first = entries[bucket[0]]
    # Numbers of the same dtype, so that they need no exchange of their own; any share above zero says yes.
    flags = torch.tensor([float(present[index]) for index in bucket], dtype=first.dtype, device=first.device)
    flat = torch.cat([*(entries[index] for index in bucket), flags])
    # Before they are summed, so that the sum of half-precision gradients stays as small as they are.
    return flat.mul_(share)
