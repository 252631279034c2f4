"""Text as batches of tokens, to measure a language model on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.data.hdf5_writer import load_tokenizer
from rarefy.errors import RarefyError


def token_batches(
    data: Path, *, tokenizer: Path | None, vocab_size: int, length: int, batch_size: int, count: int
) -> list[dict[str, Tensor]]:
    """The first batches of a text, one window of tokens behind the other.

    Args:
        data: a text file, a `.npy` file of token ids, or a folder of such files, read in the order of their names.
        tokenizer: a `tokenizer.json`; None makes one token of each byte.
        vocab_size: of the model.
        length: tokens in a window, ≥ 1.
        batch_size: windows in a batch, ≥ 1.
        count: how many batches, ≥ 1; fewer come where the text has no more.

    Returns:
        Batches of `input_ids`, `labels` (shifted by one) and `attention_mask`, int64 [batch, length].

    Raises:
        RarefyError: files that cannot be read, text that is too short, or tokens outside of the vocabulary.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "text.txt"
        >>> _ = file.write_text("abcdefg")
        >>> options = {"tokenizer": None, "vocab_size": 256, "length": 3, "batch_size": 2, "count": 1}
        >>> token_batches(file, **options)[0]["labels"].tolist()
        [[98, 99, 100], [101, 102, 103]]
    """
    # The last token is a label only.
    wanted = count * batch_size * length + 1
    tokens = _tokens(data, tokenizer, wanted)
    windows = min((len(tokens) - 1) // length, count * batch_size)
    if windows < 1:
        remedy = "give more, or a smaller --sequence_length"
        raise RarefyError(
            f"--data {data}: {len(tokens)} tokens are fewer than a sequence of {length} takes; {remedy}"
        )
    highest = int(tokens.max())
    if highest >= vocab_size or int(tokens.min()) < 0:
        kind = (
            "a byte is a token where there is no tokenizer.json" if tokenizer is None else f"by {tokenizer}"
        )
        raise RarefyError(
            f"--data {data}: has the token {highest}, but the model's vocabulary ends at {vocab_size - 1} ({kind}); "
            "give a .npy file of the model's own token ids"
        )
    inputs = tokens[: windows * length].view(-1, length)
    labels = tokens[1 : windows * length + 1].view(-1, length)
    batches = zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
    return [{"input_ids": x, "labels": y, "attention_mask": torch.ones_like(x)} for x, y in batches]


def _tokens(data: Path, tokenizer: Path | None, wanted: int) -> Tensor:
    """The first tokens of all files, at least as many as are wanted if there are."""
    made = None if tokenizer is None else load_tokenizer(tokenizer)
    parts: list[np.ndarray[Any, Any]] = []
    for file in _files(data):
        parts.append(_read(file, made, wanted))
        wanted -= len(parts[-1])
        if wanted <= 0:
            break
    if not parts:
        raise RarefyError(
            f"--data {data}: there is no such file, or a folder without one; give a text file or a folder"
        )
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _files(data: Path) -> Iterator[Path]:
    if data.is_file():
        yield data
    elif data.is_dir():
        yield from sorted(one for one in data.rglob("*") if one.is_file() and not one.name.startswith("."))


def _read(file: Path, tokenizer: Any, wanted: int) -> np.ndarray[Any, Any]:
    try:
        if file.suffix == ".npy":
            return _ids(file)
        if tokenizer is None:
            # No more than is wanted: a text may be larger than the memory.
            return np.fromfile(file, dtype=np.uint8, count=wanted)
        return np.array(tokenizer.encode(file.read_text(encoding="utf-8")).ids, dtype=np.int64)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RarefyError(
            f"--data {file}: cannot be read ({reason}); give text, or a .npy file of token ids"
        ) from error


def _ids(file: Path) -> np.ndarray[Any, Any]:
    ids = np.load(file, allow_pickle=False).reshape(-1)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"its numbers are {ids.dtype}, not whole")
    return ids
