"""Which checkpoint a fit or a validation begins from."""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from rarefy.checkpoint.directory import newest_valid
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.manifest import MANIFEST_NAME
from rarefy.checkpoint.writing.folders import DIRECTORY_NAME

log = logging.getLogger("rarefy")


class Unset(enum.Enum):
    """The type of `UNSET`."""

    UNSET = "unset"


UNSET = Unset.UNSET
"""`ckpt_path` was not given: continue from the newest valid checkpoint, if the configuration allows."""

CheckpointPath = str | Path | None | Unset


def find(ckpt_path: CheckpointPath, root: Path, autoloads: bool = True) -> Path | None:
    """The checkpoint that a `ckpt_path` stands for.

    Args:
        ckpt_path: a path, of a `model_dir` too, None for none, or `UNSET`.
        root: the directory whose newest valid checkpoint is taken where nothing is given.
        autoloads: False takes none there.

    Raises:
        CheckpointError: a path that does not exist, or a directory without a valid checkpoint.
    """
    if ckpt_path is UNSET:
        return newest_valid(root, log.warning) if autoloads else None
    if ckpt_path is None:
        return None
    path = Path(str(ckpt_path))
    if not path.exists():
        remedy = "give the path of a checkpoint, null for none, or leave ckpt_path out for the newest one"
        raise CheckpointError(path, "does not exist", remedy)
    return checkpoint_at(path)


def checkpoint_at(path: Path) -> Path:
    """A path itself, or the newest valid checkpoint in it where it is the `model_dir` of a run.

    Raises:
        CheckpointError: a directory without a valid checkpoint.
    """
    # A name like a checkpoint's is enough: one without a manifest is
    # damaged, and must be said to be, not passed over.
    is_one = DIRECTORY_NAME.fullmatch(path.resolve().name) is not None or (path / MANIFEST_NAME).exists()
    if is_one or not path.is_dir():
        return path
    newest = newest_valid(path, log.warning)
    if newest is None:
        remedy = "give a checkpoint_<step> directory, or the model_dir of a run that saved one"
        raise CheckpointError(path, "holds no valid checkpoint", remedy)
    log.info("%s: its newest valid checkpoint is %s", path, newest.name)
    return newest


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
        # What exists is no glob, even with brackets in its name.
        matching = [pattern] if pattern.exists() else sorted(map(Path, glob(str(pattern))), key=_by_step)
        if not matching:
            raise CheckpointError(pattern, "matches nothing", "give a checkpoint's path or a glob of several")
        found += matching
    return found


def _by_step(path: Path) -> tuple[int, str]:
    # As text, checkpoint_1000 would come before checkpoint_200.
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1, path.name
