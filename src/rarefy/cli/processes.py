"""`--nproc N`: the same command in N processes of this machine, started as torchrun does."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from uuid import uuid4

from rarefy.errors import RarefyError

FLAG = "--nproc"


def without_flag(arguments: Sequence[str]) -> list[str]:
    """A command line without `--nproc N` and `--nproc=N`.

    Example:
        >>> without_flag(["run", "params.yaml", "--nproc", "2", "--max_steps", "5"])
        ['run', 'params.yaml', '--max_steps', '5']
    """
    kept = []
    is_value = False
    for argument in arguments:
        if is_value or argument.startswith(f"{FLAG}="):
            is_value = False
        elif argument == FLAG:
            is_value = True
        else:
            kept.append(argument)
    return kept


def refuse_nested(count: int) -> None:
    """Refuses to start processes in one that was started so.

    Raises:
        RarefyError: this is one of several processes already.
    """
    if "RANK" in os.environ:
        raise RarefyError(
            f"{FLAG} {count} in a process that torchrun started is not allowed; give one of them"
        )


def run_in_processes(count: int, arguments: Sequence[str]) -> int:
    """Runs `rarefy` in several processes until all have ended; when one fails, the others are ended.

    Args:
        count: how many, ≥ 2.
        arguments: the command line of each.

    Returns:
        The exit code: 0, that of the first process that failed, or 128 + the number of the signal.

    Raises:
        RarefyError: one of them was killed.
    """
    # Imported here: nobody else needs the launcher, which takes its time.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # As torchrun does, but for the share of the cores: its single thread leaves the others idle.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # What a process has to say it says itself, in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        # Port 0 stands for one that is free.
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "rarefy", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise RarefyError(
            f"process {rank} of {count} was ended by {name}, and the others with it; the same command goes on from the "
            "newest checkpoint"
        ) from error
    except SignalException as stop:
        return 128 + stop.sigval
    return 0
