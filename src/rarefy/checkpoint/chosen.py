"""Which checkpoint a fit or a validation begins from."""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from rarefy.checkpoint.directory import newest_valid
from rarefy.checkpoint.error import CheckpointError

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
        ckpt_path: a path, None for none, or `UNSET`.
        root: the directory whose newest valid checkpoint is taken where nothing is given.
        autoloads: False takes none there.

    Raises:
        CheckpointError: a path that does not exist.
    """
    if ckpt_path is UNSET:
        return newest_valid(root, log.warning) if autoloads else None
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
