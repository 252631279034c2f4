"""Places inside nested data: from what pydantic calls them to a path in the user's file, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rarefy.errors import join_path


def dotted(location: Iterable[int | str]) -> str:
    """A pydantic location as a YAML path.

    Example:
        >>> dotted(("loop", "schedulers", 1, "init"))
        'loop.schedulers[1].init'
    """
    path = ""
    for part in location:
        path = join_path(path, f"[{part}]" if isinstance(part, int) else part)
    return path


def location_in(location: Sequence[str | int], given: Any) -> list[str | int]:
    """`location` without the parts that pydantic adds for unions and for single values read as lists.

    Example:
        >>> location_in(("precision", "PrecisionConfig", "enabled"), {"precision": {"enabled": 3}})
        ['precision', 'enabled']
    """
    path: list[str | int] = []
    for index, part in enumerate(location):
        is_last = index == len(location) - 1
        if isinstance(part, int) and isinstance(given, list):
            given = given[part] if part < len(given) else None
        elif isinstance(part, str) and isinstance(given, dict) and (part in given or is_last):
            given = given.get(part)
        # A part that the data does not have is the name of a union's
        # member, or the index in a list made of one value.
        else:
            continue
        path.append(part)
    return path


def replaced(given: Any, location: Sequence[str | int], value: object) -> Any:
    """A copy of nested data with another value at one place; all else is shared with the original.

    Example:
        >>> replaced({"a": [1, 2]}, ("a", 1), 5)
        {'a': [1, 5]}
    """
    if not location:
        return value
    first, *rest = location
    changed: Any = list(given) if isinstance(given, list) else dict(given)
    changed[first] = replaced(changed[first], rest, value)
    return changed
