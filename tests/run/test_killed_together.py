"""Two processes under `fsdp2`, of which one is killed at some moment and the other then: they end as if none had been.

The moments are those of reading a batch, after a backward pass, after a step, and of each flush of a checkpoint's file.
The result is equal to the last bit, since the processes are as many, and sum in the same order.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from process_runs import STEPS, made, run
from ranks import NEEDS_FULLY_SHARD
from rarefy.checkpoint.directory import CheckpointParts, load

pytestmark = NEEDS_FULLY_SHARD
RANKS = 2


def result(folder: Path) -> CheckpointParts:
    return load(folder / "md" / f"checkpoint_{STEPS}")


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """By place, all numbers, texts and tensors of a nested value."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for at, one in items for key, leaf in flat(one, f"{place}.{at}").items()}
    return {place: value}


def assert_identical(found: CheckpointParts, expected: CheckpointParts) -> None:
    for part in ("model", "optimizer", "state", "rng"):
        left, right = (flat(getattr(one, part)) for one in (found, expected))
        assert left.keys() == right.keys()
        for place, one in right.items():
            is_tensor = isinstance(one, torch.Tensor)
            assert torch.equal(left[place], one) if is_tensor else left[place] == one, place


def killed(folder: Path, source: random.Random, kills: int) -> None:
    """Kills a run so often, or as often as it did not end before."""
    for _ in range(kills):
        victim = source.randrange(RANKS)
        kind, highest = source.choice([("KILL_AT_MOMENT", 3 * STEPS), ("KILL_AT_FLUSH", 16)])
        chosen = {kind: str(source.randint(1, highest))}
        codes = run(
            folder, RANKS, lambda rank, victim=victim, chosen=chosen: chosen if rank == victim else {}
        )
        if codes == [0] * RANKS:
            return
        assert codes[victim] == -signal.SIGKILL, (folder / "said.txt").read_text()


def check(tmp_path: Path, runs: int, kills: int) -> None:
    whole = made(tmp_path / "whole", "fsdp2", saves=2)
    assert run(whole, RANKS) == [0] * RANKS, (whole / "said.txt").read_text()
    for number in range(runs):
        folder = made(tmp_path / str(number), "fsdp2", saves=2)
        killed(folder, random.Random(number), kills)
        assert run(folder, RANKS) == [0] * RANKS, (folder / "said.txt").read_text()
        assert_identical(result(folder), result(whole))


def test_killed_processes_end_like_some_that_were_not(tmp_path: Path) -> None:
    check(tmp_path, runs=1, kills=2)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    check(tmp_path, runs=5, kills=4)
