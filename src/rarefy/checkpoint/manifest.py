"""MANIFEST.json: the files of a checkpoint, with sizes and SHA-256; no valid one, no checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rarefy.checkpoint.error import CheckpointError, NewerFormatError

# 2: tensors with many zeros are packed. A format 1 is read as one in which nothing is.
# 3: tensors are cut over the files of several processes; nothing else is written as 3.
FORMAT_VERSION = 3
MANIFEST_NAME = "MANIFEST.json"
USE_ANOTHER = "use another checkpoint, or delete this one"
GIVE_CHECKPOINT = "give a checkpoint_<step> directory"


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)
    size: int
    sha256: str


class Manifest(BaseModel):
    """What MANIFEST.json holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)
    format_version: int
    step: int
    files: dict[str, FileRecord]


def version_of(writers: int) -> int:
    """The format of a checkpoint that so many processes write.

    Example:
        >>> version_of(1), version_of(4)
        (2, 3)
    """
    return FORMAT_VERSION if writers > 1 else FORMAT_VERSION - 1


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Writes a new file through to the disk (fsync) and hashes it in the same pass.

    Args:
        path: a file that does not exist yet.
        chunks: its bytes.

    Raises:
        OSError: when the file system refuses.
    """
    digest = hashlib.sha256()
    size = 0
    # Never over a file that is there: that could only be another writer's.
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        # Without it a power failure can leave the renamed directory with empty files.
        os.fsync(file.fileno())
    return FileRecord(size=size, sha256=digest.hexdigest())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes MANIFEST.json; from here on the directory is a checkpoint."""
    write_file(directory / MANIFEST_NAME, [manifest.model_dump_json(indent=1).encode()])


def verify(directory: Path, names: Iterable[str]) -> Manifest:
    """The manifest of a checkpoint, once every file agrees with it.

    Args:
        directory: the checkpoint.
        names: the files that it must have.

    Raises:
        CheckpointError: names the path, what is wrong and what to do.
        OSError: when a file cannot be read.
    """
    manifest = _read_manifest(directory)
    # Beside them those of other processes.
    for name in dict.fromkeys([*names, *manifest.files]):
        _verify_file(directory / name, manifest.files.get(name))
    return manifest


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        CheckpointError: when it is not valid JSON.
        OSError: when it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    # RecursionError comes of brackets nested too deeply.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, "is not valid JSON", USE_ANOTHER) from error


def check_version(path: Path, content: Any) -> None:
    """Refuses what a newer rarefy wrote.

    Raises:
        CheckpointError: when `content["format_version"]` is missing.
        NewerFormatError: when it is above `FORMAT_VERSION`.
    """
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(path, "has no format_version", USE_ANOTHER)
    if version > FORMAT_VERSION:
        problem = f"has checkpoint format {version}; this rarefy reads formats up to {FORMAT_VERSION}"
        raise NewerFormatError(path, problem, "upgrade rarefy, or use another checkpoint or model_dir")


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise CheckpointError(directory, "is not a checkpoint directory", GIVE_CHECKPOINT)
    if not path.is_file():
        problem = f"has no {MANIFEST_NAME}, so it is not a complete checkpoint"
        raise CheckpointError(directory, problem, GIVE_CHECKPOINT)
    content = read_json(path)
    # Before the keys: a newer format may have others, and should be told by its version.
    check_version(path, content)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CheckpointError(path, f"is not a valid manifest (at {where})", USE_ANOTHER) from error


def _verify_file(path: Path, record: FileRecord | None) -> None:
    if record is None:
        raise CheckpointError(path, f"is not listed in {MANIFEST_NAME}", USE_ANOTHER)
    if not path.is_file():
        raise CheckpointError(path, "is missing", USE_ANOTHER)
    # The size tells a truncated file without reading gigabytes.
    size = path.stat().st_size
    if size != record.size:
        problem = f"is damaged: {size} bytes where {MANIFEST_NAME} says {record.size}"
        raise CheckpointError(path, problem, USE_ANOTHER)
    if _sha256(path) != record.sha256:
        raise CheckpointError(path, f"is damaged: its SHA-256 is not the one in {MANIFEST_NAME}", USE_ANOTHER)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    # One buffer of a megabyte, whatever the size of the file; a second one of Python's own would only cost time.
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
