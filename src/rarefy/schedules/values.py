"""Numbers that change with the step: sparsities, drop fractions.

A schedule is a pure function of the step k and of the number of updates before it; a plain Python float comes out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, Protocol

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from rarefy.errors import ConfigError, RarefyError, did_you_mean, join_path
from rarefy.validation import Level, Number, Step, StepCount, build, shorten
from rarefy.validation.numerals import read_number, share_hint

# A validator is built with the first schedule of a class; few runs use more than two of them.
CONFIG = ConfigDict(extra="forbid", defer_build=True)


def require_order(start: int, stop: int) -> None:
    """Refuses a stop that does not come after its start, for validators, which tell the path.

    Raises:
        ValueError: it does not.
    """
    if stop <= start:
        raise ValueError(f"a stop after start (start is {start}, stop is {stop})")


class Schedule(Protocol):
    """A step-aware number."""

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`, before which `update` update steps have passed."""
        ...


@dataclass(frozen=True, config=CONFIG)
class Constant:
    """The same value at every step.

    Example:
        >>> Constant(0.9)(1000)
        0.9
    """

    value: Level

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`."""
        return float(self.value)


@dataclass(frozen=True, config=CONFIG)
class Linear:
    """init + slope·step.

    Example:
        >>> Linear(init=0.5, slope=0.25)(1)
        0.75
    """

    init: Level
    slope: Number

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`."""
        return self.init + self.slope * step


@dataclass(frozen=True, config=CONFIG)
class Exp:
    """final − (final − init)·e^(gamma·step); a negative gamma approaches `final`.

    Example:
        >>> round(Exp(init=0.2, gamma=-1.0)(0), 6)
        0.2
    """

    init: Level
    gamma: Number
    final: Level = 1.0

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`."""
        # math.exp raises where floats would be infinite; a constant stays one, as 0·∞ is no number.
        try:
            return self.final - (self.final - self.init) * math.exp(self.gamma * step)
        except OverflowError:
            return self.final if self.init == self.final else math.copysign(math.inf, self.init - self.final)


@dataclass(frozen=True, config=CONFIG)
class Power:
    """init·beta^step.

    Example:
        >>> Power(init=0.5, beta=0.5)(1)
        0.25
    """

    init: Level
    beta: Annotated[Number, Field(gt=0, description="a number > 0", examples=[0.99])]

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`."""
        try:
            # As a float: of a whole number Python would compute every digit of the power.
            return self.init * float(self.beta) ** step
        except OverflowError:
            return math.copysign(math.inf, self.init) if self.init else 0.0


@dataclass(frozen=True, config=CONFIG)
class Cosine:
    """(init + minimum)/2 + (init − minimum)/2·cos(π·step/half_period); it rises again after half_period.

    The usual drop fraction of RigL (Evci et al., arXiv:1911.11134).

    Example:
        >>> round(Cosine(init=0.3, half_period=1000)(500), 6)
        0.15
    """

    init: Level
    half_period: StepCount
    minimum: Level = 0.0

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`."""
        middle = (self.init + self.minimum) / 2
        amplitude = (self.init - self.minimum) / 2
        return middle + amplitude * math.cos(math.pi * step / self.half_period)


@dataclass(frozen=True, config=CONFIG)
class Polynomial:
    """final + (init − final)·(1 − (step − start)/(stop − start))^power, constant outside [start, stop].

    With power 3 this is the cubic schedule of gradual magnitude pruning (Zhu & Gupta, arXiv:1710.01878).

    Example:
        >>> round(Polynomial(init=0.0, final=0.8, start=0, stop=100)(50), 6)
        0.7
    """

    init: Level
    final: Level
    start: Step
    stop: Step
    power: Annotated[Number, Field(gt=0, description="a number > 0", examples=[3])] = 3.0

    @model_validator(mode="after")
    def _ordered(self) -> Polynomial:
        require_order(self.start, self.stop)
        return self

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`."""
        progress = min(max((step - self.start) / (self.stop - self.start), 0.0), 1.0)
        return self.final + (self.init - self.final) * (1.0 - progress) ** self.power


