"""Balanced groups (spec §6) and the pattern options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.errors import ConfigError
from rarefy.patterns import Pattern, parse_pattern
from rarefy.patterns.constant_fan import FanIn, FanOut
from rarefy.patterns.diagonals import Diagonals
from rarefy.patterns.structures import FREE, Blocks, NOfM
from rarefy.patterns.transposable import Transposable
from rarefy.roles import Axes
from rarefy.validation import shorten


@given(
    axis=st.sampled_from([0, 1]),
    groups=st.integers(1, 4),
    piece=st.integers(1, 3),
    other=st.integers(1, 4),
    more=st.lists(st.integers(1, 3), max_size=2),
)
def test_pieces_are_equal_consecutive_blocks_that_merge_again(axis, groups, piece, other, more):
    shape = [groups * piece, other] if axis == 0 else [other, groups * piece]
    weight = torch.arange(torch.tensor(shape + more).prod().item()).view(*shape, *more)
    pattern = Pattern(axis, groups)
    pattern.check("w", weight.shape)
    pieces = pattern.split(weight)
    assert len(pieces) == groups
    for index, block in enumerate(pieces):
        assert torch.equal(block, weight.narrow(axis, index * piece, piece))
    assert torch.equal(pattern.merge(pieces), weight)


def test_unstructured_is_one_piece_of_any_shape():
    pattern = parse_pattern("unstructured", None, None)
    weight = torch.rand(3)
    pattern.check("w", weight.shape)
    assert [piece is weight for piece in pattern.split(weight)] == [True]
    assert pattern.merge([weight]) is weight and pattern.key == ""


def test_options_choose_the_axis():
    assert parse_pattern("unstructured", 3, None) == Pattern(1, 3)
    assert parse_pattern("unstructured", None, 2) == Pattern(0, 2)


@pytest.mark.parametrize(
    ("axis", "shape", "message"),
    [
        (
            0,
            [6, 8],
            "balance_out_groups: 4 is not allowed; give a divisor of the 6 output features of w [6, 8]",
        ),
        (
            1,
            [8, 6],
            "balance_in_groups: 4 is not allowed; give a divisor of the 6 input features of w [8, 6]",
        ),
        (1, [8], "balance_in_groups: 4 is not allowed; give a divisor of the 0 input features of w [8]"),
    ],
)
def test_groups_must_divide_the_dimension(axis, shape, message):
    with pytest.raises(ConfigError) as caught:
        Pattern(axis, 4).check("w", shape)
    assert str(caught.value) == message


@pytest.mark.parametrize("key", ["balance_in_groups", "balance_out_groups"])
@pytest.mark.parametrize("value", [0, -2, 1.5, "3", True])
def test_group_numbers_are_whole_and_positive(key, value):
    options = {"balance_in_groups": None, "balance_out_groups": None, key: value}
    with pytest.raises(ConfigError) as caught:
        parse_pattern("unstructured", **options)
    assert str(caught.value) == (
        f"{key}: {shorten(value)} is not allowed; give a whole number of groups ≥ 1 (example: {key}: 12)"
    )


def test_only_one_balance():
    with pytest.raises(ConfigError) as caught:
        parse_pattern("unstructured", 2, 2)
    assert str(caught.value) == (
        "balance_in_groups: together with balance_out_groups is not allowed; give only one of the two"
    )


@pytest.mark.parametrize(
    ("pattern", "structure"),
    [
        ("unstructured", FREE),
        ("fan_in", FanIn()),
        ("fan_out", FanOut()),
        ("diagonal", Diagonals()),
        ({"n": 2, "m": 4, "transposable": True}, Transposable(2, 4)),
        ({"n": 2, "m": 4, "transposable": False}, NOfM(2, 4)),
        ({"n": 2, "m": 4}, NOfM(2, 4)),
        ({"block": [8, 16]}, Blocks(8, 16)),
        ({"block": (1, 4)}, Blocks(1, 4)),
        ({"block": [2, 2], "score": "max"}, Blocks(2, 2, "max")),
    ],
)
def test_structures(pattern, structure):
    assert parse_pattern(pattern, None, None) == Pattern(structure=structure)
    assert parse_pattern(pattern, None, 2) == Pattern(0, 2, structure)


@pytest.mark.parametrize(
    "pattern", ["blocky", {"n": 2}, {"n": 2, "m": 4, "block": [2, 2]}, {}, None, 4, {"score": "sum"}]
)
def test_other_patterns_are_refused(pattern):
    with pytest.raises(ConfigError) as caught:
        parse_pattern(pattern, None, None)
    assert str(caught.value) == (
        f"pattern: {shorten(pattern)} is not allowed; give unstructured, {{n: 2, m: 4}}, {{block: [8, 8]}}, fan_in, "
        "fan_out or diagonal (example: pattern: {n: 2, m: 4})"
    )


def test_transposable_is_true_or_false():
    with pytest.raises(ConfigError) as caught:
        parse_pattern({"n": 2, "m": 4, "transposable": "yes"}, None, None)
    assert str(caught.value) == (
        "pattern.transposable: 'yes' is not allowed; give true or false (example: pattern: {n: 2, m: 4, "
        "transposable: true})"
    )


@pytest.mark.parametrize(
    ("structure", "axes", "refused"),
    [
        (FanIn(), Axes(groups=2), False),
        (FanOut(), Axes(groups=2), True),
        (FanIn(), Axes(transposed=True, groups=2), True),
        (FanOut(), Axes(transposed=True, groups=2), False),
    ],
)
def test_connections_are_counted_where_a_convolution_with_groups_has_one_set(structure, axes, refused):
    pattern = Pattern(structure=structure).on(axes)
    if not refused:
        pattern.check("w", (4, 6))
        return
    side = "outputs" if axes.transposed else "inputs"
    with pytest.raises(ConfigError, match=f"pattern: {structure} for w .its 2 groups see different {side}"):
        pattern.check("w", (4, 6))


@pytest.mark.parametrize(
    ("n", "m"), [(4, 4), (5, 4), (0, 4), (-1, 4), (2, 0), (1.0, 4), (True, 4), ("2", "4")]
)
def test_n_is_below_m_and_both_are_counts(n, m):
    with pytest.raises(ConfigError) as caught:
        parse_pattern({"n": n, "m": m}, None, None)
    assert str(caught.value) == (
        f"pattern: {shorten({'n': n, 'm': m})} is not allowed; give whole numbers 1 ≤ n < m: n of every m inputs "
        "are active (example: pattern: {n: 2, m: 4})"
    )


@pytest.mark.parametrize("score", ["mean", None, 1, ["sum"], True])
def test_block_scores_are_named(score):
    with pytest.raises(ConfigError) as caught:
        parse_pattern({"block": [8, 8], "score": score}, None, None)
    assert str(caught.value) == (
        f"pattern.score: {shorten(score)} is not allowed; give sum or norm or max "
        "(example: pattern: {block: [8, 8], score: norm})"
    )
    assert str(Blocks(8, 8, "norm")) == "{block: [8, 8], score: norm}"


@pytest.mark.parametrize("block", [8, [8], [8, 8, 8], [0, 8], [8, 1.5], ["8", 8], "88", None, {"r": 8}])
def test_blocks_are_two_counts(block):
    with pytest.raises(ConfigError) as caught:
        parse_pattern({"block": block}, None, None)
    assert str(caught.value) == (
        f"pattern.block: {shorten(block)} is not allowed; give two whole numbers ≥ 1, the outputs and inputs of a "
        "block (example: pattern: {block: [8, 8]})"
    )
