"""The storage that `compute: auto` chooses, against the dense layer: forward and backward of one `nn.Linear`.

By default 40 layers with sparsities from 0.5 to 0.98; with `--edge` each has the lowest sparsity at which the rule
takes compact storage, where a rule that expects too much shows first. `--dtype bfloat16` for autocast, `--block 32x32`
for weights of blocks, `--cpu_time` for a machine that others keep busy. `--optimizer` adds the step of AdamW, in which
masked storage also looks for writes to inactive connections.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from block_sizes import block_size
from interleave import medians
from torch import Tensor, nn

import rarefy
from rarefy.allocator import keep_freed_memory
from rarefy.cost import break_even_sparsity
from rarefy.tensors import SparseWeight

SHAPES = [
    (256, 256),
    (512, 512),
    (768, 768),
    (3072, 768),
    (768, 3072),
    (1024, 1024),
    (2048, 2048),
    (4096, 4096),
]
TOKENS = (1, 8, 64, 512, 2048)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.98)
LIMIT = 1.03


class Layer(NamedTuple):
    """A linear layer, the rows and dtype of its activations, and the sparsity of its weight."""

    rows: int
    columns: int
    tokens: int
    sparsity: float
    dtype: torch.dtype
    block: tuple[int, int] | None


def layers(at_edge: bool, dtype: torch.dtype, block: tuple[int, int] | None) -> Iterator[Layer]:
    for number, (shape, tokens) in enumerate(itertools.product(SHAPES, TOKENS)):
        sparsity = SPARSITIES[(number + number // len(TOKENS)) % len(SPARSITIES)]
        if at_edge:
            sparsity = min(0.98, max(0.1, break_even_sparsity(*shape, tokens, dtype, block) + 0.005))
        yield Layer(*shape, tokens, sparsity, dtype, block)


def training(layer: Layer, compute: str | None, with_optimizer: bool) -> tuple[nn.Module, Callable[[], None]]:
    """A model after one training step, so that `auto` knows its tokens, and what is timed of a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(layer.columns, layer.rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    algorithm = sparse(model, optimizer, layer, compute) if compute is not None else None
    x = torch.randn(layer.tokens, layer.columns).to(layer.dtype).requires_grad_()
    step = forward_and_backward(model, x, torch.randn(layer.tokens, layer.rows).to(layer.dtype))
    step()
    optimizer.step()
    if with_optimizer:
        return model[0], followed_by(step, optimizer.step)
    if algorithm is not None:
        algorithm.autoupdate = False  # gradients without steps are meant here
    return model[0], step


def sparse(model: nn.Module, optimizer: torch.optim.Optimizer, layer: Layer, compute: str) -> rarefy.Static:
    pattern = "unstructured" if layer.block is None else {"block": list(layer.block)}
    algorithm = rarefy.Static(layer.sparsity, compute=compute, pattern=pattern)
    algorithm.apply(model)
    algorithm.apply(optimizer)
    return algorithm


def followed_by(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def forward_and_backward(model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        x.grad = None
        with torch.autocast("cpu", x.dtype, enabled=x.dtype != torch.float32):
            y = model(x)
        y.backward(grad)

    return run


def repeated(run: Callable[[], None], times: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(times):
            run()

    return several


def measure(
    layer: Layer, seconds: float, clock: Callable[[], float], with_optimizer: bool
) -> tuple[bool, float, float]:
    """Whether auto is compact, and the times of masked and compact storage, dense = 1."""
    chosen, _ = training(layer, "auto", with_optimizer)
    storages = (None, "masked", "compact")
    steps = {str(compute): training(layer, compute, with_optimizer)[1] for compute in storages}
    start = clock()
    steps["None"]()
    once = max(clock() - start, 1e-5)
    calls = max(1, round(2e-3 / once))
    rounds = min(31, max(3, round(seconds / (3 * once * calls))))
    found = medians({name: repeated(run, calls) for name, run in steps.items()}, rounds, clock=clock)
    is_compact = isinstance(chosen.weight, SparseWeight)
    return is_compact, found["masked"] / found["None"], found["compact"] / found["None"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edge", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--block", type=block_size, help="of whole blocks, for example 32x32")
    parser.add_argument("--cpu_time", action="store_true", help="of one thread")
    parser.add_argument("--optimizer", action="store_true", help="time the optimizer's step as well")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each layer, about")
    parser.add_argument("--largest", type=float, default=4e10, help="rows x columns x tokens")
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    worst, missed, taken = 0.0, 0, 0
    for layer in layers(arguments.edge, getattr(torch, arguments.dtype), arguments.block):
        if layer.rows * layer.columns * layer.tokens > arguments.largest:
            continue
        is_compact, masked, compact = measure(layer, arguments.seconds, clock, arguments.optimizer)
        is_missed = not is_compact and compact * LIMIT < masked
        taken, missed = taken + is_compact, missed + is_missed
        worst = max(worst, compact if is_compact else 0.0)
        verdict = "SLOWER" if is_compact and compact > LIMIT else "gain missed" if is_missed else ""
        shape = f"[{layer.rows}, {layer.columns}] x {layer.tokens} at {layer.sparsity:.3f}"
        choice = "compact" if is_compact else "masked"
        print(f"{shape:32} masked {masked:5.2f} compact {compact:5.2f} auto {choice:8}{verdict}", flush=True)
    print(f"compact for {taken} layers, at worst {worst:.3f} of dense (limit {LIMIT}); {missed} gains missed")


if __name__ == "__main__":
    main()
