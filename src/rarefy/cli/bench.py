"""`rarefy bench`: how much faster sparse layers are here, and the cost rule of `compute: auto` beside it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from typer import Exit, Option

from rarefy.allocator import keep_freed_memory
from rarefy.cli import messages
from rarefy.cli.guard import guarded
from rarefy.cli.tables import print_whole
from rarefy.cost import calibration
from rarefy.cost import rule as cost
from rarefy.cost.calibration import BreakEven, Measurement, measured_block
from rarefy.errors import ConfigError, RarefyError
from rarefy.kernels import instruction_set, takes_blocks
from rarefy.kernels.instruction_sets import REFERENCE

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHAPES = ("768x768", "3072x768", "2048x2048")
_TOKENS = (16, 512)
_SPARSITIES = (0.5, 0.8, 0.9, 0.95)
_SECONDS = 1.0  # for one measurement
_CALIBRATION_SECONDS = 0.1  # for one of three
# Smaller differences are noise of the measurement.
_TOLERANCE = 1.03

Shapes = Annotated[list[str] | None, Option("--shape", help="Rows x columns of the weight; repeatable.")]
Tokens = Annotated[list[int] | None, Option("--tokens", help="Rows of the activations; repeatable.")]
Sparsities = Annotated[list[float] | None, Option("--sparsity", help="Of the weight; repeatable.")]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None, Option("--dtype", help="Of the activations; bfloat16 by autocast.")
]
Block = Annotated[
    str | None,
    Option("--block", help="Whole blocks are active, rows x columns: 32x32; single connections else."),
]
Threads = Annotated[int | None, Option("--threads", help="Threads to compute with; torch's own number.")]
Calibrate = Annotated[
    bool,
    Option("--calibrate", help="Fit the rule of `compute: auto` to this machine: a minute for each dtype."),
]
Show = Annotated[bool, Option("--show", help="Print the rules in use and those measured before.")]
Reset = Annotated[bool, Option("--reset", help="Forget what was measured.")]


def command(
    shapes: Shapes = None,
    tokens: Tokens = None,
    sparsities: Sparsities = None,
    dtype: Dtype = None,
    block: Block = None,
    threads: Threads = None,
    calibrate: Calibrate = False,
    show: Show = False,
    reset: Reset = False,
) -> None:
    """Measure how many times faster sparse layers are than dense ones on this machine."""

    def act() -> None:
        tasks = {"--calibrate": calibrate, "--show": show, "--reset": reset}
        layers = {"--shape": shapes, "--tokens": tokens, "--sparsity": sparsities}
        _check_together([name for name, wanted in tasks.items() if wanted], layers)
        size = None if block is None else _size("--block", block)
        # As `rarefy run` does, whose layers these stand for.
        keep_freed_memory()
        with _computing_with(threads):
            if reset:
                _reset()
            elif calibrate or show:
                names = [dtype] if dtype else list(_DTYPES)
                if calibrate:
                    _calibrate(names, size)
                print_whole(rule_table(names, size))
            else:
                given = (shapes or _SHAPES, tokens or _TOKENS, sparsities or _SPARSITIES)
                _compare(*given, dtype or "float32", size)

    raise Exit(guarded(act))


def _check_together(tasks: list[str], layers: dict[str, list[str] | list[int] | list[float] | None]) -> None:
    chosen = [name for name, values in layers.items() if values]
    if len(tasks) > 1 or (tasks and chosen):
        raise ConfigError("", " with ".join([*tasks, *chosen]), "one of them")


@contextmanager
def _computing_with(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None and threads < 1:
        raise ConfigError("--threads", threads, "a whole number ≥ 1")
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- one table of layers -----------------------------------------------------------------------------------------


def _compare(
    shapes: Sequence[str],
    tokens: Sequence[int],
    sparsities: Sequence[float],
    dtype: str,
    block: tuple[int, int] | None,
) -> None:
    from rarefy.cost.measure import Case, measure

    for name, values, allowed in (
        ("--tokens", [one for one in tokens if one < 1], "a whole number ≥ 1"),
        ("--sparsity", [one for one in sparsities if not 0 <= one < 1], "a number ≥ 0 and < 1"),
    ):
        if values:
            raise ConfigError(name, values[0], allowed)
    sizes = [_size("--shape", shape) for shape in shapes]
    for size in sizes:
        if block is not None and (size[0] % block[0] or size[1] % block[1]):
            raise ConfigError("--block", f"{block[0]}x{block[1]}", f"blocks that divide {size[0]}x{size[1]}")
    layers = itertools.product(sizes, tokens, sparsities)
    cases = [Case(*shape, count, sparsity, _DTYPES[dtype], block) for shape, count, sparsity in layers]
    with _progress() as bar:
        measured = [measure(case, _SECONDS) for case in bar.track(cases)]
    print_whole(layer_table(measured, dtype))


def _size(option: str, given: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", given)
    if match is None:
        owner, example = ("a weight", "768x3072") if option == "--shape" else ("a block", "32x32")
        raise ConfigError(option, given, f"the rows and columns of {owner}", f"{option} {example}")
    return int(match[1]), int(match[2])


def _progress() -> Progress:
    return Progress(BarColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def layer_table(measured: Iterable[Measurement], dtype: str) -> Table:
    """What was measured beside what the cost rule expects.

    Args:
        measured: the layers.
        dtype: name of that of the activations.
    """
    title = f"Forward and backward, {dtype}, {instruction_set()}, threads: {torch.get_num_threads()}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for column in ("layer", "tokens", "sparsity", "dense ms", "sparse ms", "times faster", "expected"):
        table.add_column(column, justify="right")
    table.add_column("auto")
    table.add_column("")
    for one in measured:
        table.add_row(*_layer_row(one, _DTYPES[dtype]))
    return table


def _layer_row(one: Measurement, dtype: torch.dtype) -> list[str]:
    case = (one.rows, one.columns, one.tokens, one.density, dtype, one.block)
    takes_compact = cost.pays_off(*case)
    numbers = [one.dense * 1e3, one.sparse * 1e3, 1 / one.relative_time, 1 / cost.relative_time(*case)]
    cells = [f"{one.rows} × {one.columns}", f"{one.tokens}", f"{1 - one.density:.4g}"]
    cells += [f"{number:.2f}" for number in numbers]
    return [*cells, "compact" if takes_compact else "masked", _verdict(one.relative_time, takes_compact)]


def _verdict(relative_time: float, takes_compact: bool) -> str:
    if takes_compact:
        return "slower than dense" if relative_time > _TOLERANCE else ""
    return "gain missed" if relative_time * _TOLERANCE < 1 else ""


# ---- the rule ----------------------------------------------------------------------------------------------------


def _calibrate(names: Sequence[str], block: tuple[int, int] | None) -> None:
    from rarefy.cost.measure import affordable, calibration_cases, measure_repeatedly
    from rarefy.cost.rule_fit import fit

    if block is not None and not takes_blocks(block):
        raise ConfigError("--block", f"{block[0]}x{block[1]}", "multiples of 8", "--block 32x32")
    if instruction_set() == REFERENCE:
        raise RarefyError("--calibrate: there are no compiled kernels in use, so compact storage never pays")
    for name in names:
        cases = affordable(calibration_cases(_DTYPES[name], block and measured_block(block)))
        with _progress() as bar:
            results = bar.track(measure_repeatedly(cases, _CALIBRATION_SECONDS), total=3 * len(cases))
            measured = [result for result in results if result is not None]
        file = calibration.save({calibration.key_of(_DTYPES[name], block): fit(measured)})
        messages.say(f"{name}: fitted to {len(measured)} layers, written to {file}")


def _reset() -> None:
    removed = calibration.remove()
    messages.say(
        f"removed {calibration.path()}" if removed else f"nothing to remove: no {calibration.path()}"
    )


def rule_table(names: Iterable[str], block: tuple[int, int] | None = None) -> Table:
    """The rules in use, then the others that were measured.

    Args:
        names: of the dtypes.
        block: of the weights; None for single connections.
    """
    table = Table(title="Cost rule of compute: auto", title_justify="left", box=SIMPLE)
    for column in ("kernels", "dtype", "threads", "processor", "torch", "rule"):
        table.add_column(column)
    for column in ("limit", "offset", "overhead"):
        table.add_column(column, justify="right")
    measured = calibration.measured()
    in_use = [calibration.key_of(_DTYPES[name], block) for name in names]
    for key in in_use:
        source = "in use, measured" if key in measured else "in use, the package's"
        table.add_row(*_rule_row(key, source, cost.rule(_DTYPES[key.dtype], block)))
    for key, found in measured.items():
        if key not in in_use:
            table.add_row(*_rule_row(key, "measured", found))
    return table


def _rule_row(key: calibration.Key, source: str, found: BreakEven | None) -> list[str]:
    cells = [key.instruction_set, key.dtype, f"{key.threads}", key.processor, key.torch, source]
    if found is None:
        return [*cells, "", "", "never pays"]
    return [*cells, f"{found.limit:.3g}", f"{found.tokens_offset:.3g}", f"{found.overhead:.2e}"]
