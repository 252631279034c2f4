"""A run small enough for tests: a model and data in a Python file, and a configuration beside it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import typer.testing
import yaml
from typer.testing import CliRunner, Result

from rarefy.cli.app import app

# Or all commands would be made anew for each call.
typer.testing._get_command = functools.cache(typer.testing._get_command)

CODE = """
import os

import torch


class Tiny(torch.nn.Module):
    def __init__(self, width=16, fault=None, signal=None):
        super().__init__()
        self.fault, self.signal, self.calls = fault, signal, 0
        self.body = torch.nn.Linear(8, width)
        self.middle = torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, 1)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, batch):
        if self.fault:
            raise ValueError(self.fault)
        self.calls += 1
        if self.signal and self.calls == 3:
            os.kill(os.getpid(), self.signal)
        hidden = self.dropout(torch.relu(self.middle(torch.relu(self.body(batch["x"])))))
        return (self.head(hidden) - batch["y"]).square().mean()


class Batches:
    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            x = torch.randn(4, 8, generator=generator)
            yield {"x": x, "y": x.sum(1, keepdim=True)}


def make_batches(count=5, seed=0):
    return Batches(count, seed)


def make_list(count=5, seed=0):
    return list(Batches(count, seed))
"""

SPARSITY: dict[str, Any] = {
    "static": 0.75,
    "gmp": {
        "algorithm": "gmp",
        "sparsity": {"type": "polynomial", "init": 0.0, "final": 0.9, "start": 2, "stop": 20},
        "update": {"freq": 3},
    },
    "set": {"algorithm": "set", "sparsity": 0.75, "update": {"freq": 3}},
    "rigl": {
        "algorithm": "rigl",
        "sparsity": 0.75,
        "update": {"freq": 3},
        "drop_fraction": {"type": "cosine", "init": 0.3, "half_period": 20},
    },
}


def configuration(folder: Path, sparsity: Any = None, **init: Any) -> dict[str, Any]:
    """A whole configuration as plain data; `init` replaces keys of `trainer.init`."""
    data = {"data_processor": "./tiny.py:make_batches"}
    return {
        "trainer": {
            "init": {
                "seed": 1,
                "device": "cpu",
                "model_dir": str(folder / "out"),
                "model": {"name": "./tiny.py:Tiny"},
                "optimizer": {"AdamW": {"lr": 0.01}},
                "sparsity": copy.deepcopy(SPARSITY["rigl"] if sparsity is None else sparsity),
                "loop": {"max_steps": 6},
                "loggers": [{"TensorBoardLogger": None}],
                **init,
            },
            "fit": {"train_dataloader": dict(data), "val_dataloader": {**data, "count": 2, "seed": 9}},
        }
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Writes a configuration and the Python file that it names; returns the path of the configuration."""
    (folder / "tiny.py").write_text(CODE)
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def rarefy(*arguments: object) -> Result:
    """Runs the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
