"""Over 25 updates every method takes the masks of its naive NumPy version, one by one, in both storages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from contract_rows import ROWS, takes
from naive_methods import CASES, FREQ, NAMES, RATE, SEED, SIZES, Network, batch
from rarefy.methods.registry import ALGORITHMS

UPDATES = 25


def build(name: str, compute: str) -> tuple[nn.Sequential, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*SIZES[:2]), nn.Tanh(), nn.Linear(*SIZES[1:])).double()
    method = name.split()[0]
    block = {"algorithm": method, "seed": SEED, "compute": compute, **CASES[name].options}
    if takes(method, "update"):
        block = {"update": {"freq": FREQ}, **block}
    sparsity = rarefy.configure(block)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    return model, optimizer, sparsity.algorithms[0].parameters


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x, target = map(torch.from_numpy, batch(step))
    optimizer.zero_grad()
    (model(x) - target).square().mean().backward()
    optimizer.step()


def assert_equal(model: nn.Sequential, parameters: Any, naive: Network, step: int) -> None:
    states = model.state_dict()
    for index, name in enumerate(NAMES):
        assert np.array_equal(states[f"{name}_mask"].numpy(), naive.masks[index]), f"step {step}: {name}"
        used = np.where(naive.used[index], naive.weights[index], 0)
        trained = parameters[name].true_weight()
        facts = (trained, naive.weights[index]), (states[name], used), (model.get_parameter(name), used)
        for found, expected in facts:
            dense = found.detach().to_dense() if found.layout is not torch.strided else found.detach()
            np.testing.assert_allclose((dense + 0.0).numpy(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_every_update_agrees_with_the_naive_version(name, compute):
    model, optimizer, parameters = build(name, compute)
    trained = {weight: parameter.true_weight() for weight, parameter in parameters.items()}
    naive = Network({**model.state_dict(), **trained}, CASES[name])
    for step in range(1, UPDATES * FREQ + 1):
        train(model, optimizer, step)
        naive.train(step)
        assert_equal(model, parameters, naive, step)
    assert (naive.moved > 100) == ROWS[name.split()[0]].moves


def test_every_method_has_a_naive_version():
    assert {name.split()[0] for name in CASES} == set(ALGORITHMS) == set(ROWS)
