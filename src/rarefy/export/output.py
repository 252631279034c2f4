"""A file or folder that appears whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from rarefy.disk import flush
from rarefy.errors import RarefyError

PREFIX = ".tmp-export-"
FOLDER_MARK = "config.json"


def is_model_folder(folder: Path) -> bool:
    """Whether a folder is one of Hugging Face's."""
    return (folder / FOLDER_MARK).is_file()


def check_free(
    out: Path, *, is_folder: bool, force: bool, is_ours: Callable[[Path], bool] = is_model_folder
) -> None:
    """Whether something may be written to a path.

    Args:
        out: the path.
        is_folder: whether it is to be a folder.
        force: whether a file there may be replaced by a file, and a folder of the same kind by a folder.
        is_ours: whether a folder is of the kind that is to be written.

    Raises:
        RarefyError: it exists and may not be replaced.
    """
    if not out.exists():
        return
    if not force:
        raise RarefyError(f"{out}: exists already; give another path, or --force to replace it")
    if is_folder != out.is_dir():
        kinds = ("a folder", "a file") if is_folder else ("a file", "a folder")
        raise RarefyError(f"{out}: {kinds[0]} is to be written, but this is {kinds[1]}; give another path")
    if is_folder and not is_ours(out) and any(out.iterdir()):
        mark = f" (no {FOLDER_MARK})" if is_ours is is_model_folder else ""
        problem = f"has other things than a model in it{mark}, so --force does not replace it"
        raise RarefyError(f"{out}: {problem}; give another path")


def write(out: Path, fill: Callable[[Path], object]) -> int:
    """Writes a file or a folder, which appears under its name once it is whole and on the disk.

    Args:
        out: the final path, as `check_free` allows it; folders above it are made.
        fill: writes to the path that it is called with.

    Returns:
        How many bytes it has.

    Raises:
        RarefyError: the file system refuses; nothing is left behind, and what was there before stays.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, because a rename does not cross file systems.
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=out.parent) as folder:
            made = Path(folder) / "made"
            fill(made)
            written = [made, *made.rglob("*")]
            # Folders too, which hold the names of the files.
            for one in written:
                flush(one)
            size = sum(file.stat().st_size for file in written if file.is_file())
            _publish(made, out)
            return size
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "free space, fix the permissions or give another path"
        raise RarefyError(f"{out}: cannot be written: {reason}; {remedy}") from error


def _publish(made: Path, out: Path) -> None:
    replaced = made.with_name("replaced")
    # No rename replaces a folder that holds something; set aside, it goes with the temporary directory.
    if out.is_dir():
        out.rename(replaced)
    try:
        made.replace(out)
    except OSError:
        if replaced.exists():
            replaced.rename(out)
        raise
    flush(out.parent)
