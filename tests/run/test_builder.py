"""From a checked configuration to a trainer: every part, and the path of every fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rarefy.run.builder
import tiny_run
from rarefy.callbacks import ComputeNorm, CSVLogger, LogSparsity
from rarefy.errors import ConfigError
from rarefy.methods.set import SET
from rarefy.run.builder import Builder
from rarefy.run.launch import Launch, run_all
from rarefy.run.schema import parse
from rarefy.trainer.plan import VERBOSE
from tiny_run import configuration


def builder(folder: Path, allow_imports: bool = True, **init: Any) -> Builder:
    content = configuration(folder, **init)
    tiny_run.write(folder, content)
    return Builder(parse(content)[0], folder, allow_imports)


def test_everything_is_handed_on(tmp_path: Path) -> None:
    made = builder(
        tmp_path,
        sparsity={"algorithm": "set", "sparsity": 0.5, "update": {"freq": 2, "stop": "50%"}},
        optimizer={"SGD": {"momentum": 0.5}},
        schedulers=[{"ConstantLR": {"learning_rate": 0.25}}],
        precision={"enabled": False, "max_gradient_norm": 2.0},
        checkpoint={"steps": 3},
        loop={"num_steps": 40},
        logging={"log_steps": 7},
        callbacks=[{"LogSparsity": {}}, {"ComputeNorm": None}],
        model={"name": "./tiny.py:Tiny", "width": 32},
    )
    trainer = made.trainer()
    assert trainer.model.get_parameter("middle.weight").shape == (32, 32)
    assert isinstance(trainer.sparsity, SET)
    assert [trainer.sparsity.next_update_step(after) for after in (0, 17, 18)] == [2, 18, None]
    assert trainer.trained_by.param_groups[0]["lr"] == 0.25
    assert trainer.precision.config.max_gradient_norm == 2.0
    assert (trainer.checkpoint.steps, trainer.logging.log_steps) == (3, 7)
    kinds = [type(one) for one in (*trainer.callbacks, *trainer.loggers)]
    assert LogSparsity in kinds and CSVLogger in kinds and ComputeNorm not in kinds
    assert trainer.params == {"trainer": made.config.content}
    assert not (tmp_path / "out").exists()


def test_supar_divides_learning_rates_by_the_density(tmp_path: Path) -> None:
    block = {"sparsity": 0.75, "param_filter": "middle.weight", "parametrization": "supar"}
    made = builder(tmp_path, sparsity=block, schedulers=[{"ConstantLR": {"learning_rate": 0.25}}])
    trainer = made.trainer()
    rates = {one: group["lr"] for group in trainer.trained_by.param_groups for one in group["params"]}
    found = {name: rates[parameter] for name, parameter in trainer.model.named_parameters()}
    assert found.pop("middle.weight") == 1.0
    assert set(found.values()) == {0.25}


def test_a_trainer_for_validation_needs_no_optimizer(tmp_path: Path) -> None:
    assert builder(tmp_path, optimizer=None).trainer(trains=False).optimizer is None
    with pytest.raises(ConfigError, match=r"trainer\.init\.optimizer: a missing value is not allowed"):
        builder(tmp_path, optimizer=None).trainer()


def test_the_seed_decides_weights_and_masks(tmp_path: Path) -> None:
    states = [builder(tmp_path, seed=seed).trainer().model.state_dict() for seed in (1, 1, 2)]
    assert all((states[0][name] == states[1][name]).all() for name in states[0])
    assert (states[0]["middle.weight_mask"] != states[2]["middle.weight_mask"]).any()


def with_batches(folder: Path, count: int, **init: Any) -> Builder:
    content = configuration(folder, **init)
    content["trainer"]["fit"]["train_dataloader"]["count"] = count
    tiny_run.write(folder, content)
    return Builder(parse(content)[0], folder)


@pytest.mark.parametrize(
    ("loop", "count", "steps"),
    [
        ({"num_steps": 7}, 5, 7),
        ({"num_epochs": 3}, 5, 15),
        ({"num_epochs": 3, "grad_accum_steps": 2}, 5, 9),
        ({"num_epochs": 3, "steps_per_epoch": 4}, 5, 12),
        ({"max_steps": 4, "num_epochs": 3}, 5, 4),
        ({"max_steps": 40, "num_epochs": 3}, 5, 15),
    ],
)
def test_total_steps(tmp_path: Path, loop: dict[str, Any], count: int, steps: int) -> None:
    assert with_batches(tmp_path, count, loop=loop).total_steps == steps


@pytest.mark.parametrize(
    "loop", [{"num_steps": 7}, {"max_steps": 7}, {"num_epochs": 2, "steps_per_epoch": 3}]
)
def test_data_is_not_opened_where_the_file_tells_the_length(tmp_path: Path, loop: dict[str, Any]) -> None:
    made = with_batches(tmp_path, -1, loop=loop)
    (tmp_path / "tiny.py").unlink()
    assert made.total_steps in (6, 7)


def test_a_run_without_a_length(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.init\.loop: a run without a length is not allowed"):
        _ = builder(tmp_path, loop={}).total_steps


@pytest.mark.parametrize("loop", [{"num_steps": 2}, {"num_epochs": 1}])
def test_each_part_of_a_run_is_built_once(
    tmp_path: Path, loop: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def counting(name: str) -> Any:
        original = getattr(rarefy.run.builder, name)

        def build(*args: Any, **options: Any) -> Any:
            built.append(name)
            return original(*args, **options)

        return build

    names = ["build_dataloader", "build_model", "build_optimizer", "configure", "read_schedulers"]
    for name in names:
        monkeypatch.setattr(rarefy.run.builder, name, counting(name))
    schedulers = [{"ConstantLR": {"learning_rate": 0.1}}]
    made = builder(tmp_path, loop=loop, sparsity={"sparsity": 0.5}, schedulers=schedulers)
    [_] = run_all([made.config], Launch(tmp_path, mode="train"))
    assert sorted(built) == names


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"sparsity": 90}, "trainer.init.sparsity"),
        ({"sparsity": {"sparsity": 0.5, "param_filter": "nothing*"}}, "trainer.init.sparsity.param_filter"),
        (
            {"sparsity": {"sparsity": 0.5, "balance_in_groups": 3}},
            "trainer.init.sparsity.balance_in_groups: 3",
        ),
        ({"optimizer": {"AdamX": {}}}, "trainer.init.optimizer: AdamX"),
        ({"schedulers": [{"NoLR": {}}]}, "trainer.init.schedulers[0]"),
        ({"callbacks": [{"Nothing": {}}]}, "trainer.init.callbacks[0]"),
        ({"loggers": [{"Nothing": {}}]}, "trainer.init.loggers[0]"),
        ({"device": "gpu"}, "trainer.init.device: gpu"),
        ({"model": {"name": "gpt5"}}, "trainer.init.model.name: 'gpt5'"),
        (
            {"model": {"name": "./tiny.py:Tiny", "width": -1}},
            "trainer.init.model: ./tiny.py:Tiny with these options",
        ),
        (
            {"model": {"name": "./tiny.py:Tiny", "depth": 1}},
            "trainer.init.model: ./tiny.py:Tiny with these arg",
        ),
    ],
)
def test_faults_have_their_path(
    tmp_path: Path, init: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        builder(tmp_path, **init).trainer()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("init", [{"sparsity": -1}, {"device": "gpu"}, {"schedulers": [{"NoLR": {}}]}])
def test_check_needs_neither_data_nor_model(
    tmp_path: Path, init: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    made = builder(tmp_path, **init)
    (tmp_path / "tiny.py").unlink()
    with pytest.raises(ConfigError):
        made.check()


def test_imports_can_be_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.init\.model\.name: .*imports are off"):
        builder(tmp_path, allow_imports=False).trainer()


def test_several_data_sets(tmp_path: Path) -> None:
    made = builder(tmp_path)
    fit = made.config.fit
    assert fit is not None
    assert [
        len(list(data)) for data in made.several_data([fit.train_dataloader, *fit.val_dataloader], "x")
    ] == [5, 2]
    wrong = fit.train_dataloader.model_copy(update={"data_processor": "Nothing"})
    with pytest.raises(ConfigError, match=r"trainer\.fit\.val_dataloader\[1\]\.data_processor"):
        made.several_data([fit.train_dataloader, wrong], "fit.val_dataloader")


def test_verbose_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(VERBOSE, "rarefy"):
        builder(tmp_path).trainer()
    assert "Sparsity filter matched: body.weight" in caplog.messages
    assert "Sparsity filter did not match: head.bias" in caplog.messages
