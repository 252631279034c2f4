"""The file of measured cost rules: what is read, what is refused, and that the rule follows it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

from full_disks import full_disk
from rarefy.cost import calibration
from rarefy.cost.calibration import BreakEven
from rarefy.cost.rule import pays_off, rule
from rarefy.errors import RarefyError
from rarefy.kernels import instruction_set

RULE = BreakEven(limit=0.03, tokens_offset=1, overhead=5)
needs_kernels = pytest.mark.skipif(instruction_set() == "reference", reason="needs the compiled kernels")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "new"))
    return tmp_path / "new"


@needs_kernels
def test_the_rule_is_what_was_saved_for_this_process(cache: Path) -> None:
    assert pays_off(2048, 2048, 2048, 0.1)
    assert calibration.save({calibration.key_of(torch.float32): RULE}) == cache / "cost.json"
    assert rule(torch.float32) == RULE
    assert not pays_off(2048, 2048, 2048, 0.1)
    assert rule(torch.bfloat16) != RULE
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert rule(torch.float32) != RULE
    assert calibration.remove() and not calibration.remove()


@needs_kernels
@pytest.mark.parametrize("field", ["instruction_set", "processor", "torch"])
def test_a_rule_of_another_machine_is_not_used(field: str) -> None:
    other = dataclasses.replace(calibration.key_of(torch.float32), **{field: "another"})
    calibration.save({other: RULE})
    assert rule(torch.float32) != RULE


@needs_kernels
def test_the_package_is_more_cautious_with_more_threads() -> None:
    torch.set_num_threads(1)
    single = rule(torch.float32)
    torch.set_num_threads(2)
    double = rule(torch.float32)
    assert single is not None and double is not None and double.overhead == 2 * single.overhead


def test_saving_adds_and_replaces() -> None:
    first, second = (calibration.key_of(dtype) for dtype in (torch.float32, torch.bfloat16))
    calibration.save({first: RULE})
    calibration.save({second: RULE})
    newer = dataclasses.replace(RULE, limit=0.5)
    calibration.save({first: newer})
    assert calibration.measured() == {first: newer, second: RULE}
    assert [one.name for one in calibration.path().parent.iterdir()] == ["cost.json"]


ENTRY = {"key": dataclasses.asdict(calibration.key_of(torch.float32)), "rule": dataclasses.asdict(RULE)}
NO_RULE = {**ENTRY, "rule": {**ENTRY["rule"], "limit": -1}}
NO_NUMBER = {**ENTRY, "rule": {**ENTRY["rule"], "limit": "fast"}}
UNKNOWN_FIELD = {**ENTRY, "key": {**ENTRY["key"], "planet": "Mars"}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "7",
        '{"schema": 2, "entries": []}',
        '{"schema": 1, "entries": 3}',
        *(json.dumps({"schema": 1, "entries": [one]}) for one in (NO_RULE, NO_NUMBER, UNKNOWN_FIELD, {})),
        json.dumps({"schema": 1, "entries": [ENTRY]}).replace("0.03", "NaN"),
    ],
)
def test_a_damaged_file_is_one_warning_and_the_table_of_the_package(cache: Path, text: str) -> None:
    usual = rule(torch.float32)
    cache.mkdir()
    (cache / "cost.json").write_text(text)
    with pytest.warns(
        RuntimeWarning, match=r"cost.json: not used, .* `rarefy bench --calibrate` replaces it"
    ):
        assert calibration.measured() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rule(torch.float32) == usual


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAREFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert calibration.path() == Path("/shared/rarefy/cost.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert calibration.path() == Path("/home/someone/.cache/rarefy/cost.json")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "file"))
    with pytest.raises(RarefyError, match=r"cannot be written .*; set RAREFY_CACHE to another folder"):
        calibration.save({})
    with pytest.raises(RarefyError, match=r"cannot be removed .*; remove it by hand"):
        calibration.remove()


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one_alone(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    file.write_text("old")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        calibration.replace_file(file, "x" * 100_000)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("cost.json", "old")]
