"""Losses and masks of short runs are what they were when they were recorded, resumed or not."""

from __future__ import annotations

import json
from typing import Any

import pytest

import golden_traces as golden

EXPECTED = json.loads(golden.RECORDED.read_text())
CASES = [(name, storage) for name in golden.BLOCKS for storage in golden.STORAGES]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Masks agree exactly, numbers to what processors may differ by."""
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for key, value in theirs.items():
            same = value if key == "masks" else pytest.approx(value, rel=1e-9)
            assert mine[key] == same, f"{key} of step {step + 1}"


@pytest.mark.parametrize("resumes", [False, True], ids=["at once", "resumed"])
@pytest.mark.parametrize(("name", "storage"), CASES)
def test_the_plain_loop_repeats_its_trace(name, storage, resumes):
    assert_same(golden.loop_trace(name, storage, resumes=resumes), EXPECTED[f"loop/{name}/{storage}"])


@pytest.mark.parametrize("resumes", [False, True], ids=["at once", "resumed"])
@pytest.mark.parametrize(("name", "storage"), CASES)
def test_the_trainer_repeats_its_trace(name, storage, resumes, tmp_path, capsys):
    found = golden.trainer_trace(name, storage, tmp_path, resumes=resumes)
    assert_same(found, EXPECTED[f"trainer/{name}/{storage}"])
