"""The schedules of a run as charts, before any training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.callbacks.planned_sparsity import updates_within, value_at
from rarefy.report.chart import Line, LineChart
from rarefy.report.scale import readable
from rarefy.report.series import MOST_POINTS, Series
from rarefy.schedules import Constant, Cycling, Schedule

MOST_UPDATES = 200_000


def schedule_charts(
    algorithm: SparsityAlgorithm, total_steps: int, *, key: str, title: str
) -> list[LineChart]:
    """The sparsity of an algorithm over a run, and its drop fraction where it has one.

    Args:
        algorithm: need not be applied to a model.
        total_steps: optimizer steps of the run, ≥ 1.
        key: of the first chart.
        title: of the first chart.

    Returns:
        One chart, or two.

    Example:
        >>> from rarefy import RigL
        >>> rigl = RigL(0.9, update={"freq": 100, "stop": 750})
        >>> [chart.title for chart in schedule_charts(rigl, 1000, key="s", title="rigl")]
        ['rigl: sparsity', 'rigl: drop fraction']
    """
    updates = updates_within(algorithm, total_steps)
    told = _told(updates, total_steps, algorithm.dynamic)
    target = target_line(algorithm, total_steps)
    asked = _asked(algorithm.sparsity, total_steps)
    lines = [target, *([Line("schedule", asked, dashed=True)] if asked is not None else [])]
    # Step 0 sets the first mask and updates nothing.
    marks = [step for step in updates if step > 0]
    end = f"{told} · {readable(target.series.last, 'percent')} at the end"
    charts = [LineChart(key, f"{title}: sparsity", lines, "percent", marks, "update steps", total_steps, end)]
    drop: Schedule | None = getattr(algorithm, "drop_fraction", None)
    if callable(drop) and marks:
        charts.append(_drop_chart(drop, updates, total_steps, f"{key}-drop", f"{title}: drop fraction"))
    return charts


def target_line(algorithm: SparsityAlgorithm, total_steps: int) -> Line:
    """The target sparsity that is in force at every step; 0 before the first mask."""
    updates = updates_within(algorithm, total_steps)
    series = _at_updates(algorithm.sparsity, updates)
    steps = series.steps.tolist()
    values = series.mean.tolist()
    if not updates or updates[0] > 0:
        steps = [0.0, *steps]
        values = [0.0, *values]
    if steps[-1] < total_steps:
        steps = [*steps, float(total_steps)]
        values = [*values, values[-1]]
    return Line("target", Series.of(steps, values), "steps")


def _drop_chart(drop: Schedule, updates: Sequence[int], total_steps: int, key: str, title: str) -> LineChart:
    """Drop fractions at the updates, of which step 0 is none: it sets the first mask."""
    at_updates = _at_updates(drop, updates)
    later = at_updates.steps > 0
    series = Series.of(at_updates.steps[later], at_updates.mean[later])
    asked = _asked(drop, total_steps)
    lines = [
        *([Line("schedule", asked, dashed=True)] if asked is not None else []),
        Line("drop fraction of an update", series, "points"),
    ]
    first = readable(float(series.mean[0]), "percent")
    last = readable(series.last, "percent")
    told = f"{first} of the active connections at every update" if first == last else f"{first} → {last}"
    marks = [step for step in updates if step > 0]
    return LineChart(key, title, lines, "percent", marks, "update steps", total_steps, told)


def _at_updates(schedule: Schedule, updates: Sequence[int]) -> Series:
    """The value that every update asks for, thinned to a picture."""
    # A function is called for each; a run of millions of updates would keep the user waiting for one picture.
    stride = max(1, len(updates) // MOST_UPDATES)
    chosen = range(0, len(updates), stride)
    values = [value_at(schedule, updates[index], index) for index in chosen]
    return Series.of([updates[index] for index in chosen], values).thinned()


def _asked(schedule: Schedule, total_steps: int) -> Series | None:
    """The schedule between updates too; None where it says nothing more than the updates do."""
    if isinstance(schedule, Constant | Cycling):
        return None
    steps = np.unique(np.linspace(0, total_steps, MOST_POINTS).round().astype(int)).tolist()
    return Series.of(steps, [value_at(schedule, step, 0) for step in steps])


def _told(updates: Sequence[int], total_steps: int, dynamic: bool) -> str:
    skipped = 1 if updates and updates[0] == 0 else 0
    count = len(updates) - skipped
    if not dynamic or not count:
        return "no update after step 0" if updates else "no update within the run"
    word = "update" if count == 1 else "updates"
    return f"{count:,} {word}, from step {updates[skipped]:,} to step {updates[-1]:,} of {total_steps:,}"
