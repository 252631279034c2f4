"""Forward + dX + dW of one sparse layer against torch's dense matrix products, float32 or bfloat16.

With one thread the clock counts CPU time, which neighbours disturb least; with more it is the wall's. Run with
`--isa v3` under ATEN_CPU_CAPABILITY=avx2 and MKL_ENABLE_INSTRUCTIONS=AVX2 for machines without AVX-512.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from interleave import let_choose_summary, medians
from torch import Tensor

from rarefy.allocator import keep_freed_memory
from rarefy.kernels import Panels, available

LAYERS = [(768, 768, 2048), (3072, 768, 2048), (768, 3072, 2048), (4096, 4096, 1024)]
SPARSITIES = (0.8, 0.9, 0.95)


def dense_step(weight: Tensor, x: Tensor, grad: Tensor) -> Callable[[], object]:
    return lambda: (x @ weight.t(), grad @ weight, grad.t() @ x)


def sparse_step(panels: Panels, values: Tensor, x: Tensor, grad: Tensor) -> Callable[[], object]:
    linear, backward = torch.ops.rarefy.sparse_linear, torch.ops.rarefy.sparse_linear_backward
    structure = (*panels.tensors, panels.sizes)
    return lambda: (
        linear(x, values, None, None, *structure),
        backward(grad, x, values, *structure, [True, True, False]),
    )


def speed_up(
    layer: tuple[int, int, int],
    sparsity: float,
    dtype: torch.dtype,
    timed: Callable[..., dict[str, float]],
) -> float:
    """How many times faster the sparse layer is than the dense one."""
    rows, columns, tokens = layer
    weight, x, grad = torch.randn(rows, columns), torch.randn(tokens, columns), torch.randn(tokens, rows)
    panels = Panels.from_mask(torch.rand(rows, columns) >= sparsity)
    inputs = (x.to(dtype), grad.to(dtype))
    candidates = {
        "dense": dense_step(weight.to(dtype), *inputs),
        "sparse": sparse_step(panels, panels.gather(weight), *inputs),
    }
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = timed(candidates, clock=clock)
    return seconds["dense"] / seconds["sparse"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", default=available()[-1], choices=available())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    let_choose_summary(parser)
    arguments = parser.parse_args()
    keep_freed_memory()
    os.environ["RAREFY_KERNELS"] = arguments.isa
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        dtype = getattr(torch, arguments.dtype)
        timed = partial(medians, rounds=arguments.rounds, summary=arguments.summary)
        for rows, columns, tokens in LAYERS:
            layer = (rows, columns, tokens)
            ratios = [speed_up(layer, s, dtype, timed) for s in SPARSITIES]
            cells = " / ".join(f"{ratio:.1f}" for ratio in ratios)
            print(
                f"{arguments.isa} {arguments.dtype} [{rows},{columns}] x {tokens}: {cells} times faster",
                flush=True,
            )


if __name__ == "__main__":
    main()
