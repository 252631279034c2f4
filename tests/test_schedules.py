"""Spec §4 and §5: every schedule, every update schedule, every refusal."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy import schedules
from rarefy.errors import ConfigError, RarefyError
from rarefy.schedules import (
    AtSteps,
    Constant,
    Cosine,
    Cycling,
    EveryNSteps,
    Exp,
    Linear,
    Polynomial,
    Power,
    parse_schedule,
    parse_update_schedule,
    update_steps,
)

steps, fractions = st.integers(0, 10**6), st.floats(0, 1)


@pytest.mark.parametrize(
    ("schedule", "step", "value"),
    [
        ({"type": "constant", "value": 0.9}, 17, 0.9),
        ({"type": "linear", "init": 0.1, "slope": 0.002}, 100, 0.3),
        ({"type": "exp", "init": 0.2, "gamma": -0.01}, 100, 1 - 0.8 * math.exp(-1)),
        ({"type": "exp", "init": 0.2, "gamma": -0.01, "final": 0.6}, 100, 0.6 - 0.4 * math.exp(-1)),
        ({"type": "power", "init": 0.8, "beta": 0.9}, 3, 0.8 * 0.9**3),
        ({"type": "cosine", "init": 0.3, "half_period": 100}, 0, 0.3),
        ({"type": "cosine", "init": 0.3, "half_period": 100}, 50, 0.15),
        ({"type": "cosine", "init": 0.3, "half_period": 100}, 100, 0.0),
        ({"type": "cosine", "init": 0.3, "half_period": 100}, 200, 0.3),
        ({"type": "cosine", "init": 0.3, "half_period": 100, "minimum": 0.1}, 100, 0.1),
        ({"type": "polynomial", "init": 0, "final": 0.8, "start": 10, "stop": 20}, 3, 0.0),
        ({"type": "polynomial", "init": 0, "final": 0.8, "start": 10, "stop": 20}, 15, 0.7),
        ({"type": "polynomial", "init": 0, "final": 0.8, "start": 10, "stop": 20, "power": 1}, 15, 0.4),
        ({"type": "polynomial", "init": 0, "final": 0.8, "start": 10, "stop": 20}, 999, 0.8),
        (0.25, 5, 0.25),
        (0, 5, 0.0),
        (lambda step: step / 10, 5, 0.5),
    ],
)
def test_values(schedule, step, value):
    found = parse_schedule(schedule)(step)
    assert type(found) is float
    assert found == pytest.approx(value, abs=1e-12)


@given(index=st.integers(0, 1000), values=st.lists(fractions, min_size=1, max_size=5))
def test_cycling_depends_on_the_number_of_updates_alone(index, values):
    for step in (0, 7, 10**6):
        assert parse_schedule(values)(step, index) == values[index % len(values)]


def test_a_tuple_and_a_dict_cycle_like_a_list():
    assert parse_schedule((0.1, 0.2)) == parse_schedule({"type": "Cycling", "values": [0.1, 0.2]})


@given(init=fractions, minimum=fractions, period=st.integers(1, 10**4), step=steps)
def test_cosine_stays_between_its_ends_and_repeats(init, minimum, period, step):
    schedule = Cosine(init=init, half_period=period, minimum=minimum)
    assert min(init, minimum) - 1e-9 <= schedule(step) <= max(init, minimum) + 1e-9
    assert schedule(step % (2 * period)) == pytest.approx(schedule(step), abs=1e-6)


@given(
    init=fractions,
    final=fractions,
    start=st.integers(0, 99),
    length=st.integers(1, 99),
    power=st.floats(0.1, 9),
)
def test_polynomial_is_monotonic_and_constant_outside(init, final, start, length, power):
    schedule = Polynomial(init=init, final=final, start=start, stop=start + length, power=power)
    values = [schedule(step) for step in range(start + length + 3)]
    assert values[: start + 1] == pytest.approx([init] * (start + 1))
    assert values[start + length :] == pytest.approx([final] * 3)
    rising = values if final >= init else [-value for value in values]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(rising))


def test_far_steps_do_not_overflow():
    assert Exp(init=0.5, gamma=1.0)(10**6) == -math.inf
    assert Exp(init=1.0, gamma=1.0)(10**6) == 1.0
    assert Exp(init=2.0, gamma=1.0)(10**6) == math.inf
    assert Power(init=0.5, beta=2.0)(10**6) == math.inf
    assert Power(init=0.0, beta=2.0)(10**6) == 0.0
    assert Exp(init=0.2, gamma=-1.0)(10**6) == 1.0


def test_a_ready_schedule_is_taken_as_it_is():
    ready = Linear(init=0.1, slope=0.1)
    assert parse_schedule(ready) is ready


def test_a_function_that_returns_nan_is_refused():
    with pytest.raises(RarefyError, match=r"^the schedule function returned NaN at step 3; return a number$"):
        parse_schedule(lambda step: math.nan)(3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "s: nan is not allowed; give a number (example: 0.3)"),
        (math.inf, "s: inf is not allowed; give a number (example: 0.3)"),
        ([], "s: [] is not allowed; give a list of numbers (example: [0.5, 0.9])"),
        ([0.1, "x"], "s[1]: 'x' is not allowed; give a list of numbers (example: [0.5, 0.9])"),
        (
            {"init": 1},
            "s: {'init': 1} without `type` is not allowed; give type: one of constant, linear, exp, "
            "power, cosine, polynomial, cycling",
        ),
        ({"type": "cosin"}, "s.type: 'cosin' is not allowed; give a known schedule (did you mean cosine?)"),
        (
            {"type": 3},
            "s.type: 3 is not allowed; give a known schedule (one of constant, cosine, cycling, exp, "
            "linear, polynomial, power)",
        ),
        (
            {"type": "cosine", "init": 0.3},
            "s.half_period: a missing value is not allowed; "
            "give a whole number of steps ≥ 1 (example: half_period: 100)",
        ),
        (
            {"type": "cosine", "init": 0.3, "half_period": 0},
            "s.half_period: 0 is not allowed; give a whole number of steps ≥ 1 (example: half_period: 100)",
        ),
        (
            {"type": "cosine", "init": 0.3, "half_periods": 5},
            "s: the key 'half_periods' is not allowed; give a known key (did you mean half_period?)",
        ),
        (
            {"type": "power", "init": 0.3, "beta": 0},
            "s.beta: 0 is not allowed; give a number > 0 (example: beta: 0.99)",
        ),
        (
            {"type": "polynomial", "init": 0, "final": 1, "start": 5, "stop": 5},
            "s: {'init': 0, 'final': 1, 'start': 5, 'stop': 5} is not allowed; "
            "give a stop after start (start is 5, stop is 5)",
        ),
    ],
)
def test_bad_schedules(value, message):
    with pytest.raises(ConfigError) as caught:
        parse_schedule(value, path="s")
    assert str(caught.value) == message


@pytest.mark.parametrize(("value", "shown"), [("high", "'high'"), (True, "true"), (None, "null")])
def test_what_is_no_schedule(value, shown):
    with pytest.raises(ConfigError) as caught:
        parse_schedule(value, path="s")
    assert str(caught.value) == (
        f"s: {shown} is not allowed; give a number, a list of numbers, or a schedule "
        "(example: {type: cosine, init: 0.3, half_period: 1000})"
    )


def test_every_name_of_the_spec_is_there():
    assert set(schedules.SCHEDULES) == {
        "constant",
        "linear",
        "exp",
        "power",
        "cosine",
        "polynomial",
        "cycling",
    }


@given(
    freq=st.integers(1, 50),
    start=st.integers(0, 100),
    length=st.none() | st.integers(1, 200),
    first=st.integers(0, 150),
    span=st.integers(-1, 200),
)
def test_every_n_steps(freq, start, length, first, span):
    stop = None if length is None else start + length
    schedule = parse_update_schedule({"freq": freq, "start": start, "stop": stop})
    expected = [
        k
        for k in range(first, first + span + 1)
        if k >= start and (stop is None or k < stop) and (k - start) % freq == 0
    ]
    assert [k for k in range(first, first + span + 1) if schedule(k)] == expected
    assert list(update_steps(schedule, first, first + span)) == expected


@given(chosen=st.sets(st.integers(0, 60), min_size=1), first=st.integers(0, 60), span=st.integers(-1, 60))
def test_at_steps(chosen, first, span):
    schedule = parse_update_schedule({"steps": sorted(chosen)})
    assert {k for k in range(80) if schedule(k)} == chosen
    expected = sorted(k for k in chosen if first <= k <= first + span)
    assert list(update_steps(schedule, first, first + span)) == expected


def test_absent_means_every_step():
    assert all(parse_update_schedule(None)(step) for step in range(10))


def test_start_without_freq_means_every_step_from_there():
    assert list(update_steps(parse_update_schedule({"start": 3, "stop": 6}), 0, 10)) == [3, 4, 5]


def test_a_function_and_ready_schedules():
    odd = parse_update_schedule(lambda step: step % 2)
    assert [odd(3), odd(4)] == [True, False]
    assert list(update_steps(odd, 0, 5)) == [1, 3, 5]
    for ready in (EveryNSteps(freq=2), AtSteps([1])):
        assert parse_update_schedule(ready) is ready


RISING = "a rising list of step numbers ≥ 0"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"freq": 0}, "update.freq: 0 is not allowed; give a whole number of steps ≥ 1 (example: freq: 100)"),
        (
            {"freq": 2.5},
            "update.freq: 2.5 is not allowed; give a whole number of steps ≥ 1 (example: freq: 100)",
        ),
        (
            {"freq": 1, "start": -1},
            "update.start: -1 is not allowed; give a step number, whole and ≥ 0 (example: start: 1000)",
        ),
        (
            {"freq": 1, "stop": "x"},
            "update.stop: 'x' is not allowed; give a step number after start (example: stop: 7500)",
        ),
        (
            {"freq": 1, "start": 5, "stop": 5},
            "update: {'freq': 1, 'start': 5, 'stop': 5} is not allowed; "
            "give a stop after start (start is 5, stop is 5)",
        ),
        (
            {"freq": 1, "stop": 0},
            "update: {'freq': 1, 'stop': 0} is not allowed; give a stop after start (start is 0, stop is 0)",
        ),
        ({"frq": 1}, "update: the key 'frq' is not allowed; give a known key (did you mean freq?)"),
        ({"steps": [1], "freq": 3}, "update: the key 'freq' is not allowed; give a known key (one of steps)"),
        ({"steps": []}, f"update.steps: [] is not allowed; give {RISING} (example: steps: [0, 100, 200])"),
        (
            {"steps": [-1, 2]},
            f"update.steps[0]: -1 is not allowed; give {RISING} (example: steps: [0, 100, 200])",
        ),
        ({"steps": [2, 1]}, f"update: {{'steps': [2, 1]}} is not allowed; give {RISING}"),
        ({"steps": [2, 2]}, f"update: {{'steps': [2, 2]}} is not allowed; give {RISING}"),
        (
            100,
            "update: 100 is not allowed; give {freq, start, stop} or {steps: [...]} "
            "(example: update: {freq: 100, stop: 7500})",
        ),
    ],
)
def test_bad_update_schedules(value, message):
    with pytest.raises(ConfigError) as caught:
        parse_update_schedule(value)
    assert str(caught.value) == message


def test_direct_construction_is_checked_too():
    for build in (lambda: EveryNSteps(freq=0), lambda: Constant(value=math.nan), lambda: Cycling(values=[])):
        with pytest.raises(ValueError):
            build()
