"""Scores to masks: exact counts, ties by a seeded order, NaN below everything."""

from __future__ import annotations

import os
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy import masks
from rarefy.ties import TieOrder

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
ORDER = TieOrder(5)
NAN, INF = float("nan"), float("inf")
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-3, INF, -INF, NAN])
SCORES = st.lists(VALUES, min_size=1, max_size=40)
dtypes = st.sampled_from(DTYPES)


@pytest.fixture(params=["compiled", "reference"], autouse=True, scope="module")
def kernels(request):
    """Every test runs with the compiled selection and with the plain-torch one."""
    before = os.environ.pop("RAREFY_KERNELS", None)
    if request.param == "reference":
        os.environ["RAREFY_KERNELS"] = "reference"
    yield
    os.environ.pop("RAREFY_KERNELS", None)
    if before is not None:
        os.environ["RAREFY_KERNELS"] = before


def naive_top(scores: list[float], among: list[int], count: int, order: TieOrder = ORDER) -> list[bool]:
    """A sort: valid before NaN, large before small, low key before high."""
    keys = order.keys(torch.arange(len(scores))).tolist()
    ranked = sorted(
        among, key=lambda i: (scores[i] != scores[i], -scores[i] if scores[i] == scores[i] else 0, keys[i])
    )
    chosen = set(ranked[: max(count, 0)])
    return [index in chosen for index in range(len(scores))]


@given(SCORES, st.integers(-2, 45), dtypes)
def test_keep_top_is_the_head_of_a_sort(values, count, dtype):
    scores = torch.tensor(values, dtype=dtype)
    everything = list(range(len(values)))
    assert masks.keep_top(scores, count, ORDER).tolist() == naive_top(scores.tolist(), everything, count)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(-2, 45), st.integers(0, 99), dtypes)
def test_keep_top_in_rows_is_keep_top_of_each_row(rows, columns, count, seed, dtype):
    scores = some_scores(rows, columns, seed).to(dtype)
    expected = torch.stack(
        [
            masks.keep_top(row, count, ORDER.among(places))
            for row, places in zip(scores, places_of(scores), strict=True)
        ]
    )
    assert torch.equal(masks.keep_top_in_rows(scores, count, ORDER), expected)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 40), st.floats(0, 1), st.integers(0, 99), dtypes)
def test_drop_and_grow_is_dropping_then_growing_in_each_row(rows, columns, count, fraction, seed, dtype):
    mask, drop, grow = (some_scores(rows, columns, seed + i) for i in range(3))
    mask, drop, grow = mask > 0.5, drop.to(dtype), grow.to(dtype)
    found = masks.drop_and_grow(mask, drop, grow, count, fraction, ORDER)
    for row, before, low, high, places in zip(found, mask, drop, grow, places_of(mask), strict=True):
        order = ORDER.among(places)
        active = int(before.sum())
        stay = count if active == columns else min(active - round(fraction * active), count)
        kept = masks.drop_lowest(before, low, active - stay, order)
        assert torch.equal(row, masks.grow_highest(kept, high, count - stay, order.other()))


def places_of(rows):
    """The index of every entry in the flattened rows."""
    return torch.arange(rows.numel()).view(rows.shape)


