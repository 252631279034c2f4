"""The source archive and the wheel: what they hold, and that the wheel works away from the source tree."""

from __future__ import annotations

import importlib.util
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = {"transformers", "plot", "digits", "hdf5", "tensorboard", "dev", "docs"}
NO_COMPILER = {"CC": "/missing/cc", "CXX": "/missing/c++"}
PARAMS = """
trainer:
  init:
    model: {name: gpt2, vocab_size: 256, hidden_size: 16, num_hidden_layers: 1, num_heads: 2, filter_size: 32}
    optimizer: {SGD: {lr: 0.1}}
    loop: {max_steps: 2}
    sparsity: 0.9
  fit:
    train_dataloader: {data_processor: TextCorpusDataProcessor, source: text.txt, sequence_length: 8, batch_size: 2}
"""

pytestmark = pytest.mark.slow


def call(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    answer = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_without_kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    call(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, **NO_COMPILER)
    return next(folder.glob("*.whl"))


def installed(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment with the wheel, which borrows every dependency from this one."""
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    borrowed = [path for path in sys.path if "site-packages" in path] or site.getsitepackages()
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index", "--ignore-installed", "--quiet")
    call(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    return python


def test_the_source_archive_holds_what_a_build_needs(archives):
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CMakeLists.txt", "pyproject.toml", "src/rarefy/py.typed"} <= names
    assert {str(file.relative_to(ROOT)) for file in ROOT.glob("csrc/kernels/*")} <= names
    assert not any(name.endswith(".so") or name.startswith((".ci", ".github", ".venv")) for name in names)


def test_the_wheel_holds_the_package_and_its_facts(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = wheel.namelist()
        about = next(name for name in names if name.endswith(".dist-info/METADATA"))
        facts = Parser().parsestr(wheel.read(about).decode())
    assert facts["Version"] in archives[0].name
    assert set(facts.get_all("Provides-Extra", [])) >= EXTRAS
    assert "rarefy/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert sum("kernels/_C" in name for name in names) == (shutil.which("c++") is not None)
    assert all(name.startswith(("rarefy/", "rarefy-")) and "libgomp" not in name for name in names)


@pytest.mark.skipif(importlib.util.find_spec("twine") is None, reason="needs twine")
def test_a_package_index_would_show_the_page(archives):
    call(sys.executable, "-m", "twine", "check", "--strict", *archives)


def test_the_wheel_runs_away_from_the_source_tree(archives, tmp_path):
    python = installed(archives[1], tmp_path / "venv")
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "text.txt").write_text("sparse " * 100)
    home = call(python, "-c", "import rarefy; print(rarefy.__file__)", cwd=tmp_path).stdout
    assert home.startswith(str(tmp_path))
    call(python.with_name("rarefy"), "run", "params.yaml", cwd=tmp_path)
    assert (tmp_path / "model_dir" / "checkpoint_2" / "MANIFEST.json").exists()


def test_without_a_compiler_it_works_and_warns_once(wheel_without_kernels, tmp_path):
    python = installed(wheel_without_kernels, tmp_path / "venv")
    code = (
        "import torch; from rarefy import masks; scores = torch.tensor([4.0, 3, 2, 1]); "
        "[print(masks.keep_top(scores, 2)) for _ in range(2)]"
    )
    answer = call(python, "-c", code, cwd=tmp_path)
    assert answer.stdout.count("tensor([ True,  True, False, False])") == 2
    assert answer.stderr.count("RuntimeWarning: rarefy runs without its compiled kernels") == 1
