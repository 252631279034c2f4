"""Byte tokens of text files: the Python standard library's own sources, or any files."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from rarefy.data.loader import Count, LoaderConfig, ResumableDataLoader, Seed, make_loader
from rarefy.errors import ConfigError

Split = Literal["train", "validation"]

# What differs from one installation of the same Python to the next.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_VALIDATION_SHARE = 0.05


class TextCorpusConfig(LoaderConfig):
    """The keys of `TextCorpusDataProcessor`.

    `source` is `python_stdlib` or a glob of files, `**` included, relative to the working directory.
    `shuffle` is by default true for the train split and false for the validation split.

    Args:
        source: what to read: `python_stdlib`, or a glob of text files.
        sequence_length: tokens in a sample, a byte each.
        split: which files: `train` or `validation`.
        shuffle: whether samples come in random order; null for training data only.
        seed: of that order; the run's own where not given.
    """

    source: Annotated[
        str, Field(description="python_stdlib or a glob of text files", examples=["texts/*.txt"])
    ] = "python_stdlib"
    sequence_length: Count
    split: Annotated[Split, Field(description="train or validation")] = "train"
    shuffle: Annotated[bool | None, Field(description="true, false or null")] = None
    seed: Seed = 0


class TextCorpusDataProcessor:
    """Windows of byte tokens (vocabulary 256) from the files of one split.

    The files are read in the order of their names and joined; window i starts at token i · sequence_length,
    and the labels are its tokens shifted by one. A batch has `input_ids`, `labels` and `attention_mask` (the
    loss mask), int64 [batch, sequence_length].

    Args:
        config: source, split, lengths and the loader's keys.

    Raises:
        ConfigError: no files, an unreadable file, or a split without files.

    Example:
        >>> processor = TextCorpusDataProcessor(TextCorpusConfig(sequence_length=32, batch_size=4))
        >>> next(iter(processor.create_dataloader()))["input_ids"].shape
        torch.Size([4, 32])
    """

    config_class: ClassVar[type[LoaderConfig]] = TextCorpusConfig
    seed_key: ClassVar[str] = "seed"

    def __init__(self, config: TextCorpusConfig) -> None:
        self.config = config
        root, names = _find(config.source)
        self.names = split_names(names, config.split)
        if not self.names:
            given = f"{config.source!r} with {len(names)} file"
            raise ConfigError("source", given, "two or more files, which the splits can share")
        self.dataset = ByteWindows(read_bytes(root / name for name in self.names), config.sequence_length)

    def create_dataloader(self) -> ResumableDataLoader:
        """A loader at the start of epoch 0.

        Raises:
            ConfigError: there are fewer windows than a batch needs.
        """
        config = self.config
        shuffle = config.split == "train" if config.shuffle is None else config.shuffle
        return make_loader(self.dataset, len(self.dataset), config, shuffle=shuffle, seed=config.seed)


class ByteWindows(Dataset[dict[str, Tensor]]):
    """Windows of `length` + 1 tokens at stride `length`.

    Args:
        tokens: uint8 [tokens].
        length: tokens in a sample, ≥ 1.

    Example:
        >>> sample = ByteWindows(torch.arange(7, dtype=torch.uint8), length=3)[1]
        >>> sample["input_ids"].tolist(), sample["labels"].tolist()
        ([3, 4, 5], [4, 5, 6])
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens = tokens
        self.length = length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.length
        # Held as bytes: int64 would take eight times the memory.
        window = self.tokens[start : start + self.length + 1].long()
        mask = torch.ones(self.length, dtype=torch.int64)
        return {"input_ids": window[:-1], "labels": window[1:], "attention_mask": mask}

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.length

    def largest_token(self) -> int:
        """The largest token id; 0 without tokens."""
        return int(self.tokens.max()) if len(self.tokens) else 0


def split_names(names: Sequence[str], split: Split) -> list[str]:
    """The files of one split, sorted; which split a file is in depends on its name's hash.

    About 5% of the files are for validation, and of two or more files at least one is for each split.

    Args:
        names: relative paths.
        split: `train` or `validation`.

    Example:
        >>> split_names(["a.txt", "b.txt"], "train"), split_names(["a.txt", "b.txt"], "validation")
        (['b.txt'], ['a.txt'])
    """
    # By hash, so that a file keeps its split when others come or go.
    ranked = sorted(names, key=_hash_share)
    held_out = sum(_hash_share(name) < _VALIDATION_SHARE for name in ranked)
    held_out = min(max(held_out, 1), len(ranked) - 1) if ranked else 0
    return sorted(ranked[:held_out] if split == "validation" else ranked[held_out:])


def read_bytes(files: Iterable[Path]) -> Tensor:
    """The bytes of all files, joined, as uint8.

    Raises:
        ConfigError: a file cannot be read.
    """
    # NumPy does not join an empty list.
    parts = [np.empty(0, dtype=np.uint8)]
    for file in files:
        try:
            parts.append(np.fromfile(file, dtype=np.uint8))
        except OSError as error:
            raise ConfigError("source", f"{file} ({error.strerror})", "readable files") from error
    return torch.from_numpy(np.concatenate(parts))


def _hash_share(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _find(source: str) -> tuple[Path, list[str]]:
    root, names = _find_stdlib() if source == "python_stdlib" else _find_glob(source)
    if not names:
        given = f"{source!r} (no files match)"
        allowed = "python_stdlib or a glob of text files"
        raise ConfigError("source", given, allowed, "texts/*.txt")
    return root, names


def _find_stdlib() -> tuple[Path, list[str]]:
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, below, files in os.walk(root):
        # Not entered at all: what is installed has many times the files.
        below[:] = [name for name in below if name not in _SKIPPED]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return root, names


def _find_glob(pattern: str) -> tuple[Path, list[str]]:
    parts = Path(pattern).parts[:-1]
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    # Names below the fixed part of the glob: the split must not depend on where the folder lies.
    root = Path(*parts[:fixed])
    files = (Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    return root, [file.relative_to(root).as_posix() for file in files]
