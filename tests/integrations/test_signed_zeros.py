"""Masks inside dense weights: exact, harmless to the model, for masked and compact storage."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import rarefy
from helpers import train_step
from rarefy.integrations.signed_zeros import active_connections, carry_masks, with_signed_zeros
from rarefy.nn import SparseLinear

RIGL = {"algorithm": "rigl", "sparsity": 0.75, "drop_fraction": 0.5, "update": {"freq": 1}, "seed": 0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_mask_comes_back(dtype):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(30, 20, generator=generator) < 0.5
    weight = torch.randn(30, 20, generator=generator).to(dtype) * mask
    weight[torch.rand(30, 20, generator=generator) < 0.5] = 0
    written = with_signed_zeros(weight, mask)
    assert torch.equal(written, weight) and written is not weight
    assert torch.equal(active_connections(written), mask)


def test_weights_without_active_zeros_are_not_copied():
    weight = torch.tensor([0.0, 2.0])
    assert with_signed_zeros(weight, weight != 0) is weight


def sparse_model():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    sparsity = rarefy.configure({**RIGL, "compute": "masked"})
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    train_step(model, optimizer, 0)
    carry_masks(model, list(sparsity.parameters))
    return model


def without_masks(state, prefix=""):
    return {prefix + name: value for name, value in state.items() if not name.endswith("_mask")}


def masks_of(model):
    return [model[place].weight_mask.clone() for place in (0, 2)]


def test_writing_leaves_the_model_as_it_is():
    model = sparse_model()
    model.state_dict()
    newly_grown = [(layer.weight == 0) & layer.weight_mask for layer in (model[0], model[2])]
    assert any(bool(grown.any()) for grown in newly_grown)
    assert not any(
        bool(torch.signbit(model[2 * i].weight[grown]).any()) for i, grown in enumerate(newly_grown)
    )


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.ModuleDict({"inner": model})])
def test_a_dense_state_dict_brings_the_masks(wrap):
    model, other = sparse_model(), sparse_model()
    train = torch.optim.SGD(other.parameters(), lr=0.1)
    train_step(other, train, 5)
    other[0].weight_mask.copy_(other[0].weight_mask.flip(0))
    state = without_masks(wrap(model).state_dict())
    wrap(other).load_state_dict(state)
    for mask, expected in zip(masks_of(other), masks_of(model), strict=True):
        assert torch.equal(mask, expected)
    assert torch.equal(other[0].weight, model[0].weight) and torch.equal(other[2].weight, model[2].weight)


def test_variables_are_left_alone():
    model = sparse_model()
    assert all(
        weight is model.get_parameter(name)
        for name, weight in model.state_dict(keep_vars=True).items()
        if "mask" not in name
    )


def test_masks_that_a_state_dict_has_are_not_touched():
    model, other = sparse_model(), sparse_model()
    state = model.state_dict()
    state["0.weight_mask"] = torch.zeros(12, 12, dtype=torch.bool)
    other.load_state_dict(state)
    assert not other[0].weight_mask.any() and not other[0].weight.any()


def test_a_part_of_a_state_dict_changes_that_part_only():
    model, other = sparse_model(), sparse_model()
    before = masks_of(other)
    shard = {name: value for name, value in without_masks(model.state_dict()).items() if name.startswith("2")}
    other.load_state_dict(shard, strict=False)
    assert torch.equal(other[0].weight_mask, before[0])
    assert torch.equal(other[2].weight, model[2].weight)


def test_pickled_models_go_on_carrying_masks():
    model = sparse_model()
    twin = pickle.loads(pickle.dumps(model))
    twin.load_state_dict(without_masks(twin.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(masks_of(twin), masks_of(model), strict=True))


def test_compact_storage():
    mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    first = nn.Sequential(SparseLinear(mask), nn.Tanh(), SparseLinear(mask.t()))
    second = nn.Sequential(SparseLinear(mask.t()), nn.Tanh(), SparseLinear(~mask))
    with torch.no_grad():
        first[0].weight.entries[:5] = 0.0
    for model in (first, second):
        carry_masks(model, ["0.weight", "2.weight"])
    second.load_state_dict(without_masks(first.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(masks_of(second), masks_of(first), strict=True))
    assert torch.equal(second[0].weight.entries, first[0].weight.entries)
