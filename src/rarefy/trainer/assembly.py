"""Builds what a trainer is made of, from objects or from functions that make them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.algorithms.group import Group
from rarefy.config import configure
from rarefy.errors import ConfigError, RarefyError, did_you_mean
from rarefy.validation import shorten

log = logging.getLogger("rarefy")

Model = nn.Module | Callable[[], nn.Module]
OptimizerLike = Optimizer | Callable[[nn.Module], Optimizer]
SchedulerLike = LRScheduler | Callable[[Optimizer], LRScheduler]
Sparsity = SparsityAlgorithm | Group

_DEVICES = {"gpu": "cuda", "csx": "auto"}
_LEVELS = {"VERBOSE": 15}


def seed_everything(seed: int | None) -> None:
    """Seeds torch, Python and NumPy; None leaves them alone."""
    if seed is not None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that a name stands for.

    Args:
        device: `auto` (a GPU if there is one), `cpu`, `gpu`, `csx` (as `auto`), in any case, or what
            `torch.device` takes.

    Returns:
        The device.

    Raises:
        ConfigError: an unknown name, or a GPU where there is none.

    Example:
        >>> resolve_device("CPU")
        device(type='cpu')
    """
    name = str(device).lower()
    if name == "csx":
        log.warning("device: there is no Cerebras system here; taking the best device that there is")
    name = _DEVICES.get(name, name)
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        known = f"a device ({did_you_mean(name, ['auto', 'cpu', 'gpu', 'cuda', 'mps'])})"
        raise ConfigError("device", shorten(str(device)), known, "device: auto") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", f"{device} (there is no GPU here)", "auto or cpu", "device: auto")
    return found


def set_log_level(level: str | None) -> None:
    """Shows messages of rarefy from this level on; None changes nothing."""
    if level is not None:
        log.setLevel(_LEVELS.get(level, level))


def make_model(given: Model, device: torch.device) -> nn.Module:
    """The model on its device.

    Raises:
        RarefyError: no module, and no function that returns one.
    """
    model = given if isinstance(given, nn.Module) else given() if callable(given) else given
    if not isinstance(model, nn.Module):
        raise RarefyError(f"model is {shorten(model)}; give a torch.nn.Module or a function that returns one")
    return model.to(device)


def make_sparsity(given: Any, num_steps: int | None, seed: int | None) -> Sparsity | None:
    """The sparsity algorithm of a `sparsity` argument; None for a dense run.

    Raises:
        ConfigError: a block that is not allowed.
    """
    if given is None or isinstance(given, SparsityAlgorithm | Group):
        return given
    return configure(given() if callable(given) else given, num_steps=num_steps, seed=seed)


def make_optimizer(given: OptimizerLike | None, model: nn.Module) -> Optimizer | None:
    """The optimizer; None when the trainer is for validation only.

    Raises:
        RarefyError: no optimizer, or one that trains none of the model's parameters.
    """
    if given is None:
        return None
    optimizer = given if isinstance(given, Optimizer) else given(model) if callable(given) else given
    if not isinstance(optimizer, Optimizer):
        form = "a torch.optim.Optimizer or a function of the model that returns one"
        raise RarefyError(f"optimizer is {shorten(optimizer)}; give {form}")
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if trained.isdisjoint(model.parameters()):
        hint = "build it from the same model, or give a function of the model"
        raise RarefyError(f"the optimizer trains none of the model's parameters; {hint}")
    return optimizer


def make_schedulers(
    given: SchedulerLike | Sequence[SchedulerLike] | None, optimizer: Optimizer | None
) -> list[LRScheduler]:
    """The learning-rate schedulers, applied to the optimizer.

    Raises:
        RarefyError: something that is no scheduler.
    """
    if given is None or optimizer is None:
        return []
    several = given if isinstance(given, Sequence) else [given]
    made = [one if isinstance(one, LRScheduler) or not callable(one) else one(optimizer) for one in several]
    for scheduler in made:
        if not isinstance(scheduler, LRScheduler):
            form = "a torch LRScheduler or a function of the optimizer that returns one"
            raise RarefyError(f"schedulers has {shorten(scheduler)}; give {form}")
    return [scheduler for scheduler in made if isinstance(scheduler, LRScheduler)]
