"""What methods need under which no connection may come back."""

from __future__ import annotations

from rarefy.errors import ConfigError
from rarefy.patterns.structures import Structure
from rarefy.patterns.tiles import MOST_TRIED
from rarefy.patterns.transposable import Transposable
from rarefy.schedules import Cycling, FromFunction, Schedule

# As a power of two: no run has so many steps.
_LONGEST_RUN = 40


def refuse_falling(schedule: Schedule, method: str, why: str) -> None:
    """Refuses a schedule that falls, as far as it can be seen before the run: not that of a function.

    Args:
        schedule: of the sparsity.
        method: that cannot have it fall.
        why: it cannot.

    Raises:
        ConfigError: a list that is not in order, or a formula that begins to fall.

    Example:
        >>> refuse_falling(Cycling([0.5, 0.9]), "powerprop", "zeros never learn")
    """
    if isinstance(schedule, FromFunction):
        return
    if isinstance(schedule, Cycling):
        falls = list(schedule.values) != sorted(schedule.values)
    else:
        # Of a formula the first change says which way it goes; a cosine that turns round is told when it does.
        first = schedule(0)
        later = (schedule(2**power) for power in range(_LONGEST_RUN))
        falls = next((value for value in later if value != first), first) < first
    if falls:
        allowed = f"one that rises for {method}: {why}"
        example = "sparsity: {type: polynomial, init: 0, final: 0.9, start: 0, stop: 5000}"
        raise ConfigError("sparsity", "a schedule that falls", allowed, example)


def refuse_approximation(structure: Structure, method: str, why: str) -> None:
    """Refuses a pattern whose masks are approximated, so that one may have connections that the last did not.

    Args:
        structure: of the masks.
        method: under which they may not.
        why: they may not.

    Raises:
        ConfigError: it is one.

    Example:
        >>> refuse_approximation(Transposable(2, 4), "powerprop", "zeros never learn")
    """
    if isinstance(structure, Transposable) and structure.m > MOST_TRIED:
        allowed = (
            f"an m of at most {MOST_TRIED} for {method}, as masks of larger tiles are approximated: {why}"
        )
        raise ConfigError("pattern", structure, allowed, "pattern: {n: 2, m: 4, transposable: true}")
