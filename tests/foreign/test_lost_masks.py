"""Models whose memory is given back and taken anew: masks go with it, as buffers do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from foreign.networks import STATIC, assert_zeros, sparse, step_once, weights

TOP_KAST = {"algorithm": "top_kast", "sparsity": 0.8, "forward_sparsity": 0.9, "update": {"freq": 2}}
LOST = "the mask of weight of a Linear is another tensor"
both_storages = pytest.mark.parametrize("compute", ["masked", "compact"])


def emptied(model: nn.Module) -> None:
    """As `to_empty` leaves it, though not with zeros: other connections, in memory of before."""
    model.to("meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
        for mask in model.buffers():
            mask.copy_(torch.arange(mask.numel()).view(mask.shape) % 2 == 0)


def follow_again(model: Any, sparsity: Any) -> torch.optim.Optimizer:
    """Parameters that were on the meta device are others afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    return optimizer


@both_storages
@pytest.mark.parametrize("use", ["forward pass", "state dict", "load without masks", "summary", "optimizer"])
def test_a_model_whose_masks_are_lost_is_refused(use, compute):
    model, optimizer, sparsity = sparse(STATIC, compute=compute)
    weights_alone = {
        name: one for name, one in copy.deepcopy(model.state_dict()).items() if "mask" not in name
    }
    emptied(model)
    uses = {
        "forward pass": lambda: step_once(model, optimizer, 0),
        "state dict": model.state_dict,
        "load without masks": lambda: model.load_state_dict(weights_alone, strict=False),
        "summary": lambda: rarefy.summary(sparsity).actual_sparsity,
        "optimizer": lambda: follow_again(model, sparsity),
    }
    with pytest.raises(rarefy.errors.RarefyError, match=LOST):
        uses[use]()


@both_storages
@pytest.mark.parametrize("block", [STATIC, TOP_KAST], ids=["static", "top_kast"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_with_masks_brings_them_back(assign, block, compute):
    model, optimizer, sparsity = sparse(block, compute=compute)
    step_once(model, optimizer, 0)
    saved = copy.deepcopy(model.state_dict())
    emptied(model)
    model.load_state_dict(saved, assign=assign)
    for name, parameter in sparsity.parameters.items():
        assert torch.equal(parameter.mask, saved[name.replace("weight", "weight_mask")].bool())
        assert torch.equal(parameter.dense_weight(), saved[name])
    optimizer = follow_again(model, sparsity)
    for step in range(3):
        step_once(model, optimizer, step)
    assert_zeros(model, sparsity)


@both_storages
def test_a_model_whose_masks_are_lost_is_finalized_and_begins_anew(compute):
    model, _, sparsity = sparse(STATIC, compute=compute)
    emptied(model)
    rarefy.finalize(model)
    assert [name for name, _ in model.named_buffers()] == [] and not sparsity.parameters
    assert all(type(one) is nn.Parameter and bool((one == 0.5).all()) for one in weights(model))
    sparsity.apply(model)
    assert rarefy.summary(sparsity).actual_sparsity > 0.79


def test_a_mask_that_was_moved_is_the_same():
    model, optimizer, sparsity = sparse(STATIC)
    model[0].weight_mask = model[0].weight_mask.clone()
    step_once(model, optimizer, 0)
    assert_zeros(model, sparsity)


@both_storages
def test_memory_that_is_taken_anew_on_the_same_device(compute):
    model, optimizer, sparsity = sparse(STATIC, compute=compute)
    saved = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for mask in model.buffers():
        mask.fill_(True)
    with pytest.raises(rarefy.errors.RarefyError, match=LOST):
        step_once(model, optimizer, 0)
    model.load_state_dict(saved)
    step_once(model, optimizer, 0)
    assert_zeros(model, sparsity)
    assert torch.equal(sparsity.parameters["0.weight"].mask, saved["0.weight_mask"].bool())


@both_storages
def test_memory_that_is_taken_anew_while_there_are_gradients(compute):
    model, optimizer, _ = sparse(STATIC, compute=compute)
    step_once(model, optimizer, 0)
    assert model[0].weight.grad is not None
    model.to_empty(device="cpu")
    for mask in model.buffers():
        mask.fill_(True)
    with pytest.raises(rarefy.errors.RarefyError, match=LOST):
        step_once(model, optimizer, 1)


@both_storages
def test_names_and_shapes_of_a_model_without_memory(compute):
    model, _, _ = sparse(STATIC, compute=compute)
    shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    assert {name: tuple(one.shape) for name, one in model.to("meta").state_dict().items()} == shapes
