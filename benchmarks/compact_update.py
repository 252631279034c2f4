"""What a topology update costs in compact storage: `python benchmarks/compact_update.py`.

One linear layer [4096, 4096] at 90% with 1024 tokens. The update (selections, remap, new structures, optimizer state)
in dense training steps of this layer (forward, backward, AdamW); and the share of one update in 100 steps, worked out
from medians of ordinary steps, of the step that collects the dense gradient, and of the update. For RigL also with
one backward pass a step, as `rarefy.Trainer` has it: the step that updates then holds a part of the gradient only.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch import nn

import rarefy

SIZE, TOKENS, FREQ = 4096, 1024, 100


def algorithm(name: str, update: dict[str, object]) -> rarefy.SparsityAlgorithm:
    sparsity = rarefy.configure({"algorithm": name, "sparsity": 0.9, "update": update, "seed": 1})
    assert isinstance(sparsity, rarefy.SparsityAlgorithm)
    return sparsity


def training(sparsity) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(SIZE, SIZE))
    if sparsity is not None:
        sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if sparsity is not None:
        sparsity.apply(optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begin


def update(sparsity: rarefy.SparsityAlgorithm) -> float:
    begin = time.perf_counter()
    sparsity.update()
    return time.perf_counter() - begin


def share(extra: float, ordinary: float) -> str:
    """Of the time of as many steps as lie between two updates."""
    return f"one in {FREQ} steps takes {extra / (FREQ * ordinary + extra):.1%} of the time"


def measure(name: str, rounds: int) -> str:
    """The figures of one algorithm."""
    sparsity = algorithm(name, {"steps": [0, 10**6]})
    dense, sparse, x = training(None), training(sparsity), torch.randn(TOKENS, SIZE, requires_grad=True)
    times: dict[str, list[float]] = {"dense": [], "ordinary": [], "collecting": [], "update": []}
    for _ in range(rounds + 1):
        times["dense"].append(step(*dense, x))
        times["ordinary"].append(step(*sparse, x))
        sparsity.autoupdate = False
        times["collecting"].append(step(*sparse, x))
        times["update"].append(update(sparsity))
        sparsity.autoupdate = True
    medians = {key: median(values[1:]) for key, values in times.items()}
    extra = medians["update"] + medians["collecting"] - medians["ordinary"]
    in_steps = medians["update"] / medians["dense"]
    return f"{name}: update {in_steps:.2f} dense steps; {share(extra, medians['ordinary'])}"


def measure_in_trainer(name: str, rounds: int) -> str:
    """The share of an update within its step, with one backward pass a step."""
    sparsity = algorithm(name, {"freq": 2})
    sparsity.accumulates = False
    sparse, x = training(sparsity), torch.randn(TOKENS, SIZE, requires_grad=True)
    pairs = [(step(*sparse, x), step(*sparse, x)) for _ in range(rounds + 1)]
    ordinary, updating = (median(times) for times in zip(*pairs[1:], strict=True))
    return f"{name}, one backward pass a step: {share(updating - ordinary, ordinary)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    for name in ("set", "rigl"):
        print(measure(name, rounds), flush=True)
    print(measure_in_trainer("rigl", rounds), flush=True)


if __name__ == "__main__":
    main()
