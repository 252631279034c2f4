"""How long a process waits for what the others write, by a clock that goes on whenever it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.writing import together
from rarefy.checkpoint.writing.frozen import Frozen


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 10.0
        return self.now

    def sleep(self, seconds: float) -> None:
        """Takes no time."""


class Main:
    def __init__(self, lives: bool) -> None:
        self.lives = lives

    def is_alive(self) -> bool:
        return self.lives


@pytest.fixture
def frozen(tmp_path: Path) -> Frozen:
    found = Frozen(tmp_path / "checkpoint_1", 1, {}, {}, {}, 0, 2)
    found.temporary.mkdir()
    return found


def use(monkeypatch: pytest.MonkeyPatch, lives: bool) -> Clock:
    clock = Clock()
    monkeypatch.setattr(together, "time", clock)
    monkeypatch.setattr(together.threading, "main_thread", lambda: Main(lives))
    return clock


@pytest.mark.parametrize(("lives", "limit"), [(True, 1800), (False, 45)])
def test_others_that_write_nothing_are_not_waited_for(
    frozen: Frozen, monkeypatch: pytest.MonkeyPatch, lives: bool, limit: int
) -> None:
    clock = use(monkeypatch, lives)
    with pytest.raises(CheckpointError, match=f"the other processes wrote nothing more within {limit} s"):
        together._wait(lambda: False, frozen)
    assert limit < clock.now < limit + 50


@pytest.mark.parametrize("lives", [True, False])
def test_others_that_go_on_writing_are_waited_for(
    frozen: Frozen, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    clock = use(monkeypatch, lives)
    written = frozen.temporary / "model.00001.safetensors"

    def is_done() -> bool:
        with written.open("ab") as file:
            file.write(b"x")
        return written.stat().st_size == 100

    together._wait(is_done, frozen)
    assert clock.now > 900


def test_a_folder_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    assert together._written(tmp_path / "gone") == 0
