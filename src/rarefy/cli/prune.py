"""`rarefy prune`: a trained model becomes one with exact zeros, without training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from rarefy.cli import options
from rarefy.cli.guard import guarded
from rarefy.errors import ConfigError
from rarefy.export.pruned import PruneJob, prune_saved
from rarefy.pruning.one_shot import METHODS, Pruned

_SOURCE = "A Hugging Face folder, a model_dir (its newest checkpoint), a checkpoint, or a file of a model."
_DATA = "Text to measure on: a file, a .npy file of token ids, or a folder; left out, the training data of the run."
_PATTERN = "unstructured, 2:4 and its like, or as in a file: '{block: [8, 8]}'."
_LENGTH = "Tokens in a sequence of --data; left out, what the model allows, at most 2048."

Source = Annotated[Path, Argument(metavar="MODEL", help=_SOURCE)]
Out = Annotated[Path, Argument(metavar="OUT", help="The folder to write; of the same kind as MODEL.")]
Sparsity = Annotated[float | None, Option("--sparsity", help="Fraction of zeros, in [0, 1).")]
Method = Annotated[str, Option("--method", help=f"{', '.join(METHODS)}.")]
Data = Annotated[Path | None, Option("--data", help=_DATA)]
Batches = Annotated[int, Option("--batches", min=1, help="How many batches to measure on.")]
BatchSize = Annotated[int, Option("--batch_size", min=1, help="Sequences in a batch of --data.")]
Length = Annotated[int | None, Option("--sequence_length", min=1, help=_LENGTH)]
Pattern = Annotated[str, Option("--pattern", help=_PATTERN)]
Filter = Annotated[list[str] | None, Option("--param_filter", metavar="GLOB", help="Weights; repeatable.")]
Distribution = Annotated[str, Option("--distribution", help="uniform, er or erk.")]
Seed = Annotated[int, Option("--seed", help="Of what is random, and of ties.")]
Params = Annotated[
    Path | None,
    Option("--params", "-p", metavar="PARAMS.yaml", help="The file of the run, where it is needed."),
]
Device = Annotated[str, Option("--target_device", help="cpu, gpu or auto.")]
Force = Annotated[bool, Option("--force", help="Replace a folder of the same kind at OUT.")]


def command(
    model: Source,
    out: Out,
    sparsity: Sparsity = None,
    method: Method = "wanda",
    data: Data = None,
    batches: Batches = 16,
    batch_size: BatchSize = 8,
    sequence_length: Length = None,
    pattern: Pattern = "unstructured",
    param_filter: Filter = None,
    distribution: Distribution = "uniform",
    seed: Seed = 0,
    params: Params = None,
    target_device: Device = "auto",
    force: Force = False,
    imports: options.Imports = True,
) -> None:
    """Prune a trained model at once, without training."""

    def run() -> None:
        form = read_pattern(pattern)
        job = PruneJob(
            source=model,
            out=out,
            sparsity=_sparsity(sparsity, form),
            method=method,
            data=data,
            batches=batches,
            batch_size=batch_size,
            sequence_length=sequence_length,
            options={
                "pattern": form,
                "param_filter": param_filter,
                "distribution": distribution,
                "seed": seed,
            },
            params=params,
            allow_imports=imports,
            device=target_device,
            force=force,
        )
        console = Console()
        for table in pruned_tables(_with_progress(job), out):
            console.print(table)

    raise Exit(guarded(run))


def read_pattern(text: str) -> Any:
    """A pattern as it is written on the command line.

    Raises:
        ConfigError: no such pattern.

    Example:
        >>> read_pattern("2:4"), read_pattern("{block: [8, 8]}")
        ({'n': 2, 'm': 4}, {'block': [8, 8]})
    """
    # Not left to YAML, to which 2:4 is a number in base 60: 124.
    numbers = re.fullmatch(r"(\d+):(\d+)", text)
    if numbers:
        return {"n": int(numbers[1]), "m": int(numbers[2])}
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError("--pattern", repr(text), "unstructured, 2:4, or '{block: [8, 8]}'") from None


def _sparsity(given: float | None, pattern: Any) -> float:
    """The sparsity; of n of m it follows."""
    if given is not None:
        return given
    numbers = (pattern.get("n"), pattern.get("m")) if isinstance(pattern, dict) else ()
    match numbers:
        case (int(n), int(m)) if 0 < n < m:
            return 1 - n / m
        case (int(n), int(m)):
            raise ConfigError("--pattern", f"{n}:{m}", "n of m with 0 < n < m", "--pattern 2:4")
    raise ConfigError("--sparsity", "a missing value", "a fraction in [0, 1)", "--sparsity 0.6")


def _with_progress(job: PruneJob) -> Pruned:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # Elsewhere it would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(job.method, total=None)
        return prune_saved(job, lambda done, total: bar.update(task, completed=done, total=total))


def pruned_tables(done: Pruned, out: Path) -> tuple[Table, Table]:
    """A row for every weight, and what it came to."""
    weights = Table("weight", "shape", "sparsity", title="Pruned", title_justify="left", box=SIMPLE)
    for one in done.weights:
        weights.add_row(Text(one.name), " × ".join(map(str, one.shape)), f"{one.sparsity:.4f}")
    whole = Table(show_header=False, box=SIMPLE)
    rows = [("folder", str(out)), ("sparsity", f"{done.sparsity:.4f} of {len(done.weights)} weights")]
    for when, loss in (("before", done.loss_before), ("after", done.loss_after)):
        rows += [] if loss is None else [(f"loss {when}", f"{loss:.4f}")]
    for name, value in rows:
        whole.add_row(name, Text(value))
    return weights, whole
