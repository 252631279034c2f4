"""The steps on which a topology may change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from functools import cache
from typing import Annotated, Any, Protocol

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from rarefy.errors import ConfigError, RarefyError
from rarefy.schedules.values import CONFIG, SCHEDULES, require_order
from rarefy.validation import Step, StepCount, StepMark, build, marked_fields, shorten


class UpdateSchedule(Protocol):
    """Tells which steps are update steps."""

    def __call__(self, step: int) -> bool:
        """Whether `step` is an update step."""
        ...


@dataclass(frozen=True, config=CONFIG)
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
            require_order(self.start, self.stop)
        return self

    def __call__(self, step: int) -> bool:
        """Whether `step` is an update step."""
        is_within = step >= self.start and (self.stop is None or step < self.stop)
        return is_within and (step - self.start) % self.freq == 0


@dataclass(frozen=True, config=CONFIG)
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


@dataclass(frozen=True, config=CONFIG)
class WhenTrue:
    """An update schedule made of any Python function step → bool.

    Example:
        >>> [step for step in range(8) if WhenTrue(lambda step: step in (1, 2, 4))(step)]
        [1, 2, 4]
    """

    function: Callable[..., Any]

    def __call__(self, step: int) -> bool:
        """Whether `step` is an update step.

        Raises:
            RarefyError: the function returned nothing, or a text, which Python would take for False or True.
        """
        answer = self.function(step)
        if answer is None or isinstance(answer, str):
            raise RarefyError(
                f"the update function returned {shorten(answer)} at step {step}; return True or False"
            )
        return bool(answer)


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

    Args:
        schedule: any; a function is called for each step.
        first: the earliest step that counts.
        last: the latest step that counts.

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

    Args:
        schedule: any.
        after: a step; it does not count itself.

    Example:
        >>> next_update(EveryNSteps(freq=100), after=100)
        200
    """
    last = after + (1_000_000 if isinstance(schedule, EveryNSteps | AtSteps) else 10_000)
    return next(iter(update_steps(schedule, after + 1, last)), None)


# Asked for every entry of a file, and resolving the type hints of all schedules is slow.
@cache
def step_keys() -> dict[str, StepMark]:
    """The keys of all schedules that count optimizer steps, each with its mark.

    Example:
        >>> sorted(step_keys())
        ['freq', 'half_period', 'start', 'steps', 'stop']
    """
    kinds = (*SCHEDULES.values(), EveryNSteps, AtSteps)
    return {name: mark for kind in kinds for name, mark in marked_fields(kind, StepMark).items()}
