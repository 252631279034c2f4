"""`rarefy inspect`: what a saved model looks like."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from typer import Option

from rarefy.checkpoint.saved_model import SavedModel, open_saved
from rarefy.cli import options
from rarefy.cli.guard import guarded
from rarefy.cli.tables import print_whole
from rarefy.report.inspection import QUANTILES, Inspected, Totals, inspect

log = logging.getLogger("rarefy")

AsJson = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]
Everything = Annotated[bool, Option("--all", help="Dense parameters and buffers too.")]


def command(checkpoint: options.Checkpoint, as_json: AsJson = False, everything: Everything = False) -> None:
    """Show every sparse weight of a checkpoint: sparsity, balance, dead rows and columns, |w|."""
    raise typer.Exit(guarded(lambda: _show(checkpoint, as_json, everything)))


def _show(path: Path, as_json: bool, everything: bool) -> None:
    saved = open_saved(path)
    rows, problem = inspect(saved)
    if problem:
        log.warning("patterns and the balance of groups are not shown: %s", problem)
    shown = [row for row in rows if everything or row.is_sparse]
    if as_json:
        typer.echo(json.dumps(as_data(saved, shown, rows), indent=2, allow_nan=False))
        return
    if not saved.masks:
        log.info("no parameter has a mask: this model is dense%s", "" if everything else " (--all shows it)")
    print_whole(inspected_table(saved, shown, rows))


def as_data(saved: SavedModel, shown: Sequence[Inspected], rows: Sequence[Inspected]) -> dict[str, Any]:
    """What `--json` prints.

    Args:
        saved: the model.
        shown: the parameters to list.
        rows: all of them, for the totals.
    """
    names = [f"{share:g}" for share in QUANTILES]
    parameters = [
        asdict(row) | {"sparsity": row.sparsity, "quantiles": dict(zip(names, row.quantiles, strict=True))}
        for row in shown
    ]
    totals = {
        name: asdict(total) | {"sparsity": total.sparsity}
        for name, total in (("sparse", _sparse_total(rows)), ("model", Totals.of(rows)))
    }
    return {"path": str(saved.path), "step": saved.step, "parameters": parameters, "totals": totals}


def inspected_table(saved: SavedModel, shown: Sequence[Inspected], rows: Sequence[Inspected]) -> Table:
    """The same as a table."""
    step = "" if saved.step is None else f", step {saved.step:,}"
    table = Table(title=Text(f"{saved.path}{step}"), title_justify="left", box=SIMPLE)
    for column in ("parameter", "shape", "storage", "pattern"):
        table.add_column(column)
    for column in ("sparsity", "active", "groups", "sparsity of groups", "dead rows", "dead columns"):
        table.add_column(column, justify="right")
    for share in QUANTILES:
        table.add_column(f"|w| {share:.0%}", justify="right")
    for row in shown:
        table.add_row(*map(Text, _cells(row)))
    table.add_section()
    for name, total in (("sparse weights", _sparse_total(rows)), ("whole model", Totals.of(rows))):
        counts = f"{total.active:,} of {total.size:,}"
        table.add_row(name, f"{total.parameters} tensors", "", "", f"{total.sparsity:.4f}", counts)
    return table


def _sparse_total(rows: Sequence[Inspected]) -> Totals:
    return Totals.of(row for row in rows if row.is_sparse)


def _cells(row: Inspected) -> list[str]:
    shape = " × ".join(map(str, row.shape))
    cells = [row.name, shape, row.storage, row.pattern]
    cells += [f"{row.sparsity:.4f}", f"{row.active:,} of {row.size:,}"]
    if row.balance is None:
        cells += ["", ""]
    else:
        side = row.balance.option.removeprefix("balance_").removesuffix("_groups")
        cells += [f"{row.balance.groups} {side}", f"{row.balance.lowest:.4f}..{row.balance.highest:.4f}"]
    cells += [
        "" if dead is None else f"{dead:,} of {size:,}"
        # Below two dimensions neither is counted, and the zeros stand for sizes that are not there.
        for dead, size in zip((row.dead_rows, row.dead_columns), (*row.shape, 0, 0)[:2], strict=True)
    ]
    return cells + ["" if value is None else f"{value:.3g}" for value in row.quantiles]
