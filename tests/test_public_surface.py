"""The public names, frozen; and what importing them costs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rarefy
from rarefy import callbacks

PUBLIC = {
    "GMP",
    "SET",
    "DynamicSparsityAlgorithm",
    "Group",
    "RigL",
    "SparsityAlgorithm",
    "Static",
    "Trainer",
    "callbacks",
    "compact",
    "configure",
    "finalize",
    "masks",
    "patterns",
    "prune",
    "schedules",
    "summary",
}


@pytest.mark.parametrize("name", ["callbacks", "masks", "patterns", "schedules"])
def test_the_public_modules_can_be_imported_from(name):
    assert importlib.import_module(f"rarefy.{name}") is getattr(rarefy, name)


def test_callbacks_are_those_of_the_trainer():
    assert rarefy.callbacks.__all__ == sorted(callbacks.__all__)


def test_public_names():
    assert set(rarefy.__all__) == PUBLIC
    assert all(hasattr(rarefy, name) for name in PUBLIC)


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def imported_by(statement: str, candidates: set[str]) -> str:
    return python(f"import sys\n{statement}\nprint(sorted({candidates} & set(sys.modules)))")


def test_import_alone_brings_in_nothing_heavy():
    assert imported_by("import rarefy", {"torch", "numpy", "pydantic", "yaml", "rich"}) == "[]"


@pytest.fixture(scope="module")
def whole() -> dict[str, list[str]]:
    """What a fresh interpreter with torch has after all names were imported, and which classes of torch it changed."""
    code = (
        "import json, sys, torch\n"
        "classes = (torch.Tensor, torch.nn.Parameter, torch.nn.Module, torch.optim.Optimizer)\n"
        "before = {c: set(vars(c)) for c in classes}\n"
        "from rarefy import *\n"
        "modules = sorted(sys.modules)\n"
        "import rarefy.trainer.trainer\n"
        "changed = [c.__name__ for c, names in before.items() if set(vars(c)) != names]\n"
        "print(json.dumps({'modules': modules, 'changed': changed}))"
    )
    return json.loads(python(code))


def test_every_name_together_brings_in_no_extra(whole):
    extras = {
        "transformers",
        "lightning",
        "pytorch_lightning",
        "accelerate",
        "matplotlib",
        "sklearn",
        "tokenizers",
        "tensorboard",
        "typer",
        "h5py",
        "onnx",
        "torch._dynamo",
    }
    assert not extras.intersection(whole["modules"])


def test_names_are_listed_before_their_import():
    assert python("import rarefy; print('Trainer' in dir(rarefy), 'Trainer' in vars(rarefy))") == "True False"


def test_modules_are_attributes_without_an_import_of_their_own():
    assert python("import rarefy; print(rarefy.errors.RarefyError.__name__)") == "RarefyError"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'rarefy' has no attribute 'Trainor'"):
        _ = rarefy.Trainor


def test_a_missing_dependency_is_not_taken_for_an_unknown_name():
    code = (
        "import sys; sys.modules['torch'] = None; import rarefy\n"
        "try: rarefy.masks\n"
        "except ModuleNotFoundError as error: print(error.name)"
    )
    assert python(code) == "torch"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of loaded libraries")
def test_the_kernels_share_the_openmp_library_of_torch():
    code = (
        "import rarefy.kernels, torch; rarefy.kernels.available()\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(*{line.split()[-1] for line in lines if 'libgomp' in line}, sep='\\n')"
    )
    assert len(python(code).splitlines()) == 1


def test_torch_classes_are_left_alone(whole):
    assert whole["changed"] == []
