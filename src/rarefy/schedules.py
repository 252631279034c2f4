"""Numbers that change with the step, and the steps on which a topology may change.

A schedule is a pure function of the step k and of the number of updates before it; a plain Python float comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from numbers import Real
from typing import Annotated, Any, Protocol

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from rarefy.errors import ConfigError, RarefyError, did_you_mean, join_path
from rarefy.validation import Level, Number, Step, StepCount, StepMark, build, shorten
from rarefy.validation.numerals import read_number, share_hint

_CONFIG = ConfigDict(extra="forbid")


class Schedule(Protocol):
    """A step-aware number."""

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`, before which `update` update steps have passed."""
        ...


@dataclass(frozen=True, config=_CONFIG)
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


@dataclass(frozen=True, config=_CONFIG)
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


@dataclass(frozen=True, config=_CONFIG)
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


@dataclass(frozen=True, config=_CONFIG)
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


@dataclass(frozen=True, config=_CONFIG)
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


@dataclass(frozen=True, config=_CONFIG)
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
        _require_order(self.start, self.stop)
        return self

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`."""
        progress = min(max((step - self.start) / (self.stop - self.start), 0.0), 1.0)
        return self.final + (self.init - self.final) * (1.0 - progress) ** self.power


@dataclass(frozen=True, config=_CONFIG)
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


@dataclass(frozen=True, config=_CONFIG)
class FromFunction:
    """A schedule made of any Python function step → float."""

    function: Callable[..., Any]

    def __call__(self, step: int, update: int = 0) -> float:
        """The value at `step`.

        Raises:
            RarefyError: the function returned NaN.
        """
        # NaN compares false with every bound, and would pass all later checks.
        value = float(self.function(step))
        if math.isnan(value):
            raise RarefyError(f"the schedule function returned NaN at step {step}; return a number")
        return value


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


def _require_order(start: int, stop: int) -> None:
    if stop <= start:
        raise ValueError(f"a stop after start (start is {start}, stop is {stop})")


class UpdateSchedule(Protocol):
    """Tells which steps are update steps."""

    def __call__(self, step: int) -> bool:
        """Whether `step` is an update step."""
        ...


@dataclass(frozen=True, config=_CONFIG)
class EveryNSteps:
    """Fires when (step − start) % freq == 0 and start ≤ step < stop.

    Example:
        >>> [step for step in range(12) if EveryNSteps(freq=3, start=2, stop=9)(step)]
        [2, 5, 8]
    """

    freq: StepCount = 1
    start: Step = 0
    stop: Annotated[
        int | None,
        StepMark(0),
        Field(strict=True, description="a step number after start", examples=[7500]),
    ] = None

    @model_validator(mode="after")
    def _ordered(self) -> EveryNSteps:
        if self.stop is not None:
            _require_order(self.start, self.stop)
        return self

    def __call__(self, step: int) -> bool:
        """Whether `step` is an update step."""
        is_within = step >= self.start and (self.stop is None or step < self.stop)
        return is_within and (step - self.start) % self.freq == 0


@dataclass(frozen=True, config=_CONFIG)
class AtSteps:
    """Fires on exactly these steps.

    Example:
        >>> [step for step in range(10) if AtSteps([0, 4, 9])(step)]
        [0, 4, 9]
    """

    steps: Annotated[
        list[Step],
        Field(min_length=1, description="a rising list of step numbers ≥ 0", examples=[[0, 100, 200]]),
    ]
    _members: frozenset[int] = field(init=False, repr=False, compare=False, default=frozenset())

    @model_validator(mode="after")
    def _rising(self) -> AtSteps:
        if any(later <= earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError("a rising list of step numbers ≥ 0")
        # A set, because it is asked at every step, and the list may be long; the class is frozen to all but this.
        object.__setattr__(self, "_members", frozenset(self.steps))
        return self

    def __call__(self, step: int) -> bool:
        """Whether `step` is an update step."""
        return step in self._members


@dataclass(frozen=True, config=_CONFIG)
class WhenTrue:
    """An update schedule made of any Python function step → bool."""

    function: Callable[..., Any]

    def __call__(self, step: int) -> bool:
        """Whether `step` is an update step."""
        return bool(self.function(step))


def parse_update_schedule(value: Any, *, path: str = "update") -> UpdateSchedule:
    """An update schedule from what a user may write for one.

    Args:
        value: None (every step), `{freq, start, stop}`, `{steps: [...]}`, or a function step → bool.
        path: where the value stands, for messages.

    Raises:
        ConfigError: anything else.

    Example:
        >>> parse_update_schedule({"freq": 100, "stop": 7500})
        EveryNSteps(freq=100, start=0, stop=7500)
    """
    if value is None:
        return EveryNSteps()
    if isinstance(value, Mapping):
        kind = AtSteps if "steps" in value else EveryNSteps
        return build(kind, value, path=path)
    if callable(value):
        return value if isinstance(value, EveryNSteps | AtSteps) else WhenTrue(value)
    raise ConfigError(
        path, shorten(value), "{freq, start, stop} or {steps: [...]}", "update: {freq: 100, stop: 7500}"
    )


def update_steps(schedule: UpdateSchedule, first: int, last: int) -> Iterable[int]:
    """The update steps in [first, last], in order.

    Example:
        >>> list(update_steps(EveryNSteps(freq=100, stop=300), first=1, last=1000))
        [100, 200]
    """
    if isinstance(schedule, AtSteps):
        return [step for step in schedule.steps if first <= step <= last]
    if isinstance(schedule, EveryNSteps):
        # Python's remainder is never negative, so this is the first update step from `first` on.
        begin = max(schedule.start, first + (schedule.start - first) % schedule.freq)
        end = last + 1 if schedule.stop is None else min(schedule.stop, last + 1)
        return range(begin, end, schedule.freq)
    return (step for step in range(first, last + 1) if schedule(step))


def next_update(schedule: UpdateSchedule, after: int) -> int | None:
    """The first update step later than `after`; None if there is none within a million steps.

    A function is asked about the next ten thousand steps only, as it has to be called for each of them.

    Example:
        >>> next_update(EveryNSteps(freq=100), after=100)
        200
    """
    last = after + (1_000_000 if isinstance(schedule, EveryNSteps | AtSteps) else 10_000)
    return next(iter(update_steps(schedule, after + 1, last)), None)
