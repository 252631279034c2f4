"""Table 3: models of one task that train for the same time: wide and sparse against narrow and dense.

How many steps fit into a time depends on the processor and the format, so that each has runs of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from interleave import medians

from .records import Row, complete, read, summarised
from .structure_times import DTYPES
from .table import Scale, Table, processor
from .tasks import Task
from .training import steps_of, train
from .variants import STOP, Block, moving

UPDATE_EVERY = 25
GRIDS = {"stdlib_gpt": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "mnist1d_mlp": (3e-3, 1e-2, 3e-2)}


@dataclass(frozen=True)
class Model:
    """A width with a sparsity; compact storage skips the zeros."""

    width: int
    sparsity: float = 0.0
    pattern: Any = "unstructured"

    @property
    def label(self) -> str:
        """As it stands in files and tables."""
        if not self.sparsity:
            return f"{self.width} wide, dense"
        blocks = "" if self.pattern == "unstructured" else f", blocks of {self.pattern['block'][0]}"
        return f"{self.width} wide, {100 * self.sparsity:g}% sparse{blocks}"

    def block(self, steps: int) -> Block | None:
        """RigL, or nothing."""
        if not self.sparsity:
            return None
        block = moving("rigl", pattern=self.pattern)(self.sparsity, steps) or {}
        # Not a fixed number of updates: a step then costs the same in runs of every length.
        return {**block, "update": {"freq": UPDATE_EVERY, "stop": int(STOP * steps)}}


BLOCKS_OF_16 = {"block": [16, 16]}
MODELS = {
    "stdlib_gpt": (
        Model(128),
        Model(256),
        Model(256, 0.9),
        Model(256, 0.9, BLOCKS_OF_16),
    ),
    "mnist1d_mlp": (Model(256), Model(512), Model(1024), Model(1024, 0.9), Model(2048, 0.95)),
}
# Seconds of training on one thread, as if nothing else ran.
BUDGETS = {"stdlib_gpt": (2.0, 4.0, 8.0), "mnist1d_mlp": (1.0, 2.0, 4.0)}


def formats() -> list[str]:
    """In which a model is trained here: bfloat16 too where the processor multiplies it faster."""
    return list(DTYPES) if "AMX" in processor() else ["float32"]


def step_times(task: Task, dtype: str, scale: Scale) -> dict[str, float]:
    """Seconds of a step of each model: interleaved medians of CPU time, measured once and written down."""
    path = scale.folder / "step_times.csv"
    shared = {"processor": processor(), "dtype": dtype, "task": task.name}
    cells = [{**shared, "model": model.label} for model in MODELS[task.name]]
    known = {row["model"]: row["seconds"] for row in read(path) if shared.items() <= row.items()}
    if set(known) >= {cell["model"] for cell in cells}:
        return known
    # As many steps as lie between two topology updates.
    candidates = {
        model.label: steps_of(task, model.block(1000), UPDATE_EVERY, width=model.width, dtype=DTYPES[dtype])
        for model in MODELS[task.name]
    }
    measured = medians(candidates, scale.repeats(9), warmup=1, clock=time.process_time)
    rows = complete(path, cells, lambda cell: {"seconds": measured[cell["model"]] / UPDATE_EVERY})
    return {row["model"]: row["seconds"] for row in rows}


def measure(task: Task, cell: Row, tuning: bool = False) -> Row:
    model = next(one for one in MODELS[task.name] if one.label == cell["model"])
    outcome = train(
        task,
        model.block(cell["steps"]),
        lr=cell["lr"],
        seed=cell["seed"],
        steps=cell["steps"],
        width=model.width,
        tuning=tuning,
        compute="auto",
        dtype=DTYPES[cell["dtype"]],
    )
    return {"score": outcome.score, "weights": outcome.weights, "seconds": outcome.seconds}


def tuned_rates(
    task: Task, dtype: str, runs: Sequence[tuple[str, int]], scale: Scale, file: str = "equal_time_rates.csv"
) -> dict[tuple[str, int], float]:
    """The learning rate of each model for each number of steps, as in `learning_rates`."""
    cells = [
        {"dtype": dtype, "task": task.name, "model": name, "steps": count, "lr": rate, "seed": seed}
        for name, count in runs
        for rate in (GRIDS[task.name][:1] if scale.quick else GRIDS[task.name])
        for seed in scale.tuning_seeds
    ]
    rows = summarised(
        complete(
            scale.folder / file,
            cells,
            lambda cell: {"score": measure(task, cell, tuning=True)["score"]},
            scale.jobs,
        ),
        ["score"],
    )
    sign = 1 if task.metric == "accuracy" else -1
    best: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda row: sign * row["score"]):
        best[row["model"], row["steps"]] = row
    return {run: row["lr"] for run, row in best.items()}


def run(scale: Scale) -> None:
    """Measures what is missing, on this processor."""
    for task in scale.tasks(list(MODELS)):
        for dtype in formats():
            complete_one(task, dtype, scale)


def complete_one(task: Task, dtype: str, scale: Scale) -> None:
    """Measures what is missing of one task in one format."""
    times = step_times(task, dtype, scale)
    share = 0.1 if scale.quick else 1.0

    def count(name: str, budget: float) -> int:
        return max(round(share * budget / times[name]), 20)

    labels = [model.label for model in MODELS[task.name]]
    budgets = BUDGETS[task.name][:1] if scale.quick else BUDGETS[task.name]
    runs = [(name, count(name, budget)) for budget in budgets for name in labels]
    rates = tuned_rates(task, dtype, list(dict.fromkeys(runs)), scale)
    cells = [
        {
            "processor": processor(),
            "dtype": dtype,
            "task": task.name,
            "model": name,
            "budget": budget,
            "steps": count(name, budget),
            "lr": rates[name, count(name, budget)],
            "seed": seed,
        }
        for seed in scale.seeds
        for budget in budgets
        for name in labels
    ]
    complete(scale.folder / "equal_time.csv", cells, lambda cell: measure(task, cell))


TABLE = Table("equal_time", run, ("score", "weights", "seconds"))
