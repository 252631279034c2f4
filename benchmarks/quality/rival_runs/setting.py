"""What every library gets: the data, the batches, the rates, and how a run is reported. Needs numpy alone."""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

WIDTH = 1024
SPARSITY = 0.9
BATCH = 128
CLASSES = 10
INPUTS = 40
UPDATE_EVERY = 10


class Setting:
    """One run's data and budget.

    Args:
        data: a file with the arrays x, y, x_test, y_test.
        seed: of the batches; a library seeds its weights with it as well.
        steps: optimizer steps.
        lr: the highest learning rate.
    """

    def __init__(self, data: Path, seed: int, steps: int, lr: float) -> None:
        self.arrays = dict(np.load(data))
        self.seed = seed
        self.steps = steps
        self.lr = lr
        self.clock = 0.0

    @property
    def begin(self) -> int:
        """The first step after which gradual methods prune."""
        return self.steps // 10

    @property
    def stop(self) -> int:
        """The step after which no topology changes."""
        return int(0.75 * self.steps)

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero, as a share of `lr`."""
        warm = max(int(0.05 * self.steps), 1)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm)))

    def cubic(self, step: int) -> float:
        """The sparsity of Zhu and Gupta's schedule."""
        done = min(max((step - self.begin) / (self.stop - self.begin), 0.0), 1.0)
        return SPARSITY * (1 - (1 - done) ** 3)

    def is_update(self, step: int) -> bool:
        """Whether the topology may change after this step."""
        return self.begin <= step <= self.stop and step % UPDATE_EVERY == 0

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As many batches as steps; the clock starts after the first, which imports and compiles."""
        random = np.random.default_rng(self.seed)
        x, y = self.arrays["x"], self.arrays["y"]
        for step in range(self.steps):
            if step == 1:
                self.clock = time.process_time()
            index = random.integers(0, len(x), BATCH)
            yield x[index], y[index]


# Trains a model; returns what predicts classes, and the share of weights that are zero.
Library = Callable[[Setting], tuple[Callable[[np.ndarray], np.ndarray], float]]


def lines_of_code(path: str) -> int:
    """Lines between the marks that are neither blank nor comments."""
    text = Path(path).read_text()
    found = re.search(r"# begin\n(.*?)# end\n", text, re.DOTALL)
    assert found is not None
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in found[1].splitlines())


def main(libraries: dict[str, Library], path: str) -> None:
    """Runs one library in this process and prints a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(libraries))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    given = parser.parse_args()
    outcome = run(libraries[given.name], Setting(given.data, given.seed, given.steps, given.lr))
    print(json.dumps({"lr": given.lr, "seed": given.seed, "lines": lines_of_code(path), **outcome}))


def run(library: Library, setting: Setting) -> dict[str, float]:
    """Trains and judges one model; memory is what the peak of the process grew by."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    predict, zeros = library(setting)
    seconds = (time.process_time() - setting.clock) * setting.steps / (setting.steps - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    right = predict(setting.arrays["x_test"]) == setting.arrays["y_test"]
    return {
        "score": 100 * float(right.mean()),
        "zeros": zeros,
        "seconds": seconds,
        "megabytes": (peak - before) / 1024,
    }
