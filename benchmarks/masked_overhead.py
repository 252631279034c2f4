"""What masked storage costs against the same dense training step.

4 linear layers of 2048, batch 256, AdamW, sparsity 0.9. Ordinary steps and update steps are timed apart, interleaved
with dense steps in one process; the overhead with updates included is computed for one update in `FREQ` steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from interleave import medians
from torch import nn

import rarefy
from rarefy.algorithms.base import SparsityAlgorithm

WIDTH, DEPTH, BATCH, SPARSITY, FREQ, ROUNDS = 2048, 4, 256, 0.9, 100, 30


def training_step(model: nn.Module, sparsity: SparsityAlgorithm | None) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if sparsity is not None:
        sparsity.apply(model)
        sparsity.apply(optimizer)
    # Random targets keep gradients of ordinary size: with vanishing ones AdamW meets denormal numbers, which cost extra.
    inputs, targets = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)

    def step() -> None:
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    never, always = {"steps": [0]}, {"freq": 1}
    candidates = {
        "dense": training_step(copy.deepcopy(model), None),
        "static": training_step(copy.deepcopy(model), rarefy.Static(SPARSITY)),
        "rigl, ordinary step": training_step(copy.deepcopy(model), rarefy.RigL(SPARSITY, update=never)),
        "rigl, update step": training_step(copy.deepcopy(model), rarefy.RigL(SPARSITY, update=always)),
    }
    seconds = medians(candidates, ROUNDS)
    ratio = {name: value / seconds["dense"] for name, value in seconds.items()}
    mean = ((FREQ - 1) * ratio["rigl, ordinary step"] + ratio["rigl, update step"]) / FREQ
    print(f"static: {ratio['static']:.3f} of the dense step (at most 1.08)")
    print(f"rigl, freq {FREQ}, update steps included: {mean:.3f} of the dense step (at most 1.10)")
    print(f"rigl, ordinary step: {ratio['rigl, ordinary step']:.3f}")
    print(f"rigl, update step: {ratio['rigl, update step']:.2f} dense steps (at most 4)")


if __name__ == "__main__":
    main()
