"""Scikit-learn's handwritten digits: 1797 images of 8 by 8 pixels."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from rarefy.data.loader import LoaderConfig, ResumableDataLoader, Seed, make_loader
from rarefy.errors import RarefyError

# scikit-learn counts the dark pixels of four by four.
_WHITE = 16.0
_VALIDATION_EVERY = 5


class DigitsConfig(LoaderConfig):
    """The keys of `DigitsDataProcessor`; `shuffle` is by default true for the train split only.

    Args:
        split: which images: `train` or `validation`.
        shuffle: whether samples come in random order; null for training data only.
        seed: of that order; the run's own where not given.
    """

    split: Annotated[Literal["train", "validation"], Field(description="train or validation")] = "train"
    shuffle: Annotated[bool | None, Field(description="true, false or null")] = None
    seed: Seed = 0


class DigitsDataProcessor:
    """Every fifth image is for validation, the others are for training.

    A batch has `images`, float32 [batch, 1, 8, 8] from 0 to 1, and `labels`, int64 [batch] from 0 to 9.

    Args:
        config: split and the loader's keys.

    Raises:
        RarefyError: scikit-learn is not installed.
    """

    config_class: ClassVar[type[LoaderConfig]] = DigitsConfig
    seed_key: ClassVar[str] = "seed"

    def __init__(self, config: DigitsConfig) -> None:
        self.config = config
        digits = _load_digits()
        held_out = torch.arange(len(digits.target)) % _VALIDATION_EVERY == 0
        chosen = held_out if config.split == "validation" else ~held_out
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / _WHITE
        self.dataset = Images(images[chosen], torch.from_numpy(digits.target).long()[chosen])

    def create_dataloader(self) -> ResumableDataLoader:
        """A loader at the start of epoch 0.

        Raises:
            ConfigError: there are fewer images than a batch needs.
        """
        config = self.config
        shuffle = config.split == "train" if config.shuffle is None else config.shuffle
        return make_loader(self.dataset, len(self.dataset), config, shuffle=shuffle, seed=config.seed)


class Images(Dataset[dict[str, Tensor]]):
    """Images with a class each.

    Args:
        images: [images, channels, height, width].
        labels: [images].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}

    def __len__(self) -> int:
        return len(self.labels)


def _load_digits() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RarefyError("the digits need scikit-learn: pip install 'rarefy[digits]'") from error
    return load_digits()
