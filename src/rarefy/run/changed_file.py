"""Resume with a file that was changed: what takes effect is said, what would need another start is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.callbacks.events import Callback
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.checkpoint.chosen import CheckpointPath, find
from rarefy.checkpoint.directory import load_params
from rarefy.checkpoint.error import CheckpointError
from rarefy.errors import RarefyError, join_path
from rarefy.optim.lr_schedules import LRSchedule
from rarefy.optim.optimizers import OTHER_NAMES
from rarefy.run.builder import Builder
from rarefy.run.schema import TrainerConfig, parse
from rarefy.schedules import step_keys
from rarefy.validation import shorten
from rarefy.validation.numerals import percent_in

log = logging.getLogger("rarefy")

ABSENT = "nothing"

_RESTART = (
    "take the old values back, or --resume as_saved to go on as it was; for a new phase from these weights and masks, "
    "--load_checkpoint_states model and another model_dir"
)
# What a checkpoint holds the state of, or what decides which samples come next.
_NEEDS_RESTART = (
    r"init\.model\.(name|from_hf|rotary_pairs)$",
    r"init\.seed$",
    r"init\.optimizer$",
    # What divides parameters into groups, in whose order a state is read; and what has a state of its own.
    r"init\.optimizer\.(.*\.)?(adjust_learning_rate|amsgrad|centered)\b",
    r"init\.optimizer\.(?i:rmsprop)\.momentum$",
    r"init\.schedulers\b",
    r"init\.loop\.grad_accum_steps$",
    r"init\.sparsity\b",
    r"fit\.train_dataloader\b",
)
# Of these, what is asked anew at every step or every update, or changes how and not what is computed.
_TAKES_EFFECT = (
    r"init\.sparsity(\[\d+\])?\.(update|drop_fraction|compute)\b",
    r"fit\.train_dataloader\.(num_workers|prefetch_factor|persistent_workers|use_worker_cache)$",
)
# No part of the fit that goes on.
_SILENT = (
    r"init\.(model_dir|device|backend)\b",
    r"init\.checkpoint\.checkpoint_root$",
    r"fit\.ckpt_path$",
    r"validat",
)


@dataclass(frozen=True)
class ChangedKey:
    """A value that is another one than in the checkpoint.

    Args:
        path: where it stands below `trainer`.
        before: in the checkpoint.
        now: in the file.
    """

    path: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path} is {_shown(self.now)}, was {_shown(self.before)}"

    @property
    def needs_restart(self) -> bool:
        """Whether a run that goes on could not follow it."""
        return _matches(_NEEDS_RESTART, self.path) and not _matches(_TAKES_EFFECT, self.path)


def changes_between(before: TrainerConfig, now: TrainerConfig) -> list[ChangedKey]:
    """What differs, defaults filled in, so that a key that spells its default out is no change.

    Args:
        before: the configuration in a checkpoint.
        now: the one of the file.
    """
    old = before.blocks.model_dump(by_alias=True)
    new = now.blocks.model_dump(by_alias=True)
    for blocks in (old, new):
        blocks["init"]["sparsity"] = _in_full(blocks["init"]["sparsity"])
        # The only key of a model that would change what its weights mean, and fit all the same.
        blocks["init"]["model"].setdefault("rotary_pairs", "adjacent")
    return [one for one in _differences(old, new, "") if not _matches(_SILENT, one.path)]


def compare(builder: Builder, checkpoint: Path) -> list[Callback]:
    """Compares the file with the configuration in a checkpoint that its run is to go on from.

    Args:
        builder: of the file.
        checkpoint: what is going to be loaded whole.

    Returns:
        What brings changes about that the checkpoint's state would undo; called after the file's own callbacks.

    Raises:
        CheckpointError: a change that needs another start.
    """
    before = _saved_config(checkpoint)
    if before is None:
        return []
    changes = changes_between(before, builder.config)
    _refuse(changes, builder, checkpoint)
    for change in changes:
        log.info("changed since %s: %s", checkpoint.name, change)
    _tell_moved_steps(before, builder)
    options = {_option_of(one, builder) for one in changes} - {""}
    # A schedule of rarefy sets the rate, whatever the optimizer was built with.
    options -= {"lr"} if builder.schedulers else set()
    return [KeepOptions(options)] if options else []


def refuse_other_pairs(builder: Builder, checkpoint: Path | None) -> None:
    """Refuses weights of heads whose other entries turn together: they fit, and would compute something else.

    Args:
        builder: of the file.
        checkpoint: of which weights are going to be loaded, for whatever purpose; None for none.

    Raises:
        CheckpointError: its `rotary_pairs` are not those of the file.
    """
    before = None if checkpoint is None else _saved_config(checkpoint)
    if checkpoint is None or before is None:
        return
    for change in changes_between(before, builder.config):
        if change.path == "init.model.rotary_pairs":
            remedy = f"write model.rotary_pairs: {change.before}"
            raise CheckpointError(checkpoint, f"is of another file: {change}", remedy)


def as_saved(config: TrainerConfig, ckpt_path: CheckpointPath) -> dict[str, Any]:
    """The file that the run of a configuration was saved with, to go on as it was.

    Args:
        config: says where the run's checkpoints are.
        ckpt_path: the checkpoint; left out, the newest valid one.

    Raises:
        CheckpointError: there is none, or it has no configuration.
    """
    root = config.checkpoint_root
    found = find(ckpt_path, root)
    if found is None:
        raise CheckpointError(
            root, "has no checkpoint that a run could go on from", "leave --resume as_saved out"
        )
    params = load_params(found) if found.is_dir() else {}
    if not params:
        raise CheckpointError(
            found, "does not say with which file it was made", "leave --resume as_saved out"
        )
    # The directory may have been moved, and is where the checkpoint was found.
    params["trainer"]["init"]["model_dir"] = config.init.model_dir
    return params


class KeepOptions(Callback):
    """Gives the optimizer the options of the file once the state of a checkpoint is loaded.

    Args:
        names: of the options that were changed, such as `lr`.
    """

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self._fresh: list[dict[str, Any]] = []

    def setup(self, trainer: TrainerView) -> None:
        """Notes what the file says, before a checkpoint is loaded."""
        groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
        self._fresh = [{name: group[name] for name in self.names & group.keys()} for group in groups]

    def on_load_checkpoint(self, trainer: TrainerView, state: dict[str, Any]) -> None:
        """Puts it back."""
        for group, fresh in zip(trainer.optimizer.param_groups, self._fresh, strict=True):
            group.update(fresh)


def _saved_config(checkpoint: Path) -> TrainerConfig | None:
    """The configuration in a checkpoint; None where it holds none that this version reads."""
    if not checkpoint.is_dir():
        return None
    params = load_params(checkpoint)
    try:
        return parse(params)[0] if params else None
    # An older rarefy may have written it; the checkpoint itself can be whole.
    except RarefyError as error:
        log.warning("the configuration in %s cannot be compared with the file: %s", checkpoint, error)
        return None


def _refuse(changes: Sequence[ChangedKey], builder: Builder, checkpoint: Path) -> None:
    config = builder.config.init.checkpoint
    is_loose = config is not None and config.disable_strict_checkpoint_loading
    refused = [
        one
        for one in changes
        if (one.needs_restart and not (is_loose and _between_dense_and_sparse(one)))
        or _is_lr_of_torch_schedule(one, builder)
    ]
    # Schedules of rarefy are functions of the step alone; those of torch carry their options in their state.
    if all(isinstance(one, LRSchedule) for one in builder.schedulers):
        refused = [one for one in refused if not one.path.startswith("init.schedulers")]
    if refused:
        problem = f"is of another file: {'; '.join(map(str, refused))}"
        raise CheckpointError(checkpoint, problem, _RESTART)


def _between_dense_and_sparse(change: ChangedKey) -> bool:
    return change.path == "init.sparsity" and None in (change.before, change.now)


def _option_of(change: ChangedKey, builder: Builder) -> str:
    """The option of the optimizer that was changed, by its name in torch; empty for any other key."""
    # The name may be an import path, with dots in it.
    (name,) = builder.config.init.optimizer or [""]
    start = f"init.optimizer.{name}."
    if not change.path.startswith(start):
        return ""
    # Of `betas[1]` all of them.
    option = re.split(r"[.\[]", change.path.removeprefix(start))[0]
    return OTHER_NAMES.get(option, option)


def _is_lr_of_torch_schedule(change: ChangedKey, builder: Builder) -> bool:
    """Whether a rate was changed from which schedulers of torch have computed their own."""
    return _option_of(change, builder) == "lr" and not all(
        isinstance(one, LRSchedule) for one in builder.schedulers
    )


def _tell_moved_steps(before: TrainerConfig, builder: Builder) -> None:
    """Says where every `"75%"` is now, if the length of the run was changed."""
    loop = before.init.loop
    was = None if loop is None else builder.steps_with(loop)
    total = builder.total_steps
    if was is None or was == total:
        return
    for path, text in _percentages(builder.config.init.sparsity, f"{builder.path}.sparsity"):
        share = float(text.strip().rstrip("%")) / 100
        log.info('%s: "%s" is step %d now; it was %d', path, text, round(share * total), round(share * was))


def _percentages(value: Any, path: str, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _percentages(inner, join_path(path, str(name)), str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _percentages(inner, f"{path}[{index}]", key)
    elif isinstance(value, str) and key in step_keys() and percent_in(value) is not None:
        yield path, value


def _in_full(sparsity: Any) -> Any:
    """A `sparsity:` block with the algorithm that it means."""
    if isinstance(sparsity, int | float) and not isinstance(sparsity, bool):
        return {"algorithm": "static", "sparsity": sparsity}
    if isinstance(sparsity, Mapping) and not sparsity.keys() & {"algorithm", "type", "groups"}:
        return {"algorithm": "static", **sparsity}
    return sparsity


def _differences(before: Any, now: Any, path: str) -> Iterator[ChangedKey]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if _is_choice(path) and before.keys() != now.keys():
            yield ChangedKey(path, _shown_choice(before), _shown_choice(now))
            return
        for key in dict.fromkeys([*before, *now]):
            here = join_path(path, str(key))
            yield from _differences(before.get(key, ABSENT), now.get(key, ABSENT), here)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, both in enumerate(zip(before, now, strict=True)):
            yield from _differences(*both, f"{path}[{index}]")
    elif before != now:
        yield ChangedKey(path, before, now)


def _is_choice(path: str) -> bool:
    """Whether the one key there is a name: `optimizer: {AdamW: ...}`."""
    return re.fullmatch(r"init\.optimizer|init\.\w+\[\d+\]", path) is not None and "sparsity" not in path


def _shown_choice(choice: Mapping[str, Any]) -> str:
    return ", ".join(choice)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "null" if value is None else shorten(value)


def _matches(patterns: Sequence[str], path: str) -> bool:
    return any(re.match(pattern, path) for pattern in patterns)
