"""Which checkpoint a run takes, what it takes from it, and what it refuses."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy import masks
from rarefy.checkpoint.chosen import find_all
from rarefy.checkpoint.directory import load
from rarefy.checkpoint.error import CheckpointError
from rarefy.config import configure
from rarefy.errors import RarefyError
from rarefy.optim.lr_schedules import ConstantLR
from rarefy.optim.optimizers import build_optimizer
from rarefy.trainer.state import States
from rarefy.trainer.trainer import Trainer

LOOSE = {"disable_strict_checkpoint_loading": True}


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(batch).relu()) - batch).square().mean()


DATA = [torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def make(folder: Path, **options) -> Trainer:
    defaults = {
        "model": Net,
        "optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        "loop": {"max_steps": 2},
        "loggers": [],
        "seed": 2,
    }
    return Trainer(model_dir=folder, device="cpu", **{**defaults, **options})


def fitted(folder: Path, **options) -> Trainer:
    trainer = make(folder, **options)
    trainer.fit(DATA)
    return trainer


def test_three_states_of_ckpt_path(tmp_path: Path) -> None:
    done = fitted(tmp_path)
    unset = make(tmp_path, loop={"max_steps": 4})
    unset.fit(DATA)
    assert (unset.global_step, unset.progress.start) == (4, 2)
    none = make(tmp_path, loop={"max_steps": 1})
    none.fit(DATA, ckpt_path=None)
    assert none.global_step == 1
    path = make(tmp_path, loop={"max_steps": 3})
    path.fit(DATA, ckpt_path=str(tmp_path / "checkpoint_2"))
    assert path.global_step == 3
    assert done.global_step == 2


def test_autoload_may_be_turned_off(tmp_path: Path) -> None:
    fitted(tmp_path)
    trainer = make(tmp_path, loop={"num_steps": 1}, checkpoint={"autoload_last_checkpoint": False})
    trainer.fit(DATA)
    assert trainer.global_step == 1


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fitted(tmp_path, checkpoint={"steps": 1})
    (tmp_path / "checkpoint_2" / "MANIFEST.json").unlink()
    trainer = fitted(tmp_path, loop={"max_steps": 3})
    assert (trainer.global_step, trainer.progress.start) == (3, 0)
    assert "skipping checkpoint_2" in caplog.text


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: does not exist; give the path of a checkpoint, null"):
        make(tmp_path).fit(DATA, ckpt_path=tmp_path / "nowhere")


@pytest.mark.parametrize(("saved", "wanted", "message"), [(0.5, None, "is sparse"), (None, 0.5, "is dense")])
def test_sparse_and_dense_runs_do_not_mix_by_accident(
    tmp_path: Path, saved: float | None, wanted: float | None, message: str
) -> None:
    fitted(tmp_path, sparsity=saved)
    with pytest.raises(CheckpointError, match=f"{message}.*--disable_strict_checkpoint_loading"):
        fitted(tmp_path, sparsity=wanted)
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, sparsity=wanted).validate(DATA)


@pytest.mark.parametrize("how", ["loose", "model"])
def test_a_sparse_checkpoint_becomes_a_dense_model_with_zeros(tmp_path: Path, how: str) -> None:
    fitted(tmp_path / "a", sparsity=0.5)
    saved = load(tmp_path / "a" / "checkpoint_2").model
    trainer = make(tmp_path / "b", checkpoint=LOOSE if how == "loose" else None, loop={"num_steps": 1})
    trainer.trained_by.param_groups[0]["lr"] = 0.0
    states = "all" if how == "loose" else "model"
    trainer.fit(DATA, ckpt_path=tmp_path / "a" / "checkpoint_2", load_states=states)
    weight = trainer.model.get_parameter("first.weight")
    assert torch.equal(weight, saved["first.weight"]) and masks.sparsity_of(weight != 0) == 0.5
    assert "first.weight_mask" not in trainer.model.state_dict()
    assert trainer.global_step == 1


@pytest.mark.parametrize("how", ["loose", "model"])
@pytest.mark.parametrize("algorithm", ["static", "rigl"])
def test_a_dense_checkpoint_is_pruned_by_init_method(tmp_path: Path, how: str, algorithm: str) -> None:
    fitted(tmp_path / "a")
    saved = load(tmp_path / "a" / "checkpoint_2").model
    block = {"algorithm": algorithm, "sparsity": 0.5, "init_method": "topk"}
    checkpoint = LOOSE if how == "loose" else None
    trainer = make(tmp_path / "b", sparsity=block, checkpoint=checkpoint, loop={"num_steps": 1}, seed=7)
    before = trainer.model.get_parameter("first.weight").detach().clone()
    assert not torch.equal(before, saved["first.weight"])
    states = "all" if how == "loose" else "model"
    trainer.trained_by.param_groups[0].update(lr=0.0)
    if algorithm == "rigl":
        assert trainer.sparsity is not None
        trainer.sparsity.algorithms[0].autoupdate = False
    trainer.fit(DATA, ckpt_path=tmp_path / "a" / "checkpoint_2", load_states=states)
    for name in ("first.weight", "second.weight"):
        expected = masks.keep_top(saved[name].abs(), saved[name].numel() // 2)
        state = trainer.model.state_dict()
        assert torch.equal(state[f"{name}_mask"], expected)
        assert torch.equal(state[name], torch.where(expected, saved[name], 0))


def test_a_dense_checkpoint_stays_dense_until_the_first_update(tmp_path: Path) -> None:
    fitted(tmp_path / "a")
    block = {"algorithm": "rigl", "sparsity": 0.5, "update": {"start": 2, "freq": 5}}
    trainer = make(tmp_path / "b", sparsity=block, loop={"num_steps": 1})
    trainer.fit(DATA, ckpt_path=tmp_path / "a" / "checkpoint_2", load_states="model")
    assert bool(trainer.model.state_dict()["first.weight_mask"].all())


def test_masks_of_some_parameters_only(tmp_path: Path) -> None:
    fitted(tmp_path / "a", sparsity={"sparsity": 0.5, "param_filter": "first.*"})
    other = partial(make, tmp_path / "b", sparsity={"sparsity": 0.5, "param_filter": "*"})
    with pytest.raises(CheckpointError, match=r"has no mask for second\.weight"):
        other().fit(DATA, ckpt_path=tmp_path / "a" / "checkpoint_2")
    trainer = other(checkpoint=LOOSE, loop={"num_steps": 1})
    trainer.fit(DATA, ckpt_path=tmp_path / "a" / "checkpoint_2")
    saved = load(tmp_path / "a" / "checkpoint_2").model
    assert torch.equal(trainer.model.state_dict()["first.weight_mask"], saved["first.weight_mask"])
    assert masks.sparsity_of(trainer.model.state_dict()["second.weight_mask"]) == 0.5


def test_another_algorithm_with_the_same_masks(tmp_path: Path) -> None:
    fitted(tmp_path / "a", sparsity={"algorithm": "set", "sparsity": 0.5})
    with pytest.raises(CheckpointError, match=r"does not fit \(this sparsity state is of set, not of rigl"):
        fitted(tmp_path / "a", sparsity={"algorithm": "rigl", "sparsity": 0.5})
    trainer = make(tmp_path / "b", sparsity=0.5, checkpoint=LOOSE, loop={"num_steps": 1})
    trainer.fit(DATA, ckpt_path=tmp_path / "a" / "checkpoint_2")
    saved = load(tmp_path / "a" / "checkpoint_2").model
    assert torch.equal(trainer.model.state_dict()["first.weight_mask"], saved["first.weight_mask"])
    assert trainer.global_step == 1


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path)
    with pytest.raises(CheckpointError, match=r"is of another model: it has other shapes for first\.weight"):
        fitted(tmp_path, model=partial(Net, 9))
    with pytest.raises(CheckpointError, match="is of another model") as refused:
        fitted(tmp_path, model=partial(Net, 9), checkpoint=LOOSE)
    assert "--disable_strict" not in str(refused.value)


def test_loose_loading_takes_what_fits(tmp_path: Path) -> None:
    class Deeper(Net):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(2, 2)

    fitted(tmp_path / "a")
    path = tmp_path / "a" / "checkpoint_2"
    with pytest.raises(CheckpointError, match="lacks third"):
        make(tmp_path / "b", model=Deeper).fit(DATA, ckpt_path=path)
    trainer = make(tmp_path / "b", model=Deeper)
    trainer.fit(DATA, ckpt_path=path, load_states="model")
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": lambda model: torch.optim.SGD(model.parameters())},
            "has the state of AdamW, but this run uses SGD",
        ),
        ({"schedulers": ConstantLR(learning_rate=0.1)}, "has 0 schedulers, but this run has 1"),
        (
            {"optimizer": lambda model: torch.optim.AdamW([model.first.weight])},
            "has an optimizer state that does not fit",
        ),
    ],
)
def test_another_optimizer_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    fitted(tmp_path)
    with pytest.raises(CheckpointError, match=f"{message}.*--load_checkpoint_states model"):
        fitted(tmp_path, **{"loop": {"max_steps": 4}, **options})


def test_foreign_files_give_their_model(tmp_path: Path) -> None:
    source = make(tmp_path / "a", sparsity=0.5)
    state = {f"module.{name}": tensor for name, tensor in source.model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "model.mdl")
    trainer = make(tmp_path / "b", sparsity=0.5, seed=9)
    trainer.validate(DATA, tmp_path / "model.mdl")
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor)


def test_validate_takes_weights_and_step(tmp_path: Path) -> None:
    done = fitted(tmp_path, sparsity=0.5)
    fresh = make(tmp_path, sparsity=0.5, seed=9, optimizer=None)
    assert fresh.validate(DATA) == done.validate(DATA, ckpt_path=None)
    assert fresh.global_step == 2
    assert make(tmp_path, sparsity=0.5, seed=9).validate(DATA, None) != done.validate(DATA)


def test_validating_untrained_weights_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path).validate(DATA)
    make(tmp_path).validate_all(DATA)
    assert caplog.text.count(f"no checkpoint in {tmp_path}; validating the weights as they are") == 2
    caplog.clear()
    make(tmp_path).validate(DATA, None)
    fitted(tmp_path).validate(DATA)
    assert "no checkpoint" not in caplog.text


def test_validate_all(tmp_path: Path) -> None:
    done = fitted(tmp_path, checkpoint={"steps": 1, "save_initial_checkpoint": True})
    trainer = make(tmp_path, seed=9)
    found = trainer.validate_all([lambda: DATA, lambda: DATA[:1]], str(tmp_path / "checkpoint_*"))
    assert [Path(path).name for path in found] == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]
    assert all(set(one) == {"eval/0/loss", "eval/1/loss"} for one in found.values())
    assert found[str(tmp_path / "checkpoint_2")]["eval/0/loss"] == done.validate(DATA)["eval/loss"]
    assert list(trainer.validate_all(DATA)) == [str(tmp_path / "checkpoint_2")]
    assert list(trainer.validate_all(DATA, None)) == [""]
    assert list(make(tmp_path / "empty").validate_all(DATA)) == [""]


def test_paths_and_globs(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint_{step}").mkdir()
    names = [path.name for path in find_all([tmp_path / "checkpoint_100", tmp_path / "checkpoint_*"])]
    assert names == ["checkpoint_100", "checkpoint_9", "checkpoint_10", "checkpoint_100"]
    for run in ("run_a", "run_b"):
        (tmp_path / run / "checkpoint_7").mkdir(parents=True)
    several = find_all(str(tmp_path / "run_*" / "checkpoint_7"))
    assert sorted(path.parent.name for path in several) == ["run_a", "run_b"]
    with pytest.raises(CheckpointError, match="matches nothing"):
        find_all(str(tmp_path / "model_*"))


def test_params_and_a_hash_of_them_are_saved(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.params = {"trainer": {"init": {"seed": 2}}}
    trainer.fit(DATA)
    saved = load(tmp_path / "checkpoint_2")
    assert saved.params == trainer.params
    assert len(saved.state["config_hash"]) == 64


def test_a_write_that_fails_ends_the_run_and_keeps_what_was_there(tmp_path: Path) -> None:
    fitted(tmp_path)
    (tmp_path / "file").write_text("in the way")
    trainer = make(tmp_path, loop={"max_steps": 4}, checkpoint={"checkpoint_root": tmp_path / "file"})
    with pytest.raises(RarefyError, match=r"checkpoint_4: cannot be written"):
        trainer.fit(DATA, ckpt_path=tmp_path / "checkpoint_2")
    assert load(tmp_path / "checkpoint_2").state["progress"]["global_step"] == 2


def supar_run(folder: Path, **options) -> Trainer:
    block = {"algorithm": "rigl", "sparsity": 0.75, "update": {"freq": 2}, "parametrization": "supar"}
    sparsity = configure(block, seed=2)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer({"AdamW": {"lr": 0.01}}, model, densities=sparsity.densities)

    return make(folder, sparsity=sparsity, optimizer=optimizer, **options)


def test_supar_goes_on_bit_for_bit_and_scales_no_weight_twice(tmp_path: Path) -> None:
    whole = supar_run(tmp_path / "whole", loop={"max_steps": 6})
    whole.fit(DATA)
    supar_run(tmp_path / "parts", loop={"max_steps": 3}).fit(DATA)
    rest = supar_run(tmp_path / "parts", loop={"max_steps": 6})
    rest.fit(DATA)
    assert rest.global_step == 6
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in rest.model.state_dict().items())


@pytest.mark.parametrize("states", ["all", "model"])
def test_supar_refuses_weights_that_were_not_scaled(tmp_path: Path, states: States) -> None:
    fitted(tmp_path / "dense")
    fitted(tmp_path / "sparse", sparsity=0.75)
    torch.save({"model": Net().state_dict()}, tmp_path / "model.mdl")
    for start in ("dense/checkpoint_2", "sparse/checkpoint_2", "model.mdl"):
        trainer = supar_run(tmp_path / "new", checkpoint=LOOSE)
        with pytest.raises(CheckpointError, match="weights that did not start under parametrization: supar"):
            trainer.fit(DATA, ckpt_path=tmp_path / start, load_states=states)


def test_supar_takes_the_weights_of_another_such_run(tmp_path: Path) -> None:
    supar_run(tmp_path / "first").fit(DATA)
    second = supar_run(tmp_path / "second", loop={"max_steps": 1})
    second.fit(DATA, ckpt_path=tmp_path / "first" / "checkpoint_2", load_states="model")
    assert second.global_step == 1
