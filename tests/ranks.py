"""Functions run in several processes that train together, by gloo on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(count: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a function of the rank returns in each of several processes.

    Args:
        count: of processes.
        work: a function of a module; what it returns is saved by torch.
        folder: an empty one.
    """
    mp.spawn(_start, args=(count, work, str(folder)), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _start(rank: int, count: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
