"""Several processes read every sample once an epoch, all together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from rarefy.data import LoaderConfig, make_loader, shard
from rarefy.data.loader import ResumableBatchSampler
from rarefy.errors import RarefyError

DATA = TensorDataset(torch.arange(24))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class OwnLoader(DataLoader[Any]):
    pass


def shares(make: Any, processes: int) -> list[Any]:
    return [shard(make(), rank, processes) for rank in range(processes)]


@given(
    size=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    processes=st.integers(1, 5),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_processors_deal_out_the_samples_of_each_batch(
    size, batch_size, processes, shuffle, drop_last, epoch
):
    options = {"shuffle": shuffle, "seed": 3, "drop_last": drop_last}
    whole = ResumableBatchSampler(size, batch_size, **options)
    whole.set_position(epoch)
    made = [ResumableBatchSampler(size, batch_size, **options) for _ in range(processes)]
    left = 0 if drop_last else size % batch_size
    if batch_size < processes or 0 < left < processes:
        with pytest.raises(RarefyError, match=rf"{processes} processes cannot share (a|the last) batch of"):
            made[0].shard(0, processes)
        return
    for rank, one in enumerate(made):
        one.shard(rank, processes)
        one.set_position(epoch)
    assert {len(one) for one in made} == {len(whole)}
    for batch, *shares_of_it in zip(whole, *made, strict=True):
        assert all(shares_of_it)
        dealt = [shares_of_it[place % processes][place // processes] for place in range(len(batch))]
        assert dealt == batch and sum(map(len, shares_of_it)) == len(batch)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_share_goes_on_from_any_batch_with_any_number_of_processes(processes):
    def batches(batch: int, rank: int) -> list[list[int]]:
        one = ResumableBatchSampler(20, 4, shuffle=True, seed=1)
        one.shard(rank, processes)
        one.set_position(1, batch)
        return list(one)

    for rank in range(processes):
        assert batches(3, rank) == batches(0, rank)[3:] and len(batches(0, rank)) == 5
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2)).tolist()
    read = {index for rank in range(processes) for batch in batches(3, rank) for index in batch}
    assert read == set(order[12:])


def test_a_loader_of_a_processor():
    def make() -> Any:
        return make_loader(DATA, len(DATA), LoaderConfig(batch_size=6), shuffle=True, seed=5)

    loaders = shares(make, 2)
    assert [len(one) for one in loaders] == [4, 4]
    assert all(len(batch) == 3 for one in loaders for (batch,) in one)
    assert sorted(int(x) for one in loaders for (batch,) in one for x in batch) == list(range(24))


@pytest.mark.parametrize("data", [list(range(8)), list(range(7)), [0]])
@pytest.mark.parametrize("processes", [2, 3])
def test_lists_and_other_iterables(data: list[int], processes: int) -> None:
    for make in (lambda: data, lambda: iter(data), lambda: {one: None for one in data}):
        read = [list(one) for one in shares(make, processes)]
        assert {x for one in read for x in one} == set(data)
        assert {len(one) for one in read} == {-(-len(data) // processes)}
    assert [len(one) for one in shares(lambda: data, processes)] == [-(-len(data) // processes)] * processes
    with pytest.raises(TypeError, match="list_iterator has no length"):
        len(shard(iter(data), 0, processes))  # type: ignore[arg-type]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_data_loader_gets_a_distributed_sampler(shuffle: bool) -> None:
    loaders = shares(lambda: DataLoader(DATA, batch_size=4, shuffle=shuffle, drop_last=True), 2)
    assert all(isinstance(one.sampler, DistributedSampler) for one in loaders)
    orders = []
    for epoch in range(2):
        for one in loaders:
            one.sampler.set_epoch(epoch)
        orders.append([x.tolist() for one in loaders for (x,) in one])
        assert sorted(x for batch in orders[-1] for x in batch) == list(range(24))
        assert all(len(batch) == 2 for batch in orders[-1])
    assert (orders[0] != orders[1]) == shuffle
    assert list(shard(loaders[0], 0, 2)) and shard(loaders[0], 0, 2) is loaders[0]


def test_a_data_loader_in_order_gives_the_batches_of_one_process() -> None:
    whole = DataLoader(DATA, batch_size=4)
    for (batch,), *dealt in zip(whole, *shares(lambda: DataLoader(DATA, batch_size=4), 2), strict=True):
        assert sorted(batch.tolist()) == sorted(x for (one,) in dealt for x in one.tolist())


def test_a_data_loader_with_batches_that_cannot_be_shared() -> None:
    with pytest.raises(
        RarefyError, match=r"2 processes cannot share batches of 3 samples evenly; .* multiple of 2"
    ):
        shard(DataLoader(DATA, batch_size=3), 0, 2)


@pytest.mark.parametrize(
    ("loader", "name"),
    [
        (
            DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 24, 24)),
            "DataLoader with WeightedRandomSampler",
        ),
        (DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)), "DataLoader with RandomSampler"),
        (DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=5)), "DataLoader with RandomSampler"),
        (
            DataLoader(DATA, batch_sampler=ResumableBatchSampler(24, 2, shuffle=False, seed=0)),
            "DataLoader with ResumableBatchSampler",
        ),
        (DataLoader(Stream()), "DataLoader of the iterable Stream"),
        (OwnLoader(DATA), "a OwnLoader"),
    ],
)
def test_loaders_whose_order_nobody_knows(loader: Any, name: str) -> None:
    with pytest.raises(RarefyError, match=rf"several processes cannot share .*{name}, .*is_sharded = True"):
        shard(loader, 0, 2)
    assert shard(loader, 0, 1) is loader
    loader.is_sharded = True
    assert shard(loader, 0, 2) is loader
