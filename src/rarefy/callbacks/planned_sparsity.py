"""What a sparsity algorithm is going to ask for over a whole run; needs no model."""

from __future__ import annotations

from collections.abc import Sequence

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.schedules import Schedule, update_steps


def updates_within(algorithm: SparsityAlgorithm, total_steps: int) -> Sequence[int]:
    """The update steps of a run in order; step 0, where it is one, is the first mask.

    Args:
        algorithm: its update schedule counts; need not be applied.
        total_steps: optimizer steps of the run.

    Example:
        >>> from rarefy import RigL
        >>> list(updates_within(RigL(0.9, update={"freq": 4, "stop": 10}), 100))
        [0, 4, 8]
    """
    steps = update_steps(algorithm.update_schedule, 0, total_steps)
    return steps if isinstance(steps, Sequence) else list(steps)


def value_at(schedule: Schedule, step: int, update: int) -> float:
    """What a schedule of fractions gives at an update, clamped to [0, 1]."""
    return min(max(schedule(step, update), 0.0), 1.0)


def final_target(algorithm: SparsityAlgorithm, total_steps: int) -> float:
    """The target sparsity after the last update of the run; 0 without any.

    Args:
        algorithm: need not be applied.
        total_steps: optimizer steps of the run.

    Example:
        >>> from rarefy import GMP
        >>> cubic = {"type": "polynomial", "init": 0.0, "final": 0.75, "start": 0, "stop": 50}
        >>> final_target(GMP(cubic, update={"freq": 10}), 100)
        0.75
    """
    steps = updates_within(algorithm, total_steps)
    return algorithm.target_at(steps[-1], len(steps) - 1) if steps else 0.0
