"""The largest of numbers that are means over processes, exactly, without summing all of them.

Each process marks what is largest in it. Of what any has marked the sums are exchanged, and the last of the wanted
ones among these is a lower bound of the border. What is below the bound divided by the number of processes in each of
them cannot reach it; the rest is marked and summed as well (Cao and Wang's three-phase threshold algorithm, 2004).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from rarefy.distributed.agreement import sending_device
from rarefy.distributed.means import Traffic

MOST = 8
"""More processes than this sum everything: each would mark nearly all, and every mark goes to every process."""

_BITS = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)


@dataclass(frozen=True)
class Exchange:
    """How processes exchange.

    Args:
        ranks: how many they are.
        gather: the tensors that all bring, of the same shape, uint8.
        total: the sum of the tensors that all bring, floating point; may write to the one given.
    """

    ranks: int
    gather: Callable[[Tensor], list[Tensor]]
    total: Callable[[Tensor], Tensor]

    @classmethod
    def of_all(cls, traffic: Traffic) -> Exchange:
        """Of all processes; what is exchanged is added to the traffic."""
        return cls(dist.get_world_size(), partial(_gathered, traffic), partial(_summed, traffic))

    def united(self, marks: Tensor) -> Tensor:
        """Bool: what any process has marked, sent as bits."""
        found = torch.stack(self.gather(_as_bits(marks)))
        either = ((found[:, :, None] & _BITS.to(found.device)) != 0).any(0)
        return either.view(-1)[: len(marks)]

    def means(self, own: Tensor) -> Tensor:
        """Of what all bring; all bring nothing where one does."""
        return self.total(own) / self.ranks if len(own) else own


def largest_means(own: Tensor, count: int, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Places and means, among which are those of the `count` largest sizes, and all that tie with the last of these.

    Args:
        own: the numbers of this process, one-dimensional, as many in each.
        count: of the wanted ones, at most as many as there are; the same in each process.
        exchange: with the other processes, which all must call it.

    Returns:
        Rising places in `own`, int64, and the means there, the same in every process.
    """
    if not count:
        return torch.empty(0, dtype=torch.int64, device=own.device), own[:0]
    sizes = own.abs()
    # NaN is never smaller, and so is marked.
    marked = exchange.united(~(sizes < _last_of(sizes, count)))
    means = torch.zeros_like(own)
    means[marked] = exchange.means(own[marked])
    found = means[marked].abs()
    border = _last_of(torch.where(found.isnan(), -1.0, found), count)
    more = exchange.united(~(sizes < _bound(border, exchange.ranks)) & ~marked)
    means[more] = exchange.means(own[more])
    places = (marked | more).nonzero().squeeze(1)
    return places, means[places]


def _last_of(numbers: Tensor, count: int) -> Tensor:
    """The last of the `count` largest; NaN is the largest."""
    return numbers.kthvalue(len(numbers) - count + 1).values


def _bound(border: Tensor, ranks: int) -> Tensor:
    """A size below which no process can have an entry whose mean reaches the border, however sums are rounded."""
    kind = torch.finfo(border.dtype)
    # Sums beyond the largest number are infinite, and tie with an infinite border.
    bound = border.clamp(max=kind.max / ranks) * (1 - 4 * ranks * kind.eps)
    # Close to zero nothing is said of what rounding does, and below it not even the border is known.
    return torch.where(bound < 8 * ranks * kind.tiny, torch.zeros_like(bound), bound)


def _as_bits(marks: Tensor) -> Tensor:
    """Uint8, eight marks of each."""
    whole = torch.nn.functional.pad(marks.to(torch.uint8), (0, -len(marks) % 8))
    return (whole.view(-1, 8) * _BITS.to(marks.device)).sum(1, dtype=torch.uint8)


def _gathered(traffic: Traffic, own: Tensor) -> list[Tensor]:
    sent = own.to(sending_device(own.device))
    found = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    traffic.gave(sent)
    start = time.perf_counter()
    dist.all_gather(found, sent)
    traffic.waited(start)
    return [one.to(own.device) for one in found]


def _summed(traffic: Traffic, own: Tensor) -> Tensor:
    sent = own.to(sending_device(own.device))
    traffic.gave(sent)
    start = time.perf_counter()
    dist.all_reduce(sent)
    traffic.waited(start)
    return sent.to(own.device)
