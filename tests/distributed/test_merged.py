"""The largest means over processes are found among what is exchanged, ties, NaN and infinities included."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rarefy
from rarefy import masks
from rarefy.algorithms import drop_and_grow
from rarefy.algorithms.drop_and_grow import by_size
from rarefy.distributed import merged
from rarefy.distributed.merged import Exchange, largest_means
from rarefy.storage.gradients import Shortlist
from rarefy.ties import TieOrder

NUMBERS = st.sampled_from(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.1,
        0.7,
        -0.7,
        1e-40,
        -3e-45,
        2e38,
        3e38,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
)


class Processes:
    """Threads that exchange as processes do, and count the bytes that each brings."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.bytes = 0
        self._barrier = threading.Barrier(ranks)
        self._brought: list[Tensor] = [torch.empty(0)] * ranks

    def exchange(self, rank: int) -> Exchange:
        def gather(own: Tensor) -> list[Tensor]:
            self.bytes += own.numel() * own.element_size()
            self._brought[rank] = own
            self._barrier.wait()
            found = list(self._brought)
            self._barrier.wait()
            return found

        return Exchange(self.ranks, gather, lambda own: total(gather(own)))

    def run(self, work: Any) -> list[Any]:
        """What a function of the rank and its exchange returns in each."""
        found: list[Any] = [None] * self.ranks

        def start(rank: int) -> None:
            try:
                found[rank] = work(rank, self.exchange(rank))
            except BaseException:
                self._barrier.abort()
                raise

        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(self.ranks)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        return found


def total(rows: Sequence[Tensor]) -> Tensor:
    return sum(rows[1:], rows[0])


def mean(rows: Sequence[Tensor]) -> Tensor:
    return total(rows) / len(rows)


def assert_complete(rows: Sequence[Tensor], count: int) -> None:
    """Every process has the largest means, and the same ones."""
    expected = mean(rows)
    sizes = torch.where(expected.isnan(), -1.0, expected.abs())
    border = sizes.kthvalue(len(sizes) - count + 1).values if count else torch.tensor(torch.inf)
    for places, means in Processes(len(rows)).run(
        lambda rank, ours: largest_means(rows[rank].clone(), count, ours)
    ):
        assert torch.equal(places, places.unique())
        assert torch.equal(means, expected[places]) or torch.equal(
            means.nan_to_num(7.0), expected[places].nan_to_num(7.0)
        )
        wanted = (sizes >= border).nonzero().squeeze(1) if count else places[:0]
        assert set(wanted.tolist()) <= set(places.tolist())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_that_reaches_the_border_is_missed(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(2, 4))
    length = data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    rows = [
        torch.tensor(data.draw(st.lists(NUMBERS, min_size=length, max_size=length)), dtype=dtype)
        for _ in range(ranks)
    ]
    assert_complete(rows, data.draw(st.integers(0, length)))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_mask_is_that_of_the_whole_mean(ranks: int) -> None:
    # Few values, so that many tie at the border.
    drawn = torch.Generator().manual_seed(ranks)
    rows = [torch.randint(-3, 4, (40, 30), generator=drawn).float() for _ in range(ranks)]
    kept = torch.rand(40, 30, generator=drawn) < 0.1
    order = TieOrder.of(torch.Generator().manual_seed(0))
    expected = masks.grow_highest(kept, mean(rows).abs(), 50, order)

    def grown(rank: int, ours: Exchange) -> Tensor:
        return Shortlist.merged(rows[rank], ~kept, 50, ours).grow(kept, 50, torch.abs, order)

    assert all(torch.equal(mask, expected) for mask in Processes(ranks).run(grown))


def test_less_is_exchanged_where_gradients_are_alike() -> None:
    drawn = torch.Generator().manual_seed(0)
    common = torch.randn(20_000, generator=drawn)
    rows = [common + 0.3 * torch.randn(20_000, generator=drawn) for _ in range(2)]
    processes = Processes(2)
    assert_complete(rows, 600)
    processes.run(lambda rank, ours: largest_means(rows[rank], 600, ours))
    # Whole, each of the two brings four bytes a number.
    assert processes.bytes < 0.4 * 2 * 4 * 20_000


class Signed(rarefy.RigL):
    """Grows where the gradient is highest, with its sign."""

    def gradient_score(self, gradient: Tensor) -> Tensor:
        return gradient


def test_only_what_ranks_by_size_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rarefy.RigL.gradient_score is by_size
    found = {}
    for ranks in (1, 2, merged.MOST, merged.MOST + 1):
        monkeypatch.setattr(drop_and_grow, "ranks", lambda ranks=ranks: ranks)
        found[ranks] = [one(0.5)._merges for one in (rarefy.RigL, Signed)]
    assert found == {1: [False] * 2, 2: [True, False], 8: [True, False], 9: [False] * 2}
    own = rarefy.RigL(0.5)
    own.gradient_score = torch.abs
    monkeypatch.setattr(drop_and_grow, "ranks", lambda: 2)
    assert not own._merges
