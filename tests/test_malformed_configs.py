"""Hundreds of malformed configurations: each is one short line and exit code 2, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import Result

from example_files import EXAMPLES, NAMES, load_example, shrink, write_data
from malformed import Mistake, broken_texts, chosen, mistakes
from tiny_run import rarefy

PER_EXAMPLE = 30
LONGEST = 700


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("malformed")
    write_data(made)
    for code in EXAMPLES.glob("*.py"):
        (made / code.name).write_text(code.read_text())
    return made


def check(result: Result, folder: Path, name: str) -> str:
    """The single error line of a refused configuration."""
    assert result.exit_code == 2, f"{name}: {result.output}"
    assert "Traceback" not in result.output, name
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]
    assert len(errors) == 1, f"{name}: {result.stderr}"
    assert errors[0].startswith("Error: "), name
    assert len(errors[0]) < LONGEST, name
    assert result.stdout == "", name
    assert not (folder / "out").exists(), name
    return errors[0]


def block_of(mistake: Mistake) -> str:
    """What the message must at least contain: the path as far as `trainer.init.sparsity`, say."""
    dotted = ""
    for key in mistake.path:
        dotted += f"[{key}]" if isinstance(key, int) else f".{key}"
    keep = 5 if "[" in dotted.split(".")[1] else 3
    parts = dotted.lstrip(".").split(".")
    is_key_gone = mistake.kind in ("misspelt key", "missing key") and len(parts) <= keep
    return ".".join(parts[: min(keep, len(parts) - 1) if is_key_gone else keep])


@pytest.mark.parametrize("example", NAMES)
def test_mistakes(example: str, folder: Path) -> None:
    found = chosen(list(mistakes(shrink(load_example(example), folder))), PER_EXAMPLE)
    assert len(found) == PER_EXAMPLE
    for mistake in found:
        path = folder / "mistake.yaml"
        path.write_text(yaml.safe_dump(mistake.content, sort_keys=False))
        name = f"{example}: {mistake.name}"
        line = check(rarefy("run", path), folder, name)
        assert block_of(mistake).split("[")[0] in line or "the key" in line, f"{name}: {line}"


def test_files_that_are_no_configuration(folder: Path) -> None:
    text = (EXAMPLES / "gpt_stdlib_rigl.yaml").read_text()
    text = text.replace("./model_dir", str(folder / "out")).replace("python_stdlib", str(folder / "*.txt"))
    count = 0
    for name, raw in broken_texts(text):
        path = folder / "broken.yaml"
        path.write_bytes(raw)
        line = check(rarefy("run", path), folder, name)
        assert "broken.yaml" in line or "Error: trainer." in line, f"{name}: {line}"
        count += 1
    assert count >= 60


def test_there_are_at_least_three_hundred() -> None:
    assert len(NAMES) * PER_EXAMPLE >= 300
