"""What an installation needs: few packages, extras for the rest, and one clear line where one of them is missing."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny_run
from rarefy.callbacks.loggers.tensorboard_logger import TensorBoardLogger
from rarefy.data.hdf5_writer import write_hdf5
from rarefy.errors import RarefyError
from rarefy.report.logged_metrics import read_events
from tiny_run import configuration, rarefy

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def listed(heading: str) -> list[str]:
    """The names in one of the lists of `pyproject.toml`."""
    found = re.search(rf"^{heading} = \[(.*?)\]$", PROJECT, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return [re.split(r"[>=<\[;]", entry)[0] for entry in re.findall(r'"([^"]+)"', found[1])]


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Makes a package look as if it was not installed."""
    real = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> ModuleSpec | None:
        return None if name == package else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    parts = [name for name in sys.modules if name.startswith(f"{package}.")]  # other tests imported them
    for name in (package, *parts):
        monkeypatch.setitem(sys.modules, name, None)


def test_the_base_needs_few_packages_and_each_has_a_lower_bound() -> None:
    needed = listed("dependencies")
    assert len(needed) < 10 and not {"tensorboard", "h5py"} & set(needed)
    block = PROJECT.partition("\ndependencies = [")[2].partition("]")[0]
    assert block.count(">=") == len(needed)
    assert {"tensorboard", "h5py"} <= set(listed("dev"))


def test_the_demo_installs_the_base_alone() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "\ndemo: $(BASE)\n" in makefile
    recipe = makefile.partition("\n$(BASE):")[2].partition("\n\n")[0]
    assert "-e ." in recipe and "[dev]" not in recipe


def test_who_made_it_and_where_it_is() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'\nversion = "{cited["version"]}"\n' in PROJECT and cited["license"] in PROJECT
    assert f'Source = "{cited["repository-code"]}"' in PROJECT
    assert f'authors = [{{ name = "{cited["authors"][0]["name"]}" }}]' in PROJECT


def test_a_run_does_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "tensorboard")
    params = tiny_run.write(tmp_path, configuration(tmp_path, loggers=[]))
    result = rarefy("run", params)
    assert result.exit_code == 0, result.output
    assert "TensorBoardLogger left out, its package is not installed" in result.stderr
    assert not (tmp_path / "out" / "events").exists() and (tmp_path / "out" / "metrics.csv").exists()


def test_tensorboard_that_is_asked_for_is_told_how_to_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "tensorboard")
    params = tiny_run.write(tmp_path, configuration(tmp_path, loggers=[{"TensorBoardLogger": {}}]))
    result = rarefy("run", params)
    assert result.exit_code == 2 and "pip install 'rarefy[tensorboard]'" in result.stderr
    with pytest.raises(RarefyError, match=r"pip install 'rarefy\[tensorboard\]'"):
        TensorBoardLogger.check()
    with pytest.raises(RarefyError, match=r"pip install 'rarefy\[tensorboard\]'"):
        read_events(tmp_path, lambda name: True)


def test_hdf5_files_that_are_asked_for_are_told_how_to_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "h5py")
    (tmp_path / "a.h5").write_bytes(b"")
    (tmp_path / "a.txt").write_text("text " * 100)
    with pytest.raises(RarefyError, match=r"pip install 'rarefy\[hdf5\]'"):
        write_hdf5([tmp_path / "a.txt"], tmp_path / "out", max_sequence_length=8)
    data = {"data_processor": "GptHDF5MapDataProcessor", "data_dir": str(tmp_path), "batch_size": 2}
    content = configuration(tmp_path)
    content["trainer"]["fit"] = {"train_dataloader": data}
    result = rarefy("run", tiny_run.write(tmp_path, content))
    assert result.exit_code == 2 and "pip install 'rarefy[hdf5]'" in result.stderr
