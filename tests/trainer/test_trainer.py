"""The loop: what happens when, and what is logged."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.callbacks import ProgressLogger
from rarefy.callbacks.events import Callback, Logger
from rarefy.disk import alone_in
from rarefy.errors import ConfigError, RarefyError
from rarefy.optim.lr_schedules import LinearLR
from rarefy.trainer.trainer import Trainer


class Scale(nn.Module):
    """Loss = weight · mean of the batch, so that the gradient is the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.weight * batch.mean()


class Recorder(Logger):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def log(self, trainer: Any, metrics: dict[str, float], step: int) -> None:
        self.metrics.setdefault(step, {}).update(metrics)


def batches(*values: float) -> list[torch.Tensor]:
    return [torch.full((2, 3), float(value)) for value in values]


def make(folder: Path, model: type[nn.Module] = Scale, lr: float = 1.0, **options) -> Trainer:
    sgd = {"optimizer": lambda one: torch.optim.SGD(one.parameters(), lr=lr)}
    defaults = {"loop": {"num_steps": 4}, "loggers": [], "seed": 0, **sgd}
    return Trainer(
        model_dir=folder,
        model=model,
        device="cpu",
        **{**defaults, **options},
    )


def test_every_event_in_the_order_of_the_pseudocode(tmp_path: Path) -> None:
    heard: list[str] = []
    names = [name for name in vars(Callback) if name == "setup" or name.startswith("on_")]

    def listener(name: str):
        return lambda self, trainer, *rest: heard.append(name)

    everything = type("Everything", (Callback,), {name: listener(name) for name in names})()
    loop = {"num_steps": 1, "grad_accum_steps": 2}
    make(tmp_path, loop=loop, callbacks=[everything]).fit(batches(1, 2), batches(1))
    micro = ["on_train_batch_start", "on_before_forward", "on_after_forward", "on_after_backward"]
    assert heard == [
        *("setup", "on_fit_start", "on_train_start", *micro, *micro),
        *("on_before_optimizer_step", "on_after_optimizer_step", "on_train_batch_end"),
        *(
            "on_validate_start",
            "on_before_forward",
            "on_after_forward",
            "on_validate_batch_end",
            "on_validate_end",
        ),
        *("on_save_checkpoint", "on_fit_end"),
    ]


def test_set_up_happens_once(tmp_path: Path) -> None:
    class Count(Callback):
        calls = 0

        def setup(self, trainer: Any) -> None:
            self.calls += 1

    count = Count()
    trainer = make(tmp_path, callbacks=[count])
    trainer.validate(batches(1))
    trainer.fit(batches(1))
    assert count.calls == 1


def test_micro_batches_are_averaged_and_an_epoch_ends_with_what_is_left(tmp_path: Path) -> None:
    trainer = make(tmp_path, loop={"num_epochs": 1, "grad_accum_steps": 2})
    trainer.fit(batches(1, 3, 10))
    assert trainer.global_step == 2
    assert trainer.model.weight.item() == -(2.0 + 10.0)  # type: ignore[operator]


