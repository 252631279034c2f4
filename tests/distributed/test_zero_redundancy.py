"""torch's `ZeroRedundancyOptimizer`, which shares the states out among the processes: zeros stay zeros."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import rarefy
from ranks import in_processes
from two_ranks import (
    EVERY_STATE,
    RATE,
    RIGL,
    Found,
    Net,
    assert_same,
    assert_zeros,
    own_batches,
    result,
    train,
)

STORAGES = ("masked", "compact")


def learnt(rank: int, compute: str) -> Found:
    """What one of two processes has after a run."""
    # Here, as the import warns, which pytest would take for an error.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Net()
    sparsity = rarefy.configure({**RIGL, "compute": compute})
    sparsity.apply(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=RATE, weight_decay=0.0)
    sparsity.apply(optimizer)
    train(DistributedDataParallel(model), optimizer, own_batches(rank, 2))
    own = result(sparsity, optimizer.optim)
    held = torch.tensor(len(optimizer.optim.state))
    dist.all_reduce(held)
    # Each state is somewhere, and none is everywhere.
    assert int(held) == len(list(model.parameters()))
    return own


def work(rank: int) -> dict[str, Found]:
    return {compute: learnt(rank, compute) for compute in STORAGES}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    """What both processes found."""
    return in_processes(2, work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("compute", STORAGES)
def test_it_learns_what_one_process_learns(compute: str, results: list[dict[str, Found]]) -> None:
    for rank in results:
        assert_same(rank[compute])


@pytest.mark.parametrize("compute", STORAGES)
def test_each_state_is_in_one_process_with_its_zeros(compute: str, results: list[dict[str, Found]]) -> None:
    assert sum(assert_zeros(rank[compute]) for rank in results) == EVERY_STATE
