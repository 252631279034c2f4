"""Learning rates that are scaled by groups of parameters."""

import pytest
import torch
from torch import nn

from rarefy.errors import ConfigError
from rarefy.models import build_model
from rarefy.optim.optimizers import build_optimizer
from rarefy.optim.schedulers import build_schedulers

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_heads": 4,
    "num_hidden_layers": 1,
    "filter_size": 24,
    "max_position_embeddings": 8,
}
MUP = {"mup_base_hidden_size": 8, "mup_base_filter_size": 8}
WARMUP = {"LinearLR": {"initial_learning_rate": 0.0, "end_learning_rate": 1.0, "total_iters": 10}}


def rates(model, optimizer):
    found = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: found[parameter] for name, parameter in model.named_parameters()}


def rate_of(model, optimizer, part):
    found = {rate for name, rate in rates(model, optimizer).items() if part in name}
    assert len(found) == 1
    return found.pop()


def test_mup_divides_the_rates_of_what_is_wider():
    model = build_model({"name": "gpt3", **SMALL, **MUP})
    optimizer = build_optimizer({"AdamW": {"lr": 0.6, "weight_decay": 0.1}}, model)
    assert rate_of(model, optimizer, "embedding") == 0.6
    assert rate_of(model, optimizer, "norm") == 0.6
    assert rate_of(model, optimizer, "dense_layer.weight") == 0.3
    assert rate_of(model, optimizer, "dense_layer.bias") == 0.6
    assert rate_of(model, optimizer, "ffn.0.linear_layer.weight") == 0.3
    assert rate_of(model, optimizer, "ffn.1.linear_layer.weight") == pytest.approx(0.2)


def test_without_mup_there_are_two_groups():
    model = build_model({"name": "gpt3", **SMALL})
    assert len(build_optimizer({"AdamW": {"lr": 0.6}}, model).param_groups) == 2


def test_the_older_group_of_all_kernels():
    model = build_model({"name": "gpt3", **SMALL})
    options = {"lr": 0.6, "adjust_learning_rate": {"decoder_kernel": 0.5}}
    optimizer = build_optimizer({"AdamW": options}, model)
    assert rate_of(model, optimizer, "layer.weight") == 0.3
    assert rate_of(model, optimizer, "embedding") == 0.6
    assert options["adjust_learning_rate"] == {"decoder_kernel": 0.5}


def test_a_file_overrides_the_factors_of_mup():
    model = build_model({"name": "gpt3", **SMALL, **MUP})
    options = {"lr": 0.6, "adjust_learning_rate": {"decoder_attention": 1.0, "embedding": 2}}
    optimizer = build_optimizer({"AdamW": options}, model)
    assert rate_of(model, optimizer, "dense_layer.weight") == 0.6
    assert rate_of(model, optimizer, "word_embeddings") == 1.2


def test_experts_are_scaled_as_feed_forward_parts():
    for layout in ("experimental", "functional", "optimized"):
        moe = {"num_experts": 2, "moe_implementation": layout}
        model = build_model({"name": "mixtral", **SMALL, **MUP, "moe": moe})
        optimizer = build_optimizer({"AdamW": {"lr": 0.6}}, model)
        leaf = "expert_weights" if layout == "optimized" else "weight"
        assert rate_of(model, optimizer, f".0.linear_layer.{leaf}") == 0.3
        assert rate_of(model, optimizer, f".1.linear_layer.{leaf}") == pytest.approx(0.2)


@pytest.mark.parametrize("wrapped", [WARMUP, {"ScalePerParamLR": {"scheduler": WARMUP}}])
def test_schedules_keep_to_the_factors_also_after_loading(wrapped):
    model = build_model({"name": "gpt3", **SMALL, **MUP})
    optimizer = build_optimizer({"SGD": {}}, model, learning_rate=0.0)
    [scheduler] = build_schedulers([wrapped], optimizer)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert rate_of(model, optimizer, "dense_layer.weight") == pytest.approx(0.2)
    assert rate_of(model, optimizer, "embedding") == pytest.approx(0.4)
    other = build_optimizer({"SGD": {}}, model, learning_rate=0.0)
    [resumed] = build_schedulers([wrapped], other)
    resumed.load_state_dict(scheduler.state_dict())
    assert rates(model, other) == rates(model, optimizer)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([None], "adjust_learning_rate: [null] is not allowed; give a map from a group"),
        (3, "adjust_learning_rate: 3 is not allowed; give a map from a group"),
        (
            {"decoder_kernl": 1.0},
            "the group 'decoder_kernl' is not allowed; give a group of the model (did you mean decoder_kernel?)",
        ),
        ({"embedding": 0}, "adjust_learning_rate.embedding: 0 is not allowed; give a number above 0"),
        ({"embedding": True}, "adjust_learning_rate.embedding: true is not allowed"),
    ],
)
def test_factors_that_are_not_allowed(given, expected):
    model = build_model({"name": "gpt3", **SMALL})
    with pytest.raises(ConfigError) as error:
        build_optimizer({"AdamW": {"adjust_learning_rate": given}}, model)
    assert expected in str(error.value)


def test_a_model_without_groups():
    with pytest.raises(ConfigError, match="this model has none"):
        build_optimizer({"AdamW": {"adjust_learning_rate": {"a": 1.0}}}, nn.Linear(2, 2))


def test_an_optimizer_without_a_rate_in_numbers():
    class NoRate(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=1.0)

    model = build_model({"name": "gpt3", **SMALL, **MUP})
    NoRate.__module__ = __name__
    globals()["NoRate"] = NoRate
    with pytest.raises(ConfigError, match="an optimizer with a learning rate in numbers"):
        build_optimizer({f"{__name__}:NoRate": {}}, model)


@pytest.mark.parametrize("options", [{}, {"scheduler": WARMUP, "more": 1}])
def test_what_scale_per_param_takes(options):
    with pytest.raises(ConfigError, match=r"ScalePerParamLR: .* a map with the one key scheduler"):
        build_schedulers([{"ScalePerParamLR": options}], torch.optim.SGD([nn.Parameter(torch.ones(1))]))
