"""The data sets that the examples need, and how any other loader joins in.

A loader is any iterable of batches that can be iterated once an epoch. One that is a `ResumableLoader` can
also start at any position:

- `set_position(epoch, batch)` makes the following iterations start at that batch of that epoch, without
  reading the samples before it. The caller sets the next epoch itself; a loader left alone repeats its epoch.
- `len(loader)` is the number of batches in a whole epoch, wherever it starts.

The order depends on the seed, the epoch and the batch index alone: not on the number of workers, and not on
what was read before. Torch's global generator is neither read nor advanced. Every data processor here returns
such a loader; the position in any other iterable is reached by reading it.

Of several processes each reads its share (`shard`): `batch_size` is what one process takes in a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rarefy.imports import on_first_use

if TYPE_CHECKING:
    from rarefy.data.digits import DigitsConfig, DigitsDataProcessor
    from rarefy.data.hdf5 import GptHDF5MapConfig, GptHDF5MapDataProcessor
    from rarefy.data.hdf5_writer import write_hdf5
    from rarefy.data.loader import (
        DataProcessor,
        LoaderConfig,
        ResumableBatchSampler,
        ResumableDataLoader,
        ResumableLoader,
        epoch_order,
        make_loader,
    )
    from rarefy.data.registry import DATA_PROCESSORS, build_dataloader
    from rarefy.data.sharding import shard
    from rarefy.data.text_corpus import TextCorpusConfig, TextCorpusDataProcessor

__all__ = [
    "DATA_PROCESSORS",
    "DataProcessor",
    "DigitsConfig",
    "DigitsDataProcessor",
    "GptHDF5MapConfig",
    "GptHDF5MapDataProcessor",
    "LoaderConfig",
    "ResumableBatchSampler",
    "ResumableDataLoader",
    "ResumableLoader",
    "TextCorpusConfig",
    "TextCorpusDataProcessor",
    "build_dataloader",
    "epoch_order",
    "make_loader",
    "shard",
    "write_hdf5",
]

__getattr__ = on_first_use(
    {
        "DATA_PROCESSORS": "rarefy.data.registry",
        "DataProcessor": "rarefy.data.loader",
        "DigitsConfig": "rarefy.data.digits",
        "DigitsDataProcessor": "rarefy.data.digits",
        "GptHDF5MapConfig": "rarefy.data.hdf5",
        "GptHDF5MapDataProcessor": "rarefy.data.hdf5",
        "LoaderConfig": "rarefy.data.loader",
        "ResumableBatchSampler": "rarefy.data.loader",
        "ResumableDataLoader": "rarefy.data.loader",
        "ResumableLoader": "rarefy.data.loader",
        "TextCorpusConfig": "rarefy.data.text_corpus",
        "TextCorpusDataProcessor": "rarefy.data.text_corpus",
        "build_dataloader": "rarefy.data.registry",
        "epoch_order": "rarefy.data.loader",
        "make_loader": "rarefy.data.loader",
        "shard": "rarefy.data.sharding",
        "write_hdf5": "rarefy.data.hdf5_writer",
    }
)
