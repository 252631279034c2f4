"""Table 5: whether a dense model's best learning rate is a sparse one's, with SµPar (arXiv:2405.15743) and without."""

from __future__ import annotations

import torch

from rarefy.optim.optimizers import build_optimizer

from .records import Row, complete
from .table import Scale, Table
from .tasks import Task
from .training import fit, sparsify

TASK = "stdlib_gpt"
SPARSITIES = (0.0, 0.75, 0.9375)
RATES = tuple(2.0**-power for power in (11, 10, 9, 8, 7, 6))
STEPS = 150


def cells_of(task: Task, scale: Scale) -> list[Row]:
    """Dense is the same under both parametrizations."""
    rates = RATES[2:3] if scale.quick else RATES
    return [
        {
            "task": task.name,
            "parametrization": name,
            "sparsity": sparsity,
            "lr": rate,
            "steps": 20 if scale.quick else STEPS,
            "seed": seed,
        }
        for seed in scale.seeds
        for name in ("standard", "supar")
        for sparsity in SPARSITIES
        for rate in rates
        if sparsity or name == "standard"
    ]


def run(scale: Scale) -> None:
    """Measures what is missing."""
    for task in scale.tasks([TASK]):

        def measure(cell: Row, task: Task = task) -> Row:
            torch.manual_seed(cell["seed"])
            model = task.model(task.width)
            block = {"sparsity": cell["sparsity"], "parametrization": cell["parametrization"]}
            sparsity = sparsify(model, block, cell["seed"], task.compute) if cell["sparsity"] else None
            densities = None if sparsity is None else sparsity.densities
            options = {"AdamW": {"lr": cell["lr"], "weight_decay": 0.01}}
            optimizer = build_optimizer(options, model, densities=densities)
            if sparsity is not None:
                sparsity.apply(optimizer)
            fit(task, model, optimizer, cell["steps"], cell["seed"])
            return {"score": task.score(model.eval(), False)}

        complete(scale.folder / "transfer.csv", cells_of(task, scale), measure, scale.jobs)


TABLE = Table("transfer", run, ("score",))
