"""Optimizers, adapters and averages of other packages, where these are installed; else doubles stand in elsewhere."""

# Modules are asked for attributes that their types do not tell.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from foreign.networks import SET, STATIC, assert_zeros, inputs, loss_of, network, sparse, step_once
from rarefy.errors import RarefyError
from sparse_weights import whole

pytestmark = pytest.mark.filterwarnings("ignore")
STORAGES = pytest.mark.parametrize("compute", ["masked", "compact"])


def dense_twin(model, sparsity):
    """The model as other people's code knows it, and the masks that a test holds its zeros with."""
    twin = rarefy.finalize(copy.deepcopy(model))
    return twin, {name: one.mask.clone() for name, one in sparsity.parameters.items()}


def hold(twin, masks, of_gradients):
    for name, mask in masks.items():
        weight = twin.get_parameter(name)
        (weight.grad if of_gradients else weight.data).mul_(mask)


def train_beside_a_dense_model(model, optimizer, sparsity, make, steps=6):
    twin, masks = dense_twin(model, sparsity)
    its = make(twin.parameters())
    for step in range(steps):
        step_once(model, optimizer, step)
        its.zero_grad()
        loss_of(twin, step).backward()
        hold(twin, masks, of_gradients=True)
        its.step()
        hold(twin, masks, of_gradients=False)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(whole(mine), other.detach(), rtol=1e-4, atol=1e-6)


# ---- optimizers ----


@STORAGES
@pytest.mark.parametrize("kind", ["Shampoo", "SOAP", "Lion", "Lamb", "Adan", "AdaBelief", "Tiger"])
def test_optimizers_of_pytorch_optimizer(kind, compute):
    package: Any = pytest.importorskip("pytorch_optimizer")

    def make(parameters):
        return getattr(package, kind)(list(parameters), lr=1e-3)

    # The bases that SOAP finds are sensitive to the last digit.
    model = network(torch.float64)
    model, optimizer, sparsity = sparse(STATIC, model=model, compute=compute, optimizer=make)
    train_beside_a_dense_model(model, optimizer, sparsity, make)


@STORAGES
def test_optimizers_of_schedulefree(compute):
    package: Any = pytest.importorskip("schedulefree")

    def make(parameters):
        made = package.AdamWScheduleFree(parameters, lr=1e-2)
        made.train()
        return made

    model, optimizer, sparsity = sparse(STATIC, compute=compute, optimizer=make)
    train_beside_a_dense_model(model, optimizer, sparsity, make)


def large():
    """Weights that are large enough for states of 8 bits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 64))


def train_and_look(optimizer):
    model, optimizer, sparsity = sparse(SET, model=large(), optimizer=optimizer)
    for step in range(7):
        step_once(model, optimizer, step)
        assert_zeros(model, sparsity)
    assert sparsity.updates >= 3
    return model, optimizer


@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit"])
def test_eight_bit_optimizers_of_bitsandbytes(kind):
    package: Any = pytest.importorskip("bitsandbytes").optim

    def make(parameters):
        return getattr(package, kind)(parameters, lr=1e-3)

    model, optimizer = train_and_look(make)
    state = optimizer.state[model[0].weight]
    assert state["state1"].dtype == torch.uint8
    decoded = state["qmap1"][state["state1"].long()]
    assert not decoded[~model[0].weight_mask].any() and decoded[model[0].weight_mask].any()
    with pytest.raises(RarefyError):
        compact, its, _ = sparse(SET, model=large(), optimizer=make, compute="compact")
        step_once(compact, its, 0)


def test_eight_bit_optimizers_of_torchao():
    package: Any = pytest.importorskip("torchao.optim")
    model, optimizer = train_and_look(lambda parameters: package.AdamW8bit(parameters, lr=1e-3))
    moments = optimizer.state[model[0].weight]["exp_avg"].dequantize()
    assert not moments[~model[0].weight_mask].any() and moments[model[0].weight_mask].any()


def test_four_bit_states_without_a_zero_are_refused():
    package: Any = pytest.importorskip("torchao.optim")
    with pytest.raises(RarefyError, match=r"AdamW4bit keeps .* no code is known to mean exactly zero"):
        train_and_look(lambda parameters: package.AdamW4bit(parameters, lr=1e-3))


# ---- adapters ----


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("compute", ["masked", "compact", "finalized"])
def test_a_merge_of_peft(compute):
    peft: Any = pytest.importorskip("peft")
    model = Named()
    sparsity = rarefy.configure({**STATIC, "seed": 0, "compute": compute.replace("finalized", "masked")})
    sparsity.apply(model)
    mask = sparsity.parameters["first.weight"].mask.clone()
    if compute == "finalized":
        rarefy.finalize(model)
    before = whole(model.first.weight).clone()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["first"], init_lora_weights=False)
    )
    adapter = adapted.base_model.model.first
    update = adapter.get_delta_weight("default").detach().clone()
    outputs = adapted(inputs()).detach()
    merged = adapted.merge_and_unload()
    saved = merged.state_dict()
    expected = before + update if compute == "finalized" else before + update * mask
    for weight in (saved["first.weight"], merged.first.weight):
        torch.testing.assert_close(whole(weight), expected)
    if compute == "finalized":
        torch.testing.assert_close(merged(inputs()), outputs, rtol=1e-4, atol=1e-5)


def test_saving_says_what_a_merge_lost():
    peft: Any = pytest.importorskip("peft")
    model = Named()
    rarefy.configure({**STATIC, "compute": "masked"}).apply(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["first"], init_lora_weights=False)
    )
    with pytest.warns(UserWarning, match=r"something wrote to inactive connections"):
        adapted.merge_and_unload().state_dict()


# ---- averages ----


@STORAGES
def test_the_average_of_timm(compute):
    try:
        from timm.utils import ModelEmaV3  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):
        pytest.skip("timm is not installed, or not beside this torch")
    model, optimizer, _ = sparse(SET, compute=compute)
    average = ModelEmaV3(model, decay=0.5)
    expected = [whole(parameter).clone() for parameter in model.parameters()]
    for step in range(5):
        step_once(model, optimizer, step)
        average.update(model)
        expected = [
            0.5 * one + 0.5 * whole(parameter)
            for one, parameter in zip(expected, model.parameters(), strict=True)
        ]
    for one, parameter in zip(expected, average.module.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter), one, rtol=1e-4, atol=1e-6)
