"""Neurons that go, and what becomes of their connections."""

from __future__ import annotations

import torch
from torch import nn

import rarefy
from rarefy.algorithms.view import WeightView


def trained(min_salient: float, compute: str = "masked", sparsity: float = 0.9) -> torch.Tensor:
    """The fan-in of each neuron of a layer some of whose neurons are hardly used."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 4))
    block = {
        "algorithm": "srigl",
        "sparsity": sparsity,
        "update": {"freq": 3},
        "seed": 1,
        "param_filter": "0.weight",
    }
    algorithm = rarefy.configure({**block, "min_salient": min_salient, "compute": compute})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    algorithm.apply(model)
    algorithm.apply(optimizer)
    for step in range(60):
        x = torch.randn(32, 40, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
    return model[0].weight_mask.sum(1)


def test_without_ablation_every_neuron_has_its_inputs():
    assert trained(0.0).tolist() == [4] * 24


def test_ablated_neurons_leave_their_connections_to_the_others():
    for compute in ("masked", "compact"):
        counts = trained(0.75, compute)
        gone = int((counts == 0).sum())
        assert 0 < gone < 24
        # No more than before in all, and as near to it as equal rows come.
        assert counts[counts > 0].unique().tolist() == [24 * 4 // (24 - gone)]


def test_an_update_by_hand():
    block = {"algorithm": "srigl", "sparsity": 0.5, "min_salient": 1.0, "drop_fraction": 0.34}
    algorithm = rarefy.configure(block).algorithms[0]
    weight = torch.arange(1.0, 13.0).view(3, 4)
    mask = torch.tensor([[True, True, False, False]] * 3)
    gradient = torch.zeros(3, 4)
    gradient[2] = torch.tensor([0.0, 0.0, 5.0, 4.0])
    # The two smallest weights are those of the first neuron, and gradients are largest at the last one.
    found = algorithm.update_mask(WeightView.of(weight, mask, 0.5, gradient))
    assert found.sum(1).tolist() == [0, 3, 3] and found[2].tolist() == [True, True, True, False]
    everywhere = WeightView.of(weight, torch.ones(3, 4, dtype=torch.bool), 0.5, gradient)
    assert algorithm.update_mask(everywhere).sum(1).tolist() == [2, 2, 2]


def test_a_threshold_above_all_keeps_the_neuron_with_most():
    algorithm = rarefy.configure({"algorithm": "srigl", "sparsity": 0.5, "min_salient": 1.0})
    mask = torch.tensor([[True, True], [True, True], [False, True]])
    alive = algorithm.algorithms[0].alive(mask, salient=mask, fan_in=5)
    assert int(alive.sum()) == 1 and not alive[2]
