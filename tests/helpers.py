"""What several test files share: small models, training steps, and the exactness checks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.algorithms.base import Sparsifier
from rarefy.storage.parameter import SparseParameter

CYCLE, ANNEALED = [0.5, 0.8, 0.65], {"type": "cosine", "init": 0.5, "half_period": 7}


class Experts(nn.Module):
    """A 3-D weight, as mixture-of-experts layers have."""

    def __init__(self, experts: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, inputs, outputs, dtype=dtype) / inputs**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio->bo", x, self.weight)


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Linear layers with and without bias, a convolution, a 3-D weight, a norm."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 16, dtype=dtype),
        nn.Tanh(),
        nn.Unflatten(1, (4, 4)),
        nn.Conv1d(4, 8, 3, padding=1, dtype=dtype),
        nn.Flatten(),
        nn.LayerNorm(32, dtype=dtype),
        Experts(2, 32, 12, dtype),
        nn.Linear(12, 8, bias=False, dtype=dtype),
    )


def batch(step: int, dtype: torch.dtype = torch.float32, size: int = 6) -> torch.Tensor:
    """The inputs of one step, a function of the step alone."""
    return torch.randn(size, 12, generator=torch.Generator().manual_seed(step)).to(dtype)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, micro_batches: int = 1
) -> float:
    """One optimizer step with gradient accumulation; the loss."""
    dtype = next(model.parameters()).dtype
    optimizer.zero_grad()
    total = 0.0
    for piece in batch(step, dtype).chunk(micro_batches):
        loss = (model(piece) - 1).square().mean() / micro_batches
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    return total


def sparse_parameters(sparsity: Sparsifier) -> list[SparseParameter]:
    return [parameter for algorithm in sparsity.algorithms for parameter in algorithm.parameters.values()]


def assert_exact_zeros(sparsity: Sparsifier, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Weight, gradient and every same-shaped state of inactive connections are exact zeros, or do not exist."""
    for parameter in sparse_parameters(sparsity):
        if parameter.storage.kind == "compact":
            assert parameter.weight.connections == int(parameter.mask.sum())
            continue
        inactive, weight = ~parameter.mask, parameter.weight
        tensors = {"weight": weight.detach()}
        if weight.grad is not None:
            tensors["grad"] = weight.grad
        for key, value in (optimizer.state.get(weight, {}) if optimizer else {}).items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                tensors[key] = value
        for key, value in tensors.items():
            assert torch.equal(value[inactive], torch.zeros_like(value[inactive])), f"{parameter.name}: {key}"


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every weight, mask and optimizer tensor, copied."""
    found = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, tensors in them bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return one == other


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def needs_torch(version: str, why: str) -> pytest.MarkDecorator:
    """Skips a test with a torch below `version`, and says what that one cannot do."""
    present = tuple(int(number) for number in torch.__version__.split(".")[:2])
    wanted = tuple(int(number) for number in version.split("."))
    return pytest.mark.skipif(present < wanted, reason=f"torch {version} or newer: before, {why}")


# Imported by name, since torch 2.6 does not do it.
SIZES_MAY_CHANGE = hasattr(importlib.import_module("torch.compiler.config"), "dynamic_sources")

needs_changing_sizes = pytest.mark.skipif(
    not SIZES_MAY_CHANGE, reason="torch takes sizes of parameters for fixed"
)
