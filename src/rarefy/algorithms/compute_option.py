"""The `compute` option: how the weights are stored, and in which precision they are multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rarefy.errors import ConfigError
from rarefy.schedule_schema import Json
from rarefy.storage.choice import HALF
from rarefy.validation import shorten

COMPUTE = ("auto", "masked", "compact")
_FORM = {"compact": "half"}


def check_compute(value: Any) -> str:
    """The `compute` option, checked: `{compact: half}` becomes `half`.

    Raises:
        ConfigError: an unknown value.

    Example:
        >>> check_compute("masked"), check_compute({"compact": "half"})
        ('masked', 'half')
    """
    if value in COMPUTE:
        return value
    if not isinstance(value, Mapping):
        allowed = "auto, masked, compact or {compact: half}"
        raise ConfigError("compute", shorten(value), allowed, "compute: auto")
    if list(value) != list(_FORM):
        raise ConfigError("compute", shorten(dict(value)), "{compact: half}", "compute: {compact: half}")
    if value != _FORM:
        allowed = "half, or leave it at compute: compact"
        raise ConfigError("compute.compact", shorten(value["compact"]), allowed, "compute: {compact: half}")
    return HALF


def compute_schema() -> Json:
    """The JSON schema of the option."""
    half: Json = {
        "type": "object",
        "properties": {"compact": {"enum": [HALF]}},
        "required": ["compact"],
        "additionalProperties": False,
        "description": "compact, and under autocast multiplied in float16 where the processor has avx512_fp16",
    }
    return {"anyOf": [{"enum": list(COMPUTE)}, half]}
