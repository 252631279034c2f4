"""Functions run in several processes that train together, by gloo on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from forks import copies

NEEDS_FULLY_SHARD = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch does not run on the CPU"
)
# Far above what a busy machine takes; a process that another waits for in vain fails the test then.
_PATIENCE = timedelta(minutes=5)


def in_processes(count: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a function of the rank returns in each of several processes.

    Args:
        count: of processes.
        work: a function of a module; what it returns is saved by torch.
        folder: an empty one.
    """
    start_copies(_start, count, count, work, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def start_copies(function: Callable[..., None], count: int, *arguments: Any) -> None:
    """Calls a function of the rank and of arguments in each of several processes, and waits for all."""
    copies()
    mp.start_processes(function, args=arguments, nprocs=count, start_method="forkserver")


def _start(rank: int, count: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=_PATIENCE)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
