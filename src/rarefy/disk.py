"""What has to survive a power failure."""

from __future__ import annotations

import os
from pathlib import Path


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
