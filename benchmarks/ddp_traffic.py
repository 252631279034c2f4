"""What two processes exchange in a training step at 90% sparsity, and how long the step takes, against dense.

4 linear layers of 2048 with biases, 256 rows in each process, AdamW fused, `DistributedDataParallel` over gloo on one
machine, one thread a process. Bytes are those that a process gives into collectives, counted where `all_reduce` is
called; a communication hook has the wrapper call it there too. Times are medians of interleaved steps without hooks;
the step of RigL that leads to an update, in which its dense gradients are exchanged, is a row of its own.

    python benchmarks/ddp_traffic.py
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from gloo import run_in_processes
from interleave import medians
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import rarefy
from rarefy.cost.calibration import processor

RANKS, WIDTH, DEPTH, BATCH, SPARSITY = 2, 2048, 4, 256, 0.9
NEVER: dict[str, Any] = {"steps": [0]}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "masked": {"algorithm": "static", "compute": "masked"},
    "compact": {"algorithm": "static", "compute": "compact"},
    "block 32 × 32": {"algorithm": "static", "compute": "compact", "pattern": {"block": [32, 32]}},
    "RigL, compact": {"algorithm": "rigl", "compute": "compact", "update": NEVER},
    "RigL, compact, an update": {"algorithm": "rigl", "compute": "compact", "update": {"freq": 1}},
}
Counter = dict[str, int]


def network_of(model: nn.Module, block: dict[str, Any] | None) -> tuple[DistributedDataParallel, Any]:
    """A wrapped model and its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if block is not None:
        sparsity = rarefy.configure({"sparsity": SPARSITY, "seed": 1, **block})
        sparsity.apply(model)
        sparsity.apply(optimizer)
    return DistributedDataParallel(model), optimizer


def step_of(
    network: nn.Module, optimizer: torch.optim.Optimizer, rank: int, width: int = WIDTH, rows: int = BATCH
) -> Callable[[], object]:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rank))

    def step() -> None:
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()

    return step


def count(model: nn.Module, block: dict[str, Any] | None, rank: int, counter: Counter) -> int:
    """Bytes of one step, the second one, which has buckets of their final size."""
    network, optimizer = network_of(copy.deepcopy(model), block)
    network.register_comm_hook(None, allreduce_hook)
    step = step_of(network, optimizer, rank)
    step()
    counter["bytes"] = 0
    step()
    return counter["bytes"]


def count_all_reduce(counter: Counter) -> None:
    """Counts what is given into `all_reduce` from now on."""
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counter["bytes"] += tensor.numel() * tensor.element_size()
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting


def work(rank: int, folder: str, rounds: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    steps = {}
    for name, block in VARIANTS.items():
        network, optimizer = network_of(copy.deepcopy(model), block)
        steps[name] = step_of(network, optimizer, rank)
    seconds = medians(steps, rounds, warmup=3)
    counter: Counter = {"bytes": 0}
    count_all_reduce(counter)
    sizes = {name: count(model, block, rank, counter) for name, block in VARIANTS.items()}
    if rank == 0:
        report(seconds, sizes)


def report(seconds: dict[str, float], sizes: dict[str, int]) -> None:
    print(f"{processor()}; {RANKS} processes, one thread each; dense = 1")
    print(f"{'':26}{'bytes':>8}{'time':>8}")
    for name, size in sizes.items():
        print(f"{name:26}{size / sizes['dense']:8.3f}{seconds[name] / seconds['dense']:8.2f}")
    print(f"dense: {sizes['dense'] / 1e6:.1f} MB and {seconds['dense'] * 1e3:.0f} ms a step; ", end="")
    print("at most 0.15 of the bytes in an ordinary step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        run_in_processes(RANKS, work, folder, rounds)


if __name__ == "__main__":
    main()
