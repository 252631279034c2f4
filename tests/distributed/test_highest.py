"""The highest scores that lie in pieces are those that one process finds, ties and NaN included."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy import masks
from rarefy.distributed import highest
from rarefy.ties import TieOrder

NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, float("nan"), float("inf"), -float("inf"), 1e-40, 3e38])


def in_pieces(scores, candidates, count, order, sizes):
    """What processes that hold pieces of these sizes find together, one thread each."""
    places = torch.arange(len(scores)).split(sizes)
    barrier = threading.Barrier(len(sizes))
    brought = [torch.empty(0)] * len(sizes)
    found = [torch.empty(0)] * len(sizes)

    def total_of(index):
        def total(counts):
            brought[index] = counts
            barrier.wait()
            result = sum(brought[1:], brought[0])
            barrier.wait()
            return result

        return total

    def work(index):
        own = places[index]
        among = None if candidates is None else candidates[own]
        keys = order.among(own).keys
        found[index] = highest.keep_top(scores[own], among, count, keys, total_of(index))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(found)


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.one_of(NUMBERS, st.floats(width=32)), min_size=1, max_size=40),
    cuts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    count=st.integers(-1, 41),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_pieces_keep_what_one_process_keeps(numbers, cuts, count, dtype, seed, data):
    scores = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    flags = data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))
    candidates = torch.tensor(flags)
    first, second = sorted(min(cut, len(numbers)) for cut in cuts)
    sizes = [first, second - first, len(numbers) - second]
    order = TieOrder(seed)
    for among in (None, candidates):
        expected = (
            masks.keep_top(scores, count, order)
            if among is None
            else masks.grow_highest(~among, scores, count, order) & among
        )
        assert torch.equal(in_pieces(scores, among, count, order, sizes), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_scores_of_many_sizes(dtype):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3000, generator=generator, dtype=dtype).exp2() * 1e-3
    scores[::7] = scores[0]
    for count in (1, 10, 400, 430, 2999):
        expected = masks.keep_top(scores, count, TieOrder(5))
        assert torch.equal(in_pieces(scores, None, count, TieOrder(5), [1000, 0, 1999, 1]), expected)


def test_what_is_exchanged_does_not_grow_with_the_scores():
    sent = []

    def total(counts):
        sent.append(counts.numel() * counts.element_size())
        return counts

    highest.keep_top(torch.randn(50_000), None, 700, lambda places: places, total)
    assert sent == [2048 * 8] * 3
