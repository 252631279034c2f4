"""`LoadCheckpointStates`: what of a named checkpoint a run begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_run
from rarefy.callbacks.load_checkpoint_states import LoadCheckpointStates
from rarefy.errors import ConfigError
from rarefy.run.launch import Launch, run_all
from rarefy.run.schema import parse


def trained(folder: Path, steps: int, ckpt_path: str | None = None, **init: Any) -> int:
    """The global step after a run of at most `steps`."""
    content = tiny_run.configuration(folder, loop={"max_steps": steps}, **init)
    if ckpt_path is not None:
        content["trainer"]["fit"]["ckpt_path"] = ckpt_path
    tiny_run.write(folder, content)
    [trainer] = run_all(parse(content), Launch(folder, mode="train"))
    return trainer.global_step


@pytest.mark.parametrize(("states", "expected"), [("model", 2), ("all", 5)])
def test_a_named_checkpoint_gives_what_is_asked_for(tmp_path: Path, states: str, expected: int) -> None:
    first = tmp_path / "first"
    first.mkdir()
    assert trained(first, 3) == 3
    checkpoint = next(first.rglob("checkpoint_3"))
    second = tmp_path / "second"
    second.mkdir()
    callbacks = [{"LoadCheckpointStates": {"load_checkpoint_states": states}}]
    steps = 2 if states == "model" else 5
    assert trained(second, steps, str(checkpoint), callbacks=callbacks) == expected


def test_going_on_takes_everything(tmp_path: Path) -> None:
    callbacks = [{"LoadCheckpointStates": {"load_checkpoint_states": "model"}}]
    assert trained(tmp_path, 3, callbacks=callbacks) == 3
    assert trained(tmp_path, 5, callbacks=callbacks) == 5


@pytest.mark.parametrize("given", ["optimizer", ["optimizer", "model"], "model,loop"])
def test_other_parts_go_together(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"load_checkpoint_states: .* give all, model"):
        LoadCheckpointStates(given)


def test_a_refusal_speaks_yaml() -> None:
    given: Any = [True]
    with pytest.raises(ConfigError, match=r"load_checkpoint_states: \[true\] is not allowed"):
        LoadCheckpointStates(given)
