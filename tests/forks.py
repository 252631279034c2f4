"""Processes that are copies of one that has imported torch, which costs seconds: once for all that tests start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

import rarefy

# What is missing in the environment, or in an older torch, is passed over. Of all tests together, as the first list
# that is given in a process counts.
PRELOAD = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    # What the first optimizer of a process imports.
    "torch._dynamo",
    "torch.utils.tensorboard",
    "rarefy.cli.app",
    "rarefy.run.builder",
    "rarefy.checkpoint.dcp",
    "rarefy.checkpoint.saved_model",
    # What the files of tests import, and what a started process takes for its main module.
    "pytest",
)


def copies() -> ForkServerContext:
    """What starts such processes; `start_method="forkserver"` of torch does so after a call, too."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


class Script:
    """Code that runs as a program does, in such a process; what it prints is in files of a folder until it ends.

    Args:
        code: of the program, whose `__name__` is `"__main__"`.
        arguments: in `sys.argv`.
        folder: for what it prints.
        environment: beside that of this process.
        home: the folder that it runs in; None for that of this process.
    """

    def __init__(
        self,
        code: str,
        *arguments: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        home: Path | None = None,
    ) -> None:
        self._printed = [folder / f"{name}_{id(self)}.txt" for name in ("said", "errors")]
        surroundings = {**os.environ, **(environment or {})}
        places = [str(file) for file in self._printed]
        self._process = copies().Process(
            target=_as_program, args=(code, arguments, surroundings, str(home or Path.cwd()), places)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process.pid is not None
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def end(self, timeout: float = 240) -> tuple[int, str, str]:
        """Its exit code, which is that of `subprocess`, and what it printed and complained of."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            # With what it has started, where it is a group of its own.
            if os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
            pytest.fail(f"the script did not end: {self._read()}")
        code = self._process.exitcode
        assert code is not None
        return code, *self._read()

    def _read(self) -> tuple[str, str]:
        said, errors = (file.read_text() for file in self._printed)
        for file in self._printed:
            file.unlink()
        return said, errors


def rarefy_in(folder: Path, *arguments: str) -> Script:
    """The command line in a folder, in a group of processes of its own; what it starts are programs from scratch."""
    code = "import os; from rarefy.cli.app import app; os.setsid(); app()"
    environment = {"PYTHONPATH": str(Path(rarefy.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return Script(code, *arguments, folder=folder, environment=environment, home=folder)


def _as_program(
    code: str, arguments: tuple[str, ...], environment: dict[str, str], home: str, places: list[str]
) -> None:
    import torch

    torch.set_num_threads(1)
    # Workers of its loaders are started as those of any program.
    multiprocessing.set_start_method(None, force=True)
    # Not what there was when the first process of all was started.
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(home)
    for descriptor, place in enumerate(places, 1):
        file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["script", *arguments]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
