"""Means of many small tensors over the processes, in few exchanges."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

BUCKET = 25 << 20
"""Bytes of one exchange, as in `DistributedDataParallel`: large enough for the network, small enough for memory."""


@dataclass
class Traffic:
    """What a process gave into exchanges of gradients so far.

    Args:
        bytes: of the tensors; what the network carries depends on how it sums them.
        seconds: spent waiting. On a GPU, which exchanges beside the process, only what the process itself waits for.
    """

    bytes: int = 0
    seconds: float = 0.0
    _until: float = field(default=0.0, repr=False, compare=False)

    def gave(self, *tensors: Tensor) -> None:
        """Counts what goes into an exchange."""
        self.bytes += sum(one.numel() * one.element_size() for one in tensors)

    def waited(self, start: float) -> None:
        """Adds the time since `start`, by `time.perf_counter`; where waits overlap it counts once."""
        now = time.perf_counter()
        self.seconds += now - max(start, self._until)
        self._until = now

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
    # Without entries there may be no process group either.
    share = 1 / dist.get_world_size(group) if entries else 1.0
    buckets = list(_buckets(entries))
    flat = [_filled(entries, present, bucket, share) for bucket in buckets]
    traffic.gave(*flat)
    start = time.perf_counter()
    # All of them on their way before the first is waited for.
    works = [dist.all_reduce(one, group=group, async_op=True) for one in flat]
    for work in works:
        if work is not None:
            work.wait()
    traffic.waited(start)
    found = [False] * len(entries)
    for bucket, one in zip(buckets, flat, strict=True):
        brought = one[-len(bucket) :].tolist()
        means = one.split([*(entries[index].numel() for index in bucket), len(bucket)])
        for index, mean, number in zip(bucket, means[:-1], brought, strict=True):
            entries[index].copy_(mean)
            found[index] = number > 0
    return found


def count_exchanges(ddp: DistributedDataParallel, traffic: Traffic) -> None:
    """Counts what a wrapper exchanges of the gradients that it averages, and what it waits for at the end.

    Args:
        ddp: not called yet.
        traffic: what is exchanged is added to it.
    """
    # torch reads the annotations of a hook, which are text here; a lambda has none.
    ddp.register_comm_hook(ddp.process_group, lambda group, bucket: _average(traffic, group, bucket))


def _average(traffic: Traffic, group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean of a bucket of gradients over a process group, as the wrapper makes it."""
    # Here, as a single process never needs it.
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    gradients = bucket.buffer()
    traffic.gave(gradients)
    start = time.perf_counter()
    means = allreduce_hook(group, bucket)
    # Those before it are exchanged while gradients are still computed; a GPU's are not waited for here.
    if bucket.is_last() and gradients.is_cpu:
        return means.then(partial(_waited, traffic, start))
    return means


def _waited(traffic: Traffic, start: float, means: torch.futures.Future[Tensor]) -> Tensor:
    traffic.waited(start)
    return means.value()


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
