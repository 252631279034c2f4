"""From a trainer to a checkpoint and back."""

from __future__ import annotations

import enum
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from rarefy.checkpoint import rng
from rarefy.checkpoint.directory import CheckpointParts, load, newest_valid
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.foreign import load_foreign
from rarefy.checkpoint.matching import LOOSE_LOADING, MASK_SUFFIX, dense_state, match_masks, match_model
from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from rarefy.trainer.trainer import Trainer

log = logging.getLogger("rarefy")

States = Literal["all", "model"]


class Unset(enum.Enum):
    """The type of `UNSET`."""

    UNSET = "unset"


UNSET = Unset.UNSET
"""`ckpt_path` was not given: continue from the newest valid checkpoint, if the configuration allows."""

CheckpointPath = str | Path | None | Unset


def gather(trainer: Trainer) -> CheckpointParts:
    """Everything that a run needs to go on as if it had never stopped."""
    own: dict[str, Any] = {}
    trainer.emit("on_save_checkpoint", trainer, own)
    optimizer, sparsity = trainer.optimizer, trainer.sparsity
    state = {
        "progress": trainer.progress.state_dict(),
        "data": None if trainer.feed is None else trainer.feed.state_dict(),
        "optimizer_class": type(optimizer).__name__,
        "schedulers": [scheduler.state_dict() for scheduler in trainer.schedulers],
        "scaler": trainer.precision.state_dict(),
        "sparsity": None if sparsity is None else sparsity.state_dict(),
        "callbacks": own,
        "config_hash": _hash(trainer.params),
    }
    saved = None if optimizer is None else optimizer.state_dict()
    return CheckpointParts(trainer.model.state_dict(), saved, state, rng.capture(), trainer.params)


def _hash(params: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(params, sort_keys=True, default=str).encode()).hexdigest()


def find(trainer: Trainer, ckpt_path: CheckpointPath) -> Path | None:
    """The checkpoint that a `ckpt_path` stands for.

    Raises:
        CheckpointError: a path that does not exist.
    """
    if ckpt_path is UNSET:
        if not trainer.checkpoint.autoload_last_checkpoint:
            return None
        return newest_valid(trainer.checkpoint_root, log.warning)
    if ckpt_path is None:
        return None
    path = Path(str(ckpt_path))
    if not path.exists():
        remedy = "give the path of a checkpoint, null for none, or leave ckpt_path out for the newest one"
        raise CheckpointError(path, "does not exist", remedy)
    return path


