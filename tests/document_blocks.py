"""The code blocks, links and headings of the README and of docs/."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
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
    """A fenced block; `title` is the file that the reader shall save it as, or empty."""

    page: Path
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order, those of tabs without their indentation."""
    return [
        Block(page, found["language"], _title(found["options"]), textwrap.dedent(found["body"]))
        for found in _BLOCK.finditer(page.read_text())
    ]


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
