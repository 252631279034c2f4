"""Builds a session: each part once, from an object or from a function that makes it."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rarefy import distributed
from rarefy.algorithms.base import Sparsifier
from rarefy.callbacks.dispatch import Dispatcher
from rarefy.checkpoint.directory import CheckpointConfig, CheckpointWriter
from rarefy.config import configure
from rarefy.distributed import Parallel, ParallelConfig
from rarefy.errors import ConfigError, RarefyError, did_you_mean
from rarefy.models.call import ModelCall
from rarefy.storage.choice import COMPACT
from rarefy.storage.optimizer_traits import trained_parameters
from rarefy.trainer.plan import VERBOSE, LoggingConfig, LoopConfig
from rarefy.trainer.precision import Precision, PrecisionConfig
from rarefy.trainer.session import Progress, Session, Sparsity
from rarefy.trainer.skipped_steps import SkippedSteps
from rarefy.validation import shorten
from rarefy.validation.block import read_block

log = logging.getLogger("rarefy")

Model = nn.Module | Callable[[], nn.Module]
OptimizerLike = Optimizer | Callable[[nn.Module], Optimizer]
SchedulerLike = LRScheduler | Callable[[Optimizer], LRScheduler]

_DEVICES = {"gpu": "cuda", "csx": "auto"}


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """What a trainer is made of, as `rarefy.Trainer` documents it argument by argument."""

    model_dir: Path
    model: Model
    device: str | torch.device
    optimizer: OptimizerLike | None
    schedulers: SchedulerLike | Sequence[SchedulerLike] | None
    precision: PrecisionConfig | Mapping[str, Any] | None
    sparsity: Any
    parallel: ParallelConfig | Mapping[str, Any] | None
    loop: LoopConfig | Mapping[str, Any] | None
    checkpoint: CheckpointConfig | Mapping[str, Any] | None
    logging: LoggingConfig | Mapping[str, Any] | None
    seed: int | None
    params: Mapping[str, Any] | None


def build_session(given: Ingredients, emit: Dispatcher) -> Session:
    """The session of a trainer, each part of it made once.

    Args:
        given: objects, blocks, and functions that make them.
        emit: tells callbacks and loggers.

    Raises:
        ConfigError: a block with a key or a value that is not allowed.
        RarefyError: a model, optimizer or scheduler that is none.
    """
    loop = read_block(LoopConfig, given.loop, "loop")
    checkpoint = read_block(CheckpointConfig, given.checkpoint, "checkpoint")
    logging_config = read_block(LoggingConfig, given.logging, "logging")
    # A block without `enabled` means it is on; no block at all, that the model's own precision stays.
    asked = {"enabled": False} if given.precision is None else given.precision
    precision = read_block(PrecisionConfig, asked, "precision")
    parallel = Parallel(read_block(ParallelConfig, given.parallel, "parallel"))
    set_log_level(logging_config.log_level)
    # The seed comes first: a function that makes the model draws its weights from it.
    seed_everything(given.seed)
    device = distributed.join_processes(resolve_device(given.device))
    model = make_model(given.model, device)
    sparsity = make_sparsity(given.sparsity, loop.total_steps(), given.seed)
    if sparsity is not None:
        _apply(sparsity, model, loop, parallel)
    if parallel.cuts:
        _check_can_be_cut(given, precision, sparsity)
    uncut = _to_be_measured(model, sparsity) if parallel.cuts else None
    parallel.cut(model, device)
    # The optimizer is made of the sparse model, so that a factory sees the parameters that it will train.
    optimizer = make_optimizer(given.optimizer, model)
    if sparsity is not None and optimizer is not None:
        sparsity.apply(optimizer)
    return Session(
        model_dir=given.model_dir,
        loop=loop,
        checkpoint=checkpoint,
        logging=logging_config,
        device=device,
        model=model,
        parallel=parallel,
        forward=ModelCall(parallel.wrapped(model), model),
        sparsity=sparsity,
        optimizer=optimizer,
        schedulers=make_schedulers(given.schedulers, optimizer),
        precision=Precision(precision, device),
        emit=emit,
        writer=CheckpointWriter(
            checkpoint.checkpoint_root or given.model_dir, keep_last=checkpoint.keep_last
        ),
        progress=Progress(SkippedSteps(loop.max_skipped_steps)),
        params=dict(given.params or {}),
        uncut=uncut,
    )


def _apply(sparsity: Sparsity, model: nn.Module, loop: LoopConfig, parallel: Parallel) -> None:
    # A promise of one backward pass a step, with which RigL keeps less of the dense gradients.
    sparsity.accumulates = loop.grad_accum_steps > 1 or loop.micro_batch_size is not None
    for algorithm in sparsity.algorithms:
        # Masks that are measured on data wait until a fit has some.
        algorithm.defers = True
        algorithm.traffic = parallel.traffic
    sparsity.apply(model)


def _to_be_measured(model: nn.Module, sparsity: Sparsity | None) -> nn.Module | None:
    """A copy of a model that is about to be cut, where first masks are still to be measured on it."""
    # Derivatives in all weights at once are not to be had of a model in pieces.
    is_awaited = sparsity is not None and any(one.awaiting for one in sparsity.algorithms)
    return copy.deepcopy(model) if is_awaited else None


def _check_can_be_cut(given: Ingredients, precision: PrecisionConfig, sparsity: Sparsity | None) -> None:
    """Refuses what does not go with `strategy: fsdp2`.

    Raises:
        ConfigError: an optimizer of the whole model, a dynamic loss scale, or compact storage.
    """
    applied = [] if sparsity is None else sparsity.algorithms
    # Asked for counts as well as stored so: a weight that waits for its first mask is stored as a dense one.
    weights = [(one, algorithm) for algorithm in applied for one in algorithm.parameters.values()]
    kinds = {one.name: {one.storage.kind, algorithm.compute} for one, algorithm in weights}
    compact = next((name for name, found in kinds.items() if found & COMPACT), None)
    if compact is not None:
        problem = f"compact for {compact} beside parallel.strategy: fsdp2, which cuts dense weights,"
        raise ConfigError("sparsity.compute", problem, "auto or masked, or strategy: ddp", "compute: auto")
    if isinstance(given.optimizer, Optimizer):
        allowed = "a function of the model that returns the optimizer, as fsdp2 makes other parameters"
        raise ConfigError("optimizer", f"a {type(given.optimizer).__name__}", allowed)
    if precision.enabled and precision.dtype == torch.float16 and precision.loss_scaling_factor == "dynamic":
        allowed = "another format beside strategy: fsdp2"
        raise ConfigError("precision.fp16_type", "float16", allowed, "fp16_type: bfloat16")


def seed_everything(seed: int | None) -> None:
    """Seeds torch, Python and NumPy; None leaves them alone."""
    if seed is not None:
        torch.manual_seed(seed)
        random.seed(seed)
        # NumPy's seeds have 32 bits.
        np.random.seed(seed % 2**32)


def device_of(
    device: str | torch.device, backend: str | Mapping[str, Any] | None, autorestart: object = None
) -> str | torch.device:
    """The device that `device` or the Model Zoo's `backend` asks for.

    Args:
        device: `auto` where the user gave none.
        backend: its name, or a map with `backend_type`.
        autorestart: what the user gave for it; it is left out with a word.

    Raises:
        ConfigError: both, or a backend of another kind.

    Example:
        >>> device_of("auto", {"backend_type": "CPU"})
        'CPU'
    """
    if autorestart:
        log.warning("autorestart: ignored; run the same program again, it goes on from its newest checkpoint")
    if backend is None:
        return device
    if str(device) != "auto":
        raise ConfigError("backend", f"{shorten(backend)} beside device", "one of the two", 'device="cpu"')
    kind = backend.get("backend_type") if isinstance(backend, Mapping) else backend
    if not isinstance(kind, str):
        raise ConfigError("backend", shorten(backend), "CPU, GPU or CSX", 'backend="CPU"')
    return kind


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
        log.setLevel(VERBOSE if level == "VERBOSE" else level)


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
    if given is None or isinstance(given, Sparsifier):
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
    # Training would run, and change nothing.
    if trained_parameters(optimizer).keys().isdisjoint(model.parameters()):
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
