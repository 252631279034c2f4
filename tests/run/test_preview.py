"""The plan of a run, worked out without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_run
from rarefy.errors import ConfigError
from rarefy.run.builder import Builder
from rarefy.run.preview import ParameterPlan, RunPreview, preview
from rarefy.run.schema import parse
from tiny_run import configuration


def previewed(folder: Path, **init: Any) -> RunPreview:
    content = configuration(folder, **init)
    tiny_run.write(folder, content)
    return preview(Builder(parse(content)[0], folder))


def of(shown: RunPreview, name: str) -> ParameterPlan:
    return next(plan for plan in shown.parameters if plan.name == name)


def stages(plan: ParameterPlan) -> list[tuple[int, float, int]]:
    return [(stage.step, round(stage.target, 6), stage.kept) for stage in plan.stages]


def test_static(tmp_path: Path) -> None:
    shown = previewed(tmp_path, sparsity=0.75)
    assert [plan.name for plan in shown.parameters][:2] == ["body.weight", "body.bias"]
    weight, bias = of(shown, "middle.weight"), of(shown, "middle.bias")
    assert stages(weight) == [(0, 0.75, 64)] * 3
    assert (weight.shape, weight.reason, weight.algorithm) == (
        (16, 16),
        "default filter: weight of a Linear",
        "static",
    )
    assert (weight.structure, weight.storage) == ("unstructured", "masked")
    assert (bias.reason, bias.stages, bias.storage) == ("fewer than two dimensions", (), "dense")
    assert [(plan.first, plan.last, plan.count) for plan in shown.updates] == [(None, None, 0)]
    assert shown.total_steps == 6
    assert not (tmp_path / "out").exists()


def test_a_dense_run(tmp_path: Path) -> None:
    content = configuration(tmp_path)
    content["trainer"]["init"]["sparsity"] = None
    tiny_run.write(tmp_path, content)
    shown = preview(Builder(parse(content)[0], tmp_path))
    assert {plan.reason for plan in shown.parameters} == {"the run is dense"}
    assert shown.updates == ()
    assert shown.cost.sparse_flops == shown.cost.dense_flops > 0
    assert shown.cost.stored_bytes == shown.cost.dense_bytes


def test_schedules_and_update_steps(tmp_path: Path) -> None:
    gmp = {
        "algorithm": "gmp",
        "sparsity": {"type": "linear", "init": 0.0, "slope": 0.125},
        "update": {"freq": 2, "start": 2},
    }
    shown = previewed(tmp_path, sparsity=gmp, loop={"max_steps": 7})
    assert stages(of(shown, "middle.weight")) == [(0, 0.0, 256), (2, 0.25, 192), (6, 0.75, 64)]
    assert [(plan.first, plan.last, plan.count) for plan in shown.updates] == [(2, 6, 3)]


def test_cycling_counts_updates(tmp_path: Path) -> None:
    block = {"algorithm": "set", "sparsity": [0.25, 0.5, 0.75], "update": {"freq": 2}}
    shown = previewed(tmp_path, sparsity=block, loop={"max_steps": 4})
    assert [target for _, target, _ in stages(of(shown, "middle.weight"))] == [0.25, 0.5, 0.75]


def test_groups_and_filters(tmp_path: Path) -> None:
    block = [
        {"sparsity": 0.5, "param_filter": "middle.*t", "balance_out_groups": 16},
        {"algorithm": "set", "sparsity": 0.9, "param_filter": ["body.weight", "head.weight"]},
    ]
    shown = previewed(tmp_path, sparsity=block)
    middle, head, bias = (of(shown, name) for name in ("middle.weight", "head.weight", "head.bias"))
    assert (middle.reason, middle.structure, middle.stages[0].kept) == (
        "middle.*t",
        "balance_out_groups: 16",
        128,
    )
    assert (head.reason, head.algorithm, head.stages[0].kept) == ("head.weight", "set", 2)
    assert bias.reason == "no glob matches"


@pytest.mark.parametrize(
    "block",
    [
        {"sparsity": 0.77, "balance_in_groups": 8},
        {"sparsity": 0.625, "pattern": {"n": 3, "m": 8}},
        {"sparsity": 0.77, "pattern": {"block": [1, 4]}, "balance_in_groups": 2},
        {"algorithm": "set", "sparsity": 0.77, "distribution": "erk"},
        {"sparsity": 0.9, "distribution": "er", "pattern": {"block": [1, 2]}},
    ],
)
def test_the_kept_count_is_exact(tmp_path: Path, block: dict[str, Any]) -> None:
    content = configuration(tmp_path, sparsity=block)
    tiny_run.write(tmp_path, content)
    builder = Builder(parse(content)[0], tmp_path)
    planned = {plan.name: plan.stages[0].kept for plan in preview(builder).parameters if plan.stages}
    sparsity = Builder(parse(content)[0], tmp_path).trainer().sparsity
    assert sparsity is not None
    [algorithm] = sparsity.algorithms
    assert planned == {name: int(one.mask.sum()) for name, one in algorithm.parameters.items()}


def test_n_of_m_from_below(tmp_path: Path) -> None:
    schedule = {"type": "polynomial", "init": 0.25, "final": 0.5, "start": 0, "stop": 4}
    block = {"algorithm": "gmp", "sparsity": schedule, "update": {"freq": 4}, "pattern": {"n": 2, "m": 4}}
    middle = of(previewed(tmp_path, sparsity=block), "middle.weight")
    assert stages(middle) == [(0, 0.25, 192), (4, 0.5, 128), (4, 0.5, 128)]
    assert middle.structure == "{n: 2, m: 4}"


def test_targets_of_a_distribution(tmp_path: Path) -> None:
    shown = previewed(tmp_path, sparsity={"sparsity": 0.9, "distribution": "erk"})
    body, middle, head = (of(shown, f"{name}.weight") for name in ("body", "middle", "head"))
    assert head.stages[0].target < body.stages[0].target < middle.stages[0].target
    assert abs(sum(plan.stages[0].kept for plan in (body, middle, head)) - 40) <= 1


OWN_WEIGHTS = """
import torch
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(16, 8))
        self.w2 = nn.Parameter(torch.randn(4, 16))
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, batch):
        x = torch.tanh(batch["x"] @ self.w1.t()) @ self.w2.t() + self.bias
        return self.attention(x[None], x[None], x[None])[0].square().mean()
