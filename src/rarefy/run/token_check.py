"""Token ids that the model does not have, found before training where that can be known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from rarefy.errors import ConfigError


def check_tokens(model: nn.Module, data: Iterable[Any], path: str) -> None:
    """Refuses data with token ids outside of the model's vocabulary.

    Nothing is checked where either side does not tell: the model by `config.vocab_size`, the data by a data set
    with a method `largest_token`.

    Args:
        model: the model that will see the data.
        data: a loader.
        path: where the loader stands in the user's file.

    Raises:
        ConfigError: an id is too large.

    Example:
        >>> check_tokens(nn.Linear(2, 2), [], "fit.train_dataloader")
    """
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    tell = getattr(getattr(data, "dataset", None), "largest_token", None)
    largest = tell() if tell is not None and isinstance(vocabulary, int) else None
    if largest is not None and largest >= vocabulary:
        given = f"data with the token id {largest}"
        allowed = f"ids below the model's vocab_size, {vocabulary}, or a larger vocab_size"
        raise ConfigError(path, given, allowed, f"vocab_size: {largest + 1}")
