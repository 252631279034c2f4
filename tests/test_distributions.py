"""From one sparsity to one per parameter: uniform, ER (Mocanu et al.), ERK (Evci et al.)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.distributions import DISTRIBUTIONS, check_distribution, er, erk, share_out, uniform
from rarefy.errors import ConfigError
from rarefy.masks import kept_count

SHAPES = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), max_size=6)
SPARSITIES = st.floats(0, 1)
by_size = pytest.mark.parametrize("distribution", [er, erk])


def sizes_of(shapes):
    return [math.prod(shape) for shape in shapes]


def kept(sparsities, shapes):
    return sum(kept_count(n, s) for n, s in zip(sizes_of(shapes), sparsities, strict=True))


def ratio(distribution, shape):
    """(n_in + n_out) / (n_in · n_out), or the same with all dimensions."""
    dimensions = shape[:2] if distribution is er else shape
    return sum(dimensions) / math.prod(dimensions)


@given(SPARSITIES, st.integers(0, 5))
def test_uniform_gives_everyone_the_same(sparsity, count):
    assert uniform(sparsity, [(2, 3)] * count) == [sparsity] * count


@by_size
@given(SPARSITIES, SHAPES)
def test_as_many_connections_are_active_in_all_as_with_uniform(distribution, sparsity, shapes):
    shares = distribution(sparsity, shapes)
    assert len(shares) == len(shapes) and all(0 <= share <= 1 for share in shares)
    active = sum(n * (1 - share) for n, share in zip(sizes_of(shapes), shares, strict=True))
    assert active == pytest.approx((1 - sparsity) * sum(sizes_of(shapes)), abs=1e-6)
    rounding = 0.5 * (len(shapes) + 1) + 1e-6
    assert abs(kept(shares, shapes) - round((1 - sparsity) * sum(sizes_of(shapes)))) <= rounding


@by_size
@given(SPARSITIES, SHAPES)
def test_densities_follow_the_paper_up_to_1(distribution, sparsity, shapes):
    densities = [1 - share for share in distribution(sparsity, shapes)]
    ratios = [ratio(distribution, shape) for shape in shapes]
    free = [d / r for d, r in zip(densities, ratios, strict=True) if d < 1 - 1e-9]
    scale = max(free, default=0.0)
    assert all(value == pytest.approx(scale, abs=1e-9) for value in free)
    dense = [r for d, r in zip(densities, ratios, strict=True) if d >= 1 - 1e-9]
    assert all(scale * r >= 1 - 1e-6 for r in dense if free)


@by_size
@given(SPARSITIES, SPARSITIES, SHAPES)
def test_no_parameter_grows_when_the_network_shrinks(distribution, one, other, shapes):
    low, high = sorted((one, other))
    pairs = zip(distribution(low, shapes), distribution(high, shapes), strict=True)
    assert all(before <= after + 1e-9 for before, after in pairs)


@by_size
@given(SPARSITIES, st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_a_single_parameter_is_as_sparse_as_with_uniform(distribution, sparsity, shape):
    assert distribution(sparsity, [shape]) == [pytest.approx(sparsity, abs=1e-12)]


@by_size
@given(SHAPES)
def test_nothing_and_everything(distribution, shapes):
    assert kept(distribution(0.0, shapes), shapes) == sum(sizes_of(shapes))
    assert kept(distribution(1.0, shapes), shapes) == 0


@by_size
def test_the_empty_list_and_empty_weights(distribution):
    assert distribution(0.9, []) == []
    assert distribution(0.9, [(0, 4), (8, 8)]) == [0.9, pytest.approx(0.9)]
    assert distribution(0.9, [(0, 4)]) == [0.9]


def test_small_weights_are_dense_and_the_rest_pays():
    """Of 1,000,100 positions 20,002 are kept; ε is 20,002 / 2,020 at first, and ε·0.2 above 1."""
    small, large = er(0.98, [(10, 10), (1000, 1000)])
    assert small == 0
    assert large == pytest.approx(1 - (0.02 * 1_000_100 - 100) / 1_000_000)


def test_kernels_count_for_erk_alone():
    shapes = [(64, 64, 3, 3), (64, 64, 1, 1)]
    assert er(0.9, shapes) == pytest.approx([0.9, 0.9])
    wide, narrow = erk(0.9, shapes)
    assert narrow < 0.9 < wide
    assert (1 - wide) / (1 - narrow) == pytest.approx((134 / 9) / 130)


def test_shares_by_name():
    assert share_out("uniform", 0.5, {"a": (2, 2), "b": (3, 3)}) == {"a": 0.5, "b": 0.5}
    shares = share_out("erk", 0.9, {"a": (10, 10), "b": (100, 100)})
    assert list(shares) == ["a", "b"] and shares["a"] < 0.9 < shares["b"]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_known_names(name):
    assert check_distribution(name) == name


@pytest.mark.parametrize(("name", "shown"), [("unform", "'unform'"), ("ERK", "'ERK'"), (3, "3")])
def test_other_names_are_refused(name, shown):
    with pytest.raises(ConfigError) as caught:
        check_distribution(name)
    assert str(caught.value) == (
        f"distribution: {shown} is not allowed; give uniform, er, erk or global (example: distribution: erk)"
    )
