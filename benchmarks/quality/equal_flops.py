"""Table 3, the other half: models of one task that train for the same floating-point operations.

Operations do not depend on a processor: this is what sparsity would bring where every zero is skipped at no cost.
"""

from __future__ import annotations

import torch
from torch import nn

from rarefy.callbacks.flops import ForwardFlops
from rarefy.storage.training_cost import PER_POSITION, PRODUCTS, step_operations

from .equal_time import MODELS, UPDATE_EVERY, Model, measure, tuned_rates
from .records import Row, complete
from .table import Scale, Table
from .tasks import Task
from .training import sparsify
from .variants import STOP

DTYPE = "float32"
# So many steps of the narrowest dense model, which every other may spend in its own way.
BUDGETS = {"stdlib_gpt": (50, 100, 200), "mnist1d_mlp": (250, 500, 1000)}


def forward_of(task: Task, model: nn.Module) -> ForwardFlops:
    """Operations of one forward pass, every weight dense."""
    with torch.no_grad(), ForwardFlops(model) as flops:
        task.loss(model, next(task.batches(0, False)))
    return flops


def operations(task: Task, model: Model) -> float:
    """Floating-point operations of a training step: its three products, and its share of the topology updates."""
    torch.manual_seed(0)
    dense = task.model(model.width)
    flops = forward_of(task, dense)
    total = float(PRODUCTS * (sum(flops.by_parameter.values()) + flops.other))
    block = model.block(1000)
    if block is None:
        return total
    for name, parameter in sparsify(dense, block, 0).parameters.items():
        forward, size, active = flops.by_parameter[name], parameter.shape.numel(), parameter.active
        usual = step_operations(forward, size, active, active)
        # The dense gradient once in so many steps, and what ranking it takes.
        update = step_operations(forward, size, active, size) - usual + PER_POSITION * size
        total += usual - PRODUCTS * forward + STOP * update / UPDATE_EVERY
    return total


def run(scale: Scale) -> None:
    """Measures what is missing."""
    for task in scale.tasks(list(MODELS)):
        complete_one(task, scale)


def complete_one(task: Task, scale: Scale) -> None:
    """Measures what is missing of one task."""
    costs = {model.label: operations(task, model) for model in MODELS[task.name]}
    share = 0.1 if scale.quick else 1.0
    budgets = BUDGETS[task.name][:1] if scale.quick else BUDGETS[task.name]
    first = next(iter(costs.values()))
    steps = {
        (name, budget): max(round(share * budget * first / cost), 1)
        for budget in budgets
        for name, cost in costs.items()
    }
    runs = list(dict.fromkeys((name, count) for (name, _), count in steps.items()))
    rates = tuned_rates(task, DTYPE, runs, scale, "equal_flops_rates.csv")
    cells: list[Row] = [
        {
            "task": task.name,
            "dtype": DTYPE,
            "model": name,
            "budget": budget,
            "operations": budget * first,
            "steps": count,
            "lr": rates[name, count],
            "seed": seed,
        }
        for seed in scale.seeds
        for (name, budget), count in steps.items()
    ]
    complete(scale.folder / "equal_flops.csv", cells, lambda cell: measure(task, cell), scale.jobs)


TABLE = Table("equal_flops", run, ("score", "weights", "seconds"))
