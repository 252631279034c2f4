"""Whole runs with compact storage: losses, masks, checkpoints and metrics are those of a masked run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
import tiny_run
from rarefy.callbacks.compute_norm import ComputeNorm
from rarefy.callbacks.events import Logger
from rarefy.callbacks.log_sparsity import LogSparsity
from rarefy.checkpoint.directory import load
from rarefy.kernels import instruction_set
from rarefy.models import GPTConfig, GPTModel
from rarefy.run.builder import Builder
from rarefy.run.preview import preview
from rarefy.run.schema import parse
from rarefy.tensors import SparseWeight
from rarefy.trainer.trainer import Trainer

UPDATE = {"freq": 6}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "static": {"sparsity": 0.8},
    "gmp": {
        "algorithm": "gmp",
        "sparsity": {"type": "polynomial", "init": 0.0, "final": 0.9, "start": 0, "stop": 45},
        "update": UPDATE,
    },
    "set": {"algorithm": "set", "sparsity": 0.8, "update": UPDATE},
    "rigl": {
        "algorithm": "rigl",
        "sparsity": 0.8,
        "update": UPDATE,
        "drop_fraction": {"type": "cosine", "init": 0.4, "half_period": 60},
    },
}
compiled_only = pytest.mark.skipif(
    instruction_set() in ("reference", "v2"), reason="auto never leaves masked storage here"
)


class Recorder(Logger):
    """Keeps every metric by step, and the masks of every checkpoint-worthy moment."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.masks: list[dict[str, torch.Tensor]] = []

    def log(self, trainer: Any, metrics: dict[str, float], step: int) -> None:
        self.metrics.setdefault(step, {}).update(metrics)

    def on_train_batch_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        if trainer.global_step % 6 == 0:
            self.masks.append(masks_of(trainer))

    def values(self, name: str) -> list[float]:
        return [metrics[name] for _, metrics in sorted(self.metrics.items()) if name in metrics]


def masks_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: value.clone() for name, value in trainer.model.state_dict().items() if name.endswith("_mask")
    }


def tiny_gpt() -> GPTModel:
    sizes = {"vocab_size": 24, "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "filter_size": 32}
    rates = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0, "max_position_embeddings": 8}
    return GPTModel(GPTConfig(**{**sizes, **rates})).double()  # type: ignore[arg-type]


def tokens(count: int = 7) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(24, (2, 9), generator=generator) for _ in range(count)]
    return [
        {"input_ids": one[:, :-1], "labels": one[:, 1:], "attention_mask": torch.ones(2, 8).long()}
        for one in ids
    ]


