"""Weights that are reached by their memory, exchanged as objects, or tied: right, or one clear line."""

# Modules are asked for attributes that their types do not tell.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from foreign.networks import RIGL, SET, STATIC, assert_zeros, inputs, loss_of, sparse, step_once
from rarefy.errors import RarefyError
from sparse_weights import whole

TOP_KAST = {"algorithm": "top_kast", "sparsity": 0.8, "forward_sparsity": 0.9, "update": {"freq": 2}}
STORAGES = pytest.mark.parametrize("compute", ["masked", "compact"])
ARRAYS = {
    "numpy": lambda weight: weight.detach().numpy(),
    "data": lambda weight: weight.data.numpy(),
    "asarray": lambda weight: np.asarray(weight.detach()),
    "transposed": lambda weight: weight.detach().t().numpy(),
    "a row": lambda weight: weight.detach()[1].numpy(),
}


@pytest.mark.parametrize("array", ARRAYS)
@STORAGES
def test_an_array_is_the_memory_of_the_weight_or_cannot_be_written(array, compute):
    model, *_ = sparse(STATIC, compute=compute)
    before = whole(model[0].weight).clone()
    shown = ARRAYS[array](model[0].weight)
    if compute == "masked":
        shown *= 0.5
        assert not torch.equal(whole(model[0].weight), before)
    else:
        with pytest.raises(ValueError, match="read-only"):
            shown *= 0.5
        shown.copy()[...] = 0.0
        assert torch.equal(whole(model[0].weight), before)


def test_the_mask_of_a_compact_weight_as_an_array_cannot_be_written():
    model, *_ = sparse(STATIC, compute="compact")
    with pytest.raises(ValueError, match="read-only"):
        model[0].weight_mask.numpy()[...] = True


@pytest.mark.parametrize("grad", [True, False])
def test_a_write_by_address_is_noticed(grad):
    model, optimizer, sparsity = sparse(STATIC, compute="compact")
    mask = sparsity.parameters["0.weight"].mask
    step_once(model, optimizer, 0)
    memory = torch.empty(0).set_(model[0].weight.detach().untyped_storage(), 0, mask.shape)
    with torch.set_grad_enabled(grad):
        model(inputs())  # nobody wrote
        memory = torch.empty(0).set_(model[0].weight.detach().untyped_storage(), 0, mask.shape)
        memory[mask.nonzero()[0, 0], mask.nonzero()[0, 1]] = 7.0
        with pytest.raises(RarefyError, match=r"by its address \(data_ptr, untyped_storage\)"):
            model(inputs())
        model(inputs())  # said once


def test_an_address_of_a_weight_that_holds_nan():
    model, *_ = sparse(STATIC, compute="compact")
    model[0].weight.data.fill_(float("nan"))
    model[0].weight.data_ptr()
    assert model(inputs()).isnan().all()


@pytest.mark.parametrize("block", [SET, TOP_KAST], ids=["set", "top_kast"])
@pytest.mark.parametrize("use", ["step", "summary", "state dict", "load", "copy", "optimizer"])
def test_a_weight_that_was_exchanged_for_a_dense_tensor_is_refused(use, block):
    model, optimizer, sparsity = sparse(block, compute="compact")
    step_once(model, optimizer, 0)
    saved = copy.deepcopy(model.state_dict())
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.ones(48, 32)))
    uses = {
        "step": lambda: step_once(model, optimizer, 1),
        "summary": lambda: rarefy.summary(sparsity).actual_sparsity,
        "state dict": model.state_dict,
        "load": lambda: model.load_state_dict(saved),
        "copy": lambda: copy.deepcopy(model),
        "optimizer": lambda: sparsity.apply(torch.optim.SGD(model.parameters(), lr=0.1)),
    }
    with pytest.raises(RarefyError, match=r"exchanged for a dense tensor by torch\.utils\.swap_tensors"):
        uses[use]()