def some_scores(rows, columns, seed):
    """Few values, so that there are many ties."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, INF, -INF, NAN])
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), (rows, columns), generator=generator)]


@pytest.mark.parametrize("shape", [(0, 4), (1, 0), (0, 0)])
def test_rows_that_are_empty(shape):
    empty = torch.zeros(shape)
    assert masks.keep_top_in_rows(empty, 2).shape == shape
    assert masks.drop_and_grow(empty.bool(), empty, empty, 0, 0.5).shape == shape


@given(SCORES, st.data(), st.integers(-2, 45), dtypes)
def test_drop_lowest(values, data, count, dtype):
    scores = torch.tensor(values, dtype=dtype)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    before, active = mask.clone(), mask.nonzero().flatten().tolist()
    expected = naive_top(scores.tolist(), active, len(active) - max(count, 0))
    assert masks.drop_lowest(mask, scores, count, ORDER).tolist() == expected
    assert torch.equal(mask, before)


@given(SCORES, st.data(), st.integers(-2, 45), dtypes)
def test_grow_highest(values, data, count, dtype):
    scores = torch.tensor(values, dtype=dtype)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    before, inactive = mask.clone(), (~mask).nonzero().flatten().tolist()
    grown = torch.tensor(naive_top(scores.tolist(), inactive, count))
    assert torch.equal(masks.grow_highest(mask, scores, count, ORDER), before | grown)
    assert torch.equal(mask, before)


def large(kind: str, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(size, generator=generator)
    return {
        "noise": noise,
        "constant": torch.ones(size),
        "rising": torch.arange(size).float(),
        "falling": -torch.arange(size).float(),
        "few values": (noise * 1.5).round(),
        "mostly zero": noise.where(torch.rand(size, generator=generator) < 0.05, torch.zeros(())),
        "nearly all NaN": torch.full((size,), NAN).index_copy_(0, torch.tensor([9, 70, 4000]), torch.ones(3)),
        "half NaN": noise.where(noise > 0, torch.tensor(NAN)),
        "infinities": noise.where(noise.abs() < 1, noise.sign() * INF),
        "large at the sampled places": noise + 10.0 * (torch.arange(size) % 4 == 0),
        "small at the sampled places": noise - 10.0 * (torch.arange(size) % 4 == 0),
        "bfloat16": noise.bfloat16(),
    }[kind]


KINDS = [
    "noise", "constant", "rising", "falling", "few values", "mostly zero", "nearly all NaN", "half NaN",
    "infinities", "large at the sampled places", "small at the sampled places", "bfloat16",
]  # fmt: skip


def ranking_of(scores, order):
    """Places from the best to the worst: by key first, then a stable sort by score."""
    by_key = order.keys(torch.arange(len(scores))).argsort()
    wide = scores.float().nan_to_num(nan=-INF, posinf=INF, neginf=-3e38)
    return by_key[wide[by_key].sort(descending=True, stable=True).indices]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [65_536, 70_001])
def test_keep_top_is_exact_on_large_tensors(kind, size):
    scores = large(kind, size)
    ordered = ranking_of(scores, ORDER)
    for count in (0, 1, 2, 3, 4, size // 1000, size // 10, size // 2, size - 3, size - 1, size):
        expected = torch.zeros(size, dtype=torch.bool).index_fill(0, ordered[:count], True)
        assert torch.equal(masks.keep_top(scores, count, ORDER), expected), count


@pytest.mark.parametrize("kind", KINDS)
def test_drop_and_grow_are_exact_on_large_tensors(kind):
    size, scores = 200_000, large(kind, 200_000)
    ordered = ranking_of(scores, ORDER)
    mask = torch.rand(size, generator=torch.Generator().manual_seed(2)) < 0.5
    active, inactive = ordered[mask[ordered]], ordered[~mask[ordered]]
    dropped = torch.zeros(size, dtype=torch.bool).index_fill(0, active[: len(active) - 30_000], True)
    assert torch.equal(masks.drop_lowest(mask, scores, 30_000, ORDER), dropped)
    assert torch.equal(
        masks.grow_highest(mask, scores, 30_000, ORDER), mask.index_fill(0, inactive[:30_000], True)
    )


@given(st.floats(0.0, 1.0), st.lists(st.integers(1, 6), min_size=1, max_size=4), dtypes, st.integers(0, 9))
def test_counts_and_shapes_are_exact(sparsity, shape, dtype, seed):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    count = masks.kept_count(scores.numel(), sparsity)
    mask = masks.keep_top(scores, count)
    assert (mask.dtype, mask.shape, int(mask.sum())) == (torch.bool, scores.shape, count)
    assert masks.sparsity_of(mask) == 1 - count / scores.numel()


def test_ties_do_not_depend_on_the_memory_format():
    scores = torch.ones(2, 3, 4, 5)
    other = masks.keep_top(scores.contiguous(memory_format=torch.channels_last), 7)
    assert torch.equal(masks.keep_top(scores, 7), other) and int(other.sum()) == 7


def test_ties_are_spread_over_the_rows_and_differ_with_the_seed():
    scores = torch.zeros(64, 64)
    first, second = (masks.keep_top(scores, 1024, TieOrder(seed)) for seed in (1, 2))
    for mask in (first, second):
        quarters = mask.view(4, -1).sum(1)
        assert quarters.sum() == 1024 and (quarters - 256).abs().max() < 60
        assert mask.sum(1).min() > 4 and mask.sum(0).min() > 4
    assert 150 < int((first & second).sum()) < 370


def test_what_is_dropped_among_equals_is_not_what_grows_again():
    mask, equal = torch.arange(4000).view(1, -1) < 2000, torch.ones(1, 4000)
    found = masks.drop_and_grow(mask, equal, equal, 2000, 0.5)
    dropped = mask & ~masks.drop_lowest(mask, equal, 1000)
    assert 200 < int((found & dropped).sum()) < 500


def test_counts_above_those_that_float32_knows_are_exact():
    mask = torch.arange(2**24 + 2).view(1, -1) < 2**24 + 1
    kept = masks.drop_in_rows(mask, torch.zeros(mask.shape, dtype=torch.float16), 2**24, 0.9)
    assert int(kept.count_nonzero()) == 2**24 + 1 - round(0.9 * (2**24 + 1))


@pytest.mark.parametrize("active", [6, 12])
@pytest.mark.parametrize("seed", range(5))
def test_a_weight_in_pieces_goes_by_the_rule_of_a_weight_in_one_row(active, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randperm(12, generator=generator) < active
    # So few numbers that most of them are equal.
    drop, grow = torch.randint(2, (2, 12), generator=generator).float()
    order = TieOrder(seed)
    one_row = masks.drop_and_grow(mask[None], drop[None], grow[None], 6, 0.75, order)[0]
    assert torch.equal(masks.drop_and_grow_in_pieces(mask, drop, grow, 6, 0.75, order), one_row)


@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_kept_count_rounds_in_float64_with_ties_to_even(total, sparsity):
    kept = masks.kept_count(total, sparsity)
    assert 0 <= kept <= total
    assert kept == round(Fraction((1.0 - sparsity) * total))


@pytest.mark.parametrize(
    ("total", "sparsity", "kept"),
    [
        (100, 0.8, 20),
        (5, 0.5, 2),
        (7, 0.5, 4),
        (10, 0.9, 1),
        (1, 0.99, 0),
        (0, 0.5, 0),
        (9, 0.0, 9),
        (9, 1.0, 0),
    ],
)
def test_kept_count_examples(total, sparsity, kept):
    assert masks.kept_count(total, sparsity) == kept


def test_sparsity_of_an_empty_mask_is_zero():
    assert masks.sparsity_of(torch.ones(0, dtype=torch.bool)) == 0.0


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.int64])
def test_zero_inactive_selects_in_place(dtype):
    tensor = torch.tensor([3, 2, 5, 7]).to(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        tensor[0], tensor[2] = NAN, INF
    mask = torch.tensor([False, True, False, True])
    assert masks.zero_inactive_(tensor, mask) is tensor
    assert tensor.tolist() == [0, 2, 0, 7]


@given(SCORES, dtypes, st.integers(0, 99))
def test_zero_inactive_leaves_positive_zeros_and_the_same_bits(values, dtype, seed):
    tensor = torch.tensor(values, dtype=dtype)
    mask = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) < 0.5
    before = tensor.clone()
    masks.zero_inactive_(tensor, mask)
    assert torch.equal(tensor[mask].nan_to_num(7.0), before[mask].nan_to_num(7.0))
    assert not tensor[~mask].signbit().any() and not tensor[~mask].any()


def test_zero_inactive_works_across_strides_and_on_trained_weights():
    weight = torch.nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    mask = torch.rand(2, 3, 4, 4) < 0.5
    masks.zero_inactive_(weight.data, mask)
    assert torch.equal(weight != 0, mask)
    assert weight.is_contiguous(memory_format=torch.channels_last)
