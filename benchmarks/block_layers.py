"""Forward + dX + dW of one layer of blocks against torch's dense products, in float32 and bfloat16 in one run.

Each line names the blocks and the dtype; its cells are how many times faster than dense, at each sparsity. With one
thread the clock counts CPU time, which neighbours disturb least; with more, and with `--device cuda`, it is the wall's.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from block_sizes import block_size
from interleave import let_choose_summary, medians
from torch import Tensor

from rarefy.allocator import keep_freed_memory
from rarefy.kernels import BlockTopology, available
from rarefy.kernels.gpu import float32_precision, obstacle
from rarefy.kernels.instruction_sets import matrix_units

LAYERS = [(768, 768, 2048), (3072, 768, 2048), (768, 3072, 2048), (4096, 4096, 1024)]
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
GPU_CALLS = 10  # to be waited for together, since a GPU works ahead of the program
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")


def processor() -> str:
    """The name of this processor, and which of the instructions that matter here it has."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    flags = names.get("flags", "").split()
    model = names.get("model name", platform.processor() or platform.machine())
    family = f"family {names.get('cpu family', '?')} model {names.get('model', '?')}"
    return f"{model} ({family}): {' '.join(flag for flag in FLAGS if flag in flags)}"


def place(device: torch.device) -> str:
    """What the line above the table says of the machine.

    Raises:
        SystemExit: a GPU is asked for that has no kernels.
    """
    if device.type == "cpu":
        return processor()
    found = obstacle(device)
    if found:
        raise SystemExit(f"--device {device}: {found}")
    return f"{torch.cuda.get_device_name(device)}, float32 as {float32_precision()}"


def waited_for(step: Callable[[], object]) -> Callable[[], object]:
    """Several steps on a GPU, and the end of the last one."""

    def steps() -> None:
        for _ in range(GPU_CALLS):
            step()
        torch.cuda.synchronize()

    return steps


def dense_step(weight: Tensor, x: Tensor, grad: Tensor) -> Callable[[], object]:
    return lambda: (x @ weight.t(), grad @ weight, grad.t() @ x)


def block_step(topology: BlockTopology, x: Tensor, grad: Tensor) -> Callable[[], object]:
    values = torch.randn(topology.values_shape, device=x.device)
    linear = torch.ops.rarefy.block_linear
    backward = torch.ops.rarefy.block_linear_backward
    parts = (*topology.tensors, topology.sizes)
    return lambda: (
        linear(x, values, None, None, *parts),
        backward(grad, x, values, *parts, [True, True, False]),
    )


def topology_of(
    rows: int, columns: int, block: tuple[int, int], sparsity: float, device: torch.device
) -> BlockTopology:
    """As many active blocks as the sparsity asks for, anywhere."""
    down = rows // block[0]
    across = columns // block[1]
    order = torch.randperm(down * across)
    active = torch.zeros(down * across, dtype=torch.bool)
    active[order[: round((1 - sparsity) * order.numel())]] = True
    return BlockTopology.from_blocks(active.view(down, across).to(device), block)


def lines(
    layer: tuple[int, int, int],
    blocks: list[tuple[int, int]],
    dtypes: list[torch.dtype],
    arguments: argparse.Namespace,
) -> Iterator[str]:
    """One line for each dtype and block; all candidates of a layer alternate in one process."""
    rows, columns, tokens = layer
    device = torch.device(arguments.device)
    is_on_gpu = device.type != "cpu"
    candidates: dict[str, Callable[[], object]] = {}
    weight = torch.randn(rows, columns, device=device)
    x = torch.randn(tokens, columns, device=device)
    grad = torch.randn(tokens, rows, device=device)
    topologies = {
        (b, s): topology_of(rows, columns, b, s, device) for b in blocks for s in arguments.sparsities
    }
    for dtype in dtypes:
        inputs = (x.to(dtype), grad.to(dtype))
        candidates[f"dense {dtype}"] = dense_step(weight.to(dtype), *inputs)
        for (block, sparsity), topology in topologies.items():
            candidates[f"{block} {sparsity} {dtype}"] = block_step(topology, *inputs)
    if is_on_gpu:
        candidates = {name: waited_for(step) for name, step in candidates.items()}
    is_cpu_time = torch.get_num_threads() == 1 and not is_on_gpu
    clock = time.process_time if is_cpu_time else time.perf_counter
    seconds = medians(candidates, arguments.rounds, warmup=1, clock=clock, summary=arguments.summary)
    for dtype in dtypes:
        dense = seconds[f"dense {dtype}"]
        one = dense / GPU_CALLS if is_on_gpu else dense
        rate = 6e-9 * rows * columns * tokens / one
        yield f"[{rows},{columns}] x {tokens} {dtype}: dense {1e3 * one:.2f} ms ({rate:.0f} GFLOP/s)"
        for block in blocks:
            cells = [dense / seconds[f"{block} {s} {dtype}"] for s in arguments.sparsities]
            yield f"  {block[0]}x{block[1]}: " + " / ".join(f"{cell:.1f}" for cell in cells)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tf32", action="store_true", help="let the GPU multiply float32 in that format")
    parser.add_argument(
        "--isa",
        choices=(*available(), *matrix_units()),
        help="kernels to use (default: the best of this machine)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16", "float16"],  # the last one has no kernels on the CPU
    )
    parser.add_argument("--blocks", nargs="+", type=block_size, default=[(16, 16), (32, 32), (64, 64)])
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument(
        "--layers", nargs="+", type=int, default=range(len(LAYERS)), help="numbers of the layers"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    let_choose_summary(parser)
    arguments = parser.parse_args(words)
    torch.set_float32_matmul_precision("high" if arguments.tf32 else "highest")
    machine = place(torch.device(arguments.device))
    keep_freed_memory()
    if arguments.isa:
        os.environ["RAREFY_KERNELS"] = arguments.isa
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    is_cpu_time = arguments.threads == 1 and arguments.device == "cpu"
    clock = "CPU time" if is_cpu_time else "wall time"
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"{machine}; torch {torch.__version__}, {arguments.threads} threads, {clock}; load average {load}")
    print(f"times faster than dense at {' / '.join(f'{s:.0%}' for s in arguments.sparsities)}")
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    with torch.no_grad():
        for number in arguments.layers:
            for line in lines(LAYERS[number], arguments.blocks, dtypes, arguments):
                print(line, flush=True)


if __name__ == "__main__":
    main()
