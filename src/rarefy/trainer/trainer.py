"""The Trainer: model, optimizer, sparsity and data in a loop that can stop and go on at any step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from rarefy import distributed
from rarefy.callbacks.dispatch import Dispatcher
from rarefy.callbacks.events import Callback, Logger
from rarefy.callbacks.progress_logger import ProgressLogger
from rarefy.checkpoint.directory import CheckpointConfig, CheckpointWriter
from rarefy.errors import RarefyError
from rarefy.models.call import ModelCall
from rarefy.trainer import assembly
from rarefy.trainer import state as resume
from rarefy.trainer.assembly import Model, OptimizerLike, SchedulerLike
from rarefy.trainer.evaluation import Validations, evaluate, open_validations
from rarefy.trainer.faults import SignalGuard, SkippedSteps
from rarefy.trainer.feed import Loader, TrainFeed
from rarefy.trainer.fit import Fit, Progress
from rarefy.trainer.plan import LoggingConfig, LoopConfig, RunPlan, plan_run
from rarefy.trainer.precision import Precision, PrecisionConfig
from rarefy.trainer.state import UNSET, CheckpointPath, States
from rarefy.validation.block import read_block

log = logging.getLogger("rarefy")


class Trainer:
    """Trains and validates a model, dense or sparse.

    Args:
        model_dir: where checkpoints and logs go; made when something is written.
        model: a module, or a function that makes one. `forward(batch)` returns a loss, `(loss, outputs)`
            or an object with `.loss`; a mapping becomes keyword arguments where `forward` names its keys.
        device: `auto`, `cpu`, `gpu` or a torch device.
        optimizer: an optimizer, or a function of the model that makes one; None for validation only.
        schedulers: torch schedulers, or functions of the optimizer that make them; each is stepped once
            after every optimizer step that was taken.
        precision: a `PrecisionConfig` or its keys; None trains in the model's own precision.
        sparsity: a `sparsity:` block (number, dict, list), an algorithm, or a function that makes either.
        loop: a `LoopConfig` or its keys.
        checkpoint: a `CheckpointConfig` or its keys.
        logging: a `LoggingConfig` or its keys.
        callbacks: called at the events of `rarefy.callbacks.events`, in order.
        loggers: receive every metric, in order; None for a `ProgressLogger`, an empty list for silence. Of several
            processes only the first has loggers.
        seed: for torch, Python, NumPy and the sparsity; None leaves the generators as they are.

    Attributes:
        params: the configuration, plain YAML values; goes into every checkpoint.

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
        loop: LoopConfig | Mapping[str, Any] | None = None,
        checkpoint: CheckpointConfig | Mapping[str, Any] | None = None,
        logging: LoggingConfig | Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] | None = None,
        loggers: Sequence[Logger] | None = None,
        seed: int | None = None,
    ) -> None:
        self.model_dir = Path(model_dir)
        self.loop = read_block(LoopConfig, loop, "loop")
        self.checkpoint = read_block(CheckpointConfig, checkpoint, "checkpoint")
        self.logging = read_block(LoggingConfig, logging, "logging")
        precision = {"enabled": False} if precision is None else precision
        precision_config = read_block(PrecisionConfig, precision, "precision")
        self.callbacks = list(callbacks or [])
        loggers = [ProgressLogger()] if loggers is None else loggers
        assembly.set_log_level(self.logging.log_level)
        assembly.seed_everything(seed)

        self.device = distributed.join_processes(assembly.resolve_device(device))
        self.loggers = list(loggers) if distributed.is_first() else []
        self.emit = Dispatcher(self.callbacks, self.loggers)
        self.model = assembly.make_model(model, self.device)
        self.sparsity = assembly.make_sparsity(sparsity, self.loop.total_steps(), seed)
        if self.sparsity is not None:
            self.sparsity.accumulates = self.loop.grad_accum_steps > 1
            self.sparsity.apply(self.model)
        self.optimizer = assembly.make_optimizer(optimizer, self.model)
        if self.sparsity is not None and self.optimizer is not None:
            self.sparsity.apply(self.optimizer)
        self.schedulers = assembly.make_schedulers(schedulers, self.optimizer)
        self.precision = Precision(precision_config, self.device)
        self.forward = ModelCall(distributed.wrapped(self.model), self.model)

        self.params: dict[str, Any] = {}
        self.progress = Progress(SkippedSteps(self.loop.max_skipped_steps))
        self.feed: TrainFeed | None = None
        self.writer = CheckpointWriter(self.checkpoint_root, keep_last=self.checkpoint.keep_last)
        self.last_metrics: dict[str, float] = {}
        self.is_log_step = False
        self.tokens_per_step: int | None = None
        self._is_set_up = False

    @property
    def checkpoint_root(self) -> Path:
        """The directory that holds the checkpoints."""
        return self.checkpoint.checkpoint_root or self.model_dir

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
        if self.optimizer is None:
            raise RarefyError("this trainer has no optimizer, so it can only validate; give optimizer=")
        return self.optimizer

    @property
    def train_feed(self) -> TrainFeed:
        """The training data of the fit that is running.

        Raises:
            RarefyError: no fit is running.
        """
        if self.feed is None:
            raise RarefyError("no fit is running, so there is no training data; call fit() first")
        return self.feed

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
            load_states: `all`, or `model` to take only weights and masks from the checkpoint.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state is saved.
            NotFiniteError: too many steps in a row had no finite gradient; the state is saved.
            CheckpointError: a checkpoint could not be read or written.
            RarefyError: no optimizer, or data without a batch.
        """
        self._set_up()
        optimizer = self.trained_by
        self.feed = TrainFeed(train_dataloader, self.loop.grad_accum_steps)
        validations = open_validations(val_dataloader)
        found = self._find(ckpt_path)
        is_whole = found is not None and resume.restore(self, found, load_states)
        plan = self._plan(continues=is_whole and ckpt_path is UNSET)
        if not self.progress.is_unfinished:
            log.info("nothing to do: global step %d of %d is reached", self.global_step, plan.stop)
            return
        optimizer.zero_grad(set_to_none=True)
        continues = isinstance(ckpt_path, resume.Unset) and self.checkpoint.autoload_last_checkpoint
        try:
            with SignalGuard(lambda: self.progress.doing) as guard:
                Fit(self, plan, validations, guard, continues).run()
        finally:
            self.feed.close()

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
            RarefyError: data without a batch.
        """
        self._set_up()
        validations = open_validations(val_dataloader)
        found = self._find_trained(ckpt_path)
        if found is not None:
            self.progress.global_step = resume.load_weights(self, found)
        results: dict[str, float] = {}
        for name, data in validations.items():
            results |= evaluate(self, data, name) or {}
        return results

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
        if isinstance(ckpt_paths, resume.Unset):
            paths = [self._find_trained(ckpt_paths)]
        else:
            paths = [None] if ckpt_paths is None else resume.find_all(ckpt_paths)
        return {str(path or ""): self.validate(val_dataloaders, path) for path in paths}

    def log_metrics(self, **metrics: float) -> None:
        """Sends metrics to every logger, at the present global step."""
        self.log_metrics_dict(metrics)

    def log_metrics_dict(self, metrics: Mapping[str, float]) -> None:
        """The same for names that are no Python identifiers."""
        values = dict(metrics)
        self.last_metrics |= values
        for logger in self.loggers:
            logger.log(self, values, self.global_step)

    def save_checkpoint(self) -> Path:
        """Saves the state of the run; it is on the disk once `writer.wait()` returns.

        Returns:
            The path of the checkpoint.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written.
        """
        parts = resume.gather(self)
        if distributed.is_first():
            return self.writer.save_async(self.global_step, parts)
        return self.checkpoint_root / f"checkpoint_{self.global_step}"

    def _set_up(self) -> None:
        if not self._is_set_up:
            self._is_set_up = True
            self.emit("setup", self)

    def _find(self, ckpt_path: CheckpointPath) -> Path | None:
        self.writer.wait()
        distributed.wait_for_all()
        return resume.find(self, ckpt_path)

    def _find_trained(self, ckpt_path: CheckpointPath) -> Path | None:
        found = self._find(ckpt_path)
        if found is None and ckpt_path is UNSET and self.checkpoint.autoload_last_checkpoint:
            log.warning("no checkpoint in %s; validating the weights as they are", self.checkpoint_root)
        return found

    def _plan(self, continues: bool) -> RunPlan:
        """The plan of a fit that begins here, or of the interrupted one that a checkpoint belongs to."""
        progress = self.progress
        if not (continues and progress.is_unfinished):
            progress.start, progress.validation_due = progress.global_step, False
        per_epoch = self.train_feed.steps_per_epoch
        plan = plan_run(self.loop, progress.start, per_epoch, self.logging.log_steps, self.checkpoint.steps)
        progress.stop = plan.stop
        return plan
