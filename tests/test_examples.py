"""Every example runs, with small sizes, and every one is valid as it stands."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from example_files import EXAMPLES, NAMES, load_example, shrink, write_data
from rarefy.run.schema import parse
from tiny_run import rarefy

NEEDS = {"hugging_face.yaml": "transformers"}


def write_small(name: str, folder: Path) -> Path:
    """A small version of an example, beside the Python files that it may name."""
    needed = NEEDS.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    write_data(folder)
    for code in EXAMPLES.glob("*.py"):
        (folder / code.name).write_text(code.read_text())
    path = folder / name
    path.write_text(yaml.safe_dump(shrink(load_example(name), folder)))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_valid(name: str) -> None:
    assert parse(load_example(name))


@pytest.mark.parametrize("name", NAMES)
def test_validate_only(name: str, tmp_path: Path) -> None:
    result = rarefy("run", write_small(name, tmp_path), "--validate_only")
    assert result.exit_code == 0, result.output
    assert "is valid; nothing was written" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str, tmp_path: Path) -> None:
    result = rarefy("run", write_small(name, tmp_path))
    assert result.exit_code == 0, result.output
    for folder in (tmp_path / "out").iterdir():
        assert list(folder.glob("checkpoint_*"))


def test_the_model_zoo_file_trains_with_sizes_lowered_by_set(tmp_path: Path) -> None:
    write_data(tmp_path)
    sizes = {"num_hidden_layers": 1, "hidden_size": 24, "filter_size": 32, "max_position_embeddings": 16}
    lowered = {f"init.model.{key}": value for key, value in {**sizes, "vocab_size": 64}.items()}
    for data, split in (("train_dataloader", "train"), ("val_dataloader", "val")):
        lowered |= {f"fit.{data}.batch_size": 2, f"fit.{data}.data_dir": str(tmp_path / split)}
    flags: list[Any] = [
        word for key, value in lowered.items() for word in ("--set", f"trainer.{key}={value}")
    ]
    file = EXAMPLES / "gpt3_model_zoo.yaml"
    result = rarefy("run", file, *flags, "--num_steps", 3, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "checkpoint_3").is_dir()
    assert "trainer.init.backend.cluster_config" in result.stderr


def test_plain_pytorch_loop(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "plain_pytorch_loop.py"))
    assert 0.5 < names["main"](steps=60) <= 1.0
    assert "rigl" in capsys.readouterr().out


def test_custom_algorithm_is_short() -> None:
    code = (EXAMPLES / "custom_algorithm.py").read_text().splitlines()
    assert len([line for line in code if line.strip()]) <= 15
