"""GELU with the tangent, forward and backward, against torch's: the wide layer of the GPT, float32 or `--bfloat16`.

With one thread the clock counts CPU time, which neighbours disturb least; with more it is the wall's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from interleave import medians
from torch import Tensor
from torch.nn import functional

from rarefy.allocator import keep_freed_memory
from rarefy.kernels import exact_gelu, tanh_gelu

TOKENS = 2048
WIDTH = 3072


def step(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(x), x, grad)


def of_torch(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bfloat16", action="store_true", help="and the exact one of this package")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16 if arguments.bfloat16 else torch.float32
    x, grad = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_(), torch.randn(TOKENS, WIDTH).to(dtype)
    functions = {"own": tanh_gelu, "torch": of_torch, "torch, exact": functional.gelu}
    if arguments.bfloat16:
        functions["own, exact"] = exact_gelu
    candidates = {name: step(function, x, grad) for name, function in functions.items()}
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    seconds = medians(candidates, arguments.rounds, clock=clock)
    cells = ", ".join(f"{name} {found * 1e3:.1f} ms" for name, found in seconds.items())
    print(f"[{TOKENS}, {WIDTH}], {arguments.threads} threads: {cells}")
    print(f"share of the time of torch's: {seconds['own'] / seconds['torch']:.2f}")


if __name__ == "__main__":
    main()