@pytest.mark.parametrize("block", [SET, TOP_KAST], ids=["set", "top_kast"])
def test_a_weight_that_was_exchanged_is_finalized_and_begins_anew(block):
    model, optimizer, sparsity = sparse(block, compute="compact")
    step_once(model, optimizer, 0)
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.ones(48, 32)))
    rarefy.finalize(model)
    assert type(model[0].weight) is nn.Parameter and bool((model[0].weight == 1).all())
    assert [name for name, _ in model.named_buffers()] == [] and not sparsity.parameters
    model, optimizer, sparsity = sparse(block, model, compute="compact")
    step_once(model, optimizer, 0)
    assert_zeros_of_any(sparsity)


def test_a_masked_weight_that_was_exchanged_for_another_goes_on():
    model, optimizer, sparsity = sparse(SET)
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.ones(48, 32)))
    step_once(model, optimizer, 0)
    assert_zeros(model, sparsity)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@STORAGES
def test_conversions_that_swap_tensors(compute, swapping):
    model, optimizer, sparsity = sparse(RIGL, compute=compute)
    step_once(model, optimizer, 0)
    optimizer.zero_grad()
    model.double()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsity.apply(optimizer)
    for step in range(5):
        step_once(model, optimizer, step)
        assert_zeros_of_any(sparsity)
    assert model[0].weight.dtype == torch.float64 and sparsity.updates > 1


def assert_zeros_of_any(sparsity):
    for parameter in sparsity.parameters.values():
        assert not parameter.dense_weight()[~parameter.mask].any()


@STORAGES
def test_weights_that_are_tied_afterwards_are_refused(compute):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model, optimizer, _ = sparse(STATIC, model=model, compute=compute)
    model[2].weight = model[0].weight
    with pytest.raises(RarefyError, match=r"0\.weight and 2\.weight are one tensor now, and have two masks"):
        step_once(model, optimizer, 0)


def test_weights_that_change_places_keep_the_masks_of_their_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model, optimizer, sparsity = sparse(STATIC, model=model)
    model[0].weight, model[2].weight = model[2].weight, model[0].weight
    for step in range(2):
        step_once(model, optimizer, step)
        assert_zeros(model, sparsity)


# ---- what else is done to gradients and files ----


def by_hand(model, optimizer, sparsity, loss):
    """The same training of a dense model whose gradients are selected by hand."""
    twin = rarefy.finalize(copy.deepcopy(model))
    its = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for step in range(3):
        for one, trained_by in ((model, optimizer), (twin, its)):
            trained_by.zero_grad()
            loss(one, step).backward()
            if one is twin:
                for name, parameter in sparsity.parameters.items():
                    twin.get_parameter(name).grad.mul_(parameter.mask)
            trained_by.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(whole(mine), other.detach(), rtol=1e-4, atol=1e-6)


def regularised(model, step):
    norms = sum(parameter.abs().sum() for parameter in model.parameters())
    return loss_of(model, step) + 1e-2 * norms + 1e-2 * torch.linalg.matrix_norm(model[0].weight, 2)


def with_a_gradient_penalty(model, step):
    x = inputs(step).requires_grad_()
    y = model(x).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    return grad.square().mean() + 1e-2 * y


def in_einsum(model, step):
    return (torch.einsum("bi,oi->bo", inputs(step), model[0].weight) - 1).square().mean() + loss_of(
        model, step
    )


@pytest.mark.parametrize("loss", [regularised, with_a_gradient_penalty, in_einsum])
@STORAGES
def test_losses_that_use_weights_and_gradients_in_other_ways(loss, compute):
    by_hand(*sparse(STATIC, compute=compute), loss)


def double(module, keys):
    module[0].weight.data.mul_(2.0)


@STORAGES
def test_hooks_of_others_on_gradients_and_loading(compute):
    model, optimizer, sparsity = sparse(STATIC, compute=compute)
    seen = []
    model[0].weight.register_hook(lambda grad: seen.append(grad.shape))
    step_once(model, optimizer, 0)
    assert seen == [model[0].weight.shape] and sparsity.step == 1
    before = whole(model[0].weight).clone()
    model.register_load_state_dict_post_hook(double)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(whole(model[0].weight), 2 * before)
