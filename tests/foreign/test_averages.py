"""Copies compute with what was written into them; those that are tracked follow the topology of the model."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

import rarefy
from foreign.networks import RIGL, SET, STATIC, inputs, network, sparse, step_once, weights
from rarefy.errors import RarefyError
from rarefy.tensors import SparseWeight

DECAY = 0.8


def by_parameters(model, average):
    for own, other in zip(average.parameters(), model.parameters(), strict=True):
        own.mul_(DECAY).add_((1 - DECAY) * other)


def by_state_dict(model, average):
    other = model.state_dict()
    for name, own in average.state_dict().items():
        own.copy_(DECAY * own + (1 - DECAY) * other[name])


def by_floats_of_the_state_dict(model, average):
    other = model.state_dict()
    for name, own in average.state_dict().items():
        if own.dtype.is_floating_point:
            own *= DECAY
            own += (1 - DECAY) * other[name]


WAYS = [by_parameters, by_state_dict, by_floats_of_the_state_dict]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", [STATIC, SET, RIGL])
def test_an_average_by_hand_is_the_average_of_what_was_there(way, block):
    model, optimizer, _ = sparse(block)
    average = copy.deepcopy(model)
    expected = [weight.detach().clone() for weight in weights(model)]
    for step in range(12):
        step_once(model, optimizer, step)
        with torch.no_grad():
            way(model, average)
            for mean, weight in zip(expected, weights(model), strict=True):
                mean.mul_(DECAY).add_((1 - DECAY) * weight)
        average(inputs())
    for mean, weight in zip(expected, weights(average), strict=True):
        torch.testing.assert_close(weight.detach(), mean, rtol=1e-5, atol=1e-7)
    hidden = torch.relu(inputs() @ expected[0].T + average[0].bias)
    torch.testing.assert_close(average(inputs()), hidden @ expected[1].T + average[2].bias)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("algorithm", [SET, RIGL])
def test_a_tracked_copy_follows_the_topology(way, algorithm):
    model, optimizer, sparsity = sparse(algorithm)
    average = copy.deepcopy(model)
    sparsity.track(average)
    expected = [weight.detach().clone() for weight in weights(model)]
    old = [model[index].weight_mask.clone() for index in (0, 2)]
    moved = 0
    for step in range(12):
        step_once(model, optimizer, step)
        with torch.no_grad():
            for place, index in enumerate((0, 2)):
                mask, weight = model[index].weight_mask, model[index].weight
                moved += int((mask & ~old[place]).sum())
                taken = torch.where(mask & ~old[place], weight, torch.where(mask, expected[place], 0))
                expected[place] = DECAY * taken + (1 - DECAY) * weight
                old[place] = mask.clone()
            way(model, average)
        for mean, weight in zip(expected, weights(average), strict=True):
            torch.testing.assert_close(weight.detach(), mean, rtol=1e-5, atol=1e-7)
    assert moved > 100
    assert all(torch.equal(average[index].weight_mask, model[index].weight_mask) for index in (0, 2))
    assert all(not layer.weight[~layer.weight_mask].any() for layer in (average[0], average[2]))


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_tracked_copy_follows_whatever_its_storage(compute):
    model, optimizer, sparsity = sparse(SET, compute=compute, update={"freq": 1})
    target = copy.deepcopy(model)
    plain = network()
    for copied in (target, plain):
        sparsity.track(copied)
    assert torch.equal(plain[0].weight != 0, model[0].weight_mask)
    before = target[0].weight.detach().clone()
    old = model[0].weight_mask.clone()
    step_once(model, optimizer, 0)
    mask = model[0].weight_mask
    assert not torch.equal(mask, old)
    for copied in (target, plain):
        assert not copied[0].weight[~mask].any()
    assert torch.equal(target[0].weight_mask, mask)
    stays = mask & old
    assert torch.equal(target[0].weight[stays], before[stays])


AVERAGES = {
    "mean": {},
    "exponential": {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)},
    "exponential, one by one": {"avg_fn": get_ema_avg_fn(DECAY)},
}


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 4))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("block", [STATIC, SET])
def test_averaged_model(average, use_buffers, block):
    """Against a dense average of the same weights; tracked where masks would have to be averaged."""
    model, optimizer, sparsity = sparse(block, normalised())
    averaged = AveragedModel(model, use_buffers=use_buffers, **AVERAGES[average])
    plain = normalised()
    reference = AveragedModel(plain, use_buffers=use_buffers, **AVERAGES[average])
    is_tracked = use_buffers
    if is_tracked:
        sparsity.track(averaged)
    for step in range(8):
        old = model[0].weight_mask.clone()
        step_once(model, optimizer, step)
        plain.load_state_dict({n: v for n, v in model.state_dict().items() if not n.endswith("_mask")})
        if is_tracked:
            dropped = old & ~model[0].weight_mask
            reference.module[0].weight.data[dropped] = 0
            dropped = reference.module[3].weight.data[~model[3].weight_mask].zero_()
            reference.module[3].weight.data[~model[3].weight_mask] = 0
        averaged.update_parameters(model)
        reference.update_parameters(plain)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(averaged.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    assert torch.equal(averaged.module[0].weight_mask, model[0].weight_mask)
    batches = [inputs(step) for step in range(3)]
    for one in (averaged, reference):
        update_bn(batches, one)
    torch.testing.assert_close(averaged.eval()(batches[0]), reference.eval()(batches[0]))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_averaged_model_with_buffers_that_is_not_tracked(average, compute):
    """The weights are averaged as dense ones are; the mask shows every connection that the average ever had."""
    model, optimizer, _ = sparse(SET, normalised(), compute=compute, update={"freq": 1})
    averaged = AveragedModel(model, use_buffers=True, **AVERAGES[average])
    plain = normalised()
    reference = AveragedModel(plain, use_buffers=True, **AVERAGES[average])
    union = torch.zeros(48, 32, dtype=torch.bool)
    for step in range(4):
        step_once(model, optimizer, step)
        plain.load_state_dict({n: v for n, v in model.state_dict().items() if not n.endswith("_mask")})
        averaged.update_parameters(model)
        reference.update_parameters(plain)
        union |= model[0].weight_mask
    assert torch.equal(torch.as_tensor(averaged.module[0].weight_mask), union)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(dense(averaged.state_dict()[name]), value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(averaged.eval()(inputs()), reference.eval()(inputs()))


@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("count", ["tensor", "number"])
def test_averaged_model_with_buffers_that_averages_many_tensors_at_once(count, compute):
    """As torch does on a GPU by itself."""
    at_once = get_swa_multi_avg_fn()

    def average(own, other, number):
        at_once(own, other, number if count == "tensor" else int(number))

    model, optimizer, sparsity = sparse(SET, compute=compute, update={"freq": 1})
    averaged = AveragedModel(model, use_buffers=True, multi_avg_fn=average)
    ever = torch.zeros(48, 32, dtype=torch.bool)
    seen = []
    for step in range(4):
        step_once(model, optimizer, step)
        averaged.update_parameters(model)
        ever |= model[0].weight_mask
        seen.append(sparsity.parameters["0.weight"].dense_weight().clone())
    assert torch.equal(torch.as_tensor(averaged.module[0].weight_mask), ever)
    torch.testing.assert_close(dense(averaged.module[0].weight.detach()), torch.stack(seen).mean(0))


def dense(tensor):
    return tensor.dense() if isinstance(tensor, SparseWeight) else tensor


def test_an_attention_layer_of_an_average_computes_like_a_dense_one():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    sparsity = rarefy.SET(0.8, update={"freq": 1}, seed=0, compute="masked")
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    averaged = AveragedModel(model)
    x = torch.randn(2, 5, 16)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    dense = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    state = averaged.module.state_dict()
    dense.load_state_dict({name: value for name, value in state.items() if not name.endswith("_mask")})
    torch.testing.assert_close(averaged.eval()(x), dense.eval()(x))


def test_a_copy_that_is_loaded_keeps_what_the_file_has():
    model, *_ = sparse(STATIC)
    twin = copy.deepcopy(model)
    state = {
        name: torch.ones_like(value) if "mask" not in name else value
        for name, value in model.state_dict().items()
    }
    twin.load_state_dict(state)
    assert twin[0].weight.all()


def test_a_copy_that_is_gone_is_forgotten():
    model, optimizer, sparsity = sparse(SET, update={"freq": 1})
    sparsity.track(copy.deepcopy(model))
    step_once(model, optimizer, 0)
    assert sparsity.step == 1


def test_a_group_tracks_every_members_weights():
    model = network()
    blocks = [
        {**SET, "update": {"freq": 1}, "param_filter": glob, "compute": "masked"} for glob in ("0.*", "2.*")
    ]
    group = rarefy.configure(blocks, seed=0)
    group.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    group.apply(optimizer)
    target = copy.deepcopy(model)
    group.track(target)
    step_once(model, optimizer, 0)
    assert all(torch.equal(target[index].weight_mask, model[index].weight_mask) for index in (0, 2))


def test_what_cannot_be_tracked_is_refused():
    sparsity = rarefy.SET(0.8)
    with pytest.raises(RarefyError, match=r"track comes after apply\(model\)"):
        sparsity.track(network())
    sparsity.apply(network())
    with pytest.raises(RarefyError, match=r"track takes a copy of the model .*; 0\.weight is not in it"):
        sparsity.track(nn.Linear(2, 2))
