"""Steps whose loss or gradients are not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.callbacks.events import Callback, Logger
from rarefy.checkpoint.directory import load
from rarefy.optim.lr_schedules import LinearLR
from rarefy.trainer.skipped_steps import NotFiniteError, first_not_finite
from rarefy.trainer.trainer import Trainer


class Net(nn.Module):
    """Two layers; a batch of nan, or of 1e30 in float16, makes everything break."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(batch).relu()).square().mean()


class Recorder(Logger):
    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def log(self, trainer: Any, metrics: dict[str, float], step: int) -> None:
        self.metrics[step] = metrics


RIGL = {
    "algorithm": "rigl",
    "sparsity": {"type": "linear", "init": 0.5, "slope": 0.005},
    "update": {"freq": 2},
}
GOOD, BAD = torch.ones(4, 8), torch.full((4, 8), torch.nan)


def make(folder: Path, **options) -> Trainer:
    schedule = LinearLR(initial_learning_rate=0.1, end_learning_rate=0.0, total_iters=20)
    defaults = {"loop": {"num_steps": 1}, "sparsity": RIGL, "seed": 1, "loggers": []}
    return Trainer(
        model_dir=folder,
        model=Net,
        device="cpu",
        optimizer=lambda model: torch.optim.AdamW(model.parameters()),
        schedulers=schedule,
        **{**defaults, **options},
    )


def snapshot(trainer: Trainer) -> list:
    optimizer = [state for one in trainer.trained_by.state.values() for state in one.values()]
    weights = [tensor.clone() for tensor in [*trainer.model.state_dict().values(), *optimizer]]
    assert trainer.sparsity is not None
    return [weights, trainer.sparsity.algorithms[0].step, trainer.schedulers[0].get_last_lr()]


def assert_same(first: list, second: list) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[1:] == second[1:]


@pytest.mark.parametrize(
    "precision", [None, {"fp16_type": "float16", "loss_scaling_factor": "dynamic", "initial_loss_scale": 8.0}]
)
def test_a_skipped_step_changes_nothing_but_counts(tmp_path: Path, precision: dict | None) -> None:
    recorder = Recorder()
    trainer = make(tmp_path, loop={"num_steps": 3}, precision=precision, loggers=[recorder])
    trainer.fit([GOOD])
    before = snapshot(trainer)
    trainer.fit([BAD], ckpt_path=None)
    assert_same(snapshot(trainer), before)
    assert trainer.global_step == 6 and before[1] == 3
    assert recorder.metrics[6]["skipped_steps"] == 3


def test_a_bad_micro_batch_spoils_its_step_only(tmp_path: Path) -> None:
    """The dense gradients of the skipped step do not reach the update that follows."""
    loop = {"num_steps": 3, "grad_accum_steps": 2}
    spoilt, clean = make(tmp_path / "a", loop=loop), make(tmp_path / "b", loop={**loop, "num_steps": 2})
    spoilt.fit([GOOD, GOOD, GOOD, BAD, GOOD, GOOD])
    clean.fit([GOOD, GOOD, GOOD, GOOD])
    assert_same(snapshot(spoilt), snapshot(clean))


def test_callbacks_hear_of_the_step_and_gradients_are_gone_afterwards(tmp_path: Path) -> None:
    heard = []

    class Watch(Callback):
        def on_after_optimizer_step(self, trainer: Any) -> None:
            heard.append(trainer.model.first.bias.grad is not None)  # type: ignore[union-attr]

        def on_train_batch_end(self, trainer: Any, metrics: dict) -> None:
            heard.append(trainer.model.first.bias.grad is None)  # type: ignore[union-attr]

    make(tmp_path, callbacks=[Watch()]).fit([BAD])
    assert heard == [True, True]


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = make(tmp_path, loop={"num_steps": 50, "max_skipped_steps": 3})
    with pytest.raises(NotFiniteError) as error:
        trainer.fit([GOOD, BAD, BAD, GOOD, BAD, BAD, BAD, GOOD])
    assert "3 steps in a row were skipped, the last one because the gradient of first.weight" in str(
        error.value
    )
    assert f"saved in {tmp_path / 'checkpoint_7'}" in str(error.value)
    assert load(tmp_path / "checkpoint_7").state["progress"]["skipped"] == 5


def test_the_count_survives_a_resume(tmp_path: Path) -> None:
    loop = {"num_steps": 50, "max_skipped_steps": 3}
    with pytest.raises(NotFiniteError):
        make(tmp_path, loop=loop).fit([BAD])
    again = make(tmp_path, loop=loop)
    with pytest.raises(NotFiniteError, match="4 steps in a row"):
        again.fit([BAD])
    assert again.progress.skipped.total == 4


def test_what_was_not_finite_is_named() -> None:
    fine, broken = torch.ones(2), torch.tensor([1.0, torch.inf])
    assert (
        first_not_finite([("a", fine), ("b", None), ("c", broken)], 1.0) == "the gradient of c is not finite"
    )
    assert first_not_finite([("a", fine)], float("nan")) == "the loss is nan"
    assert first_not_finite([("a", fine)], 1.0) == "the norm of the gradients overflows"


def test_a_loss_that_is_not_finite_is_skipped_even_with_fine_gradients(tmp_path: Path) -> None:
    class Infinite(Net):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return super().forward(batch) + torch.inf

    trainer = Trainer(
        model_dir=tmp_path,
        model=Infinite,
        device="cpu",
        loggers=[],
        loop={"num_steps": 1},
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
    )
    before = trainer.model.first.weight.clone()  # type: ignore[operator, union-attr]
    trainer.fit([GOOD])
    assert torch.equal(trainer.model.first.weight, before)  # type: ignore[union-attr, arg-type]
