"""Checks the blocks that Python code hands to the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from rarefy.errors import ConfigError
from rarefy.validation.fields import shorten
from rarefy.validation.findings import as_config_error
from rarefy.validation.numerals import validated

Block = TypeVar("Block", bound=BaseModel)


def read_block(kind: type[Block], given: Block | Mapping[str, object] | None, path: str) -> Block:
    """A checked block from an instance, a mapping of its keys, or None for its defaults.

    Args:
        kind: the pydantic model of the block.
        given: what the user gave.
        path: what messages call it.

    Returns:
        An instance of `kind`.

    Raises:
        ConfigError: an unknown key, or a value that is not allowed.

    Example:
        >>> from rarefy.trainer.plan import LoopConfig
        >>> read_block(LoopConfig, {"num_steps": 5}, "loop").num_steps
        5
    """
    if isinstance(given, kind):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(path, shorten(given), f"a mapping, or {kind.__name__}(...)")
    try:
        return validated(kind.model_validate, given or {}, path)
    except ValidationError as error:
        raise as_config_error(error, kind, dict(given or {})).under(path) from None
