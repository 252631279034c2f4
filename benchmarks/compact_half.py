"""`compute: {compact: half}`: single connections with tiles in float16 under bfloat16 autocast, speed and learning.

Layers: forward + dX + dW with tiles in float16 and in float32, each against torch's dense products in bfloat16, in
turns; with one thread the clock counts CPU time. `--errors` prints relative errors against float64 instead. `--gpt`
trains the GPT, static at 90%, with both tiles and with dense products of masked weights, and compares all losses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from gpt_setup import CONFIG, batch_of, gpt_trainer, step_of
from interleave import medians
from torch import Tensor

from rarefy.allocator import keep_freed_memory
from rarefy.kernels import Panels, half_obstacle

LAYERS = [(768, 768, 2048), (3072, 768, 2048), (768, 3072, 2048), (4096, 4096, 1024)]
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
STORAGES = {"masked": "masked", "float32 tiles": "compact", "float16 tiles": {"compact": "half"}}


@dataclass
class Layer:
    """What all candidates multiply."""

    panels: Panels
    values: Tensor
    x: Tensor
    grad: Tensor

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Y, dX and dW by torch."""
        return self.x @ self.weight.t(), self.grad @ self.weight, self.grad.t() @ self.x

    def sparse(self, half: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The same by the kernels, dW at the connections."""
        panels = replace(self.panels, half=half)
        y = panels.linear(self.x, self.values, None)
        return y, *panels.gradients(self.grad, self.x, self.values, [True, True, False])[:2]

    def __post_init__(self) -> None:
        self.weight = self.panels.dense(self.values).bfloat16()


def layer_of(rows: int, columns: int, tokens: int, sparsity: float) -> Layer:
    torch.manual_seed(0)
    panels = Panels.from_mask(torch.rand(rows, columns) >= sparsity)
    x, grad = torch.randn(tokens, columns).bfloat16(), torch.randn(tokens, rows).bfloat16()
    return Layer(panels, torch.randn(panels.nonzeros) * 0.02, x, grad)


def ratios(layer: Layer, rounds: int) -> tuple[float, float]:
    """How many times faster than dense it is with tiles in float16, and in float32."""
    candidates: dict[str, Callable[[], object]] = {
        "dense": layer.dense,
        "half": partial(layer.sparse, True),
        "full": partial(layer.sparse, False),
    }
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = medians(candidates, rounds, clock=clock)
    return seconds["dense"] / seconds["half"], seconds["dense"] / seconds["full"]


def errors(layer: Layer) -> str:
    """Of y, dX and dW, with tiles in float16 and dense in bfloat16."""
    x, grad, weight = layer.x.double(), layer.grad.double(), layer.panels.dense(layer.values).double()
    exact = x @ weight.t(), grad @ weight, layer.panels.gather((grad.t() @ x).float()).double()
    dense = (*layer.dense()[:2], layer.panels.gather(layer.dense()[2].float()))
    shown = []
    for found in (layer.sparse(True), dense):
        each = [
            float((one.double() - other).norm() / other.norm())
            for one, other in zip(found, exact, strict=True)
        ]
        shown.append(" / ".join(f"{one:.1e}" for one in each))
    return f"float16 tiles {shown[0]}, dense bfloat16 {shown[1]}"


def losses_of(name: str, steps: int, layers: int, tokens: int) -> list[float]:
    """The loss of each step of a static run at 90% under autocast."""
    config = CONFIG.model_copy(update={"num_hidden_layers": layers})
    block = {"algorithm": "static", "sparsity": 0.9, "compute": STORAGES[name]}
    trainer = gpt_trainer(block, bf16=True, config=config)
    return [step_of(trainer, batch_of(step, 1, tokens)) for step in range(steps)]


def compare_losses(steps: int, layers: int, tokens: int) -> None:
    found = {name: losses_of(name, steps, layers, tokens) for name in STORAGES}
    for name, losses in found.items():
        end = statistics.mean(losses[-20:])
        differences = [abs(a - b) / abs(b) for a, b in zip(losses, found["masked"], strict=True)]
        print(
            f"{name}: loss {losses[0]:.4f} at first, {end:.4f} in the last 20 steps; from masked "
            f"{statistics.mean(differences):.1e} on average, {max(differences):.1e} at most",
            flush=True,
        )


def print_layers(arguments: argparse.Namespace) -> None:
    for rows, columns, tokens in LAYERS:
        layers = [layer_of(rows, columns, tokens, sparsity) for sparsity in SPARSITIES]
        if arguments.errors:
            cells = "; ".join(map(errors, layers))
        else:
            found = [ratios(layer, arguments.rounds) for layer in layers]
            half, full = (" / ".join(f"{one:.2f}" for one in column) for column in zip(*found, strict=True))
            cells = f"float16 tiles {half}, float32 tiles {full} times faster than dense bfloat16"
        print(f"[{rows},{columns}] x {tokens}: {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--gpt", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    if half_obstacle():
        raise SystemExit(half_obstacle())
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    if arguments.gpt:
        compare_losses(arguments.steps, arguments.layers, arguments.tokens)
    else:
        with torch.no_grad():
            print_layers(arguments)


if __name__ == "__main__":
    main()
