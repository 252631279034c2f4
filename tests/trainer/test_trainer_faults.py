"""What is left when a log, a callback or another run comes in between: no step is lost, no folder is shared."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.callbacks.events import Callback, Logger
from rarefy.checkpoint import directory
from rarefy.disk import alone_in
from rarefy.errors import RarefyError
from rarefy.trainer.trainer import Trainer


class Net(nn.Module):
    """A layer whose outputs shall be small."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).square().mean()


def batches(*values: float) -> list[torch.Tensor]:
    return [torch.full((2, 3), float(value)) for value in values]


def make(folder: Path, **options: Any) -> Trainer:
    sgd = {"optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1)}
    defaults: dict[str, Any] = {"loop": {"num_steps": 4}, "loggers": [], "seed": 0, **sgd}
    return Trainer(model_dir=folder, model=Net, device="cpu", **{**defaults, **options})


def test_a_fit_that_fails_keeps_its_folder_until_its_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = directory.publish

    def publish_late(temporary: Path, final: Path) -> None:
        time.sleep(0.3)
        publish(temporary, final)

    class Fails(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if trainer.global_step == 1:
                raise ValueError("no data")

    monkeypatch.setattr(directory, "publish", publish_late)
    trainer = make(tmp_path, callbacks=[Fails()], checkpoint={"steps": 1})
    with pytest.raises(ValueError, match="no data"):
        trainer.fit(batches(1, 2))
    assert (tmp_path / "checkpoint_1" / "MANIFEST.json").exists()


def test_a_log_that_fails_loses_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full(Logger):
        def log(self, trainer: Any, metrics: dict[str, float], step: int) -> None:
            if step == 3:
                raise RarefyError("log: cannot be written: No space left on device")

    trainer = make(tmp_path, loggers=[Full()], checkpoint={"steps": 100}, logging={"log_steps": 1})
    with pytest.raises(RarefyError, match="No space left"):
        trainer.fit(batches(1, 2))
    assert (tmp_path / "checkpoint_3" / "MANIFEST.json").exists()
    assert "failed after the step that is saved in" in caplog.text
    resumed = make(tmp_path)
    resumed.fit(batches(1, 2))
    assert resumed.global_step == 4


def test_a_validation_beside_a_run_is_refused_and_one_within_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rarefy.disk._WAIT", 0.0)
    with alone_in(tmp_path), pytest.raises(RarefyError, match="another run is writing to it"):
        make(tmp_path).validate(batches(1), None)

    class Validates(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            trainer.validate(batches(1), None)

    trainer = make(tmp_path, callbacks=[Validates()])
    trainer.fit(batches(1))
    assert trainer.global_step == 4
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize("last", [2, 4])
def test_a_callback_that_fails_leaves_the_validation_of_its_step_due(tmp_path: Path, last: int) -> None:
    validated: list[int] = []

    class Watches(Callback):
        def on_validate_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
            validated.append(trainer.global_step)

    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == last:
                raise ValueError("broken")

    options: dict[str, Any] = {"loop": {"max_steps": 4, "eval_frequency": 2}}
    with pytest.raises(ValueError, match="broken"):
        make(tmp_path, callbacks=[Watches(), Fails()], **options).fit(batches(1, 2), batches(1))
    resumed = make(tmp_path, callbacks=[Watches()], **options)
    resumed.fit(batches(1, 2), batches(1))
    assert resumed.global_step == 4 and validated == [2, 4]
