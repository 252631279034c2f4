"""The training loop; `events.py` shows it as pseudocode."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.distributed import highest, ranks, wait_for_all
from rarefy.models.call import count
from rarefy.trainer.evaluation import evaluate
from rarefy.trainer.faults import Interrupted, SignalGuard, SkippedSteps
from rarefy.trainer.plan import RunPlan
from rarefy.trainer.step import StepOutcome, take_step

if TYPE_CHECKING:
    from rarefy.trainer.trainer import Trainer

log = logging.getLogger("rarefy")


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
        self.skipped.total, self.skipped.in_a_row = state["skipped"], state["skipped_in_a_row"]


@dataclass
class Throughput:
    """Counts what was trained on since the last time that somebody asked."""

    samples: int = 0
    tokens: int | None = None
    since: float = field(default_factory=time.perf_counter)

    def add(self, batches: list[Any]) -> int | None:
        """Adds the micro-batches of one step; returns how many tokens they have, if they have any."""
        counts = [count(batch) for batch in batches]
        tokens = [number for _, number in counts if number is not None]
        self.samples += sum(samples for samples, _ in counts)
        if not tokens:
            return None
        self.tokens = (self.tokens or 0) + sum(tokens)
        return sum(tokens)

    def take(self) -> dict[str, float]:
        """The rate since `since`; counting starts afresh."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        name, amount = ("samples", self.samples) if self.tokens is None else ("tokens", self.tokens)
        self.restart()
        return {f"{name}_per_second": amount / seconds}

    def restart(self) -> None:
        """Forgets what was counted, so that a validation or a checkpoint does not count as training time."""
        self.samples, self.tokens, self.since = 0, None, time.perf_counter()


class Fit:
    """One fit from its first step, or from where a checkpoint left it, to its last.

    Args:
        trainer: everything that takes part.
        plan: what falls due when.
        validations: validation data by name.
        guard: tells whether a signal came.
        continues: whether the same command would go on from a checkpoint of this fit by itself.
    """

    def __init__(
        self,
        trainer: Trainer,
        plan: RunPlan,
        validations: Mapping[str, Iterable[Any]],
        guard: SignalGuard,
        continues: bool,
    ) -> None:
        self.trainer, self.plan, self.validations, self.guard = trainer, plan, validations, guard
        self.progress = trainer.progress
        self._began, self._continues = trainer.global_step, continues
        self.throughput = Throughput()
        self._saved: Path | None = None

    def run(self) -> None:
        """Trains until the plan is fulfilled.

        Raises:
            Interrupted: a signal came; the state is saved.
            NotFiniteError: too many steps in a row were skipped; the state is saved.
            CheckpointError: a checkpoint could not be written.
        """
        try:
            self.trainer.emit("on_fit_start", self.trainer)
            self.trainer.model.train()
            self._save_initial()
            self.trainer.emit("on_train_start", self.trainer)
            self._train()
            self._wait_for_the_disk()
        finally:
            self.trainer.emit("on_fit_end", self.trainer)

    def _train(self) -> None:
        self._validate()
        while self.progress.global_step < self.plan.stop and self._agreed_signal() is None:
            self._step()
            step = self.progress.global_step
            self.progress.validation_due = bool(self.validations) and self.plan.validates_at(step)
            self._validate()
            if self.plan.saves_at(step):
                self._save()
        received = self._agreed_signal()
        if received is not None:
            path = self._save()
            self._wait_for_the_disk()
            raise Interrupted(received, self.progress.global_step, path, self._continues)

    def _agreed_signal(self) -> int | None:
        """The signal that some process received; all of them stop after the same step."""
        return highest(self.guard.received or 0) or None

    def _gives_up(self) -> bool:
        """Whether a signal cuts a validation short; several processes finish it together."""
        return self.guard.received is not None and ranks() == 1

    def _step(self) -> None:
        trainer, progress = self.trainer, self.progress
        trainer.is_log_step = self.plan.logs_at(progress.global_step + 1)
        batches = self._read()
        self._saved = None
        outcome = take_step(trainer, batches)
        trainer.tokens_per_step = self.throughput.add(batches)
        progress.global_step += 1
        self._count_skip(outcome)
        metrics = {"loss": outcome.loss, "grad_norm": outcome.grad_norm, "lr": outcome.lr}
        if trainer.is_log_step:
            metrics |= self._rare_metrics()
            trainer.log_metrics_dict(metrics)
        trainer.emit("on_train_batch_end", trainer, metrics)

    def _read(self) -> list[Any]:
        """The batches of the next step, checked by the model; bad ones cost nothing of what was learnt."""
        trainer, batches = self.trainer, list[Any]()
        try:
            batches = trainer.train_feed.next_step()
            for batch in batches:
                trainer.forward.check(batch)
        except Exception:
            trainer.train_feed.give_back(batches)
            if self.progress.global_step > self._began:
                path = self._save()
                trainer.writer.wait()
                log.warning("the data failed after step %d, saved in %s", self.progress.global_step, path)
            raise
        return batches

    def _count_skip(self, outcome: StepOutcome) -> None:
        skipped = self.progress.skipped
        if outcome.culprit is None:
            skipped.good()
            return
        skipped.bad()
        log.warning("step %d was skipped: %s", self.progress.global_step, outcome.culprit)
        if skipped.too_many:
            path = self._save()
            self._wait_for_the_disk()
            raise skipped.error(outcome.culprit, path)

    def _rare_metrics(self) -> dict[str, float]:
        metrics = self.throughput.take()
        if self.trainer.precision.config.log_loss_scale:
            metrics["loss_scale"] = self.trainer.precision.scale
        if self.progress.skipped.total:
            metrics["skipped_steps"] = self.progress.skipped.total
        return metrics

    def _validate(self) -> None:
        """Runs the validation that is due; one that a signal cuts short stays due."""
        if not self.progress.validation_due or self._gives_up():
            return
        try:
            for name, data in self.validations.items():
                if evaluate(self.trainer, data, name, self._gives_up) is None:
                    return
        except Exception:
            self._save()
            raise
        self.progress.validation_due = False
        self.throughput.restart()

    def _save_initial(self) -> None:
        if self.trainer.checkpoint.save_initial_checkpoint and self.progress.global_step == self.plan.start:
            self._save()

    def _save(self) -> Path:
        if self._saved is None:
            self._saved = self.trainer.save_checkpoint()
            self.throughput.restart()
        return self._saved

    def _wait_for_the_disk(self) -> None:
        """No process goes on, or ends and is missed, before the first one has written the checkpoint."""
        self.trainer.writer.wait()
        wait_for_all()
