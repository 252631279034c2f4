"""The order in which model, optimizer and algorithm load their states."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import copy
from itertools import permutations

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import RarefyError


def parts(compute, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    block = {"algorithm": "set", "sparsity": 0.7, "seed": 0, "update": {"freq": 2}, "compute": compute}
    sparsity = rarefy.configure(block)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    return model, optimizer, sparsity


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("loads", ["masked", "compact"])
@pytest.mark.parametrize("saves", ["masked", "compact"])
def test_a_state_loads_after_its_model_or_is_refused(saves, loads, order):
    trained = parts(saves, seed=0)
    train(*trained[:2], range(5))
    saved = [copy.deepcopy(part.state_dict()) for part in trained]
    train(*trained[:2], range(5, 9))
    fresh = parts(loads, seed=1)
    if order.index(1) < order.index(0):
        with pytest.raises(RarefyError, match=r"0\.weight belongs to another topology; load the model's"):
            fresh[1].load_state_dict(saved[1])
        return
    for index in order:
        fresh[index].load_state_dict(saved[index])
    train(*fresh[:2], range(5, 9))
    torch.testing.assert_close(fresh[0][0].weight.detach() + 0, trained[0][0].weight.detach() + 0)
    assert torch.equal(fresh[0][0].weight_mask, trained[0][0].weight_mask)


@pytest.mark.parametrize("goes_on", ["masked", "compact"])
def test_entries_that_are_loaded_before_the_optimizer_is_followed_are_refused(goes_on):
    trained = parts("compact", seed=0)
    train(*trained[:2], range(3))
    saved = copy.deepcopy(trained[1].state_dict())
    model, _, sparsity = parts(goes_on, seed=1)
    model.load_state_dict(trained[0].state_dict())
    sparsity.load_state_dict(copy.deepcopy(trained[2].state_dict()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.load_state_dict(saved)
    with pytest.raises(RarefyError, match=r"0\.weight has one entry for each connection.*apply it first"):
        sparsity.apply(optimizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsity.apply(optimizer)
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(3, 5))
    train(*trained[:2], range(3, 5))
    torch.testing.assert_close(model[0].bias, trained[0][0].bias)


def test_a_state_that_has_by_chance_as_many_numbers_as_connections_is_none():
    model, _, sparsity = parts("compact", seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weight = model[0].weight
    number = sparsity.parameters["0.weight"].active
    optimizer.state[weight] = {"exp_avg": torch.zeros(16, 8).double(), "of_rows": torch.ones(number)}
    sparsity.apply(optimizer)
    assert optimizer.state[weight]["of_rows"].shape == (number,)


def test_what_was_saved_as_entries_is_marked_by_its_keys():
    """A tensor that has by chance as many numbers as there are connections is none of them."""
    model, optimizer, sparsity = parts("compact", seed=0)
    train(model, optimizer, range(3))
    weight = model[0].weight
    stranger = torch.arange(sparsity.parameters["0.weight"].active, dtype=torch.float64)
    optimizer.state[weight]["momentum_of_mine"] = stranger
    saved = copy.deepcopy(optimizer.state_dict())
    assert sorted(saved["entries"][0]) == [["exp_avg"], ["exp_avg_sq"]]
    assert saved["state"][0]["exp_avg"].dim() == 1
    for compute in ("masked", "compact"):
        fresh = parts(compute, seed=1)
        fresh[0].load_state_dict(model.state_dict())
        fresh[1].load_state_dict(copy.deepcopy(saved))
        state = fresh[1].state[fresh[0][0].weight]
        assert torch.equal(state["momentum_of_mine"], stranger)
        assert state["exp_avg"].shape == (16, 8)


def test_a_state_without_marks_is_told_by_shape_and_meaning():
    """As files from before have it."""
    model, optimizer, _ = parts("compact", seed=0)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved.pop("entries")
    fresh = parts("masked", seed=1)
    fresh[0].load_state_dict(model.state_dict())
    fresh[1].load_state_dict(saved)
    found = fresh[1].state[fresh[0][0].weight]["exp_avg"]
    assert torch.equal(found, optimizer.state[model[0].weight]["exp_avg"].dense())
