"""Several processes share the training data: which batches each of them reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from rarefy.data.loader import ResumableDataLoader
from rarefy.errors import RarefyError


def shard(data: Iterable[Any], rank: int, processes: int, seed: int = 0) -> Iterable[Any]:
    """The share of one process, so that all together read every sample once an epoch.

    - a data processor of rarefy deals out the samples of each batch;
    - a `DataLoader` in order or shuffled gets a `DistributedSampler` and smaller batches, which together are as large
      as those of one process; one that has such a sampler stays as it is;
    - of a list, or anything else that gives the same batches in every process, each takes every so many batches;
    - what says `is_sharded = True` stays as it is.

    Args:
        data: what a single process would read.
        rank: of this process, from 0.
        processes: how many there are.
        seed: of the order of a shuffled `DataLoader`, the same in every process.

    Returns:
        Data that gives every process as many batches.

    Raises:
        RarefyError: a loader of which it cannot be known which samples the other processes read, or whose batches
            cannot be shared.

    Example:
        >>> list(shard(["a", "b", "c"], rank=1, processes=2))
        ['b', 'a']
    """
    if processes == 1 or getattr(data, "is_sharded", False):
        return data
    if isinstance(data, ResumableDataLoader):
        data.shard(rank, processes)
        return data
    if isinstance(data, DataLoader):
        return _with_distributed_sampler(data, rank, processes, seed)
    return EveryNthBatch(data, rank, processes)


class EveryNthBatch:
    """Every so many batches of data that each process reads whole.

    The last ones are filled up with the first ones, so that no process waits for another in vain.

    Args:
        data: gives the same batches in every process.
        rank: of this process, from 0.
        processes: how many there are.
    """

    def __init__(self, data: Iterable[Any], rank: int, processes: int) -> None:
        self.data = data
        self.rank = rank
        self.processes = processes

    def __iter__(self) -> Iterator[Any]:
        stream = iter(self.data)
        first: list[Any] = []
        while group := list(islice(stream, self.processes)):
            # The first group is full unless it is also the last; the loop below then takes from it several times.
            first = first or group
            while len(group) < self.processes:
                group += first[: self.processes - len(group)]
            yield group[self.rank]

    def __len__(self) -> int:
        if not isinstance(self.data, Sized):
            raise TypeError(f"{type(self.data).__name__} has no length")
        return -(-len(self.data) // self.processes)


def _with_distributed_sampler(
    loader: DataLoader[Any], rank: int, processes: int, seed: int
) -> DataLoader[Any]:
    """The same loader over this process's samples."""
    sampler = loader.sampler
    # Somebody has dealt out the samples already; twice would leave most of them unread.
    if isinstance(sampler, DistributedSampler):
        return loader
    _refuse_unknown_order(loader)
    # torch refuses it without workers.
    options: dict[str, Any] = {"prefetch_factor": loader.prefetch_factor} if loader.num_workers else {}
    return DataLoader(
        loader.dataset,
        batch_size=_share_of_batch(loader, processes),
        sampler=DistributedSampler(
            loader.dataset,
            num_replicas=processes,
            rank=rank,
            shuffle=isinstance(sampler, RandomSampler),
            seed=seed,
            drop_last=loader.drop_last,
        ),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        persistent_workers=loader.persistent_workers,
        **options,
    )


def _share_of_batch(loader: DataLoader[Any], processes: int) -> int:
    """How many samples each process takes at a time.

    Raises:
        RarefyError: the processes would not have as many each.
    """
    size = loader.batch_size or 1
    if size % processes:
        raise RarefyError(
            f"{processes} processes cannot share batches of {size} samples evenly; batch_size is that of all processes "
            f"together: give a multiple of {processes}"
        )
    return size // processes


def _refuse_unknown_order(loader: DataLoader[Any]) -> None:
    """Refuses a loader whose order another process could not know.

    Raises:
        RarefyError: such a loader.
    """
    sampler = loader.sampler
    has_own_batches = loader.batch_sampler is not None and loader.batch_size is None
    # A subclass may give its batches in any order.
    if type(loader) is not DataLoader:
        what = f"a {type(loader).__name__}"
    elif isinstance(loader.dataset, IterableDataset):
        what = f"a DataLoader of the iterable {type(loader.dataset).__name__}"
    elif has_own_batches:
        what = f"a DataLoader with {type(loader.batch_sampler).__name__}"
    elif (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and len(sampler) == len(sampler.data_source)
    ) or type(sampler) is SequentialSampler:
        return
    else:
        what = f"a DataLoader with {type(sampler).__name__}"
    raise RarefyError(
        f"several processes cannot share {what}, as nobody knows which samples the others read; give it a "
        "DistributedSampler, or set is_sharded = True on a loader that gives each process its share by itself"
    )
