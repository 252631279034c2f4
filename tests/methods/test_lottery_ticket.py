"""The loop of docs/methods.md: a rewound model has early weights and late masks, in both storages."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rarefy

SHARES = [1 - 0.8**number for number in range(4)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_rounds_prune_by_late_weights_and_start_from_early_ones(compute, distribution):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4))
    sparsity = rarefy.GMP(SHARES, compute=compute, distribution=distribution)
    sparsity.autoupdate = False
    sparsity.apply(model)
    early: dict[str, torch.Tensor] = {}
    for number, share in enumerate(SHARES):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparsity.apply(optimizer)
        if number == 0:
            train(model, optimizer, range(5))
            early = copy.deepcopy(model.state_dict())
        train(model, optimizer, range(5, 20))
        late = copy.deepcopy(model.state_dict())
        kept = sum(int(value.sum()) for name, value in late.items() if name.endswith("_mask"))
        assert abs(kept - (1 - share) * 512) <= 1
        if number == len(SHARES) - 1:
            break
        sparsity.update()
        masks = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("_mask")}
        model.load_state_dict({**early, **masks})
        now = model.state_dict()
        for name, mask in masks.items():
            weight = name.removesuffix("_mask")
            assert torch.equal(now[name], mask) and bool((mask <= late[name]).all())
            assert torch.equal(now[weight].to_dense(), early[weight].to_dense() * mask)
            if distribution == "uniform":
                assert late[weight].to_dense().abs()[mask].min() >= late[weight].to_dense().abs()[~mask].max()
