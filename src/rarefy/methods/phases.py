"""Phases of training that are sparse and dense in turn."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from rarefy.errors import ConfigError
from rarefy.schedules import AtSteps, EveryNSteps, parse_update_schedule, update_steps


@dataclass(frozen=True)
class Alternating:
    """The sparsity of the phase that a step lies in.

    By the step, not by the number of updates: a weight that was frozen when a phase began joins the others in the next.

    Args:
        compressed: the sparsity of the first phase, the third and so on; 0 in those between and before the first.
        steps: at which phases begin, rising.
    """

    compressed: float
    steps: tuple[int, ...]

    def __call__(self, step: int) -> float:
        """The sparsity at a step."""
        # How many phases have begun: the first, the third and so on are compressed.
        return self.compressed if bisect_right(self.steps, step) % 2 else 0.0


def phases(update: Any) -> list[int]:
    """The steps at which phases begin, an odd number of them, so that the last is compressed.

    Raises:
        ConfigError: there is no last one.

    Example:
        >>> phases({"freq": 10, "stop": 40})
        [0, 10, 20]
    """
    schedule = parse_update_schedule(update)
    if isinstance(schedule, AtSteps):
        steps = list(schedule.steps)
    elif isinstance(schedule, EveryNSteps) and schedule.stop is not None:
        steps = list(update_steps(schedule, 0, schedule.stop))
    else:
        raise ConfigError(
            "update",
            "no end of the phases for ac_dc",
            "{freq, start, stop} or {steps: [...]}; what follows the last of them stays sparse",
            'update: {freq: 500, start: 1000, stop: "75%"}',
        )
    return steps if len(steps) % 2 else steps[:-1]
