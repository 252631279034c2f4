"""The code blocks, links and headings of the README and of docs/."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_HEADING = re.compile(r"^#{1,6} (.+?)(?: \{ *#([\w-]+) *\})?$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: the file that holds it.
        language: as written behind the fence.
        title: the file that the reader shall save it as, or empty.
        text: without indentation.
        prints: what Python code is said to print, in a text block right after it.
    """

    page: Path
    language: str
    title: str
    text: str
    prints: str | None = None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order, those of tabs without their indentation."""
    found = [
        Block(page, match["language"], _title(match["options"]), textwrap.dedent(match["body"]))
        for match in _BLOCK.finditer(page.read_text())
    ]
    pairs = zip_longest(found, found[1:])
    return [replace(one, prints=after.text) if _is_output(one, after) else one for one, after in pairs]


def _is_output(block: Block, following: Block | None) -> bool:
    return following is not None and (block.language, following.language) == ("python", "text")


def _title(options: str) -> str:
    found = re.search(r'title="([^"]+)"', options)
    return found[1] if found else ""


def fences(page: Path) -> int:
    """How many lines of a page open or close a block."""
    return len(re.findall(r"^ *```", page.read_text(), re.MULTILINE))


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "`code`", _BLOCK.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """The targets of `[text](target)`."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def references(page: Path) -> list[str]:
    """The Python names of `[text][name]` and of `::: name`."""
    text = prose(page)
    return re.findall(r"\]\[([\w.]+)\]", text) + re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site generator makes them."""
    text = _BLOCK.sub("", page.read_text())
    return {anchor or slug(heading) for heading, anchor in _HEADING.findall(text)}


def slug(heading: str) -> str:
    """A heading as an anchor."""
    words = re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, word by word."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words
