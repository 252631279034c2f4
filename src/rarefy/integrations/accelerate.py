"""Sparse training in a loop that uses Hugging Face's Accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from rarefy.algorithms.base import Sparsifier
from rarefy.config import configure
from rarefy.distributed import is_cut
from rarefy.errors import RarefyError
from rarefy.imports import require

AcceleratedOptimizer: Any = require("accelerate", "accelerate.optimizer").AcceleratedOptimizer


def sparsify(accelerator: Any, config: Any, model: nn.Module, *optimizers: Optimizer) -> Sparsifier:
    """Makes a model sparse, follows its optimizers, and keeps the state in the accelerator's checkpoints.

    Call it before `accelerator.prepare` where several processes train, but after it under FSDP2, which makes other
    parameters there; in one process before or after. `accelerator.save_state`
    and `load_state` then carry masks (with the model) and the state of the algorithms.

    Args:
        accelerator: an `accelerate.Accelerator`.
        config: a `sparsity:` block, or a ready-made algorithm; see `rarefy.configure`.
        model: the module that is trained.
        *optimizers: those that train it.

    Returns:
        The algorithms, applied.

    Raises:
        ConfigError: anything in `config` that is not allowed.
        RarefyError: the arguments come in another order, or FSDP2 has yet to cut the model.

    Example:
        >>> import accelerate, torch
        >>> model, accelerator = nn.Linear(10, 10), accelerate.Accelerator(cpu=True)
        >>> sparsity = sparsify(accelerator, 0.9, model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> int(model.weight_mask.sum())
        10
    """
    if isinstance(config, nn.Module) or not isinstance(model, nn.Module):
        raise RarefyError(
            f"sparsify: ({type(accelerator).__name__}, {type(config).__name__}, {type(model).__name__}, …) is not "
            "allowed; the order is sparsify(accelerator, config, model, optimizer)"
        )
    unwrapped = accelerator.unwrap_model(model)
    if getattr(accelerator, "is_fsdp2", False) and not any(map(is_cut, unwrapped.parameters())):
        raise RarefyError(
            "sparsify before accelerator.prepare is not allowed under FSDP2, which makes other parameters there; call "
            "model, optimizer = accelerator.prepare(model, optimizer) first"
        )
    sparsity = configure(config)
    sparsity.apply(unwrapped)
    for optimizer in optimizers:
        # Accelerate's wrapper is stepped at every micro-batch, what it wraps only when the weights change.
        sparsity.apply(unwrapped_optimizer(optimizer))
    accelerator.register_for_checkpointing(sparsity)
    return sparsity


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that really steps, without Accelerate's wrapping.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        >>> unwrapped_optimizer(optimizer) is optimizer
        True
    """
    found: Any = optimizer
    while isinstance(found, AcceleratedOptimizer):
        found = found.optimizer
    return found
