"""Interleaved timing: every candidate runs once a round, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping


def medians(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of one call of each candidate, over `rounds` interleaved rounds after `warmup` more.

    The order is shuffled in every round: whoever follows a candidate with a large working set finds cold caches.
    """
    times = rounds_of(candidates, rounds, warmup, clock)
    return {name: statistics.median(values) for name, values in times.items()}


def lowest_tenths(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The same, but the seconds that a tenth of the calls do not exceed: those of a machine that nobody disturbs.

    With fewer than ten rounds these are the least.
    """
    times = rounds_of(candidates, rounds, warmup, clock)
    return {name: sorted(values)[len(values) // 10] for name, values in times.items()}


def rounds_of(
    candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """The seconds of every call after the first `warmup` rounds."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(rounds + warmup):
        for name, run in order.sample(list(candidates.items()), len(candidates)):
            start = clock()
            run()
            if round_number >= warmup:
                times[name].append(clock() - start)
    return times
