"""Metrics for MLflow: with a double, and with the package where it is installed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rarefy.callbacks import MLFlowLogger
from rarefy.errors import RarefyError


class FakeClient:
    """The store of all clients."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.uris: list[str | None] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = str(len(self.experiments))
        return self.experiments[name]

    def create_run(self, experiment: str, run_name: Any, tags: Any) -> Any:
        number = f"run{len(self.runs)}"
        self.runs[number] = {"experiment": experiment, "name": run_name, "tags": tags, "status": "RUNNING"}
        self.runs[number] |= {"metrics": [], "params": []}
        return SimpleNamespace(info=SimpleNamespace(run_id=number))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        self.runs[run]["metrics"] += metrics
        self.runs[run]["params"].append(list(params))

    def update_run(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    mlflow, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")

    def client(tracking_uri: str | None) -> FakeClient:
        fake.uris.append(tracking_uri)
        return fake

    vars(mlflow).update(MlflowClient=client, entities=entities)
    vars(entities).update(
        Metric=lambda name, value, now, step: (name, value, step), Param=lambda name, value: (name, value)
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return fake


def fit(trainer: Any, logger: MLFlowLogger, start: int, stop: int) -> None:
    trainer.global_step = start
    logger.on_fit_start(trainer)
    for step in range(start + 1, stop + 1):
        trainer.global_step = step
        logger.log(trainer, {"loss": 1.5, "sparsity/fc*/actual": 0.5}, step)
    logger.on_fit_end(trainer)


def test_metrics_and_configuration_reach_the_run(make_trainer, store):
    logger = MLFlowLogger("e", run_name="n", tracking_uri="sqlite:///x.db", tags={"a": 1})
    fit(make_trainer(), logger, 0, 2)
    run = store.runs["run0"]
    assert (run["experiment"], run["name"], run["tags"], store.uris) == (
        "0",
        "n",
        {"a": "1"},
        ["sqlite:///x.db"],
    )
    assert run["params"][0] == [("loop.max_steps", "100")]
    named = [(name, step) for name, _, step in run["metrics"]]
    assert named == [("loss", 1), ("sparsity/fc_/actual", 1), ("loss", 2), ("sparsity/fc_/actual", 2)]
    assert run["status"] == "KILLED"  # before the end of the run


def test_the_status_of_a_run_that_came_to_its_end(make_trainer, store):
    fit(make_trainer(), MLFlowLogger(), 98, 100)
    assert store.runs["run0"]["status"] == "FINISHED"


def test_a_resumed_fit_goes_on_in_the_same_run_and_a_new_one_does_not(make_trainer, store):
    fit(make_trainer(), MLFlowLogger(), 0, 2)
    fit(make_trainer(), MLFlowLogger(), 2, 3)
    assert [step for name, _, step in store.runs["run0"]["metrics"] if name == "loss"] == [1, 2, 3]
    fit(make_trainer(), MLFlowLogger(), 0, 1)
    assert list(store.runs) == ["run0", "run1"] and list(store.experiments) == ["rarefy"]
    del store.runs["run1"]  # somebody deleted it there
    fit(make_trainer(), MLFlowLogger(), 1, 2)
    assert list(store.runs) == ["run0", "run1"]


def test_many_parameters_go_in_parts(make_trainer, store):
    trainer = make_trainer()
    trainer.params = {"model": {f"p{n}": "x" * 600 for n in range(250)}}
    fit(trainer, MLFlowLogger(), 0, 0)
    assert [len(part) for part in store.runs["run0"]["params"]] == [100, 100, 50]
    assert store.runs["run0"]["params"][0][0] == ("model.p0", "x" * 500)


def test_a_run_that_cannot_begin_is_one_line(make_trainer, store, monkeypatch):
    def refuse(name: str) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(store, "get_experiment_by_name", refuse)
    with pytest.raises(
        RarefyError, match=r"cannot begin a run at http://x \(no route to host\); give tracking_uri"
    ):
        MLFlowLogger(tracking_uri="http://x").log(make_trainer(), {"loss": 1.0}, 1)


@pytest.mark.filterwarnings("ignore")
def test_the_real_package(make_trainer, tmp_path, monkeypatch):
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "runs").as_uri()
    fit(make_trainer(), MLFlowLogger(tracking_uri=uri), 0, 3)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("rarefy")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"loop.max_steps": "100"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(1, 1.5), (2, 1.5), (3, 1.5)]
