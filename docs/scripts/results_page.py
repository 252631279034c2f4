"""Puts the figures of benchmarks/quality/results into the pages, and draws their plots.

A figure stands between `<!-- results: NAME ARGUMENTS -->` and `<!-- / -->`; what is between is made anew.

python docs/scripts/results_page.py
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "quality" / "results"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("index.md", "results.md", "choosing.md")))
MARK = re.compile(r"(<!-- results: (.+?) -->)(.*?)(<!-- / -->)", re.DOTALL)
NAMES = {
    "set": "SET",
    "set, ERK": "SET, ERK",
    "rigl": "RigL",
    "rigl, ERK": "RigL, ERK",
    "gmp": "GMP",
    "dense, narrow": "dense of equal parameters",
}

Row = Mapping[str, Any]


def load(table: str) -> list[Row]:
    """The rows of a table, none where it was not run."""
    path = RESULTS / f"{table}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def matching(table: str, **wanted: Any) -> list[Row]:
    """The rows of a table that have these values."""
    return [row for row in load(table) if all(str(row[key]) == str(value) for key, value in wanted.items())]


def spread(row: Row, key: str = "score", digits: int | None = None) -> str:
    """Mean ± standard error."""
    if digits is None:
        digits = 1 if row[key] > 20 else 3
    return f"{row[key]:.{digits}f} ± {row[f'{key}_error']:.{digits}f}"


def percent(sparsity: float) -> str:
    """A sparsity as it stands in the head of a table."""
    return f"{100 * sparsity:.4g}%"


def table_of(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [list(head), ["---"] * len(head), *map(list, lines)]
    return "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def distinct(rows: Sequence[Row], key: str) -> list[Any]:
    """The values of a column, each once, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


# ---- what a mark may ask for ----


def methods(task: str) -> str:
    """Variants down, sparsities across."""
    rows = matching("methods", task=task)
    sparsities = sorted(sparsity for sparsity in distinct(rows, "sparsity") if sparsity)
    lines = []
    for variant in distinct(rows, "variant"):
        own = {row["sparsity"]: row for row in rows if row["variant"] == variant}
        rate = f"{next(iter(own.values()))['lr']:g}"
        if variant == "dense":
            lines.append(["**dense** (0%)", rate, spread(own[0.0]), *[""] * (len(sparsities) - 1)])
        else:
            cells = [spread(own[one]) if one in own else "" for one in sparsities]
            lines.append([NAMES.get(variant, variant), rate, *cells])
    return table_of(["", "learning rate", *map(percent, sparsities)], lines)


def value(table: str, key: str, *filters: str) -> str:
    """One figure: `value TABLE COLUMN KEY=VALUE ...`."""
    (row,) = matching(table, **dict(one.split("=", 1) for one in filters))
    return spread(row, key)


def machine(table: str) -> str:
    """Processor and versions that a table was made with."""
    facts = json.loads((RESULTS / f"{table}.json").read_text())
    return f"{facts['processor']}, torch {facts['torch']}, Python {facts['python']}"


FIGURES: dict[str, Callable[..., str]] = {"methods": methods, "value": value, "machine": machine}


def filled(text: str) -> str:
    """A page with every figure as the files have it."""

    def made(match: re.Match[str]) -> str:
        name, *arguments = shlex.split(match[2])
        return f"{match[1]}{FIGURES[name](*arguments)}{match[4]}"

    return MARK.sub(made, text)


def main() -> None:
    """Fills the pages and draws the plots."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    from results_plots import draw_all

    draw_all(ROOT / "docs" / "pictures")


if __name__ == "__main__":
    main()
