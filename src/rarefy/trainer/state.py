"""What of a session goes into a checkpoint, and back."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rarefy.checkpoint import rng
from rarefy.checkpoint.chosen import CheckpointPath, find
from rarefy.checkpoint.directory import CheckpointParts, load
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.foreign import load_foreign
from rarefy.checkpoint.in_pieces import Wanted
from rarefy.checkpoint.mask_names import mask_names
from rarefy.checkpoint.matching import LOOSE_LOADING, dense_state, match_masks, match_model
from rarefy.checkpoint.nested import split
from rarefy.distributed import is_first, wait_for_all
from rarefy.errors import RarefyError
from rarefy.storage.sharded.whole_states import as_named, as_states_of, cut_like, cut_states
from rarefy.trainer.beginning.carrying import carry_optimizer, load_states
from rarefy.trainer.feed import TrainFeed
from rarefy.trainer.session import Session

log = logging.getLogger("rarefy")

States = Literal["all", "model", "model,optimizer"]


def gather(session: Session) -> CheckpointParts:
    """Everything that a run needs to go on as if it had never stopped."""
    own: dict[str, Any] = {}
    # First, so that what a callback changes is saved with the rest.
    session.emit("on_save_checkpoint", own)
    optimizer = session.optimizer
    sparsity = session.sparsity
    state = {
        "progress": session.progress.state_dict(),
        "data": None if session.feed is None else session.feed.state_dict(),
        "optimizer_class": type(optimizer).__name__,
        "schedulers": [scheduler.state_dict() for scheduler in session.schedulers],
        "scaler": session.precision.state_dict(),
        "sparsity": None if sparsity is None else sparsity.state_dict(),
        "callbacks": own,
        "config_hash": _hash(session.params),
    }
    saved = None if optimizer is None else optimizer.state_dict()
    return CheckpointParts(session.model.state_dict(), saved, state, rng.capture(), session.params)


def save(session: Session) -> Path:
    """Saves the state of the run; it is on the disk once `session.writer.wait()` returns.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: this checkpoint or the one before could not be written.
    """
    # Every process gathers: what they have in common is exchanged there, and callbacks of each are asked.
    parts = gather(session)
    step = session.progress.global_step
    if is_first() or session.parallel.cuts:
        return session.writer.save_async(step, parts)
    return session.checkpoint_root / f"checkpoint_{step}"


def _hash(params: Mapping[str, Any]) -> str:
    # As text what JSON has no form for, such as paths and dates.
    return hashlib.sha256(json.dumps(params, sort_keys=True, default=str).encode()).hexdigest()


def find_checkpoint(session: Session, ckpt_path: CheckpointPath) -> Path | None:
    """The checkpoint that is meant; all processes must ask, and find the same.

    Args:
        session: says where the run's own checkpoints are.
        ckpt_path: a checkpoint, None for none; left out, the newest valid one of the run.

    Raises:
        CheckpointError: a path that leads to none.
    """
    # The newest checkpoint may still be on its way to the disk, and all processes must find the same one.
    session.writer.wait()
    wait_for_all()
    return find(ckpt_path, session.checkpoint_root, session.checkpoint.autoload_last_checkpoint)


def restore(session: Session, path: Path, states: States = "all") -> bool:
    """Puts a session where a checkpoint left off.

    Args:
        session: model, optimizer, sparsity and data have been made.
        path: a checkpoint directory, or a `.pt` or `.mdl` file, which has nothing but a model.
        states: `all`, `model` for its weights and masks alone, or `model,optimizer` for the optimizer's state as well.

    Returns:
        Whether everything was taken; else it was no more than that, and the run begins at its step 0.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to another model or another kind of run.
    """
    parts = _read(session, path)
    _refuse_unscaled(session, path, parts.state)
    is_strict = states == "all" and not session.checkpoint.disable_strict_checkpoint_loading
    fits = _load_model(session, path, parts.model, is_strict)
    if states == "model,optimizer":
        carry_optimizer(session, path, parts)
        log.info("took the model and the optimizer's state from %s; schedules and data start afresh", path)
        return False
    if parts.state is None or states == "model" or not fits or not _load_sparsity(session, path, parts.state):
        log.info("took the model from %s; optimizer, schedules and data start afresh", path)
        return False
    _load_rest(session, path, parts)
    log.info("continuing from %s", path)
    return True


def _refuse_unscaled(session: Session, path: Path, state: Any) -> None:
    """Refuses weights of another parametrization where SµPar is to train them.

    Raises:
        CheckpointError: they were not scaled by density when they were drawn.
    """
    if not any(one.scaling for one in session.algorithms):
        return
    saved = None if state is None else state["sparsity"]
    entries = saved if isinstance(saved, list) else [saved]
    if not any(isinstance(one, Mapping) and one.get("parametrization") == "supar" for one in entries):
        problem = "holds weights that did not start under parametrization: supar"
        raise CheckpointError(path, problem, "leave parametrization out, or start without a checkpoint")


def load_weights(session: Session, path: Path) -> int:
    """Loads weights and masks only; returns the global step at which they were saved, 0 if unknown.

    Raises:
        CheckpointError: as for `restore`.
    """
    parts = _read(session, path)
    _load_model(session, path, parts.model, not session.checkpoint.disable_strict_checkpoint_loading)
    return 0 if parts.state is None else parts.state["progress"]["global_step"]


def _read(session: Session, path: Path) -> CheckpointParts:
    if path.is_dir():
        parts = load(path, cut_as=_cuts(session) if session.parallel.cuts else None)
        # A program that saves by `rarefy.checkpoint.dcp` has a state of its own, or none.
        is_of_a_run = isinstance(parts.state, Mapping) and "optimizer_class" in parts.state
        return parts if is_of_a_run else replace(parts, state=None)
    return CheckpointParts(load_foreign(path, session.model.state_dict().keys()))


def _cuts(session: Session) -> dict[str, Wanted]:
    """How the tensors of a checkpoint are cut in this run."""
    own: dict[str, Any] = {"model": session.model.state_dict()}
    sparsity = session.sparsity
    own["state"] = {"sparsity": None if sparsity is None else sparsity.state_dict()}
    cuts = {part: as_named(split(value)[1]) for part, value in own.items()}
    return cuts if session.optimizer is None else {**cuts, "optimizer": as_states_of(session.optimizer)}


def _load_model(session: Session, path: Path, state: Mapping[str, Tensor], is_strict: bool) -> bool:
    """Loads weights and masks; whether the same parameters are sparse on both sides."""
    own = session.model.state_dict()
    difference = match_model(own, state)
    masks = match_masks(own, state)
    if difference.reshaped or (difference and is_strict):
        remedy = "give the model that it was made with"
        if not difference.reshaped:
            remedy += f", or {LOOSE_LOADING} to load what fits"
        raise CheckpointError(path, difference.problem(), remedy)
    if masks and is_strict:
        raise CheckpointError(path, masks.problem(), masks.remedy())
    loaded = dense_state(state, masks.surplus)
    # With a full mask the weight arrives whole; the mask that it has here was made for other values.
    own_masks = mask_names(own)
    loaded |= {own_masks[name]: torch.ones_like(own[name], dtype=torch.bool) for name in masks.missing}
    loaded = cut_like(own, loaded)
    # What is strict has been checked above, in words of its own.
    session.model.load_state_dict(loaded, strict=False)
    _prune_afresh(session, masks.missing)
    return not masks


def _prune_afresh(session: Session, names: Iterable[str]) -> None:
    """Gives parameters that came without a mask the first mask of their algorithm; others have theirs."""
    missing = set(names)
    for leaf in session.algorithms:
        leaf.found(missing)
        chosen = {name: one for name, one in leaf.parameters.items() if name in missing}
        weights = {name: one.dense_weight() for name, one in chosen.items()}
        places = {name: one.places[0] for name, one in chosen.items()}
        for name, mask in leaf.first_masks(weights, places).items():
            leaf.parameters[name].set_mask(mask, [session.optimizer] if session.optimizer else [])


def _load_sparsity(session: Session, path: Path, state: Any) -> bool:
    """Loads the algorithms' state; whether it fits, which strict loading demands."""
    if session.sparsity is None:
        return True
    try:
        session.sparsity.load_state_dict(state["sparsity"])
    except RarefyError as error:
        if session.checkpoint.disable_strict_checkpoint_loading:
            return False
        remedy = f"give the sparsity that it was made with, or {LOOSE_LOADING}"
        raise CheckpointError(path, f"does not fit ({error})", remedy) from error
    return True


