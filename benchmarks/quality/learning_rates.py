"""The learning rate of each variant on each task: the best of a grid, on seeds and data of its own."""

from __future__ import annotations

from .records import Row, complete, summarised
from .table import Scale
from .tasks import Task
from .training import run_variant

GRIDS = {"accuracy": (3e-3, 1e-2, 3e-2, 1e-1), "bits_per_byte": (1e-3, 3e-3, 1e-2, 3e-2)}
# What is tuned at the first is used up to it, what is tuned at the second beyond.
TUNED_AT = (0.9, 0.98)


def tuned_at(sparsity: float) -> float:
    """The sparsity whose learning rate is used at this one."""
    return TUNED_AT[0] if sparsity <= TUNED_AT[0] else TUNED_AT[1]


def tuned(task: Task, variants: list[str], scale: Scale, sparsity: float = 0.9) -> dict[str, float]:
    """The learning rate of each variant at a sparsity; what chose it is in `learning_rates.csv`.

    A run learns from four fifths of the training data and is judged on the last fifth.
    """
    grid = GRIDS[task.metric][:1] if scale.quick else GRIDS[task.metric]
    at = tuned_at(sparsity)
    cells = [
        {"task": task.name, "variant": variant, "sparsity": at, "lr": lr, "seed": seed}
        for variant in variants
        for lr in grid
        for seed in scale.tuning_seeds
    ]

    def measure(cell: Row) -> Row:
        outcome = run_variant(
            task,
            cell["variant"],
            cell["sparsity"],
            lr=cell["lr"],
            seed=cell["seed"],
            steps=scale.steps(task),
            tuning=True,
        )
        return {"score": outcome.score}

    rows = summarised(complete(scale.folder / "learning_rates.csv", cells, measure, scale.jobs), ["score"])
    sign = 1 if task.metric == "accuracy" else -1
    best: dict[str, Row] = {}
    for row in rows:
        known = best.get(row["variant"])
        if known is None or sign * row["score"] > sign * known["score"]:
            best[row["variant"]] = row
    return {variant: row["lr"] for variant, row in best.items()}
