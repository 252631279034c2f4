"""Runs whose model does not fit into memory are planned without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_run
from rarefy.errors import ConfigError
from rarefy.run import large_model
from rarefy.run.builder import Builder
from rarefy.run.large_model import flops_of, shared_out, too_large
from rarefy.run.preview import RunPreview, preview
from rarefy.run.schema import parse
from small_decoders import MIXTRAL

DATA = """
import torch


def make_batches():
    ids = torch.arange(40).reshape(4, 10) % 32
    return [{"input_ids": ids, "labels": (ids + 1) % 32}] * 3
"""
SPARSITY = [
    {"algorithm": "rigl", "sparsity": 0.9, "update": {"freq": 2}, "param_filter": "*ffn*linear_layer.weight"},
    {
        "sparsity": 0.5,
        "distribution": "er",
        "balance_out_groups": 4,
        "param_filter": "*proj_[qk]_dense*weight",
    },
]


def builder(folder: Path, model: dict[str, Any] = MIXTRAL, sparsity: Any = SPARSITY) -> Builder:
    content = tiny_run.configuration(folder, sparsity, model=model)
    content["trainer"]["fit"] = {"train_dataloader": {"data_processor": "./data.py:make_batches"}}
    tiny_run.write(folder, content)
    (folder / "data.py").write_text(DATA)
    [config] = parse(content)
    return Builder(config, folder)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_model, "available_bytes", lambda device: 1000)


def test_the_plan_is_that_of_the_model_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: RunPreview = preview(builder(tmp_path))
    monkeypatch.setattr(large_model, "available_bytes", lambda device: 1000)
    planned: RunPreview = preview(builder(tmp_path))
    assert [dataclasses.replace(one, storage="") for one in planned.parameters] == [
        dataclasses.replace(one, storage="") for one in whole.parameters
    ]
    assert (planned.updates, planned.total_steps) == (whole.updates, whole.total_steps)
    assert (
        planned.loss is None and "GiB is free; planned without weights, no step was taken" in planned.problem
    )
    assert 0 < planned.cost.sparse_flops < planned.cost.dense_flops
    assert planned.cost.dense_bytes == pytest.approx(whole.cost.dense_bytes, rel=0.01)


def test_a_model_that_fits_without_the_step_of_a_preview_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = too_large(builder(tmp_path), available=0)
    assert found is not None
    monkeypatch.setattr(large_model, "available_bytes", lambda device: 2 * found.weight_bytes)
    planned: RunPreview = preview(builder(tmp_path))
    assert planned.loss is None and "for its weights, gradients and masks" in planned.problem


def test_nothing_is_allocated(tmp_path: Path) -> None:
    found = too_large(builder(tmp_path), available=1000)
    assert found is not None and all(one.is_meta for one in found.model.parameters())
    assert found.weight_bytes == 4 * sum(one.numel() for one in found.model.parameters())
    assert too_large(builder(tmp_path), available=found.weight_bytes) is None
    of_a_step = too_large(builder(tmp_path), available=3 * found.weight_bytes - 1, copies=3)
    assert "GiB for its weights, gradients and masks, and" in str(of_a_step)
    assert too_large(builder(tmp_path), available=3 * found.weight_bytes, copies=3) is None


def test_the_command_line_plans_it_and_does_not_run_it(tmp_path: Path, little: None) -> None:
    builder(tmp_path)
    result = tiny_run.rarefy("run", tmp_path / "params.yaml", "--validate_only")
    assert result.exit_code == 0, result.output
    assert "planned without weights, no step was taken; the run has 6 steps" in " ".join(
        result.output.split()
    )
    result = tiny_run.rarefy("run", tmp_path / "params.yaml")
    assert result.exit_code == 2
    assert (
        "trainer.init.model: a run on this machine (the model needs 0.0 GiB for its weights" in result.output
    )
    assert not (tmp_path / "out").exists()


def test_operations_of_a_dense_linear_layer(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = builder(tmp_path).model()
    ids = torch.zeros(2, 10, dtype=torch.int64)
    by_weight, whole = flops_of(model, {"input_ids": ids, "labels": ids})
    name = "model.transformer_decoder.layers.0.self_attn.proj_q_dense_layer.weight"
    assert by_weight[name] == 3 * 2 * 20 * 32 * 32 and whole > sum(by_weight.values())


def test_models_of_ones_own_and_devices_that_do_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert too_large(builder(tmp_path, {"name": "./tiny.py:Tiny"}), available=0) is None
    monkeypatch.setattr(large_model, "available_bytes", lambda device: None)
    assert too_large(builder(tmp_path)) is None


@pytest.mark.parametrize(
    ("sparsity", "problem"),
    [
        (
            {"sparsity": 0.5, "param_filter": "*nothing*"},
            r"\*nothing\* \(nothing is left for it\) is not allowed",
        ),
        ({"sparsity": 0.5, "balance_out_groups": 7}, "balance_out_groups"),
    ],
)
def test_filters_and_patterns_are_checked_too(tmp_path: Path, sparsity: Any, problem: str) -> None:
    made = builder(tmp_path, sparsity=sparsity)
    with torch.device("meta"):
        model = made.model()
    assert made.sparsity is not None
    with pytest.raises(ConfigError, match=problem):
        list(shared_out(model, made.sparsity.algorithms))
