"""What has to survive a power failure, and what is said of a disk that refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rarefy.errors import RarefyError


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