"""


def test_the_cost_of_each_weight_is_its_own(tmp_path: Path) -> None:
    """Weights of one module shared what all of them cost: twice 90% of it was more than there is."""
    (tmp_path / "own.py").write_text(OWN_WEIGHTS)
    block = {"sparsity": 0.5, "param_filter": ["w*", "bias", "attention.*weight"]}
    cost = previewed(tmp_path, sparsity=block, model={"name": "./own.py:Two"}).cost
    first, second = 4 * 16 * 8, 4 * 4 * 16
    projections = 4 * 4 * 4 * 4
    scores = 2 * 4 * 4 * 4
    assert cost.dense_flops == 2 * (2 * first + 3 * (second + projections + scores))
    assert cost.dense_flops - cost.sparse_flops == 2 * first + 3 * (second + projections)


def test_cost(tmp_path: Path) -> None:
    cost = previewed(tmp_path, sparsity={"sparsity": 0.75, "param_filter": "middle.weight"}).cost
    forward = 2 * 4 * (8 * 16 + 16 * 16 + 16)
    backward = forward + 2 * 4 * (16 * 16 + 16)
    assert cost.dense_flops == forward + backward
    assert cost.sparse_flops == cost.dense_flops - 0.75 * 3 * 2 * 4 * 16 * 16
    size = 8 * 16 + 16 + 16 * 16 + 16 + 16 + 1
    counters = 6 * 4
    assert cost.dense_bytes == 4 * 4 * size + counters
    assert cost.stored_bytes == cost.dense_bytes + 16 * 16


def test_a_batch_that_the_model_refuses_is_found(tmp_path: Path) -> None:
    content = configuration(tmp_path)
    tiny_run.write(tmp_path, content)
    code = tmp_path / "tiny.py"
    code.write_text(code.read_text().replace('"y": x.sum(1, keepdim=True)', '"y": "no"'))
    with pytest.raises(TypeError):
        preview(Builder(parse(content)[0], tmp_path))


def test_a_file_without_fit(tmp_path: Path) -> None:
    content = configuration(tmp_path)
    del content["trainer"]["fit"]
    with pytest.raises(ConfigError, match=r"trainer\.fit: a missing value is not allowed"):
        preview(Builder(parse(content)[0], tmp_path))
