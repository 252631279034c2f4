"""Callbacks and loggers in a real run that is stopped and continued."""

import csv
import io
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from rarefy.callbacks import ComputeNorm, CSVLogger, LogSparsity, ProgressLogger, TensorBoardLogger
from rarefy.trainer.trainer import Trainer

SPARSITY = {"algorithm": "rigl", "sparsity": 0.8, "update": {"freq": 2}, "seed": 0}


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.layers(batch) - batch).square().mean()


def run(folder: Path, steps: int, log_every: int = 1) -> str:
    output = io.StringIO()
    trainer = Trainer(
        model_dir=folder,
        model=Squared,
        device="cpu",
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        sparsity=SPARSITY,
        loop={"max_steps": steps, "eval_frequency": 4},
        checkpoint={"steps": 3},
        logging={"log_steps": log_every},
        callbacks=[ComputeNorm(), LogSparsity()],
        loggers=[ProgressLogger(Console(file=output)), TensorBoardLogger(), CSVLogger()],
        seed=1,
    )
    batches = list(torch.randn(20, 4, 8, generator=torch.Generator().manual_seed(0)))
    trainer.fit(batches, batches[:2])
    return output.getvalue()


def rows(folder: Path) -> list[dict[str, str]]:
    """What was logged, without what depends on the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: cell for name, cell in row.items() if not name.endswith("_per_second")}
            for row in csv.DictReader(file)
        ]


def test_a_continued_run_logs_the_same_as_an_uninterrupted_one(tmp_path):
    run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 5)
    run(tmp_path / "parts", 8)
    whole = rows(tmp_path / "whole")
    assert [row["step"] for row in whole] == list("12345678")
    logged = [{name: cell for name, cell in row.items() if "eval" not in name} for row in whole]
    again = [{name: row[name] for name in logged[0]} for row in rows(tmp_path / "parts")]
    assert again == logged


def test_every_kind_of_metric_is_there(tmp_path):
    output = run(tmp_path, 4)
    last = rows(tmp_path)[-1]
    for name in ("loss", "lr", "model_wise_grad_norm", "sparsity/model/actual", "sparsity/model/explored"):
        assert float(last[name]) >= 0
    assert last["sparsity/layers.*/target"] == "0.8"
    assert float(last["sparsity/layers.0.weight/grown"]) > 0
    assert "eval/loss" in last
    assert "step 4/4 · loss" in output and "next update 4" in output and "step 4 validation" in output
    assert list((tmp_path / "events").iterdir())
