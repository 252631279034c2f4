"""When an algorithm acts: the values of its schedules at its steps."""

from __future__ import annotations

from abc import abstractmethod

from rarefy.patterns import Pattern
from rarefy.schedules import Schedule, UpdateSchedule, next_update


class Timing:
    """What schedules say, for a class that has a step and a number of updates."""

    updates: int
    sparsity: Schedule
    pattern: Pattern
    update_schedule: UpdateSchedule

    @property
    @abstractmethod
    def step(self) -> int:
        """How many optimizer steps the sparse weights have taken."""

    def next_update_step(self, after: int) -> int | None:
        """The first update step later than `after`; None if there is none for long."""
        return next_update(self.update_schedule, after)

    def current(self, schedule: Schedule, ahead: int = 0) -> float:
        """The value of a schedule at this step, or `ahead` steps later, clamped to [0, 1]."""
        return min(max(schedule(self.step + ahead, self.updates), 0.0), 1.0)

    def target_at(self, step: int, updates: int) -> float:
        """The sparsity that the schedule asks for at a step, clamped to what the pattern allows."""
        return min(max(self.sparsity(step, updates), 0.0), self.pattern.structure.highest_sparsity)
