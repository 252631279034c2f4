"""`--set sparsity=0.5`: the one whole path that a short one can mean."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.run.file_keys import TrainerBlock
from rarefy.run.schema import trainers_of
from rarefy.yaml_files.overlay import EXAMPLE
from rarefy.yaml_files.yaml_file import parse_value

log = logging.getLogger("rarefy")

_MOST_SHOWN = 6


def whole_assignment(content: Mapping[str, Any], assignment: str) -> str:
    """An assignment with the whole path of its key.

    A path that begins with `trainer` stays as it is. Any other is the end of a path: of one in the file, or of one
    that a file may have. A mapping or a list is never replaced by a single value that way.

    Args:
        content: the file as plain data.
        assignment: `key.path=value`.

    Raises:
        ConfigError: several keys fit, or none.

    Example:
        >>> whole_assignment({"trainer": {"init": {"sparsity": {"sparsity": 0.9}}}}, "sparsity=0.5")
        'trainer.init.sparsity.sparsity=0.5'
    """
    short, equals, value = assignment.partition("=")
    short = short.strip()
    if not equals or not short or short.startswith("trainer") or "trainer" not in content:
        return assignment
    found = _fitting(content, short, is_single=not isinstance(parse_value(value), dict | list))
    if not found and "." not in short:
        names = {path.rpartition(".")[2] for path in _known_paths(TrainerBlock)}
        names |= {path.rpartition(".")[2] for path, _ in _paths(content, "")}
        raise ConfigError(
            f"--set {short}",
            "a key that the file does not have",
            f"a key of it ({_near(short, names)})",
            EXAMPLE,
        )
    if not found:
        return assignment
    if len(found) > 1:
        shown = ", ".join(found[:_MOST_SHOWN]) + ", ..." * (len(found) > _MOST_SHOWN)
        raise ConfigError(
            f"--set {short}",
            f"a key that is there {len(found)} times",
            f"one of {shown}",
            f"{found[0]}={value}",
        )
    log.info("--set %s is %s", short, found[0])
    return f"{found[0]}={value}"


def _fitting(content: Mapping[str, Any], short: str, is_single: bool) -> list[str]:
    there = {path: value for path, value in _paths(content, "") if _ends_with(path, short)}
    possible = [
        join_path(trainer, path)
        for trainer, _ in trainers_of(content)
        for path in _known_paths(TrainerBlock)
        if _ends_with(path, short)
    ]
    values = dict.fromkeys(possible) | there
    return [
        path for path, value in values.items() if not (is_single and isinstance(value, dict | list) and value)
    ]


def _near(short: str, names: set[str]) -> str:
    """The nearest of many names; nothing is gained by a list of all."""
    hint = did_you_mean(short, names)
    return hint if hint.startswith("did you mean") else "its whole path is always right"


def _ends_with(path: str, short: str) -> bool:
    return path == short or path.endswith(f".{short}")


def _paths(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every path of a file with its value."""
    if path:
        yield path, value
    children = value.items() if isinstance(value, dict) else ()
    for key, child in children:
        yield from _paths(child, join_path(path, str(key)))
    for index, child in enumerate(value if isinstance(value, list) else ()):
        yield from _paths(child, join_path(path, f"[{index}]"))


def _known_paths(block: type[BaseModel], path: str = "") -> Iterator[str]:
    """The keys of a block and of the blocks in it that a file has once."""
    for name, field in block.model_fields.items():
        here = join_path(path, field.alias or name)
        yield here
        for inner in (field.annotation, *get_args(field.annotation)):
            # Of data there may be several kinds, and a file says which one: its keys are those that are there.
            if isinstance(inner, type) and issubclass(inner, BaseModel) and here in _BLOCKS:
                yield from _known_paths(inner, here)


_BLOCKS = frozenset({"init", "init.loop", "init.checkpoint", "init.logging", "init.precision"})
