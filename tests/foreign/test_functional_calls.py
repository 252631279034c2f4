"""Models that are called with other tensors in the place of their weights: neither side notices the other."""

# Modules are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from foreign.networks import RIGL, inputs, loss_of, sparse

EVERY = {**RIGL, "update": {"freq": 1}}
STORAGES = pytest.mark.parametrize("compute", ["masked", "compact"])


def fast_weights(model, make):
    """Tensors that a method of meta-learning trains in the place of the model's."""
    return {
        name: make(torch.full(p.shape, 0.01) + torch.as_tensor(p.detach() * 1.0))
        for name, p in model.named_parameters()
    }


def by_backward(model, make):
    fast = fast_weights(model, make)
    functional_call(model, fast, (inputs(7),)).square().mean().backward()
    return {name: value.grad for name, value in fast.items()}


def by_transform(model, make):
    def loss(values):
        return functional_call(model, values, (inputs(7),)).square().mean()

    return torch.func.grad(loss)(fast_weights(model, make))


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


WAYS = pytest.mark.parametrize(
    ("way", "make"), [(by_backward, leaf), (by_backward, nn.Parameter), (by_transform, leaf)]
)


@WAYS
@STORAGES
def test_gradients_of_fast_weights_are_those_of_a_dense_model(way, make, compute):
    model, _, _ = sparse(EVERY, compute=compute)
    found = way(model, make)
    dense = copy.deepcopy(model)
    expected = torch.func.grad(lambda values: functional_call(dense, values, (inputs(7),)).square().mean())(
        fast_weights(model, leaf)
    )
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)
    assert expected["0.weight"].ne(0).float().mean() > 0.5


@WAYS
@STORAGES
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_growth_sees_the_gradients_of_the_model_alone(place, way, make, compute):
    masks = []
    for is_called in (False, True):
        model, optimizer, sparsity = sparse(EVERY, compute=compute)
        for step in range(5):
            optimizer.zero_grad()
            for micro_batch, moment in enumerate(("before", "between", "after")):
                if is_called and place == moment:
                    way(model, make)
                if moment != "after":
                    loss_of(model, 2 * step + micro_batch).backward()
            optimizer.step()
        masks.append(sparsity.parameters["0.weight"].mask)
    assert torch.equal(*masks)


@STORAGES
def test_weights_that_are_swapped_for_an_evaluation_and_back(compute):
    masks = []
    for is_swapped in (False, True):
        model, optimizer, sparsity = sparse(EVERY, compute=compute)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, 2 * step).backward()
            if is_swapped:
                mine = model[0].weight
                model[0].weight = copy.deepcopy(mine)
                model(inputs(9))
                model[0].weight = mine
            loss_of(model, 2 * step + 1).backward()
            optimizer.step()
        masks.append(sparsity.parameters["0.weight"].mask)
    assert torch.equal(*masks)


def every_state(model):
    """Weights and masks of another model, both plain."""
    return {name: one.clone() for name, one in model.state_dict().items()}


@STORAGES
def test_a_call_with_weights_and_masks_of_another_model(compute):
    model, _, _ = sparse(RIGL, compute=compute)
    other, _, _ = sparse({**RIGL, "seed": 9}, compute=compute)
    assert not torch.equal(every_state(model)["0.weight_mask"], every_state(other)["0.weight_mask"])
    x = inputs(7)
    torch.testing.assert_close(functional_call(model, every_state(other), (x,)), other(x))
    own = model(x).detach()
    stacked = {name: torch.stack((one, every_state(other)[name])) for name, one in every_state(model).items()}
    both = torch.func.vmap(lambda state: functional_call(model, state, (x,)))(stacked)
    torch.testing.assert_close(both, torch.stack((own, other(x))))
    traced = make_fx(lambda state, x: functional_call(model, state, (x,)))(every_state(other), x)
    torch.testing.assert_close(traced(every_state(other), x), other(x))
