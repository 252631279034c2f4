"""Stopped at any step and started again, a run ends bit for bit where it would have ended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rarefy.callbacks.events import Callback, Logger
from rarefy.trainer.trainer import Trainer

STEPS = 14
COSINE = {"type": "cosine", "init": 0.5, "half_period": STEPS}
CYCLE = [0.5, 0.7, 0.6]
SPARSITY = {
    "dense": None,
    "static": 0.75,
    "gmp": {
        "algorithm": "gmp",
        "sparsity": {"type": "exp", "init": 0.2, "gamma": -0.1},
        "update": {"freq": 3},
    },
    "set": {"algorithm": "set", "sparsity": 0.75, "update": {"freq": 3, "start": 2}, "drop_fraction": COSINE},
    "rigl": {"algorithm": "rigl", "sparsity": CYCLE, "update": {"freq": 3}, "drop_fraction": COSINE},
    "group": [
        {"algorithm": "rigl", "sparsity": 0.5, "param_filter": "first.*", "update": {"steps": [4, 5, 9]}},
        {"algorithm": "set", "sparsity": CYCLE, "param_filter": "second.*", "update": {"freq": 2}},
    ],
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.drop = nn.Dropout(0.3)

    def forward(self, batch: tuple) -> torch.Tensor:
        x, y = batch
        hidden = self.drop(self.norm(self.first(x)).relu())
        return nn.functional.cross_entropy(self.second(hidden), y)


class Losses(Logger):
    """Every loss by step, and a state of its own in the checkpoint."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.best = float("inf")

    def log(self, trainer: Any, metrics: dict[str, float], step: int) -> None:
        for name in ("loss", "eval/loss"):
            if name in metrics:
                self.losses[2 * step + (name == "eval/loss")] = metrics[name]
                self.best = min(self.best, metrics[name])

    def on_save_checkpoint(self, trainer: Any, state: dict) -> None:
        state["losses"] = {"best": self.best}

    def on_load_checkpoint(self, trainer: Any, state: dict) -> None:
        self.best = state["losses"]["best"]


class StopsAt(Callback):
    """Ends the process's part of the run, as a kill right after this step would."""

    class Stop(Exception):  # noqa: N818
        pass

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, batch: object, micro_step: int) -> None:
        if trainer.global_step == self.step:
            raise self.Stop


