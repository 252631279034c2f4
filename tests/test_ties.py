"""The order among equal scores: a bijection, the same for a part of a weight, unlike for drops and growth."""

from __future__ import annotations

import pytest
import torch

import rarefy
from rarefy.masks import drop_lowest
from rarefy.ties import TieOrder, settle, settle_rows

NAN = float("nan")


def splitmix(number: int) -> int:
    """SplitMix64's finalizer with Python's numbers."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        number = ((number ^ (number >> shift)) * factor) % 2**64
    return number ^ (number >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 5, 2**63])
def test_keys_are_splitmix_of_the_places(seed):
    keys = TieOrder(seed).keys(torch.tensor([0, 1, 77, 2**40]))
    start = (seed + 1) * 0x9E3779B97F4A7C15
    assert [key % 2**64 for key in keys.tolist()] == [
        splitmix((start + n) % 2**64) for n in (0, 1, 77, 2**40)
    ]


def test_a_part_of_a_weight_is_ordered_as_in_the_whole():
    order, places = TieOrder(4), torch.tensor([5, 900, 17], dtype=torch.int32)
    assert torch.equal(order.among(places).keys(torch.tensor([2, 0])), order.keys(torch.tensor([17, 5])))


def test_a_generator_gives_its_order_without_a_draw():
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    assert TieOrder.of(generator) == TieOrder(7)
    assert torch.equal(generator.get_state(), before)


def test_the_other_order_is_unlike_and_goes_back():
    order = TieOrder(7)
    assert order.other() != order and order.other().other() == order


def settled(kept, scores, candidates, order):
    if kept.dim() == 1:
        return settle(kept, scores, candidates, order)
    return settle_rows(kept, scores, candidates, torch.ones(len(kept), dtype=torch.bool), order)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3)])
@pytest.mark.parametrize("value", [0.0, NAN, float("inf"), -float("inf")])
def test_counts_stay_and_only_candidates_are_chosen(shape, value):
    scores = torch.full(shape, value)
    candidates = torch.tensor([True, True, False, True, True, False]).view(shape)
    kept = torch.tensor([True, False, False, True, False, False]).view(shape)
    counts = set()
    for seed in range(20):
        chosen = settled(kept, scores, candidates, TieOrder(seed))
        assert torch.equal(chosen.sum(-1), kept.sum(-1)) and not (chosen & ~candidates).any()
        counts.add(tuple(chosen.flatten().tolist()))
    assert len(counts) > 1


def test_what_does_not_tie_is_returned_as_it_is():
    kept, scores = torch.tensor([True, False, True]), torch.tensor([2.0, 1.0, 2.0])
    assert settle(kept, scores, torch.ones(3, dtype=torch.bool), TieOrder()) is kept
    rows, few = kept.view(1, -1), scores.view(1, -1)
    assert settle_rows(rows, few, None, torch.tensor([False]), TieOrder()) is rows


def test_ties_among_values_go_by_their_places_in_the_weight_in_every_storage():
    kept = []
    for compute in ("masked", "compact"):
        layer = torch.nn.Linear(32, 32, bias=False)
        torch.nn.init.ones_(layer.weight)
        sparsity = rarefy.Static(0.5, seed=0, compute=compute)
        sparsity.apply(layer)
        [parameter] = sparsity.parameters.values()
        kept.append(parameter.keep_top(torch.abs, 100, TieOrder(3)))
        by_hand = drop_lowest(
            parameter.mask, parameter.dense_weight().abs(), parameter.active - 100, TieOrder(3)
        )
        assert torch.equal(kept[-1], by_hand)
    assert torch.equal(*kept) and int(kept[0].sum()) == 100


def test_what_keeps_nothing_has_no_ties_to_settle():
    scores = torch.full((3,), torch.inf)
    kept = torch.zeros(3, dtype=torch.bool)
    assert not settle(kept, scores, ~kept, TieOrder()).any()
