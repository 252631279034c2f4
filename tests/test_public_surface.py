"""The public names, frozen; and what importing them costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import rarefy
from rarefy.training import callbacks

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
    "configure",
    "finalize",
    "masks",
    "patterns",
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


def test_import_brings_in_no_extra():
    extras = [
        "transformers",
        "lightning",
        "pytorch_lightning",
        "accelerate",
        "matplotlib",
        "sklearn",
        "tokenizers",
        "tensorboard",
        "typer",
    ]
    code = f"import sys, rarefy; print(sorted(set({extras}) & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_torch_classes_are_left_alone():
    code = (
        "import torch\n"
        "classes = (torch.Tensor, torch.nn.Parameter, torch.nn.Module, torch.optim.Optimizer)\n"
        "before = {c: set(vars(c)) for c in classes}\n"
        "import rarefy, rarefy.training.trainer\n"
        "print(all(set(vars(c)) == names for c, names in before.items()))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "True"
