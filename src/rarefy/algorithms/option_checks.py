"""Values of an algorithm's options: parsed and checked, each refusal with what is allowed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from rarefy.distributions import GLOBAL
from rarefy.errors import ConfigError, join_path
from rarefy.patterns.constant_fan import ConstantFan
from rarefy.patterns.structures import TOLERANCE, NOfM, Structure
from rarefy.schedule_schema import Json
from rarefy.schedules import Constant, Cycling, Schedule, parse_schedule
from rarefy.storage.choice import HALF
from rarefy.validation import LevelMark, marked_fields, shorten
from rarefy.validation.numerals import read_number

COMPUTE = ("auto", "masked", "compact")
_FORM = {"compact": "half"}


def parse_fraction(value: Any, path: str, *, below_one: bool = False) -> Schedule:
    """A schedule of fractions, every written number of which lies in [0, 1].

    Args:
        value: a number, list, dict, schedule or function.
        path: name of the option.
        below_one: whether numbers that hold as they are must stay below 1.

    Raises:
        ConfigError: no schedule, or a number out of range.

    Example:
        >>> parse_fraction(0.9, "sparsity")(0)
        0.9
    """
    schedule = parse_schedule(value, path=path)
    literal = below_one and isinstance(schedule, Constant | Cycling)
    for name, number in _written_numbers(schedule):
        if not 0 <= number <= 1 or (literal and number == 1):
            raise _out_of_range(join_path(path, name), number, literal)
    return schedule


def highest_number(schedule: Schedule) -> float:
    """The highest fraction that is written in a schedule; 0 for a function, which does not tell.

    Example:
        >>> highest_number(Cycling([0.5, 0.9]))
        0.9
    """
    return max((number for _, number in _written_numbers(schedule)), default=0.0)


def _written_numbers(schedule: Schedule) -> list[tuple[str, float]]:
    """The numbers of a schedule that stand on its own scale, by the path of each."""
    if isinstance(schedule, Cycling):
        return [(f"[{index}]", number) for index, number in enumerate(schedule.values)]
    names = marked_fields(type(schedule), LevelMark)
    return [("" if isinstance(schedule, Constant) else name, getattr(schedule, name)) for name in names]


def _out_of_range(path: str, number: float, literal: bool) -> ConfigError:
    bounds = "a fraction in [0, 1)" if literal else "a fraction in [0, 1]"
    # A percentage, most likely; 1.5 would be an odd one.
    if 2 <= number <= 100:
        return ConfigError(path, f"{number:g}", f"{bounds}; did you mean {number / 100:g}?")
    return ConfigError(path, f"{number:g}", bounds, f"{path.split('.')[-1].split('[')[0]}: 0.9")


def check_reach(sparsity: Schedule, structure: Structure, distribution: str) -> None:
    """Refuses a sparsity or a distribution that contradicts the structure.

    A constant, the largest value of a list and the `final` of a schedule must be 1 − n/m; no other number may be
    above. A schedule may come from below: each group then keeps round((1 − sparsity)·m).

    Raises:
        ConfigError: it does, with the number that fits.

    Example:
        >>> check_reach(Constant(0.9), NOfM(2, 4), "uniform")
        Traceback (most recent call last):
        rarefy.errors.ConfigError: sparsity: 0.9 is not allowed; give 0.5, which is 1 − n/m for {n: 2, m: 4}
    """
    given = f"{distribution} with the pattern {structure}"
    if isinstance(structure, ConstantFan) and distribution == GLOBAL:
        allowed = "uniform, er or erk, as each side of every weight keeps as many"
        raise ConfigError("distribution", given, allowed)
    if not isinstance(structure, NOfM):
        return
    if distribution != "uniform":
        raise ConfigError("distribution", given, "uniform, as every weight keeps n of m")
    last = max(sparsity.values) if isinstance(sparsity, Cycling) else None
    for name, number in _written_numbers(sparsity):
        is_goal = name in ("", "final") or number == last
        if (is_goal and not structure.reached_at(number)) or number > structure.highest_sparsity + TOLERANCE:
            what = f"{'' if is_goal else 'at most '}{structure.highest_sparsity:.6g}, which is 1 − n/m for {structure}"
            raise ConfigError(join_path("sparsity", name), f"{number:g}", what)


def check_seed(value: Any) -> int | None:
    """The `seed` option, checked.

    Raises:
        ConfigError: no whole number.

    Example:
        >>> check_seed(7)
        7
    """
    value = read_number(value, "seed")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ConfigError("seed", shorten(value), "a whole number", "seed: 1")
    return value


def refuse_step_keys(kind: type, options: Mapping[str, Any]) -> None:
    """Refuses `freq` and its like beside `update`, where they belong inside.

    Args:
        kind: the algorithm; a constructor of its own may take such a name.
        options: what it was given.

    Raises:
        ConfigError: one is there, with the `update` that is meant.

    Example:
        >>> refuse_step_keys(type("Mine", (), {}), {"freq": 10})
        Traceback (most recent call last):
        rarefy.errors.ConfigError: freq=10 for Mine is not allowed; give it inside update (example: update={'freq': 10})
    """
    own = {
        name
        for base in kind.__mro__
        if "__init__" in vars(base)
        for name in inspect.signature(base).parameters
    }
    given = {key: options[key] for key in ("freq", "start", "stop", "steps") if key in options.keys() - own}
    if given:
        shown = ", ".join(f"{key}={shorten(value)}" for key, value in given.items())
        raise ConfigError("", f"{shown} for {kind.__name__}", "it inside update", f"update={given}")


def require_constant(schedule: Schedule, method: str = "static") -> None:
    """Refuses a sparsity that changes with the step.

    Raises:
        ConfigError: the schedule is not constant.

    Example:
        >>> require_constant(Constant(0.9))
    """
    if not isinstance(schedule, Constant):
        allowed = f"a number in [0, 1) for {method}, or algorithm: gmp"
        raise ConfigError("sparsity", "a schedule", allowed, "sparsity: 0.9")


def refuse_constant(schedule: Schedule, method: str = "gmp") -> None:
    """Refuses a sparsity that stays the same at every step.

    Raises:
        ConfigError: the schedule is constant.

    Example:
        >>> refuse_constant(Cycling([0.5, 0.9]))
    """
    if isinstance(schedule, Constant):
        allowed = f"a schedule for {method}, or algorithm: static"
        example = "sparsity: {type: polynomial, init: 0, final: 0.9, start: 0, stop: 5000}"
        raise ConfigError("sparsity", f"the constant {schedule.value:g}", allowed, example)


def check_fraction(value: Any, path: str) -> float:
    """A number in [0, 1].

    Raises:
        ConfigError: anything else.

    Example:
        >>> check_fraction(0.5, "dampening")
        0.5
    """
    schedule = parse_fraction(value, path)
    if not isinstance(schedule, Constant):
        raise ConfigError(path, shorten(value), "a number in [0, 1]", f"{path}: 0.5")
    return schedule(0)


def check_factor(value: Any, path: str) -> float:
    """A finite number ≥ 0.

    Raises:
        ConfigError: anything else.

    Example:
        >>> check_factor(2, "gradient_share")
        2.0
    """
    value = read_number(value, path)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ConfigError(path, shorten(value), "a number ≥ 0", f"{path}: 1.0")
    return float(value)


def check_flag(value: Any, path: str) -> bool:
    """A bool, checked.

    Raises:
        ConfigError: anything else.

    Example:
        >>> check_flag(True, "keep_rows")
        True
    """
    if not isinstance(value, bool):
        raise ConfigError(path, shorten(value), "true or false", f"{path}: true")
    return value


def check_compute(value: Any) -> str:
    """The `compute` option, checked: `{compact: half}` becomes `half`.

    Raises:
        ConfigError: an unknown value.

    Example:
        >>> check_compute("masked"), check_compute({"compact": "half"})
        ('masked', 'half')
    """
    if value in COMPUTE:
        return value
    if not isinstance(value, Mapping):
        allowed = "auto, masked, compact or {compact: half}"
        raise ConfigError("compute", shorten(value), allowed, "compute: auto")
    if list(value) != list(_FORM):
        raise ConfigError("compute", shorten(dict(value)), "{compact: half}", "compute: {compact: half}")
    if value != _FORM:
        allowed = "half, or leave it at compute: compact"
        raise ConfigError("compute.compact", shorten(value["compact"]), allowed, "compute: {compact: half}")
    return HALF


def compute_schema() -> Json:
    """The JSON schema of the option."""
    half: Json = {
        "type": "object",
        "properties": {"compact": {"enum": [HALF]}},
        "required": ["compact"],
        "additionalProperties": False,
        "description": "compact, and under autocast multiplied in float16 where the processor has avx512_fp16",
    }
    return {"anyOf": [{"enum": list(COMPUTE)}, half]}
