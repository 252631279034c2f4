"""Table 2: what whole blocks, n of m and equal fan-in cost in quality, and what they bring in time.

The runs of one seed follow one another, so that a busy host slows all patterns alike; CPU time of one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .learning_rates import tuned
from .records import Row, complete
from .table import Scale, Table
from .tasks import Task
from .training import train
from .variants import Block, moving

VARIANT = "rigl"
BLOCKS = (4, 8, 16, 32)
# N of m exists at these sparsities alone.
N_OF_M = {0.5: {"n": 2, "m": 4}, 0.875: {"n": 1, "m": 8}, 0.96875: {"n": 1, "m": 32}}
SPARSITIES = {"mnist1d_wide": (0.5, 0.875, 0.96875), "stdlib_gpt": (0.5, 0.875)}
PATTERNS: dict[str, Callable[[float], Any]] = {
    "single connections": lambda sparsity: "unstructured",
    "equal fan-in": lambda sparsity: "fan_in",
    "n of m": lambda sparsity: N_OF_M[sparsity],
    **{f"{side} × {side}": lambda sparsity, side=side: {"block": [side, side]} for side in BLOCKS},
}


def block_of(pattern: str, sparsity: float, steps: int) -> Block | None:
    if pattern == "dense":
        return None
    made = moving(VARIANT, pattern=PATTERNS[pattern](sparsity))(sparsity, steps)
    assert made is not None
    return made


def kinds(task: Task, scale: Scale) -> list[tuple[str, float]]:
    """Pattern and sparsity of each line of the table."""
    sparsities = (0.875,) if scale.quick else SPARSITIES[task.name]
    return [("dense", 0.0), *((name, sparsity) for sparsity in sparsities for name in PATTERNS)]


def run(scale: Scale) -> None:
    """Measures what is missing."""
    for task in scale.tasks(list(SPARSITIES)):
        rates = tuned(task, ["dense", VARIANT], scale)
        shared = {"task": task.name, "variant": VARIANT, "steps": scale.steps(task)}
        cells = [
            {
                **shared,
                "pattern": pattern,
                "sparsity": sparsity,
                "lr": rates["dense" if pattern == "dense" else VARIANT],
                "seed": seed,
            }
            for seed in scale.seeds
            for pattern, sparsity in kinds(task, scale)
        ]

        def measure(cell: Row, task: Task = task) -> Row:
            block = block_of(cell["pattern"], cell["sparsity"], cell["steps"])
            outcome = train(task, block, lr=cell["lr"], seed=cell["seed"], steps=cell["steps"])
            return {"score": outcome.score, "seconds": outcome.seconds}

        complete(scale.folder / "structure.csv", cells, measure)


TABLE = Table("structure", run, ("score", "seconds"))
