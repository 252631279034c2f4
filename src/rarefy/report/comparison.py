"""Several runs beside each other: loss, sparsity, speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rarefy.report.chart import Line, LineChart, Section, Table, Unit
from rarefy.report.run_data import Run
from rarefy.report.scale import readable
from rarefy.report.sections import last_step, overall_sparsity

RATES = ("tokens_per_second", "samples_per_second")
COLUMNS = ("run", "step", "loss", "validation loss", "sparsity", "speed", "against the first")
CHARTS: tuple[tuple[str, str, str, Unit], ...] = (
    ("loss", "Training loss", "loss", "number"),
    ("eval-loss", "Validation loss", "eval/loss", "number"),
    ("sparsity", "Actual sparsity", "sparsity/actual", "percent"),
    *((rate, rate.replace("_", " ").capitalize(), rate, "number") for rate in RATES),
)


def comparison_table(runs: Sequence[Run]) -> Table:
    """One row a run; the speed is the median of what was logged.

    Args:
        runs: in order; speeds are also told against that of the first one.
    """
    names = distinct_names(runs)
    rows = [tuple(_row(run, name, runs[0])) for run, name in zip(runs, names, strict=True)]
    return Table(COLUMNS, rows, frozenset(range(1, len(COLUMNS))))


def comparison_sections(runs: Sequence[Run]) -> list[Section]:
    """The table, then every metric that two runs or more have logged, their curves in one chart."""
    names = distinct_names(runs)
    charts = []
    for key, title, metric, unit in CHARTS:
        logged = [pair for pair in zip(runs, names, strict=True) if metric in pair[0].metrics]
        lines = [Line(name, run.metrics[metric]) for run, name in logged]
        if len(lines) > 1:
            charts.append(LineChart(key, title, lines, unit))
    missing = [] if charts else ["No metric was logged by two of the runs: keep CSVLogger among the loggers."]
    return [
        Section("table", "Runs", tables=[comparison_table(runs)]),
        Section("curves", "Curves", charts=charts, missing=missing),
    ]


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """The runs' folders, each with as many of those around it as tell it from the others."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len({*parts}):
            return names
    return [str(run.folder) for run in runs]


def _row(run: Run, name: str, first: Run) -> Iterator[str]:
    yield name
    yield f"{last_step(run):,}"
    for metric in ("loss", "eval/loss"):
        yield readable(run.metrics[metric].last) if metric in run.metrics else ""
    yield readable(overall_sparsity(run), "percent") if run.masks else ("dense" if run.is_dense else "")
    rate = _rate(run)
    before = _rate(first)
    yield "" if rate is None else f"{readable(round(rate[1]))} {rate[0].partition('_')[0]}/s"
    comparable = rate is not None and before is not None and rate[0] == before[0] and before[1] > 0
    yield f"{rate[1] / before[1]:.2f} ×" if comparable and rate and before else ""


def _rate(run: Run) -> tuple[str, float] | None:
    found = next((name for name in RATES if name in run.metrics), None)
    # The median: one step that compiled, or waited for a disk, says nothing of the run.
    return None if found is None else (found, float(np.median(run.metrics[found].mean)))
