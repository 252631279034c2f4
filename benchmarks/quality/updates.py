"""When RigL pays: batch size, update interval and drop fraction, after Liu et al., arXiv:2102.02887."""

from __future__ import annotations

from .learning_rates import tuned
from .records import Row, complete
from .table import Scale, Table
from .tasks import Task
from .training import train
from .variants import STOP

SPARSITY = 0.95
TASK = "mnist1d_mlp"
BATCHES = (32, 128, 512)
INTERVALS = (5, 25, 100, 350)
DROPS = (0.1, 0.3, 0.5)
USUAL = {"batch": 128, "interval": 25, "drop": 0.3}


def settings(quick: bool) -> list[Row]:
    """Batch sizes against intervals, then drop fractions alone."""
    if quick:
        return [USUAL]
    crossed = [
        {"batch": batch, "interval": interval, "drop": USUAL["drop"]}
        for batch in BATCHES
        for interval in INTERVALS
    ]
    return crossed + [{**USUAL, "drop": drop} for drop in DROPS if drop != USUAL["drop"]]


def block_of(cell: Row) -> Row:
    if cell["variant"] == "static":
        return {"algorithm": "static", "sparsity": SPARSITY}
    stop = int(STOP * cell["steps"])
    return {
        "algorithm": cell["variant"],
        "sparsity": SPARSITY,
        "update": {"freq": cell["interval"], "stop": stop},
        "drop_fraction": {"type": "cosine", "init": cell["drop"], "half_period": stop},
    }


def cells_of(task: Task, scale: Scale) -> list[Row]:
    rates = tuned(task, ["static", "set", "rigl"], scale, SPARSITY)
    shared = {"task": task.name, "sparsity": SPARSITY, "steps": scale.steps(task)}
    moving = [
        {**shared, "variant": variant, "lr": rates[variant], **setting, "seed": seed}
        for seed in scale.seeds
        for setting in settings(scale.quick)
        for variant in ("set", "rigl")
    ]
    still = [
        {
            **shared,
            "variant": "static",
            "lr": rates["static"],
            "batch": batch,
            "interval": 0,
            "drop": 0.0,
            "seed": seed,
        }
        for seed in scale.seeds
        for batch in (BATCHES if not scale.quick else (128,))
    ]
    return moving + still


def run(scale: Scale) -> None:
    """Measures what is missing."""
    for task in scale.tasks([TASK]):

        def measure(cell: Row, task: Task = task) -> Row:
            outcome = train(
                task,
                block_of(cell),
                lr=cell["lr"],
                seed=cell["seed"],
                steps=cell["steps"],
                batch_size=cell["batch"],
            )
            return {"score": outcome.score}

        complete(scale.folder / "updates.csv", cells_of(task, scale), measure, scale.jobs)


TABLE = Table("updates", run, ("score",))
