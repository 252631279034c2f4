"""The training loop as pseudocode, and the hooks that callbacks and loggers may fill in.

    fit(train_dataloader, val_dataloader):
        setup                                        # once per trainer, before the first fit or validate
        on_load_checkpoint(state)                    # only when a checkpoint is loaded
        on_fit_start
        on_train_start
        while global_step < total_steps:
            for micro_step in range(micro_batches):  # grad_accum_steps, each in parts of micro_batch_size
                on_train_batch_start(batch, micro_step)
                on_before_forward(batch)
                outputs = model(batch)
                on_after_forward(outputs, batch)
                loss.backward()
                on_after_backward
            unscale the gradients
            on_before_optimizer_step                 # gradients are whole and unscaled, not clipped yet
            clip the gradients
            optimizer.step()                         # updates the sparsity; left out if not finite
            on_after_optimizer_step                  # gradients are still there
            zero the gradients, step the schedulers, global_step += 1
            if is_log_step:
                log_metrics(loss, lr)
            on_train_batch_end(metrics)              # once per optimizer step
            if a validation is due:
                validate()
            if a checkpoint is due:
                on_save_checkpoint(state)
        on_fit_end                                   # also after an interrupt or a failure

    validate(val_dataloader):
        setup                                        # unless it was called already
        on_load_checkpoint(state)                    # only when a checkpoint is loaded
        on_validate_start
        for batch in val_dataloader:
            on_before_forward(batch)
            outputs = model(batch)
            on_after_forward(outputs, batch)
            on_validate_batch_end(outputs, batch)
        on_validate_end(metrics)

    log_metrics(**metrics):
        logger.log(metrics, global_step)             # every Logger, in order

Callbacks run in the order of the `callbacks:` list, then the loggers in theirs. Of several processes that train
one model each runs its callbacks, but only the first has loggers.
"""

from __future__ import annotations

from typing import Any

from rarefy.callbacks.trainer_view import TrainerView


class Callback:
    """Base class: every hook does nothing. Override the ones that you need.

    Example:
        >>> class CountSteps(Callback):
        ...     steps = 0
        ...     def on_train_batch_end(self, trainer, metrics):
        ...         self.steps += 1
    """

    def setup(self, trainer: TrainerView) -> None:
        """Once per trainer, when model, optimizer and sparsity exist."""

    def on_fit_start(self, trainer: TrainerView) -> None:
        """A fit begins; a checkpoint, if any, is loaded."""

    def on_train_start(self, trainer: TrainerView) -> None:
        """The training loop is about to take its first step."""

    def on_train_batch_start(self, trainer: TrainerView, batch: Any, micro_step: int) -> None:
        """A micro-batch was read; `micro_step` counts from 0 within one optimizer step."""

    def on_before_forward(self, trainer: TrainerView, batch: Any) -> None:
        """Right before the model is called, in training and in validation."""

    def on_after_forward(self, trainer: TrainerView, outputs: Any, batch: Any) -> None:
        """Right after the model was called, in training and in validation."""

    def on_after_backward(self, trainer: TrainerView) -> None:
        """The gradients of one micro-batch were accumulated."""

    def on_before_optimizer_step(self, trainer: TrainerView) -> None:
        """The gradients are whole and unscaled, not clipped yet."""

    def on_after_optimizer_step(self, trainer: TrainerView) -> None:
        """The optimizer stepped (or skipped); the gradients are still there."""

    def on_train_batch_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """One whole optimizer step is over and counted in `trainer.global_step`."""

    def on_validate_start(self, trainer: TrainerView) -> None:
        """A validation begins; the model is in evaluation mode."""

    def on_validate_batch_end(self, trainer: TrainerView, outputs: Any, batch: Any) -> None:
        """One validation batch is over."""

    def on_validate_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """A validation is over; `metrics` holds its results."""

    def on_save_checkpoint(self, trainer: TrainerView, state: dict[str, Any]) -> None:
        """Put what must survive into `state`, under a key of your own: JSON values and tensors."""

    def on_load_checkpoint(self, trainer: TrainerView, state: dict[str, Any]) -> None:
        """Read back what `on_save_checkpoint` stored; the key may be missing."""

    def on_fit_end(self, trainer: TrainerView) -> None:
        """The fit is over, after an interrupt or a failure too."""


class Logger(Callback):
    """A callback that receives every metric."""

    def log(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        """Record `metrics` of optimizer step `step`."""
        raise NotImplementedError
