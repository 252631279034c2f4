"""Data loaders that can start anywhere, as each batch is a function of the seed, the epoch and the position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rarefy.errors import ConfigError, RarefyError

Count = Annotated[int, Field(ge=1, description="a whole number ≥ 1", examples=[8])]
Seed = Annotated[int, Field(ge=0, description="a whole number ≥ 0", examples=[1])]
Switch = Annotated[bool, Field(description="true or false")]


def epoch_order(size: int, *, epoch: int, shuffle: bool, seed: int, num_samples: int | None = None) -> Tensor:
    """The sample indices of one epoch, in order.

    Shuffled: `randperm(size)` seeded with seed + epoch, cut to `num_samples`. With more samples than the data
    set holds, whole copies of it and a random part are shuffled together. Not shuffled: the data set's own
    order, repeated or cut.

    Args:
        size: samples in the data set, ≥ 1.
        epoch: 0 for the first one.
        shuffle: whether the order is random.
        seed: of the order.
        num_samples: samples in an epoch, ≥ 1; None is `size`.

    Returns:
        int64 tensor [num_samples].

    Example:
        >>> epoch_order(3, epoch=0, shuffle=False, seed=0, num_samples=5).tolist()
        [0, 1, 2, 0, 1]
    """
    count = size if num_samples is None else num_samples
    if not shuffle:
        return torch.arange(count) % size
    # A generator for every epoch, so that any can be begun without going through those before it.
    generator = torch.Generator().manual_seed(seed + epoch)
    if count <= size:
        return torch.randperm(size, generator=generator)[:count]
    whole = torch.arange(size).repeat((count - 1) // size)
    pool = torch.cat([whole, torch.randperm(size, generator=generator)])[:count]
    return pool[torch.randperm(count, generator=generator)]


class ResumableBatchSampler(Sampler[list[int]]):
    """Batches of sample indices from any position of any epoch, without visiting the ones before it.

    Of several processes each takes every so many samples of each batch: all together they read what one process would
    read, in the same batches.

    Args:
        size: samples in the data set, ≥ 1.
        batch_size: samples in a batch of all processes together, ≥ 1.
        shuffle: whether the order is random.
        seed: of the order; epoch e uses seed + e.
        drop_last: leave out the last batch of an epoch when it is not full.
        num_samples: samples in an epoch of all processes together; None is `size`.

    Attributes:
        processes: how many processes share each batch.

    Example:
        >>> batches = ResumableBatchSampler(5, 2, shuffle=False, seed=0, drop_last=False)
        >>> batches.set_position(epoch=0, batch=1)
        >>> list(batches), len(batches)
        ([[2, 3], [4]], 3)
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        drop_last: bool = True,
        num_samples: int | None = None,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.num_samples = num_samples
        self.epoch = 0
        self.batch = 0
        self.rank = 0
        self.processes = 1

    def shard(self, rank: int, processes: int) -> None:
        """Leaves this process its share of every batch.

        Args:
            rank: of this process, from 0.
            processes: how many share the data.

        Raises:
            RarefyError: some process has no sample of a batch.

        Example:
            >>> batches = ResumableBatchSampler(8, 4, shuffle=False, seed=0)
            >>> batches.shard(rank=1, processes=2)
            >>> list(batches)
            [[1, 3], [5, 7]]
        """
        if self.batch_size < processes:
            raise RarefyError(
                f"{processes} processes cannot share a batch of {self.batch_size}; batch_size is that of all processes "
                f"together: give at least {processes}"
            )
        # A process without a sample has no gradients, for which the others would wait.
        left = 0 if self.drop_last else self._samples % self.batch_size
        if 0 < left < processes:
            raise RarefyError(
                f"{processes} processes cannot share the last batch of an epoch, which has {left} of {self._samples} "
                "samples; set drop_last: true, or give another batch_size"
            )
        self.rank = rank
        self.processes = processes

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Makes every following iteration start at one batch of one epoch.

        Args:
            epoch: 0 for the first one.
            batch: batches of this epoch to leave out, from 0 to `len(self)`.

        Raises:
            RarefyError: the epoch is negative or has no such batch.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise RarefyError(
                f"the data cannot start at epoch {epoch}, batch {batch}: an epoch has {len(self)} batches; "
                "use the data and the batch size that the position was saved with"
            )
        self.epoch = epoch
        self.batch = batch

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(
            self.size, epoch=self.epoch, shuffle=self.shuffle, seed=self.seed, num_samples=self.num_samples
        )
        for batch in range(self.batch, len(self)):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            # In turns, so that of a last batch that is not full no process has two samples more than another.
            yield whole[self.rank :: self.processes].tolist()

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever the next iteration starts."""
        count = self._samples
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    @property
    def _samples(self) -> int:
        return self.size if self.num_samples is None else self.num_samples


@runtime_checkable
class ResumableLoader(Protocol):
    """A loader whose order depends on its seed, the epoch and the batch index only."""

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Makes every following iteration start at one batch of one epoch, without reading those before."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """The batches from the position to the end of its epoch."""
        ...

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        ...


class LoaderConfig(BaseModel):
    """The keys that every data processor takes; `prefetch_factor` and `persistent_workers` need workers.

    Args:
        batch_size: samples in a batch, of all processes together.
        drop_last: whether samples that fill no batch are left out.
        num_workers: processes that read ahead; 0 reads in the run's own.
        prefetch_factor: batches that each worker reads ahead.
        persistent_workers: whether workers live on from epoch to epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    batch_size: Count
    drop_last: Switch = True
    num_workers: Annotated[int, Field(ge=0, description="a number of processes, 0 for none")] = 0
    prefetch_factor: Annotated[Count | None, Field(description="a whole number ≥ 1, or null")] = 10
    persistent_workers: Switch = True


