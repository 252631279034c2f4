"""One run: a task, a variant, a sparsity, a learning rate and a seed give a score."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import rarefy
from rarefy import filters

from .tasks import Task
from .variants import VARIANTS


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Args:
        score: the task's metric.
        weights: how many weights of the model's matrices are not pruned.
        seconds: CPU time of training on one thread, without judging.
    """

    score: float
    weights: int
    seconds: float


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that count: what can become sparse, and a first layer that is told to stay dense."""
    owners = (nn.Linear, nn.Conv1d)
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, owners) and "lm_head" not in name
    }


def count_weights(model: nn.Module, sparsity: Any) -> int:
    """The active connections; those that were grown last may still be zeros."""
    sparse = {} if sparsity is None else sparsity.parameters
    active = sum(one.active for one in sparse.values())
    return active + sum(weight.numel() for name, weight in matrices(model).items() if name not in sparse)


def kept_weights(task: Task, sparsity: float) -> int:
    """How many weights a sparse model of the task keeps."""
    model = task.model(task.width)
    sparse = sum(one.parameter.numel() for one in filters.select(model, None).values())
    whole = sum(weight.numel() for weight in matrices(model).values())
    return whole - sparse + round((1 - sparsity) * sparse)


def narrow_width(task: Task, sparsity: float) -> int:
    """The width at which a dense model has most nearly as many weights as a sparse one."""
    target = kept_weights(task, sparsity)
    step = 4 if task.metric == "bits_per_byte" else 1  # four heads share the width

    def distance(width: int) -> int:
        return abs(sum(weight.numel() for weight in matrices(task.model(width)).values()) - target)

    return min(range(step, task.width + 1, step), key=distance)


def rate_at(step: int, steps: int, warmup: float = 0.05) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = max(int(warmup * steps), 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def sparsify(model: nn.Module, block: dict[str, Any], seed: int, compute: str = "masked") -> Any:
    """Makes a model sparse."""
    sparsity = rarefy.configure({"compute": compute, "seed": seed, **block})
    with warnings.catch_warnings():
        # At 98% small layers keep few connections an output: that is what is measured.
        warnings.filterwarnings("ignore", message="fewer than 4 connections")
        sparsity.apply(model)
    return sparsity


def adamw(model: nn.Module, lr: float, sparsity: Any = None) -> torch.optim.Optimizer:
    """The optimizer of every run, followed by the algorithm."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    if sparsity is not None:
        sparsity.apply(optimizer)
    return optimizer


def train(
    task: Task,
    block: dict[str, Any] | None,
    *,
    lr: float,
    seed: int,
    steps: int,
    width: int | None = None,
    tuning: bool = False,
    batch_size: int | None = None,
    compute: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Outcome:
    """Trains a fresh model and judges it.

    Args:
        task: what is learned.
        block: the `sparsity:` block, or None for a dense model.
        lr: the highest learning rate of the schedule.
        seed: of the weights, the data's order and the masks.
        steps: optimizer steps.
        width: of the model; the task's own by default.
        tuning: whether to judge by a part of the training data.
        batch_size: the task's own by default.
        compute: how sparse weights are stored; the task's own by default.
        dtype: of the products, under autocast where it is not float32.
    """
    torch.manual_seed(seed)
    model = task.model(width or task.width)
    sparsity = None if block is None else sparsify(model, block, seed, compute or task.compute)
    optimizer = adamw(model, lr, sparsity)
    seconds = fit(task, model, optimizer, steps, seed, tuning=tuning, batch_size=batch_size, dtype=dtype)
    return Outcome(task.score(model.eval(), tuning), count_weights(model, sparsity), seconds)


def fit(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    *,
    tuning: bool = False,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Trains a model for a whole schedule; the CPU seconds that it took."""
    schedule = LambdaLR(optimizer, lambda step: rate_at(step, steps, task.warmup))
    batches = task.batches(seed, tuning, batch_size)
    model.train()
    start = time.process_time()
    for _ in range(steps):
        step(task, model, optimizer, next(batches), dtype)
        schedule.step()
    return time.process_time() - start


def step(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, dtype: torch.dtype
) -> None:
    """One step as `fit` takes it; under autocast where the format is not float32."""
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = task.loss(model, batch)
    loss.backward()
    if task.clip < math.inf:
        nn.utils.clip_grad_norm_(model.parameters(), task.clip)
    optimizer.step()


def steps_of(
    task: Task,
    block: dict[str, Any] | None,
    count: int,
    *,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], None]:
    """So many steps of a fresh model, topology updates included, on batches as in training; to be timed."""
    torch.manual_seed(0)
    model = task.model(width or task.width)
    sparsity = None if block is None else sparsify(model, block, 0, "auto")
    optimizer = adamw(model, 1e-3, sparsity)
    batches = task.batches(0, False)

    def steps() -> None:
        for _ in range(count):
            step(task, model, optimizer, next(batches), dtype)

    return steps


def run_variant(
    task: Task, variant: str, sparsity: float, *, lr: float, seed: int, steps: int, tuning: bool = False
) -> Outcome:
    """Trains one variant at one sparsity."""
    width = narrow_width(task, sparsity) if variant == "dense, narrow" else None
    block = VARIANTS[variant](sparsity, steps)
    return train(task, block, lr=lr, seed=seed, steps=steps, width=width, tuning=tuning)
