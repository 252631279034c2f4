"""What each of several processes leaves to read: what it said, and how fast it was."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rarefy.callbacks.events import Callback
from rarefy.callbacks.loggers.csv_logger import MetricsTable
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.disk import writing
from rarefy.distributed import is_first, place

DIRECTORY_NAME = "ranks"
RATES = ("tokens_per_second", "samples_per_second")
COMMUNICATION = "communication/"

_LOGGER = logging.getLogger("rarefy")


def table_of(folder: Path, rank: int) -> Path:
    """The CSV file of a rank in a model directory.

    Example:
        >>> table_of(Path("md"), 3).as_posix()
        'md/ranks/rank_3.csv'
    """
    return folder / DIRECTORY_NAME / f"rank_{rank}.csv"


class RankLog(Callback):
    """Writes `model_dir/ranks/rank_{r}.log` and `rank_{r}.csv` in each of several processes; nothing in a single one.

    The first holds what the process said, with the time, and how its fit ended; the second its own throughput, and what
    it spent on the averages of sparse gradients.
    """

    def __init__(self) -> None:
        self._handler: logging.Handler | None = None
        self._table: MetricsTable | None = None
        self._before: BaseException | None = None

    def on_fit_start(self, trainer: TrainerView) -> None:
        """Opens the files; a run that begins anew begins them anew."""
        # A fit may begin while an error is being handled, which is not what ends it.
        self._before = sys.exc_info()[1]
        rank, count = place()
        path = table_of(trainer.model_dir, rank)
        with writing(path):
            if is_first() and not trainer.global_step:
                _forget(trainer.model_dir, count)
            if count == 1:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = "a" if trainer.global_step else "w"
            self._handler = logging.FileHandler(path.with_suffix(".log"), mode, encoding="utf-8")
            self._table = MetricsTable(path)
            self._table.forget_after(trainer.global_step)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        _LOGGER.addHandler(self._handler)
        # To the file alone: on the terminal this would stand there once a process.
        self._say(
            f"rank {rank} of {count} begins at step {trainer.global_step} "
            f"(process {os.getpid()} on {platform.node()}, {trainer.device})"
        )

    def on_train_batch_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """Notes the speed on log steps."""
        if self._table is None or not trainer.is_log_step:
            return
        cells = {name: str(float(value)) for name, value in own_metrics(metrics, place()[1]).items()}
        with writing(self._table.path):
            self._table.add(trainer.global_step, cells)

    def on_fit_end(self, trainer: TrainerView) -> None:
        """Notes how the fit ended, and closes the files."""
        if self._handler is None:
            return
        # The event comes on the way out, while what ended the fit is still being raised.
        found = sys.exc_info()
        failed = found[1] is not None and found[1] is not self._before
        self._say(f"the fit ended at step {trainer.global_step}", found if failed else None)
        _LOGGER.removeHandler(self._handler)
        self._handler.close()
        self._handler = None
        self._table = None

    def _say(self, text: str, failure: Any = None) -> None:
        level = logging.ERROR if failure else logging.INFO
        assert self._handler is not None
        self._handler.handle(_LOGGER.makeRecord(_LOGGER.name, level, "", 0, text, (), failure))


def own_metrics(metrics: Mapping[str, float], count: int) -> dict[str, float]:
    """What a process tells of itself, from the metrics of the run.

    Args:
        metrics: of a log step, as this process has them.
        count: of processes.

    Example:
        >>> own_metrics({"loss": 2.0, "tokens_per_second": 600.0, "communication/share": 0.1}, 2)
        {'tokens_per_second': 300.0, 'communication/share': 0.1}
    """
    # Each process estimates the rate of all from its own.
    rates = {name: metrics[name] / count for name in RATES if name in metrics}
    return rates | {name: value for name, value in metrics.items() if name.startswith(COMMUNICATION)}


def _forget(folder: Path, count: int) -> None:
    """Removes the files of ranks that an earlier run had, and this one has not."""
    for path in (folder / DIRECTORY_NAME).glob("rank_*.*"):
        number = path.stem.removeprefix("rank_")
        if number.isdecimal() and (int(number) >= count or count == 1):
            path.unlink(missing_ok=True)
