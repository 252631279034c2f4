"""Metrics as a table that any spreadsheet reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rarefy.callbacks.events import Logger
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.disk import writing

FILE_NAME = "metrics.csv"
STEP = "step"


class CSVLogger(Logger):
    """Writes `model_dir/metrics.csv`: one row a step, one column a metric.

    Metrics of the same step share a row; a new metric adds a column. A fit that starts before the step of the
    last row (after a kill, or from an earlier checkpoint) takes the later rows away and goes on from there.
    """

    def __init__(self) -> None:
        self._table: MetricsTable | None = None

    def on_fit_start(self, trainer: TrainerView) -> None:
        """Goes on after the rows of the steps that the fit builds on."""
        self._table = MetricsTable(trainer.model_dir / FILE_NAME)
        self._table.forget_after(trainer.global_step)

    def log(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        """Adds metrics to the row of `step`; they are in the file when this returns."""
        path = trainer.model_dir / FILE_NAME
        with writing(path):
            # A validation without a fit is logged as well.
            self._table = self._table or MetricsTable(path)
            self._table.add(step, {name: str(float(value)) for name, value in metrics.items()})


class MetricsTable:
    """A CSV file with rows in the order of their steps.

    Args:
        path: the file; read if it exists, made by the first `add` if it does not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = _read_rows(path)
        self._columns = list(rows[0]) if rows else [STEP]
        self._last: dict[str, str] = {}
        self._last_start = 0
        # Written back, which drops a row that a kill cut short, and tells where the last one begins.
        if rows:
            self._rewrite(rows)

    def forget_after(self, step: int) -> None:
        """Removes the rows of later steps."""
        rows = _read_rows(self.path)
        kept = [row for row in rows if int(row[STEP]) <= step]
        if len(kept) < len(rows):
            self._rewrite(kept)

    def add(self, step: int, cells: Mapping[str, str]) -> None:
        """Adds cells to the row of `step`, which is made where it is missing."""
        last_step = int(self._last.get(STEP, -1))
        new_columns = [name for name in cells if name not in self._columns]
        # A new column is one of every row, and an earlier step has its place between others.
        if new_columns or step < last_step or not self.path.exists():
            self._columns += new_columns
            self._rewrite(_merged(_read_rows(self.path), step, cells))
        elif step == last_step:
            self._write_last({**self._last, **cells}, self._last_start)
        else:
            self._write_last({STEP: str(step), **cells}, self.path.stat().st_size)

    def _write_last(self, row: dict[str, str], start: int) -> None:
        # The last row alone: to rewrite the file at every step would take longer and longer.
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(_line([row.get(name, "") for name in self._columns]))
            file.truncate()
        self._last = row
        self._last_start = start

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        lines = [
            _line(self._columns),
            *(_line([row.get(name, "") for name in self._columns]) for row in rows),
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".tmp-{self.path.name}")
        temporary.write_bytes(b"".join(lines))
        # A kill leaves the old table or the new one.
        temporary.replace(self.path)
        self._last = dict(rows[-1]) if rows else {}
        self._last_start = sum(map(len, lines[:-1]))


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Every whole row; a kill may have cut the last one short."""
    if not path.exists():
        return []
    # A kill may have cut a letter in two.
    text = path.read_text(encoding="utf-8", errors="replace")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    columns = list(reader.fieldnames or [])
    return [
        {name: row[name] or "" for name in columns} for row in reader if (row.get(STEP) or "").isdecimal()
    ]


def _merged(rows: list[dict[str, str]], step: int, cells: Mapping[str, str]) -> list[dict[str, str]]:
    by_step = {int(row[STEP]): row for row in rows}
    by_step[step] = {**by_step.get(step, {}), STEP: str(step), **cells}
    return [by_step[step] for step in sorted(by_step)]


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
