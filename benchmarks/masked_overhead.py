"""What masked storage costs against the same dense training step.

4 linear layers of 2048, batch 256, AdamW, sparsity 0.9. Ordinary steps and update steps are timed apart, interleaved
with dense steps in one process; the overhead with updates included is computed for one update in `FREQ` steps.

Both of torch's AdamW are measured: the fused one, which `rarefy run` takes, and the default one, whose square root
takes five times longer for the exact zeros of a sparse second moment than for other numbers.

`--cpu_time` for a machine that others keep busy: one thread, fewer rounds are enough.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from interleave import medians
from torch import nn

import rarefy
from rarefy.algorithms.base import SparsityAlgorithm

WIDTH, DEPTH, BATCH, SPARSITY, FREQ = 2048, 4, 256, 0.9, 100


def training_step(model: nn.Module, sparsity: SparsityAlgorithm | None, fused: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    if sparsity is not None:
        sparsity.apply(model)
        sparsity.apply(optimizer)
    inputs, targets = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)

    def step() -> None:
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()

    return step


def report(fused: bool, rounds: int, clock: Callable[[], float]) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    never, always = {"steps": [0]}, {"freq": 1}
    algorithms = {
        "dense": None,
        "static": rarefy.Static(SPARSITY, compute="masked"),
        "rigl, ordinary step": rarefy.RigL(SPARSITY, update=never, compute="masked"),
        "rigl, update step": rarefy.RigL(SPARSITY, update=always, compute="masked"),
    }
    candidates = {name: training_step(copy.deepcopy(model), one, fused) for name, one in algorithms.items()}
    seconds = medians(candidates, rounds, clock=clock)
    ratio = {name: value / seconds["dense"] for name, value in seconds.items()}
    mean = ((FREQ - 1) * ratio["rigl, ordinary step"] + ratio["rigl, update step"]) / FREQ
    print(f"AdamW, {'fused' if fused else 'default'}; dense = 1 ({seconds['dense'] * 1e3:.0f} ms)")
    print(f"  static                                    {ratio['static']:.3f}  (at most 1.08)")
    print(f"  rigl, one update in {FREQ} steps included    {mean:.3f}  (at most 1.10)")
    print(f"  rigl, update step                         {ratio['rigl, update step']:.2f}   (at most 4)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cpu_time", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.manual_seed(0)
    report(True, arguments.rounds, clock)
    report(False, arguments.rounds, clock)


if __name__ == "__main__":
    main()
