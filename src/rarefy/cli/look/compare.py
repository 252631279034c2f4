"""`rarefy compare`: several runs as a table and as one HTML file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from rarefy.callbacks.loggers.csv_logger import FILE_NAME as METRICS
from rarefy.callbacks.run_record import FILE_NAME as RECORD
from rarefy.cli import messages
from rarefy.cli.guard import guarded
from rarefy.cli.look.report import write_page
from rarefy.cli.tables import print_whole
from rarefy.errors import ConfigError
from rarefy.report.comparison import comparison_sections, comparison_table
from rarefy.report.run_data import read_run

log = logging.getLogger("rarefy")

_RUNS = "The model_dir of each run; a folder of several stands for all of them."
_OUT = "The HTML file."

Runs = Annotated[list[Path], Argument(metavar="RUN...", help=_RUNS)]
Out = Annotated[Path, Option("--out", "-o", help=_OUT)]


def command(runs: Runs, out: Out = Path("comparison.html")) -> None:
    """Show several runs beside each other: loss, sparsity, speed, one line a run."""
    raise Exit(guarded(lambda: compare(runs, out)))


def compare(folders: Sequence[Path], out: Path) -> None:
    """Prints the table and writes the page.

    Args:
        folders: model directories, or folders of them.
        out: the HTML file.

    Raises:
        RarefyError: fewer than two runs, a folder without one, or a file that cannot be written.
    """
    # A run given twice, by itself and in its folder, is one run.
    found = list(dict.fromkeys(run for folder in folders for run in _runs_in(folder)))
    if len(found) < 2:
        given = f"{len(found)} run" if found else "no run"
        raise ConfigError(
            "RUN", given, "two runs or more, or a folder of several", "rarefy compare run1 run2"
        )
    runs = [read_run(folder, log.warning) for folder in found]
    table = comparison_table(runs)
    shown = Table(*table.columns, box=SIMPLE)
    for number, column in enumerate(shown.columns):
        column.justify = "right" if number in table.numeric else "left"
    for row in table.rows:
        shown.add_row(*map(Text, row))
    print_whole(shown)
    foot = f"rarefy {version('rarefy')}, {time.strftime('%Y-%m-%d %H:%M')}"
    write_page(out, f"{len(runs)} runs", (), comparison_sections(runs), foot)
    messages.say(f"comparison in {out}")


def _runs_in(folder: Path) -> Iterator[Path]:
    """A folder itself, or the runs in it where it is none."""
    inside = sorted(path for path in folder.iterdir() if _is_run(path)) if folder.is_dir() else []
    if inside and not _is_run(folder):
        yield from inside
    else:
        yield folder


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RECORD, METRICS))
