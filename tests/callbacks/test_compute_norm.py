"""Norms of gradients and parameters."""

import math

import pytest
import torch
from torch import nn

from rarefy.callbacks import ComputeNorm
from rarefy.callbacks.compute_norm import measure_norms


def test_norms_against_the_formula():
    model = nn.Linear(5, 3).double()
    model(torch.randn(2, 5).double()).square().sum().backward()
    norms = measure_norms(dict(model.named_parameters()))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in grads.items():
        assert norms[f"per_layer_grad_norm/{name}"] == pytest.approx(grad.norm().item())
    total = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
    assert norms["model_wise_grad_norm"] == pytest.approx(total)
    total = math.sqrt(sum(p.detach().square().sum().item() for p in model.parameters()))
    assert norms["model_wise_params_norm"] == pytest.approx(total)


def test_frozen_parameters_and_missing_gradients_are_left_out():
    model = nn.Linear(5, 3)
    model.bias.requires_grad_(False)
    norms = measure_norms(dict(model.named_parameters()))
    assert norms.keys() == {"model_wise_grad_norm", "model_wise_params_norm"}
    assert norms["model_wise_grad_norm"] == 0
    assert norms["model_wise_params_norm"] == pytest.approx(model.weight.norm().item())


def test_low_precision_does_not_overflow():
    parameter = torch.full((4,), 60_000.0, dtype=torch.float16, requires_grad=True)
    assert measure_norms({"w": parameter})["model_wise_params_norm"] == pytest.approx(120_000, rel=1e-2)


def test_a_model_without_parameters():
    assert measure_norms({}) == {"model_wise_grad_norm": 0.0, "model_wise_params_norm": 0.0}


def test_it_logs_once_on_log_steps_at_the_step_that_ended(make_trainer):
    trainer, callback = make_trainer(log_every=2), ComputeNorm()
    for _ in range(5):
        trainer.step(callback)
    assert [step for step, _ in trainer.logged] == [2, 4]
    names = {f"per_layer_grad_norm/{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}
    assert trainer.logged[0][1].keys() == names | {"model_wise_grad_norm", "model_wise_params_norm"}
