"""What the text of docs/results.md says in figures of its own, and how the files of results give the same.

A claim is words of the page, and the figures in them in their order, from the files. A figure of the words that a `%`
or a colon follows, or that stands in a name, is no claim but says where it holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from document_blocks import ROOT

Row = dict[str, Any]
CLASSIFIERS = ("mnist1d_mlp", "mnist1d_conv", "digits_mlp")
STILL = ("dense", "dense, narrow", "static", "static, ERK")
FIGURE = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w%:]|\.\d)")


@cache
def rows(table: str) -> tuple[Row, ...]:
    path = ROOT / "benchmarks" / "quality" / "results" / f"{table}.json"
    return tuple(json.loads(path.read_text())["rows"])


def one(table: str, key: str = "score", **wanted: Any) -> float:
    (row,) = (row for row in rows(table) if wanted.items() <= row.items())
    return row[key]


def score(task: str, variant: str, sparsity: float = 0.0) -> float:
    return one("methods", task=task, variant=variant, sparsity=sparsity)


def lead(task: str, sparsity: float, first: str, second: str) -> float:
    return score(task, first, sparsity) - score(task, second, sparsity)


def ranked(task: str, sparsity: float) -> list[float]:
    """What the sparse methods lose against dense, the least first."""
    own = [
        row["score"]
        for row in rows("methods")
        if (row["task"], row["sparsity"]) == (task, sparsity) and "dense" not in row["variant"]
    ]
    return [score(task, "dense") - best for best in sorted(own, reverse=True)]


def leads_of_moving() -> Iterator[float]:
    """Of each method that moves connections over a fixed mask of the same distribution."""
    for row in rows("methods"):
        if row["task"] in CLASSIFIERS and row["sparsity"] >= 0.95 and row["variant"] not in STILL:
            still = "static, ERK" if "ERK" in row["variant"] else "static"
            yield row["score"] - score(row["task"], still, row["sparsity"])


def at_budget(table: str, model: str, budget: float, key: str = "score", task: str = "stdlib_gpt") -> float:
    extra = {"processor": "AMD EPYC Zen 3"} if table == "equal_time" else {}
    return one(table, key, model=f"{model}", budget=budget, task=task, **extra)


def operations_lead(model: str) -> list[float]:
    """How far the sparse GPT is ahead for the same operations, the least and the most."""
    budgets = sorted({row["budget"] for row in rows("equal_flops") if row["task"] == "stdlib_gpt"})
    leads = [
        at_budget("equal_flops", model, budget) - at_budget("equal_flops", "256 wide, 90% sparse", budget)
        for budget in budgets
    ]
    return [min(leads), max(leads)]


def pruned(way: str, sparsity: float, key: str = "score") -> float:
    return one("fine_tuning", key, way=way, sparsity=sparsity)


def lost_at_once(way: str) -> float:
    return pruned(way, 0.8, "before") - pruned("dense", 0.0, "before")


def structured(pattern: str) -> float:
    return one("structure", task="stdlib_gpt", pattern=pattern, sparsity=0.875)


def update(variant: str, batch: int, interval: int = 0) -> float:
    setting = {} if variant == "static" else {"interval": interval, "drop": 0.3}
    return one("updates", variant=variant, batch=batch, **setting)


def steps_over_two_models() -> float:
    """How much longer a step of the sparse GPT takes on the Zen 3 than one of the narrow dense one."""
    steps = [
        at_budget("equal_time", name, 8.0, "steps") for name in ("128 wide, dense", "256 wide, 90% sparse")
    ]
    return steps[0] / steps[1]


WIDE_MLP = "1024 wide, 90% sparse"


def best_rate(parametrization: str, sparsity: float) -> float:
    own = [
        row
        for row in rows("transfer")
        if (row["parametrization"], row["sparsity"]) == (parametrization, sparsity)
    ]
    return min(own, key=lambda row: row["score"])["lr"]


CLAIMS: dict[str, Callable[[], list[float]]] = {
    "up to 33 points over `uniform` on the digits": lambda: [lead("digits_mlp", 0.99, "rigl, ERK", "rigl")],
    "at 80% GMP loses 2 points": lambda: [score("mnist1d_conv", "dense") - score("mnist1d_conv", "gmp", 0.8)],
    "at 90% the best lose 8": lambda: ranked("mnist1d_conv", 0.9)[:1],
    "within the same distribution, by up to 71 points": lambda: [max(leads_of_moving())],
    "but 9 points behind in the conv net at 95%": lambda: [lead("mnist1d_conv", 0.95, "set", "mest")],
    "dense of equal parameters wins by 5 to 10 points": lambda: [
        score("mnist1d_conv", "dense, narrow", one)
        - score("mnist1d_conv", "dense")
        + ranked("mnist1d_conv", one)[0]
        for one in (0.95, 0.98)
    ],
    "the digits gain 7 points at 98% and 33 at 99%": lambda: [
        lead("digits_mlp", sparsity, "rigl, ERK", "rigl") for sparsity in (0.98, 0.99)
    ],
    "the best, 0.03 to 0.04 behind the dense model": lambda: [
        score("stdlib_gpt", variant, 0.99) - score("stdlib_gpt", "dense") for variant in ("mest", "powerprop")
    ],
    "behind in the conv net by up to 16 points": lambda: [
        max(lead("mnist1d_conv", one, "gmp", "powerprop") for one in (0.8, 0.9, 0.95, 0.98))
    ],
    "is worth 4 points at most": lambda: [
        max(update("rigl", batch, 350) - update("static", batch) for batch in (32, 128, 512))
    ],
    "RigL is ahead of SET by up to 10 points": lambda: [
        max(update("rigl", 512, interval) - update("set", 512, interval) for interval in (5, 25, 100, 350))
    ],
    "a step takes 1.6 times\n  that of the dense model of 128": lambda: [steps_over_two_models()],
    "is 0.3 to 0.6 bits ahead of the dense model": lambda: operations_lead("128 wide, dense"),
    "and 0.8 to 0.9 ahead of the dense one of its width": lambda: operations_lead("256 wide, dense"),
    "ahead of single connections by 0.11 bits and blocks of 32 behind by 0.13": lambda: [
        structured("single connections") - structured("n of m"),
        structured("32 × 32") - structured("single connections"),
    ],
    "it loses 0.06 bits where magnitude loses 0.47": lambda: [
        lost_at_once("SparseGPT"),
        lost_at_once("magnitude"),
    ],
    "all three are within 0.02": lambda: [pruned("Wanda", 0.8) - pruned("SparseGPT", 0.8)],
    "of these, by about 0.01": lambda: [pruned("SparseGPT", 0.8) - pruned("gradually (GMP)", 0.8)],
    "80% costs 0.05 bits": lambda: [pruned("gradually (GMP)", 0.8) - pruned("dense", 0.0)],
    "the sparse model of 93.75% is 0.19 bits behind": lambda: [
        one("transfer", parametrization="standard", sparsity=0.9375, lr=0.00195312)
        - one("transfer", parametrization="supar", sparsity=0.9375, lr=0.00195312)
    ],
    "ends at 3.33, below the 3.46 of `supar` at its best": lambda: [
        min(
            row["score"]
            for row in rows("transfer")
            if (row["parametrization"], row["sparsity"]) == (name, 0.9375)
        )
        for name in ("standard", "supar")
    ],
    "and 7 points above dense": lambda: [
        one("rivals", library="rarefy", method="rigl") - one("rivals", library="torch", method="dense")
    ],
}

# Words of the page that compare without a figure.
COMPARISONS: dict[str, Callable[[], bool]] = {
    "RigL at 80 and 90% is better than the dense model with all its weights": lambda: all(
        score("mnist1d_mlp", "rigl", one) > score("mnist1d_mlp", "dense") for one in (0.8, 0.9)
    ),
    "**RigL beats SET in the classifiers**": lambda: all(
        lead(row["task"], row["sparsity"], "rigl", "set") > 0
        for row in rows("methods")
        if row["task"] in CLASSIFIERS and row["sparsity"]
    ),
    "A fixed, uniform random mask loses to it in the classifiers from 95% on, and in the conv net always": lambda: (
        all(
            lead(row["task"], row["sparsity"], "dense, narrow", "static") > 0
            for row in rows("methods")
            if row["task"] in CLASSIFIERS
            and row["sparsity"] >= (0.8 if row["task"] == "mnist1d_conv" else 0.95)
        )
    ),
    "is behind static at each.": lambda: all(
        lead("stdlib_gpt", one, "rigl", "static") > 0 for one in (0.8, 0.9, 0.95, 0.98, 0.99)
    ),
    "with one every 100 steps RigL is the best of that batch": lambda: (
        update("rigl", 32, 100)
        == max(update(variant, 32, every) for variant in ("set", "rigl") for every in (5, 25, 100, 350))
    ),
    "**The MLP: the wide sparse model wins once it has two seconds.**": lambda: all(
        row["score"] < at_budget("equal_time", WIDE_MLP, row["budget"], task="mnist1d_mlp")
        for row in rows("equal_time")
        if row["processor"] == "AMD EPYC Zen 3" and "dense" in row["model"] and row["task"] == "mnist1d_mlp"
        if row["budget"] >= 2
    ),
    "in both tasks and at each budget": lambda: all(
        sign * row["score"] < sign * at_budget("equal_flops", model, row["budget"], task=task)
        for task, model, sign in (("mnist1d_mlp", WIDE_MLP, 1), ("stdlib_gpt", "256 wide, 90% sparse", -1))
        for row in rows("equal_flops")
        if row["task"] == task and "dense" in row["model"]
    ),
    "**With `supar` one rate is best for all three**": lambda: (
        len({best_rate("supar", 0.75), best_rate("supar", 0.9375), best_rate("standard", 0.0)}) == 1
    ),
}


def figures(words: str) -> list[str]:
    """The figures of a claim, as the page writes them."""
    without_places = re.sub(r"blocks of \d+|model of \d+|\d+(?:\.\d+)? ?%", "", words)
    return FIGURE.findall(without_places)


def as_written(value: float, figure: str) -> str:
    """A value with as many decimals as the page has."""
    return f"{value:.{len(figure.partition('.')[2])}f}"
