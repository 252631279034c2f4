"""n of m, fan-in and blocks: every selection against a naive one, group by group and block by block."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.errors import ConfigError, RarefyError
from rarefy.initializers import checkerboard, from_zeros, parse_initializer, random, topk
from rarefy.masks import drop_lowest, grow_highest, keep_top, kept_count, sparsity_of
from rarefy.patterns import Diagonals, FanIn, FanOut, Pattern, Transposable
from rarefy.patterns.structures import FREE, Blocks, NOfM, Structure
from rarefy.ties import TieOrder

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
NAN, INF = float("nan"), float("inf")
VALUES = torch.tensor([0.0, -0.0, 1.0, 1.0, 0.5, 2.0, -1.0, INF, -INF, NAN])


@st.composite
def structured(draw):
    """A structure and a shape that it divides, of two to four dimensions."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    more = draw(st.lists(st.integers(1, 3), max_size=2))
    kind = draw(st.sampled_from([NOfM, Blocks, FanIn, FanOut, Diagonals]))
    if kind in (FanIn, FanOut, Diagonals):
        return kind(), [rows, columns, *more]
    if kind is NOfM:
        m = draw(st.sampled_from([2, 3, 4, 8, 40]))
        return NOfM(draw(st.integers(1, m - 1)), m), [rows, m * draw(st.integers(1, 3)), *more]
    score = draw(st.sampled_from(["sum", "norm", "max"]))
    structure = Blocks(draw(st.integers(1, 4)), draw(st.integers(1, 4)), score)
    return structure, [rows * structure.rows, columns * structure.columns, *more]


def scores_of(shape, seed, dtype=torch.float32):
    """Random choices of few values, so that there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    return VALUES[torch.randint(len(VALUES), list(shape), generator=generator)].to(dtype)


def units_of(structure, shape):
    """The indices of every unit's connections, row by row, in a flat weight."""
    position = torch.arange(torch.Size(shape).numel()).view(*shape)
    if isinstance(structure, FanIn):
        return [[[i] for i in row.flatten().tolist()] for row in position]
    if isinstance(structure, FanOut):
        return [[[i] for i in column.flatten().tolist()] for column in position.transpose(0, 1)]
    places = list(itertools.product(*map(range, shape[2:])))
    if isinstance(structure, Diagonals):
        return [diagonals_of(position[(slice(None), slice(None), *place)]) for place in places]
    if isinstance(structure, NOfM):
        return [
            [[i] for i in position[(row, slice(start, start + structure.m), *place)].tolist()]
            for place in places
            for row in range(shape[0])
            for start in range(0, shape[1], structure.m)
        ]
    r, c = structure.rows, structure.columns
    corners = itertools.product(places, range(0, shape[0], r), range(0, shape[1], c))
    return [
        [position[(slice(i, i + r), slice(j, j + c), *place)].flatten().tolist() for place, i, j in corners]
    ]


def diagonals_of(matrix):
    """Those of a matrix, each as the list of its entries."""
    if len(matrix) > matrix.shape[1]:
        matrix = matrix.T
    width = matrix.shape[1]
    return [[int(row[(i + d) % width]) for i, row in enumerate(matrix)] for d in range(width)]


def naive(structure, shape, choose):
    """The mask whose rows of units are chosen by `choose(indices of the row's units)`, one row at a time."""
    mask = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
    for row in units_of(structure, shape):
        for unit, active in zip(row, choose(row), strict=True):
            mask[unit] = bool(active)
    return mask.view(*shape)


def unit_scores(structure, row, scores):
    wide = scores.flatten().to(torch.promote_types(scores.dtype, torch.float32))
    return torch.stack([unit_score(wide[unit], getattr(structure, "score", "sum")) for unit in row])


def unit_score(scores, kind):
    if kind == "norm":
        squares = (scores.double().square() * scores.sign()).sum()
        return squares.sign() * squares.abs().sqrt()
    return scores.max() if kind == "max" else scores.sum()


def order_of(structure, shape, row):
    """The order of the units of a row among all units."""
    rows = units_of(structure, shape)
    return TieOrder(9).among(torch.arange(len(row)) + rows.index(row) * len(row))


