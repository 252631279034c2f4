"""Interleaved timing: every candidate runs once a round, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping


def medians(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    summary: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Median seconds of one call of each candidate, over `rounds` interleaved rounds after `warmup` more.

    The order is shuffled in every round: whoever follows a candidate with a large working set finds cold caches.
    `summary` takes another number than the median of a candidate's seconds.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(rounds + warmup):
        for name, run in order.sample(list(candidates.items()), len(candidates)):
            start = clock()
            run()
            if round_number >= warmup:
                times[name].append(clock() - start)
    return {name: summary(values) for name, values in times.items()}


def lowest_tenth(seconds: list[float]) -> float:
    """What a tenth of them do not exceed, with fewer than ten the least: those of a machine that nobody disturbs."""
    return sorted(seconds)[len(seconds) // 10]


def let_choose_summary(parser: argparse.ArgumentParser) -> None:
    """Gives the arguments a `summary`."""
    parser.add_argument(
        "--lowest_tenths",
        dest="summary",
        action="store_const",
        const=lowest_tenth,
        default=statistics.median,
        help="in place of medians, for a machine that others disturb",
    )
