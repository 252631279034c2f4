"""Variables of the environment and `~` in the values of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_run
from rarefy.yaml_files.yaml_file import UnsetVariableError, YamlError, expand, load_text, parse_value

HERE = {"HOME": "/home/me", "RUNS": "/runs", "N": "5", "EMPTY": "", "WORDS": "[1, 2]", "USER": "me"}
# Deeper than Python follows.
HERE["NESTED"] = "[" * 2000


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNKNOWN", raising=False)
    for name, value in HERE.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("~/x", "/home/me/x"),
        ('"~"', "/home/me"),
        ("$HOME", "/home/me"),
        ("$HOME/x", "/home/me/x"),
        ("/data/$USER/a", "/data/me/a"),
        ("${RUNS}/a", "/runs/a"),
        ("${UNKNOWN:-/tmp}/a", "/tmp/a"),
        ("${UNKNOWN:-~/runs}", "/home/me/runs"),
        ("${N}", 5),
        ("${UNKNOWN:-1e-3}", 0.001),
        ("${UNKNOWN:-true}", True),
        ("${UNKNOWN:-null}", None),
        ("${UNKNOWN:-}", None),
        ("${EMPTY:-7}", 7),
        ("${N}${N}", "55"),
        ("${WORDS}", "[1, 2]"),
        ("'${UNKNOWN:-[a}'", "[a"),
        pytest.param("${NESTED}", HERE["NESTED"], id="nested"),
        ("step ${N} of $N", "step 5 of $N"),
        ("costs $5/h", "costs $5/h"),
        ("a~b", "a~b"),
        ("'*.weight'", "*.weight"),
    ],
)
@pytest.mark.usefixtures("environment")
def test_values(written: str, value: Any) -> None:
    assert load_text(f"a:\n  - b: {written}\n") == {"a": [{"b": value}]}
    assert parse_value(written) == value


@pytest.mark.usefixtures("environment")
def test_keys_stay_as_they_are() -> None:
    assert load_text("a: {'$HOME/b': 1, '${N}': 2}") == {"a": {"$HOME/b": 1, "${N}": 2}}


@pytest.mark.parametrize("written", ["${UNKNOWN}", "x${UNKNOWN}", "$UNKNOWN/x", "a/$UNKNOWN"])
@pytest.mark.usefixtures("environment")
def test_a_variable_that_is_not_set(written: str) -> None:
    with pytest.raises(YamlError) as caught:
        load_text(f"a:\n  b: {written}\n", "p.yaml")
    words = "names the variable UNKNOWN, which is not set; set it, or write ${UNKNOWN:-default}"
    assert str(caught.value) == f"p.yaml, line 2: {written} {words}"
    with pytest.raises(UnsetVariableError, match="UNKNOWN"):
        expand(written, str, {})


def test_a_run_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("STEPS", "3")
    monkeypatch.chdir(tmp_path)
    content = tiny_run.configuration(tmp_path, model_dir="~/run", loop={"max_steps": "${STEPS}"})
    content["trainer"]["init"]["checkpoint"] = {"checkpoint_root": "$HOME/saved"}
    result = tiny_run.rarefy("run", tiny_run.write(tmp_path, content))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "home" / "saved" / "checkpoint_3").is_dir()
    assert (tmp_path / "home" / "run" / "run.json").is_file()
    assert not (tmp_path / "~").exists()
    again = tmp_path / "home" / "saved" / "checkpoint_3"
    result = tiny_run.rarefy(
        "run", tmp_path / "params.yaml", "--set", "trainer.init.model_dir=~/second", "--max_steps", 4
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "home" / "second" / "run.json").is_file() and again.is_dir()
