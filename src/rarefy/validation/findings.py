"""From pydantic's findings in a whole file to one line that names the path and the fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rarefy.errors import ConfigError, did_you_mean
from rarefy.validation.fields import shorten
from rarefy.validation.locations import dotted, location_in
from rarefy.validation.numerals import share_hint

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MAPPING = ("dict_type", "model_type", "model_attributes_type", "dataclass_type", "mapping_type")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")


def as_config_error(error: ValidationError, model: type[BaseModel], given: Mapping[str, Any]) -> ConfigError:
    """The finding of `error` that the user should mend first; unknown keys come before all others.

    Args:
        error: what pydantic raised.
        model: the model that was validated.
        given: what it was validated with, for the path.

    Returns:
        The error with its path inside `given`.
    """
    found = error.errors(include_url=False)
    # A misspelt key makes another one missing; only the first is the slip.
    first = next((one for one in found if one["type"] in _UNKNOWN), found[0])
    location = location_in(first["loc"], given)
    if first["type"] in _UNKNOWN:
        hint = did_you_mean(str(location[-1]), [name for name, _ in _fields(model, location[:-1])])
        return ConfigError(dotted(location[:-1]), f"the key {location[-1]!r}", f"a known key ({hint})")
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError):
        return raised.under(dotted(location))
    return _worded(first, location, model)


def unknown_in(
    error: ValidationError, model: type[BaseModel], given: Mapping[str, Any]
) -> list[tuple[str, str, frozenset[str]]]:
    """Every unknown key that pydantic found: the path of its block, the key, and the keys that the block has.

    Args:
        error: what pydantic raised.
        model: the model that was validated.
        given: what it was validated with.
    """
    unknown = []
    for one in error.errors(include_url=False):
        if one["type"] in _UNKNOWN:
            location = location_in(one["loc"], given)
            known = frozenset(name for name, _ in _fields(model, location[:-1]))
            unknown.append((dotted(location[:-1]), str(location[-1]), known))
    return unknown


def _worded(found: Any, location: Sequence[str | int], model: type[BaseModel]) -> ConfigError:
    keys = [part for part in location if isinstance(part, str)]
    field = dict(_fields(model, location[: _last_key(location)])).get(keys[-1]) if keys else None
    hint = _hint(field) if field else None
    allowed = (hint and hint.description) or _plain(found)
    example = f"{keys[-1]}: {hint.examples[0]}" if hint and hint.examples else ""
    missing = found["type"] in _MISSING
    given = "a missing value" if missing else shorten(found["input"])
    share = share_hint(found["input"]) if found["type"] in ("float_type", "float_parsing") else ""
    return ConfigError(dotted(location), given, f"{allowed}{share}", example)


def _hint(field: FieldInfo) -> FieldInfo | None:
    """The field itself where it is described, else the description inside its type (`StepCount | None`)."""
    if field.description is not None:
        return field
    for part in get_args(field.annotation):
        for note in getattr(part, "__metadata__", ()):
            if isinstance(note, FieldInfo) and note.description is not None:
                return note
    return None


def _plain(found: Any) -> str:
    """Pydantic's own words, made to follow "give"."""
    if found["type"] in _MAPPING:
        return "a mapping"
    words = found["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"a value {words}" if words.startswith(("greater", "less")) else words


def _last_key(location: Sequence[str | int]) -> int:
    return max(index for index, part in enumerate(location) if isinstance(part, str))


def _fields(model: Any, location: Sequence[str | int]) -> Iterator[tuple[str, FieldInfo]]:
    """The fields by name of the model that `location` leads to from `model`."""
    for part in location:
        if isinstance(part, str):
            fields = dict(_fields(model, ()))
            if part not in fields:
                return
            model = fields[part].annotation
    # A union's members all at once: which of them was meant is not known when none fits.
    for kind in _models_in(model):
        for name, field in kind.__pydantic_fields__.items():
            yield field.alias or name, field


def _models_in(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
    ):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
