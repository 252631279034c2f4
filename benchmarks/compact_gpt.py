"""A whole training step of the 12-layer, 768-wide GPT, dense against sparse, float32 or `--bf16`.

The dense model is there twice: by the same code as the sparse one, and with torch's own attention, norms and GELU.
`--block 32` makes the sparse weights of blocks of that size. Both are trained by `rarefy.Trainer`'s step (fused AdamW,
clipping) in the same process, in turns. `--memory` reports the peak memory of a process of its own for each, and what
the sparse weights take of it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from block_sizes import block_size
from gpt_setup import batch_of, gpt_trainer, step_of
from interleave import let_choose_summary, medians

from rarefy.algorithms.summary import summary
from rarefy.allocator import keep_freed_memory
from rarefy.decoder import attention
from rarefy.kernels.dense import calls

SPARSITIES = (0.8, 0.9, 0.95)


def speed_up(
    sparsity: float,
    bf16: bool,
    block: tuple[int, int] | None,
    timed: Callable[..., dict[str, float]],
    samples: int,
    length: int,
) -> tuple[float, float]:
    """How many times faster a step of the sparse model is than each of the dense ones."""
    batch = batch_of(0, samples, length)
    options = {"sparsity": sparsity, "pattern": "unstructured" if block is None else {"block": list(block)}}
    dense = partial(step_of, gpt_trainer(None, bf16=bf16), batch)
    steps = {
        "dense": dense,
        "torch": partial(by_torch_alone, dense),
        "sparse": partial(step_of, gpt_trainer(options, bf16=bf16), batch),
    }
    seconds = timed(steps)
    return seconds["dense"] / seconds["sparse"], seconds["torch"] / seconds["sparse"]


def by_torch_alone(step: Callable[[], object]) -> None:
    """A step without kernels of rarefy's beside the linear layers."""
    with torch_alone():
        step()


@contextmanager
def torch_alone() -> Iterator[None]:
    with (
        patch.object(calls, "takes", lambda *_: False),
        patch.object(attention, "takes_attention", lambda *_: False),
        patch.object(attention, "_BLOCKS_PAY", range(0)),
        patch.object(attention, "_BFLOAT16_PAYS", range(0)),
    ):
        yield


def peak_of(sparsity: float | None, steps: int = 3) -> None:
    """Trains a few steps and prints the peak memory of this process, in MB, and the share of the sparse weights."""
    trainer = gpt_trainer(sparsity)
    for step in range(steps):
        step_of(trainer, batch_of(step, 4, 512))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    share = "" if trainer.sparsity is None else f"; sparse weights: {weight_share(trainer):.3f} of dense ones"
    print(f"sparsity {sparsity}: peak {peak:.0f} MB{share}")
    if trainer.sparsity is not None:
        rows = summary(trainer.sparsity).rows
        print(f"  {sum(row.storage in ('compact', 'block') for row in rows)} weights are compact")


def weight_share(trainer) -> float:
    """Values, gradients, AdamW state and indices over dense weights, gradients and AdamW state."""
    dense = stored = 0
    for algorithm in trainer.sparsity.algorithms:
        for parameter in algorithm.parameters.values():
            dense += parameter.shape.numel() * 16
            states = trainer.trained_by.state[parameter.weight]
            own = sum(states[key].numel() for key in ("exp_avg", "exp_avg_sq")) + 2 * parameter.weight.numel()
            stored += 4 * own + parameter.storage.index_bytes
    return stored / dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bf16", action="store_true", help="both under bfloat16 autocast")
    parser.add_argument("--block", type=block_size, help="of whole blocks: 32, or 32x16")
    parser.add_argument(
        "--cpu_time", action="store_true", help="of one thread, for a machine that others keep busy"
    )
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--rounds", type=int, default=5)
    let_choose_summary(parser)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.peak_of:
        peak_of(None if arguments.peak_of == "dense" else float(arguments.peak_of))
    elif arguments.memory:
        for which in ("dense", *map(str, SPARSITIES)):
            subprocess.run([sys.executable, __file__, "--peak-of", which], check=True)
    else:
        if arguments.cpu_time:
            torch.set_num_threads(1)
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        timed = partial(medians, rounds=arguments.rounds, warmup=2, clock=clock, summary=arguments.summary)
        for sparsity in arguments.sparsities:
            sizes = arguments.samples, arguments.length
            ratio, of_torch = speed_up(sparsity, arguments.bf16, arguments.block, timed, *sizes)
            blocks = (
                "" if arguments.block is None else f", blocks {arguments.block[0]} x {arguments.block[1]}"
            )
            kind = "bfloat16 autocast" if arguments.bf16 else "float32"
            print(
                f"GPT step, {kind}{blocks}, sparsity {sparsity}: {ratio:.2f} times faster than dense, "
                f"{of_torch:.2f} times faster than dense with torch's attention, norms and GELU",
                flush=True,
            )


if __name__ == "__main__":
    main()
