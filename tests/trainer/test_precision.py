"""Autocast, loss scaling and clipping: unscale, clip, step."""

import math

import pytest
import torch
from torch import nn

from rarefy.errors import ConfigError
from rarefy.storage.optimizer_traits import trained_parameters
from rarefy.trainer.precision import Precision, PrecisionConfig, gradient_norm
from rarefy.validation.block import read_block

CPU = torch.device("cpu")


def precision(**options) -> Precision:
    return Precision(PrecisionConfig(**options), CPU)


def learner(value: float = 1.0) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.tensor([value, value]))
    return weight, torch.optim.SGD([weight], lr=1.0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bfloat16", torch.bfloat16), ("cbfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_forward_runs_in_the_16_bit_format(name: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 2)
    with precision(fp16_type=name).autocast():
        assert layer(torch.ones(1, 2)).dtype == dtype
    with precision(enabled=False, fp16_type=name).autocast():
        assert layer(torch.ones(1, 2)).dtype == torch.float32


def test_default_format_is_bfloat16() -> None:
    assert PrecisionConfig().dtype == torch.bfloat16


def test_a_constant_scale_is_taken_out_again() -> None:
    weight, optimizer = learner()
    scaled = precision(loss_scaling_factor=256.0)
    scaled.backward((weight * torch.tensor([1.0, 2.0])).sum())
    assert weight.grad is not None and weight.grad.tolist() == [256.0, 512.0]
    scaled.unscale(optimizer)
    assert weight.grad.tolist() == [1.0, 2.0]
    assert scaled.scale == 256.0


def test_dynamic_scale_shrinks_on_a_skipped_step_and_survives_a_checkpoint() -> None:
    weight, optimizer = learner()
    dynamic = precision(fp16_type="float16", loss_scaling_factor="dynamic", initial_loss_scale=8.0)
    dynamic.backward((weight * torch.inf).sum())
    dynamic.unscale(optimizer)
    dynamic.skip()
    assert dynamic.scale == 4.0
    fresh = precision(fp16_type="float16", loss_scaling_factor="dynamic")
    fresh.load_state_dict(dynamic.state_dict())
    assert fresh.scale == 4.0


def test_dynamic_scale_grows_after_good_steps() -> None:
    weight, optimizer = learner()
    dynamic = precision(
        fp16_type="float16", loss_scaling_factor="dynamic", initial_loss_scale=8.0, steps_per_increase=2
    )
    for _ in range(2):
        optimizer.zero_grad()
        dynamic.backward(weight.sum())
        dynamic.unscale(optimizer)
        dynamic.step(optimizer)
    assert dynamic.scale == 16.0
    assert weight.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("options", [{"fp16_type": "bfloat16"}, {"fp16_type": "float16", "enabled": False}])
def test_dynamic_scale_is_for_float16_only(options: dict) -> None:
    plain = precision(loss_scaling_factor="dynamic", **options)
    assert plain.scaler is None and plain.scale == 1.0 and plain.state_dict() == {}
    plain.load_state_dict({"scale": 3.0})
    assert plain.scale == 1.0


def test_clipping_by_norm_and_by_value() -> None:
    weight, optimizer = learner()
    weight.grad = torch.tensor([3.0, 4.0])
    norm = gradient_norm(trained_parameters(optimizer))
    assert norm.item() == 5.0
    precision(max_gradient_norm=10.0).clip(optimizer, norm)
    assert weight.grad.tolist() == [3.0, 4.0]
    precision(max_gradient_norm=1.0).clip(optimizer, norm)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))
    precision(max_gradient_value=0.7).clip(optimizer, norm)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.7]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_norm_shows_what_is_not_finite(value: float) -> None:
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, value])
    assert not math.isfinite(gradient_norm([other, weight]).item())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"max_gradient_norm": 1.0, "max_gradient_value": 2.0}, "precision.max_gradient_value: 2.0 beside"),
        ({"max_gradient_norm": 0}, "precision.max_gradient_norm: 0"),
        ({"max_gradient_value": -1.0}, "precision.max_gradient_value: -1.0"),
        (
            {"fp16_type": "fp8"},
            "precision.fp16_type: 'fp8' is not allowed; give bfloat16, cbfloat16 or float16",
        ),
        ({"loss_scaling_factor": "static"}, "precision.loss_scaling_factor: 'static'"),
        ({"loss_scaling_factor": 0.0}, "precision.loss_scaling_factor: 0.0"),
        ({"enabled": "yes"}, "precision.enabled: 'yes'"),
        ({"max_grad_norm": 1.0}, "did you mean max_gradient_norm?"),
    ],
)
def test_bad_values_are_named(block: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_block(PrecisionConfig, block, "precision")
    assert message in str(error.value)
