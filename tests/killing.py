"""Runs the command line in child processes that end at a chosen moment as if the machine had lost power."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forks import copies

STEPS = 24


@dataclass(frozen=True)
class Kill:
    """When a child dies.

    Args:
        after: seconds from the start of its run; None for never.
        at_flush: at which flush of a file or directory to the disk, that is inside a checkpoint's write.
    """

    after: float | None = None
    at_flush: int | None = None


def start(folder: Path, kill: Kill) -> int:
    """Runs `rarefy run params.yaml` in `folder`; returns the exit code, -9 when it was killed."""
    process = copies().Process(target=_child, args=(str(folder), kill))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def random_kill(source: random.Random, seconds: float) -> Kill:
    """A random moment of a run that takes about `seconds`; every other one is inside a checkpoint's write."""
    if source.random() < 0.5:
        return Kill(after=source.uniform(0.0, seconds))
    return Kill(at_flush=source.randint(1, 30))


def _child(folder: str, kill: Kill) -> None:
    import torch

    from rarefy.cli.app import app

    torch.set_num_threads(1)
    os.chdir(folder)
    _arm(kill)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        app(["run", "params.yaml"])


def _arm(kill: Kill) -> None:
    if kill.after is not None:
        threading.Timer(kill.after, _die).start()
    if kill.at_flush is not None:
        count, flush = iter(range(1, kill.at_flush + 1)), os.fsync

        def flush_or_die(descriptor: Any) -> None:
            if next(count) == kill.at_flush:
                _die()
            flush(descriptor)

        os.fsync = flush_or_die


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
