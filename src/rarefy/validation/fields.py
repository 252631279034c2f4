"""Types of fields that files give, and objects built from them, each fault in the words of its field."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from rarefy.errors import ConfigError, did_you_mean
from rarefy.validation.locations import dotted
from rarefy.validation.numerals import share_hint, validated

T = TypeVar("T")


@dataclass(frozen=True)
class StepMark:
    """Marks a type that is a number of optimizer steps: a file may give it as a part of the run, `"75%"`.

    Args:
        least: the smallest such number.
    """

    least: int


@dataclass(frozen=True)
class LevelMark:
    """Marks a number on the scale of what its schedule gives: in a schedule of fractions, a fraction."""


def whole(value: Any) -> Any:
    """A whole float (`1e3` and `1000.0` are floats in YAML) as the whole number that it is.

    Example:
        >>> whole(1000.0), whole(0.5)
        (1000, 0.5)
    """
    return int(value) if isinstance(value, float) and value.is_integer() else value


Number = Annotated[float, Field(strict=True, allow_inf_nan=False, description="a number", examples=[0.3])]
Level = Annotated[Number, LevelMark()]
StepCount = Annotated[
    int,
    StepMark(1),
    Field(strict=True, ge=1, description="a whole number of steps ≥ 1", examples=[100]),
    BeforeValidator(whole),
]
Step = Annotated[
    int,
    StepMark(0),
    Field(strict=True, ge=0, description="a step number, whole and ≥ 0", examples=[1000]),
    BeforeValidator(whole),
]


def marks_in(annotation: Any, kind: type[T]) -> Iterator[T]:
    """The marks of a kind in a type, wherever in it they stand.

    Example:
        >>> list(marks_in(list[Step] | None, StepMark))
        [StepMark(least=0)]
    """
    yield from (mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, kind))
    for part in get_args(annotation):
        yield from marks_in(part, kind)


def marked_fields(owner: type, kind: type[T]) -> dict[str, T]:
    """The fields of a dataclass whose type has a mark, with the mark."""
    hints = get_type_hints(owner, include_extras=True)
    found = {name: next(marks_in(hint, kind), None) for name, hint in hints.items()}
    return {name: mark for name, mark in found.items() if mark is not None}


def build(kind: type[T], options: Mapping[str, Any], *, path: str = "") -> T:
    """Builds a pydantic dataclass or model from a mapping.

    Args:
        kind: the class to build.
        options: its fields by name.
        path: where the mapping stands in the user's file.

    Raises:
        ConfigError: an unknown, missing or invalid field, with its path.
    """
    fields = _known_fields(kind, options, path)
    try:
        return validated(_adapter(kind).validate_python, options, path)
    except ValidationError as error:
        raise option_error(error, fields).under(path) from None


# A class whose building was deferred would be built anew by each adapter.
@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def worded(kind: type[T]) -> type[T]:
    """A pydantic dataclass whose constructor refuses what `build` refuses, in the same words.

    Example:
        >>> from pydantic.dataclasses import dataclass
        >>> @worded
        ... @dataclass
        ... class Half:
        ...     share: Number
        >>> Half("all")
        Traceback (most recent call last):
        rarefy.errors.ConfigError: share: 'all' is not allowed; give a number (example: share: 0.3)
    """
    checked = kind.__init__
    signature = inspect.signature(kind)

    @wraps(checked)
    def construct(self: Any, *args: Any, **options: Any) -> None:
        fields = _known_fields(kind, options, "")
        # By name, which is what a message tells.
        named = signature.bind_partial(*args, **options).arguments
        try:
            checked(self, **named)
        except ValidationError as error:
            raise option_error(error, fields) from None

    # Not with `defer_build`: pydantic puts a constructor of its own there whenever it builds the class.
    kind.__init__ = construct  # type: ignore[method-assign]
    return kind


def _known_fields(kind: type, options: Mapping[str, Any], path: str) -> dict[str, FieldInfo]:
    declared: Mapping[str, FieldInfo] = kind.__pydantic_fields__  # type: ignore[attr-defined]
    # A dataclass also declares what it computes for itself, which no file may set.
    fields = {name: field for name, field in declared.items() if field.init is not False}
    # Before pydantic looks: a misspelt key should not be answered with the key that is then missing.
    for key in options:
        if key not in fields:
            raise ConfigError(path, f"the key {key!r}", f"a known key ({did_you_mean(str(key), fields)})")
    return fields


def option_error(error: ValidationError, fields: Mapping[str, FieldInfo]) -> ConfigError:
    """The first finding of `error`, worded with the description and the example of its field."""
    found = error.errors(include_url=False)[0]
    # A validator of rarefy's own has worded it already; pydantic wraps what is a ValueError.
    raised = found.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError):
        return raised.under(dotted(found["loc"]))
    location = dotted(found["loc"])
    kind = found["type"]
    field = fields.get(str(found["loc"][0])) if found["loc"] else None
    allowed = (field.description if field else None) or found["msg"].removeprefix("Value error, ")
    example = f"{found['loc'][0]}: {field.examples[0]}" if field and field.examples else ""
    if kind in ("missing", "missing_argument"):
        return ConfigError(location, "a missing value", allowed, example)
    hint = share_hint(found["input"]) if kind in ("float_type", "float_parsing") else ""
    return ConfigError(location, shorten(found["input"]), f"{allowed}{hint}", example)


def shorten(value: object, limit: int = 60) -> str:
    """How a given value is repeated in a message: its repr on one line, cut when long; null, true, false as in YAML.

    Example:
        >>> shorten("x" * 100, limit=10), shorten(None), shorten({"a": [True]})
        ("'xxxxxxxx…", 'null', "{'a': [true]}")
    """
    text = " ".join(_as_written(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _as_written(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    # Plain lists and dicts alone: a subclass may print itself in another way.
    if type(value) is list:
        return f"[{', '.join(map(_as_written, value))}]"
    if type(value) is dict:
        return f"{{{', '.join(f'{_as_written(key)}: {_as_written(one)}' for key, one in value.items())}}}"
    return repr(value)