def naive_update(structure, row, mask, drop, grow, sparsity, fraction, order):
    """Spec §3 for one group: keep the highest active ones, grow to the target among all that were not kept."""
    flat = mask.flatten()
    active = torch.tensor([bool(flat[unit].any()) for unit in row])
    target, before = kept_count(len(row), sparsity), int(active.sum())
    if before == len(row):
        return keep_top(unit_scores(structure, row, drop), target, order)
    stay = min(before - round(fraction * before), target)
    kept = drop_lowest(active, unit_scores(structure, row, drop), before - stay, order)
    return grow_highest(kept, unit_scores(structure, row, grow), target - stay, order.other())


@given(structured(), st.floats(0, 1), st.integers(0, 99), DTYPES)
def test_keep_top_is_naive_selection_in_every_group(case, sparsity, seed, dtype):
    structure, shape = case
    scores = scores_of(shape, seed, dtype)
    mask = structure.keep_top(scores, sparsity, TieOrder(9))

    def best(row):
        return keep_top(
            unit_scores(structure, row, scores),
            kept_count(len(row), sparsity),
            order_of(structure, shape, row),
        )

    expected = naive(structure, shape, best)
    assert torch.equal(mask, expected)
    assert int(mask.sum()) == structure.kept(shape, sparsity)
    assert structure.holds(mask, sparsity)


@given(structured(), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99), DTYPES, st.booleans())
def test_drop_and_grow_is_the_naive_rule_in_every_group(case, sparsity, fraction, seed, dtype, regular):
    """Also from masks whose groups are filled unevenly, as a checkpoint of another run may hold."""
    structure, shape = case
    drop, grow = scores_of(shape, seed, dtype), scores_of(shape, seed + 1, dtype)
    mask = structure.keep_top(scores_of(shape, seed + 2), sparsity) if regular else drop > 0.5
    before = mask.clone()
    found = structure.drop_and_grow(mask, drop, grow, sparsity, fraction, TieOrder(9))

    def updated(row):
        return naive_update(
            structure, row, mask, drop, grow, sparsity, fraction, order_of(structure, shape, row)
        )

    expected = naive(structure, shape, updated)
    assert torch.equal(found, expected) and torch.equal(mask, before)
    assert int(found.sum()) == structure.kept(shape, sparsity)


@given(structured(), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99), DTYPES)
def test_scores_count_without_their_signs_where_that_is_asked_for(case, sparsity, fraction, seed, dtype):
    structure, shape = case
    scores = scores_of(shape, seed, dtype) - 0.5
    mask = structure.keep_top(scores_of(shape, seed + 1), sparsity)
    options = (sparsity, fraction, TieOrder(9))
    found = structure.dropped(mask, scores, *options, by_size=True)
    assert torch.equal(found, structure.dropped(mask, scores.abs(), *options))


def test_a_group_that_is_all_active_goes_to_its_count_by_drop_score_alone():
    mask = torch.tensor([[True, True, True, True, True, False, True, False]])
    drop, grow = torch.arange(8.0)[None], -torch.arange(8.0)[None]
    found = NOfM(2, 4).drop_and_grow(mask, drop, grow, 0.5, fraction=1.0)
    assert found.int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]


@given(structured(), st.integers(0, 99))
def test_folding_and_unfolding_are_inverse(case, seed):
    structure, shape = case
    mask = structure.keep_top(scores_of(shape, seed), 0.5)
    units = structure.fold_mask(mask)
    assert tuple(units.shape) == structure.layout(shape)
    assert torch.equal(structure.unfold(units, shape), mask)


def test_two_of_four():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0, 1.0, 5.0, 5.0, 5.0]])
    assert NOfM(2, 4).keep_top(weight, 0.5).int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0]]


def test_a_block_counts_by_the_sum_of_its_scores():
    weight = torch.tensor([[9.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0]])
    assert Blocks(2, 2).keep_top(weight, 0.5).int().tolist() == [[0, 0, 1, 1]] * 2


def test_groups_of_a_convolution_are_input_channels():
    weight = torch.rand(3, 8, 5, 5)
    mask = NOfM(1, 4).keep_top(weight, 0.75)
    assert (mask.unflatten(1, (2, 4)).sum(2) == 1).all()
    assert torch.equal(mask, NOfM(1, 4).keep_top(weight.to(memory_format=torch.channels_last), 0.75))


@pytest.mark.parametrize(
    "structure", [FREE, NOfM(2, 4), Blocks(2, 4), FanIn(), FanOut(), Diagonals(), Transposable(2, 4)]
)
def test_weights_without_rows(structure):
    empty = torch.zeros(0, 8)
    structure.check("w", empty.shape)
    mask = structure.keep_top(empty, 0.5)
    assert mask.shape == (0, 8) and structure.kept((0, 8), 0.5) == 0
    assert structure.drop_and_grow(mask, empty, empty, 0.5, 0.3).shape == (0, 8)
    assert checkerboard(empty, 0.5, torch.Generator(), structure).shape == (0, 8)