class OwnRate(torch.optim.Optimizer):
    """Works its rate out by itself."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for one in self.param_groups[0]["params"]:
            one.sub_(one.grad)


def test_no_rate_is_logged_of_an_optimizer_that_has_none(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make(tmp_path, loggers=[recorder], optimizer=lambda one: OwnRate(one.parameters()))
    trainer.fit(batches(1, 3))
    assert trainer.global_step == 4 and "loss" in recorder.metrics[4] and "lr" not in recorder.metrics[4]


def test_what_is_logged(tmp_path: Path) -> None:
    recorder = Recorder()
    schedule = LinearLR(initial_learning_rate=1.0, end_learning_rate=0.0, total_iters=4)
    options = {"loop": {"num_steps": 5, "grad_accum_steps": 2}, "logging": {"log_steps": 2}}
    trainer = make(tmp_path, loggers=[recorder], schedulers=schedule, **options)
    trainer.fit(batches(1, 3))
    assert list(recorder.metrics) == [2, 4, 5]
    assert [one["lr"] for one in recorder.metrics.values()] == [0.75, 0.25, 0.0]
    assert [one["grad_norm"] for one in recorder.metrics.values()] == [2.0, 2.0, 2.0]
    assert [one["loss"] for one in recorder.metrics.values()] == [-4.0, -9.0, -10.0]
    assert all(one["samples_per_second"] > 0 for one in recorder.metrics.values())
    assert set(recorder.metrics[2]) == {"loss", "lr", "grad_norm", "samples_per_second"}
    assert trainer.last_metrics["loss"] == -10.0


def test_tokens_are_counted(tmp_path: Path) -> None:
    class Tokens(Scale):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.weight * input_ids.float().mean()

    recorder = Recorder()
    trainer = make(tmp_path, Tokens, loggers=[recorder], loop={"num_steps": 1, "grad_accum_steps": 2})
    trainer.fit([{"input_ids": torch.ones(2, 5, dtype=torch.long)}] * 2)
    assert trainer.tokens_per_step == 20
    assert recorder.metrics[1]["tokens_per_second"] > 0


def test_loss_scale_is_logged_when_asked_for(tmp_path: Path) -> None:
    recorder = Recorder()
    block = {"loss_scaling_factor": 8.0, "log_loss_scale": True}
    make(tmp_path, precision=block, loggers=[recorder]).fit(batches(1))
    assert recorder.metrics[4]["loss_scale"] == 8.0


def test_clipping_comes_after_unscaling_and_before_the_step(tmp_path: Path) -> None:
    for name, factor in (("a", 1.0), ("b", 1024.0)):
        block = {"enabled": False, "loss_scaling_factor": factor, "max_gradient_norm": 0.5}
        trainer = make(tmp_path / name, precision=block, loop={"num_steps": 1})
        trainer.fit(batches(4))
        assert trainer.model.weight.item() == pytest.approx(-0.5, rel=1e-5)  # type: ignore[operator]


def test_dynamic_loss_scaling_trains(tmp_path: Path) -> None:
    block = {"fp16_type": "float16", "loss_scaling_factor": "dynamic", "initial_loss_scale": 16.0}
    trainer = make(tmp_path, precision=block, loop={"num_steps": 2})
    trainer.fit(batches(4))
    assert trainer.model.weight.item() == -8.0  # type: ignore[operator]


def test_validations_fall_due_and_training_data_goes_on(tmp_path: Path) -> None:
    seen, recorder = [], Recorder()

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, batch: torch.Tensor, micro_step: int) -> None:
            seen.append(batch[0, 0].item())

    loop = {"num_steps": 5, "eval_frequency": 2}
    trainer = make(tmp_path, loop=loop, callbacks=[Watch()], loggers=[recorder], logging={"log_steps": 100})
    trainer.fit(batches(1, 2, 3), batches(7))
    assert seen == [1, 2, 3, 1, 2]
    assert [step for step, one in recorder.metrics.items() if "eval/loss" in one] == [2, 4, 5]
    assert trainer.model.training


def test_max_steps_counts_earlier_steps_and_says_when_there_is_nothing_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, loop={"max_steps": 3}).fit(batches(1))
    trainer = make(tmp_path, loop={"max_steps": 3})
    with caplog.at_level("INFO", "rarefy"):
        trainer.fit(batches(1))
    assert trainer.global_step == 3
    assert "nothing to do: global step 3 of 3 is reached" in caplog.text


class Opened(list):
    """Data that tells how many of its iterators are still there, as worker processes would be."""

    open = 0

    def __iter__(self):
        self.open += 1
        try:
            yield from super().__iter__()
        finally:
            self.open -= 1


@pytest.mark.parametrize("steps", [3, 9])
def test_data_is_let_go_of_whether_a_fit_trains_or_finds_nothing_to_do(tmp_path: Path, steps: int) -> None:
    make(tmp_path, loop={"max_steps": 3}).fit(batches(1, 2, 3, 4, 5))
    trainer = make(tmp_path, loop={"max_steps": steps})
    data = Opened(batches(1, 2, 3, 4, 5))
    trainer.fit(data)
    assert trainer.global_step == steps and data.open == 0


def test_num_steps_after_a_finished_fit_are_new_steps(tmp_path: Path) -> None:
    make(tmp_path, loop={"num_steps": 3}).fit(batches(1))
    trainer = make(tmp_path, loop={"num_steps": 3})
    trainer.fit(batches(1))
    assert trainer.global_step == 6
    trainer.fit(batches(1), ckpt_path=None)
    assert trainer.global_step == 9


def test_total_steps_before_and_during_a_fit(tmp_path: Path) -> None:
    trainer = make(tmp_path, loop={"num_epochs": 2})
    assert trainer.total_steps == 0
    assert make(tmp_path, loop={"max_steps": 9}).total_steps == 9
    trainer.fit(batches(1, 2, 3))
    assert trainer.total_steps == trainer.global_step == 6


@pytest.mark.parametrize(
    ("checkpoint", "saved"),
    [
        ({}, [5]),
        ({"steps": 2}, [2, 4, 5]),
        ({"steps": 5}, [5]),
        ({"steps": 2, "save_initial_checkpoint": True}, [0, 2, 4, 5]),
        ({"steps": 2, "keep_last": 2}, [4, 5]),
    ],
)
def test_checkpoints_are_saved_when_they_fall_due(tmp_path: Path, checkpoint: dict, saved: list[int]) -> None:
    make(tmp_path, loop={"num_steps": 5}, checkpoint=checkpoint).fit(batches(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint_{step}" for step in saved]


def test_checkpoints_may_go_elsewhere(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", checkpoint={"checkpoint_root": tmp_path / "far"})
    trainer.fit(batches(1))
    assert (tmp_path / "far" / "checkpoint_4").is_dir() and not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("folder", ["run", "far"])
def test_another_run_in_one_of_its_folders_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr("rarefy.disk._WAIT", 0.0)
    trainer = make(tmp_path / "run", checkpoint={"checkpoint_root": tmp_path / "far"})
    with (
        alone_in(tmp_path / folder),
        pytest.raises(RarefyError, match=f"{folder}: another run is writing to it"),
    ):
        trainer.fit(batches(1))
    # What it had locked before is free again.
    trainer.fit(batches(1))
    assert trainer.global_step == 4


def test_checkpoints_in_a_folder_by_another_name_are_no_other_run(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    trainer = make(tmp_path / "run", checkpoint={"checkpoint_root": tmp_path / "link" / "run"})
    trainer.fit(batches(1))
    assert (tmp_path / "run" / "checkpoint_4").is_dir()


def test_log_metrics_reach_every_logger_at_the_global_step(tmp_path: Path) -> None:
    one, two = Recorder(), Recorder()
    trainer = make(tmp_path, loggers=[one, two])
    trainer.log_metrics(a=1.0)
    trainer.log_metrics_dict({"b/c": 2.0})
    assert one.metrics == two.metrics == {0: {"a": 1.0, "b/c": 2.0}}
    assert trainer.last_metrics == {"a": 1.0, "b/c": 2.0}


def test_a_progress_logger_is_there_unless_asked_otherwise(tmp_path: Path) -> None:
    assert [type(one) for one in make(tmp_path, loggers=None).loggers] == [ProgressLogger]
    assert make(tmp_path).loggers == []


def test_seed_makes_models_equal(tmp_path: Path) -> None:
    first, second = (make(tmp_path, lambda: nn.Linear(3, 3), seed=5) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(first.model.weight, second.model.weight)  # type: ignore[arg-type]


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    validator = Trainer(model_dir=tmp_path, model=Scale, device="cpu", loggers=[], loop={"num_steps": 1})
    with pytest.raises(RarefyError, match="this trainer has no optimizer, so it can only validate"):
        validator.fit(batches(1))
    with pytest.raises(RarefyError, match="no fit is running"):
        validator.train_feed  # noqa: B018
    with pytest.raises(ConfigError, match="loop: a run without a length"):
        make(tmp_path, loop=None).fit(batches(1))
    with pytest.raises(ConfigError, match=r"checkpoint.*'step'.*did you mean steps\?"):
        make(tmp_path, checkpoint={"step": 3})
    assert list(tmp_path.iterdir()) == []


def test_fit_end_comes_after_a_failure_too(tmp_path: Path) -> None:
    ended = []

    class Breaks(Callback):
        def on_train_batch_end(self, trainer: Any, metrics: dict) -> None:
            assert math.isfinite(metrics["loss"])
            raise KeyError("broken")

        def on_fit_end(self, trainer: Any) -> None:
            ended.append(trainer.global_step)

    with pytest.raises(KeyError, match="broken"):
        make(tmp_path, callbacks=[Breaks()]).fit(batches(1))
    assert ended == [1]


def test_a_batch_that_the_model_refuses_is_named(tmp_path: Path) -> None:
    class Picky(Scale):
        def check_batch(self, batch: torch.Tensor) -> None:
            raise RarefyError("token 300 is outside of the vocabulary")

    with pytest.raises(RarefyError, match="token 300"):
        make(tmp_path, Picky).fit(batches(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bad_data_in_the_middle_loses_nothing(tmp_path: Path, accumulate: int) -> None:
    class Picky(Scale):
        allowed = 3.0

        def check_batch(self, batch: torch.Tensor) -> None:
            if float(batch.max()) > self.allowed:
                raise RarefyError("too large")

    options: dict[str, Any] = {"loop": {"max_steps": 5, "grad_accum_steps": accumulate}, "lr": 0.1}
    data = batches(*range(8))
    with pytest.raises(RarefyError, match="too large"):
        make(tmp_path / "a", Picky, **options).fit(data)
    saved = 4 // accumulate
    assert [path.name for path in (tmp_path / "a").iterdir()] == [f"checkpoint_{saved}"]
    Picky.allowed = math.inf
    cured, whole = make(tmp_path / "a", Picky, **options), make(tmp_path / "b", **options)
    cured.fit(data)
    whole.fit(data)
    assert cured.global_step == 5
    assert torch.equal(cured.model.weight, whole.model.weight)  # type: ignore[arg-type]


def test_log_level(tmp_path: Path) -> None:
    import logging

    logger = logging.getLogger("rarefy")
    before = logger.level
    try:
        make(tmp_path, logging={"log_level": "VERBOSE"})
        assert logger.level == 15
        make(tmp_path)
        assert logger.level == 15
    finally:
        logger.setLevel(before)
