"""Metrics for Weights & Biases: with a double, and with the package where it is installed."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rarefy.callbacks import WandbLogger
from rarefy.callbacks.registry import Registered, build_callbacks
from rarefy.errors import ConfigError, RarefyError


class FakeRun:
    def __init__(self, number: str) -> None:
        self.id = number
        self.logged: list[dict[str, float]] = []
        self.metrics: list[tuple[str, Any]] = []
        self.is_finished = False

    def log(self, metrics: dict[str, float]) -> None:
        self.logged.append(metrics)

    def define_metric(self, name: str, step_metric: Any = None) -> None:
        self.metrics.append((name, step_metric))

    def finish(self) -> None:
        self.is_finished = True


class FakeWandb:
    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.runs: list[FakeRun] = []

    def init(self, **options: Any) -> FakeRun:
        self.begun.append(options)
        self.runs.append(FakeRun(options.get("id", f"run{len(self.runs)}")))
        return self.runs[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    double = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", double)
    return double


def fit(trainer: Any, logger: WandbLogger, start: int, stop: int) -> None:
    trainer.global_step = start
    logger.on_fit_start(trainer)
    for step in range(start + 1, stop + 1):
        logger.log(trainer, {"loss": 1.5}, step)
    logger.on_fit_end(trainer)


def test_metrics_and_configuration_reach_the_run(make_trainer, tmp_path, fake):
    logger = WandbLogger(project="p", run_name="n", group="g", tags=("a", "b"), mode="offline", job_type="j")
    fit(make_trainer(), logger, 0, 2)
    [begun], [run] = fake.begun, fake.runs
    assert begun == {
        "dir": str(tmp_path),
        "config": {"loop": {"max_steps": 100}},
        **{"project": "p", "name": "n", "group": "g", "tags": ["a", "b"], "mode": "offline", "job_type": "j"},
    }
    assert run.logged == [{"global_step": 1, "loss": 1.5}, {"global_step": 2, "loss": 1.5}]
    assert run.metrics == [("global_step", None), ("*", "global_step")]
    assert run.is_finished


def test_a_resumed_fit_goes_on_in_the_same_run_and_a_new_one_does_not(make_trainer, tmp_path, fake):
    fit(make_trainer(), WandbLogger(), 0, 2)
    fit(make_trainer(), WandbLogger(), 2, 4)
    fit(make_trainer(), WandbLogger(), 0, 1)
    assert [(one.get("id"), one.get("resume")) for one in fake.begun] == [
        (None, None),
        ("run0", "allow"),
        (None, None),
    ]
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"run": "run2"}


@pytest.mark.parametrize("text", ["{", "[]", '{"run": 3}', pytest.param("[" * 100_000, id="nested")])
def test_a_damaged_file_begins_a_new_run(make_trainer, tmp_path, fake, text):
    (tmp_path / "wandb.json").write_text(text)
    fit(make_trainer(), WandbLogger(), 2, 3)
    assert "id" not in fake.begun[0]


def test_a_run_may_be_named(make_trainer, fake):
    fit(make_trainer(), WandbLogger(run_id="mine", resume="must"), 0, 1)
    assert (fake.begun[0]["id"], fake.begun[0]["resume"]) == ("mine", "must")


def test_validation_alone_begins_a_run(make_trainer, fake):
    logger = WandbLogger()
    logger.log(make_trainer(), {"eval/loss": 2.0}, 7)
    assert fake.runs[0].logged == [{"global_step": 7, "eval/loss": 2.0}]


def test_a_run_that_cannot_begin_is_one_line(make_trainer, monkeypatch):
    def init(**_: Any) -> None:
        raise OSError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(RarefyError, match=r"cannot begin a run \(no API key configured\); .* mode: offline"):
        WandbLogger().on_fit_start(make_trainer())


# Unquoted, `off` is false to YAML.
@pytest.mark.parametrize(("mode", "shown"), [("off", "'off'"), (False, "false")])
def test_another_mode_is_refused(monkeypatch, mode: Any, shown: str):
    monkeypatch.setattr(Registered, "is_usable", True)
    entry = [{"WandbLogger": {"mode": mode}}]
    message = rf"loggers\[0\].WandbLogger.mode: {shown} .* online, offline, disabled"
    with pytest.raises(ConfigError, match=message):
        build_callbacks(entry, [], path="loggers", kind="loggers")


@pytest.mark.filterwarnings("ignore")
def test_the_real_package_offline(make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    fit(make_trainer(), WandbLogger(project="rarefy", mode="offline"), 0, 3)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
