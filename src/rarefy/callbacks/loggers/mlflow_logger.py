"""Metrics for MLflow, on a server or in a folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rarefy.callbacks.events import Logger
from rarefy.callbacks.loggers.run_identity import flat, known_run, plain_name, remember_run
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.errors import RarefyError
from rarefy.imports import require

FILE_NAME = "mlflow.json"
_BATCH = 100  # parameters that one call may log
_LONGEST = 500  # letters of a parameter's value
Part = TypeVar("Part")


class MLFlowLogger(Logger):
    """Sends metrics and the configuration to MLflow; a resumed fit goes on in the same run.

    Args:
        experiment_name: the experiment; made where it is missing.
        run_name: what the run is called; MLflow makes a name up when None.
        tracking_uri: a server, a database or a folder; MLFLOW_TRACKING_URI of the environment, or MLflow's own default,
            when None.
        tags: names and values to find it by.
    """

    def __init__(
        self,
        experiment_name: str = "rarefy",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        self._experiment = experiment_name
        self._run_name = run_name
        self._uri = tracking_uri
        self._tags = {str(name): str(value) for name, value in (tags or {}).items()}
        self._client: Any = None
        self._run: str | None = None

    def on_fit_start(self, trainer: TrainerView) -> None:
        """Begins a run, or goes on with that of the fit before."""
        self._finish("FINISHED")
        self._begin(trainer)

    def log(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        """Sends the metrics of a step; letters that MLflow refuses in a name become `_`."""
        if self._run is None:
            self._begin(trainer)
        now = int(time.time() * 1000)
        kind = require("mlflow", "mlflow.entities").Metric
        batch = [kind(plain_name(name), float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=batch)

    def on_fit_end(self, trainer: TrainerView) -> None:
        """The run is over, finished or not."""
        self._finish("FINISHED" if trainer.global_step >= trainer.total_steps else "KILLED")

    def _begin(self, trainer: TrainerView) -> None:
        mlflow = require("mlflow", "mlflow")
        file = trainer.model_dir / FILE_NAME
        try:
            self._client = mlflow.MlflowClient(tracking_uri=self._uri)
            known = known_run(file, trainer.global_step)
            self._run = known if known and self._reopen(known) else self._create(trainer)
        # MLflow has errors of its own for each kind of store.
        except Exception as error:
            where = self._uri or "its tracking server"
            raise RarefyError(
                f"MLFlowLogger: MLflow cannot begin a run at {where} ({' '.join(str(error).split())}); "
                "give tracking_uri: sqlite:///mlflow.db or the address of a server"
            ) from error
        remember_run(file, self._run)

    def _reopen(self, run: str) -> bool:
        """Whether the run is still there; it is running again."""
        try:
            self._client.update_run(run, status="RUNNING")
        except Exception:  # deleted there, or another server: MLflow has an error for each kind of store
            return False
        return True

    def _create(self, trainer: TrainerView) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        number = self._client.create_experiment(self._experiment) if found is None else found.experiment_id
        run = str(self._client.create_run(number, run_name=self._run_name, tags=self._tags).info.run_id)
        kind = require("mlflow", "mlflow.entities").Param
        params = [kind(plain_name(name), value[:_LONGEST]) for name, value in flat(trainer.params)]
        for part in _parts(params):
            self._client.log_batch(run, params=part)
        return run

    def _finish(self, status: str) -> None:
        if self._run is not None:
            self._client.set_terminated(self._run, status=status)
            self._run = None


def _parts(entries: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """As many at once as MLflow takes."""
    for start in range(0, len(entries), _BATCH):
        yield entries[start : start + _BATCH]
