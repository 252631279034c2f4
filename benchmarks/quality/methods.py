"""Table 1: every method at every sparsity, on every task."""

from __future__ import annotations

from .learning_rates import tuned, tuned_at
from .records import Row, complete
from .table import Scale, Table
from .tasks import Task
from .training import run_variant
from .variants import VARIANTS

SPARSITIES = {
    "mnist1d_mlp": (0.8, 0.9, 0.95, 0.98, 0.99),
    "mnist1d_conv": (0.8, 0.9, 0.95, 0.98),
    "digits_mlp": (0.8, 0.9, 0.95, 0.98, 0.99),
    "stdlib_gpt": (0.8, 0.9, 0.95, 0.98, 0.99),
}
# All weights of these have about one shape, so that ERK is the uniform distribution.
ALIKE = ("stdlib_gpt",)


def cells_of(task: Task, scale: Scale) -> list[Row]:
    variants = [name for name in VARIANTS if "ERK" not in name or task.name not in ALIKE]
    sparse = [variant for variant in variants if variant != "dense"]
    sparsities = (0.9,) if scale.quick else SPARSITIES[task.name]
    rates = {at: tuned(task, sparse, scale, at) for at in sorted({*map(tuned_at, sparsities)})}
    # The dense model is the same at every sparsity.
    dense = tuned(task, ["dense"], scale)
    return [
        {
            "task": task.name,
            "variant": variant,
            "sparsity": sparsity,
            "lr": dense[variant] if variant == "dense" else rates[tuned_at(sparsity)][variant],
            "steps": scale.steps(task),
            "seed": seed,
        }
        for seed in scale.seeds
        for variant in variants
        for sparsity in ((0.0,) if variant == "dense" else sparsities)
    ]


def run(scale: Scale) -> None:
    for task in scale.tasks(list(SPARSITIES)):

        def measure(cell: Row, task: Task = task) -> Row:
            outcome = run_variant(
                task,
                cell["variant"],
                cell["sparsity"],
                lr=cell["lr"],
                seed=cell["seed"],
                steps=cell["steps"],
            )
            return {"weights": outcome.weights, "score": outcome.score, "seconds": outcome.seconds}

        complete(scale.folder / "methods.csv", cells_of(task, scale), measure, scale.jobs)


TABLE = Table("methods", run, ("weights", "score", "seconds"))
