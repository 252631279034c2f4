"""Runs the trainers of a file: which mode, from which checkpoint, and one after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from rarefy.callbacks.events import Callback
from rarefy.callbacks.load_checkpoint_states import LoadCheckpointStates
from rarefy.checkpoint.chosen import UNSET, CheckpointPath, Unset, checkpoint_at, find, find_all
from rarefy.checkpoint.directory import CheckpointParts, load, newest_valid
from rarefy.errors import ConfigError
from rarefy.run.builder import Builder, check_tokens
from rarefy.run.changed_file import compare, refuse_other_pairs
from rarefy.run.file_keys import FitBlock, ValidateBlock
from rarefy.run.large_model import refuse_too_large
from rarefy.run.schema import TrainerConfig
from rarefy.trainer.state import States
from rarefy.trainer.trainer import Trainer

log = logging.getLogger("rarefy")

Mode = Literal["train", "eval", "train_and_eval", "eval_all"]


@dataclass(frozen=True)
class Launch:
    """How the trainers of a file are run.

    Args:
        base_dir: the folder of the file.
        mode: what to do; None lets each trainer decide: fit if it has a `fit` block, else validate.
        ckpt_path: where the first trainer starts from; left out, what the file says.
        load_states: `all`, `model` for weights and masks alone, or `model,optimizer`.
        allow_imports: whether import paths may be followed.
        callbacks: called after those of the file.
    """

    base_dir: Path
    mode: Mode | None = None
    ckpt_path: CheckpointPath = UNSET
    load_states: States = "all"
    allow_imports: bool = True
    callbacks: Sequence[Callback] = field(default=())

    def builder(self, config: TrainerConfig) -> Builder:
        """What builds the parts of one trainer."""
        return Builder(config, self.base_dir, self.allow_imports)


def run_all(configs: Sequence[TrainerConfig], launch: Launch) -> Iterator[Trainer]:
    """Runs trainers in order; each begins with the result of the one before, unless it has a `ckpt_path`.

    A trainer of several that has ended in an earlier run of the same file is passed over.

    Args:
        configs: the trainers of a file.
        launch: how to run them.

    Returns:
        Every trainer after it has done its work.

    Raises:
        ConfigError: a block that the mode needs is missing, or has a value that is not allowed.
        RarefyError: what `Trainer.fit` and `Trainer.validate` raise.
    """
    # The first trainer needs no rehearsal: it is built before anything is trained.
    for config in configs[1:]:
        _rehearse(launch.builder(config))
    for index, config in enumerate(configs):
        mode = launch.mode or mode_of(config)
        ckpt_path = launch.ckpt_path if index == 0 else UNSET
        start: CheckpointPath | Literal["ended"] = UNSET
        if mode in ("train", "train_and_eval"):
            if len(configs) > 1 and ckpt_path is UNSET:
                start = _start(configs, index)
            if start == "ended":
                log.info("%s has ended already", config.path)
                continue
            ckpt_path = start if ckpt_path is UNSET else ckpt_path
        # What the trainer before has left is meant to be gone on with differently.
        yield _run_one(launch.builder(config), mode, ckpt_path, launch, compares=not isinstance(start, Path))


def _rehearse(builder: Builder) -> None:
    """Builds a trainer and throws it away, so that its faults show before the first one trains."""
    builder.check()
    if builder.config.fit is not None:
        _ = builder.train_data, builder.fit_validations
        builder.trainer(quiet=True)


def mode_of(config: TrainerConfig) -> Mode:
    """What a trainer does when no mode is asked for.

    Raises:
        ConfigError: it has neither `fit` nor `validate` nor `validate_all`.
    """
    if config.fit is not None:
        return "train_and_eval" if config.fit.val_dataloader else "train"
    if config.validation is not None:
        return "eval"
    if config.validate_all is not None:
        return "eval_all"
    raise _missing(config, "fit", "{train_dataloader: {...}}")


def _missing(config: TrainerConfig, block: str, example: str) -> ConfigError:
    return ConfigError(f"{config.path}.{block}", "a missing value", "it for this mode", f"{block}: {example}")


def _run_one(
    builder: Builder, mode: Mode, ckpt_path: CheckpointPath, launch: Launch, compares: bool
) -> Trainer:
    if mode == "eval":
        return _validate(builder, ckpt_path, launch)
    if mode == "eval_all":
        return _validate_all(builder, ckpt_path, launch)
    return _fit(builder, mode == "train_and_eval", ckpt_path, launch, compares)


def _resumed(builder: Builder, ckpt_path: CheckpointPath) -> Path | None:
    """The checkpoint that a fit is going to continue."""
    checkpoint = builder.config.init.checkpoint
    autoloads = checkpoint is None or checkpoint.autoload_last_checkpoint
    return find(ckpt_path, builder.config.checkpoint_root, autoloads)


def _fit(
    builder: Builder, validates: bool, ckpt_path: CheckpointPath, launch: Launch, compares: bool
) -> Trainer:
    config = builder.config
    block = builder.config.fit
    if block is None:
        raise _missing(config, "fit", "{train_dataloader: {...}}")
    # What costs nothing to find out first; data and model may take minutes.
    builder.check()
    train_data = builder.train_data
    val_data = _named(builder.fit_validations) if validates else {}
    start = _given(block, ckpt_path)
    states = _states(builder, start, launch)
    resumed = _resumed(builder, start)
    keepers: list[Callback] = []
    if resumed is not None and compares and states == "all":
        keepers = compare(builder, resumed)
    elif resumed is not None:
        refuse_other_pairs(builder, resumed)
    refuse_too_large(builder)
    trainer = builder.trainer(more_callbacks=[*keepers, *launch.callbacks])
    check_tokens(trainer.model, train_data, f"{config.path}.fit.train_dataloader")
    for data in val_data.values():
        check_tokens(trainer.model, data, f"{config.path}.fit.val_dataloader")
    trainer.fit(train_data, val_data or None, start, load_states=states)
    return trainer


def _states(builder: Builder, start: CheckpointPath, launch: Launch) -> States:
    """What of a checkpoint to take; the file's callback speaks of checkpoints that are named, not of going on."""
    chosen = [one for one in builder.callbacks if isinstance(one, LoadCheckpointStates)]
    is_named = isinstance(start, str | Path)
    is_partial = is_named and bool(chosen) and chosen[-1].states != "all"
    return cast(States, chosen[-1].states) if is_partial else launch.load_states


