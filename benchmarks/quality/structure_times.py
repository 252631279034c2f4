"""The times of table 2 on other processors, in float32 and under bfloat16 autocast: steps, not whole trainings.

What is learned does not depend on the processor, so that the score of each structure stands in table 2 alone.
"""

from __future__ import annotations

import time

import torch
from interleave import medians

from .records import Row, complete
from .structure import SPARSITIES, block_of, kinds
from .table import Scale, Table, processor
from .tasks import Task
from .training import steps_of
from .variants import UPDATES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Calls of each structure in one run, each of the steps from one update to the next; the median counts.
CALLS = 3


def cells_of(task: Task, scale: Scale, dtype: str) -> list[Row]:
    """All structures of one run after those of the other, so that a busy host slows them alike."""
    return [
        {
            "processor": processor(),
            "task": task.name,
            "dtype": dtype,
            "pattern": pattern,
            "sparsity": sparsity,
            "seed": seed,
        }
        for seed in scale.seeds[: scale.repeats(len(scale.seeds))]
        for pattern, sparsity in kinds(task, scale)
    ]


def measure(task: Task, scale: Scale, dtype: str) -> None:
    """Measures what is missing of one task in one format."""
    count = 5 if scale.quick else task.steps // UPDATES
    # More than are run, so that no run is one without an update.
    horizon = 100 * task.steps
    candidates = {
        (pattern, sparsity): steps_of(
            task, with_updates(block_of(pattern, sparsity, horizon), count), count, dtype=DTYPES[dtype]
        )
        for pattern, sparsity in kinds(task, scale)
    }

    def seconds(cell: Row) -> Row:
        run = candidates[cell["pattern"], cell["sparsity"]]
        # What was measured before it has taken its place in the caches.
        found = medians({"": run}, scale.repeats(CALLS), warmup=1, clock=time.process_time)[""]
        return {"seconds": found / count}

    complete(scale.folder / "structure_times.csv", cells_of(task, scale, dtype), seconds)


def with_updates(block: Row | None, every: int) -> Row | None:
    """The block with a topology update in each so many steps, however long the run is meant to be."""
    return None if block is None else {**block, "update": {**block["update"], "freq": every}}


def run(scale: Scale) -> None:
    """Measures what is missing, on this processor."""
    for task in scale.tasks(list(SPARSITIES)):
        for dtype in DTYPES:
            measure(task, scale, dtype)


TABLE = Table("structure_times", run, ("seconds",))
