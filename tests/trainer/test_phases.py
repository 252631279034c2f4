"""Dense → sparse → denser → dense, as a list of trainers and by one schedule; optimizer state is kept or reset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
import tiny_run
from rarefy.callbacks.events import Callback
from rarefy.checkpoint.directory import load
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.mask_names import mask_names
from rarefy.errors import ConfigError

DENSER = {"algorithm": "rigl", "sparsity": 0.25, "update": {"steps": [1]}}
BLOCKS: list[Any] = [None, {"sparsity": 0.75, "init_method": "topk"}, DENSER, None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.head(torch.relu(self.body(x))) - x.sum(1, keepdim=True)).square().mean()


class AtStart(Callback):
    """The optimizer's dense state of `body.weight`, its learning rate and the masks before the first step."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}
        self.rate = 0.0

    def on_train_start(self, trainer: Any) -> None:
        own = trainer.optimizer.state.get(trainer.model.body.weight, {})
        self.state = {key: dense(one) for key, one in own.items()}
        self.rate = trainer.optimizer.param_groups[0]["lr"]


def dense(tensor: Any) -> torch.Tensor:
    return (tensor.dense() if hasattr(tensor, "dense") else tensor).clone()


def data() -> list[torch.Tensor]:
    return list(torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0)))


def phase(
    folder: Path, block: Any, start: Path | None, states: Any, compute: str, rate: float = 0.01
) -> AtStart:
    seen = AtStart()
    block = {**block, "compute": compute} if block else None
    trainer = rarefy.Trainer(
        model_dir=folder,
        model=Net,
        device="cpu",
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=rate),
        sparsity=block,
        loop={"num_steps": 3, "eval_frequency": 0},
        callbacks=[seen],
        loggers=[],
        seed=2,
    )
    trainer.fit(data(), ckpt_path=start, load_states=states)
    return seen


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_state_is_kept_where_connections_are(tmp_path, compute):
    start: Path | None = None
    for number, block in enumerate(BLOCKS):
        folder = tmp_path / str(number)
        seen = phase(
            folder, block, start, "model,optimizer" if start else "all", compute, 0.01 / (number + 1)
        )
        assert seen.rate == 0.01 / (number + 1)
        if start is not None:
            before = load(start)
            kept = dense_state(before)
            mask = mask_at_start(block, before)
            torch.testing.assert_close(seen.state["exp_avg"], kept * mask, rtol=0, atol=0)
            assert seen.state["step"] == 3 * number
        start = folder / "checkpoint_3"


def dense_state(parts: Any) -> torch.Tensor:
    """exp_avg of `body.weight` in the shape of the weight, however it was saved."""
    saved = parts.optimizer["state"][0]["exp_avg"]
    names = mask_names(parts.model)
    if saved.shape == (16, 8):
        return saved
    mask = parts.model[names["body.weight"]]
    return torch.zeros(16, 8).masked_scatter(mask, saved)


def mask_at_start(block: Any, parts: Any) -> torch.Tensor:
    names = mask_names(parts.model)
    if block is None:
        return torch.ones(16, 8)
    if "body.weight" in names:
        return parts.model[names["body.weight"]].float()
    weight = parts.model["body.weight"].abs()
    return (weight >= weight.flatten().topk(32).values[-1]).float()


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_state_is_reset(tmp_path, compute):
    phase(tmp_path / "a", BLOCKS[1], None, "all", compute)
    assert phase(tmp_path / "b", DENSER, tmp_path / "a" / "checkpoint_3", "model", compute).state == {}


def test_what_cannot_be_kept(tmp_path):
    phase(tmp_path / "a", None, None, "all", "masked")
    start = tmp_path / "a" / "checkpoint_3"
    options: dict[str, Any] = {"model": Net, "device": "cpu", "loggers": [], "loop": {"num_steps": 1}}

    def fit(make: Any, ckpt: Path) -> None:
        trainer = rarefy.Trainer(model_dir=tmp_path / "b", optimizer=make, **options)
        trainer.fit(data(), ckpt_path=ckpt, load_states="model,optimizer")

    with pytest.raises(
        CheckpointError, match="has the state of AdamW, but this run uses SGD; give the same optimizer"
    ):
        fit(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), start)
    with pytest.raises(
        CheckpointError, match=r"has an optimizer of \[4\] parameters in its groups, but .* one of \[2\]"
    ):
        fit(lambda model: torch.optim.AdamW(model.body.parameters()), start)
    torch.save(Net().state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="has no optimizer state, but this run uses AdamW"):
        fit(lambda model: torch.optim.AdamW(model.parameters()), tmp_path / "model.pt")


def test_a_file_of_four_phases(tmp_path):
    entries = []
    for number, block in enumerate(BLOCKS):
        content = tiny_run.configuration(tmp_path, block, model_dir=str(tmp_path / str(number)))
        init = content["trainer"]["init"]
        init["loop"] = {"num_steps": 3}
        if block is None:
            del init["sparsity"]
        if number:
            states = "model" if number == 3 else "model,optimizer"
            init["callbacks"] = [{"LoadCheckpointStates": {"load_checkpoint_states": states}}]
        entries.append(content)
    path = tiny_run.write(tmp_path, {"trainer": entries})
    result = tiny_run.rarefy("run", path, "-m", "train")
    assert result.exit_code == 0, result.output
    found = [load(tmp_path / str(number) / "checkpoint_3") for number in range(4)]
    counts = [{int(one.model[name].sum()) for name in mask_names(one.model).values()} for one in found]
    assert counts[0] == counts[3] == set()
    assert counts[1] == {32, 64, 4} and counts[2] == {96, 192, 12}
    steps = [int(one.optimizer["state"][0]["step"]) for one in found]
    assert steps == [3, 6, 9, 3]
    assert tiny_run.rarefy("run", path, "-m", "train").exit_code == 0


@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("steps", [[0, 3, 6, 9], ["0%", "25%", "50%", "75%"]])
def test_one_schedule(tmp_path, compute, steps):
    block = {
        "algorithm": "gmp",
        "sparsity": [0.0, 0.75, 0.5, 0.0],
        "update": {"steps": steps},
        "compute": compute,
    }
    heard: list[tuple[int, float]] = []

    class Listens(Callback):
        def on_train_batch_end(self, trainer: Any, metrics: Any) -> None:
            [algorithm] = trainer.sparsity.algorithms
            heard.append((trainer.global_step, algorithm.parameters["body.weight"].actual_sparsity))

    trainer = rarefy.Trainer(
        model_dir=tmp_path,
        model=Net,
        device="cpu",
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        sparsity=block,
        loop={"max_steps": 12, "eval_frequency": 0},
        callbacks=[Listens()],
        loggers=[],
        seed=2,
    )
    trainer.fit(data())
    assert [share for _, share in heard] == [0.0] * 2 + [0.75] * 3 + [0.5] * 3 + [0.0] * 4


def test_unknown_states():
    from rarefy.cli.overrides import Flags, states_to_load

    assert states_to_load(Flags(load_checkpoint_states="model,optimizer")) == "model,optimizer"
    assert states_to_load(Flags()) == "all"
    with pytest.raises(ConfigError, match="give all, model or model,optimizer"):
        states_to_load(Flags(load_checkpoint_states="optimizer"))
