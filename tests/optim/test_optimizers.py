"""The `optimizer:` block."""

import pytest
import torch
from torch import nn

from rarefy.errors import ConfigError
from rarefy.optim.optimizers import build_optimizer, parameter_groups


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.pos_embedding = nn.Parameter(torch.ones(3, 4))
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.batch = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_names_in_any_case_and_import_paths() -> None:
    model = nn.Linear(2, 2)
    assert type(build_optimizer({"adamw": {}}, model)) is torch.optim.AdamW
    assert type(build_optimizer({"SGD": {"lr": 0.1}}, model)) is torch.optim.SGD
    assert type(build_optimizer({"torch.optim:Adagrad": None}, model)) is torch.optim.Adagrad


def test_options_of_the_model_zoo() -> None:
    options = {
        "betas": [0.9, 0.95],
        "eps": 1e-6,
        "correct_bias": True,
        "weight_decay": 0.1,
        "learning_rate": 0.5,
    }
    optimizer = build_optimizer({"AdamW": options}, nn.Linear(2, 2))
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["eps"] == 1e-6
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.5, 0.1),
        (0.5, 0.0),
    ]


def test_bias_norms_and_embeddings_have_no_weight_decay() -> None:
    model = Decoder()
    decayed, others = parameter_groups(model)
    assert [id(one) for one in decayed["params"]] == [id(model.proj.weight)]
    exempt = [model.embed.weight, model.pos_embedding, model.proj.bias]
    exempt += [model.norm.weight, model.norm.bias, model.batch.weight, model.batch.bias]
    assert {id(one) for one in others["params"]} == {id(one) for one in exempt}
    assert others["weight_decay"] == 0.0


def test_one_group_where_weight_decay_is_unknown() -> None:
    optimizer = build_optimizer({"Rprop": {}}, Decoder())
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == 8


def test_learning_rate_of_the_schedulers_fills_the_gap() -> None:
    model = nn.Linear(2, 2)
    assert build_optimizer({"SGD": {}}, model, learning_rate=0.25).defaults["lr"] == 0.25
    assert build_optimizer({"SGD": {"lr": 0.5}}, model, learning_rate=0.25).defaults["lr"] == 0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "optimizer: null is not allowed; give a map from one optimizer to its options"),
        ({}, "optimizer: {}"),
        ({"SGD": {}, "Adam": {}}, "optimizer: {'SGD'"),
        ({"SGD": 0.1}, "optimizer.SGD: 0.1"),
        ({"AdmaW": {}}, "did you mean AdamW?"),
        ({"LBFGS": {}}, "optimizer: LBFGS"),
        (
            {"SGD": {"momentun": 0.9}},
            "optimizer.SGD: the key 'momentun' is not allowed; give a known key (did you mean momentum?)",
        ),
        ({"SGD": {"params": []}}, "optimizer.SGD: the key 'params'"),
        ({"SGD": {"lr": -1.0}}, "optimizer.SGD: {'lr': -1.0} is not allowed; give what SGD takes"),
        (
            {"AdamW": {"betas": [0.9]}},
            "optimizer.AdamW: {'betas': (0.9,)} is not allowed; give what AdamW takes",
        ),
        ({"SGD": {"lr": 1.0, "learning_rate": 1.0}}, "optimizer.SGD: learning_rate beside lr"),
        ({"AdamW": {"correct_bias": False}}, "optimizer.AdamW.correct_bias: false"),
        ({"no_such_module_at_all:Thing": {}}, "no_such_module_at_all"),
        ({"builtins:list": {}}, "something that returns a torch.optim.Optimizer"),
    ],
)
def test_bad_blocks_are_named(config: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_optimizer(config, nn.Linear(2, 2))
    assert message in str(error.value)


def test_import_paths_may_be_refused() -> None:
    with pytest.raises(ConfigError, match="imports are off"):
        build_optimizer({"torch.optim:SGD": {}}, nn.Linear(2, 2), allow_imports=False)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="a model without trainable parameters"):
        build_optimizer({"SGD": {}}, nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("config", "fused"),
    [
        ({"AdamW": {}}, True),
        ({"SGD": {"lr": 0.1}}, True),
        ({"AdamW": {"foreach": True}}, None),
        ({"AdamW": {"fused": False}}, False),
        ({"NAdam": {}}, None),
    ],
)
def test_the_fused_step_is_taken_unless_another_is_asked_for(config: object, fused: bool | None) -> None:
    optimizer = build_optimizer(config, nn.Linear(2, 2))
    assert optimizer.param_groups[0].get("fused") is fused
