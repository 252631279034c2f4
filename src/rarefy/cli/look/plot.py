"""`rarefy plot`: the schedules of a file as a picture, before any training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.cli import messages, options
from rarefy.cli.guard import guarded, located
from rarefy.cli.overrides import Flags
from rarefy.errors import ConfigError
from rarefy.report.chart import LineChart
from rarefy.report.png import save_png
from rarefy.report.schedule_chart import schedule_charts
from rarefy.run.builder import Builder
from rarefy.run.schema import parse
from rarefy.trainer.plan import LoopConfig

_OUT = "The PNG file; <PARAMS>_schedules.png beside PARAMS.yaml where not given."

Params = Annotated[Path, Argument(metavar="PARAMS.yaml", help="The configuration file.")]
Out = Annotated[Path | None, Option("--out", "-o", help=_OUT)]


def command(
    params: Params,
    out: Out = None,
    assignments: options.Assignments = None,
    imports: options.Imports = True,
) -> None:
    """Draw the sparsity and drop-fraction schedules of PARAMS.yaml, before any training."""
    raise Exit(guarded(lambda: plot(params, out, tuple(assignments or ()), imports)))


def plot(params: Path, out: Path | None, assignments: tuple[str, ...], imports: bool) -> None:
    """Draws the sparsity and drop-fraction schedules of every algorithm of a file, update steps marked.

    Args:
        params: the file.
        out: the PNG file; None for `<stem>_schedules.png` beside `params`.
        assignments: of `--set`.
        imports: whether import paths in the file may be followed.

    Raises:
        ConfigError: anything in the file that is not allowed, or a file without sparsity.
        RarefyError: matplotlib is not installed, or the picture cannot be written.
    """
    with located(params, Flags(assignments=assignments)) as content:
        charts = _charts_in(content, params.parent, imports)
    path = out or params.with_name(f"{params.stem}_schedules.png")
    save_png(charts, path)
    messages.say(f"{len(charts)} chart{'s' * (len(charts) != 1)} in {path}")


def _charts_in(content: dict[str, Any], folder: Path, imports: bool) -> list[LineChart]:
    configs = parse(content)
    builders = [Builder(config, folder, imports) for config in configs]
    charts = [chart for builder in builders for chart in charts_of(builder, len(configs) > 1)]
    if not charts:
        where = f"{configs[0].path}.init.sparsity"
        raise ConfigError(
            where, "a missing value", "a sparsity, there is no schedule to draw", "sparsity: 0.9"
        )
    return charts


def charts_of(builder: Builder, with_path: bool = False) -> Iterator[LineChart]:
    """The schedules of one trainer; none for a dense one.

    Args:
        builder: of the trainer; its model is not built.
        with_path: whether titles say which trainer of the file it is.
    """
    if builder.config.init.sparsity is None:
        return
    total = length_of(builder)
    sparsity = builder.sparsity
    for number, algorithm in enumerate(sparsity.algorithms if sparsity is not None else (), start=1):
        place = re.sub(r"\.trainer$", "", builder.config.path)
        title = f"{place} · {title_of(algorithm)}" if with_path else title_of(algorithm)
        yield from schedule_charts(algorithm, total, key=f"{place}-{number}", title=title)


def length_of(builder: Builder) -> int:
    """Optimizer steps of a run; its data is opened only if nothing else tells.

    Raises:
        ConfigError: nothing tells the length of the run, or it is zero.
    """
    config = builder.config
    loop = config.init.loop or LoopConfig()
    total = loop.total_steps() if config.fit is None else builder.total_steps
    if not total:
        where = f"{config.path}.init.loop"
        raise ConfigError(
            where, "a run without a length", "num_steps, max_steps or num_epochs", "num_steps: 1000"
        )
    return total


def title_of(algorithm: SparsityAlgorithm) -> str:
    """Algorithm and filter.

    Example:
        >>> from rarefy import Static
        >>> title_of(Static(0.5, param_filter="*attn*"))
        'static, *attn*'
    """
    globs = ", ".join(algorithm.globs) if algorithm.globs else "default filter"
    return f"{algorithm.label}, {globs if len(globs) <= 60 else globs[:59] + '…'}"