# ---- first masks ----


@pytest.mark.parametrize("initializer", [random, topk, checkerboard])
@given(structured(), st.floats(0, 1))
def test_first_masks_obey(initializer, case, sparsity):
    structure, shape = case
    weight = torch.randn(shape)
    mask = initializer(weight, sparsity, torch.Generator().manual_seed(0), structure)
    assert structure.holds(mask, sparsity) and int(mask.sum()) == structure.kept(shape, sparsity)
    rows = units_of(structure, shape)
    counts = {sum(bool(mask.flatten()[unit].any()) for unit in row) for row in rows}
    assert counts == {kept_count(len(rows[0]), sparsity)}


def test_from_zeros_takes_a_pruned_weight():
    generator, weight = torch.Generator(), torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 3.0, 0.0]])
    assert torch.equal(from_zeros(weight, 0.5, generator, NOfM(2, 4)), weight != 0)
    with pytest.raises(RarefyError) as caught:
        from_zeros(weight, 0.75, generator, NOfM(1, 4))
    assert str(caught.value) == (
        "init_method from_zeros returned a mask that does not obey the pattern {n: 1, m: 4}; use init_method: topk"
    )
    blocks = from_zeros(weight, 0.5, generator, Blocks(1, 2))
    assert blocks.int().tolist() == [[1, 1, 1, 1, 0, 0, 1, 1]]


def test_functions_of_ones_own_are_checked():
    def first_columns(weight, sparsity):
        return (torch.arange(weight.shape[1]) < weight.shape[1] * (1 - sparsity)).expand_as(weight)

    own, weight = parse_initializer(first_columns), torch.ones(2, 8)
    assert sparsity_of(own(weight, 0.5, torch.Generator(), FREE)) == 0.5
    assert sparsity_of(own(weight, 0.5, torch.Generator(), Blocks(2, 4))) == 0.5
    for structure in (NOfM(2, 4), Blocks(1, 8)):
        with pytest.raises(RarefyError, match="init_method first_columns returned a mask that does not obey"):
            own(weight, 0.5, torch.Generator(), structure)


# ---- whole patterns ----


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "structure", [FREE, NOfM(1, 2), Blocks(2, 2), FanIn(), FanOut(), Diagonals(), Transposable(1, 2)]
)
def test_structures_inside_balanced_groups(axis, structure):
    pattern, weight = Pattern(axis, 2, structure), torch.rand(8, 12)
    pattern.check("w", weight.shape)
    pieces = [structure.keep_top(piece, 0.5) for piece in pattern.split(weight)]
    mask = pattern.merge(pieces)
    assert int(mask.sum()) == pattern.kept(weight.shape, 0.5) == 48
    assert {int(piece.sum()) for piece in pattern.split(mask)} == {24}


