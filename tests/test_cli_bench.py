"""`rarefy bench`, with layers so small that nothing takes long."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rarefy.cli import bench
from rarefy.cost import measure
from rarefy.cost.calibration import BreakEven, Measurement
from rarefy.kernels import instruction_set
from tiny_run import rarefy

TINY = [measure.Case(n, n, t, s) for n in (16, 64) for t in (16, 32) for s in (0.5, 0.9)]


def tiny_cases(dtype: torch.dtype, block: tuple[int, int] | None = None) -> list[measure.Case]:
    return [replace(case, block=block) for case in TINY]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bench, "_SECONDS", 0)
    monkeypatch.setattr(bench, "_CALIBRATION_SECONDS", 0)
    monkeypatch.setattr(measure, "calibration_cases", tiny_cases)
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    return tmp_path / "cost.json"


def test_every_layer_has_a_row() -> None:
    layers = ["--shape", "16x32", "--shape", "8x8", "--tokens", "4", "--sparsity", "0.5", "--sparsity", "0.9"]
    result = rarefy("bench", *layers, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if " × " in line]
    assert [line.split()[:5] for line in rows] == [
        [str(r), "×", str(c), "4", s] for r, c in ((16, 32), (8, 8)) for s in ("0.5", "0.9")
    ]
    assert "bfloat16" in result.stdout and all("masked" in line for line in rows)


def as_expected(case: measure.Case, *_: object, **__: object) -> Measurement:
    """A measurement that obeys a rule, instead of one."""
    layer = (case.rows, case.columns, case.tokens, 1 - case.sparsity)
    return Measurement(*layer, dense=1e-3, sparse=1e-3 * BreakEven(0.54, 8, 1e4).relative_time(*layer))


@pytest.mark.skipif(instruction_set() == "reference", reason="needs the compiled kernels")
def test_calibrating_showing_and_forgetting(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure", as_expected)
    threads = torch.get_num_threads()
    result = rarefy("bench", "--calibrate", "--dtype", "float32", "--threads", threads + 1)
    assert result.exit_code == 0, result.output
    assert "in use, measured" in result.stdout and "fitted to 8 layers" in result.stderr
    (entry,) = json.loads(cache.read_text())["entries"]
    assert entry["key"]["threads"] == threads + 1 and entry["rule"]["limit"] == pytest.approx(0.5)
    assert torch.get_num_threads() == threads
    shown = rarefy("bench", "--show").stdout
    assert shown.count("in use, the package's") == 2 and shown.count("measured") == 1
    assert rarefy("bench", "--reset").exit_code == 0 and not cache.exists()
    assert "nothing to remove" in rarefy("bench", "--reset").stderr


@pytest.mark.skipif(instruction_set() == "reference", reason="needs the compiled kernels")
def test_layers_of_blocks_have_a_rule_of_their_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = rarefy("bench", "--shape", "16x32", "--tokens", "4", "--sparsity", "0.5", "--block", "8x16")
    assert result.exit_code == 0 and "16 × 32" in result.stdout
    asked = []
    monkeypatch.setattr(measure, "measure", lambda case, *_, **__: asked.append(case) or as_expected(case))
    result = rarefy("bench", "--calibrate", "--dtype", "float32", "--block", "64x32")
    assert result.exit_code == 0, result.output
    assert {case.block for case in asked} == {None, (16, 16)}, "None for the one that says what is affordable"
    (entry,) = json.loads(cache.read_text())["entries"]
    assert entry["key"]["instruction_set"] == f"{instruction_set()} blocks of 16"
    assert "in use, measured" in rarefy("bench", "--show", "--block", "16x16").stdout
    assert "in use, measured" not in rarefy("bench", "--show", "--block", "8x16").stdout
    assert "in use, measured" not in rarefy("bench", "--show").stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--shape", "768"], "--shape: 768 is not allowed; give the rows and columns of a weight (example"),
        (["--shape", "0x4"], "--shape: 0x4 is not allowed"),
        (["--block", "32"], "--block: 32 is not allowed; give the rows and columns of a block (example"),
        (["--block", "10x8"], "--block: 10x8 is not allowed; give blocks that divide 768x768"),
        (["--calibrate", "--block", "4x8"], "--block: 4x8 is not allowed; give multiples of 8"),
        (["--tokens", "0"], "--tokens: 0 is not allowed; give a whole number ≥ 1"),
        (["--sparsity", "1"], "--sparsity: 1.0 is not allowed; give a number ≥ 0 and < 1"),
        (["--threads", "0"], "--threads: 0 is not allowed; give a whole number ≥ 1"),
        (["--calibrate", "--reset"], "--calibrate with --reset is not allowed; give one of them"),
        (["--show", "--tokens", "4"], "--show with --tokens is not allowed; give one of them"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], problem: str) -> None:
    result = rarefy("bench", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert problem in result.stderr and result.stderr.count("\n") == 1


def test_without_kernels_there_is_nothing_to_calibrate(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_KERNELS", "reference")
    result = rarefy("bench", "--calibrate")
    assert result.exit_code == 2 and "no compiled kernels in use" in result.stderr
    assert "never pays" in rarefy("bench", "--show").stdout and not cache.exists()


def test_a_choice_that_turns_out_wrong_is_named() -> None:
    assert bench._verdict(1.05, True) == "slower than dense"
    assert bench._verdict(0.5, False) == "gain missed"
    assert bench._verdict(0.5, True) == bench._verdict(1.05, False) == bench._verdict(0.98, False) == ""


def test_layers_are_measured_with_the_memory_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: calls.append("kept"))
    assert rarefy("bench", "--show").exit_code == 0
    assert calls == ["kept"]
