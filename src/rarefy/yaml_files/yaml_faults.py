"""What is wrong with text that is no YAML, in the words of somebody who edits the file."""

from __future__ import annotations

import re

import yaml

_KEY = re.compile(r"[^\s:#][^:#]*:(?=\s|$)")
_NO_SPACE = re.compile(r"\s*(?:- )?([\w.-]+):(?=[^\s:])")
_WORD = re.compile(r"[^\s,\]}]+")


def plain_words(error: yaml.MarkedYAMLError, text: str) -> str:
    """The fault as one line; PyYAML's own words where there are no better ones.

    Args:
        error: what PyYAML raised.
        text: what it read.

    Example:
        >>> try:
        ...     yaml.safe_load("a: *attn*")
        ... except yaml.MarkedYAMLError as error:
        ...     print(plain_words(error, "a: *attn*"))
        a value that starts with * is an alias to YAML; put it in quotes: "*attn*"
    """
    lines = text.splitlines()
    parts = [part for part in (error.context, error.problem) if part]
    said = ", ".join(parts).replace("\n", " ") or "is not YAML"
    mark = error.problem_mark
    # At the very end of a text there is no line to look at.
    if mark is None or mark.line >= len(lines):
        return said
    # First, since PyYAML words a tab in several ways, none of which names it plainly.
    if "\t" in _indent(lines[mark.line]):
        return "is indented with a tab; use spaces"
    return (
        _needs_quotes(said, lines[mark.line], mark.column)
        or _unexpected_colon(said, lines, mark.line, mark.column)
        or _fits_no_level(said, lines, mark.line)
        or said
    )


def _needs_quotes(said: str, line: str, column: int) -> str:
    if "alias" in said:
        start = line.rfind("*", 0, column + 1)
        # PyYAML points behind the asterisk, which may itself be a second one.
        start = start - 1 if start == column > 0 and line[start - 1] == "*" else _first_alias(line, column)
        word = _WORD.match(line, start)
        shown = word[0] if word else "*..."
        kind = f"{said}; " if "undefined" in said else ""
        return f'{kind}a value that starts with * is an alias to YAML; put it in quotes: "{shown}"'
    if "cannot start any token" in said:
        word = _WORD.match(line, column)
        shown = word[0] if word else line[column : column + 1]
        return f'a value cannot start with {line[column]}; put it in quotes: "{shown}"'
    return ""


def _first_alias(line: str, column: int) -> int:
    """Where the value begins whose scanning stopped at `column`."""
    before = re.search(r"\*[\w-]*$", line[:column])
    return before.start() if before else column


def _unexpected_colon(said: str, lines: list[str], row: int, column: int) -> str:
    if "mapping values are not allowed" not in said:
        return ""
    # The mark stands on the second colon; what is before it must be a key of its own.
    if _KEY.search(lines[row][: column - 1]):
        return "has a second `: ` in its value; put the value in quotes if the colon belongs to it"
    above = _row_above(lines, row)
    if above is None:
        return ""
    glued = _NO_SPACE.match(lines[above])
    if glued is not None and not _KEY.search(lines[above]):
        return f"the line before it, line {above + 1}, needs a space after `{glued[1]}:`"
    if len(_indent(lines[row])) > len(_indent(lines[above])):
        own = _spaces(lines[row])
        return f"is indented by {own}, deeper than line {above + 1}, which has a value already; {_like(lines, above)}"
    return ""


def _fits_no_level(said: str, lines: list[str], row: int) -> str:
    found = said.rpartition("but found ")[2]
    if "expected <block end>" in said and found in ("'?'", "'-'"):
        return "is a key beside list items, or a list item beside keys; indent what belongs to the other"
    if found != "'<block mapping start>'":
        return ""
    levels = _open_levels(lines[:row])
    known = ", ".join(map(str, levels[:-1])) + " or " * (len(levels) > 1) + str(levels[-1])
    return f"is indented by {_spaces(lines[row])}, which fits no line above it ({known} fit)"


def _open_levels(lines: list[str]) -> list[int]:
    """The indentations that a following line may have."""
    levels = [0]
    for line in lines:
        if line.strip() and not line.lstrip().startswith("#"):
            column = len(_indent(line))
            levels = [level for level in levels if level < column] + [column]
            items = re.match(r" *((?:- +)+)\S", line)
            # An item that holds a map opens two levels: that of its dash, and that of its keys.
            if items:
                levels.append(column + len(items[1]))
    return levels


def _row_above(lines: list[str], row: int) -> int | None:
    used = [at for at in range(row) if lines[at].strip() and not lines[at].lstrip().startswith("#")]
    return used[-1] if used else None


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _spaces(line: str) -> str:
    count = len(_indent(line))
    return "1 space" if count == 1 else f"{count} spaces"


def _like(lines: list[str], row: int) -> str:
    return f"indent it by {_spaces(lines[row])} as well, or take the value of line {row + 1} away"
