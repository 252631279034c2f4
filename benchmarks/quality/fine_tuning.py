"""Table 4: dense models that are pruned and fine-tuned, and sparse ones that are fine-tuned dense."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

import rarefy

from .learning_rates import tuned
from .records import Row, complete
from .table import Scale, Table
from .tasks import Task
from .training import adamw, fit, sparsify
from .variants import VARIANTS, Block, gradual

TASK = "stdlib_gpt"
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
# Of the rate and of the steps of training from scratch.
RATE_SHARE = 0.3
STEP_SHARE = 0.5
AT_ONCE = {"magnitude": "magnitude", "Wanda": "wanda", "SparseGPT": "sparsegpt"}
GRADUALLY = "gradually (GMP)"
# What Wanda and SparseGPT measure on: batches of the training data.
MEASURED = 32
FIRST_SPARSE = "sparse, then dense"


@functools.lru_cache(maxsize=1)
def dense_weights(task: Task, lr: float, seed: int, steps: int) -> Mapping[str, Tensor]:
    """A model that was trained dense for the whole budget."""
    torch.manual_seed(seed)
    model = task.model(task.width)
    fit(task, model, adamw(model, lr), steps, seed)
    return model.state_dict()


def tune(
    task: Task, weights: Mapping[str, Tensor], block: Block | None, cell: Row, steps: int
) -> tuple[float, float]:
    """Prunes a trained model and goes on training; the scores before and after."""
    model = task.model(task.width)
    model.load_state_dict(weights)
    if cell["way"] in AT_ONCE:
        batches = list(itertools.islice(task.batches(cell["seed"] + 2000, False), MEASURED))
        rarefy.prune(model.eval(), cell["sparsity"], method=AT_ONCE[cell["way"]], batches=batches)
    sparsity = None if block is None else sparsify(model, block, cell["seed"], task.compute)
    before = task.score(model.eval(), False)
    # Other batches than in the first training.
    fit(task, model, adamw(model, RATE_SHARE * cell["lr"], sparsity), steps, cell["seed"] + 1000)
    return before, task.score(model.eval(), False)


def block_of(cell: Row, steps: int) -> Block | None:
    """How a dense model trains on."""
    if cell["way"] in AT_ONCE:
        return {"sparsity": cell["sparsity"], "init_method": "from_zeros"}
    return gradual("gmp")(cell["sparsity"], steps) if cell["way"] == GRADUALLY else None


def sparse_weights(task: Task, cell: Row, steps: int) -> Mapping[str, Tensor]:
    """A model that was trained sparse, with plain weights."""
    torch.manual_seed(cell["seed"])
    model = task.model(task.width)
    sparsity = sparsify(model, VARIANTS["rigl"](cell["sparsity"], steps) or {}, cell["seed"], task.compute)
    fit(task, model, adamw(model, cell["lr"], sparsity), steps, cell["seed"])
    return copy.deepcopy(rarefy.finalize(model).state_dict())


def cells_of(task: Task, scale: Scale) -> list[Row]:
    rates = tuned(task, ["dense", "rigl"], scale)
    sparsities = SPARSITIES[-1:] if scale.quick else SPARSITIES
    lines = [
        ("dense", 0.0),
        *((way, one) for way in (*AT_ONCE, GRADUALLY, FIRST_SPARSE) for one in sparsities),
    ]
    return [
        {
            "task": task.name,
            "way": way,
            "sparsity": sparsity,
            "lr": rates["rigl" if way == FIRST_SPARSE else "dense"],
            "steps": scale.steps(task),
            "seed": seed,
        }
        for seed in scale.seeds
        for way, sparsity in lines
    ]


def run(scale: Scale) -> None:
    """Measures what is missing."""
    for task in scale.tasks([TASK]):

        def measure(cell: Row, task: Task = task) -> Row:
            steps = cell["steps"]
            more = round(STEP_SHARE * steps)
            if cell["way"] == FIRST_SPARSE:
                weights, block = sparse_weights(task, cell, steps), None
            else:
                weights = dense_weights(task, cell["lr"], cell["seed"], steps)
                block = block_of(cell, more)
            before, after = tune(task, weights, block, cell, more)
            return {"before": before, "score": after}

        complete(scale.folder / "fine_tuning.csv", cells_of(task, scale), measure)


TABLE = Table("fine_tuning", run, ("before", "score"))
