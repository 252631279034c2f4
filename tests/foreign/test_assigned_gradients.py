"""Gradients that somebody puts in place, in whatever memory, and hooks on gradients that were there before `apply`."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from foreign.networks import RIGL, SET, STATIC, inputs, network, sparse, step_once
from rarefy.errors import RarefyError

both_storages = pytest.mark.parametrize("compute", ["masked", "compact"])


def square() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def descent(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


# ---- memory ----


@both_storages
@pytest.mark.parametrize("block", [STATIC, SET])
def test_one_tensor_that_is_the_gradient_of_two_weights(block, compute):
    model, optimizer, sparsity = sparse(block, square(), descent, compute=compute)
    for step in range(4):
        step_once(model, optimizer, step)
        before = {name: one.dense_weight().clone() for name, one in sparsity.parameters.items()}
        stays = {name: one.mask.clone() for name, one in sparsity.parameters.items()}
        model[0].weight.grad = model[2].weight.grad = torch.ones(32, 32)
        optimizer.step()
        for name, one in sparsity.parameters.items():
            stays[name] &= one.mask
            change = (one.dense_weight() - before[name])[stays[name]]
            torch.testing.assert_close(change, torch.full_like(change, -0.1))
    assert_zeros_of_any(sparsity)


@both_storages
@pytest.mark.parametrize("block", [STATIC, SET, RIGL])
def test_weights_that_change_their_gradients_for_each_others(block, compute):
    model, optimizer, sparsity = sparse(block, square(), descent, compute=compute)
    layers = [model[0], model[2]]
    for step in range(4):
        model(inputs(step)).square().mean().backward()
        before = [one.dense_weight().clone() for one in sparsity.parameters.values()]
        masks = [one.mask.clone() for one in sparsity.parameters.values()]
        found = [layer.weight.grad + torch.zeros(32, 32) for layer in layers]
        layers[0].weight.grad, layers[1].weight.grad = layers[1].weight.grad, layers[0].weight.grad
        optimizer.step()
        for one, old, grad, mask in zip(
            sparsity.parameters.values(), before, found[::-1], masks, strict=True
        ):
            stays = mask & one.mask
            torch.testing.assert_close(one.dense_weight()[stays], (old - 0.1 * grad)[stays])
        optimizer.zero_grad()
    assert_zeros_of_any(sparsity)


@both_storages
def test_a_tensor_that_is_the_gradient_of_a_dense_weight_too(compute):
    model, optimizer, sparsity = sparse(STATIC, square(), descent, compute=compute, param_filter="0.weight")
    before = model[2].weight.detach().clone()
    model[0].weight.grad = model[2].weight.grad = torch.ones(32, 32)
    optimizer.step()
    torch.testing.assert_close(model[2].weight.detach(), before - 0.1)
    assert_zeros_of_any(sparsity)


@both_storages
def test_a_tensor_that_is_the_gradient_of_a_weight_of_another_optimizer_too(compute):
    model, optimizer, sparsity = sparse(
        STATIC,
        square(),
        lambda parameters: descent(list(parameters)[:2]),
        compute=compute,
        param_filter="0.weight",
    )
    other = descent(model[2].parameters())
    before = model[2].weight.detach().clone()
    model[0].weight.grad = model[2].weight.grad = torch.ones(32, 32)
    optimizer.step()
    other.step()
    torch.testing.assert_close(model[2].weight.detach(), before - 0.1)
    assert_zeros_of_any(sparsity)


@both_storages
@pytest.mark.parametrize("is_view", [False, True])
def test_a_tensor_that_is_assigned_in_each_step_is_whole_in_each(is_view, compute):
    model, optimizer, sparsity = sparse(SET, square(), descent, compute=compute)
    memory = torch.ones(2, 32, 32)
    grads = list(memory) if is_view else [one.clone() for one in memory]
    for step in range(6):
        step_once(model, optimizer, step)
        stays = {name: one.mask.clone() for name, one in sparsity.parameters.items()}
        before = {name: one.dense_weight().clone() for name, one in sparsity.parameters.items()}
        model[0].weight.grad, model[2].weight.grad = grads
        optimizer.step()
        for name, one in sparsity.parameters.items():
            change = (one.dense_weight() - before[name])[stays[name] & one.mask]
            torch.testing.assert_close(change, torch.full_like(change, -0.1))
    assert_zeros_of_any(sparsity)


@both_storages
@pytest.mark.parametrize("kind", ["one number that was expanded", "of inference mode"])
def test_a_gradient_that_cannot_be_written_to(kind, compute):
    model, optimizer, sparsity = sparse(STATIC, None, descent, compute=compute)
    before = {name: one.dense_weight().clone() for name, one in sparsity.parameters.items()}
    for name, one in sparsity.parameters.items():
        with torch.inference_mode(kind == "of inference mode"):
            grad = (
                torch.ones(1).expand(one.shape)
                if kind != "of inference mode"
                else torch.ones(*one.shape[::-1]).t()
            )
        model.get_parameter(name).grad = grad
    optimizer.step()
    for name, one in sparsity.parameters.items():
        torch.testing.assert_close(one.dense_weight(), torch.where(one.mask, before[name] - 0.1, 0))


def assert_zeros_of_any(sparsity):
    for parameter in sparsity.parameters.values():
        assert not parameter.dense_weight()[~parameter.mask].any()


@both_storages
@pytest.mark.parametrize("make", [descent, torch.optim.SparseAdam])
def test_a_gradient_in_a_sparse_layout_is_refused(make, compute):
    model, optimizer, _ = sparse(
        STATIC, None, lambda all: make([one for one in all if one.dim() == 2]), compute=compute
    )
    for weight in (model[0].weight, model[2].weight):
        weight.grad = torch.ones(weight.shape).to_sparse()
    with pytest.raises(RarefyError, match=r"0\.weight has a sparse gradient; .*assign grad\.to_dense\(\)"):
        optimizer.step()


# ---- hooks ----


@both_storages
@pytest.mark.parametrize("block", [STATIC, RIGL])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_hook_that_clips_sees_active_connections_alone(is_first, block, compute):
    """In the order of their registration the hook of before would count inactive connections in its norm."""
    model = network(torch.float64)
    norms = []

    def clip(weight):
        norms.append(float(nn.utils.clip_grad_norm_([weight], 0.01)))

    if is_first:
        model[0].weight.register_post_accumulate_grad_hook(clip)
    model, optimizer, sparsity = sparse(block, model, compute=compute)
    if not is_first:
        model[0].weight.register_post_accumulate_grad_hook(clip)
    for step in range(4):
        mask = sparsity.parameters["0.weight"].mask.clone()
        weight = sparsity.parameters["0.weight"].dense_weight().clone().requires_grad_()
        hidden = torch.relu(nn.functional.linear(inputs(step, torch.float64), weight, model[0].bias))
        (model[2](hidden) - 1).square().mean().backward()
        step_once(model, optimizer, step)
        assert norms[step] == pytest.approx(float(weight.grad[mask].norm()))
    assert_zeros_of_any(sparsity)


@pytest.mark.parametrize("block", [STATIC, SET, RIGL])
def test_a_mask_of_torch_that_is_removed_is_refused_in_the_backward_pass_too(block):
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.3)
    model, optimizer, sparsity = sparse(block, model)
    step_once(model, optimizer, 0)
    assert_zeros_of_any(sparsity)
    prune.remove(model[0], "weight")
    with pytest.raises(RarefyError, match=r"prune\.remove was called"):
        step_once(model, optimizer, 1)
