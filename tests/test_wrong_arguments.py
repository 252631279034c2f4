"""What a first script gets wrong: an algorithm for a model, a model for an algorithm, the order, twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import ConfigError, RarefyError


def applied() -> tuple[nn.Linear, Any]:
    layer = nn.Linear(8, 8)
    sparsity = rarefy.configure(0.75)
    sparsity.apply(layer)
    return layer, sparsity


def test_an_algorithm_for_a_model() -> None:
    _, sparsity = applied()
    for call in (rarefy.finalize, rarefy.compact):
        with pytest.raises(RarefyError, match="model: a Static is not allowed; give the model"):
            call(sparsity)


def test_a_model_for_an_algorithm() -> None:
    layer: Any = applied()[0]
    with pytest.raises(RarefyError, match="summary: a Linear is not allowed; give what was applied"):
        rarefy.summary(layer)


def test_apply_twice() -> None:
    layer, sparsity = applied()
    with pytest.raises(RarefyError, match="weight is sparse already, by this algorithm; apply it once"):
        sparsity.apply(layer)


def test_a_percentage_without_the_length_of_the_run() -> None:
    block = {"algorithm": "set", "sparsity": 0.75, "update": {"freq": 2, "stop": "75%"}}
    with pytest.raises(ConfigError, match="a percentage needs the length of the run, num_steps=1000"):
        rarefy.configure(block)
    rarefy.configure(block, num_steps=1000)


def test_the_order_of_sparsify() -> None:
    accelerate = pytest.importorskip("accelerate")
    from rarefy.integrations.accelerate import sparsify

    layer: Any = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(RarefyError, match=r"the order is sparsify\(accelerator, config, model, optimizer\)"):
        sparsify(accelerate.Accelerator(cpu=True), layer, optimizer, 0.75)  # pyright: ignore[reportArgumentType]
