"""A GPT step whose freed memory stays with the process, as `rarefy run` has it, against `RAREFY_MALLOC=0`.

Each is a process of its own, in turns: share of the step's time, and of the peak of memory. `--cpu_time` counts that of
one thread, for a machine that others keep busy.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from gpt_setup import CONFIG, batch_of, gpt_trainer, step_of

from rarefy.allocator import keep_freed_memory

KEPT = {"RAREFY_MALLOC": "1"}
RETURNED = {"RAREFY_MALLOC": "0"}
MODELS = ("0 1 4 512", "0.9 0 4 512", "0.9 1 4 512", "0.9 0 1 64")


def train(sparsity: float | None, bf16: bool, samples: int, length: int, layers: int, cpu_time: bool) -> None:
    """Prints the median seconds of a step, the peak memory of this process in MB, and the pages fetched in a step."""
    if cpu_time:
        torch.set_num_threads(1)
    keep_freed_memory()
    clock = time.process_time if cpu_time else time.perf_counter
    config = CONFIG.model_copy(update={"num_hidden_layers": layers})
    trainer, batch = gpt_trainer(sparsity, bf16=bf16, config=config), batch_of(0, samples, length)
    times, pages = [], []
    for _ in range(7):
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, clock()
        step_of(trainer, batch)
        times.append(clock() - begin)
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(statistics.median(times[3:]), peak, statistics.median(pages[3:]))


def measured(which: Sequence[str], environment: dict[str, str]) -> list[float]:
    command = [sys.executable, __file__, "--train", *which]
    output = subprocess.run(
        command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return [float(number) for number in output.splitlines()[-1].split()]


def compare(which: Sequence[str], rounds: int) -> None:
    """Prints one line about a model."""
    pairs = [(measured(which, KEPT), measured(which, RETURNED)) for _ in range(rounds)]
    time_share, peak_share = (
        statistics.median(kept[i] / returned[i] for kept, returned in pairs) for i in range(2)
    )
    pages = [round(statistics.median(one[2] for one in side)) for side in zip(*pairs, strict=True)]
    sparsity, bf16, samples, length, layers, _ = which
    dtype = "bfloat16" if bf16 == "1" else "float32"
    print(
        f"{layers} layers, sparsity {sparsity}, {dtype}, {samples} x {length} tokens: {time_share:.2f} of the time, "
        f"{peak_share:.2f} of the peak memory; {pages[0]} and {pages[1]} pages fetched in a step",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--cpu_time", action="store_true")
    parser.add_argument(
        "--models", nargs="+", default=MODELS, help="sparsity bf16 samples tokens, as one word"
    )
    parser.add_argument("--train", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        sparsity, bf16, samples, length, layers, cpu_time = map(float, arguments.train)
        train(sparsity or None, bool(bf16), int(samples), int(length), int(layers), bool(cpu_time))
        return
    for model in arguments.models:
        compare([*model.split(), str(arguments.layers), str(int(arguments.cpu_time))], arguments.rounds)


if __name__ == "__main__":
    main()
