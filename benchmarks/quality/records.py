"""Raw results: a CSV file a table, one row a run, written as runs end, so that a run that was cut short goes on."""

from __future__ import annotations

import csv
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Measure = Callable[[Row], Row]

HERE = Path(__file__).parent / "results"


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers as numbers; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: parsed(text) for key, text in row.items()} for row in csv.DictReader(file)]


def parsed(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def append(path: Path, row: Row) -> None:
    """Writes one row at the end of a file, after its head where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def rounded(row: Row) -> Row:
    """Six significant digits: more would only be noise in the file."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def complete(path: Path, cells: Iterable[Row], measure: Measure, jobs: int = 1) -> list[Row]:
    """Measures the cells that a file does not have yet; all rows of the cells, in their order.

    Args:
        path: the CSV file.
        cells: what tells one run from another.
        measure: runs a cell; what it returns is put beside it.
        jobs: how many processes share the runs.

    Raises:
        RuntimeError: a process ended before its share was done.
    """
    cells = list(cells)
    names = list(cells[0])
    done = {key_of(row, names) for row in read(path)}
    missing = [cell for cell in cells if key_of(cell, names) not in done]
    # The first row of a new file writes its head, which two processes would write twice.
    alone = len(missing) if jobs == 1 else int(not path.exists())
    run_cells(path, missing[:alone], measure)
    run_at_once(path, missing[alone:], measure, jobs)
    rows = {key_of(row, names): row for row in read(path)}
    return [rows[key_of(cell, names)] for cell in cells]


def run_cells(path: Path, cells: Sequence[Row], measure: Measure) -> None:
    for number, cell in enumerate(cells):
        row = rounded({**cell, **measure(cell)})
        append(path, row)
        print(f"{path.stem} {number + 1}/{len(cells)}", *row.values(), flush=True)


def run_at_once(path: Path, cells: Sequence[Row], measure: Measure, jobs: int) -> None:
    """Each process takes every `jobs`-th cell. Forked, since a measurement is a closure over its task."""
    fork = multiprocessing.get_context("fork")
    shares = [share for share in (cells[first::jobs] for first in range(jobs)) if share]
    workers = [fork.Process(target=run_cells, args=(path, share, measure)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise RuntimeError(f"{path.stem}: {len(failed)} of {len(workers)} processes failed, see above")


def key_of(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    # As the file has it: a cell that was rounded there would be run again and again.
    written = rounded({name: row[name] for name in names})
    return tuple(map(str, written.values()))


def summarised(rows: Sequence[Row], values: Sequence[str]) -> list[Row]:
    """One row for all seeds: the mean of each value, and its standard error as `<value>_error`.

    Args:
        rows: what was measured, with a column `seed`.
        values: the columns that are averaged; the others tell groups apart.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        names = [name for name in row if name not in values and name != "seed"]
        groups.setdefault(key_of(row, names), []).append(row)
    return [averaged(group, values) for group in groups.values()]


def averaged(group: Sequence[Row], values: Sequence[str]) -> Row:
    shared = {name: value for name, value in group[0].items() if name not in values and name != "seed"}
    means = {}
    for name in values:
        numbers = [float(row[name]) for row in group]
        means[name] = statistics.fmean(numbers)
        means[f"{name}_error"] = standard_error(numbers)
    return rounded({**shared, "runs": len(group), **means})


def standard_error(numbers: Sequence[float]) -> float:
    """Of the mean; 0 for a single number, which `runs` gives away."""
    return statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
