"""What is flushed is the file or the directory itself, and no descriptor stays open."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rarefy.disk import LOCK_NAME, alone_in, flush, writing
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


# ---- one run a folder ----


def entered(folder: Path) -> str:
    with alone_in(folder):
        return "alone"


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Takes the lock as another process does, by a descriptor of its own; called, it gives it back."""
    descriptor = os.open(tmp_path / LOCK_NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield lambda: fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def test_a_folder_in_use_is_refused_until_it_is_given_back(
    tmp_path: Path, taken: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rarefy.disk._WAIT", 0.0)
    for _ in range(2):
        with pytest.raises(
            RarefyError, match=r": another run is writing to it; wait until it has ended, or give"
        ):
            entered(tmp_path)
    assert entered(tmp_path / "new") == "alone"
    taken()
    # The file of a run that was killed is no lock.
    assert entered(tmp_path) == "alone" and [one.name for one in tmp_path.iterdir()] == ["new"]


def test_what_is_about_to_end_is_waited_for(
    tmp_path: Path, taken: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(_: float) -> None:
        # As the other one does it: the file goes first.
        (tmp_path / LOCK_NAME).unlink(missing_ok=True)
        taken()

    monkeypatch.setattr("rarefy.disk.time.sleep", end)
    with alone_in(tmp_path):
        assert (tmp_path / LOCK_NAME).exists()


def test_a_lock_of_a_file_that_went_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / LOCK_NAME).unlink()
        lock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", late)
    with alone_in(tmp_path):
        assert len(calls) == 2 and (tmp_path / LOCK_NAME).exists()


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with alone_in(tmp_path):
        assert entered(tmp_path) == "alone" and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_left_to_what_writes_to_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert entered(tmp_path / "file" / "folder") == "alone"


def test_a_lock_of_another_user_is_kept_to_and_left(
    taken: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rarefy.disk._WAIT", 0.0)
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest)

    monkeypatch.setattr("rarefy.disk.os.open", refuse)
    with pytest.raises(RarefyError, match="another run is writing to it"):
        entered(tmp_path)
    assert (tmp_path / LOCK_NAME).exists()
    taken()
    assert entered(tmp_path) == "alone"
