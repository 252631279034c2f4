"""The line of a file on which a key or value stands."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import yaml

# The text has been read before, with words for its faults; not every installation has the compiled loader.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def line_of(text: str, path: str, key: str = "") -> int | None:
    r"""The line of the value at a path, or of the nearest thing around it that the file has.

    Args:
        text: YAML.
        path: as errors name it, such as `trainer.init.sparsity[0].update.freq`; keys may hold dots themselves.
        key: a key below the path, whose own line is wanted.

    Returns:
        None where not even the first key of the path is in the file.

    Example:
        >>> line_of("trainer:\n  init:\n    seed: -1", "trainer.init.seed")
        3
    """
    node = _root(text)
    line = None
    for step in _steps(node, path):
        node, line = step
    if key and isinstance(node, yaml.MappingNode) and (line is not None or not path):
        line = next((one.start_mark.line for one, _ in _pairs(node) if one.value == key), line)
    return None if line is None else line + 1


def _root(text: str) -> yaml.Node | None:
    # The line is a help in the message of another error, which must not be replaced by this one.
    with contextlib.suppress(yaml.YAMLError):
        return yaml.compose(text, Loader=_LOADER)
    return None


def _steps(node: yaml.Node | None, rest: str) -> Iterator[tuple[yaml.Node, int]]:
    """Every node on the way, with the line of its key."""
    while rest:
        found = _below(node, rest)
        if found is None:
            return
        node, line, rest = found
        yield node, line


def _below(node: yaml.Node | None, rest: str) -> tuple[yaml.Node, int, str] | None:
    if isinstance(node, yaml.SequenceNode):
        index = re.match(r"\[(\d+)\]\.?", rest)
        if index is None or int(index[1]) >= len(node.value):
            return None
        inner = node.value[int(index[1])]
        return inner, inner.start_mark.line, rest[index.end() :]
    if isinstance(node, yaml.MappingNode):
        fitting = [(key, value) for key, value in _pairs(node) if _begins(rest, key.value)]
        if fitting:
            # The longest, as `a.b` may be a key beside `a`.
            key, value = max(fitting, key=lambda pair: len(pair[0].value))
            return value, key.start_mark.line, rest[len(key.value) :].removeprefix(".")
    return None


def _begins(rest: str, key: str) -> bool:
    return rest == key or rest.startswith((f"{key}.", f"{key}["))


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys of a mapping; merged ones last, since its own keys win."""
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            yield key, value
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value == "<<":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(merged, yaml.MappingNode):
                    yield from _pairs(merged)
