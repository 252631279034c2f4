"""A run that is killed at random moments and started again ends exactly as one that was left alone."""

from __future__ import annotations

import csv
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_run
from killing import STEPS, Kill, random_kill, start
from rarefy.checkpoint.directory import load

KILLS_PER_RUN = 3
SPARSITY = {**tiny_run.SPARSITY, "compact": {**tiny_run.SPARSITY["rigl"], "compute": "compact"}}


def prepare(folder: Path, algorithm: str) -> Path:
    """A folder with a run whose every part matters: accumulation, dropout, schedules, validation, epochs."""
    folder.mkdir()
    content = tiny_run.configuration(
        folder,
        SPARSITY[algorithm],
        model_dir="out",
        loop={"max_steps": STEPS, "eval_frequency": 0.25, "grad_accum_steps": 2},
        checkpoint={"steps": 4, "keep_last": 3},
        logging={"log_steps": 1},
        callbacks=[{"LogSparsity": {}}],
        schedulers=[
            {"LinearLR": {"initial_learning_rate": 0.01, "end_learning_rate": 0.0, "total_iters": STEPS}}
        ],
    )
    tiny_run.write(folder, content)
    return folder


def result(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, its timing aside."""
    parts = load(folder / "out" / f"checkpoint_{STEPS}")
    with (folder / "out" / "metrics.csv").open() as file:
        rows = [
            {key: row[key] for key in ("step", "loss", "lr", "eval/loss")} for row in csv.DictReader(file)
        ]
    return {
        "model": parts.model,
        "optimizer": parts.optimizer,
        "state": parts.state,
        "rng": parts.rng,
        "metrics": rows,
    }


def assert_identical(left: Any, right: Any, path: str = "") -> None:
    """Equal to the last bit."""
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_identical(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_identical(one, other, f"{path}[{index}]")
    else:
        assert left == right, path


def left_alone(tmp_path: Path, algorithm: str) -> tuple[dict[str, Any], float]:
    """The result of the uninterrupted run, and how long it took."""
    folder = prepare(tmp_path / "alone", algorithm)
    began = time.monotonic()
    assert start(folder, Kill()) == 0
    return result(folder), time.monotonic() - began


def killed(folder: Path, seconds: float, source: random.Random) -> int:
    """Kills a run up to `KILLS_PER_RUN` times and lets it end; returns how often it was killed."""
    kills = 0
    while kills < KILLS_PER_RUN:
        code = start(folder, random_kill(source, seconds))
        if code == 0:
            return kills
        assert code == -signal.SIGKILL
        kills += 1
    assert start(folder, Kill()) == 0
    return kills


def check(tmp_path: Path, algorithm: str, kills: int) -> None:
    expected, seconds = left_alone(tmp_path, algorithm)
    source, done, runs = random.Random(algorithm), 0, 0
    while done < kills:
        runs += 1
        folder = prepare(tmp_path / str(runs), algorithm)
        done += killed(folder, seconds, source)
        assert_identical(result(folder), expected)


def test_a_killed_run_ends_like_one_left_alone(tmp_path: Path) -> None:
    check(tmp_path, "rigl", kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SPARSITY)
def test_twenty_kills(tmp_path: Path, algorithm: str) -> None:
    check(tmp_path, algorithm, kills=20)
