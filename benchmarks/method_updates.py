"""What an update of each method costs: `python benchmarks/method_updates.py [--methods rigl] [--patterns "2 of 4"]`.

One linear layer [4096, 4096] at 90% (n of m: 50%), one thread, CPU time, which a busy host does not change much; more
`--threads` by the clock, on a machine that is idle. The update alone (scores, selection, moving weight, states and
numbers of the method's own), in dense training steps of this layer with 1024 tokens (forward, backward, AdamW), which
take turns with it; what an update takes does not depend on tokens, so that the steps before it have fewer. The bars are
2.5 unstructured and 1 for n of m and blocks.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

import rarefy
from rarefy.errors import ConfigError

SIZE = 4096
TOKENS = 1024  # of dense steps
FEW_TOKENS = 64  # of the steps before updates
RISING = {"type": "linear", "init": 0.85, "slope": 0.001}
PATTERNS: dict[str, dict[str, Any]] = {
    "unstructured": {},
    "2 of 4": {"pattern": {"n": 2, "m": 4}},
    "4 of 8": {"pattern": {"n": 4, "m": 8}},
    "2 of 4, transposable": {"pattern": {"n": 2, "m": 4, "transposable": True}},
    "4 of 8, transposable": {"pattern": {"n": 4, "m": 8, "transposable": True}},
    "blocks of 16 × 16": {"pattern": {"block": [16, 16]}},
    "fan-in": {"pattern": "fan_in"},
}
METHODS: dict[str, dict[str, Any]] = {
    "gmp": {"sparsity": RISING},
    "movement": {"sparsity": RISING},
    "powerprop": {"sparsity": RISING},
    "granet": {"sparsity": RISING},
    "set": {},
    "rigl": {},
    "mest": {},
    "top_kast": {"forward_sparsity": [0.95]},
    "ac_dc": {"update": {"steps": [10**6]}},
    "srigl": {},
}


def clock() -> float:
    """CPU time of the process with one thread, else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def block_of(method: str, pattern: str, compute: str) -> dict[str, Any]:
    block = {"algorithm": method, "sparsity": 0.9, "compute": compute, "seed": 1, "init_method": "topk"}
    block |= {"update": {"steps": [0, 10**6]}, **METHODS[method], **PATTERNS[pattern]}
    if "n" in PATTERNS[pattern].get("pattern", ""):
        is_rising = "sparsity" in METHODS[method]
        block["sparsity"] = {"type": "linear", "init": 0.5, "slope": 0.0} if is_rising else 0.5
    return block


def training(block: dict[str, Any] | None) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = nn.Sequential(nn.Linear(SIZE, SIZE))
    sparsity = None if block is None else rarefy.configure(block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if sparsity is not None:
        sparsity.apply(model)
        sparsity.apply(optimizer)
        sparsity.autoupdate = False
    return model, optimizer, sparsity


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    begin = clock()
    model(x).square().mean().backward()
    optimizer.step()
    spent = clock() - begin
    return spent


def updates(
    block: dict[str, Any], x: torch.Tensor, rounds: int, dense_step: Callable[[], float]
) -> Iterator[float]:
    """The times of updates in dense steps, the first left out."""
    model, optimizer, sparsity = training(block)
    for number in range(rounds + 1):
        optimizer.zero_grad()
        step(model, optimizer, x)
        begin = clock()
        sparsity.update()
        spent = clock() - begin
        if number:
            yield spent / dense_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    few = torch.randn(FEW_TOKENS, SIZE, requires_grad=True)
    many = torch.randn(TOKENS, SIZE, requires_grad=True)
    model, optimizer, _ = training(None)
    dense_step = partial(step, model, optimizer, many)
    dense_step()
    for method, pattern in itertools.product(options.methods, options.patterns):
        cells = []
        try:
            for compute in ("masked", "compact"):
                ratios = updates(block_of(method, pattern, compute), few, options.rounds, dense_step)
                cells.append(f"{compute} {median(ratios):.2f}")
        except ConfigError:
            cells.append("refused")
        print(f"{method}, {pattern}: {', '.join(cells)} dense steps", flush=True)


if __name__ == "__main__":
    main()
