"""The values of an algorithm's options, checked one by one."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from rarefy.errors import ConfigError, join_path
from rarefy.patterns.structures import TOLERANCE, NOfM, Structure
from rarefy.schedules import Constant, Cycling, Schedule, parse_schedule
from rarefy.validation import shorten
from rarefy.validation.numerals import read_number

_FRACTION_FIELDS = {"value", "init", "final", "minimum"}


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


def _written_numbers(schedule: Schedule) -> list[tuple[str, float]]:
    if not is_dataclass(schedule):
        return []
    if isinstance(schedule, Cycling):
        return [(f"[{index}]", number) for index, number in enumerate(schedule.values)]
    names = [field.name for field in fields(schedule) if field.name in _FRACTION_FIELDS]
    return [("" if name == "value" else name, getattr(schedule, name)) for name in names]


def _out_of_range(path: str, number: float, literal: bool) -> ConfigError:
    bounds = "a fraction in [0, 1)" if literal else "a fraction in [0, 1]"
    if 2 <= number <= 100:
        return ConfigError(path, f"{number:g}", f"{bounds}; did you mean {number / 100:g}?")
    return ConfigError(path, f"{number:g}", bounds, f"{path.split('.')[-1].split('[')[0]}: 0.9")


def check_reach(sparsity: Schedule, structure: Structure, distribution: str) -> None:
    """Refuses a sparsity or a distribution that contradicts n of m.

    A constant, the largest value of a list and the `final` of a schedule must be 1 − n/m; no other number may be
    above. A schedule may come from below: each group then keeps round((1 − sparsity)·m).

    Raises:
        ConfigError: it does, with the number that fits.

    Example:
        >>> check_reach(Constant(0.9), NOfM(2, 4), "uniform")
        Traceback (most recent call last):
        rarefy.errors.ConfigError: sparsity: 0.9 is not allowed; give 0.5, which is 1 − n/m for {n: 2, m: 4}
    """
    if not isinstance(structure, NOfM):
        return
    if distribution != "uniform":
        raise ConfigError(
            "distribution",
            f"{distribution} with the pattern {structure}",
            "uniform, as every weight keeps n of m",
        )
    last = max(sparsity.values) if isinstance(sparsity, Cycling) else None
    for name, number in _written_numbers(sparsity):
        is_goal = name in ("", "final") or number == last
        if (is_goal and not structure.reached_at(number)) or number > structure.highest + TOLERANCE:
            what = f"{'' if is_goal else 'at most '}{structure.highest:.6g}, which is 1 − n/m for {structure}"
            raise ConfigError(join_path("sparsity", name), f"{number:g}", what)


def check_compute(value: Any) -> str:
    """The `compute` option, checked.

    Raises:
        ConfigError: an unknown value.

    Example:
        >>> check_compute("masked")
        'masked'
    """
    if value not in ("auto", "masked", "compact"):
        raise ConfigError("compute", shorten(value), "auto, masked or compact", "compute: auto")
    return value


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


def require_constant(schedule: Schedule) -> None:
    """Refuses a sparsity that changes with the step.

    Raises:
        ConfigError: the schedule is not constant.

    Example:
        >>> require_constant(Constant(0.9))
    """
    if not isinstance(schedule, Constant):
        raise ConfigError(
            "sparsity", "a schedule", "a number in [0, 1) for static, or algorithm: gmp", "sparsity: 0.9"
        )


def refuse_constant(schedule: Schedule) -> None:
    """Refuses a sparsity that stays the same at every step.

    Raises:
        ConfigError: the schedule is constant.

    Example:
        >>> refuse_constant(Cycling([0.5, 0.9]))
    """
    if isinstance(schedule, Constant):
        example = "sparsity: {type: polynomial, init: 0, final: 0.9, start: 0, stop: 5000}"
        raise ConfigError(
            "sparsity",
            f"the constant {schedule.value:g}",
            "a schedule for gmp, or algorithm: static",
            example,
        )
