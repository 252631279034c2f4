"""Signals: finish the step, save, say where; a second one stops at once."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forks import Script
from rarefy.callbacks.events import Callback
from rarefy.checkpoint.directory import load, newest_valid
from rarefy.disk import LOCK_NAME
from rarefy.trainer import signals
from rarefy.trainer.session import Progress
from rarefy.trainer.signals import Interrupted, SignalGuard
from rarefy.trainer.skipped_steps import SkippedSteps
from rarefy.trainer.trainer import Trainer

SCRIPT = """
import os, signal, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader
from rarefy.callbacks.events import Callback
from rarefy.trainer.signals import Interrupted
from rarefy.trainer.trainer import Trainer

class Net(nn.Linear):
    def forward(self, batch):
        return super().forward(batch).square().mean()

class Signals(Callback):
    def on_train_batch_start(self, trainer, batch, micro_step):
        if trainer.global_step == 3:
            for name in sys.argv[2:]:
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(0.05)

if __name__ == "__main__":
    torch.manual_seed(0)
    trainer = Trainer(
        model_dir=sys.argv[1], model=lambda: Net(4, 4), device="cpu", seed=1, sparsity=0.5,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        loop={"max_steps": 8}, callbacks=[Signals()], loggers=[],
    )
    try:
        trainer.fit(DataLoader(torch.randn(6, 4), batch_size=2, num_workers=1))
    except Interrupted as stop:
        print(stop)
        sys.exit(stop.exit_code)
"""


def run_script(folder: Path, *signals: str) -> tuple[int, str, str]:
    """Its exit code, what it printed, and what it complained of."""
    return Script(SCRIPT, str(folder / "run"), *signals, folder=folder).end(60)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path: Path, name: str, code: int) -> None:
    exit_code, said, complaints = run_script(tmp_path, name)
    where = tmp_path / "run" / "checkpoint_4"
    assert exit_code == code, complaints
    assert said == f"stopped by {name} after step 4, saved in {where}; the same command goes on from there\n"
    key = "Ctrl-C" if name == "SIGINT" else name
    told = f"\n{key}: finishing step 4, then saving; {key} again stops at once without saving\n"
    assert told in complaints
    assert load(where).state["progress"]["global_step"] == 4


def test_a_second_signal_stops_at_once_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    exit_code, _, _ = run_script(tmp_path, "SIGTERM", "SIGTERM")
    assert exit_code == -signal.SIGTERM
    assert newest_valid(tmp_path / "run", pytest.fail) is None
    assert [one.name for one in (tmp_path / "run").iterdir()] == [LOCK_NAME]


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return super().forward(batch).square().mean()


class KillsIn(Callback):
    """Sends SIGTERM to this process in the n-th call of one hook."""

    def __init__(self, hook: str, call: int) -> None:
        self.calls, self.call = 0, call
        setattr(self, hook, self._hear)

    def _hear(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.call:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_start(self, trainer: Any, batch: object, micro_step: int) -> None: ...

    def on_validate_batch_end(self, trainer: Any, outputs: object, batch: object) -> None: ...

    def on_validate_end(self, trainer: Any, metrics: dict) -> None: ...


def make(folder: Path, *callbacks: Callback) -> Trainer:
    return Trainer(
        model_dir=folder,
        model=Net,
        device="cpu",
        callbacks=callbacks,
        loggers=[],
        seed=1,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        loop={"max_steps": 6, "eval_frequency": 3, "grad_accum_steps": 2},
    )


DATA = [torch.full((2, 4), float(value)) for value in range(5)]


@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_accumulation_window_is_finished_first(tmp_path: Path, call: int) -> None:
    with pytest.raises(Interrupted) as stop:
        make(tmp_path / "parts", KillsIn("on_train_batch_start", call)).fit(DATA)
    assert stop.value.step == (call + 1) // 2
    parts, whole = make(tmp_path / "parts"), make(tmp_path / "whole")
    parts.fit(DATA)
    whole.fit(DATA)
    assert torch.equal(parts.model.weight, whole.model.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(("call", "step"), [(1, 3), (2, 3), (3, 3), (5, 6)])
def test_a_validation_is_cut_short_and_made_up_for(tmp_path: Path, call: int, step: int) -> None:
    with pytest.raises(Interrupted) as stop:
        make(tmp_path, KillsIn("on_validate_batch_end", call)).fit(DATA, DATA[:3])
    is_whole = call == 3
    assert stop.value.step == step
    assert load(stop.value.checkpoint).state["progress"]["validation_due"] is not is_whole
    ends: list[int] = []

    class Watch(Callback):
        def on_validate_end(self, trainer: Any, metrics: dict) -> None:
            ends.append(trainer.global_step)

    again = make(tmp_path, Watch())
    again.fit(DATA, DATA[:3])
    assert ends == ([6] if is_whole or step == 6 else [3, 6])
    assert again.global_step == 6
    # Made up for once: a run that is over has nothing to do.
    assert not load(tmp_path / "checkpoint_6").state["progress"]["validation_due"]
    done = list(ends)
    make(tmp_path, Watch()).fit(DATA, DATA[:3])
    assert ends == done


def test_a_failing_validation_loses_nothing(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_validate_batch_end(self, trainer: Any, outputs: object, batch: object) -> None:
            raise KeyError("broken")

    trainer = make(tmp_path, Breaks())
    with pytest.raises(KeyError, match="broken"):
        trainer.fit(DATA, DATA)
    trainer.writer.wait()
    assert load(tmp_path / "checkpoint_3").state["progress"]["validation_due"]


def test_handlers_come_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with SignalGuard():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(Interrupted):
        make(tmp_path, KillsIn("on_train_batch_start", 1)).fit(DATA)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_train_without_handlers(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    thread = threading.Thread(target=trainer.fit, args=(DATA,))
    thread.start()
    thread.join()
    assert trainer.global_step == 6


def test_a_second_signal_has_its_ordinary_effect() -> None:
    # A shell that starts the tests in its background lets them ignore Ctrl-C: then that would be the ordinary effect.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), SignalGuard() as guard:
            signal.raise_signal(signal.SIGINT)
            assert guard.received == signal.SIGINT
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_torchrun_repeats_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    now = [100.0]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setattr(signals, "monotonic", lambda: now[0])
    try:
        with pytest.raises(KeyboardInterrupt), SignalGuard() as guard:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert guard.received == signal.SIGINT
            now[0] += 60
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert now == [160.0]


def test_an_interrupted_validation_is_named_as_what_is_left() -> None:
    progress = Progress(SkippedSteps(1), global_step=7)
    assert progress.doing == "finishing step 8"
    progress.validation_due = True
    assert progress.doing == "leaving the validation"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_blank_lines_keep_a_live_bar_from_wiping_the_message_out(
    monkeypatch: pytest.MonkeyPatch, on_terminal: bool
) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(os, "isatty", lambda descriptor: on_terminal and descriptor == 2)
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(data) or len(data))
    with SignalGuard(lambda: "finishing step 3") as guard:
        signal.raise_signal(signal.SIGINT)
    assert guard.received == signal.SIGINT
    line = b"\nCtrl-C: finishing step 3, then saving; Ctrl-C again stops at once without saving\n"
    assert written == [line + b"\n" * (3 if on_terminal else 0)]