def _validate(builder: Builder, ckpt_path: CheckpointPath, launch: Launch) -> Trainer:
    config = builder.config
    if config.validation is not None:
        data = {"": builder.data(config.validation.val_dataloader, "validate.val_dataloader")}
    elif config.fit is not None and config.fit.val_dataloader:
        data = _named(builder.fit_validations)
    else:
        raise _missing(config, "validate", "{val_dataloader: {...}}")
    start = _given(config.validation, ckpt_path)
    refuse_other_pairs(builder, find(start, config.checkpoint_root))
    trainer = builder.trainer(trains=False, more_callbacks=launch.callbacks)
    trainer.validate(data, start)
    return trainer


def _validate_all(builder: Builder, ckpt_path: CheckpointPath, launch: Launch) -> Trainer:
    block = builder.config.validate_all
    if block is None:
        raise _missing(builder.config, "validate_all", "{val_dataloaders: [{...}]}")
    data = _named(builder.several_data(block.val_dataloaders, "validate_all.val_dataloaders"))
    given: Any = block.ckpt_paths if "ckpt_paths" in block.model_fields_set else UNSET
    start = given if ckpt_path is UNSET else ckpt_path
    if isinstance(start, Unset):
        refuse_other_pairs(builder, find(start, builder.config.checkpoint_root))
    for path in [] if start is None or isinstance(start, Unset) else find_all(start):
        refuse_other_pairs(builder, checkpoint_at(path))
    trainer = builder.trainer(trains=False, more_callbacks=launch.callbacks)
    trainer.validate_all(data, start)
    return trainer


def _named(loaders: Sequence[Iterable[Any]]) -> dict[str, Iterable[Any]]:
    """Validation data by name; a loader may itself be a list of batches, so a plain list would not do."""
    return {"": loaders[0]} if len(loaders) == 1 else {str(i): one for i, one in enumerate(loaders)}


def _given(block: FitBlock | ValidateBlock | None, ckpt_path: CheckpointPath) -> CheckpointPath:
    # null that was written is an answer; a key that was left out is none.
    if ckpt_path is UNSET and block is not None and "ckpt_path" in block.model_fields_set:
        return block.ckpt_path
    return ckpt_path


def _start(configs: Sequence[TrainerConfig], index: int) -> CheckpointPath | Literal["ended"]:
    """Where one of several trainers starts: where it stopped (UNSET), or the result of the one before."""
    config = configs[index]
    newest = newest_valid(config.checkpoint_root, log.warning)
    if newest is not None:
        # Without the weights, which may take long to read.
        parts = load(newest, only=("state",))
        owner = _owner(configs, index, parts)
        if owner > index or (owner == index and _has_ended(parts)):
            return "ended"
        if owner == index:
            return UNSET
    before = newest_valid(configs[index - 1].checkpoint_root, log.warning) if index else None
    has_own = config.fit is not None and "ckpt_path" in config.fit.model_fields_set
    return UNSET if before is None or has_own else before


def _owner(configs: Sequence[TrainerConfig], index: int, parts: CheckpointParts) -> int:
    """Which of the trainers that share a directory wrote a checkpoint."""
    root = configs[index].checkpoint_root
    sharing = [other for other, config in enumerate(configs) if config.checkpoint_root == root]
    wrote = [other for other in sharing if parts.params == configs[other].as_params]
    return wrote[-1] if wrote else sharing[0]


def _has_ended(parts: CheckpointParts) -> bool:
    progress = parts.state["progress"]
    return progress["global_step"] >= progress["stop"] and not progress["validation_due"]