@dataclass(frozen=True, config=CONFIG)
class Cycling:
    """The next of `values` on every update step, round and round.

    Example:
        >>> [Cycling([0.1, 0.3, 0.6])(step=0, update=u) for u in range(4)]
        [0.1, 0.3, 0.6, 0.1]
    """

    values: Annotated[
        list[Level], Field(min_length=1, description="a list of numbers", examples=[[0.5, 0.9]])
    ]

    def __call__(self, step: int, update: int = 0) -> float:
        """The value of the `update`-th update."""
        return float(self.values[update % len(self.values)])


@dataclass(frozen=True, config=CONFIG)
class FromFunction:
    """A schedule made of any Python function step → float."""

    function: Callable[..., Any]

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`.

        Raises:
            RarefyError: the function returned NaN, or no number.
        """
        answer = self.function(step)
        try:
            value = float(answer)
        except (TypeError, ValueError):
            said = f"the schedule function returned {shorten(answer)} at step {step}; return a number"
            raise RarefyError(said) from None
        # NaN compares false with every bound, and would pass all later checks.
        if math.isnan(value):
            raise RarefyError(f"the schedule function returned NaN at step {step}; return a number")
        return value


class Clamped:
    """Says once of each schedule that it leaves [0, 1]; where the length of the run is known it is said before.

    Args:
        owner: what messages call the algorithm.

    Attributes:
        told: the schedules of which it was said.
    """

    def __init__(self, owner: str) -> None:
        self.told: list[Schedule] = []
        self._owner = owner

    def look_at(self, schedule: Schedule, value: float, step: int) -> None:
        """Called with each value that is about to be clamped."""
        # Formulas that end at a bound may be beyond it in the last digit.
        if -1e-9 <= value <= 1.0 + 1e-9 or any(schedule is one for one in self.told):
            return
        self.told.append(schedule)
        hint = f" (did you mean {value / 100:.4g}?)" if 2.0 <= value <= 100.0 else ""
        said = (
            f"{self._owner}: a schedule gives {value:.4g}{hint} at step {step}, outside [0, 1]; it is clamped"
        )
        warnings.warn(said, stacklevel=2)


_KINDS = (Constant, Linear, Exp, Power, Cosine, Polynomial, Cycling, FromFunction)
SCHEDULES: Mapping[str, type] = {
    "constant": Constant,
    "linear": Linear,
    "exp": Exp,
    "power": Power,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "cycling": Cycling,
}


def parse_schedule(value: Any, *, path: str = "") -> Schedule:
    """A schedule from what a user may write for one.

    Args:
        value: a number, a list (cycling), a dict with `type`, a schedule, or a function step → float.
        path: where the value stands, for messages.

    Raises:
        ConfigError: anything else.

    Example:
        >>> parse_schedule({"type": "cosine", "init": 0.3, "half_period": 1000})
        Cosine(init=0.3, half_period=1000, minimum=0.0)
    """
    if isinstance(value, str):
        value = read_number(value, path)
    # True is a number to Python.
    if isinstance(value, Real) and not isinstance(value, bool):
        return _unnamed(Constant, "value", value, path)
    if isinstance(value, Mapping):
        return _schedule_from_mapping(value, path)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _unnamed(Cycling, "values", list(value), path)
    # Schedules are callable too, so they come before functions.
    if isinstance(value, _KINDS):
        return value
    if callable(value):
        return FromFunction(value)
    raise ConfigError(
        path,
        shorten(value),
        f"a number, a list of numbers, or a schedule{share_hint(value)}",
        "{type: cosine, init: 0.3, half_period: 1000}",
    )


def _unnamed(kind: type, field_name: str, value: Any, path: str) -> Schedule:
    """A schedule written without its field's name, which messages must leave out too."""
    try:
        return build(kind, {field_name: value})
    except ConfigError as error:
        inner = error.path.removeprefix(field_name)
        example = error.fix.removeprefix(f"{field_name}: ")
        raise ConfigError(join_path(path, inner), error.given, error.allowed, example) from None


def _schedule_from_mapping(value: Mapping[str, Any], path: str) -> Schedule:
    options = dict(value)
    kind = options.pop("type", None)
    if kind is None:
        raise ConfigError(path, f"{shorten(value)} without `type`", f"type: one of {', '.join(SCHEDULES)}")
    if not isinstance(kind, str) or kind.lower() not in SCHEDULES:
        raise ConfigError(
            join_path(path, "type"), shorten(kind), f"a known schedule ({did_you_mean(str(kind), SCHEDULES)})"
        )
    return build(SCHEDULES[kind.lower()], options, path=path)
