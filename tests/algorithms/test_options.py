"""The values of options, checked one by one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.algorithms.option_checks import (
    check_compute,
    check_seed,
    parse_fraction,
    refuse_constant,
    require_constant,
)
from rarefy.errors import ConfigError
from rarefy.schedules import Constant, Cycling, Linear


def message_of(call, *arguments, **options):
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **options)
    return str(caught.value)


@given(st.floats(0, 1, exclude_max=True))
def test_fractions_below_one_pass(value):
    assert parse_fraction(value, "sparsity", below_one=True)(0) == value


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, [0, 1], {"type": "cosine", "init": 1, "half_period": 3}])
def test_a_drop_fraction_may_be_zero_or_one(value):
    first = value[0] if isinstance(value, list) else value["init"] if isinstance(value, dict) else value
    assert parse_fraction(value, "drop_fraction")(0) == first


def test_a_schedule_may_head_for_one():
    schedule = {"type": "polynomial", "init": 0, "final": 1.0, "start": 0, "stop": 9}
    assert parse_fraction(schedule, "sparsity", below_one=True)(9) == 1.0


def test_slopes_and_functions_have_no_written_fraction():
    assert parse_fraction(Linear(init=0.5, slope=-3), "sparsity", below_one=True)(0) == 0.5
    assert parse_fraction(lambda step: 7.0, "sparsity", below_one=True)(0) == 7.0


BELOW, UP_TO = "a fraction in [0, 1)", "a fraction in [0, 1]"


@pytest.mark.parametrize(
    ("value", "below_one", "message"),
    [
        (90, True, f"sparsity: 90 is not allowed; give {BELOW}; did you mean 0.9?"),
        (99.5, True, f"sparsity: 99.5 is not allowed; give {BELOW}; did you mean 0.995?"),
        (1, True, f"sparsity: 1 is not allowed; give {BELOW} (example: sparsity: 0.9)"),
        (-0.1, True, f"sparsity: -0.1 is not allowed; give {BELOW} (example: sparsity: 0.9)"),
        (101, False, f"sparsity: 101 is not allowed; give {UP_TO} (example: sparsity: 0.9)"),
        ([0.5, 1], True, f"sparsity[1]: 1 is not allowed; give {BELOW} (example: sparsity: 0.9)"),
        ([0.5, 30], True, f"sparsity[1]: 30 is not allowed; give {BELOW}; did you mean 0.3?"),
        ({"type": "cosine", "init": 30, "half_period": 9}, False,
         f"sparsity.init: 30 is not allowed; give {UP_TO}; did you mean 0.3?"),
        ({"type": "cosine", "init": 0.3, "half_period": 9, "minimum": -1}, True,
         f"sparsity.minimum: -1 is not allowed; give {UP_TO} (example: minimum: 0.9)"),
        ({"type": "exp", "init": 0.3, "gamma": -0.1, "final": 2}, True,
         f"sparsity.final: 2 is not allowed; give {UP_TO}; did you mean 0.02?"),
        (math.nan, True, "sparsity: nan is not allowed; give a number (example: 0.3)"),
    ],
)  # fmt: skip
def test_fractions_out_of_range(value, below_one, message):
    assert message_of(parse_fraction, value, "sparsity", below_one=below_one) == message


@pytest.mark.parametrize("value", ["auto", "masked", "compact"])
def test_compute_values(value):
    assert check_compute(value) == value


@pytest.mark.parametrize(
    ("value", "shown"),
    [("fast", "'fast'"), (3, "3"), (None, "null")],
)
def test_other_compute_values(value, shown):
    allowed = "auto, masked, compact or {compact: half}"
    expected = f"compute: {shown} is not allowed; give {allowed} (example: compute: auto)"
    assert message_of(check_compute, value) == expected


def test_seeds():
    assert check_seed(0) == 0 and check_seed(None) is None


@pytest.mark.parametrize(("value", "shown"), [(1.5, "1.5"), ("one", "'one'"), (True, "true")])
def test_other_seeds(value, shown):
    assert message_of(check_seed, value) == (
        f"seed: {shown} is not allowed; give a whole number (example: seed: 1)"
    )


def test_static_needs_a_constant():
    require_constant(Constant(0.5))
    assert message_of(require_constant, Cycling([0.5])) == (
        "sparsity: a schedule is not allowed; give a number in [0, 1) for static, or algorithm: gmp "
        "(example: sparsity: 0.9)"
    )


def test_gmp_needs_a_schedule():
    refuse_constant(Cycling([0.5, 0.6]))
    assert message_of(refuse_constant, Constant(0.5)) == (
        "sparsity: the constant 0.5 is not allowed; give a schedule for gmp, or algorithm: static "
        "(example: sparsity: {type: polynomial, init: 0, final: 0.9, start: 0, stop: 5000})"
    )
