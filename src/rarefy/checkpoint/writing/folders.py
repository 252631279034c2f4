"""The folders of checkpoints: which there are, and how one takes its place or goes, at any moment whole."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rarefy.checkpoint.manifest import MANIFEST_NAME
from rarefy.checkpoint.writing.frozen import TEMPORARY_PREFIX
from rarefy.disk import flush

# One that was set aside counts too, until the one that takes its place is complete.
DIRECTORY_NAME = re.compile(r"checkpoint_(\d+)(\.replaced)?")
REPLACED_SUFFIX = ".replaced"


@contextmanager
def only_writer(root: Path) -> Iterator[None]:
    """Holds a lock that a kill releases too; goes without one where the file system has none."""
    # The folder itself is locked, so that no file for it stays behind.
    descriptor = os.open(root, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Closing alone would not do while a data worker, forked meanwhile, holds a copy of the descriptor.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Gives a complete folder its name; one that has it goes afterwards."""
    replaced = final.with_name(final.name + REPLACED_SUFFIX)
    # No rename replaces a directory that holds something.
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    # The new name has to be on the disk before the old checkpoint goes.
    flush(final.parent)
    if replaced.exists():
        _delete(replaced)


def clear_leftovers(root: Path) -> None:
    """Removes what a kill left behind."""
    for path in root.glob(f"{TEMPORARY_PREFIX}checkpoint_*"):
        shutil.rmtree(path)
    for path in root.glob(f"checkpoint_*{REPLACED_SUFFIX}"):
        final = path.with_name(path.name.removesuffix(REPLACED_SUFFIX))
        if final.exists():
            _delete(path)
        else:
            # Killed between the two renames of `publish`: this is the only checkpoint of its step.
            path.rename(final)


def delete_old(root: Path, newest: Path, keep_last: int | None) -> None:
    """Deletes all checkpoints but the newest so many."""
    if keep_last is None:
        return
    # A directory that is no checkpoint must not take the place of one that is kept.
    complete = [path for path in candidates(root) if path != newest and (path / MANIFEST_NAME).exists()]
    # One of those that stay is the newest, which is not among them.
    for path in complete[: max(0, len(complete) - keep_last + 1)]:
        _delete(path)


def _delete(path: Path) -> None:
    """Renames first, so that a kill half-way leaves no damaged checkpoint behind."""
    condemned = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    path.rename(condemned)
    shutil.rmtree(condemned)


def candidates(root: Path) -> list[Path]:
    """Directories named like a checkpoint, the best last."""
    if not root.is_dir():
        return []
    named = [(DIRECTORY_NAME.fullmatch(path.name), path) for path in root.iterdir()]
    # Of one step the set-aside checkpoint is the older.
    ranked = [(int(match[1]), match[2] is None, path) for match, path in named if match and path.is_dir()]
    return [path for _, _, path in sorted(ranked)]
