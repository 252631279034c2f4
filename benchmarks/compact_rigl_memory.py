"""What RigL's dense gradients cost in memory in compact storage: `python benchmarks/compact_rigl_memory.py`.

The 12-layer GPT at 90% through `rarefy.Trainer`, with an update in every step: RigL, which keeps of each layer's dense
gradient what the update can need; RigL told that steps accumulate, which keeps the whole of all layers; SET, which has
none; and static. Each trains in a process of its own, and its peak counts from after the model was built (on Linux).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from gpt_setup import batch_of, gpt_trainer, step_of

EVERY_STEP = {"update": {"freq": 1}}
BLOCKS = {
    "static": {},
    "set": {"algorithm": "set", **EVERY_STEP},
    "rigl, whole gradients": {"algorithm": "rigl", **EVERY_STEP},
    "rigl": {"algorithm": "rigl", **EVERY_STEP},
}


def forget_the_peak() -> None:
    """Lets the peak memory of this process count from now on, where the system can do that."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


def train(which: str, samples: int, length: int, steps: int = 4) -> None:
    """Trains a few steps; prints the peak memory of this process in MB, and the seconds of a step."""
    trainer = gpt_trainer({"sparsity": 0.9, "compute": "compact", "seed": 1, **BLOCKS[which]})
    assert trainer.sparsity is not None
    trainer.sparsity.accumulates = which == "rigl, whole gradients"
    forget_the_peak()
    seconds = []
    for step in range(steps):
        begin = time.perf_counter()
        step_of(trainer, batch_of(step, samples, length))
        seconds.append(time.perf_counter() - begin)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, median(seconds[1:]))


def measured(which: str, samples: int, length: int) -> tuple[float, float]:
    """What `train` prints in a process of its own."""
    command = [sys.executable, __file__, "--only", which, f"--samples={samples}", f"--length={length}"]
    peak, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(peak), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--only", choices=BLOCKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = arguments.samples, arguments.length
    if arguments.only:
        return train(arguments.only, *size)
    found = {which: measured(which, *size) for which in BLOCKS}
    for which, (peak, seconds) in found.items():
        ratio = peak / found["static"][0]
        print(f"{which}: peak {peak:.0f} MB, {ratio:.2f} of static; {seconds:.2f} s a step", flush=True)


if __name__ == "__main__":
    main()
