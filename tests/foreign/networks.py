"""A small network, its sparse training, and what is asserted of it, for tests with other people's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy

# In torch 2.6 `get_default_device` fails for the rest of a process in which a default device was taken back.
NEEDS_NO_DEFAULT_DEVICE = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="this torch cannot take a default device back"
)
RIGL = {"algorithm": "rigl", "sparsity": 0.8, "update": {"freq": 2}, "drop_fraction": 0.5}
SET = {**RIGL, "algorithm": "set"}
STATIC = {"algorithm": "static", "sparsity": 0.8}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 4)).to(dtype)


def inputs(step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(inputs(step, dtype)) - 1).square().mean()


def sparse(
    block: dict[str, Any], model: nn.Module | None = None, optimizer: Any = None, **changes: Any
) -> Any:
    """A sparse model in masked storage, its optimizer and its sparsity."""
    model = network() if model is None else model
    sparsity = rarefy.configure({"compute": "masked", "seed": 0, **block, **changes})
    sparsity.apply(model)
    make = (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)) if optimizer is None else optimizer
    optimizer = make(model.parameters())
    sparsity.apply(optimizer)
    return model, optimizer, sparsity


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


def assert_zeros(model: Any, sparsity: Any) -> None:
    """Zeros at inactive connections, and a summary that counts them."""
    for parameter in sparsity.parameters.values():
        assert not parameter.weight.detach()[~parameter.mask].any(), parameter.name
    assert rarefy.summary(sparsity).actual_sparsity > 0.79


def weights(model: Any) -> list[Tensor]:
    return [model[0].weight, model[2].weight]
