"""`rarefy report`: what a run left behind, as one HTML file and as PNG files."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from rarefy.cli import messages
from rarefy.cli.guard import guarded
from rarefy.disk import writing
from rarefy.errors import RarefyError
from rarefy.report.chart import Section
from rarefy.report.page import page
from rarefy.report.png import save_png
from rarefy.report.run_data import read_run
from rarefy.report.sections import headlines, sections_of

log = logging.getLogger("rarefy")

FILE_NAME = "report.html"
_OUT = "The HTML file; report.html in MODEL_DIR where not given."

ModelDir = Annotated[Path, Argument(metavar="MODEL_DIR", help="Where a run left its logs.")]
Out = Annotated[Path | None, Option("--out", "-o", help=_OUT)]
Png = Annotated[Path | None, Option("--png", help="A folder for the charts as PNG files.")]


def command(model_dir: ModelDir, out: Out = None, png: Png = None) -> None:
    """Write one self-contained HTML file about a run."""
    raise Exit(guarded(lambda: report(model_dir, out, png)))


def report(model_dir: Path, out: Path | None = None, png: Path | None = None) -> None:
    """Writes the report of a run.

    Args:
        model_dir: where the run left its logs and checkpoints.
        out: the HTML file; None for `report.html` in `model_dir`.
        png: a folder for its charts as PNG files; None for none.

    Raises:
        RarefyError: nothing of a run is there, a file cannot be written, or matplotlib is missing.
    """
    run = read_run(model_dir, log.warning)
    sections = sections_of(run)
    kind = "dense" if run.is_dense else "sparse"
    title = f"{model_dir.resolve().name}: a {kind} run"
    foot = f"rarefy {version('rarefy')}, {time.strftime('%Y-%m-%d %H:%M')}"
    path = out or model_dir / FILE_NAME
    write_page(path, title, headlines(run), sections, foot)
    messages.say(f"report in {path}")
    if png is not None:
        charts = [chart for section in sections for chart in section.charts]
        for chart in charts:
            save_png([chart], png / f"{chart.key}.png")
        messages.say(f"{len(charts)} chart{'s' * (len(charts) != 1)} in {png}")


def _may_go(path: Path) -> bool:
    """Whether a file is empty or a page, as a report of before is."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    return not head or head.startswith(b"<!doctype html")


def write_page(
    path: Path, title: str, figures: Iterable[tuple[str, str]], sections: Sequence[Section], foot: str
) -> None:
    """Writes a page, with the folders that it needs.

    Args:
        path: the HTML file.
        title: its heading.
        figures: the figures that matter most: name, value.
        sections: in order.
        foot: the last line.

    Raises:
        RarefyError: it cannot be written, or a file that is no page is there.
    """
    with writing(path):
        if path.is_file() and not _may_go(path):
            raise RarefyError(
                f"{path}: is there already, and no page of rarefy's; give another path, or remove it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(title, figures, sections, foot), encoding="utf-8")
