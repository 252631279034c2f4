"""Forward + backward of one sparse linear layer against `sparselab` and `sparseprop` from PyPI, float32.

`pip install --no-deps sparselab sparseprop` (sparseprop needs scipy and a compiler); one that is missing is skipped.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from interleave import medians
from torch import Tensor, nn

from rarefy.kernels import available
from rarefy.nn import SparseLinear

LAYERS = [(768, 768, 2048), (3072, 768, 2048), (768, 3072, 2048), (4096, 4096, 1024)]
SPARSITIES = (0.9, 0.95)


def sparselab_layer(package: Any, dense: nn.Linear, sparsity: float) -> nn.Module:
    return package.SparseLinear(dense.in_features, dense.out_features, bias=False, sparsity=sparsity)


def sparseprop_layer(package: Any, dense: nn.Linear, sparsity: float) -> nn.Module:
    mask = torch.rand_like(dense.weight) >= sparsity
    return package.modules.linear.SparseLinear(dense.weight.detach() * mask)


RIVALS = {
    "sparselab": ("sparselab", sparselab_layer),
    "sparseprop": ("sparseprop.modules.linear", sparseprop_layer),
}


def installed() -> dict[str, Callable[[nn.Linear, float], nn.Module]]:
    """How each rival that can be imported makes its layer; says what is missing."""
    found: dict[str, Callable[[nn.Linear, float], nn.Module]] = {}
    for name, (module, make) in RIVALS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"{name} is skipped: {error}")
            continue
        package = importlib.import_module(name)
        found[name] = lambda dense, sparsity, make=make, package=package: make(package, dense, sparsity)
    return found


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """Forward and backward, with gradients of the input and of the weight."""

    def run() -> None:
        layer.zero_grad()
        layer(x.requires_grad_()).backward(grad)
        x.grad = None

    return run


def compare(
    rows: int, columns: int, tokens: int, sparsity: float, rounds: int, rivals: dict[str, Any]
) -> str:
    """How many times faster than dense and than each rival."""
    dense = nn.Linear(columns, rows, bias=False)
    x, grad = torch.randn(tokens, columns), torch.randn(tokens, rows)
    layers = {"dense": dense, **{name: make(dense, sparsity) for name, make in rivals.items()}}
    layers["rarefy"] = SparseLinear.from_linear(dense, torch.rand(rows, columns) >= sparsity)
    seconds = medians({name: step(layer, x, grad) for name, layer in layers.items()}, rounds)
    ratios = [f"{seconds[name] / seconds['rarefy']:.1f} than {name}" for name in ("dense", *rivals)]
    return ", ".join(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", default=available()[-1], choices=available())
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    os.environ["RAREFY_KERNELS"] = arguments.isa
    torch.manual_seed(0)
    rivals = installed()
    for rows, columns, tokens in LAYERS:
        for sparsity in SPARSITIES:
            result = compare(rows, columns, tokens, sparsity, arguments.rounds, rivals)
            print(
                f"{arguments.isa} [{rows},{columns}] x {tokens} at {sparsity:.0%}: times faster: {result}",
                flush=True,
            )


if __name__ == "__main__":
    main()
