"""What a person watches while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from rarefy.training.callbacks.log_sparsity import actual_of, algorithms_of, parameters_of
from rarefy.training.events import Logger
from rarefy.training.view import TrainerView

BAR_WIDTH = 20
RATES = {"tokens_per_second": "tokens/s", "samples_per_second": "samples/s"}


class ProgressLogger(Logger):
    """A live bar on a terminal; elsewhere one plain line a log step.

    Args:
        console: where to print; standard output when None.
        clock: seconds since any fixed moment.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = perf_counter) -> None:
        self._console, self._clock = console or Console(), clock
        self._metrics: dict[str, float] = {}
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._first_step, self._since = 0, 0.0

    def on_train_start(self, trainer: TrainerView) -> None:
        """Shows the bar."""
        self._first_step, self._since = trainer.global_step, self._clock()
        if self._console.is_terminal:
            bar = BarColumn(BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH))
            text = TextColumn("{task.description}", table_column=Column(ratio=1))
            self._bar = Progress(bar, text, console=self._console, expand=True)
            self._task = self._bar.add_task("", total=trainer.total_steps, completed=trainer.global_step)
            self._bar.start()

    def log(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        """Keeps the latest value of each metric."""
        self._metrics |= metrics

    def on_train_batch_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """Moves the bar; shows the metrics on log steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step)
        if trainer.is_log_step:
            self._show(" · ".join([*step_facts(trainer, self._metrics), f"ETA {self._remaining(trainer)}"]))

    def on_validate_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """Prints the results, on a terminal above the bar."""
        facts = [f"{name} {float(value):.4f}" for name, value in metrics.items()]
        self._console.print(
            escape(" · ".join([f"step {trainer.global_step} validation", *facts])), soft_wrap=True
        )

    def on_fit_end(self, trainer: TrainerView) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, line: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=escape(line))
        else:
            self._console.print(escape(line), soft_wrap=True, highlight=False)

    def _remaining(self, trainer: TrainerView) -> timedelta:
        per_step = (self._clock() - self._since) / max(trainer.global_step - self._first_step, 1)
        return timedelta(seconds=round(per_step * (trainer.total_steps - trainer.global_step)))


def step_facts(trainer: TrainerView, metrics: Mapping[str, float]) -> list[str]:
    """What is known about the present step, each as a few words.

    Args:
        trainer: the run.
        metrics: the latest values; `loss`, `lr` and the first rate that is there are used.
    """
    facts = [f"step {trainer.global_step}/{trainer.total_steps}"]
    facts += [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    facts += [f"lr {metrics['lr']:.3g}"] if "lr" in metrics else []
    rate = next((name for name in RATES if name in metrics), None)
    return facts + sparsity_facts(trainer) + ([f"{_readable(metrics[rate])} {RATES[rate]}"] if rate else [])


def _readable(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def sparsity_facts(trainer: TrainerView) -> list[str]:
    """Actual and target sparsity over all sparse parameters, and the next update step if there is one."""
    leaves, parameters = algorithms_of(trainer), parameters_of(trainer)
    if not parameters:
        return []
    sizes = [sum(parameter.mask.numel() for parameter in leaf.parameters.values()) for leaf in leaves]
    target = sum(leaf.target_sparsity * size for leaf, size in zip(leaves, sizes, strict=True)) / max(
        sum(sizes), 1
    )
    actual = actual_of(parameters)["sparsity/model/actual"]
    updates = [leaf.next_update_step(leaf.step) for leaf in leaves if leaf.dynamic]
    coming = [step for step in updates if step is not None and step <= trainer.total_steps]
    return [f"sparsity {actual:.4f} → {target:.4f}", *([f"next update {min(coming)}"] if coming else [])]
