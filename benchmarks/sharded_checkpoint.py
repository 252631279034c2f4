"""A checkpoint of a model in pieces: how long it holds up two processes and what is on the disk, beside torch's own.

4 linear layers of 2048 at 90% under `fully_shard`, AdamW, gloo on one machine, one thread a process. In turns, after a
step each: `torch.distributed.checkpoint.save` of model and optimizer, its `async_save`, and rarefy's checkpoint
of the same tensors in the background, packed, hashed and flushed. `blocked` is how long the call lasts in the first
process; `until safe` how long it takes until everything is on the disk (torch's does not flush).

    python benchmarks/sharded_checkpoint.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo import run_in_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rarefy
from rarefy.checkpoint.directory import CheckpointParts, CheckpointWriter
from rarefy.cost.calibration import processor

RANKS, WIDTH, DEPTH, BATCH, SPARSITY = 2, 2048, 4, 64, 0.9
Way = Callable[[int], Callable[[], object]]


class Run:
    """A model in pieces that trains, and the ways to save it; each returns what waits for it."""

    def __init__(self, folder: Path, rank: int) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
        self.sparsity = rarefy.configure({"sparsity": SPARSITY, "seed": 1})
        self.sparsity.apply(self.model)
        fully_shard(self.model, mesh=init_device_mesh("cpu", (RANKS,)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.sparsity.apply(self.optimizer)
        self.batch = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(rank))
        self.writer = CheckpointWriter(folder / "rarefy", keep_last=1)

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What torch's tutorials save."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def by_torch(self, number: int) -> Callable[[], object]:
        """At once."""
        dcp.save(self.state(), checkpoint_id=self.folder / f"torch_{number}")
        return lambda: None

    def by_torch_later(self, number: int) -> Callable[[], object]:
        """In the background."""
        saved: Any = dcp.async_save(self.state(), checkpoint_id=self.folder / f"later_{number}")
        return saved.result

    def by_rarefy(self, number: int) -> Callable[[], object]:
        """The same tensors and the state of the algorithm."""
        parts = CheckpointParts(
            self.model.state_dict(), self.optimizer.state_dict(), self.sparsity.state_dict()
        )
        self.writer.save_async(number, parts)
        return self.writer.wait


def measure(run: Run, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds blocked and until safe of each way, medians."""
    ways: dict[str, Way] = {
        "torch": run.by_torch,
        "torch, async": run.by_torch_later,
        "rarefy": run.by_rarefy,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, save in ways.items():
            run.step()
            dist.barrier()
            begin = time.perf_counter()
            wait = save(number)
            blocked = time.perf_counter() - begin
            wait()
            times[name].append((blocked, time.perf_counter() - begin))
    # The first of each starts threads and groups.
    return {
        name: (statistics.median(b for b, _ in found[1:]), statistics.median(s for _, s in found[1:]))
        for name, found in times.items()
    }


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def work(rank: int, folder: str, rounds: int) -> None:
    # torch's async_save needs a group that exchanges on the CPU, which gloo is.
    place = Path(folder)
    seconds = measure(Run(place, rank), rounds)
    dist.barrier()
    if rank == 0:
        print(f"{processor()}; {RANKS} processes, one thread each")
        for name, (blocked, safe) in seconds.items():
            shares = (
                f"{blocked / seconds['torch'][0]:.2f} blocked, {safe / seconds['torch'][1]:.2f} until safe"
            )
            print(f"{name:14} {blocked:6.3f} s blocked, {safe:6.3f} s until safe; of torch's save {shares}")
        own, theirs = size(place / "rarefy"), size(place / f"torch_{rounds}")
        print(f"bytes: {own:,} of {theirs:,}, {own / theirs:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        run_in_processes(RANKS, work, folder, rounds)


if __name__ == "__main__":
    main()