def gpt_run(folder: Path, compute: str, algorithm: str) -> tuple[Trainer, Recorder]:
    recorder = Recorder()
    trainer = Trainer(
        model_dir=folder,
        model=tiny_gpt,
        device="cpu",
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=2e-2, fused=True),
        sparsity={**ALGORITHMS[algorithm], "compute": compute},
        loop={"max_steps": 60},
        checkpoint={"steps": None},
        logging={"log_steps": 1},
        precision={"enabled": False, "max_gradient_norm": 1.0},
        loggers=[recorder],
        seed=5,
    )
    trainer.fit(tokens())
    return trainer, recorder


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sixty_steps_of_a_gpt(tmp_path: Path, algorithm: str) -> None:
    (masked, expected), (compact, found) = (
        gpt_run(tmp_path / compute, compute, algorithm) for compute in ("masked", "compact")
    )
    assert storages(masked) == {"masked"} and storages(compact) == {"compact"}
    assert len(expected.masks) == 10 and len(found.values("loss")) == 60
    for one, other in zip(found.masks, expected.masks, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert found.values("loss") == pytest.approx(expected.values("loss"), rel=1e-9)
    assert found.values("loss")[-1] < 0.8 * found.values("loss")[0]


def storages(trainer: Trainer) -> set[str]:
    assert trainer.sparsity is not None
    return {row.storage for row in rarefy.summary(trainer.sparsity).rows}


# ---- parts of a run ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(12, 16), nn.Dropout(0.2), nn.Linear(16, 12)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.second(self.drop(self.first(batch).relu())) - batch).square().mean()


DATA = [torch.randn(6, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
RIGL = {"algorithm": "rigl", "sparsity": 0.75, "update": {"freq": 3}, "drop_fraction": 0.5}
LOOSE = {"disable_strict_checkpoint_loading": True}


def make(folder: Path, compute: str | None = "compact", steps: int = 12, **options: Any) -> Trainer:
    sparsity = None if compute is None else {**RIGL, "compute": compute}
    defaults = {
        "model": Net,
        "sparsity": sparsity,
        "optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02),
        "loop": {"max_steps": steps, "grad_accum_steps": 2},
        "loggers": [],
        "seed": 3,
    }
    return Trainer(model_dir=folder, device="cpu", **{**defaults, **options})


def fitted(folder: Path, compute: str | None = "compact", steps: int = 12, **options: Any) -> Trainer:
    trainer = make(folder, compute, steps, **options)
    trainer.fit(DATA)
    trainer.writer.wait()
    return trainer


def everything(trainer: Trainer) -> dict[str, Any]:
    saved = trainer.trained_by.state_dict()
    found = dict(trainer.model.state_dict())
    found |= {
        f"{index}.{key}": value for index, state in saved["state"].items() for key, value in state.items()
    }
    return {**found, "topology": torch.tensor(list(saved.get("topology", {}).values()))}


@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_a_resumed_run_is_bit_exact(tmp_path: Path, stop: int) -> None:
    expected = everything(fitted(tmp_path / "whole"))
    fitted(tmp_path / "parts", steps=stop)
    again = fitted(tmp_path / "parts")
    assert again.global_step == 12 and storages(again) == {"compact"}
    found = everything(again)
    assert found.keys() == expected.keys() and len(found["topology"]) == 2
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


@pytest.mark.parametrize("computes", [("masked", "compact"), ("compact", "masked"), ("compact", "auto")])
def test_a_checkpoint_of_the_other_storage(tmp_path: Path, computes: tuple[str, str]) -> None:
    double = {
        "model": lambda: Net().double(),
        "optimizer": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02),
    }
    data, made = [batch.double() for batch in DATA], []
    for name, compute, steps in (
        ("whole", "masked", 12),
        ("parts", computes[0], 5),
        ("parts", computes[1], 12),
    ):
        made.append(make(tmp_path / name, compute, steps, **double))
        made[-1].fit(data)
        made[-1].writer.wait()
    whole, _, second = made
    assert second.global_step == 12
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=1e-9, atol=1e-12)


class Wide(torch.optim.SGD):
    """Keeps a float32 sum for bfloat16 weights."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            total = self.state[parameter].setdefault(
                "total", torch.zeros_like(parameter, dtype=torch.float32)
            )
            total.add_(parameter.grad, alpha=1 / 3)


@pytest.mark.parametrize("computes", [("compact", "compact"), ("masked", "compact"), ("compact", "masked")])
def test_wide_optimizer_states_keep_dtype_and_place(tmp_path: Path, computes: tuple[str, str]) -> None:
    """More than one panel of columns, so that the order of the values is not that of the saved entries."""

    class Broad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(900, 4, dtype=torch.bfloat16)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.body(batch).float().square().mean()

    made = [
        make(
            tmp_path,
            compute,
            1,
            model=Broad,
            optimizer=lambda model: Wide(model.parameters(), lr=1.0),
            sparsity={"sparsity": 0.5, "compute": compute},
            loop={"max_steps": 1},
        )
        for compute in computes
    ]
    for trainer in made:
        trainer.fit([torch.randn(4, 900, generator=torch.Generator().manual_seed(0)).bfloat16()])
        trainer.writer.wait()
    first, second = (trainer.model.body for trainer in made)
    before, after = (
        trainer.trained_by.state[next(layer.parameters())]["total"]
        for trainer, layer in zip(made, (first, second), strict=True)
    )
    assert after.dtype == torch.float32
    dense = [state.dense() if isinstance(state, SparseWeight) else state for state in (before, after)]
    assert torch.equal(*dense) and dense[0].any()


def test_a_sparse_checkpoint_is_fine_tuned_dense(tmp_path: Path) -> None:
    sparse = fitted(tmp_path / "sparse")
    saved = load(tmp_path / "sparse" / "checkpoint_12").model
    dense = make(tmp_path / "dense", None, checkpoint=LOOSE, loop={"num_steps": 1})
    dense.trained_by.param_groups[0]["lr"] = 0.0
    dense.fit(DATA, ckpt_path=tmp_path / "sparse" / "checkpoint_12")
    assert torch.equal(dense.model.get_parameter("first.weight"), saved["first.weight"])
    assert torch.equal(sparse.model.state_dict()["first.weight"], saved["first.weight"])


def test_a_dense_checkpoint_is_trained_compact(tmp_path: Path) -> None:
    results = []
    fitted(tmp_path / "dense", None)
    for compute in ("masked", "compact"):
        block = {**RIGL, "compute": compute, "init_method": "topk"}
        trainer = make(tmp_path / compute, sparsity=block, checkpoint=LOOSE, loop={"num_steps": 7})
        trainer.fit(DATA, ckpt_path=tmp_path / "dense" / "checkpoint_12")
        assert storages(trainer) == {compute} and trainer.global_step == 7
        results.append(trainer.model.state_dict())
    torch.testing.assert_close(results[1], results[0])


def test_metrics_have_the_names_and_values_of_a_masked_run(tmp_path: Path) -> None:
    found = []
    # How fast it is, and what it holds in memory.
    differing = ("per_second", "weights/sparse", "gradients/sparse", "states/sparse")
    for compute in ("masked", "compact"):
        recorder = Recorder()
        callbacks = [LogSparsity(), ComputeNorm()]
        logging = {"log_steps": 1}
        fitted(tmp_path / compute, compute, callbacks=callbacks, loggers=[recorder], logging=logging)
        found.append(
            {
                step: {name: value for name, value in metrics.items() if not name.endswith(differing)}
                for step, metrics in recorder.metrics.items()
            }
        )
    masked, compact = found
    assert any("first.weight" in name for name in compact[12])
    assert not any("values" in name for metrics in compact.values() for name in metrics)
    for step, metrics in masked.items():
        assert compact[step] == pytest.approx(metrics, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "precision",
    [
        {"fp16_type": "bfloat16"},
        {"fp16_type": "float16", "loss_scaling_factor": "dynamic", "initial_loss_scale": 8.0},
        {"enabled": False, "max_gradient_norm": 0.05},
        {"enabled": False, "max_gradient_value": 0.01},
    ],
)
def test_precision_and_clipping(tmp_path: Path, precision: dict[str, Any]) -> None:
    losses = []
    for compute in ("masked", "compact"):
        recorder = Recorder()
        logging = {"log_steps": 1}
        fitted(tmp_path / compute, compute, precision=precision, loggers=[recorder], logging=logging)
        losses.append(recorder.values("loss"))
    half = precision.get("fp16_type") is not None
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if half else 1e-4)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize(
    "precision", [None, {"fp16_type": "float16", "loss_scaling_factor": "dynamic", "initial_loss_scale": 8.0}]
)
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, precision: dict[str, Any] | None) -> None:
    """Also not the dense gradient of the update step that is repeated after it."""
    trainer = make(tmp_path, precision=precision, loop={"num_steps": 2})
    trainer.fit(DATA)
    assert trainer.sparsity is not None
    before = {name: value.clone() for name, value in everything(trainer).items()}
    trainer.fit([torch.full((6, 12), torch.nan)], ckpt_path=None)
    found = everything(trainer)
    assert [name for name, value in before.items() if not torch.equal(value, found[name])] == []
    assert trainer.sparsity.algorithms[0].step == 2 and trainer.progress.skipped.total == 2
    masks = masks_of(trainer)
    trainer.fit(DATA, ckpt_path=None)
    after = masks_of(trainer)
    assert not all(torch.equal(mask, after[name]) for name, mask in masks.items())


def test_several_trainers_in_a_file(tmp_path: Path) -> None:
    content = tiny_run.configuration(tmp_path, {**tiny_run.SPARSITY["rigl"], "compute": "compact"})
    init = {**content["trainer"]["init"], "sparsity": None, "checkpoint": LOOSE, "loop": {"num_steps": 2}}
    sparse = tmp_path / "out" / "checkpoint_6"
    second = {"init": {**init, "model_dir": str(tmp_path / "fine")}, "fit": dict(content["trainer"]["fit"])}
    second["fit"]["ckpt_path"] = str(sparse)
    tiny_run.write(tmp_path, {"trainer": [{"trainer": content["trainer"]}, {"trainer": second}]})
    result = tiny_run.rarefy("run", tmp_path / "params.yaml")
    assert result.exit_code == 0, result.output
    first, last = load(sparse).model, load(tmp_path / "fine" / "checkpoint_2").model
    assert "middle.weight_mask" in first and "middle.weight_mask" not in last
    assert first["middle.weight_mask"].sum() == 64 < last["middle.weight"].count_nonzero()


# ---- the plan of a run ---------------------------------------------------------------------------------------------


def previewed(folder: Path, compute: str, **block: Any) -> Any:
    sparsity = {
        **tiny_run.SPARSITY["rigl"],
        "compute": compute,
        "param_filter": ["body.weight", "middle.weight"],
    }
    model = {"name": "./tiny.py:Tiny", "width": 96}
    content = tiny_run.configuration(folder, {**sparsity, **block}, model=model)
    tiny_run.write(folder, content)
    return preview(Builder(parse(content)[0], folder))


@pytest.mark.parametrize(
    "block", [{}, {"update": {"freq": 1}}, {"sparsity": [0.5, 0.95], "update": {"freq": 1}}]
)
def test_the_plan_of_a_compact_run(tmp_path: Path, block: dict[str, Any]) -> None:
    masked, compact = (previewed(tmp_path, compute, **block) for compute in ("masked", "compact"))
    assert {plan.storage for plan in compact.parameters} == {"compact", "dense"}
    assert compact.loss == pytest.approx(masked.loss)
    assert compact.cost.dense_flops == masked.cost.dense_flops
    assert compact.cost.sparse_flops == masked.cost.sparse_flops < compact.cost.dense_flops
    assert compact.cost.dense_bytes == masked.cost.dense_bytes
    assert compact.cost.stored_bytes < compact.cost.dense_bytes < masked.cost.stored_bytes


def test_the_plan_of_a_run_without_active_connections(tmp_path: Path) -> None:
    masked, compact = (previewed(tmp_path, compute, sparsity=0.99999) for compute in ("masked", "compact"))
    assert compact.cost.dense_bytes == masked.cost.dense_bytes
    assert compact.cost.dense_flops == masked.cost.dense_flops


@compiled_only
def test_the_plan_counts_what_auto_gave_up_after_a_look_at_the_tokens(tmp_path: Path) -> None:
    """512 tokens are assumed before the first step; here come 4."""
    model = {"name": "./tiny.py:Tiny", "width": 256}
    costs = []
    for compute in ("masked", "auto"):
        sparsity = {"sparsity": 0.95, "compute": compute}
        content = tiny_run.configuration(tmp_path, sparsity, model=model)
        tiny_run.write(tmp_path, content)
        costs.append(preview(Builder(parse(content)[0], tmp_path)).cost)
    assert costs[0] == costs[1]


def test_validate_only_shows_the_storage(tmp_path: Path) -> None:
    content = tiny_run.configuration(tmp_path, {"sparsity": 0.75, "compute": "compact"})
    path = tiny_run.write(tmp_path, content)
    result = tiny_run.rarefy("run", path, "--validate_only")
    assert result.exit_code == 0, result.output
    assert "compact" in result.output and "masked" not in result.output
