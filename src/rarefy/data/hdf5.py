"""Tokens in HDF5 files, in the two formats of the Model Zoo."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from rarefy.data.hdf5_files import HDF5Rows, find_files
from rarefy.data.loader import Count, LoaderConfig, ResumableDataLoader, Seed, Switch, make_loader
from rarefy.data.transforms import AddSinkTokens, Transformed
from rarefy.errors import ConfigError

# In the order of the rows of a sample.
_FIELDS = ("input_ids", "attention_mask", "labels")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_features(value: list[str]) -> list[str]:
    if value != list(_FIELDS):
        raise ConfigError("", f"{value}", f"[{', '.join(_FIELDS)}]")
    return value


Folders = Annotated[
    list[str],
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
    Field(min_length=1, description="a directory or a list of directories", examples=["./data/train"]),
]


class GptHDF5MapConfig(LoaderConfig):
    """The keys of `GptHDF5MapDataProcessor`.

    Directories are relative to the working directory. `use_worker_cache`, `vocab_size` and `repeat` are accepted for
    the sake of Model Zoo files and have no effect; what would have one is refused.

    Args:
        data_dir: a folder of `*.h5` files, or several.
        shuffle: whether samples come in random order.
        shuffle_seed: of that order; the run's own where not given.
        max_sequence_length: tokens in a sample, where the files hold one row of tokens.
        num_samples: samples in an epoch; null for all.
        sort_files: for files written for the Model Zoo: files are always read in order of their names.
        data_transforms: what is done to samples; `add_sink_tokens` puts tokens in front.
        use_worker_cache: no effect.
        vocab_size: no effect.
        repeat: no effect.
        use_vsl: not supported.
        pad_last: not supported.
        mixture: not supported.
        data_subset: not supported.
        dataset_map_fn: not supported.
    """

    data_dir: Folders
    shuffle: Switch = False
    shuffle_seed: Seed = 0
    max_sequence_length: Annotated[Count | None, Field(description="a whole number ≥ 1, or null")] = None
    num_samples: Annotated[Count | None, Field(description="a whole number ≥ 1, or null")] = None
    sort_files: Annotated[Literal[True], Field(description="true")] = True
    data_transforms: Annotated[
        list[AddSinkTokens] | None,
        Field(description="a list of add_sink_tokens, or null", examples=["[{name: add_sink_tokens}]"]),
    ] = None
    use_worker_cache: Switch = False
    vocab_size: Annotated[int | None, Field(description="a whole number; not used")] = None
    repeat: Annotated[bool | None, Field(description="true or false; not used")] = None
    use_vsl: Annotated[
        Literal[False], Field(description="false (several texts in one sample see each other here)")
    ] = False
    pad_last: Annotated[Literal[False], Field(description="false (see drop_last)")] = False
    mixture: Annotated[None, Field(description="null (list several directories as data_dir)")] = None
    data_subset: Annotated[None, Field(description="null (see num_samples)")] = None
    dataset_map_fn: Annotated[None, Field(description="null")] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_mixture(cls, given: Any) -> Any:
        """A mixture stands where data_dir is missing, which would be the first thing to be said."""
        if isinstance(given, dict) and given.get("mixture") is not None:
            allowed = "null (list the directories as data_dir; weights of data sets are not supported)"
            raise ConfigError("mixture", "a list of weighted data sets", allowed)
        return given


class GptHDF5MapDataProcessor:
    """Samples from the `*.h5` files of one or more directories.

    The dataset `data` of every file is either [samples, 3, length] (input ids, loss mask, labels already
    shifted) or a corpus [tokens], which is cut in windows of max_sequence_length + 1 at stride
    max_sequence_length, across the ends of files. A batch has `input_ids`, `attention_mask` (the loss mask)
    and `labels`, int64 [batch, length].

    Args:
        config: directories, lengths and the loader's keys.

    Raises:
        ConfigError: no files, an unreadable or wrong-shaped file, or a max_sequence_length that does not suit
            them.
    """

    config_class: ClassVar[type[LoaderConfig]] = GptHDF5MapConfig
    seed_key: ClassVar[str] = "shuffle_seed"

    def __init__(self, config: GptHDF5MapConfig) -> None:
        self.config = config
        # The shape of a row tells the format; the Model Zoo's files do not say it.
        rows = HDF5Rows(find_files(config.data_dir))
        self.dataset: HDF5Samples | HDF5Corpus | Transformed
        if rows.row_shape:
            self.dataset = HDF5Samples(rows, config.max_sequence_length)
        else:
            self.dataset = HDF5Corpus(rows, config.max_sequence_length)
        for transform in config.data_transforms or []:
            self.dataset = Transformed(self.dataset, transform)
        # One sample shows data of another kind before training begins; to read all of it could take hours.
        if len(self.dataset):
            _check_sample(self.dataset[0], str(rows.files[0]))

    def create_dataloader(self) -> ResumableDataLoader:
        """A loader at the start of epoch 0.

        Raises:
            ConfigError: an epoch has fewer samples than a batch.
        """
        config = self.config
        return make_loader(
            self.dataset,
            len(self.dataset),
            config,
            shuffle=config.shuffle,
            # Null only under the older name.
            seed=config.shuffle_seed or 0,
            num_samples=config.num_samples,
        )


class GptHDF5Config(GptHDF5MapConfig):
    """The keys of `GptHDF5DataProcessor`, which has two more.

    Args:
        shuffle_buffer: no effect.
        features_list: what a batch holds; always these three.
    """

    shuffle_seed: Annotated[Seed | None, Field(description="a whole number ≥ 0, or null")] = 0  # type: ignore[assignment]
    shuffle_buffer: Annotated[int | None, Field(description="a whole number; not used")] = None
    features_list: Annotated[
        list[str], Field(description="input_ids, attention_mask, labels"), AfterValidator(_check_features)
    ] = Field(default_factory=lambda: list(_FIELDS))


class GptHDF5DataProcessor(GptHDF5MapDataProcessor):
    """`GptHDF5MapDataProcessor` by its older name.

    The Model Zoo's own reads the files as a stream and shuffles a buffer of it; here any sample may come anywhere.
    """

    config_class: ClassVar[type[LoaderConfig]] = GptHDF5Config


class HDF5Samples(Dataset[dict[str, Tensor]]):
    """One row, one sample.

    Args:
        rows: of the shape [3, length].
        length: what the length must be; None is any.

    Raises:
        ConfigError: the rows have another shape.
    """

    def __init__(self, rows: HDF5Rows, length: int | None) -> None:
        shape = rows.row_shape
        if len(shape) != 2 or shape[0] != len(_FIELDS):
            given = f"{rows.files[0]} with data of shape [samples, {', '.join(map(str, shape))}]"
            raise ConfigError("data_dir", given, "[tokens] or [samples, 3, length]")
        if length is not None and length != shape[1]:
            allowed = f"{shape[1]}, the length of the samples in {rows.files[0].name}, or null"
            raise ConfigError("max_sequence_length", length, allowed)
        self.rows = rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self.rows.read(index, index + 1)[0])
        return dict(zip(_FIELDS, row, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def largest_token(self) -> int | None:
        """The largest token id; None where the data is too large to be read for that."""
        # Input ids and labels; between them stands the mask.
        return self.rows.largest(lambda rows: rows[:, ::2])


class HDF5Corpus(Dataset[dict[str, Tensor]]):
    """Windows of `length` + 1 tokens at stride `length`.

    Args:
        rows: single tokens.
        length: tokens in a sample.

    Raises:
        ConfigError: the length is None.
    """

    def __init__(self, rows: HDF5Rows, length: int | None) -> None:
        if length is None:
            given = f"null with {rows.files[0]}, which is a corpus of single tokens,"
            raise ConfigError("max_sequence_length", given, "a whole number ≥ 1", "max_sequence_length: 1024")
        self.rows = rows
        self.length = length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.length
        window = torch.from_numpy(self.rows.read(start, start + self.length + 1))
        return dict(zip(_FIELDS, (window[:-1], torch.ones_like(window[1:]), window[1:]), strict=True))

    def __len__(self) -> int:
        # The last token of a window is only a label, so each window after the first begins with it.
        return max(len(self.rows) - 1, 0) // self.length

    def largest_token(self) -> int | None:
        """The largest token id; None where the data is too large to be read for that."""
        return self.rows.largest(lambda rows: rows)


def _check_sample(sample: dict[str, Tensor], file: str) -> None:
    lowest = int(sample["input_ids"].min())
    if lowest < 0:
        raise ConfigError("data_dir", f"{file} (its first sample has the token id {lowest})", "ids from 0")
    mask = sample["attention_mask"]
    if int(mask.min()) < 0 or int(mask.max()) > 1:
        given = f"{file} (the loss mask of its first sample goes from {int(mask.min())} to {int(mask.max())})"
        raise ConfigError("data_dir", given, "samples of input ids, a loss mask of 0 and 1, labels")
