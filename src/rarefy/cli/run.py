"""`rarefy run`: a file and flags become a run, and every fault one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from rarefy.algorithms.summary import summary
from rarefy.allocator import keep_freed_memory
from rarefy.callbacks.events import Callback
from rarefy.callbacks.rank_log import RankLog
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.checkpoint.chosen import UNSET, CheckpointPath
from rarefy.cli import messages
from rarefy.cli.guard import FAILED, guarded, located
from rarefy.cli.overrides import Flags, apply_flags, goes_on_as_saved, states_to_load
from rarefy.cli.processes import refuse_nested, run_in_processes, without_flag
from rarefy.cli.tables import plan_table, preview_tables, print_whole, result_table
from rarefy.distributed import is_first
from rarefy.errors import ConfigError
from rarefy.run.builder import Builder
from rarefy.run.changed_file import as_saved
from rarefy.run.launch import Launch, Mode, run_all
from rarefy.run.preview import plan_parameters, plan_updates, preview
from rarefy.run.schema import TrainerConfig, parse
from rarefy.run.speed import speed_up
from rarefy.trainer.trainer import Trainer


class RunWatch(Callback):
    """Prints the plan of the sparsity when training begins, and times the steps.

    Attributes:
        has_begun: whether training has begun, which decides the exit code of a failure.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self._seconds = 0.0
        self._steps = 0
        self._since = 0.0

    @property
    def steps_per_second(self) -> float | None:
        """Training alone, without validation; None before the first step."""
        return self._steps / self._seconds if self._steps else None

    def on_train_start(self, trainer: TrainerView) -> None:
        """Training begins."""
        self.has_begun = True
        if trainer.sparsity is not None and is_first():
            algorithms = trainer.sparsity.algorithms
            total = trainer.total_steps
            parameters = plan_parameters(trainer.model, algorithms, total)
            Console().print(plan_table(parameters, plan_updates(algorithms, total)))

    def on_train_batch_start(self, trainer: TrainerView, batch: Any, micro_step: int) -> None:
        """The clock of a step starts."""
        if micro_step == 0:
            self._since = perf_counter()

    def on_train_batch_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """The clock of a step stops."""
        self._seconds += perf_counter() - self._since
        self._steps += 1


@dataclass(frozen=True)
class Request:
    """What a command asks for.

    Args:
        params: the configuration file.
        flags: what changes it.
        mode: `train`, `eval`, `train_and_eval` or `eval_all`; None lets the file decide.
        validate_only: print the plan and train nothing.
        imports: whether import paths in the file may be followed.
        compare_dense: steps over which a sparse run is compared with a dense one at its end; 0 for none.
    """

    params: Path | None
    flags: Flags
    mode: Mode | None = None
    validate_only: bool = False
    imports: bool = True
    compare_dense: int = 0


def run(request: Request) -> int:
    """Runs a command; never raises for a user's mistake.

    Returns:
        The exit code, as `guarded` gives it.
    """
    watch = RunWatch()
    return guarded(lambda: _run(request, watch), has_begun=lambda: watch.has_begun)


def run_with(processes: int, request: Request) -> int:
    """Runs a command in several processes, once its file is known to be right; never raises for a user's mistake.

    Args:
        processes: how many, ≥ 2.
        request: the command, the same as the arguments that this process was started with.

    Returns:
        The exit code, as `guarded` gives it.
    """
    if request.validate_only:
        return run(request)
    codes: list[int] = []

    def start() -> None:
        refuse_nested(processes)
        _check(request)
        # From here on the run counts as begun, so that what ends it is no fault of the file.
        codes.append(FAILED)
        codes.append(run_in_processes(processes, without_flag(sys.argv[1:])))

    return guarded(start, has_begun=lambda: bool(codes)) or codes[-1]


def _check(request: Request) -> None:
    """Finds what is wrong with a file before any process is started, so that it is said once."""
    with located(_needed(request), request.flags) as content:
        for config in parse(content):
            Launch(_needed(request).parent, allow_imports=request.imports).builder(config).check()


def _needed(request: Request) -> Path:
    if request.params is None:
        raise ConfigError("", "a command without a file", "the path of a YAML file", "rarefy run params.yaml")
    return request.params


def _run(request: Request, watch: RunWatch) -> None:
    params = _needed(request)
    with located(params, request.flags) as content:
        _run_file(params, content, request, watch)


def _run_file(params: Path, content: dict[str, Any], request: Request, watch: RunWatch) -> None:
    configs = parse(content)
    flags = request.flags
    ckpt_path = UNSET if flags.checkpoint_path is None else flags.checkpoint_path
    if goes_on_as_saved(flags):
        configs = _as_saved(configs, ckpt_path, flags)
    messages.set_level(configs[0].init.logging.log_level)
    launch = Launch(
        params.parent,
        request.mode,
        ckpt_path,
        states_to_load(flags),
        request.imports,
        [watch, RankLog()],
    )
    if request.validate_only:
        for config in configs:
            _print_preview(launch.builder(config))
        return
    keep_freed_memory()
    for trainer in run_all(configs, launch):
        rows = [*result_rows(trainer, watch.steps_per_second)]
        if request.compare_dense and trainer.sparsity is not None and watch.has_begun:
            # A file may have several trainers, and they come out one by one.
            builders = [launch.builder(config) for config in configs if config.as_params == trainer.params]
            rows.append(_comparison(builders[0], trainer, request.compare_dense))
        if is_first():
            Console().print(result_table(rows))


def _as_saved(configs: list[TrainerConfig], ckpt_path: CheckpointPath, flags: Flags) -> list[TrainerConfig]:
    """The trainer as it was saved, with the flags that were given."""
    if len(configs) > 1:
        allowed = "it with a file of one trainer"
        raise ConfigError("--resume", f"as_saved with {len(configs)} trainers", allowed)
    # The directory is where the checkpoint was found, flag or not.
    return parse(apply_flags(as_saved(configs[0], ckpt_path), replace(flags, model_dir=None)))


def _comparison(builder: Builder, trainer: Trainer, steps: int) -> tuple[str, str]:
    ratio = speed_up(builder, trainer, steps)
    return "speed", f"{ratio:.2f} times that of the dense model ({steps} steps of each, in turns)"


def _print_preview(builder: Builder) -> None:
    tables = preview_tables(preview(builder))
    if not is_first():
        return
    print_whole(tables)
    line = f"{builder.config.path} is valid; nothing was written"
    Console().print(line, markup=False, emoji=False, soft_wrap=True)


def result_rows(trainer: Trainer, steps_per_second: float | None) -> Iterator[tuple[str, str]]:
    """What a run came to, in words."""
    metrics = trainer.last_metrics
    yield "step", f"{trainer.global_step:,}"
    for name, value in metrics.items():
        if name == "loss" or name.startswith("eval/"):
            yield name, f"{value:.4f}"
    if trainer.sparsity is not None:
        yield "actual sparsity", f"{summary(trainer.sparsity).actual_sparsity:.4f}"
    if steps_per_second is not None:
        yield "steps per second", f"{steps_per_second:.2f}"
    yield "logs", str(trainer.model_dir)
    yield "checkpoints", str(trainer.checkpoint_root)
