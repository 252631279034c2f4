"""`rarefy export`: a checkpoint becomes a file or folder for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from rarefy.cli import options
from rarefy.cli.guard import guarded
from rarefy.export.formats import FORMATS, Exported, export

_PARAMS = "The file of the run, where onnx or hf need it: a foreign file, or a model from ./file.py."

Out = Annotated[Path, Argument(metavar="OUT", help="The file to write; a folder for hf.")]
To = Annotated[str, Option("--to", metavar="FORMAT", help=f"{', '.join(FORMATS)}.")]
Force = Annotated[bool, Option("--force", help="Replace what is at OUT.")]
Params = Annotated[Path | None, Option("--params", "-p", metavar="PARAMS.yaml", help=_PARAMS)]


def command(
    checkpoint: options.Checkpoint,
    out: Out,
    to: To,
    force: Force = False,
    params: Params = None,
    imports: options.Imports = True,
) -> None:
    """Turn a checkpoint into a file or folder for other programs."""

    def write() -> None:
        done = export(checkpoint, to, out, force=force, params=params, allow_imports=imports)
        Console().print(exported_table(done))

    raise Exit(guarded(write))


def exported_table(done: Exported) -> Table:
    """What an export came to."""
    table = Table(show_header=False, title="Exported", title_justify="left", box=SIMPLE)
    for name, value in (
        ("file", f"{done.path} ({done.format})"),
        ("dense", f"{done.dense_bytes:,} bytes"),
        ("exported", f"{done.exported_bytes:,} bytes"),
        ("ratio", f"{done.ratio:.3f}"),
        ("nonzeros", f"{done.nonzeros:,} of {done.size:,}"),
        ("actual sparsity", f"{done.sparsity:.4f} in {done.sparse_weights} sparse weights"),
    ):
        table.add_row(name, Text(value))
    return table
