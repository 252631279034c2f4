"""From the flags of a command to the configuration that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rarefy.errors import ConfigError
from rarefy.run.schema import OVERLAY_BLOCKS, trainers_of
from rarefy.run.short_paths import whole_assignment
from rarefy.trainer.state import States
from rarefy.yaml_files.overlay import assign, overlay


@dataclass(frozen=True)
class Flags:
    """The flags of `rarefy run` that change the file; None for those that were not given."""

    model_dir: str | None = None
    device: str | None = None
    log_level: str | None = None
    max_steps: int | None = None
    num_steps: int | None = None
    num_epochs: int | None = None
    eval_steps: int | None = None
    checkpoint_path: str | None = None
    load_checkpoint_states: str | None = None
    resume: str | None = None
    disable_strict_checkpoint_loading: bool | None = None
    assignments: tuple[str, ...] = ()

    @property
    def in_init(self) -> dict[str, Any]:
        """What the given flags set below `trainer.init`, `model_dir` aside."""
        values = {
            "device": self.device,
            "logging.log_level": self.log_level,
            "loop.max_steps": self.max_steps,
            "loop.num_steps": self.num_steps,
            "loop.num_epochs": self.num_epochs,
            "loop.eval_steps": self.eval_steps,
            "checkpoint.disable_strict_checkpoint_loading": self.disable_strict_checkpoint_loading,
        }
        return {key: value for key, value in values.items() if value is not None}


def apply_flags(content: Mapping[str, Any], flags: Flags) -> dict[str, Any]:
    """A file with the flags that were given.

    `num_steps` and `num_epochs` replace each other. In a file with several trainers every trainer gets the
    flags; `model_dir` then becomes the folder that holds theirs.

    Args:
        content: the file as plain data; it stays as it is.
        flags: what was given.

    Raises:
        ConfigError: an assignment to a path that does not exist, or to a short one that fits several keys.
    """
    assignments = [whole_assignment(content, one) for one in flags.assignments]
    changed = overlay(dict(content), assignments, OVERLAY_BLOCKS)
    # A file without it is refused later, where its line is known.
    trainers = trainers_of(changed) if "trainer" in changed else []
    for path, trainer in trainers:
        if isinstance(trainer, dict) and isinstance(trainer.get("init"), dict):
            _apply_to(changed, f"{path}.init", trainer["init"], flags)
            if flags.model_dir is not None:
                own = Path(str(trainer["init"].get("model_dir", "model_dir"))).name
                shared = len(trainers) == 1
                trainer["init"]["model_dir"] = flags.model_dir if shared else str(Path(flags.model_dir) / own)
    return changed


def _apply_to(content: dict[str, Any], path: str, init: dict[str, Any], flags: Flags) -> None:
    loop = init.get("loop")
    # A file may have one of the two only, so a flag takes the other's place.
    for given, replaced in ((flags.num_steps, "num_epochs"), (flags.num_epochs, "num_steps")):
        if given is not None and isinstance(loop, dict):
            loop.pop(replaced, None)
    for key, value in flags.in_init.items():
        assign(content, f"{path}.{key}", value, OVERLAY_BLOCKS)


def goes_on_as_saved(flags: Flags) -> bool:
    """Whether `--resume as_saved` was given.

    Raises:
        ConfigError: another word.
    """
    if flags.resume not in (None, "as_saved"):
        allowed = "as_saved, or no --resume: a run goes on by itself"
        raise ConfigError("--resume", flags.resume, allowed, "--resume as_saved")
    return flags.resume is not None


def states_to_load(flags: Flags) -> States:
    """`all`, `model` or `model,optimizer`, from `--load_checkpoint_states`.

    Raises:
        ConfigError: anything else.
    """
    given = flags.load_checkpoint_states
    for states in get_args(States):
        if given in (states, None):
            return states
    raise ConfigError(
        "--load_checkpoint_states", given, "all, model or model,optimizer", "--load_checkpoint_states model"
    )
