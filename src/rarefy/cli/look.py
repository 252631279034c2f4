"""The commands that show instead of train: their flags."""

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli import options
from rarefy.cli.guard import guarded
from rarefy.cli.plot import plot
from rarefy.cli.report import report

_OUT_PNG = "The PNG file; <PARAMS>_schedules.png beside PARAMS.yaml where not given."
_OUT_HTML = "The HTML file; report.html in MODEL_DIR where not given."


def attach(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command("plot")(_plot)
    app.command("report")(_report)


def _plot(
    params: Annotated[Path, typer.Argument(metavar="PARAMS.yaml", help="The configuration file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help=_OUT_PNG)] = None,
    assignments: options.Assignments = None,
    imports: options.Imports = True,
) -> None:
    """Draw the sparsity and drop-fraction schedules of PARAMS.yaml, before any training."""
    raise typer.Exit(guarded(lambda: plot(params, out, tuple(assignments or ()), imports)))


def _report(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Where a run left its logs.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help=_OUT_HTML)] = None,
    png: Annotated[Path | None, typer.Option("--png", help="A folder for the charts as PNG files.")] = None,
) -> None:
    """Write one self-contained HTML file about a run."""
    raise typer.Exit(guarded(lambda: report(model_dir, out, png)))