def find_all(ckpt_paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The checkpoints that paths and globs stand for, those of one glob by their step.

    Args:
        ckpt_paths: a path, a glob such as `run/checkpoint_*`, or a list of them.

    Raises:
        CheckpointError: one that matches nothing.
    """
    several = [ckpt_paths] if isinstance(ckpt_paths, str | Path) else ckpt_paths
    found: list[Path] = []
    for one in several:
        pattern = Path(one)
        matching = [pattern] if pattern.exists() else sorted(map(Path, glob(str(pattern))), key=_by_step)
        if not matching:
            raise CheckpointError(pattern, "matches nothing", "give a checkpoint's path or a glob of several")
        found += matching
    return found


def _by_step(path: Path) -> tuple[int, str]:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1, path.name


def restore(trainer: Trainer, path: Path, states: States = "all") -> bool:
    """Puts a trainer where a checkpoint left off.

    Args:
        trainer: model, optimizer, sparsity and data have been made.
        path: a checkpoint directory, or a `.pt` or `.mdl` file, which has nothing but a model.
        states: `all`, or `model` for its weights and masks alone.

    Returns:
        Whether everything was taken; else it was the model alone, and the run begins at its step 0.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to another model or another kind of run.
    """
    parts = _read(trainer, path)
    is_strict = states == "all" and not trainer.checkpoint.disable_strict_checkpoint_loading
    fits = _load_model(trainer, path, parts.model, is_strict)
    if parts.state is None or states == "model" or not fits or not _load_sparsity(trainer, path, parts.state):
        log.info("took the model from %s; optimizer, schedules and data start afresh", path)
        return False
    _load_rest(trainer, path, parts)
    log.info("continuing from %s", path)
    return True


def load_weights(trainer: Trainer, path: Path) -> int:
    """Loads weights and masks only; returns the global step at which they were saved, 0 if unknown.

    Raises:
        CheckpointError: as for `restore`.
    """
    parts = _read(trainer, path)
    _load_model(trainer, path, parts.model, not trainer.checkpoint.disable_strict_checkpoint_loading)
    return 0 if parts.state is None else parts.state["progress"]["global_step"]


def _read(trainer: Trainer, path: Path) -> CheckpointParts:
    if path.is_dir():
        return load(path)
    return CheckpointParts(load_foreign(path, trainer.model.state_dict().keys()))


def _load_model(trainer: Trainer, path: Path, state: Mapping[str, Tensor], is_strict: bool) -> bool:
    """Loads weights and masks; whether the same parameters are sparse on both sides."""
    own = trainer.model.state_dict()
    difference, masks = match_model(own, state), match_masks(own, state)
    if difference.reshaped or (difference and is_strict):
        remedy = "give the model that it was made with"
        if not difference.reshaped:
            remedy += f", or {LOOSE_LOADING} to load what fits"
        raise CheckpointError(path, difference.problem(), remedy)
    if masks and is_strict:
        raise CheckpointError(path, masks.problem(), masks.remedy())
    loaded = dense_state(state, masks.surplus)
    loaded |= {name + MASK_SUFFIX: torch.ones_like(own[name], dtype=torch.bool) for name in masks.missing}
    trainer.model.load_state_dict(loaded, strict=False)
    _prune_afresh(trainer, masks.missing)
    return not masks


def _prune_afresh(trainer: Trainer, names: Iterable[str]) -> None:
    """Gives parameters that came without a mask the first mask of their algorithm."""
    missing = set(names)
    for leaf in trainer.sparsity.algorithms if trainer.sparsity is not None else ():
        chosen = {name: one.dense_weight() for name, one in leaf.parameters.items() if name in missing}
        for name, mask in leaf.first_masks(chosen).items() if chosen else ():
            leaf.parameters[name].set_mask(mask, [trainer.optimizer] if trainer.optimizer else [])


def _load_sparsity(trainer: Trainer, path: Path, state: Any) -> bool:
    """Loads the algorithms' state; whether it fits, which strict loading demands."""
    if trainer.sparsity is None:
        return True
    try:
        trainer.sparsity.load_state_dict(state["sparsity"])
    except RarefyError as error:
        if trainer.checkpoint.disable_strict_checkpoint_loading:
            return False
        remedy = f"give the sparsity that it was made with, or {LOOSE_LOADING}"
        raise CheckpointError(path, f"does not fit ({error})", remedy) from error
    return True


def _load_rest(trainer: Trainer, path: Path, parts: CheckpointParts) -> None:
    state = parts.state
    trainer.progress.load_state_dict(state["progress"])
    if trainer.optimizer is not None and trainer.feed is not None:
        _load_optimizer(trainer, path, parts)
        trainer.precision.load_state_dict(state["scaler"])
        if state["data"] is not None:
            trainer.feed.load_state_dict(state["data"])
    trainer.emit("on_load_checkpoint", trainer, state["callbacks"])
    rng.restore(parts.rng)


def _load_optimizer(trainer: Trainer, path: Path, parts: CheckpointParts) -> None:
    optimizer, saved, state = trainer.trained_by, parts.optimizer, parts.state
    remedy = "give the optimizer and schedulers that it was made with, or --load_checkpoint_states model"
    if saved is None or state["optimizer_class"] != type(optimizer).__name__:
        problem = f"has the state of {state['optimizer_class']}, but this run uses {type(optimizer).__name__}"
        raise CheckpointError(path, problem, remedy)
    if len(state["schedulers"]) != len(trainer.schedulers):
        problem = f"has {len(state['schedulers'])} schedulers, but this run has {len(trainer.schedulers)}"
        raise CheckpointError(path, problem, remedy)
    loaded: list[Mapping[str, Any]] = []
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, state: loaded.append(state))
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise CheckpointError(path, f"has an optimizer state that does not fit ({error})", remedy) from error
    finally:
        handle.remove()
    _keep_dtypes(optimizer, loaded[0])
    for scheduler, one in zip(trainer.schedulers, state["schedulers"], strict=True):
        scheduler.load_state_dict(one)


def _keep_dtypes(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Undoes torch's conversion of optimizer states to the dtype of their parameters.

    `saved` is what torch converted, in the order of the present storage.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in saved["state"].items():
        own = optimizer.state[parameters[index]]
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.dtype != own[key].dtype:
                own[key] = value.to(own[key].device)
