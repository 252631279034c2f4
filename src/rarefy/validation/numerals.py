"""Numbers that were written as text: `"1e-3"` in quotes, or a share as `90%`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from rarefy.errors import join_path
from rarefy.validation.locations import dotted, location_in, replaced

T = TypeVar("T")

_NUMERAL = re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?")
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
# Nobody writes longer ones, and of thousands of digits Python makes an error of its own.
_LONGEST = 40
_WANTED = ("int_type", "float_type", "int_parsing", "float_parsing")


def as_number(text: object) -> int | float | None:
    """The number that a text spells; None where it spells none.

    Example:
        >>> as_number("1e-3"), as_number("100"), as_number("75%")
        (0.001, 100, None)
    """
    if not isinstance(text, str) or len(text) > _LONGEST or not _NUMERAL.fullmatch(text.strip()):
        return None
    # Whole numbers stay whole: strict fields take no float for a count.
    return float(text) if re.search(r"[.eE]", text) else int(text)


def read_number(value: Any, path: str) -> Any:
    """The number that `value` spells, with a warning that says so; anything else as it is.

    Args:
        value: what was given where a number belongs.
        path: where it stands in the user's file.

    Example:
        >>> read_number(5, "loop.max_steps")
        5
    """
    number = as_number(value)
    if number is None:
        return value
    warnings.warn(
        f"{path}: {value!r} is text and is read as the number {number:g}; write it without quotes",
        stacklevel=2,
    )
    return number


def percent_in(value: object) -> float | None:
    """The number in front of a percent sign; None for anything else.

    Example:
        >>> percent_in(" 75 %"), percent_in("75"), percent_in(75)
        (75.0, None, None)
    """
    written = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    return None if written is None else float(written[1])


def share_hint(value: object) -> str:
    """What to add to "give a number" where a share was written in percent; empty otherwise.

    Example:
        >>> share_hint("90%"), share_hint("many")
        ('; did you mean 0.9?', '')
    """
    percent = percent_in(value)
    return "" if percent is None else f"; did you mean {percent / 100:g}?"


def validated(validate: Callable[[dict[str, Any]], T], given: Mapping[str, Any], path: str) -> T:
    """What `validate` makes of `given`, with numbers in quotes read as numbers where it wants numbers.

    PyYAML itself reads `1e-3`, without a dot, as text, so such text arrives from other programs as well.

    Args:
        validate: a function that raises pydantic's error.
        given: the data.
        path: where it stands in the user's file.

    Raises:
        ValidationError: something else is wrong.
    """
    content = dict(given)
    try:
        return validate(content)
    except ValidationError as error:
        # Only where pydantic wanted a number: elsewhere "100" may be a name.
        mended = _with_numbers(content, error, path)
        if mended is content:
            raise
    return validate(mended)


def _with_numbers(given: dict[str, Any], error: ValidationError, path: str) -> dict[str, Any]:
    mended = given
    seen = set[str]()
    for found in error.errors(include_url=False):
        location = location_in(found["loc"], given)
        here = dotted(location)
        # A union reports one finding for each of its members, all at the same place.
        if found["type"] in _WANTED and here not in seen and as_number(found["input"]) is not None:
            seen.add(here)
            mended = replaced(mended, location, read_number(found["input"], join_path(path, here)))
    return mended
