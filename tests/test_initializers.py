"""The first mask, by every method, and functions of one's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.errors import ConfigError, RarefyError
from rarefy.initializers import INITIALIZERS, check_mask, generator_for, parse_initializer, random_scores
from rarefy.masks import kept_count

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
shapes = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@pytest.mark.parametrize("name", ["random", "topk", "checkerboard"])
@given(shape=shapes, sparsity=st.floats(0, 1), dtype=st.sampled_from(DTYPES))
def test_counts_are_exact(name, shape, sparsity, dtype):
    weight = torch.randn(shape).to(dtype)
    mask = INITIALIZERS[name](weight, sparsity, generator_for(0, "w", 0))
    assert (mask.dtype, mask.shape) == (torch.bool, weight.shape)
    assert int(mask.sum()) == kept_count(weight.numel(), sparsity)


@given(total=st.integers(1, 500), sparsity=st.floats(0, 1))
def test_checkerboard_spreads_evenly(total, sparsity):
    mask = INITIALIZERS["checkerboard"](torch.ones(total), sparsity, torch.Generator())
    gaps = mask.nonzero().flatten().diff()
    assert len(gaps) == 0 or int(gaps.max() - gaps.min()) <= 1


def test_topk_takes_the_largest_magnitudes():
    weight = torch.tensor([[1.0, -5.0], [4.0, 0.5]])
    assert INITIALIZERS["topk"](weight, 0.5, torch.Generator()).tolist() == [[False, True], [True, False]]


def test_from_zeros_takes_what_is_not_zero():
    weight = torch.tensor([1.0, 0.0, -0.0, float("nan"), -2.0])
    mask = INITIALIZERS["from_zeros"](weight, 0.9, torch.Generator())
    assert mask.tolist() == [True, False, False, True, True]


def test_random_depends_on_the_generator_and_not_on_weights_or_torch():
    first = INITIALIZERS["random"](torch.randn(30, 30), 0.9, generator_for(5, "w", 0))
    torch.manual_seed(123)
    again = INITIALIZERS["random"](torch.zeros(30, 30).bfloat16(), 0.9, generator_for(5, "w", 0))
    assert torch.equal(first, again)


def test_random_does_not_consume_torchs_own_randomness():
    before = torch.get_rng_state()
    INITIALIZERS["random"](torch.zeros(9, 9), 0.5, generator_for(0, "w", 0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [(1, "w", 0), (0, "v", 0), (0, "w", 1)])
def test_seed_name_and_update_each_matter(other):
    draws = [random_scores(torch.empty(20), generator_for(*key)) for key in [(0, "w", 0), other]]
    assert not torch.equal(*draws)


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**80])
def test_any_whole_number_is_a_seed(seed):
    assert random_scores(torch.empty(2), generator_for(seed, "w", 0)).shape == (2,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_scores_are_float32(dtype):
    assert random_scores(torch.empty(3, dtype=dtype), torch.Generator()).dtype == torch.float32


@pytest.mark.parametrize("name", ["random", "topk", "from_zeros", "checkerboard", "TopK"])
def test_names(name):
    assert parse_initializer(name) is INITIALIZERS[name.lower()]


def keep_positive(weight, sparsity, threshold=0.0):
    return weight > threshold


def keep_drawn(weight, sparsity, source):
    return torch.rand(weight.shape, generator=source) >= sparsity


def test_a_function_gets_weight_and_sparsity():
    assert parse_initializer(keep_positive)(torch.tensor([1.0, -1.0]), 0.5, torch.Generator()).tolist() == [
        True,
        False,
    ]


def test_a_function_with_a_third_argument_gets_the_generator():
    weight, initializer = torch.empty(50), parse_initializer(keep_drawn)
    masks = [initializer(weight, 0.5, generator_for(0, "w", 0)) for _ in range(2)]
    assert torch.equal(*masks) and 0 < int(masks[0].sum()) < 50


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("topp", "did you mean topk?"),
        ("zzzz", "one of checkerboard, from_zeros, random, topk"),
        (3, "one of checkerboard, from_zeros, random, topk"),
    ],
)
def test_unknown_methods(value, hint):
    with pytest.raises(ConfigError) as caught:
        parse_initializer(value)
    assert str(caught.value) == (
        f"init_method: {value!r} is not allowed; give a known method ({hint}) (example: init_method: topk)"
    )


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (torch.ones(2, 3), "torch.float32 [2, 3]"),
        (torch.ones(3, 2, dtype=torch.bool), "torch.bool [3, 2]"),
        (None, "NoneType"),
    ],
)
def test_a_function_that_returns_no_mask(answer, got):
    def broken(weight, sparsity):
        return answer

    with pytest.raises(RarefyError) as caught:
        parse_initializer(broken)(torch.zeros(2, 3), 0.5, torch.Generator())
    assert str(caught.value) == f"init_method broken returned {got}; return a bool tensor of shape [2, 3]"


def test_check_mask_passes_a_good_one():
    mask = torch.ones(2, dtype=torch.bool)
    assert torch.equal(check_mask(mask, torch.zeros(2), "f"), mask)
