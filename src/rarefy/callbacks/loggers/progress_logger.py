"""What a person watches while a run goes on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rarefy.callbacks.events import Logger
from rarefy.callbacks.log_sparsity import actual_of, algorithms_of, parameters_of
from rarefy.callbacks.planned_sparsity import final_target
from rarefy.callbacks.trainer_view import TrainerView

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

BAR_WIDTH = 20
RATES = {"tokens_per_second": "tokens/s", "samples_per_second": "samples/s"}


class ProgressLogger(Logger):
    """A live bar on a terminal, one line that renews itself in a notebook, elsewhere a plain line a log step.

    step 60/200 · loss 2.9913 · lr 0.0029 · sparsity 0.7000 → 0.9000 · next update 75 · 11,960 tokens/s · ETA 0:00:36

    Sparsity is what was measured, and the target that the run ends with. The bar's step and ETA move with every
    step, the rest on log steps. Where the terminal is narrow, facts go on in a further line, none is broken.

    Args:
        console: where to print; standard output when None.
        clock: seconds since any fixed moment.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = perf_counter) -> None:
        # Here, as rich takes long to import and most users of this room print nothing.
        from rich.console import Console

        self._console = console or Console()
        self._clock = clock
        self._metrics: dict[str, float] = {}
        self._bar: Progress | None = None
        self._cell: Any = None
        self._first_step = 0
        self._since = 0.0
        self._facts: list[str] = []
        self._results: list[str] = []
        self._line = ""
        self._final = 0.0
        self._coming: int | None = None

    def on_train_start(self, trainer: TrainerView) -> None:
        """Shows the bar."""
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        # Steps of an earlier session took their time elsewhere.
        self._first_step = trainer.global_step
        self._since = self._clock()
        self._facts = []
        self._final = final_target_of(trainer)
        self._results = []
        self._line = ""
        if self._console.is_terminal:
            bar = BarColumn(BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH))
            text = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1))
            self._bar = Progress(bar, text, console=self._console, expand=True)
            self._bar.add_task("", total=trainer.total_steps, completed=trainer.global_step)
            self._bar.start()
        elif self._console.is_jupyter:
            self._cell = shown_in_a_cell("...")

    def log(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        """Keeps the latest value of each metric."""
        self._metrics |= metrics

    def on_train_batch_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """Moves the bar; renews the metrics on log steps."""
        if trainer.is_log_step or self._is_outdated(trainer):
            self._facts = [*metric_facts(self._metrics, self._sparsity_facts(trainer))]
        if trainer.is_log_step or self._bar is not None:
            step = f"step {trainer.global_step}/{trainer.total_steps}"
            self._show(trainer, [step, *self._facts, f"ETA {self._remaining(trainer)}"])

    def on_validate_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """Prints the results, on a terminal above the bar."""
        facts = [f"{name} {float(value):.4f}" for name, value in metrics.items()]
        line = " · ".join([f"step {trainer.global_step} validation", *facts])
        if self._cell is not None:
            self._results.append(line)
            self._renew(self._line)
        else:
            # Names of metrics are the user's: brackets in them are no markup.
            self._console.print(line, markup=False, soft_wrap=True)

    def on_fit_end(self, trainer: TrainerView) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._cell = None

    def _is_outdated(self, trainer: TrainerView) -> bool:
        """Whether the bar names an update step that has come."""
        if self._bar is None or self._coming is None or trainer.global_step < self._coming:
            return False
        return next_update_of(trainer) != self._coming

    def _sparsity_facts(self, trainer: TrainerView) -> list[str]:
        parameters = parameters_of(trainer)
        if not parameters:
            return []
        self._coming = next_update_of(trainer)
        actual = actual_of(parameters)["sparsity/model/actual"]
        update = [] if self._coming is None else [f"next update {self._coming}"]
        return [f"sparsity {actual:.4f} → {self._final:.4f}", *update]

    def _show(self, trainer: TrainerView, facts: Sequence[str]) -> None:
        if self._bar is not None:
            text = wrapped(facts, self._console.width - BAR_WIDTH - 1)
            (task,) = self._bar.task_ids
            self._bar.update(task, completed=trainer.global_step, description=text)
        elif self._cell is not None:
            self._renew(" · ".join(facts))
        else:
            self._console.print(" · ".join(facts), markup=False, soft_wrap=True, highlight=False)

    def _renew(self, line: str) -> None:
        """Replaces what the notebook's cell shows: the results of validations, and how far the run is."""
        self._line = line
        self._cell.update({"text/plain": "\n".join([*self._results, line])}, raw=True)

    def _remaining(self, trainer: TrainerView) -> timedelta:
        per_step = (self._clock() - self._since) / max(trainer.global_step - self._first_step, 1)
        return timedelta(seconds=round(per_step * (trainer.total_steps - trainer.global_step)))


def wrapped(facts: Sequence[str], width: int) -> str:
    """Facts in as few lines of a width as hold them; a longer one has a line of its own.

    Example:
        >>> print(wrapped(["step 1/9", "loss 2.5", "lr 0.1"], 20))
        step 1/9 · loss 2.5
        lr 0.1
    """
    lines: list[str] = []
    for fact in facts:
        joined = f"{lines[-1]} · {fact}" if lines else fact
        if lines and len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(fact)
    return "\n".join(lines)


def shown_in_a_cell(text: str) -> Any:
    """A notebook's output whose content can be replaced: IPython's display handle."""
    # A notebook has brought IPython along; rarefy does not depend on it.
    display = importlib.import_module("IPython.display").display
    return display({"text/plain": text}, raw=True, display_id=True)


def metric_facts(metrics: Mapping[str, float], sparsity: Sequence[str] = ()) -> Iterator[str]:
    """The metrics that matter, each as a few words.

    Args:
        metrics: the latest values; `loss`, `lr` and the first rate that is there are used.
        sparsity: what to say between them.

    Example:
        >>> list(metric_facts({"loss": 2.5, "lr": 3e-4, "tokens_per_second": 12345.6}))
        ['loss 2.5000', 'lr 0.0003', '12,346 tokens/s']
    """
    if "loss" in metrics:
        yield f"loss {metrics['loss']:.4f}"
    if "lr" in metrics:
        yield f"lr {metrics['lr']:.3g}"
    yield from sparsity
    rate = next((name for name in RATES if name in metrics), None)
    if rate is not None:
        yield f"{_readable(metrics[rate])} {RATES[rate]}"


def _readable(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def next_update_of(trainer: TrainerView) -> int | None:
    """The next step of the run on which a topology may change."""
    updates = [leaf.next_update_step(leaf.step) for leaf in algorithms_of(trainer) if leaf.dynamic]
    return min((step for step in updates if step is not None and step <= trainer.total_steps), default=None)


def final_target_of(trainer: TrainerView) -> float:
    """The target over all sparse parameters at the end of the run; 0 for a dense run."""
    leaves = algorithms_of(trainer)
    sizes = [sum(parameter.shape.numel() for parameter in leaf.parameters.values()) for leaf in leaves]
    targets = [final_target(leaf, trainer.total_steps) for leaf in leaves]
    return sum(target * size for target, size in zip(targets, sizes, strict=True)) / max(sum(sizes), 1)
