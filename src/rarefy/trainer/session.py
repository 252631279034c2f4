"""What the parts of a trainer share: what is trained, how far it has come, and who hears of it.

Loop, step, validation and saving take a session; none of them knows the `Trainer`, which is the session's public face.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rarefy.algorithms.base import Sparsifier, SparsityAlgorithm
from rarefy.callbacks.dispatch import Dispatcher
from rarefy.checkpoint.directory import CheckpointConfig, CheckpointWriter
from rarefy.disk import alone_in
from rarefy.distributed import Parallel, Traffic, failing_together, is_first
from rarefy.errors import RarefyError
from rarefy.models.call import ModelCall
from rarefy.trainer.feed import TrainFeed
from rarefy.trainer.plan import LoggingConfig, LoopConfig
from rarefy.trainer.precision import Precision
from rarefy.trainer.skipped_steps import SkippedSteps

Sparsity = Sparsifier


@dataclass
class Progress:
    """How far a run has come.

    Args:
        skipped: the steps that were left out.
        global_step: optimizer steps, skipped ones included.
        start: the global step at which the fit began.
        stop: the global step at which it ends.
        validation_due: whether the validation after this step is still to come.
    """

    skipped: SkippedSteps
    global_step: int = 0
    start: int = 0
    stop: int = 0
    validation_due: bool = False

    @property
    def is_unfinished(self) -> bool:
        """Whether the fit has something left to do."""
        return self.global_step < self.stop or self.validation_due

    @property
    def doing(self) -> str:
        """What an interruption waits for."""
        return "leaving the validation" if self.validation_due else f"finishing step {self.global_step + 1}"

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        own = {name: getattr(self, name) for name in ("global_step", "start", "stop", "validation_due")}
        return {**own, "skipped": self.skipped.total, "skipped_in_a_row": self.skipped.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the counters of a checkpoint."""
        for name in ("global_step", "start", "stop", "validation_due"):
            setattr(self, name, state[name])
        self.skipped.total = state["skipped"]
        self.skipped.in_a_row = state["skipped_in_a_row"]


@dataclass(kw_only=True)
class Session:
    """One trainer's state, made once by `rarefy.trainer.session_builder`.

    Args:
        model_dir: where checkpoints and logs go.
        loop: the `loop` block.
        checkpoint: the `checkpoint` block.
        logging: the `logging` block.
        device: where the model computes.
        model: on its device, its sparsity applied.
        parallel: how several processes train the model.
        forward: calls the model, over all processes where there are several.
        sparsity: applied to model and optimizer; None for a dense run.
        optimizer: None for validation only.
        schedulers: stepped after every optimizer step that was taken.
        precision: autocast, loss scale and clipping.
        emit: tells callbacks and loggers.
        writer: writes checkpoints.
        progress: how far the run has come.
        params: the configuration, plain YAML values.
        feed: the training data of the fit that is running.
        last_metrics: the latest value of every metric.
        is_log_step: whether the step in progress is logged.
        tokens_per_step: None where the data are not tokens.
        micro_batch_size: samples that are learnt at a time; None for whole batches, and until `auto` is decided.
        uncut: a copy of a model that was cut, for as long as first masks wait to be measured on it.
    """

    model_dir: Path
    loop: LoopConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    device: torch.device
    model: nn.Module
    parallel: Parallel
    forward: ModelCall
    sparsity: Sparsity | None
    optimizer: Optimizer | None
    schedulers: Sequence[LRScheduler]
    precision: Precision
    emit: Dispatcher
    writer: CheckpointWriter
    progress: Progress
    params: dict[str, Any] = field(default_factory=dict)
    feed: TrainFeed | None = None
    last_metrics: dict[str, float] = field(default_factory=dict)
    is_log_step: bool = False
    tokens_per_step: int | None = None
    micro_batch_size: int | None = None
    uncut: nn.Module | None = None
    _is_set_up: bool = False
    _is_alone: bool = False

    @property
    def checkpoint_root(self) -> Path:
        """The directory that holds the checkpoints."""
        return self.checkpoint.checkpoint_root or self.model_dir

    @property
    def algorithms(self) -> list[SparsityAlgorithm]:
        """Those of the sparsity; none in a dense run."""
        return [] if self.sparsity is None else self.sparsity.algorithms

    @property
    def needed_optimizer(self) -> Optimizer:
        """The optimizer.

        Raises:
            RarefyError: there is none.
        """
        if self.optimizer is None:
            raise RarefyError("this trainer has no optimizer, so it can only validate; give optimizer=")
        return self.optimizer

    @property
    def needed_feed(self) -> TrainFeed:
        """The training data of the fit that is running.

        Raises:
            RarefyError: no fit is running.
        """
        if self.feed is None:
            raise RarefyError("no fit is running, so there is no training data; call fit() first")
        return self.feed

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other runs out: two would go on from each other's checkpoints, and mix their logs."""
        # A callback may validate in the middle of a fit.
        if self._is_alone:
            yield
            return
        # Resolved, as one folder by two names would keep this run out itself.
        folders = dict.fromkeys(one.resolve() for one in (self.model_dir, self.checkpoint_root))
        with ExitStack() as held:
            # All processes hear of it; the others would wait for the first.
            with failing_together(self.device):
                for folder in folders if is_first() else ():
                    held.enter_context(alone_in(folder))
            # Also where training ends with an error: the next run must find the checkpoint that is being written.
            held.callback(self.writer.settle)
            held.callback(setattr, self, "_is_alone", False)
            self._is_alone = True
            yield

    def set_up(self) -> None:
        """Tells the callbacks, once, that everything exists."""
        if not self._is_set_up:
            self._is_set_up = True
            self.emit("setup")

    def traffic(self) -> Traffic:
        """What this process gave into averages of gradients so far."""
        return replace(self.parallel.traffic)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Sends metrics to every logger, at the present global step."""
        values = dict(metrics)
        self.last_metrics |= values
        self.emit.log(values, self.progress.global_step)
