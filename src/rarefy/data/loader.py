"""Data loaders that can start anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.utils.data import DataLoader, Dataset

from rarefy.data.sampler import ResumableBatchSampler
from rarefy.errors import ConfigError

Count = Annotated[int, Field(ge=1, description="a whole number ≥ 1", examples=[8])]
Seed = Annotated[int, Field(ge=0, description="a whole number ≥ 0", examples=[1])]
Switch = Annotated[bool, Field(description="true or false")]


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

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

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
