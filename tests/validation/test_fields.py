"""From pydantic's findings to one line."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from rarefy.errors import ConfigError
from rarefy.validation import Number, Step, StepCount, build, dotted, shorten


@dataclass(frozen=True)
class Example:
    rate: Number
    freq: StepCount = 1
    start: Step = 0
    values: Annotated[list[Number], Field(description="a list of numbers")] = field(default_factory=list)
    _derived: int = field(init=False, default=0)


def refusal(**options):
    with pytest.raises(ConfigError) as caught:
        build(Example, options, path="here")
    return str(caught.value)


def test_build_takes_whole_and_broken_numbers():
    assert build(Example, {"rate": 0}).rate == 0
    assert build(Example, {"rate": 0.5, "freq": 3}).freq == 3


@pytest.mark.parametrize("value", ["half", True, None, [0.5]])
def test_numbers_are_strict(value):
    assert (
        refusal(rate=value)
        == f"here.rate: {shorten(value)} is not allowed; give a number (example: rate: 0.3)"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value):
    assert refusal(rate=value).startswith(f"here.rate: {value} is not allowed; give a number")


@pytest.mark.parametrize("value", [0, -1, 2.5, "three", True])
def test_step_counts_are_whole_and_positive(value):
    expected = (
        f"here.freq: {shorten(value)} is not allowed; give a whole number of steps ≥ 1 (example: freq: 100)"
    )
    assert refusal(rate=0.1, freq=value) == expected


def test_steps_are_not_negative():
    expected = "here.start: -1 is not allowed; give a step number, whole and ≥ 0 (example: start: 1000)"
    assert refusal(rate=0.1, start=-1) == expected


def test_a_missing_field_is_named():
    assert refusal() == "here.rate: a missing value is not allowed; give a number (example: rate: 0.3)"


def test_an_unknown_key_gets_a_suggestion():
    message = refusal(rate=0.1, frq=2)
    assert message == "here: the key 'frq' is not allowed; give a known key (did you mean freq?)"


def test_a_derived_field_is_no_key():
    message = refusal(rate=0.1, _derived=2)
    assert (
        message
        == "here: the key '_derived' is not allowed; give a known key (one of freq, rate, start, values)"
    )


def test_an_item_of_a_list_is_named_by_its_index():
    assert refusal(rate=0.1, values=[0.1, "x"]).startswith("here.values[1]: 'x' is not allowed")


def test_dotted():
    assert dotted(()) == ""
    assert dotted(("a", 0, "b", 1)) == "a[0].b[1]"


def test_shorten_keeps_one_line():
    assert shorten("a\nb") == "'a\\nb'"
    assert "\n" not in shorten({"key": ["x" * 30] * 5})
    assert len(shorten("x" * 500)) == 60
    assert shorten("x" * 58) == repr("x" * 58)


@pytest.mark.parametrize(("given", "expected"), [(1000.0, 1000), (1e3, 1000), (7, 7)])
def test_whole_floats_are_whole_numbers(given, expected):
    built = build(Example, {"rate": 0.5, "freq": given})
    assert built.freq == expected and type(built.freq) is int


@pytest.mark.parametrize("given", [0.5, math.nan, math.inf, True])
def test_other_values_are_none(given):
    assert refusal(rate=0.5, freq=given).startswith("here.freq: ")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        ([None, 1], "[null, 1]"),
        ({"a": False}, "{'a': false}"),
        ("None", "'None'"),
    ],
)
def test_values_are_repeated_as_yaml_writes_them(value, shown):
    assert shorten(value) == shown
