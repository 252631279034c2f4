"""Weights that are computed from sparse ones, written in lists, or looked at in inference mode."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from foreign.networks import RIGL, inputs, network, sparse, step_once

BLOCKS = {"pattern": {"block": [4, 4]}, "sparsity": 0.5}


class Computed(nn.Module):
    """Two layers whose weights are changed by a function in each forward pass."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 48).double()
        self.second = nn.Linear(48, 4).double()
        self.change = change

    def forward(self, x):
        x = F.linear(x, self.change(self.first.weight), self.first.bias).relu()
        return F.linear(x, self.change(self.second.weight), self.second.bias)


def scaled(weight):
    return weight * 2.5


def standardised(weight):
    return weight / (weight.square().mean().sqrt() + 1e-5)


def centred(weight):
    return weight - weight.mean(1, keepdim=True)


def cloned(weight):
    return weight.clone()


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return (weight * 8).round() / 8

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


def rounded_straight_through(weight):
    return weight + ((weight * 8).round() / 8 - weight).detach()


@pytest.mark.parametrize("block", [RIGL, {**RIGL, **BLOCKS}], ids=["connections", "blocks"])
@pytest.mark.parametrize(
    "change", [scaled, standardised, centred, cloned, Rounded.apply, rounded_straight_through]
)
def test_weights_that_are_computed_in_the_forward_pass_grow_alike_in_both_storages(change, block):
    found = []
    for storage in ("masked", "compact"):
        model, optimizer, sparsity = sparse(block, Computed(change), compute=storage)
        first = [parameter.mask.clone() for parameter in sparsity.parameters.values()]
        for step in range(5):
            step_once(model, optimizer, step)
        found.append([(one.mask, one.dense_weight()) for one in sparsity.parameters.values()])
        assert not all(map(torch.equal, first, (mask for mask, _ in found[-1])))
    for (mask, weight), (other_mask, other_weight) in zip(*found, strict=True):
        assert torch.equal(mask, other_mask)
        torch.testing.assert_close(weight, other_weight)


def scaled_in_place(weight):
    weight.mul_(2)


def scaled_by_foreach(weight):
    torch._foreach_mul_([weight], 2.0)


def copied_by_foreach(weight):
    torch._foreach_copy_([weight], [weight * 2])


def stepped(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1, foreach=True).step()


@pytest.mark.parametrize("change", [scaled_in_place, scaled_by_foreach, copied_by_foreach, stepped])
@pytest.mark.parametrize("storage", ["dense", "masked", "compact"])
def test_a_write_between_forward_and_backward_pass_is_refused_by_autograd(change, storage):
    model = network()
    if storage != "dense":
        sparse({"algorithm": "static", "sparsity": 0.8}, model, compute=storage)
    loss = model(inputs().requires_grad_()).sum()
    with torch.no_grad():
        change(model[2].weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("block", [RIGL, {**RIGL, **BLOCKS}], ids=["connections", "blocks"])
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_models_are_looked_at_and_loaded_in_inference_mode(storage, block):
    model, optimizer, sparsity = sparse(block, compute=storage)
    weight = model[0].weight
    with torch.inference_mode():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for view in (weight.t(), weight.view(-1), weight[0], weight.t().detach(), *weight.chunk(2)):
            assert view.sum().isfinite()
        assert torch.equal(copy.deepcopy(model)(inputs()), model(inputs()))
        model.load_state_dict(state)
    model.load_state_dict(state)
    for step in range(4):
        step_once(model, optimizer, step)
    assert sparsity.step == 4


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_model_that_trains_is_traced_before_its_first_forward_pass(storage):
    model, _, _ = sparse(RIGL, compute=storage)
    traced = torch.jit.trace(model, inputs())
    assert torch.equal(traced(inputs(1)), model(inputs(1)))


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_finalized_model_is_loaded_where_nobody_knows_rarefy(storage):
    model, *_ = sparse(RIGL, compute=storage)
    for one in (copy.deepcopy(model), model):
        rarefy.finalize(one)
        assert b"rarefy" not in pickle.dumps(one)
        assert not any(module._load_state_dict_pre_hooks for module in one.modules())
