"""What a step costs beside its products: `python benchmarks/small_layers.py [--sizes 32 256]`.

A stack of linear layers so small that hooks, checks and Python decide (forward, backward, AdamW fused), masked and
compact storage at 80% against dense. One thread, CPU time, which a busy host does not change much.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from interleave import medians
from torch import nn

import rarefy

TOKENS = 8
SPARSITY = 0.8


def training(layers: int, size: int, compute: str | None) -> Callable[[], None]:
    """A step; without `compute` that of the dense model."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    if compute is not None:
        sparsity = rarefy.Static(SPARSITY, compute=compute)
        sparsity.apply(model)
        sparsity.apply(optimizer)
    x = torch.randn(TOKENS, size)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--sizes", type=int, nargs="*", default=[32, 128, 256])
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.sizes:
        steps = {
            name or "dense": training(options.layers, size, name) for name in (None, "masked", "compact")
        }
        found = medians(steps, options.rounds, clock=time.process_time)
        ratios = ", ".join(f"{name} {found[name] / found['dense']:.2f}" for name in ("masked", "compact"))
        print(f"{options.layers} layers of {size}: dense {1e3 * found['dense']:.1f} ms, {ratios} of it")


if __name__ == "__main__":
    main()
