"""Puts the figures of benchmarks/quality/results into the pages, and draws their plots.

A figure stands between `<!-- results: NAME ARGUMENTS -->` and `<!-- / -->`; what is between is made anew.

python docs/scripts/results_page.py
"""

from __future__ import annotations

import importlib
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy import filters

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "quality" / "results"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("index.md", "results.md", "choosing.md")))
MARK = re.compile(r"(<!-- results: (.+?) -->)(.*?)(<!-- / -->)", re.DOTALL)
# The settings at which `updates` varies the drop fraction.
USUAL_BATCH = 128
USUAL_INTERVAL = 25
NAMES = {
    "set": "SET",
    "set, ERK": "SET, ERK",
    "rigl": "RigL",
    "rigl, ERK": "RigL, ERK",
    "gmp": "GMP",
    "mest": "MEST",
    "top_kast": "Top-KAST",
    "granet": "GraNet",
    "ac_dc": "AC/DC",
    "srigl": "SRigL",
    "dense, narrow": "dense of equal parameters",
}

SIGNALS = "4000 signals of 40 numbers, 1000 for the test, the [generator's](https://arxiv.org/abs/2011.14439) default arguments"
TASK_NAMES = {
    "mnist1d_mlp": ("MNIST-1D, MLP", SIGNALS, "40–{width}–{width}–10"),
    "mnist1d_conv": (
        "MNIST-1D, conv net",
        "the same",
        "three convolutions of {width} channels, stride 2, and a linear layer",
    ),
    "mnist1d_wide": (
        "MNIST-1D, wide MLP",
        "the same",
        "40–{width}–{width}–10; the layer between the hidden ones alone is sparse",
    ),
    "digits_mlp": ("digits, MLP", "scikit-learn's, 8 × 8 pixels, 1347 and 450", "64–{width}–{width}–10"),
    "stdlib_gpt": (
        "standard library, GPT",
        "bytes of Python's own sources; 5% of the files for validation",
        "2 layers of {width}, 4 heads, 64 tokens",
    ),
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
        digits = 1 if row[key] > 10 else 3
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
        # One is chosen for the lower sparsities and one for the higher.
        rate = " / ".join(f"{one:g}" for one in distinct(list(own.values()), "lr"))
        if variant == "dense":
            lines.append(["**dense** (0%)", rate, spread(own[0.0]), *[""] * (len(sparsities) - 1)])
        else:
            cells = [spread(own[one]) if one in own else "" for one in sparsities]
            lines.append([NAMES.get(variant, variant), rate, *cells])
    return table_of(["", "learning rate", *map(percent, sparsities)], lines)


def ratio(row: Row, base: Row, key: str) -> str:
    """A mean over that of another row, with the errors of both."""
    share = row[key] / base[key]
    error = share * math.hypot(row[f"{key}_error"] / row[key], base[f"{key}_error"] / base[key])
    return f"{share:.2f} ± {error:.2f}"


def structure(task: str) -> str:
    """Patterns down; score and time over dense for each sparsity."""
    rows = matching("structure", task=task)
    (dense,) = (row for row in rows if row["pattern"] == "dense")
    sparsities = sorted(sparsity for sparsity in distinct(rows, "sparsity") if sparsity)
    head = [""]
    for sparsity in sparsities:
        head += [percent(sparsity), "time"]
    lines = [["**dense**", spread(dense), "1"] + [""] * (len(head) - 3)]
    for pattern in distinct(rows, "pattern")[1:]:
        own = {row["sparsity"]: row for row in rows if row["pattern"] == pattern}
        cells = [cell for one in sparsities for cell in (spread(own[one]), ratio(own[one], dense, "seconds"))]
        lines.append([pattern, *cells])
    return table_of(head, lines)


def structure_times(task: str) -> str:
    """Patterns down; the time of a step over dense, for each processor, format and sparsity."""
    rows = matching("structure_times", task=task)
    sparsities = sorted(sparsity for sparsity in distinct(rows, "sparsity") if sparsity)
    own = {(row["processor"], row["dtype"]): {} for row in rows}
    for row in rows:
        own[row["processor"], row["dtype"]][row["pattern"], row["sparsity"]] = row
    # The processor is said once where there is one.
    is_one = len(distinct(rows, "processor")) == 1
    names = [dtype if is_one else f"{processor}, {dtype}" for processor, dtype in own]
    lines = [
        [
            pattern,
            *(
                ratio(group[pattern, one], group["dense", 0.0], "seconds")
                for group in own.values()
                for one in sparsities
            ),
        ]
        for pattern in distinct(rows, "pattern")
        if pattern != "dense"
    ]
    return table_of(["", *(f"{name}, {percent(one)}" for name in names for one in sparsities)], lines)


def equal_time(task: str, processor: str, dtype: str) -> str:
    """Models down, seconds across."""
    rows = matching("equal_time", task=task, processor=processor, dtype=dtype)
    return at_budgets(rows, [f"{budget:g} s" for budget in distinct(rows, "budget")])


def equal_flops(task: str) -> str:
    """Models down, operations across."""
    rows = matching("equal_flops", task=task)
    return at_budgets(rows, [f"{count / 1e9:.3g} GFLOP" for count in distinct(rows, "operations")])


def at_budgets(rows: Sequence[Row], heads: Sequence[str]) -> str:
    """Models down, budgets across."""
    budgets = distinct(rows, "budget")
    head = ["", "learning rate", "weights", *heads]
    lines = []
    for model in distinct(rows, "model"):
        own = {row["budget"]: row for row in rows if row["model"] == model}
        cells = [f"{spread(own[one])} ({own[one]['steps']} steps)" for one in budgets]
        rates = " / ".join(f"{own[one]['lr']:g}" for one in budgets)
        lines.append([model, rates, f"{own[budgets[0]]['weights']:,.0f}", *cells])
    return table_of(head, lines)


def fine_tuning() -> str:
    """Ways down, sparsities across; before and after."""
    rows = load("fine_tuning")
    (dense,) = (row for row in rows if row["way"] == "dense")
    sparsities = sorted(sparsity for sparsity in distinct(rows, "sparsity") if sparsity)
    head = ["bits per byte", "", *map(percent, sparsities)]
    blank = [""] * (len(sparsities) - 1)
    lines = [["**dense** (0%)", "as trained", spread(dense, "before"), *blank]]
    lines.append(["", "trained on as long as the others", spread(dense), *blank])
    for way in distinct(rows, "way")[1:]:
        own = {row["sparsity"]: row for row in rows if row["way"] == way}
        lines.append([way, "before fine-tuning", *(spread(own[one], "before") for one in sparsities)])
        lines.append(["", "after", *(spread(own[one]) for one in sparsities)])
    return table_of(head, lines)


def transfer() -> str:
    """Learning rates across; what is best in its line is bold."""
    rows = load("transfer")
    rates = sorted(distinct(rows, "lr"))
    lines = []
    for name in ("standard", "supar"):
        for sparsity in distinct(rows, "sparsity"):
            own = {
                row["lr"]: row
                for row in rows
                if (row["parametrization"], row["sparsity"]) == (name, sparsity)
            }
            if not own:
                continue
            best = min(own, key=lambda rate: own[rate]["score"])
            cells = [f"**{spread(own[rate])}**" if rate == best else spread(own[rate]) for rate in rates]
            lines.append([name if sparsity else "dense", percent(sparsity), *cells])
    return table_of(["", "sparsity", *(f"2^{math.log2(rate):.0f}" for rate in rates)], lines)


def rivals() -> str:
    """Libraries down."""
    rows = load("rivals")
    (dense,) = (row for row in rows if row["method"] == "dense")
    lines = [
        [
            row["library"],
            NAMES.get(row["method"], row["method"]),
            f"{row['lr']:g}",
            spread(row),
            f"{100 * row['zeros']:.1f}%",
            ratio(row, dense, "seconds"),
            f"{row['megabytes']:.0f}",
            str(row["lines"]),
        ]
        for row in rows
    ]
    return table_of(
        ["library", "method", "learning rate", "accuracy", "zeros", "time", "MB", "lines"],
        lines,
    )


def updates() -> str:
    """Batch sizes and methods down, update intervals across, at the usual drop fraction."""
    rows = load("updates")
    moving = [row for row in rows if row["variant"] != "static" and row["drop"] == 0.3]
    intervals = sorted(distinct(moving, "interval"))
    lines = []
    for batch in sorted(distinct(rows, "batch")):
        (still,) = matching("updates", variant="static", batch=batch)
        for variant in ("set", "rigl"):
            own = {
                row["interval"]: row for row in moving if (row["variant"], row["batch"]) == (variant, batch)
            }
            lines.append(
                [str(batch), NAMES[variant], *(spread(own[one]) for one in intervals), spread(still)]
            )
    return table_of(["batch", "", *(f"every {one} steps" for one in intervals), "static"], lines)


def drops() -> str:
    """Drop fractions across, at the usual batch size and interval."""
    rows = [
        row for row in load("updates") if (row["batch"], row["interval"]) == (USUAL_BATCH, USUAL_INTERVAL)
    ]
    fractions = sorted(distinct(rows, "drop"))
    lines = []
    for variant in ("set", "rigl"):
        own = {row["drop"]: row for row in rows if row["variant"] == variant}
        lines.append([NAMES[variant], *(spread(own[one]) for one in fractions)])
    return table_of(["drop fraction", *map(str, fractions)], lines)


def value(table: str, key: str, *filters: str) -> str:
    """One figure: `value TABLE COLUMN KEY=VALUE ...`."""
    (row,) = matching(table, **dict(one.split("=", 1) for one in filters))
    return spread(row, key)


def machine(table: str) -> str:
    """When, on which processor and with which versions a table was made."""
    facts = json.loads((RESULTS / f"{table}.json").read_text())
    return f"{facts['measured']}, {facts['processor']}, torch {facts['torch']}, Python {facts['python']}"


def tasks() -> str:
    """What is learnt, from the code that runs it."""
    from quality.tasks import TASKS

    lines = []
    for name, (label, data, model) in TASK_NAMES.items():
        task = TASKS[name]
        size = sum(one.parameter.numel() for one in filters.select(task.model(task.width), None).values())
        about = model.format(width=task.width)
        lines.append([label, data, about, f"{size:,}", f"{task.steps} × {task.batch_size}"])
    return table_of(["task", "data", "model", "weights that can be sparse", "steps × batch"], lines)


def rates(table: str, key: str = "") -> str:
    """The learning rates that a table tries; of the tables that share them, by metric."""
    module = importlib.import_module(f"quality.{table}")
    grid = module.GRIDS[key] if key else module.GRID
    return ", ".join(f"{rate:g}" for rate in grid)


def rate_of(table: str, *filters: str) -> str:
    """The learning rate of the rows that are named, which have but one."""
    (rate,) = distinct(matching(table, **dict(one.split("=", 1) for one in filters)), "lr")
    return f"{rate:g}"


FIGURES: dict[str, Callable[..., str]] = {
    one.__name__: one
    for one in (
        tasks,
        rates,
        rate_of,
        methods,
        structure,
        structure_times,
        equal_time,
        equal_flops,
        fine_tuning,
        transfer,
        rivals,
        updates,
        drops,
        value,
        machine,
    )
}


def filled(text: str) -> str:
    """A page with every figure as the files have it."""

    def made(match: re.Match[str]) -> str:
        name, *arguments = shlex.split(match[2])
        return f"{match[1]}{FIGURES[name](*arguments)}{match[4]}"

    return MARK.sub(made, text)


def main() -> None:
    """Fills the pages and draws the plots."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    from results_plots import draw_all

    draw_all(ROOT / "docs" / "pictures")


if __name__ == "__main__":
    main()
