"""Reads a configuration file: YAML as plain data, with every fault named by its line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rarefy.errors import RarefyError
from rarefy.yaml_files.yaml_faults import plain_words

_BRACED = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")
_PLAIN = re.compile(r"\$([A-Za-z_]\w*)")

# Far above any configuration; they bound what a hostile file costs before it is refused.
MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_VALUES = 100_000
# PyYAML follows YAML 1.1, where a number with an exponent needs a dot and a sign.
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9_]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?$")


# In YAML 1.1 `010` is 8 and `1:20` is 80, in YAML 1.2 they are 10 and a text.
_OTHER_BASE = re.compile(r"^[-+]?(?:0[0-7_]+|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)$")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


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


class YamlError(RarefyError):
    """A file that is not readable as one YAML mapping; the message names the file and the line."""

    def __init__(self, name: str, problem: str, line: int | None = None) -> None:
        where = name if line is None else f"{name}, line {line}"
        super().__init__(f"{where}: {problem}")


def load_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: a UTF-8 file of at most 1 MB that holds one mapping.

    Returns:
        Plain dicts, lists and scalars; an aliased part is copied wherever it is used.

    Raises:
        YamlError: the file is missing, unreadable, empty, not UTF-8, not YAML, has a key twice, is nested
            too deeply or expands to too many values.
    """
    name = str(path)
    try:
        size = path.stat().st_size
        # The size first: the path may be that of a checkpoint of gigabytes.
        raw = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise YamlError(name, f"cannot be read: {error.strerror}; give the path of a YAML file") from error
    if size > MAX_BYTES:
        raise YamlError(
            name, f"holds {size / 1e6:.1f} MB; a configuration has at most {MAX_BYTES / 1e6:.0f} MB"
        )
    return load_text(_decode(raw, name), name)


def load_text(text: str, name: str = "<text>") -> dict[str, Any]:
    """The mapping in YAML text.

    Args:
        text: the YAML.
        name: what messages call it.

    Returns:
        Plain dicts, lists and scalars.

    Raises:
        YamlError: as for `load_file`.

    Example:
        >>> load_text("optimizer: {AdamW: {lr: 6e-4}}")
        {'optimizer': {'AdamW': {'lr': 0.0006}}}
    """
    content = _construct(text, name)
    if content is None:
        raise YamlError(name, "is empty; give a mapping that starts with `trainer:`")
    if not isinstance(content, dict):
        raise YamlError(name, f"holds a {_kind(content)}; give a mapping that starts with `trainer:`")
    return content


def parse_value(text: str) -> Any:
    """The value of one `--set` assignment, read as YAML.

    Raises:
        YamlError: the text is not YAML.

    Example:
        >>> parse_value("1e-3"), parse_value("[1, 2]"), parse_value("null"), parse_value("gpt2")
        (0.001, [1, 2], None, 'gpt2')
    """
    return _construct(text, "--set")


def _construct(text: str, name: str) -> Any:
    try:
        return expand(_unshared(_loaded(text, name)), _scalar)
    except UnsetVariableError as error:
        at = text.find(error.text)
        raise YamlError(name, str(error), text.count("\n", 0, at) + 1 if at >= 0 else None) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(name, plain_words(error, text), mark.line + 1 if mark else None) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"holds the character {error.character:#06x}, which no YAML text has; is this a YAML file?"
        raise YamlError(name, problem, line) from error


def _scalar(text: str) -> Any:
    """The value of a text that a variable holds, which need not be YAML."""
    try:
        return _loaded(text, "")
    except (yaml.YAMLError, YamlError):
        return text


def _loaded(text: str, name: str) -> Any:
    loader = _Loader(text, name)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        # PyYAML gives every alias the same object, and changing one place would change the others.
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def _decode(raw: bytes, name: str) -> str:
    try:
        # Editors on Windows put a byte order mark in front.
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise YamlError(name, "is not UTF-8 text; save the file in UTF-8", line) from error


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else f"single value ({str(value)[:40]})"


@dataclass
class _Size:
    """How many values a part of the file expands to, and how deep it is."""

    values: int = 1
    depth: int = 1
    anchor: str | None = None

    def add(self, part: _Size) -> None:
        self.values += part.values
        self.depth = max(self.depth, part.depth + 1)


@dataclass
class _SizeCheck:
    """Follows the parser's events, and stops at the first excess."""

    name: str
    stack: list[_Size] = field(default_factory=lambda: [_Size()])
    anchors: dict[str, _Size] = field(default_factory=dict)

    def visit(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.CollectionStartEvent):
            self.stack.append(_Size(anchor=event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            self._close(self.stack.pop())
        elif isinstance(event, yaml.ScalarEvent):
            self._close(_Size(anchor=event.anchor))
        elif isinstance(event, yaml.AliasEvent):
            self._close(self._aliased(event))
        self._refuse_excess(event)

    def _close(self, part: _Size) -> None:
        if part.anchor is not None:
            self.anchors[part.anchor] = _Size(part.values, part.depth)
        self.stack[-1].add(part)

    def _aliased(self, event: yaml.AliasEvent) -> _Size:
        anchor = str(event.anchor)
        # Endless when expanded.
        if any(part.anchor == anchor for part in self.stack):
            raise YamlError(self.name, f"the anchor &{anchor} contains itself", _line(event))
        return self.anchors.get(anchor, _Size())

    def _refuse_excess(self, event: yaml.Event) -> None:
        if max(len(self.stack), self.stack[-1].depth) > MAX_DEPTH:
            raise YamlError(self.name, f"is nested deeper than {MAX_DEPTH} levels", _line(event))
        if self.stack[-1].values > MAX_VALUES:
            problem = f"expands to more than {MAX_VALUES} values; use fewer aliases"
            raise YamlError(self.name, problem, _line(event))


def _line(event: yaml.Event) -> int | None:
    return event.start_mark.line + 1 if event.start_mark else None


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses an excess and a key given twice, and reads `1e-4` as a number."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self._size = _SizeCheck(name)

    def get_event(self) -> Any:
        # Before anything is built: a few lines of aliases of aliases can expand to billions of values.
        event = super().get_event()
        self._size.visit(event)
        return event

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert isinstance(node, yaml.MappingNode)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                # PyYAML would take the last one without a word.
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges; a mapping's own keys win over merged ones in whatever merges that mapping in turn."""
        super().flatten_mapping(node)
        # PyYAML puts merged pairs first, so the last pair of a key is the mapping's own.
        last = {(key.tag, str(key.value)): (key, value) for key, value in node.value}
        node.value = list(last.values())

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and _OTHER_BASE.match(str(node.value)):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value} is another number to some programs than to others (base 8 or 60); put it in "
                "quotes if it is a text, or write the number without leading zeros and colons",
                problem_mark=node.start_mark,
            )
        try:
            return super().construct_object(node, deep)
        # A date such as 2024-13-45 has the form of one, and fails only when it is made.
        except (ValueError, OverflowError) as error:
            shown = str(node.value)[:40]
            raise yaml.MarkedYAMLError(
                problem=f"{shown} is not a value", problem_mark=node.start_mark
            ) from error


# The last argument: PyYAML asks a resolver only where a value begins with one of these.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
