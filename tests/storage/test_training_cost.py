"""Operations and bytes, against numbers made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy
from rarefy.kernels import instruction_set
from rarefy.storage.training_cost import Cost, memory_of, operations_of, step_operations


def trained(block, optimizer=torch.optim.AdamW):
    """A layer of 8 × 16 weights and 8 biases, after one step."""
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    sparsity = rarefy.configure(block)
    sparsity.apply(model)
    trains = optimizer(model.parameters(), lr=1e-2)
    sparsity.apply(trains)
    model(torch.ones(2, 16)).sum().backward()
    trains.step()
    return model, trains, sparsity


def test_the_three_products_of_a_step():
    assert step_operations(1000, 100, used=100, active=100) == 3000
    assert step_operations(1000, 100, used=20, active=50) == 2 * 200 + 500
    assert step_operations(0, 0, 0, 0) == 0


def test_masked_storage_holds_everything_and_a_mask():
    model, trains, sparsity = trained({"sparsity": 0.75, "compute": "masked"})
    memory = memory_of(model, [trains], sparsity.parameters.values())
    numbers = 4 * (128 + 8)
    assert memory.weights == Cost(numbers + 128, numbers)
    assert memory.gradients == Cost(numbers, numbers)
    # Two averages of each weight, and a count of steps for each of the two parameters.
    assert memory.states == Cost(2 * numbers + 8, 2 * numbers + 8)
    assert memory.total == memory.weights + memory.gradients + memory.states


@pytest.mark.skipif(instruction_set() == "none", reason="no compiled kernels")
def test_compact_storage_holds_the_active_ones():
    model, trains, sparsity = trained({"sparsity": 0.75, "compute": "compact"})
    [parameter] = sparsity.parameters.values()
    memory = memory_of(model, [trains], [parameter])
    numbers = 4 * (32 + 8)
    assert memory.gradients == Cost(numbers, 4 * 136)
    assert memory.states == Cost(2 * numbers + 8, 2 * 4 * 136 + 8)
    assert memory.weights == Cost(numbers + parameter.storage.index_bytes, 4 * 136)


def test_a_frozen_weight_has_no_gradient():
    model = nn.Linear(4, 4, bias=False).requires_grad_(False)
    assert memory_of(model, [], []).gradients == Cost(0, 0)


def test_the_summary_says_what_training_needs():
    _, _, sparsity = trained({"algorithm": "rigl", "sparsity": 0.75, "compute": "masked"})
    found = rarefy.summary(sparsity)
    assert found.operations == Cost(6 * 32, 6 * 128)
    assert found.at_updates == Cost(2 * 2 * 32 + 2 * 128, 6 * 128)
    lines = str(found).splitlines()
    flops = "training FLOPs of sparse weights: 25.0% of dense, 50.0% in steps that collect the dense gradient"
    assert flops in lines
    total = found.memory.total
    share = f"{100 * total.sparse / total.dense:.1f}% of dense"
    kept = f"{total.sparse:,} of {total.dense:,} bytes"
    assert f"weights, gradients and optimizer states: {kept}, {share}" in lines
    assert all(f"<div>{line}</div>" in found._repr_html_() for line in found.costs())


def test_forward_passes_with_fewer_connections():
    block = {"algorithm": "top_kast", "sparsity": 0.5, "forward_sparsity": 0.75, "update": {"freq": 9}}
    _, _, sparsity = trained({**block, "compute": "masked"})
    assert operations_of(sparsity.parameters.values()) == Cost(2 * (32 + 32 + 64), 6 * 128)
    assert "training FLOPs of sparse weights: 33.3% of dense" in str(rarefy.summary(sparsity))


def test_nothing_is_sparse_yet():
    assert rarefy.summary(rarefy.configure(0.5)).costs() == []


@pytest.mark.parametrize(("compute", "numbers"), [("masked", 128), ("compact", 64)])
def test_what_a_method_keeps_for_each_connection_is_memory_too(compute, numbers):
    blocks = {
        "gmp": {"algorithm": "gmp", "sparsity": [0.5, 0.6]},
        "movement": {"algorithm": "movement", "sparsity": [0.5, 0.6]},
        "top_kast": {"algorithm": "top_kast", "sparsity": 0.5, "forward_sparsity": 0.75},
    }
    states = {}
    for name, block in blocks.items():
        model, optimizer, sparsity = trained({**block, "update": {"freq": 9}, "compute": compute})
        memory = memory_of(model, [optimizer], sparsity.parameters.values())
        states[name] = memory.states
    # Four bytes a score; as many of a value that is kept aside, and one says whether there is one.
    assert states["movement"].sparse == states["gmp"].sparse + 4 * numbers
    assert states["top_kast"].sparse == states["gmp"].sparse + 5 * numbers
    assert len({one.dense for one in states.values()}) == 1
