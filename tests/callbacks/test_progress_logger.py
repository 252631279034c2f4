"""Plain lines where nobody watches, a live bar on a terminal."""

import io
import re
import sys
import types
from typing import Any

import pytest
from rich.console import Console

from rarefy.algorithms.group import Group
from rarefy.callbacks import ProgressLogger
from rarefy.callbacks.loggers.progress_logger import BAR_WIDTH, final_target_of, next_update_of
from rarefy.methods.gmp import GMP
from rarefy.methods.rigl import RigL
from rarefy.methods.static import Static

METRICS = {"loss": 2.34567, "lr": 3e-4, "tokens_per_second": 12345.6, "grad_norm": 1.0}


class Clock:
    """One second a look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def run(trainer, steps: int, *, terminal: bool = False, metrics: dict[str, float] = METRICS) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None)
    logger = ProgressLogger(console, clock=Clock())
    logger.on_train_start(trainer)
    trainer.loggers = [logger]
    for _ in range(steps):
        trainer.log_metrics_dict(metrics)
        trainer.step(logger)
    logger.on_validate_end(trainer, {"eval/loss": 1.25, "eval/[x]": 3.0})
    logger.on_fit_end(trainer)
    return output.getvalue()


def test_one_plain_line_a_log_step(make_trainer):
    lines = run(make_trainer(log_every=2), 5).splitlines()
    assert lines == [
        "step 2/100 · loss 2.3457 · lr 0.0003 · 12,346 tokens/s · ETA 0:00:49",
        "step 4/100 · loss 2.3457 · lr 0.0003 · 12,346 tokens/s · ETA 0:00:48",
        "step 5 validation · eval/loss 1.2500 · eval/[x] 3.0000",
    ]


def test_what_is_unknown_is_left_out(make_trainer):
    line = run(make_trainer(), 1, metrics={"samples_per_second": 0.512}).splitlines()[0]
    assert line == "step 1/100 · 0.512 samples/s · ETA 0:01:39"


def test_a_sparse_run_shows_sparsity_and_the_next_update(make_trainer):
    trainer = make_trainer(RigL(0.5, update={"freq": 3}, seed=0))
    lines = run(trainer, 3).splitlines()
    assert "lr 0.0003 · sparsity 0.5000 → 0.5000 · next update 3 · 12,346 tokens/s" in lines[0]
    assert "next update 6" in lines[2]


def test_sparsity_goes_from_what_was_measured_to_the_final_target(make_trainer):
    cubic = {"type": "polynomial", "init": 0.0, "final": 0.75, "start": 0, "stop": 50}
    lines = run(make_trainer(GMP(cubic, update={"freq": 2})), 3).splitlines()
    assert "sparsity 0.0000 → 0.7500 · next update 2" in lines[0]
    assert "→ 0.7500 · next update 4" in lines[2] and "sparsity 0.0000" not in lines[2]


def test_the_final_target_is_weighted_by_size(make_trainer):
    trainer = make_trainer(
        Group([Static(0.5, param_filter="0.weight"), Static(0.25, param_filter="1.weight")])
    )
    assert final_target_of(trainer) == pytest.approx((0.5 * 48 + 0.25 * 24) / 72)


def test_the_final_target_is_that_of_the_last_update_within_the_run(make_trainer):
    linear = {"type": "linear", "init": 0.0, "slope": 0.005}
    assert final_target_of(make_trainer(GMP(linear, update={"freq": 40}))) == pytest.approx(0.4)
    assert final_target_of(make_trainer(GMP(linear, update={"freq": 40, "start": 200}))) == 0
    every_30th = make_trainer(GMP([0.1, 0.2, 0.3], update=lambda step: step % 30 == 0))
    assert final_target_of(every_30th) == pytest.approx(0.1)


def test_actual_is_measured(make_trainer):
    trainer = make_trainer(Static(0.5))
    trainer.model[0].weight_mask.fill_(True)
    assert "sparsity 0.1667 → 0.5000" in run(trainer, 1)


@pytest.mark.parametrize("update", [{"freq": 1, "stop": 2}, {"freq": 200, "start": 200}])
def test_no_next_update_after_the_last_one_within_the_run(make_trainer, update):
    trainer = make_trainer(GMP({"type": "linear", "init": 0.1, "slope": 0.001}, update=update))
    assert "next update" not in run(trainer, 2)
    assert next_update_of(trainer) is None


def test_a_dense_run_has_no_sparsity(make_trainer):
    assert "sparsity" not in run(make_trainer(), 1)


def test_the_bar_counts_every_step_and_names_no_update_that_has_come(make_trainer):
    trainer = make_trainer(RigL(0.5, update={"freq": 3}, seed=0), log_every=5)
    output = io.StringIO()
    logger = ProgressLogger(Console(file=output, force_terminal=True, width=200, color_system=None))
    trainer.loggers = [logger]
    logger.on_train_start(trainer)
    for _ in range(7):
        trainer.step(logger)
    assert logger._bar is not None
    assert logger._bar.tasks[0].completed == 7
    description = logger._bar.tasks[0].description
    logger.on_fit_end(trainer)
    assert description.startswith("step 7/100 ·") and "next update 9" in description


def test_an_update_that_a_skipped_step_put_off_is_still_the_next(make_trainer):
    trainer = make_trainer(RigL(0.5, update={"freq": 3}, seed=0))
    logger = ProgressLogger(Console(file=io.StringIO(), force_terminal=True))
    logger.on_train_start(trainer)
    trainer.step(logger)
    trainer.global_step = 50
    assert logger._coming == 3 and not logger._is_outdated(trainer)
    logger.on_fit_end(trainer)


def test_a_terminal_gets_a_live_bar(make_trainer):
    trainer = make_trainer()
    trainer.total_steps = 4
    output = run(trainer, 3, terminal=True)
    assert "\x1b[" in output and "━" in output
    assert "step 3/4 · loss 2.3457" in output and "eval/[x] 3.0000" in output


def test_a_narrow_terminal_shows_everything(make_trainer):
    trainer, output = make_trainer(RigL(0.5, update={"freq": 3}, seed=0)), io.StringIO()
    logger = ProgressLogger(Console(file=output, force_terminal=True, width=60, color_system=None))
    trainer.total_steps = 2
    logger.log(trainer, METRICS, 1)
    logger.on_train_start(trainer)
    trainer.step(logger)
    logger.on_fit_end(trainer)
    assert all(word in output.getvalue() for word in ("━" * 9, "loss", "sparsity", "tokens/s", "ETA"))


def test_the_bar_ends_with_the_fit_and_may_start_again(make_trainer):
    trainer = make_trainer()
    output = io.StringIO()
    logger = ProgressLogger(Console(file=output, force_terminal=True, width=80))
    for _ in range(2):
        shown = len(output.getvalue())
        logger.on_train_start(trainer)
        trainer.step(logger)
        logger.on_fit_end(trainer)
        assert "ETA" in output.getvalue()[shown:]
    ended = output.getvalue()
    logger.on_fit_end(trainer)
    assert output.getvalue() == ended


def test_a_validation_without_a_fit_is_printed(make_trainer):
    output = io.StringIO()
    ProgressLogger(Console(file=output)).on_validate_end(make_trainer(), {"eval/loss": 1.0})
    assert output.getvalue() == "step 0 validation · eval/loss 1.0000\n"


def test_eighty_columns_hold_the_bar_and_break_no_fact(make_trainer):
    trainer, output = make_trainer(RigL(0.5, update={"freq": 3}, seed=0)), io.StringIO()
    logger = ProgressLogger(Console(file=output, force_terminal=True, width=80, color_system=None))
    trainer.loggers = [logger]
    logger.on_train_start(trainer)
    trainer.log_metrics_dict(METRICS)
    trainer.step(logger)
    assert logger._bar is not None
    lines = logger._bar.tasks[0].description.splitlines()
    logger.on_fit_end(trainer)
    assert len(lines) > 1 and all(len(line) <= 80 - BAR_WIDTH - 1 for line in lines)
    assert any("sparsity 0.5000 → 0.5000" in line for line in lines)
    shown = [
        re.sub(r"\x1b\[[\d;?]*\w", "", line) for line in output.getvalue().replace("\r", "\n").splitlines()
    ]
    assert max(map(len, shown)) <= 80


class Cell:
    """Stands for IPython's display handle."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, data, raw):
        assert raw
        self.shown.append(data["text/plain"])


def test_a_notebook_has_one_output_that_is_renewed(make_trainer, monkeypatch):
    cells: list[Cell] = []

    def display(data, raw, display_id):
        assert raw and display_id and data["text/plain"]
        cells.append(Cell())
        return cells[-1]

    ipython: Any = types.ModuleType("IPython")
    ipython.display = types.SimpleNamespace(display=display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    output, trainer = io.StringIO(), make_trainer(Static(0.5))
    logger = ProgressLogger(Console(file=output, force_jupyter=True, width=200))
    trainer.loggers = [logger]
    logger.on_train_start(trainer)
    trainer.step(logger)
    logger.on_validate_end(trainer, {"eval/loss": 1.0})
    trainer.step(logger)
    logger.on_fit_end(trainer)
    [cell] = cells
    assert output.getvalue() == "" and len(cell.shown) == 3
    assert cell.shown[0].startswith("step 1/100 · sparsity 0.5000 → 0.5000 · ETA")
    first, second = cell.shown[-1].splitlines()
    assert first == "step 1 validation · eval/loss 1.0000" and second.startswith("step 2/100")
