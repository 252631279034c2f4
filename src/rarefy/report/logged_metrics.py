"""The metrics that a run left in its model directory."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from rarefy.callbacks.loggers.csv_logger import FILE_NAME, STEP
from rarefy.callbacks.loggers.tensorboard_logger import DIRECTORY_NAME
from rarefy.errors import RarefyError
from rarefy.imports import require
from rarefy.report.series import MOST_POINTS, Series, joined

ROWS_AT_ONCE = 8192
POINTS_IN_MEMORY = 4 * MOST_POINTS


def read_metrics(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Series]:
    """Metrics by name, thinned where there are many; from `metrics.csv`, else from TensorBoard's events.

    Args:
        folder: the model directory.
        wanted: tells by its name whether a metric is needed.

    Returns:
        Empty where there is neither.

    Raises:
        RarefyError: a file that cannot be read.
    """
    path = folder / FILE_NAME
    events = folder / DIRECTORY_NAME
    if path.is_file():
        return read_table(path, wanted)
    return read_events(events, wanted) if events.is_dir() else {}


def read_table(path: Path, wanted: Callable[[str], bool]) -> dict[str, Series]:
    """Metrics of a CSV file by name, thinned where there are many.

    Args:
        path: a file with a column `step`, as `CSVLogger` writes it.
        wanted: tells by its name whether a column is needed.

    Raises:
        RarefyError: the file cannot be read, or has no column `step`.
    """
    return {name: joined(parts).thinned() for name, parts in read_csv(path, wanted).items()}


def read_csv(path: Path, wanted: Callable[[str], bool]) -> dict[str, list[Series]]:
    """Metrics of a CSV file in parts; a long file is thinned part by part and never held in memory.

    Args:
        path: a file with a column `step`, as `CSVLogger` writes it.
        wanted: tells by its name whether a column is needed.

    Raises:
        RarefyError: the file cannot be read, or has no column `step`.
    """
    found: dict[str, list[Series]] = {}
    try:
        # A kill may have cut the last row within a character.
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.reader(file)
            names = next(reader, [])
            if STEP not in names:
                raise RarefyError(f"{path} has no column {STEP!r}; give a folder that CSVLogger wrote to")
            chosen = {i: name for i, name in enumerate(names) if name != STEP and wanted(name)}
            most = 0
            size = path.stat().st_size
            for rows in iter(lambda: list(islice(reader, ROWS_AT_ONCE)), []):
                most = most or _points_of_a_part(rows, size)
                for name, series in _columns(rows, names.index(STEP), chosen):
                    found.setdefault(name, []).append(series.thinned(most))
    except (OSError, csv.Error) as error:
        raise RarefyError(f"{path}: cannot be read: {error}") from error
    return found


def _points_of_a_part(rows: list[list[str]], size: int) -> int:
    """How many points of the first rows, and of as many later ones, to keep, so that all fit into memory."""
    # Rows are about equally long, so the first ones tell how many parts the file has.
    parts = size / sum(sum(map(len, row)) + len(row) for row in rows)
    return max(8, min(ROWS_AT_ONCE, round(POINTS_IN_MEMORY / parts))) if parts > 1.5 else ROWS_AT_ONCE


def _columns(
    rows: list[list[str]], step_index: int, chosen: Mapping[int, str]
) -> Iterator[tuple[str, Series]]:
    """The chosen columns of some rows, those without a value left out; a kill may have cut the last row."""
    width = max([step_index, *chosen]) + 1
    whole = [row for row in rows if len(row) >= width and row[step_index].isdecimal()]
    steps = np.array([int(row[step_index]) for row in whole], dtype=np.float64)
    for index, name in chosen.items():
        cells = [row[index] for row in whole]
        places = [place for place, cell in enumerate(cells) if cell]
        series = Series.of(steps[places], [_number(cells[place]) for place in places]) if places else None
        if series is not None and len(series):
            yield name, series


def _number(cell: str) -> float:
    try:
        return float(cell)
    # A cell that was cut, or no number: a series leaves it out.
    except ValueError:
        return float("nan")


def read_events(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Series]:
    """Metrics of TensorBoard's event files.

    Args:
        folder: the folder that holds them.
        wanted: tells by its name whether a metric is needed.

    Raises:
        RarefyError: tensorboard is not installed.
    """
    reading = require("tensorboard", "tensorboard.backend.event_processing.event_accumulator")
    # Of longer series TensorBoard keeps a random sample, by default of 10,000 points.
    events = reading.EventAccumulator(str(folder), size_guidance={reading.SCALARS: 100_000}).Reload()
    return {
        name: Series.of([e.step for e in found], [e.value for e in found]).thinned()
        for name in events.Tags()[reading.SCALARS]
        if wanted(name) and (found := events.Scalars(name))
    }