def data(workers: int = 0, shuffle: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(22, 12, generator=generator), torch.randint(0, 4, (22,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle, num_workers=workers)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


def run(folder: Path, until: int | None = None, workers: int = 0, **options) -> tuple[Trainer, Losses]:
    """A run from the newest checkpoint in `folder` to its end, or to a sudden death in step `until`."""
    losses = Losses()
    defaults = {
        "optimizer": adamw,
        "schedulers": cosine,
        "sparsity": SPARSITY["rigl"],
        "loop": {"num_steps": STEPS, "grad_accum_steps": 4, "eval_frequency": 5},
        "checkpoint": {"steps": 1},
        "logging": {"log_steps": 1},
        "seed": 11,
    }
    callbacks = [] if until is None else [StopsAt(until)]
    trainer = Trainer(
        model_dir=folder,
        model=Net,
        device="cpu",
        loggers=[losses],
        callbacks=callbacks,
        **{**defaults, **options},
    )
    try:
        trainer.fit(data(workers), data(shuffle=False))
    except StopsAt.Stop:
        trainer.writer.wait()
    return trainer, losses


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = dict(trainer.model.state_dict())
    for index, state in enumerate(trainer.trained_by.state.values()):
        found |= {f"{index}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    found["rng"] = torch.get_rng_state()
    return found


def straight(folder: Path, **options) -> tuple[dict[str, torch.Tensor], Losses]:
    """What a run without a death ends with."""
    trainer, losses = run(folder, **options)
    return everything(trainer), losses


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Losses]:
    return straight(tmp_path_factory.mktemp("whole"))


def compare(tmp_path: Path, *stops: int, resume_with: Callable = run, whole: Any = None, **options) -> None:
    """Runs once straight through, unless that is given, and once with a death in each of these steps."""
    expected, whole_losses = whole or straight(tmp_path / "whole", **options)
    losses = {}
    for stop in (*stops, None):
        trainer, part = resume_with(tmp_path / "parts", until=stop, **options)
        losses |= part.losses
    assert [name for name, one in expected.items() if not torch.equal(one, everything(trainer)[name])] == []
    assert losses == whole_losses.losses
    assert part.best == whole_losses.best
    assert trainer.global_step == STEPS


@pytest.mark.parametrize("kind", SPARSITY)
def test_every_algorithm(tmp_path: Path, kind: str) -> None:
    compare(tmp_path, 1, 6, 7, 11, sparsity=SPARSITY[kind])


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_every_step(tmp_path: Path, stop: int, whole: tuple[dict[str, torch.Tensor], Losses]) -> None:
    """Among them: right before and after updates, validations, epochs, and in an epoch."""
    compare(tmp_path, stop, whole=whole)


@pytest.mark.parametrize("make", [momentum, adamw])
def test_optimizers(tmp_path: Path, make: Callable) -> None:
    compare(tmp_path, 4, 5, optimizer=make)


def test_dynamic_loss_scale(tmp_path: Path) -> None:
    precision = {
        "fp16_type": "float16",
        "loss_scaling_factor": "dynamic",
        "initial_loss_scale": 2.0**20,
        "steps_per_increase": 3,
        "max_gradient_norm": 0.5,
    }
    compare(tmp_path, 2, 9, precision=precision)


def test_epochs(tmp_path: Path) -> None:
    compare(tmp_path, 3, 8, loop={"num_epochs": 7, "grad_accum_steps": 3, "eval_frequency": 0.3})


def test_old_checkpoints_only(tmp_path: Path) -> None:
    """Steps after the last checkpoint are taken again, the same way."""
    compare(tmp_path, 3, 8, 13, checkpoint={"steps": 4})


def test_a_different_number_of_data_workers(tmp_path: Path) -> None:
    def resume(folder: Path, until: int | None, **options) -> tuple[Trainer, Losses]:
        return run(folder, until, workers=0 if until else 2, **options)

    compare(tmp_path, 7, resume_with=resume)


def test_an_interrupted_fit_counts_num_steps_from_its_beginning(tmp_path: Path) -> None:
    run(tmp_path, until=5)
    trainer, _ = run(tmp_path)
    assert (trainer.progress.start, trainer.global_step) == (0, STEPS)
    trainer, _ = run(tmp_path)
    assert (trainer.progress.start, trainer.global_step) == (STEPS, 2 * STEPS)


def test_a_path_begins_a_new_fit(tmp_path: Path) -> None:
    run(tmp_path, until=5)
    trainer = Trainer(
        model_dir=tmp_path / "other",
        model=Net,
        device="cpu",
        optimizer=adamw,
        loggers=[],
        sparsity=SPARSITY["rigl"],
        schedulers=cosine,
        loop={"num_steps": 3},
    )
    trainer.fit(data(), ckpt_path=tmp_path / "checkpoint_4")
    assert (trainer.progress.start, trainer.global_step) == (4, 7)


def test_optimizer_states_keep_their_dtype(tmp_path: Path) -> None:
    class Wide(torch.optim.SGD):
        """Keeps a float32 sum for bfloat16 weights."""

        def step(self, closure=None):  # type: ignore[override, no-untyped-def]
            for parameter in self.param_groups[0]["params"]:
                total = self.state[parameter].setdefault(
                    "total", torch.zeros_like(parameter, dtype=torch.float32)
                )
                total.add_(parameter.grad, alpha=1 / 3)

    def make() -> Trainer:
        return Trainer(
            model_dir=tmp_path,
            model=lambda: Small().bfloat16(),
            device="cpu",
            loggers=[],
            loop={"max_steps": 2},
            optimizer=lambda model: Wide(model.parameters(), lr=1.0),
        )

    class Small(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return super().forward(batch).mean()

    first, second = make(), make()
    first.fit([torch.ones(2, 3, dtype=torch.bfloat16)])
    second.fit([torch.ones(2, 3, dtype=torch.bfloat16)])
    [one, *_], [two, *_] = first.trained_by.state.values(), second.trained_by.state.values()
    assert two["total"].dtype == torch.float32 and torch.equal(one["total"], two["total"])
