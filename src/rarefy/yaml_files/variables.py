"""Variables of the environment and the home directory in the values of a configuration file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

_BRACED = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")
_PLAIN = re.compile(r"\$([A-Za-z_]\w*)")


class UnsetVariableError(ValueError):
    """A variable without a value and without a default.

    Args:
        name: of the variable.
        text: where it stands.
    """

    def __init__(self, name: str, text: str) -> None:
        self.text = text
        super().__init__(
            f"{text} names the variable {name}, which is not set; set it, or write ${{{name}:-default}}"
        )


def expand(content: Any, read: Callable[[str], Any], environment: Mapping[str, str] | None = None) -> Any:
    """Plain data with `${VAR}`, `${VAR:-default}`, and in paths `~` and `$VAR`, replaced in every value.

    Args:
        content: dicts, lists and scalars; keys stay as they are.
        read: from a text to the value that it spells; used where a value is nothing but one `${VAR}`, which may
            then be a number.
        environment: None for that of this process.

    Raises:
        UnsetVariableError: a variable that is not set and has no default.

    Example:
        >>> expand({"lr": "${LR:-1}", "model_dir": "$RUNS/a"}, int, {"RUNS": "/runs"})
        {'lr': 1, 'model_dir': '/runs/a'}
    """
    variables = os.environ if environment is None else environment
    if isinstance(content, dict):
        return {key: expand(value, read, variables) for key, value in content.items()}
    if isinstance(content, list):
        return [expand(value, read, variables) for value in content]
    return _expanded(content, read, variables) if isinstance(content, str) else content


def _expanded(text: str, read: Callable[[str], Any], variables: Mapping[str, str]) -> Any:
    is_alone = _BRACED.fullmatch(text) is not None
    filled = _BRACED.sub(lambda found: _value(found[1], found[2], text, variables), text)
    # Never a list or a map: a variable holds one value, and must not bring structure into the file.
    if is_alone and _is_scalar(value := read(filled)) and not isinstance(value, str):
        return value
    return _expanded_path(filled, text, variables) if _is_path(filled) else filled


def _is_path(text: str) -> bool:
    """Whether a value is a path, the only place where a bare `$` or `~` is meant to stand for something."""
    return "\n" not in text and (
        text == "~" or text.startswith("~/") or "/" in text or _PLAIN.fullmatch(text) is not None
    )


def _expanded_path(text: str, whole: str, variables: Mapping[str, str]) -> str:
    filled = _PLAIN.sub(lambda found: _value(found[1], None, whole, variables), text)
    if filled == "~" or filled.startswith("~/"):
        return (variables.get("HOME") or os.path.expanduser("~")) + filled[1:]
    return filled


def _value(name: str, default: str | None, text: str, variables: Mapping[str, str]) -> str:
    # As in a shell, `:-` also takes the place of an empty value.
    found = variables.get(name) or default
    if found is None:
        raise UnsetVariableError(name, text)
    return found


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
