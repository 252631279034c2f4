"""What is flushed is the file or the directory itself, and no descriptor stays open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rarefy.disk import flush, writing
from rarefy.errors import RarefyError


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_the_path_itself_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path, flushed = tmp_path / kind, []
    path.mkdir() if kind == "directory" else path.write_text("content")
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: flushed.append((descriptor, os.fstat(descriptor).st_ino))
    )
    flush(path)
    [(descriptor, inode)] = flushed
    assert inode == path.stat().st_ino
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "missing")


@pytest.mark.parametrize(
    ("error", "reason"), [(OSError(28, "No space left on device"), "No space left"), (OSError("odd"), "odd")]
)
def test_what_cannot_be_written_is_said_with_its_reason(error: OSError, reason: str) -> None:
    expected = pytest.raises(RarefyError, match=f"^a.csv: cannot be written: {reason}.*; free space or fix")
    with expected, writing(Path("a.csv")):
        raise error