class DataProcessor(Protocol):
    """A data set with its keys; `seed_key` names the key that seeds the order."""

    config_class: ClassVar[type[LoaderConfig]]
    seed_key: ClassVar[str]

    def __init__(self, config: Any) -> None: ...

    def create_dataloader(self) -> ResumableDataLoader:
        """A loader at the start of epoch 0."""
        ...


class ResumableDataLoader(DataLoader[Any]):
    """A DataLoader with a position. It leaves torch's global generator alone, whatever the number of workers.

    Args:
        dataset: a map-style data set.
        order: the batches.
        config: workers and prefetching.
    """

    def __init__(self, dataset: Dataset[Any], order: ResumableBatchSampler, config: LoaderConfig) -> None:
        workers = config.num_workers
        super().__init__(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            # torch refuses these two without workers.
            prefetch_factor=config.prefetch_factor if workers else None,
            persistent_workers=config.persistent_workers and workers > 0,
            # Else the DataLoader draws a seed for its workers from torch's global generator at every epoch.
            generator=torch.Generator(),
        )
        self.order = order

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Makes every following iteration start at one batch of one epoch.

        Args:
            epoch: 0 for the first one.
            batch: batches of this epoch to leave out, from 0 to `len(self)`.

        Raises:
            RarefyError: the epoch is negative or has no such batch.
        """
        self.order.set_position(epoch, batch)

    def shard(self, rank: int, processes: int) -> None:
        """Leaves this process its share of every batch; see `ResumableBatchSampler.shard`."""
        self.order.shard(rank, processes)


def make_loader(
    dataset: Dataset[Any],
    size: int,
    config: LoaderConfig,
    *,
    shuffle: bool,
    seed: int,
    num_samples: int | None = None,
) -> ResumableDataLoader:
    """A loader at the start of epoch 0.

    Args:
        dataset: a map-style data set.
        size: its number of samples.
        config: batch size, workers and prefetching.
        shuffle: whether the order is random.
        seed: of the order.
        num_samples: samples in an epoch; None is `size`.

    Raises:
        ConfigError: an epoch would have no batch.
    """
    # Whatever `num_samples` asks for, nothing can be drawn from no data.
    count = min(size, 1) * (size if num_samples is None else num_samples)
    if count < (config.batch_size if config.drop_last else 1):
        given = f"{config.batch_size} with {count} samples in an epoch"
        raise ConfigError("batch_size", given, "at most the number of samples, or more data")
    order = ResumableBatchSampler(
        size,
        config.batch_size,
        shuffle=shuffle,
        seed=seed,
        drop_last=config.drop_last,
        num_samples=num_samples,
    )
    return ResumableDataLoader(dataset, order, config)
