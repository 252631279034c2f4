"""`torchrun … rarefy run`: the processes share every epoch, resume where they were, and validate on everything."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny_run
from forks import Script
from rarefy.errors import RarefyError
from rarefy.run.builder import Builder
from rarefy.run.schema import parse

CODE = """
import json, os

import torch
from rarefy.callbacks import Callback


class Seen(Callback):
    def on_fit_start(self, trainer):
        self.first, self.rows, self.losses = trainer.global_step, [], {}

    def on_train_batch_start(self, trainer, batch, micro_step):
        self.rows += [row.tolist() for row in batch["input_ids"]]

    def on_validate_end(self, trainer, metrics):
        self.losses[trainer.global_step] = metrics["eval/loss"]

    def on_fit_end(self, trainer):
        name = f"seen_{os.environ.get('RANK', 'alone')}_{self.first}.json"
        weights = [weight.flatten()[0].item() for weight in trainer.model.parameters()]
        found = {"rows": self.rows, "losses": self.losses, "steps": trainer.global_step, "weights": weights}
        with open(name, "w") as file:
            file.write(json.dumps(found))


def weighted():
    data = torch.utils.data.TensorDataset(torch.arange(8))
    return torch.utils.data.DataLoader(data, sampler=torch.utils.data.WeightedRandomSampler([1.0] * 8, 8))
"""
CORPUS = {
    "data_processor": "TextCorpusDataProcessor",
    "source": "texts/*.txt",
    "sequence_length": 8,
    "batch_size": 2,
}


def configuration(folder: Path, **loop: Any) -> Path:
    (folder / "watch.py").write_text(CODE)
    (folder / "texts").mkdir(exist_ok=True)
    for name in "ab":
        (folder / "texts" / f"{name}.txt").write_bytes(bytes(range(129)))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "filter_size": 16}
    init = {
        "seed": 1,
        "device": "cpu",
        "model": {
            "name": "gpt2",
            "vocab_size": 256,
            "max_position_embeddings": 8,
            "dropout_rate": 0.0,
            "attention_dropout_rate": 0.0,
            **small,
        },
        "optimizer": {"AdamW": {"lr": 0.01}},
        "sparsity": {"algorithm": "rigl", "sparsity": 0.5, "update": {"freq": 2}},
        "loop": {"eval_frequency": 0.5, **loop},
        "callbacks": [{"./watch.py:Seen": {}}],
    }
    validation = {**CORPUS, "split": "validation", "drop_last": False}
    fit = {"train_dataloader": CORPUS, "val_dataloader": validation}
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"init": init, "fit": fit}}))
    return path


COMMAND = "from rarefy.cli import main; main()"


def together(folder: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one.getsockname()[1]), "WORLD_SIZE": "2"}
    runs = [
        Script(
            COMMAND, "run", "params.yaml", folder=folder, home=folder, environment={**address, "RANK": rank}
        )
        for rank in "01"
    ]
    ended = [one.end() for one in runs]
    assert all(code == 0 for code, *_ in ended), ended


def seen(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"seen_{name}.json").read_text())


def test_processes_share_what_one_would_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for folder in (alone, shared):
        folder.mkdir()
    configuration(shared, num_epochs=2, max_steps=5)
    together(shared)
    configuration(shared, num_epochs=2, max_steps=11)
    together(shared)
    monkeypatch.chdir(alone)
    result = tiny_run.rarefy("run", configuration(alone, num_epochs=2))
    assert result.exit_code == 0, result.output

    whole = seen(alone, "alone_0")
    assert (whole["steps"], len(whole["rows"])) == (16, 32)
    ranks = [[seen(shared, f"{rank}_{first}") for first in (0, 5)] for rank in range(2)]
    assert [one["steps"] for one in ranks[0]] == [one["steps"] for one in ranks[1]] == [5, 11]
    # Each takes every other sample of a batch, and all together are the run of one process.
    assert dealt([one[0] for one in ranks]) == whole["rows"][:10]
    assert dealt([one[1] for one in ranks]) == whole["rows"][10:22]
    assert ranks[0][0]["weights"] == ranks[1][0]["weights"]
    assert ranks[0][1]["losses"] == ranks[1][1]["losses"]

    # One process goes on where two have stopped.
    monkeypatch.chdir(shared)
    result = tiny_run.rarefy("run", configuration(shared, num_epochs=2, max_steps=16))
    assert result.exit_code == 0, result.output
    last = seen(shared, "alone_11")
    assert last["rows"] == whole["rows"][22:]
    # Biases of keys have no gradient but rounding, which Adam makes steps of.
    assert last["weights"] == pytest.approx(whole["weights"], rel=1e-4, abs=1e-3)


def dealt(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The rows of two processes in the order of one."""
    return [row for pair in zip(*(one["rows"] for one in ranks), strict=True) for row in pair]


def test_a_loader_that_cannot_be_shared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(configuration(tmp_path, num_steps=1).read_text())
    content["trainer"]["fit"]["train_dataloader"] = {"data_processor": "./watch.py:weighted"}
    [config] = parse(content)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RarefyError, match=r"^trainer\.fit\.train_dataloader: several processes cannot share a Data"
    ):
        _ = Builder(config, tmp_path).train_data
    monkeypatch.delenv("RANK")
    assert len(list(Builder(config, tmp_path).train_data)) == 8


def test_rank_alone_and_size_alone_are_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.distributed import place

    monkeypatch.setenv("WORLD_SIZE", "4")
    assert place() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    assert place() == (2, 4)
    assert not torch.distributed.is_initialized()
