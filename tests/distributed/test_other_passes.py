"""Passes beside the usual ones, in two processes: past the wrapper, without a sparse weight, and of a copy."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rarefy
from ranks import in_processes
from rarefy.errors import RarefyError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, uses_layer: bool = True) -> Tensor:
        hidden = self.norm(x)
        return hidden + self.layer(hidden) if uses_layer else hidden


def wrapped(is_sparse: bool, **options: Any) -> DistributedDataParallel:
    model = Net()
    sparsity = rarefy.Static(0.5, seed=1)
    if not is_sparse:
        sparsity.apply(model)
        rarefy.finalize(model)
        return DistributedDataParallel(model, **options)
    sparsity.apply(model)
    ddp = DistributedDataParallel(model, **options)
    sparsity.apply(torch.optim.SGD(model.parameters(), lr=0.1))
    return ddp


def x_of(rank: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))


def gradient(ddp: DistributedDataParallel) -> Tensor:
    weight = ddp.module.layer.weight
    return torch.zeros(weight.shape) if weight.grad is None else torch.empty(weight.shape).copy_(weight.grad)


def past_the_wrapper(rank: int, ddp: DistributedDataParallel) -> list[Tensor]:
    """One process looks at a gradient by itself between two steps."""
    ddp(x_of(rank)).square().sum().backward()
    found = [gradient(ddp)]
    ddp.zero_grad()
    if rank == 0:
        ddp.module(x_of(7)).sum().backward()
        ddp.zero_grad()
    ddp(x_of(rank)).square().sum().backward()
    return [*found, gradient(ddp)]


def without_the_layer(rank: int, ddp: DistributedDataParallel) -> list[Tensor]:
    """The first pass of one process uses no sparse weight."""
    found = []
    for step in range(2):
        ddp.zero_grad()
        ddp(x_of(rank), uses_layer=rank == 0 or step > 0).square().sum().backward()
        found.append(gradient(ddp))
    return found


def of_a_copy(rank: int) -> dict[str, Any]:
    ddp = wrapped(True)
    # Of a wrapper that was never called torch has no hook that tells of it.
    copies = [copy.deepcopy(ddp)]
    ddp(x_of(rank)).sum().backward()
    copies += [copy.deepcopy(ddp), pickle.load(io.BytesIO(pickle.dumps(ddp)))]
    with torch.no_grad():
        same = [torch.equal(one(x_of(5)), ddp(x_of(5))) for one in copies]
    messages = []
    for one in copies:
        with pytest.raises(RarefyError) as refused:
            one(x_of(rank))
        messages.append(str(refused.value))
    ddp(x_of(rank)).sum().backward()
    inner = copy.deepcopy(copies[0].module)
    sparsity = rarefy.Static(0.5, seed=1)
    sparsity.apply(inner)
    again = DistributedDataParallel(inner)
    again(x_of(rank)).sum().backward()
    return {"same": same, "messages": messages, "again": gradient(again)}


def everything(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for is_sparse in (False, True):
        found[f"past {is_sparse}"] = past_the_wrapper(rank, wrapped(is_sparse))
        ddp = wrapped(is_sparse, find_unused_parameters=True)
        found[f"without {is_sparse}"] = without_the_layer(rank, ddp)
    weight = wrapped(True).module.layer.weight_mask
    return {**found, "mask": torch.empty(weight.shape, dtype=torch.bool).copy_(weight), **of_a_copy(rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(2, everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", ["past", "without"])
def test_gradients_are_those_that_torch_would_average(kind: str, found: list[dict[str, Any]]) -> None:
    for one in found:
        for dense, sparse in zip(one[f"{kind} False"], one[f"{kind} True"], strict=True):
            assert float(dense.abs().sum()) > 0
            torch.testing.assert_close(sparse, dense * one["mask"])


def test_a_copy_of_a_wrapper_computes_and_does_not_train(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["same"] == [True, True, True]
        assert one["again"].any() and torch.equal(one["again"], found[0]["again"])
        assert all("copy of a DistributedDataParallel" in text for text in one["messages"])
