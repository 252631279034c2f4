"""A grammar of mistakes: every way in which a valid configuration is made invalid."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Keys = tuple[str | int, ...]

REQUIRED = ("init", "model", "name", "optimizer", "train_dataloader", "data_processor", "total_iters")
CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "loop": {"num_epochs": 1, "num_steps": 1},
    "precision": {"max_gradient_norm": 1.0, "max_gradient_value": 1.0},
    "AdamW": {"lr": 0.1, "learning_rate": 0.1},
    "SGD": {"lr": 0.1, "learning_rate": 0.1},
}
NAMES_OF_CODE = ("name", "data_processor")
FREE_FORM = ("cluster_config", "backend")


@dataclass(frozen=True)
class Mistake:
    """One invalid configuration.

    Args:
        kind: which rule made it.
        path: where.
        content: the whole configuration.
    """

    kind: str
    path: Keys
    content: dict[str, Any]

    @property
    def name(self) -> str:
        """A short name for the test."""
        return f"{self.kind}-{'.'.join(map(str, self.path))}"


def places(value: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every value inside a configuration with its path.

    Left out is what only Cerebras reads, and the arguments of a user's own code, which may take anything.
    """
    yield path, value
    if isinstance(value, dict):
        children = [key for key in value if key not in FREE_FORM]
        if any(":" in str(value.get(key)) for key in NAMES_OF_CODE):
            children = [key for key in value if key in NAMES_OF_CODE]
    else:
        children = list(range(len(value))) if isinstance(value, list) else []
    for key in children:
        yield from places(value[key], (*path, key))


def changed(content: dict[str, Any], path: Keys, change: Callable[[Any, Any], None]) -> dict[str, Any]:
    """A copy in which `change(container, key)` was applied at `path`."""
    copied = copy.deepcopy(content)
    container: Any = copied
    for key in path[:-1]:
        container = container[key]
    change(container, path[-1])
    return copied


def replaced(content: dict[str, Any], path: Keys, value: Any) -> dict[str, Any]:
    """A copy with another value at `path`."""
    return changed(content, path, lambda container, key: container.__setitem__(key, value))


def mistakes(content: dict[str, Any]) -> Iterator[Mistake]:
    """Every mistake that the grammar makes in a valid configuration."""
    for path, value in places(content):
        if path:
            for kind, wrong in _at(content, path, value):
                yield Mistake(kind, path, wrong)


def _at(content: dict[str, Any], path: Keys, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield "scalar for a mapping", replaced(content, path, 3.7)
        yield "unknown key", replaced(content, path, {**value, "unknown_key": 1})
        yield "number as a key", replaced(content, path, {**value, 7: 1})
        if path[-1] in CONTRADICTIONS:
            yield "contradiction", replaced(content, path, {**value, **CONTRADICTIONS[str(path[-1])]})
    elif not isinstance(value, list):
        yield "mapping for a scalar", replaced(content, path, {"nested": 1})
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield "negative", replaced(content, path, -1 if isinstance(value, int) else -1.5)
        yield "not a number", replaced(content, path, float("nan"))
        yield "text for a number", replaced(content, path, "many")
    if isinstance(value, bool):
        yield "text for a switch", replaced(content, path, "maybe")
    if isinstance(path[-1], str):
        yield "misspelt key", changed(content, path, _misspell)
        if path[-1] in REQUIRED:
            yield "missing key", changed(content, path, lambda container, key: container.pop(key))


def _misspell(container: Any, key: Any) -> None:
    container[f"{key}q"] = container.pop(key)


def chosen(found: list[Mistake], count: int) -> list[Mistake]:
    """`count` of the mistakes, every kind among them, the same ones every time."""
    source = random.Random(0)
    source.shuffle(found)
    firsts = list({mistake.kind: mistake for mistake in reversed(found)}.values())
    rest = [mistake for mistake in found if mistake not in firsts]
    return (firsts + rest)[:count]


def broken_texts(text: str) -> Iterator[tuple[str, bytes]]:
    """A valid file as bytes that are no YAML mapping, or no readable file."""
    lines = text.splitlines(keepends=True)
    yield "empty", b""
    yield "only a comment", b"# nothing\n"
    yield "binary", bytes(range(256)) * 10
    yield "other encoding", text.encode("utf-16")
    yield "latin-1", b"# caf\xe9\n" + text.encode()
    yield "null byte", text.encode() + b"\x00"
    yield "deep flow", text.encode() + b"deep: " + b"[" * 10_000
    yield "10 MB of nesting", b"[" * 10_000_000
    yield "deep blocks", "".join(f"{' ' * depth}a:\n" for depth in range(1000)).encode()
    yield "alias bomb", _bomb().encode()
    yield "anchor in itself", b"trainer: &a [*a]\n"
    yield "unknown alias", text.encode() + b"other: *nowhere\n"
    yield "python tag", text.encode() + b"other: !!python/object/apply:os.system [ls]\n"
    yield "own tag", text.encode() + b"other: !include x.yaml\n"
    yield "two documents", text.encode() + b"---\ntrainer: {}\n"
    yield "a list", b"- trainer\n"
    yield "a word", b"trainer\n"
    yield "tab", text.replace("  ", "\t").encode()
    for index, line in enumerate(lines):
        key, colon, value = line.strip().partition(": ")
        if colon and value and not key.startswith("-"):
            yield f"line {index + 1} twice", "".join([*lines[:index], line, *lines[index:]]).encode()
            yield f"line {index + 1} open", "".join([*lines[:index], f"{line.rstrip()} [\n"]).encode()
            if _follows_a_scalar(lines, index):
                yield (
                    f"line {index + 1} indented",
                    "".join([*lines[:index], f" {line}", *lines[index + 1 :]]).encode(),
                )


def _follows_a_scalar(lines: list[str], index: int) -> bool:
    before, here = lines[index - 1], lines[index]
    same = len(before) - len(before.lstrip()) == len(here) - len(here.lstrip())
    return same and before.partition(": ")[2].strip().isalnum()


def _bomb() -> str:
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]", *rows])
