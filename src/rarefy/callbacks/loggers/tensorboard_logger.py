"""Metrics for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rarefy.callbacks.events import Logger
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.disk import writing
from rarefy.imports import require

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

DIRECTORY_NAME = "events"


class TensorBoardLogger(Logger):
    """Writes event files; a resumed fit hides the later steps of the one before it.

    Args:
        summary_dir: where to, relative to the model directory; its `events` when None.
    """

    def __init__(self, summary_dir: str | None = None) -> None:
        self.summary_dir = summary_dir or DIRECTORY_NAME
        self._writer: SummaryWriter | None = None

    def on_fit_start(self, trainer: TrainerView) -> None:
        """Starts a file that takes precedence from the next step on."""
        self._close()
        self._writer = self._open(trainer, purge_step=trainer.global_step + 1)

    def log(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        """Adds one scalar a metric."""
        # A validation without a fit is logged as well.
        if self._writer is None:
            self._writer = self._open(trainer)
        with writing(trainer.model_dir / self.summary_dir):
            for name, value in metrics.items():
                self._writer.add_scalar(name, float(value), step)

    def on_validate_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """Makes the results visible at once."""
        if self._writer is not None:
            with writing(trainer.model_dir / self.summary_dir):
                self._writer.flush()

    def on_fit_end(self, trainer: TrainerView) -> None:
        """Closes the file."""
        with writing(trainer.model_dir / self.summary_dir):
            self._close()

    @classmethod
    def check(cls) -> None:
        """Refuses where tensorboard is missing.

        Raises:
            RarefyError: it is.
        """
        require("tensorboard", "tensorboard")

    def _open(self, trainer: TrainerView, purge_step: int | None = None) -> SummaryWriter:
        # TensorBoard takes longer to import than all of rarefy.
        self.check()
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = trainer.model_dir / self.summary_dir
        with writing(folder):
            return SummaryWriter(str(folder), purge_step=purge_step)

    def _close(self) -> None:
        if self._writer is not None:
            # What failed to close is not closed again.
            writer = self._writer
            self._writer = None
            writer.close()
