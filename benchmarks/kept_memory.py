"""A GPT step whose freed memory glibc keeps, by two environment variables, against one that returns it to the system.

Each is a process of its own, in turns: share of the step's time, and of the peak of memory.
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

from gpt_setup import batch_of, gpt_trainer, step_of

KEPT = {"MALLOC_TRIM_THRESHOLD_": "536870912", "MALLOC_MMAP_THRESHOLD_": "33554432"}


def train(sparsity: float | None, bf16: bool, samples: int, length: int, steps: int = 7) -> None:
    """Prints the median seconds of a step and the peak memory of this process, in MB."""
    trainer, batch, times = gpt_trainer(sparsity, bf16=bf16), batch_of(0, samples, length), []
    for _ in range(steps):
        begin = time.perf_counter()
        step_of(trainer, batch)
        times.append(time.perf_counter() - begin)
    print(statistics.median(times[3:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measured(which: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    command = [sys.executable, __file__, "--train", *which]
    output = subprocess.run(
        command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    seconds, peak = map(float, output.splitlines()[-1].split())
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        sparsity, bf16, samples, length = map(float, arguments.train)
        train(sparsity or None, bool(bf16), int(samples), int(length))
        return
    for runs in ("0 1 4 512", "0.9 0 4 512", "0.9 1 4 512", "0.9 0 1 64"):
        which = runs.split()
        pairs = [(measured(which, KEPT), measured(which, {})) for _ in range(arguments.rounds)]
        time_share, peak_share = (
            statistics.median(kept[i] / returned[i] for kept, returned in pairs) for i in range(2)
        )
        sparsity, bf16, samples, length = which
        model = (
            f"sparsity {sparsity}, {'bfloat16' if bf16 == '1' else 'float32'}, {samples} x {length} tokens"
        )
        print(f"{model}: {time_share:.2f} of the time, {peak_share:.2f} of the peak memory", flush=True)


if __name__ == "__main__":
    main()
