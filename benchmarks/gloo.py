"""Processes of one machine that exchange over gloo, one thread each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(count: int, work: Callable[..., None], folder: str, *arguments: Any) -> None:
    """Calls `work(rank, folder, *arguments)` in `count` processes; `folder` is empty, and they may write to it."""
    mp.spawn(_join, args=(count, work, folder, *arguments), nprocs=count)


def _join(rank: int, count: int, work: Callable[..., None], folder: str, *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    work(rank, folder, *arguments)
    dist.barrier()
    dist.destroy_process_group()
