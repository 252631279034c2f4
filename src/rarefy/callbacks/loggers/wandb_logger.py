"""Metrics for Weights & Biases, online or offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from rarefy.callbacks.events import Logger
from rarefy.callbacks.loggers.run_identity import known_run, remember_run
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.errors import ConfigError, RarefyError
from rarefy.imports import require
from rarefy.validation import shorten

Mode = Literal["online", "offline", "disabled"]
FILE_NAME = "wandb.json"
STEP = "global_step"


class WandbLogger(Logger):
    """Sends metrics and the configuration to Weights & Biases; a resumed fit goes on in the same run.

    The x axis is `global_step`. `mode: offline` needs neither network nor account: `wandb sync` uploads the run later.

    Args:
        project: the project; that of the environment when None.
        run_name: what the run is called there; wandb makes a name up when None.
        group: the group of runs that it belongs to, such as a sweep.
        tags: words to find it by.
        mode: `online`, `offline` or `disabled`; WANDB_MODE of the environment when None.
        run_id: the run to go on with, instead of the one of the model directory.
        job_type: what kind of run it is.
        resume: as `wandb.init` takes it; `allow` when None.

    Raises:
        ConfigError: another `mode`.
    """

    def __init__(
        self,
        project: str | None = None,
        run_name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        mode: Mode | None = None,
        run_id: str | None = None,
        job_type: str | None = None,
        resume: str | None = None,
    ) -> None:
        if mode is not None and mode not in get_args(Mode):
            raise ConfigError("mode", shorten(mode), f"one of {', '.join(get_args(Mode))}", "mode: offline")
        named = {"project": project, "name": run_name, "group": group, "job_type": job_type, "mode": mode}
        self._options: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if tags:
            self._options["tags"] = list(tags)
        self._run_id = run_id
        self._resume = resume or "allow"
        self._run: Any = None

    def on_fit_start(self, trainer: TrainerView) -> None:
        """Begins a run, or goes on with that of the fit before."""
        self._finish()
        self._run = self._begin(trainer)

    def log(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        """Sends the metrics of a step."""
        if self._run is None:
            self._run = self._begin(trainer)
        self._run.log({STEP: step, **{name: float(value) for name, value in metrics.items()}})

    def on_fit_end(self, trainer: TrainerView) -> None:
        """Waits until everything is sent, or written."""
        self._finish()

    def _begin(self, trainer: TrainerView) -> Any:
        wandb = require("wandb", "wandb")
        file = trainer.model_dir / FILE_NAME
        trainer.model_dir.mkdir(parents=True, exist_ok=True)
        known = self._run_id or known_run(file, trainer.global_step)
        going_on = {"id": known, "resume": self._resume} if known else {}
        try:
            run = wandb.init(
                dir=str(trainer.model_dir), config=dict(trainer.params), **going_on, **self._options
            )
        except Exception as error:
            raise RarefyError(
                f"WandbLogger: wandb cannot begin a run ({' '.join(str(error).split())}); "
                "log in with `wandb login`, or give mode: offline"
            ) from error
        remember_run(file, str(run.id))
        # steps may come twice after a resume from an earlier checkpoint, which wandb's own counter refuses
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        return run

    def _finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
