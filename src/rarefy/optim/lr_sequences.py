"""Learning-rate schedules that change at given steps."""

from __future__ import annotations

import bisect
from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, model_validator

from rarefy.errors import ConfigError
from rarefy.optim.lr_schedules import LRSchedule, Rate
from rarefy.validation import Step


class _Milestones(LRSchedule):
    """A schedule that changes at given steps."""

    milestones: Annotated[list[Step], Field(description="a rising list of steps", examples=[[100, 200]])]

    @model_validator(mode="after")
    def _check_rising(self) -> _Milestones:
        if any(
            later <= earlier for earlier, later in zip(self.milestones, self.milestones[1:], strict=False)
        ):
            raise ConfigError(
                "milestones", self.milestones, "a rising list of steps", "milestones: [100, 200]"
            )
        return self

    def stage(self, step: int) -> int:
        """How many milestones are reached at `step`."""
        return bisect.bisect_right(self.milestones, step)


class MultiStepLR(_Milestones):
    """LR(t) = initial · gamma^(number of milestones ≤ t).

    Args:
        initial_learning_rate: the rate of the first step.
        gamma: the factor of each change.
        milestones: the steps of the changes, rising.

    Example:
        >>> MultiStepLR(initial_learning_rate=1.0, gamma=0.5, milestones=[2, 4]).rate(4)
        0.25
    """

    initial_learning_rate: Rate
    gamma: Rate

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        return self.initial_learning_rate * self.gamma ** self.stage(step)


class PiecewiseConstantLR(_Milestones):
    """LR(t) = learning_rates[number of milestones ≤ t].

    Args:
        learning_rates: one more than there are milestones.
        milestones: the steps of the changes, rising.

    Example:
        >>> [PiecewiseConstantLR(learning_rates=[1.0, 0.1], milestones=[2]).rate(step) for step in (1, 2)]
        [1.0, 0.1]
    """

    learning_rates: Annotated[
        list[Rate], Field(description="a list of learning rates", examples=[[0.1, 0.01]])
    ]

    @model_validator(mode="after")
    def _check_lengths(self) -> PiecewiseConstantLR:
        if len(self.learning_rates) != len(self.milestones) + 1:
            count = f"{len(self.learning_rates)} for {len(self.milestones)} milestones"
            raise ConfigError("learning_rates", count, "one more than there are milestones")
        return self

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        return self.learning_rates[self.stage(step)]


class SequentialLR(_Milestones):
    """One schedule after the other; each counts its own steps from 0.

    Args:
        schedulers: the schedules in order.
        milestones: the steps at which the second, third, … begins; the cumulative `total_iters` when absent.

    Example:
        >>> from rarefy.optim.lr_schedules import ConstantLR, LinearLR
        >>> warmup = LinearLR(initial_learning_rate=0.0, end_learning_rate=1.0, total_iters=10)
        >>> both = SequentialLR(schedulers=[warmup, ConstantLR(learning_rate=1.0)])
        >>> both.rate(5), both.rate(50), both.milestones
        (0.5, 1.0, [10])
    """

    milestones: list[Step] = Field(
        default_factory=list, description="a rising list of steps", examples=[[100, 200]]
    )
    # As any: pydantic writes only the fields of the declared class, here the base.
    schedulers: Annotated[
        list[SerializeAsAny[LRSchedule]], Field(min_length=1, description="a list of schedules")
    ]

    @model_validator(mode="before")
    @classmethod
    def _fill_milestones(cls, given: Any) -> Any:
        schedules = given.get("schedulers") if isinstance(given, dict) else None
        if not isinstance(schedules, list) or given.get("milestones") is not None:
            return given
        # The last one has no successor to wait for its end.
        lengths = [getattr(one, "total_iters", None) for one in schedules[:-1]]
        if None in lengths:
            where = f"schedulers[{lengths.index(None)}]"
            raise ConfigError(
                where, "a schedule without total_iters", "total_iters, or milestones for all of them"
            )
        return {**given, "milestones": list(accumulate(lengths))}

    @model_validator(mode="after")
    def _check_count(self) -> SequentialLR:
        if len(self.schedulers) != len(self.milestones) + 1:
            count = f"{len(self.milestones)} for {len(self.schedulers)} schedules"
            raise ConfigError("milestones", count, "one less than there are schedules")
        return self

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        stage = self.stage(step)
        begin = self.milestones[stage - 1] if stage else 0
        return self.schedulers[stage].rate(step - begin)
