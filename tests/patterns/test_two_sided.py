"""n of m in both directions: against all masks of a tile, and the rules that hold whatever the scores are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.errors import RarefyError
from rarefy.initializers import checkerboard, from_zeros, random, topk
from rarefy.patterns import Transposable
from rarefy.patterns.tiles import fullest_column, fullest_row, keep_regular, regular_masks
from rarefy.ties import TieOrder

INF, NAN = float("inf"), float("nan")
COUNTS = [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3), (5, 2), (6, 1)]


def tiles_of(mask: torch.Tensor, m: int) -> torch.Tensor:
    matrix = mask if mask.dim() == 2 else mask.flatten(2).movedim(2, 0).flatten(0, 1)
    rows = matrix.unflatten(0, (-1, m)).unflatten(2, (-1, m))
    return rows.transpose(1, 2).flatten(0, 1)


def assert_regular(mask: torch.Tensor, m: int, count: int) -> None:
    tiles = tiles_of(mask, m)
    assert bool((tiles.sum(1) == count).all() and (tiles.sum(2) == count).all())


def brute_force(tile: list[float], side: int, count: int) -> float:
    """The highest sum of all masks with `count` in every row and column, made independently of the library."""
    rows = list(itertools.combinations(range(side), count))
    best = -INF
    for choice in itertools.product(rows, repeat=side):
        used = [sum(column in row for row in choice) for column in range(side)]
        if all(one == count for one in used):
            best = max(best, sum(tile[i * side + j] for i, row in enumerate(choice) for j in row))
    return best


def test_what_is_dropped_among_equals_is_not_what_grows_again():
    equal = torch.ones(8, 8)
    structure = Transposable(2, 4)
    for order in map(TieOrder, range(3)):
        mask = structure.keep_top(equal, 0.5, order)
        grown = structure.drop_and_grow(mask, equal, equal, 0.5, 1.0, order)
        assert torch.equal(grown, structure.keep_top(equal, 0.5, order.other()))
        assert not torch.equal(grown, mask)


def test_there_are_ninety_masks_of_two_of_four():
    assert len(regular_masks(4, 2)) == len(regular_masks(4, 2).unique(dim=0)) == 90


@given(st.sampled_from(COUNTS), st.integers(0, 9999), st.booleans())
def test_the_sum_is_the_best_one_or_at_least_half_of_it(case, seed, rough):
    side, count = case
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, side * side, generator=generator, dtype=torch.float64)
    scores = (4 * scores).floor() if rough else scores
    kept = keep_regular(scores, side, count, TieOrder(seed))
    assert_regular(kept.view(side, side), side, count)
    best = brute_force(scores[0].tolist(), side, count)
    if side <= 4:
        assert float(scores[kept].sum()) == pytest.approx(best)
    else:
        assert float(scores[kept].sum()) >= best / 2


@given(st.sampled_from([(4, 2), (4, 1), (8, 4), (8, 3), (16, 5)]), st.integers(0, 9999))
def test_rows_and_columns_are_full_whatever_the_scores(case, seed):
    side, count = case
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, 0.5, -1.0, INF, -INF, NAN])
    scores = values[torch.randint(len(values), (2 * side, 3 * side), generator=generator)]
    structure = Transposable(count, side)
    mask = structure.keep_top(scores, 1 - count / side, TieOrder(seed))
    assert_regular(mask, side, count)
    assert int(mask.sum()) == structure.kept(mask.shape, 1 - count / side)
    assert structure.holds(mask, 1 - count / side)
    assert not structure.holds(~mask, 1 - count / side) or 2 * count == side
    assert torch.equal(mask, structure.keep_top(scores, 1 - count / side, TieOrder(seed)))


@given(st.integers(0, 9999), st.sampled_from([(1, 2), (2, 3), (1, 3)]))
def test_infinite_scores_come_before_sums(seed, counts):
    """A regular part of a regular mask can always be chosen, and a regular mask around it."""
    few, many = counts
    generator = torch.Generator().manual_seed(seed)
    scores = 100 * torch.rand(3, 16, generator=generator)
    inner = keep_regular(scores.flip(1), 4, few, TieOrder())
    outer = keep_regular(scores.masked_fill(inner, INF), 4, many, TieOrder())
    assert bool((inner <= outer).all())
    part = keep_regular(scores.masked_fill(~outer, -INF), 4, few, TieOrder())
    assert bool((part <= outer).all())
    # What is not a number ranks below -∞.
    worst = scores.masked_fill(~outer, NAN).masked_fill(inner, -INF)
    assert torch.equal(keep_regular(worst, 4, many, TieOrder()), outer)


@pytest.mark.parametrize("side", [1, 2, 4, 8, 255, 256])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_fullest_row_and_column_of_tiles_are_found(side, share, seed):
    mask = torch.rand(2 * side, side, generator=torch.Generator().manual_seed(seed)) < share
    in_columns = int(mask.unflatten(0, (2, side)).sum(1).max())
    assert (fullest_row(mask, side), fullest_column(mask, side)) == (int(mask.sum(1).max()), in_columns)
    turned = mask.t().contiguous()
    assert (fullest_column(turned, side), fullest_row(turned, side)) == (int(mask.sum(1).max()), in_columns)


@pytest.mark.parametrize("side", [4, 8])
def test_connections_are_counted_wherever_a_mask_begins(side):
    memory = torch.rand(2 * side * side + 1, generator=torch.Generator().manual_seed(side)) < 0.5
    mask = memory[1:].view(2 * side, side)
    assert fullest_row(mask, side) == int(mask.sum(1).max())
    assert fullest_column(mask, side) == int(mask.view(2, side, side).sum(1).max())


@pytest.mark.parametrize("side", [3, 4])
def test_a_matrix_without_tiles_has_no_full_rows(side):
    empty = torch.zeros(0, side, dtype=torch.bool)
    assert fullest_row(empty, side) == fullest_column(empty, side) == 0


def test_equal_scores_are_told_apart_by_the_order():
    scores = torch.ones(64, 16)
    first, second = (keep_regular(scores, 4, 2, TieOrder(seed)) for seed in (1, 2))
    assert len(first.unique(dim=0)) > 20 and not torch.equal(first, second)
    many = torch.ones(16, 64)
    assert len(keep_regular(many, 8, 4, TieOrder(1)).unique(dim=0)) == 16


@given(st.sampled_from([(4, 2), (4, 1), (8, 4)]), st.floats(0, 1), st.integers(0, 999))
def test_an_update_keeps_the_best_and_grows_around_them(case, fraction, seed):
    side, count = case
    structure, sparsity = Transposable(count, side), 1 - count / side
    generator = torch.Generator().manual_seed(seed)
    drop, grow, first = (torch.rand(2 * side, side, generator=generator) for _ in range(3))
    mask = structure.keep_top(first, sparsity)
    before = mask.clone()
    found = structure.drop_and_grow(mask, drop, grow, sparsity, fraction, TieOrder(seed))
    assert_regular(found, side, count)
    assert torch.equal(mask, before)
    stay = count - round(fraction * count)
    assert side > 4 or int((found & mask).sum()) >= stay * mask.numel() // side
    if fraction == 0:
        assert side > 4 or torch.equal(found, mask)


def test_a_dense_tile_goes_to_its_count_by_drop_score_alone():
    drop = torch.rand(4, 8)
    dense = torch.ones(4, 8, dtype=torch.bool)
    found = Transposable(2, 4).drop_and_grow(dense, drop, -drop, 0.5, 1.0)
    assert torch.equal(found, Transposable(2, 4).keep_top(drop, 0.5, TieOrder(0)))


def test_a_mask_with_fewer_is_filled():
    few = torch.zeros(4, 4, dtype=torch.bool)
    few[0, 0] = True
    found = Transposable(2, 4).drop_and_grow(few, few.float(), few.float(), 0.5, 0.0)
    assert_regular(found, 4, 2)
    assert bool(found[0, 0])


@pytest.mark.parametrize("shape", [(8, 12), (4, 8, 3), (4, 4, 2, 3)])
@pytest.mark.parametrize("initializer", [random, topk, checkerboard])
@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 4), (0.25, 3), (0.5, 2), (1.0, 0)])
def test_first_masks(shape, initializer, sparsity, count):
    structure, weight = Transposable(2, 4), torch.randn(shape)
    mask = initializer(weight, sparsity, torch.Generator().manual_seed(0), structure)
    assert mask.shape == weight.shape
    assert_regular(mask, 4, count)
    assert torch.equal(structure.unfold(structure.fold_mask(mask), shape), mask)


def test_a_schedule_leaves_one_connection_where_rounding_would_leave_none():
    assert Transposable(1, 4).within_reach((4, 4), 0.9) == 0.75
    assert Transposable(1, 4).within_reach((4, 4), 1.0) == 1.0
    assert Transposable(1, 4).within_reach((0, 4), 0.9) == 0.9


def test_from_zeros_takes_what_fits():
    weight = torch.eye(4).repeat(1, 2)
    assert torch.equal(from_zeros(weight, 0.75, torch.Generator(), Transposable(1, 4)), weight != 0)
    row = torch.zeros(4, 4)
    row[:, 0] = 1.0  # one in each row is one of four, but not for the transposed weight
    with pytest.raises(RarefyError, match=r"does not obey the pattern \{n: 1, m: 4, transposable: true\}"):
        from_zeros(row, 0.75, torch.Generator(), Transposable(1, 4))
