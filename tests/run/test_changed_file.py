"""A run that goes on with a changed file follows what it can, says so, and refuses the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny_run
from rarefy.checkpoint.directory import load
from rarefy.run.changed_file import ChangedKey, changes_between
from rarefy.run.schema import parse
from tiny_run import configuration, rarefy

PLAIN = [{"TensorBoardLogger": None}, {"CSVLogger": None}]


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(content)
    here, (*parents, last) = content["trainer"], path.split(".")
    for key in parents:
        here = here[key]
    here[last] = value
    return content


def run(folder: Path, content: dict[str, Any], *flags: Any) -> tuple[int, str]:
    result = rarefy("run", tiny_run.write(folder, content), *flags)
    return result.exit_code, " ".join(result.output.split())


def begun(folder: Path, **init: Any) -> dict[str, Any]:
    """A run of 4 steps, and what it was made with, now with 6 of them to do."""
    content = configuration(folder, **{"loop": {"max_steps": 4}, "loggers": PLAIN, **init})
    code, said = run(folder, content)
    assert code == 0, said
    return changed(content, "init.loop.max_steps", 6)


def groups(folder: Path) -> set[tuple[float, float]]:
    saved = load(folder / "out" / "checkpoint_6").optimizer["param_groups"]
    return {(group["lr"], group["weight_decay"]) for group in saved}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("init.sparsity.sparsity", 0.5, "init.sparsity.sparsity is 0.5, was 0.75"),
        ("init.sparsity.algorithm", "set", "init.sparsity.algorithm is set, was rigl"),
        ("init.sparsity.pattern", {"n": 1, "m": 4}, "init.sparsity.pattern is {'m': 4, 'n': 1}, was nothing"),
        ("init.sparsity.distribution", "erk", "init.sparsity.distribution is erk, was nothing"),
        ("init.sparsity", None, "init.sparsity is null, was {"),
        ("init.seed", 2, "init.seed is 2, was 1"),
        ("init.model.name", "./tiny.py:Other", "init.model.name is ./tiny.py:Other, was ./tiny.py:Tiny"),
        ("init.optimizer", {"SGD": {"lr": 0.01}}, "init.optimizer is SGD, was AdamW"),
        (
            "init.optimizer.AdamW.adjust_learning_rate",
            {"body": 0.5},
            "init.optimizer.AdamW.adjust_learning_rate is {'body': 0.5}, was nothing",
        ),
        ("init.optimizer.AdamW.amsgrad", True, "init.optimizer.AdamW.amsgrad is true, was nothing"),
        ("init.loop.grad_accum_steps", 2, "init.loop.grad_accum_steps is 2, was 1"),
        ("fit.train_dataloader.seed", 5, "fit.train_dataloader.seed is 5, was nothing"),
        ("fit.train_dataloader.count", 9, "fit.train_dataloader.count is 9, was nothing"),
    ],
)
def test_what_needs_another_start_is_refused(tmp_path: Path, path: str, value: Any, words: str) -> None:
    content = begun(tmp_path)
    code, said = run(tmp_path, changed(content, path, value))
    assert code == 2
    assert f"checkpoint_4: is of another file: {words}" in said
    assert "--resume as_saved to go on as it was" in said and "--load_checkpoint_states model" in said
    assert not (tmp_path / "out" / "checkpoint_6").exists()


def test_every_refused_change_is_named(tmp_path: Path) -> None:
    content = changed(changed(begun(tmp_path), "init.seed", 2), "init.sparsity.sparsity", 0.5)
    _, said = run(tmp_path, content)
    assert "init.seed is 2, was 1; init.sparsity.sparsity is 0.5" in said.replace(
        "init.sparsity.sparsity is 0.5, was 0.75; init.seed is 2, was 1",
        "init.seed is 2, was 1; init.sparsity.sparsity is 0.5",
    )


def test_what_takes_effect_is_said(tmp_path: Path) -> None:
    content = begun(tmp_path)
    content = changed(content, "init.optimizer.AdamW", {"lr": 0.002, "weight_decay": 0.5})
    content = changed(content, "init.logging", {"log_steps": 3})
    content = changed(content, "init.sparsity.update", {"freq": 2})
    content = changed(content, "fit.val_dataloader.count", 3)
    code, said = run(tmp_path, content)
    assert code == 0, said
    for words in (
        "changed since checkpoint_4: init.optimizer.AdamW.lr is 0.002, was 0.01",
        "changed since checkpoint_4: init.optimizer.AdamW.weight_decay is 0.5, was nothing",
        "changed since checkpoint_4: init.loop.max_steps is 6, was 4",
        "changed since checkpoint_4: init.logging.log_steps is 3, was 10",
        "changed since checkpoint_4: init.sparsity.update.freq is 2, was 3",
        "changed since checkpoint_4: fit.val_dataloader[0].count is 3, was 2",
    ):
        assert words in said
    assert said.count("changed since") == 6
    assert groups(tmp_path) == {(0.002, 0.5), (0.002, 0.0)}


@pytest.mark.parametrize("name", ["AdamW", "torch.optim:AdamW"])
def test_an_option_takes_effect_whatever_it_is_called_and_whatever_it_holds(
    tmp_path: Path, name: str
) -> None:
    content = begun(tmp_path, optimizer={name: {"learning_rate": 0.01, "betas": [0.5, 0.9]}})
    options = {"learning_rate": 0.002, "betas": [0.5, 0.75]}
    code, said = run(tmp_path, changed(content, "init.optimizer", {name: options}))
    assert code == 0, said
    assert f"changed since checkpoint_4: init.optimizer.{name}.learning_rate is 0.002, was 0.01" in said
    saved = load(tmp_path / "out" / "checkpoint_6").optimizer["param_groups"]
    assert {(group["lr"], tuple(group["betas"])) for group in saved} == {(0.002, (0.5, 0.75))}


def test_a_rate_of_any_name_from_which_torch_computes_its_own_is_refused(tmp_path: Path) -> None:
    theirs = [{"torch.optim.lr_scheduler:StepLR": {"step_size": 1, "gamma": 0.5}}]
    content = begun(tmp_path, optimizer={"AdamW": {"learning_rate": 0.01}}, schedulers=theirs)
    code, said = run(tmp_path, changed(content, "init.optimizer.AdamW.learning_rate", 3.0))
    assert code == 2 and "is of another file: init.optimizer.AdamW.learning_rate is 3.0" in said


def test_options_of_the_model_take_effect_where_the_weights_fit(tmp_path: Path) -> None:
    content = begun(tmp_path)
    code, said = run(tmp_path, changed(content, "init.model.width", 24))
    assert code == 2 and "give the model that it was made with" in said
    code, said = run(tmp_path, changed(content, "init.model.signal", 0))
    assert code == 0 and "changed since checkpoint_4: init.model.signal is 0, was nothing" in said


def test_the_order_of_rotary_pairs_is_what_weights_mean(tmp_path: Path) -> None:
    parsed = parse({"trainer": {"init": {"model": {"name": "llama"}}}})[0]

    def changes(pairs: str) -> list[ChangedKey]:
        block = {"name": "llama", "rotary_pairs": pairs}
        return changes_between(parsed, parse({"trainer": {"init": {"model": block}}})[0])

    assert changes("adjacent") == []
    assert [one.needs_restart for one in changes("halves")] == [True]


@pytest.mark.parametrize(
    "flags",
    [
        ("--mode", "eval"),
        ("--mode", "eval_all"),
        ("--load_checkpoint_states", "model", "--checkpoint_path", "out/checkpoint_4"),
    ],
    ids=["eval", "eval_all", "weights alone"],
)
def test_weights_of_other_rotary_pairs_are_never_loaded(tmp_path: Path, flags: tuple[str, ...]) -> None:
    content = begun(tmp_path)
    content["trainer"]["validate_all"] = {"val_dataloaders": content["trainer"]["fit"]["val_dataloader"]}
    given = [tmp_path / flag if "/" in flag else flag for flag in flags]
    code, said = run(tmp_path, changed(content, "init.model.rotary_pairs", "halves"), *given)
    assert code == 2, said
    assert "checkpoint_4: is of another file: init.model.rotary_pairs is halves, was adjacent" in said
    assert "write model.rotary_pairs: adjacent" in said


def test_options_that_stayed_keep_the_values_of_the_checkpoint(tmp_path: Path) -> None:
    content = begun(
        tmp_path, schedulers=[{"torch.optim.lr_scheduler:StepLR": {"step_size": 1, "gamma": 0.5}}]
    )
    code, said = run(tmp_path, changed(content, "init.optimizer.AdamW.weight_decay", 0.5))
    assert code == 0, said
    assert groups(tmp_path) == {(0.01 * 0.5**6, 0.5), (0.01 * 0.5**6, 0.0)}


def test_a_schedule_of_rarefy_may_change_one_of_torch_may_not(tmp_path: Path) -> None:
    ours = [{"ConstantLR": {"learning_rate": 0.25}}]
    content = begun(tmp_path, schedulers=ours)
    content = changed(content, "init.schedulers", [{"ConstantLR": {"learning_rate": 0.125}}])
    content = changed(content, "init.optimizer.AdamW.lr", 3.0)
    code, said = run(tmp_path, content)
    assert code == 0 and "init.schedulers[0].ConstantLR.learning_rate is 0.125, was 0.25" in said
    assert {rate for rate, _ in groups(tmp_path)} == {0.125}

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    content = begun(theirs, schedulers=[{"torch.optim.lr_scheduler:StepLR": {"step_size": 1, "gamma": 0.5}}])
    for path, value in (
        ("init.schedulers", [{"torch.optim.lr_scheduler:StepLR": {"step_size": 1, "gamma": 0.9}}]),
        ("init.optimizer.AdamW.lr", 3.0),
    ):
        code, said = run(theirs, changed(content, path, value))
        assert code == 2 and f"is of another file: {path}" in said


def test_a_percentage_says_where_it_is_now(tmp_path: Path) -> None:
    block = {**tiny_run.SPARSITY["rigl"], "update": {"freq": 2, "stop": "75%"}}
    content = begun(tmp_path, sparsity=block)
    code, said = run(tmp_path, content, "--max_steps", "8")
    assert code == 0
    assert 'trainer.init.sparsity.update.stop: "75%" is step 6 now; it was 3' in said
    assert "half_period" not in said
    _, again = run(tmp_path, content, "--max_steps", "8")
    assert "is step" not in again


def test_spelling_and_places_are_no_change(tmp_path: Path) -> None:
    first = configuration(tmp_path, sparsity=0.75)
    second = copy.deepcopy(first)
    second["trainer"]["init"] |= {
        "sparsity": {"algorithm": "static", "sparsity": 0.75},
        "model_dir": "elsewhere",
    }
    second["trainer"]["init"]["loop"] |= {"grad_accum_steps": 1}
    second["trainer"]["fit"]["ckpt_path"] = None
    assert changes_between(parse(first)[0], parse(second)[0]) == []


def test_as_saved_goes_on_with_the_file_of_the_checkpoint(tmp_path: Path) -> None:
    content = begun(tmp_path)
    other = changed(changed(content, "init.sparsity.sparsity", 0.5), "init.optimizer.AdamW.lr", 3.0)
    code, said = run(tmp_path, other, "--resume", "as_saved", "--max_steps", "6")
    assert code == 0, said
    parts = load(tmp_path / "out" / "checkpoint_6")
    assert parts.params["trainer"]["init"]["sparsity"]["sparsity"] == 0.75
    assert parts.optimizer["param_groups"][0]["lr"] == 0.01
    straight = tmp_path / "straight"
    straight.mkdir()
    code, said = run(straight, changed(configuration(straight, loggers=PLAIN), "init.loop", {"max_steps": 6}))
    assert code == 0, said
    for name, tensor in load(straight / "out" / "checkpoint_6").model.items():
        assert torch.equal(parts.model[name], tensor)


def test_as_saved_needs_a_checkpoint_and_one_trainer(tmp_path: Path) -> None:
    content = configuration(tmp_path)
    code, said = run(tmp_path, content, "--resume", "as_saved")
    assert code == 2 and "has no checkpoint that a run could go on from; leave --resume as_saved out" in said
    code, said = run(tmp_path, content, "--resume", "again")
    assert code == 2 and "--resume: again is not allowed; give as_saved" in said
    code, said = run(tmp_path, {"trainer": [content, content]}, "--resume", "as_saved")
    assert code == 2 and "as_saved with 2 trainers is not allowed" in said


def test_a_model_alone_may_begin_a_run_of_another_file(tmp_path: Path) -> None:
    content = changed(begun(tmp_path), "init.seed", 7)
    code, said = run(tmp_path, content, "--load_checkpoint_states", "model", "--max_steps", "2")
    assert code == 0, said


def test_a_configuration_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    content = begun(tmp_path)
    path = tmp_path / "out" / "checkpoint_4"
    (path / "params.yaml").write_text(yaml.safe_dump({"trainer": {"init": {"models": 3}}}))
    manifest = path / "MANIFEST.json"
    assert manifest.exists()
    from rarefy.run.builder import Builder
    from rarefy.run.changed_file import compare

    assert compare(Builder(parse(content)[0], tmp_path), path) == []
    assert compare(Builder(parse(content)[0], tmp_path), tmp_path / "model.pt") == []
