"""Unusual uses of a model with compact storage: each does what masked storage does, or is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from rarefy.errors import ConfigError
from rarefy.nn import SparseConv1D


def prepare(compute, model=None, **changes):
    torch.manual_seed(0)
    if model is None:
        model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8)).double()
    block = {"algorithm": "rigl", "sparsity": 0.75, "seed": 1, "update": {"freq": 2}, **changes}
    sparsity = rarefy.configure({"compute": compute, **block})
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    return model, sparsity, optimizer


def inputs(step):
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def assert_storages_agree(learn, make=lambda: None, steps=6, **changes):
    """`learn(model, optimizer, step)` leaves the same masks and weights with either storage."""
    states = []
    for compute in ("masked", "compact"):
        model, sparsity, optimizer = prepare(compute, make(), **changes)
        first = [parameter.mask.clone() for parameter in sparsity.parameters.values()]
        for step in range(steps):
            optimizer.zero_grad()
            learn(model, optimizer, step)
        states.append(model.state_dict())
        last = [parameter.mask for parameter in sparsity.parameters.values()]
        assert any(not torch.equal(*pair) for pair in zip(first, last, strict=True) if pair[0].numel())
    torch.testing.assert_close(states[1], states[0], rtol=1e-9, atol=1e-12)


# ---- backward passes -----------------------------------------------------------------------------------------------


def penalized(model, optimizer, step):
    x = inputs(step).requires_grad_()
    y = model(x).square().sum()
    [slope] = torch.autograd.grad(y, x, create_graph=True)
    (y + slope.square().sum()).backward()
    optimizer.step()


def asked_twice(model, optimizer, step):
    y = model(inputs(step)).square().sum()
    torch.autograd.grad(y, list(model.parameters()), retain_graph=True)
    y.backward()
    optimizer.step()


def reading_the_weight(model, optimizer, step):
    hidden = F.linear(inputs(step), model[0].weight, model[0].bias)
    model[2](model[1](hidden)).square().sum().backward()
    optimizer.step()


def thawed(model, optimizer, step):
    model[0].requires_grad_(step > 2)
    model(inputs(step)).square().sum().backward()
    optimizer.step()


def under_autocast(model, optimizer, step):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model[2](model[0](inputs(step)))
    y.square().sum().backward()
    optimizer.step()


def called_twice(model, optimizer, step):
    (model(inputs(step)).square().sum() + model(input=inputs(step + 50)).sum()).backward()
    optimizer.step()


def zeroed_in_place(model, optimizer, step):
    optimizer.zero_grad(set_to_none=False)
    model(inputs(step)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "learn",
    [penalized, asked_twice, reading_the_weight, thawed, under_autocast, called_twice, zeroed_in_place],
)
def test_the_same_masks_and_weights(learn):
    assert_storages_agree(learn)


def learn_with_inputs(model, optimizer, step):
    model(inputs(step)).square().sum().backward(inputs=list(model.parameters()))
    optimizer.step()


def test_masked_storage_needs_no_more_than_the_gradients_that_are_asked_for():
    model, _, optimizer = prepare("masked")
    before = model[0].weight_mask.clone()
    for step in range(2):
        learn_with_inputs(model, optimizer, step)
    assert not torch.equal(model[0].weight_mask, before)


def test_compact_storage_needs_no_more_either():
    masks = []
    for compute in ("masked", "compact"):
        model, _, optimizer = prepare(compute)
        for step in range(4):
            optimizer.zero_grad()
            learn_with_inputs(model, optimizer, step)
        masks.append(model[0].weight_mask.clone())
    assert torch.equal(*masks)


def test_layers_without_rows():
    def make():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.ModuleList([nn.Linear(24, 0), nn.Linear(0, 8), nn.Linear(24, 8)]).double()

    def learn(model, optimizer, step):
        (model[1](model[0](inputs(step))) + model[2](inputs(step))).square().sum().backward()
        optimizer.step()

    assert_storages_agree(learn, make)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_no_active_connection_at_all(options):
    """Algorithms refuse it; a state dict of somebody's own, or a call to the storage, may ask for it."""
    model, sparsity, _ = prepare("compact", update={"freq": 100})
    for parameter in sparsity.parameters.values():
        parameter.set_mask(torch.zeros_like(parameter.mask), [])
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    sparsity.apply(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        model(inputs(step)).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert model[0].weight.connections == 0 and not model[0].weight.any() and model[2].bias.grad.any()


def test_a_graph_from_before_a_change_of_topology_is_refused():
    model, sparsity, optimizer = prepare("compact")
    loss = model(inputs(0)).square().sum()
    parameter = sparsity.parameters["0.weight"]
    parameter.set_mask(parameter.mask.roll(1, 1), [optimizer])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_dense_gradient_keeps_no_graph_alive():
    model, sparsity, _ = prepare("compact", update={"freq": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(inputs(0)).square().sum().backward(create_graph=True)
    for parameter in sparsity.parameters.values():
        assert not parameter.dense_gradient.value.requires_grad


# ---- the life of a model -------------------------------------------------------------------------------------------


def test_an_optimizer_goes_on_with_a_finalized_model():
    states = []
    for compute in ("masked", "compact"):
        model, _, optimizer = prepare(compute, update={"freq": 50})
        for step in range(5):
            if step == 3:
                rarefy.finalize(model)
            optimizer.zero_grad()
            model(inputs(step)).square().sum().backward()
            optimizer.step()
        states.append(model.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=1e-9, atol=1e-12)


def test_a_bare_conv1d_becomes_dense():
    layer = SparseConv1D(torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5)
    x, weight = torch.rand(3, 6), layer.weight.detach().dense()
    expected = layer(x)
    assert rarefy.finalize(nn.Sequential(layer))[0] is layer
    assert type(layer.weight) is nn.Parameter and torch.equal(layer.weight, weight)
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    torch.testing.assert_close(layer(x), expected)


def test_a_bare_conv1d_is_made_sparse_by_an_algorithm():
    model = nn.Sequential(SparseConv1D(torch.ones(6, 4, dtype=torch.bool)))
    _, sparsity, _ = prepare("compact", model)
    assert sparsity.parameters["0.weight"].shape == (6, 4) and model(torch.ones(2, 6)).shape == (2, 4)


def test_assigning_a_state_dict_takes_its_dtype():
    model, _, _ = prepare("compact")
    state = {
        key: value.float() if value.dtype.is_floating_point else value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_copy_computes_no_dense_gradient():
    model, sparsity, _ = prepare("compact", update={"freq": 1})
    model(inputs(0)).sum().backward()
    assert model[0].weight._cell.collect is not None
    assert copy.deepcopy(model)[0].weight._cell.collect is None
    assert sparsity.parameters["0.weight"].dense_gradient.value.shape == (32, 24)


def test_one_entry_of_a_group_is_compact():
    block = {"algorithm": "set", "sparsity": 0.5, "update": {"freq": 1}}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 8)).double()
    group = rarefy.configure(
        [
            {**block, "compute": "compact", "param_filter": "0.weight"},
            {**block, "compute": "masked", "param_filter": "1.weight"},
        ]
    )
    group.apply(model)
    optimizer = torch.optim.AdamW(model.parameters())
    group.apply(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        model(inputs(step)).sum().backward()
        optimizer.step()
        for one in (model, optimizer, group):
            one.load_state_dict(copy.deepcopy(one.state_dict()))
    rows = rarefy.summary(group).rows
    assert [(row.name, row.shape, row.actual, row.storage) for row in rows] == [
        ("0.weight", (32, 24), 0.5, "compact"),
        ("1.weight", (8, 32), 0.5, "masked"),
    ]


def test_compact_for_a_bias_is_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"compact for 0\.bias \(it is the bias of its module\)"):
        prepare("compact", param_filter="0.*")


def test_modules_may_take_anything_first():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(24, 8, dtype=torch.float64))

        def forward(self, batch):
            return batch["x"] @ self.matrix

    model, sparsity, _ = prepare("auto", Product())
    model({"x": inputs(0)}).sum().backward()
    assert sparsity.parameters["matrix"].tokens is None
