"""The Trainer: model, optimizer, sparsity and data in a loop that can stop and go on at any step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rarefy import distributed
from rarefy.algorithms.summary import html_table, one_line
from rarefy.callbacks.dispatch import Dispatcher
from rarefy.callbacks.events import Callback, Logger
from rarefy.callbacks.loggers.progress_logger import ProgressLogger
from rarefy.checkpoint.chosen import UNSET, CheckpointPath, Unset, find_all
from rarefy.checkpoint.directory import CheckpointConfig, CheckpointWriter
from rarefy.trainer import state
from rarefy.trainer.evaluation import Validations, close_validations, evaluate_all, open_validations
from rarefy.trainer.feed import Loader, TrainFeed
from rarefy.trainer.fit import Fit, plan_fit
from rarefy.trainer.plan import LoggingConfig, LoopConfig
from rarefy.trainer.precision import Precision, PrecisionConfig
from rarefy.trainer.session import Progress, Session, Sparsity
from rarefy.trainer.session_builder import (
    Ingredients,
    Model,
    OptimizerLike,
    SchedulerLike,
    build_session,
    device_of,
)
from rarefy.trainer.signals import SignalGuard
from rarefy.trainer.state import States

log = logging.getLogger("rarefy")

SHOWN_METRICS = ("loss", "lr", "eval/loss")


class Trainer:
    """Trains and validates a model, dense or sparse.

    Args:
        model_dir: where checkpoints and logs go; made by `fit`, one of which may run in it at a time.
        model: a module, or a function that makes one. `forward(batch)` returns a loss, `(loss, outputs)`
            or an object with `.loss`; a mapping becomes keyword arguments where `forward` names its keys.
        device: `auto`, `cpu`, `gpu` or a torch device.
        optimizer: an optimizer, or a function of the model that makes one; None for validation only.
        schedulers: torch schedulers, or functions of the optimizer that make them; stepped after every step taken.
        precision: a `PrecisionConfig` or its keys; None trains in the model's own precision.
        sparsity: a `sparsity:` block (number, dict, list), an algorithm, or a function that makes either.
        parallel: a `ParallelConfig` or its keys: how several processes train the model.
        loop: a `LoopConfig` or its keys.
        checkpoint: a `CheckpointConfig` or its keys.
        logging: a `LoggingConfig` or its keys.
        callbacks: called at the events of `rarefy.callbacks.events`, in order.
        loggers: receive every metric, in the first process; None for a `ProgressLogger`, an empty list for silence.
        seed: for torch, Python, NumPy and the sparsity; None leaves the generators as they are.
        params: the configuration, plain YAML values; goes into every checkpoint.
        backend: the device by its Model Zoo name (`CPU`, `GPU`, `CSX`), or a map with it as `backend_type`.
        autorestart: accepted for the sake of Model Zoo programs; run the same program again instead.

    Attributes:
        session: what the parts of the trainer share.

    Raises:
        ConfigError: a block with a key or a value that is not allowed.
        RarefyError: a model, optimizer, scheduler or callback that is none.

    Example:
        >>> import tempfile, torch
        >>> class Mean(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(8, 1)
        ...     def forward(self, batch):
        ...         return (self.linear(batch) - batch.mean(1, keepdim=True)).square().mean()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(
        ...         model_dir=folder, model=Mean, device="cpu", sparsity=0.5, seed=1, loop={"num_steps": 3},
        ...         optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1), loggers=[],
        ...     )
        ...     trainer.fit([torch.ones(4, 8)])
        >>> trainer.global_step, trainer.model.linear.weight_mask.sum().item()
        (3, 4)
    """

    def __init__(
        self,
        *,
        model_dir: str | Path,
        model: Model,
        device: str | torch.device = "auto",
        optimizer: OptimizerLike | None = None,
        schedulers: SchedulerLike | Sequence[SchedulerLike] | None = None,
        precision: PrecisionConfig | Mapping[str, Any] | None = None,
        sparsity: Any = None,
        parallel: distributed.ParallelConfig | Mapping[str, Any] | None = None,
        loop: LoopConfig | Mapping[str, Any] | None = None,
        checkpoint: CheckpointConfig | Mapping[str, Any] | None = None,
        logging: LoggingConfig | Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] | None = None,
        loggers: Sequence[Logger] | None = None,
        seed: int | None = None,
        params: Mapping[str, Any] | None = None,
        backend: str | Mapping[str, Any] | None = None,
        autorestart: object = None,
    ) -> None:
        self.callbacks = list(callbacks or [])
        shown = [ProgressLogger()] if loggers is None else list(loggers)
        self.loggers = shown if distributed.is_first() else []
        ingredients = Ingredients(
            model_dir=Path(model_dir),
            model=model,
            device=device_of(device, backend, autorestart),
            optimizer=optimizer,
            schedulers=schedulers,
            precision=precision,
            sparsity=sparsity,
            parallel=parallel,
            loop=loop,
            checkpoint=checkpoint,
            logging=logging,
            seed=seed,
            params=params,
        )
        self.session = build_session(ingredients, Dispatcher(self, self.callbacks, self.loggers))

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        step = f"step {self.global_step} of {self.total_steps}"
        return one_line("Trainer", {kind: None, step: None, f"model_dir={str(self.model_dir)!r}": None})

    def _repr_html_(self) -> str:
        shown = {"model": type(self.model).__name__, "step": f"{self.global_step:,} of {self.total_steps:,}"}
        shown |= {name: str(getattr(self, name)) for name in ("model_dir", "device", "sparsity")}
        shown |= {name: f"{value:.5g}" for name, value in self.last_metrics.items() if name in SHOWN_METRICS}
        return html_table(("", ""), shown.items(), "Trainer")

    def fit(
        self,
        train_dataloader: Loader,
        val_dataloader: Validations | None = None,
        ckpt_path: CheckpointPath = UNSET,
        *,
        load_states: States = "all",
    ) -> None:
        """Trains for as long as `loop` says, with the validations and checkpoints that fall due.

        Left out, `ckpt_path` continues the run that the newest valid checkpoint of `model_dir` belongs to;
        if that one was interrupted, its `num_steps` or `num_epochs` count from where it began. A path begins
        a new run from that checkpoint.

        Args:
            train_dataloader: anything that can be iterated once an epoch, or a function that makes it.
            val_dataloader: the same for validation; a list or a mapping for several.
            ckpt_path: a checkpoint, None for none, or left out.
            load_states: `all`, `model` to take only weights and masks from the checkpoint, or `model,optimizer`.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state is saved.
            NotFiniteError: too many steps in a row had no finite gradient; the state is saved.
            CheckpointError: a checkpoint could not be read or written.
            RarefyError: no optimizer, data without a batch, or another run that writes to the same folder.
        """
        session = self.session
        with session.alone():
            session.set_up()
            # Before the data is opened, which a trainer that only validates does not need.
            _ = session.needed_optimizer
            session.feed = TrainFeed(train_dataloader, self.loop.grad_accum_steps)
            validations = open_validations(val_dataloader)
            try:
                self._fit(session, validations, ckpt_path, load_states)
            # A position in the data has started its workers, whether a step follows or not.
            finally:
                session.feed.close()
                close_validations(validations)

    def _fit(
        self, session: Session, validations: Mapping[str, Any], ckpt_path: CheckpointPath, load_states: States
    ) -> None:
        found = state.find_checkpoint(session, ckpt_path)
        is_whole = found is not None and state.restore(session, found, load_states)
        plan = plan_fit(session, continues=is_whole and ckpt_path is UNSET)
        if not self.progress.is_unfinished:
            log.info("nothing to do: global step %d of %d is reached", self.global_step, plan.stop)
            return
        # Gradients from before would be added to those of the first step.
        session.needed_optimizer.zero_grad(set_to_none=True)
        continues = isinstance(ckpt_path, Unset) and self.checkpoint.autoload_last_checkpoint
        with SignalGuard(lambda: self.progress.doing) as guard:
            Fit(session, plan, validations, guard, continues).run()

    def validate(self, val_dataloader: Validations, ckpt_path: CheckpointPath = UNSET) -> dict[str, float]:
        """The metrics of the model on validation data.

        Args:
            val_dataloader: anything that can be iterated, or a function that makes it; a list or a mapping
                for several.
            ckpt_path: the checkpoint whose weights are validated; None for the present ones; left out, the
                newest one.

        Returns:
            Metrics by name.

        Raises:
            CheckpointError: a checkpoint that cannot be read.
            RarefyError: data without a batch, or a run that writes to the same folder.
        """
        with self.session.alone():
            self.session.set_up()
            validations = open_validations(val_dataloader)
            found = self._find_trained(ckpt_path)
            if found is not None:
                self.progress.global_step = state.load_weights(self.session, found)
            return evaluate_all(self.session, validations)

    def validate_all(
        self,
        val_dataloaders: Validations,
        ckpt_paths: CheckpointPath | Sequence[str | Path] = UNSET,
    ) -> dict[str, dict[str, float]]:
        """The metrics of several checkpoints on several validation data.

        Args:
            val_dataloaders: as for `validate`.
            ckpt_paths: a path, a glob, or a list of them; None for the present weights; left out, the newest.

        Returns:
            Metrics by name, for each checkpoint by path; the present weights have the path "".

        Raises:
            CheckpointError: a path or a glob that matches nothing, or a checkpoint that cannot be read.
        """
        if isinstance(ckpt_paths, Unset):
            paths = [self._find_trained(ckpt_paths)]
        else:
            paths = [None] if ckpt_paths is None else find_all(ckpt_paths)
        return {str(path or ""): self.validate(val_dataloaders, path) for path in paths}

    def log_metrics(self, **metrics: float) -> None:
        """Sends metrics to every logger, at the present global step."""
        self.log_metrics_dict(metrics)

    def log_metrics_dict(self, metrics: Mapping[str, float]) -> None:
        """The same for names that are no Python identifiers."""
        self.session.log(metrics)

    def save_checkpoint(self) -> Path:
        """Saves the state of the run; it is on the disk once `writer.wait()` returns.

        Returns:
            The path of the checkpoint.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written.
        """
        return state.save(self.session)

    def _find_trained(self, ckpt_path: CheckpointPath) -> Path | None:
        found = state.find_checkpoint(self.session, ckpt_path)
        if found is None and ckpt_path is UNSET and self.checkpoint.autoload_last_checkpoint:
            log.warning("no checkpoint in %s; validating the weights as they are", self.checkpoint_root)
        return found

    @property
    def model_dir(self) -> Path:
        """Where checkpoints and logs go."""
        return self.session.model_dir

    @property
    def model(self) -> nn.Module:
        """The model, on its device."""
        return self.session.model

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.session.device

    @property
    def sparsity(self) -> Sparsity | None:
        """The algorithm or group; None for a dense run."""
        return self.session.sparsity

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer; None when the trainer only validates."""
        return self.session.optimizer

    @property
    def schedulers(self) -> Sequence[LRScheduler]:
        """The learning-rate schedulers, in order."""
        return self.session.schedulers

    @property
    def precision(self) -> Precision:
        """Autocast, loss scaling and gradient clipping."""
        return self.session.precision

    @property
    def loop(self) -> LoopConfig:
        """The `loop` block."""
        return self.session.loop

    @property
    def checkpoint(self) -> CheckpointConfig:
        """The `checkpoint` block."""
        return self.session.checkpoint

    @property
    def logging(self) -> LoggingConfig:
        """The `logging` block."""
        return self.session.logging

    @property
    def checkpoint_root(self) -> Path:
        """The directory that holds the checkpoints."""
        return self.session.checkpoint_root

    @property
    def writer(self) -> CheckpointWriter:
        """Writes checkpoints; `writer.wait()` returns once the newest is on the disk."""
        return self.session.writer

    @property
    def progress(self) -> Progress:
        """The counters of the run."""
        return self.session.progress

    @property
    def feed(self) -> TrainFeed | None:
        """The training data of the newest fit; None before the first."""
        return self.session.feed

    @property
    def last_metrics(self) -> dict[str, float]:
        """The latest value of every metric that was logged."""
        return self.session.last_metrics

    @property
    def is_log_step(self) -> bool:
        """Whether the step in progress, or the one that just ended, is logged."""
        return self.session.is_log_step

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens in one optimizer step; None where the data are not tokens."""
        return self.session.tokens_per_step

    @property
    def params(self) -> dict[str, Any]:
        """The configuration, plain YAML values; goes into every checkpoint."""
        return self.session.params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        self.session.params = dict(params)

    @property
    def global_step(self) -> int:
        """Optimizer steps so far; a step that was skipped for its gradients counts."""
        return self.progress.global_step

    @property
    def total_steps(self) -> int:
        """The global step at which the fit ends; before a fit, what the loop's settings tell of it, or 0."""
        return self.progress.stop or self.loop.total_steps() or 0

    @property
    def trained_by(self) -> Optimizer:
        """The optimizer.

        Raises:
            RarefyError: there is none.
        """
        return self.session.needed_optimizer

    @property
    def train_feed(self) -> TrainFeed:
        """The training data of the fit that is running.

        Raises:
            RarefyError: no fit is running.
        """
        return self.session.needed_feed
