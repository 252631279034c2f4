"""Validation, which leaves no trace in training."""

import multiprocessing
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from rarefy.callbacks.events import Callback, Logger
from rarefy.errors import RarefyError
from rarefy.trainer.evaluation import MeanLoss, evaluate, open_validations, untouched
from rarefy.trainer.trainer import Trainer


class Mean(nn.Module):
    """Loss = mean of the batch plus noise in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.5)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        random.random()
        torch.rand(3)
        return self.drop(batch * self.weight).mean()


class Counting(Mean):
    """Reports metrics of its own."""

    def eval_metrics(self) -> "Counting.Count":
        return Counting.Count()

    class Count:
        def __init__(self) -> None:
            self.seen = 0

        def update(self, outputs: torch.Tensor, batch: torch.Tensor) -> None:
            assert not outputs.requires_grad
            self.seen += len(batch)

        def compute(self) -> dict[str, float]:
            return {"eval/samples": float(self.seen)}


def trainer(folder: Path, model: type[nn.Module] = Mean, **options) -> Trainer:
    return Trainer(model_dir=folder, model=model, device="cpu", **{"loggers": [], **options})


def batches(*values: float) -> list[torch.Tensor]:
    return [torch.full((2,), float(value)) for value in values]


def test_mean_loss_and_metrics_of_the_model(tmp_path: Path) -> None:
    assert trainer(tmp_path).validate(batches(1, 3)) == {"eval/loss": 2.0}
    assert trainer(tmp_path, Counting).validate(batches(1, 3)) == {"eval/samples": 4.0}


def test_eval_steps_cuts_the_data_short(tmp_path: Path) -> None:
    assert trainer(tmp_path, loop={"eval_steps": 2}).validate(batches(1, 3, 100)) == {"eval/loss": 2.0}


def test_several_data_have_names_of_their_own(tmp_path: Path) -> None:
    one, two = (lambda: batches(1)), (lambda: batches(2))
    assert trainer(tmp_path).validate([one, two]) == {"eval/0/loss": 1.0, "eval/1/loss": 2.0}
    assert trainer(tmp_path).validate({"a": one, "b": batches(5)}) == {"eval/a/loss": 1.0, "eval/b/loss": 5.0}
    assert trainer(tmp_path).validate([one]) == {"eval/loss": 1.0}
    assert trainer(tmp_path).validate(one) == {"eval/loss": 1.0}


def test_a_list_of_batches_is_not_a_list_of_loaders() -> None:
    mapping = OrderedDict(x=torch.ones(1))
    assert list(open_validations([mapping])) == [""]
    assert open_validations([(1, 2), (3, 4)]) == {"": [(1, 2), (3, 4)]}
    assert open_validations(None) == {}


def test_nothing_of_training_changes(tmp_path: Path) -> None:
    model = nn.Sequential(Mean(), nn.BatchNorm1d(1))
    model.train()
    model[1].eval()
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(2).tolist(), random.random()
    torch.manual_seed(3)
    random.seed(3)
    with untouched(model):
        assert not any(module.training for module in model.modules())
        torch.rand(7), random.random()
    assert (torch.rand(2).tolist(), random.random()) == expected
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_modes_come_back_after_a_failure() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(KeyError), untouched(model):
        raise KeyError
    assert model.training


def test_events_and_log(tmp_path: Path) -> None:
    heard: list = []

    class Listener(Callback):
        def on_validate_start(self, trainer: Any) -> None:
            heard.append(("start", trainer.model.training))

        def on_validate_batch_end(self, trainer: Any, outputs: torch.Tensor, batch: torch.Tensor) -> None:
            heard.append(outputs.item())

        def on_validate_end(self, trainer: Any, metrics: dict) -> None:
            heard.append(metrics)

    class Writer(Logger):
        def log(self, trainer: Any, metrics: dict, step: int) -> None:
            heard.append((step, metrics))

    trainer(tmp_path, callbacks=[Listener()], loggers=[Writer()]).validate(batches(1, 3))
    assert heard == [("start", False), 1.0, 3.0, (0, {"eval/loss": 2.0}), {"eval/loss": 2.0}]


def test_data_without_a_batch_is_named(tmp_path: Path) -> None:
    with pytest.raises(RarefyError, match="the validation data has no batch"):
        trainer(tmp_path).validate(iter([]))
    with pytest.raises(RarefyError, match="fewer samples than one batch"):
        trainer(tmp_path).validate([])


def test_it_can_be_given_up(tmp_path: Path) -> None:
    asked = iter([False, True])
    assert evaluate(trainer(tmp_path).session, batches(1, 2, 3), stop=lambda: next(asked)) is None


def test_losses_are_averaged_in_double_precision() -> None:
    metrics = MeanLoss()
    for value in (1e8, 1.0, 1.0, 1.0):
        metrics.update(torch.tensor(value), None)
    assert metrics.compute() == {"eval/loss": (1e8 + 3) / 4}


def test_forward_runs_under_autocast(tmp_path: Path) -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.tensor(float(self.linear(batch).dtype == torch.bfloat16))

    assert trainer(tmp_path, Typed, precision={}).validate(batches(1)) == {"eval/loss": 1.0}
    assert trainer(tmp_path, Typed).validate(batches(1)) == {"eval/loss": 0.0}


def test_worker_processes_end_with_the_fit_and_with_the_validation(tmp_path: Path) -> None:
    rows: Any = [torch.ones(2)] * 4
    data = [DataLoader(rows, num_workers=1, persistent_workers=True) for _ in range(2)]
    before = set(multiprocessing.active_children())
    trainer = Trainer(
        model_dir=tmp_path,
        model=Weighted(),
        device="cpu",
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        loop={"num_steps": 2},
        loggers=[],
    )
    trainer.fit(data[0], data[1])
    assert set(multiprocessing.active_children()) <= before
    trainer.validate(data[1], None)
    assert set(multiprocessing.active_children()) <= before


class Weighted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (batch * self.weight).mean()


class Guess(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, batch: Any) -> torch.Tensor:
        return (self.fc(batch[0]) - batch[1]).square().mean()


def test_a_checkpoint_of_top_kast_is_validated_as_the_model_that_was_trained(tmp_path):
    """By its run, by one that only validates, and by a dense one that reads its weights."""
    torch.manual_seed(0)
    data = [(x, x[:, :4].sin()) for x in torch.randn(12, 8, 16)]

    def trainer(sparsity: Any, **checkpoint: Any) -> Trainer:
        return Trainer(
            model_dir=tmp_path,
            model=Guess,
            optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
            sparsity=sparsity,
            loop={"num_steps": 10, "eval_frequency": 10},
            checkpoint=checkpoint,
            seed=0,
        )

    block = {"algorithm": "top_kast", "sparsity": 0.4, "forward_sparsity": 0.8, "update": {"freq": 4}}
    run = trainer(block)
    run.fit(data, data)
    expected = run.last_metrics["eval/loss"]
    for other in (trainer(block), trainer(None, disable_strict_checkpoint_loading=True)):
        assert other.validate(data) == {"eval/loss": pytest.approx(expected, rel=1e-6)}