def _load_rest(session: Session, path: Path, parts: CheckpointParts) -> None:
    state = parts.state
    session.progress.load_state_dict(state["progress"])
    if session.optimizer is not None and session.feed is not None:
        _load_optimizer(session, path, parts)
        session.precision.load_state_dict(state["scaler"])
        if state["data"] is not None:
            _load_position(session.feed, path, state["data"])
    # Random numbers last: reading up to the position, and callbacks, may draw some.
    session.emit("on_load_checkpoint", state["callbacks"])
    rng.restore(parts.rng)


def _load_position(feed: TrainFeed, path: Path, position: Any) -> None:
    try:
        feed.load_state_dict(position)
    except RarefyError as error:
        raise CheckpointError(path, "holds a position in other data", str(error)) from error


def _load_optimizer(session: Session, path: Path, parts: CheckpointParts) -> None:
    optimizer = session.needed_optimizer
    saved = parts.optimizer
    state = parts.state
    remedy = "give the optimizer and schedulers that it was made with, or --load_checkpoint_states model"
    # torch would take the state of any other optimizer without a word.
    if saved is None or state["optimizer_class"] != type(optimizer).__name__:
        problem = f"has the state of {state['optimizer_class']}, but this run uses {type(optimizer).__name__}"
        raise CheckpointError(path, problem, remedy)
    if len(state["schedulers"]) != len(session.schedulers):
        problem = f"has {len(state['schedulers'])} schedulers, but this run has {len(session.schedulers)}"
        raise CheckpointError(path, problem, remedy)
    load_states(optimizer, cut_states(optimizer, saved), path, remedy)
    for scheduler, one in zip(session.schedulers, state["schedulers"], strict=True):
        scheduler.load_state_dict(one)