@given(structured(), st.floats(0, 1))
def test_the_count_of_a_pattern_is_that_of_its_pieces(case, sparsity):
    structure, shape = case
    pattern = Pattern(0, 2, structure)
    whole = [2 * shape[0], *shape[1:]]
    within = pattern.within_reach(whole, sparsity)  # lower where rounding would leave a piece empty
    assert pattern.kept(whole, sparsity) == 2 * structure.kept(shape, within)


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [
        (Pattern(), "unstructured"),
        (Pattern(1, 3), "balance_in_groups: 3"),
        (Pattern(structure=NOfM(2, 4)), "{n: 2, m: 4}"),
        (Pattern(structure=FanIn()), "fan_in"),
        (Pattern(structure=FanOut()), "fan_out"),
        (Pattern(structure=Diagonals()), "diagonal"),
        (Pattern(structure=Transposable(2, 4)), "{n: 2, m: 4, transposable: true}"),
        (Pattern(0, 2, Blocks(4, 8)), "balance_out_groups: 2, {block: [4, 8]}"),
    ],
)
def test_patterns_are_shown_as_they_are_written(pattern, shown):
    assert str(pattern) == shown


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (
            Pattern(structure=NOfM(2, 4)),
            [8, 6],
            "pattern: {n: 2, m: 4} is not allowed; give an m that divides the 6 input features of w [8, 6]",
        ),
        (
            Pattern(structure=NOfM(2, 4)),
            [8],
            "pattern: {n: 2, m: 4} is not allowed; give an m that divides the 0 input features of w [8]",
        ),
        (
            Pattern(1, 4, NOfM(2, 4)),
            [8, 24],
            "pattern: {n: 2, m: 4} is not allowed; give an m that divides the 6 input features of each group of w "
            "[8, 6]",
        ),
        (
            Pattern(structure=FanIn()),
            [8],
            "pattern: fan_in is not allowed; give unstructured for w [8], which has no inputs",
        ),
        (
            Pattern(structure=FanOut()),
            [8],
            "pattern: fan_out is not allowed; give unstructured for w [8], which has no inputs",
        ),
        (
            Pattern(structure=Diagonals()),
            [8],
            "pattern: diagonal is not allowed; give unstructured for w [8], which has no inputs",
        ),
        (
            Pattern(structure=Transposable(2, 4)),
            [6, 16],
            "pattern: {n: 2, m: 4, transposable: true} is not allowed; give an m that divides the 6 output and the 16 "
            "input features of w [6, 16]",
        ),
        (
            Pattern(structure=Blocks(4, 8)),
            [6, 16],
            "pattern: {block: [4, 8]} is not allowed; give blocks that divide the 6 output and the 16 input features "
            "of w [6, 16]",
        ),
        (
            Pattern(structure=Blocks(1, 8)),
            [6],
            "pattern: {block: [1, 8]} is not allowed; give blocks that divide the 6 output and the 0 input features "
            "of w [6]",
        ),
    ],
)
def test_shapes_that_do_not_divide_are_refused(pattern, shape, message):
    with pytest.raises(ConfigError) as caught:
        pattern.check("w", shape)
    assert str(caught.value) == message


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_diagonals_give_the_shorter_side_as_many_connections_each(shape):
    mask = Diagonals().keep_top(torch.rand(shape), 0.75)
    short, long = min(shape), max(shape)
    counts = mask.sum(1 if shape[0] == short else 0)
    assert counts.tolist() == [round(0.25 * long)] * short
    # Of a square matrix both sides.
    assert short != long or mask.sum(0).tolist() == mask.sum(1).tolist()


def test_the_norm_of_tiny_scores_still_ranks_blocks():
    scores = torch.tensor([[1e-30, 1e-30, 2e-30, 1e-30, -1e-30, 0.0]])
    assert Blocks(1, 2, "norm").keep_top(scores, 0.67).int().tolist() == [[0, 0, 1, 1, 0, 0]]
    assert Blocks(1, 2, "norm").fold(scores).argmin() == 2


def test_squares_of_negative_scores_count_against_a_block():
    assert Blocks(1, 2, "norm").fold(torch.tensor([[-3.0, -4.0, 3.0, 4.0]])).tolist() == [[-5.0, 5.0]]


def test_sums_of_diagonals_are_not_rounded_to_the_scores_dtype():
    scores = torch.ones(301, 301, dtype=torch.bfloat16)
    assert Diagonals().fold(scores).unique().tolist() == [301.0]


def test_a_weight_without_rows_has_no_blocks():
    for score in ("sum", "norm", "max"):
        assert Blocks(2, 2, score).fold(torch.zeros(0, 4)).shape == (1, 0)


def test_a_fan_in_holds_where_outputs_without_connections_are_left_out():
    mask = torch.tensor([[True, True, False], [False, False, False], [False, True, True]])
    assert FanIn().holds(mask, 0.5)
    assert not FanIn().holds(mask & torch.tensor([True, True, False]), 0.5)


@pytest.mark.parametrize(
    ("structure", "rows"),
    [
        (FanIn(), [[1, 1, 0, 0], [1, 0, 0, 0]]),
        (FanOut(), [[1, 0], [1, 1], [0, 0]]),
        (Transposable(1, 2), [[1, 0], [1, 0]]),
        (Transposable(1, 2), [[1, 1], [0, 0]]),
        (NOfM(1, 2), [[1, 1], [0, 1]]),
        (Blocks(1, 2), [[1, 0], [1, 1]]),
        (Diagonals(), [[1, 0, 0], [0, 0, 1]]),
    ],
)
def test_masks_of_another_structure_are_told_apart(structure: Structure, rows: list[list[int]]) -> None:
    assert not structure.holds(torch.tensor(rows, dtype=torch.bool), 0.5)
