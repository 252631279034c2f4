"""A copy of an algorithm holds no model, says so, and goes on from the states of the first."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import RarefyError


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def single(compute: str) -> Any:
    return rarefy.SET(0.8, update={"freq": 3}, compute=compute)


def grouped(compute: str) -> Any:
    moving = {"algorithm": "rigl", "sparsity": 0.8, "update": {"freq": 3}, "param_filter": "0.weight"}
    entries = (moving, {"algorithm": "static", "sparsity": 0.5, "param_filter": "2.weight"})
    return rarefy.configure([{**entry, "compute": compute} for entry in entries])


@pytest.mark.parametrize("build", [single, grouped])
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_copies_go_on_as_the_warning_says(build: Any, compute: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 40))
    optimizer, sparsity = adamw(model), build(compute)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    train(model, optimizer, range(5))
    with pytest.warns(RuntimeWarning, match="holds no model.*load the state_dict"):
        twin, copied = copy.deepcopy((model, sparsity))
    other = adamw(twin)
    copied.apply(twin)
    copied.apply(other)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied.load_state_dict(sparsity.state_dict())
    train(model, optimizer, range(5, 12))
    train(twin, other, range(5, 12))
    for name, wanted in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], wanted)


def test_what_was_not_applied_is_copied_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = copy.deepcopy(single("masked"))
    layer = nn.Linear(64, 64)
    copied.apply(layer)
    assert int(layer.weight.count_nonzero()) == 819


def test_an_algorithm_is_not_pickled() -> None:
    sparsity = single("masked")
    sparsity.apply(nn.Linear(64, 64))
    for one in (sparsity, single("masked")):
        with pytest.raises(RarefyError, match=r"cannot be pickled.*state_dict"):
            pickle.dumps(one)
