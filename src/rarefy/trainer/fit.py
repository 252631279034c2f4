"""The training loop; `rarefy.callbacks.events` shows it as pseudocode."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rarefy.distributed import failing_together, highest_of_all, ranks, wait_for_all
from rarefy.trainer import state
from rarefy.trainer.beginning.measuring import give_first_masks
from rarefy.trainer.evaluation import evaluate
from rarefy.trainer.micro_batches import choose_size
from rarefy.trainer.plan import RunPlan, plan_run
from rarefy.trainer.session import Session
from rarefy.trainer.signals import Interrupted, SignalGuard
from rarefy.trainer.step import StepOutcome, take_step
from rarefy.trainer.throughput import Throughput

log = logging.getLogger("rarefy")


@dataclass
class Fit:
    """One fit from its first step, or from where a checkpoint left it, to its last.

    Args:
        session: everything that takes part.
        plan: what falls due when.
        validations: validation data by name.
        guard: tells whether a signal came.
        continues: whether the same command would go on from a checkpoint of this fit by itself.
    """

    session: Session
    plan: RunPlan
    validations: Mapping[str, Iterable[Any]]
    guard: SignalGuard
    continues: bool
    _throughput: Throughput = field(init=False)
    _saved: Path | None = None

    def __post_init__(self) -> None:
        self._began = self.session.progress.global_step
        self._throughput = Throughput(self.session.traffic)
        # What an earlier fit exchanged is not of this one.
        self._throughput.restart()

    def run(self) -> None:
        """Trains until the plan is fulfilled.

        Raises:
            Interrupted: a signal came; the state is saved.
            NotFiniteError: too many steps in a row were skipped; the state is saved.
            CheckpointError: a checkpoint could not be written.
        """
        emit = self.session.emit
        try:
            emit("on_fit_start")
            self.session.model.train()
            waiting = [one for one in self.session.algorithms if one.awaiting]
            if waiting:
                give_first_masks(self.session, waiting)
            # The copy takes as much memory as the model, and is not needed again.
            self.session.uncut = None
            # A fit that goes on has its initial checkpoint already.
            if self.session.checkpoint.save_initial_checkpoint and self._began == self.plan.start:
                self._save()
            emit("on_train_start")
            self._train()
            self._wait_for_the_disk()
        finally:
            emit("on_fit_end")

    def _train(self) -> None:
        progress = self.session.progress
        # A validation that a signal cut short in an earlier run is still due.
        was_due = progress.validation_due
        self._validate()
        if was_due and not progress.validation_due:
            # Saved as done, or a run that is over would be validated at each call.
            self._save()
        while progress.global_step < self.plan.stop and self._agreed_signal() is None:
            self._step()
            # A validation comes before the checkpoint of its step, which then knows that it is done.
            self._validate()
            if self.plan.saves_at(progress.global_step):
                self._save()
        received = self._agreed_signal()
        if received is not None:
            path = self._save()
            self._wait_for_the_disk()
            raise Interrupted(received, progress.global_step, path, self.continues)

    def _step(self) -> None:
        session = self.session
        progress = self.session.progress
        session.is_log_step = self.plan.logs_at(progress.global_step + 1)
        # Read first: if the data fails, what was saved after the last step is still the newest state.
        batches = self._read()
        if progress.global_step == self._began:
            with failing_together(session.device):
                choose_size(session, batches[0])
        # What was saved last is from here on an earlier state.
        self._saved = None
        outcome = take_step(session, batches)
        session.tokens_per_step = self._throughput.add(batches)
        progress.global_step += 1
        # Known before anything is saved at this step.
        progress.validation_due = bool(self.validations) and self.plan.validates_at(progress.global_step)
        self._count_skip(outcome)
        metrics = {"loss": outcome.loss, "grad_norm": outcome.grad_norm}
        if outcome.lr is not None:
            metrics["lr"] = outcome.lr
        with self._saved_if_it_fails():
            if session.is_log_step:
                metrics |= self._rare_metrics()
                session.log(metrics)
            session.emit("on_train_batch_end", metrics)

    @contextmanager
    def _saved_if_it_fails(self) -> Iterator[None]:
        """Saves what was learnt when a log or a callback fails after a step, where no other process waits meanwhile."""
        try:
            yield
        # rich ends the process by itself where nobody reads its output any longer.
        except (Exception, SystemExit):
            if ranks() == 1:
                self._save_after_a_fault()
            raise

    def _save_after_a_fault(self) -> None:
        try:
            path = self._save()
            self._wait_for_the_disk()
            log.warning("a log or a callback failed after the step that is saved in %s", path)
        # The first error is the one to be told.
        except Exception as error:
            log.warning("a log or a callback failed, and the step could not be saved: %s", error)

    def _read(self) -> list[Any]:
        """The batches of the next step, checked by the model; bad ones cost nothing of what was learnt."""
        session = self.session
        batches: list[Any] = []
        try:
            # Where it fails in one process, all come to the checkpoint, which they write together.
            with failing_together(session.device):
                batches = session.needed_feed.next_step()
                for batch in batches:
                    session.forward.check(batch)
        except Exception:
            # The checkpoint's position is then before the bad batches, which the next run meets again.
            session.needed_feed.give_back(batches)
            if session.progress.global_step > self._began:
                path = self._save()
                self._wait_for_the_disk()
                log.warning("the data failed after step %d, saved in %s", session.progress.global_step, path)
            raise
        return batches

    def _count_skip(self, outcome: StepOutcome) -> None:
        progress = self.session.progress
        if outcome.culprit is None:
            progress.skipped.good()
            return
        progress.skipped.bad()
        log.warning("step %d was skipped: %s", progress.global_step, outcome.culprit)
        if progress.skipped.too_many:
            path = self._save()
            self._wait_for_the_disk()
            raise progress.skipped.error(outcome.culprit, path)

    def _rare_metrics(self) -> dict[str, float]:
        metrics = self._throughput.take()
        precision = self.session.precision
        skipped = self.session.progress.skipped
        if precision.config.log_loss_scale:
            metrics["loss_scale"] = precision.scale
        if skipped.total:
            metrics["skipped_steps"] = skipped.total
        return metrics

    def _validate(self) -> None:
        """Runs the validation that is due; one that a signal cuts short stays due."""
        if not self.session.progress.validation_due or self._gives_up():
            return
        try:
            for name, data in self.validations.items():
                if evaluate(self.session, data, name, self._gives_up) is None:
                    return
        # What was learnt must not be lost to a fault in the validation, which stays due.
        except Exception:
            # Pieces are saved by all processes together, and the others may be in the middle of a forward pass.
            if not self.session.parallel.cuts:
                self._save()
            raise
        self.session.progress.validation_due = False
        self._throughput.restart()

    def _agreed_signal(self) -> int | None:
        """The signal that some process received; all of them stop after the same step."""
        return highest_of_all(self.guard.received or 0) or None

    def _gives_up(self) -> bool:
        """Whether a signal cuts a validation short; several processes finish it together."""
        return self.guard.received is not None and ranks() == 1

    def _save(self) -> Path:
        """Saves the state once a step, however many reasons there are."""
        if self._saved is None:
            self._saved = state.save(self.session)
            self._throughput.restart()
        return self._saved

    def _wait_for_the_disk(self) -> None:
        """No process goes on, or ends and is missed, before the first one has written the checkpoint."""
        self.session.writer.wait()
        wait_for_all()


def plan_fit(session: Session, continues: bool) -> RunPlan:
    """The plan of a fit that begins here, or of the interrupted one that a checkpoint belongs to.

    Args:
        session: its feed holds the training data; its progress is told where the fit begins and ends.
        continues: whether the progress is that of a checkpoint of this very run.

    Raises:
        ConfigError: the length of the run follows from nothing that is given.
    """
    progress = session.progress
    if not (continues and progress.is_unfinished):
        progress.start = progress.global_step
        progress.validation_due = False
    per_epoch = session.needed_feed.steps_per_epoch
    log_steps = session.logging.log_steps
    plan = plan_run(session.loop, progress.start, per_epoch, log_steps, session.checkpoint.steps)
    progress.stop = plan.stop
    return plan
