"""SIGINT and SIGTERM: the step is finished and saved first, and data workers are left alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

from rarefy.errors import RarefyError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
# torchrun passes on the Ctrl-C that the terminal has sent to its processes as well: that is no second one.
_ECHO_S = 5.0
BELOW_THE_BAR = "\n" * 3


class Interrupted(RarefyError):  # noqa: N818
    """A signal ended the run after a whole step; everything is saved.

    Args:
        signal_number: which signal.
        step: the global step at which the run stopped.
        checkpoint: where the state is.
        continues: whether the same command goes on from there by itself.

    Attributes:
        exit_code: 128 + the signal's number, for the shell.

    Example:
        >>> stop = Interrupted(signal.SIGTERM, 7, Path("run/checkpoint_7"))
        >>> print(stop, stop.exit_code)
        stopped by SIGTERM after step 7, saved in run/checkpoint_7; the same command goes on from there 143
    """

    def __init__(self, signal_number: int, step: int, checkpoint: Path, continues: bool = True) -> None:
        self.signal_number = signal_number
        self.step = step
        self.checkpoint = checkpoint
        self.exit_code = 128 + signal_number
        name = signal.Signals(signal_number).name
        where = f"after step {step}, saved in {checkpoint}"
        how = (
            "the same command goes on from there" if continues else "give it as ckpt_path to go on from there"
        )
        super().__init__(f"stopped by {name} {where}; {how}")


class SignalGuard:
    """Notes the first SIGINT or SIGTERM for the loop to act on; a second one has its ordinary effect.

    Does nothing outside of the main thread, where Python delivers no signals.

    Args:
        doing: what the loop is going to finish or leave, such as `finishing step 12`; asked when a signal comes.

    Attributes:
        received: the number of the signal, or None.
    """

    def __init__(self, doing: Callable[[], str] = lambda: "finishing this step") -> None:
        self.received: int | None = None
        self._doing = doing
        self._process = os.getpid()
        self._since = 0.0
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        is_worker = os.getpid() != self._process
        # A forked worker has inherited this handler; a terminal sends Ctrl-C
        # to it as well, and the loop still needs it.
        if is_worker and number == signal.SIGINT:
            return
        if self.received is None and not is_worker:
            self.received = number
            # Not print, which cannot be entered twice: the signal may have come in the middle of one.
            os.write(STDERR, self._announcement(number).encode())
            self._since = monotonic()
            return
        if "TORCHELASTIC_RUN_ID" in os.environ and monotonic() - self._since < _ECHO_S:
            return
        # Once more, with the handlers from before, for its ordinary effect.
        self.__exit__()
        signal.raise_signal(number)

    def _announcement(self, number: int) -> str:
        """What is going to happen; a live bar that is drawn anew wipes out only the blank lines after it."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        text = f"\n{name}: {self._doing()}, then saving; {name} again stops at once without saving\n"
        return text + (BELOW_THE_BAR if os.isatty(STDERR) else "")


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back from this thread, and for good from the processes that it starts meanwhile.

    A signal to the whole process group, as a terminal or a job scheduler sends it, then leaves a loader's
    workers alone until the loop has finished its step; they end with the loader or with this process.

    Example:
        >>> with signals_held_back():
        ...     signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        True
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
