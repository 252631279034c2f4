"""The phases of ac_dc go by the step, whatever was frozen when one of them began."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rarefy.methods.ac_dc import ACDC


@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("frozen", [range(0), range(10, 15), range(3, 30)])
def test_weights_that_were_frozen_when_a_phase_began_join_the_next(frozen: range, compute: str) -> None:
    model = nn.Linear(16, 8)
    algorithm = ACDC(0.75, update={"freq": 7, "start": 5, "stop": 48}, compute=compute)
    algorithm.apply(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    algorithm.apply(optimizer)
    found = {}
    for step in range(50):
        model.weight.requires_grad_(step not in frozen)
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        found[algorithm.step] = algorithm.parameters["weight"].actual_sparsity
    assert algorithm.update_schedule.steps == [5, 12, 19, 26, 33, 40, 47]
    assert [found[step] for step in (33, 40, 47, 50)] == [0.75, 0.0, 0.75, 0.75]
