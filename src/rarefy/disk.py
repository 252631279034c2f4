"""What has to survive a power failure, and what is said of a disk that refuses."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rarefy.errors import RarefyError

LOCK_NAME = ".running"
"""The file by whose lock a run has its folder to itself; without a lock it is left over from a run that was killed."""

# A run that was told to end saves its state first, and workers of one that was killed live on for some seconds.
_WAIT = 10.0


def flush(path: Path) -> None:
    """Returns when the content of a file, or the names in a directory, are on the disk.

    Args:
        path: an existing file or directory.

    Raises:
        OSError: it cannot be opened, or the disk refuses.

    Example:
        >>> import tempfile
        >>> flush(Path(tempfile.mkdtemp()))
    """
    # Reading is enough for fsync, and a directory cannot be opened for writing.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in one line what keeps a file from being written.

    Args:
        path: the file.

    Raises:
        RarefyError: an OSError was raised inside.

    Example:
        >>> with writing(Path("a.csv")):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        rarefy.errors.RarefyError: a.csv: cannot be written: No space left on device; free space or fix the permissions
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RarefyError(
            f"{path}: cannot be written: {reason}; free space or fix the permissions"
        ) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other runs from a folder until it is left; where a file system has no locks nobody is kept out.

    Args:
        folder: is made if it is not there.

    Raises:
        RarefyError: another run is at work in it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with alone_in(folder):
        ...     print([one.name for one in folder.iterdir()])
        ['.running']
    """
    descriptor = _locked(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            _give_back(folder, descriptor)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock; None where it cannot be had, and is not needed."""
    last = time.monotonic() + _WAIT
    while True:
        try:
            return _try_to_lock(folder)
        except BlockingIOError:
            if time.monotonic() >= last:
                raise RarefyError(
                    f"{folder}: another run is writing to it; wait until it has ended, or give this one another "
                    "model_dir or checkpoint_root"
                ) from None
            time.sleep(0.1)
        # What keeps the folder from being written to is said where something is written to it.
        except OSError:
            return None


def _try_to_lock(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    is_ours = True
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        # Another user's: a lock can be had of a file that may only be read, too.
        is_ours = False
        descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have removed the file since it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        raise BlockingIOError
    except OSError as error:
        os.close(descriptor)
        # Where there are no locks the file means nothing; one that is locked is another's.
        if is_ours and not isinstance(error, BlockingIOError):
            with suppress(OSError):
                path.unlink()
        raise


def _give_back(folder: Path, descriptor: int) -> None:
    with suppress(OSError):
        # Before the lock goes: afterwards it may be the next one's file.
        (folder / LOCK_NAME).unlink()
    with suppress(OSError):
        # Said, as a worker that was forked since holds the same lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
