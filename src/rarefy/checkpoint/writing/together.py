"""A checkpoint that several processes write together, each its pieces, into one folder that all of them see.

The first process makes the folder, and each writes its files there in the background. What it wrote it notes in a file
that appears whole; when all notes are there, the first process writes the manifest and renames the folder. No process
waits for another in a collective meanwhile, so that training may use these. A process that is killed leaves a folder
without a manifest, and the checkpoint before it stays the newest.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.manifest import FileRecord
from rarefy.checkpoint.writing.folders import clear_leftovers, delete_old, only_writer, publish
from rarefy.checkpoint.writing.frozen import Frozen, complete
from rarefy.distributed import highest_of_all, place

_LIMIT_SECONDS = 1800.0
# For a process that has ended but for its checkpoint: the others have too, where not a byte comes for so long.
_QUIET_SECONDS = 45.0
_PAUSE_SECONDS = 0.02


def begin_together(root: Path, frozen: Frozen, keep_last: int | None) -> Callable[[], None]:
    """Makes the folder; all processes must call it.

    Args:
        root: where checkpoints go, the same folder for all processes.
        frozen: what this process writes.
        keep_last: as for `directory.save`.

    Returns:
        What writes the part of this process, and returns when the checkpoint is safe on the disk.

    Raises:
        CheckpointError: the folder cannot be made, or is not seen here.
    """
    lock = ExitStack()
    code = 0
    if place()[0] == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock.enter_context(only_writer(root))
            clear_leftovers(root)
            frozen.temporary.mkdir()
        except OSError as error:
            lock.close()
            code = error.errno or errno.EIO
    # All go on or none does: a process that raised alone would leave the others waiting for it.
    code = highest_of_all(code)
    if code:
        raise unwritten(frozen.path, os.strerror(code))
    if not frozen.temporary.is_dir():
        raise unwritten(frozen.path, "this process does not see the folder that the first one made")
    if frozen.rank == 0 and place()[0] == 0:
        return partial(_write_first, root, frozen, keep_last, lock)
    return partial(_write_other, frozen)


def unwritten(path: Path, problem: OSError | str) -> CheckpointError:
    """The error about a checkpoint that could not be written."""
    reason = problem if isinstance(problem, str) else problem.strerror or str(problem)
    remedy = "free space or fix the permissions; the checkpoints before it are intact"
    return CheckpointError(path, f"cannot be written: {reason}", remedy)


def _write_first(root: Path, frozen: Frozen, keep_last: int | None, lock: ExitStack) -> None:
    with lock:
        try:
            files = frozen.write(frozen.temporary)
            for rank in range(1, frozen.writers):
                files |= _noted(frozen, rank)
            complete(frozen.temporary, frozen, files)
            publish(frozen.temporary, frozen.path)
        except OSError as error:
            raise unwritten(frozen.path, error) from error
        finally:
            # After a failure only, as what was published has another name; the others see that it is gone.
            shutil.rmtree(frozen.temporary, ignore_errors=True)
        delete_old(root, frozen.path, keep_last)


def _write_other(frozen: Frozen) -> None:
    folder = frozen.temporary
    note = _note(folder, frozen.rank)
    # Of processes that hold the same pieces only the first one writes.
    if frozen.rank < frozen.writers:
        try:
            files = frozen.write(folder)
        except OSError as error:
            # Or the first process would wait for the pieces until its limit.
            _leave(note, {"problem": error.strerror or str(error)})
            raise unwritten(frozen.path, error) from error
        _leave(note, {"files": {name: record.model_dump() for name, record in files.items()}})
    _wait(lambda: not folder.exists(), frozen)


def _note(folder: Path, rank: int) -> Path:
    return folder / f"written.{rank:05d}.json"


def _leave(note: Path, content: dict[str, object]) -> None:
    """Writes a note that appears whole."""
    draft = note.with_suffix(".draft")
    draft.write_text(json.dumps(content))
    draft.rename(note)


def _noted(frozen: Frozen, rank: int) -> dict[str, FileRecord]:
    """What another process wrote, once it has."""
    note = _note(frozen.temporary, rank)
    _wait(note.exists, frozen)
    content = json.loads(note.read_text())
    note.unlink()
    if "problem" in content:
        raise unwritten(frozen.path, f"process {rank} could not write its pieces: {content['problem']}")
    return {name: FileRecord(**record) for name, record in content["files"].items()}


def _wait(is_done: Callable[[], bool], frozen: Frozen) -> None:
    """Returns when something is done; a process that ends waits only as long as the others go on writing.

    Raises:
        CheckpointError: it is not done in time.
    """
    end = time.monotonic() + _LIMIT_SECONDS
    seen = -1
    quiet_until = end
    while not is_done():
        now = time.monotonic()
        # The interpreter waits for this thread; of a process that was killed it would wait in vain.
        size = -1 if threading.main_thread().is_alive() else _written(frozen.temporary)
        if size != seen:
            seen = size
            quiet_until = now + _QUIET_SECONDS
        if now > min(end, quiet_until):
            limit = _LIMIT_SECONDS if seen < 0 else _QUIET_SECONDS
            raise unwritten(frozen.path, f"the other processes wrote nothing more within {limit:g} s")
        time.sleep(_PAUSE_SECONDS)


def _written(folder: Path) -> int:
    """How many bytes all processes have written so far."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    # A note goes when it was read, and the folder when it is complete.
    except FileNotFoundError:
        return 0
