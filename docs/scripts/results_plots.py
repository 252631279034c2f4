"""The plots of the results, as SVG files; needs the extra `plot`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_page import NAMES, Row, distinct, load, matching

TITLES = {
    "mnist1d_mlp": "MNIST-1D, MLP",
    "mnist1d_conv": "MNIST-1D, conv net",
    "mnist1d_wide": "MNIST-1D, wide MLP",
    "digits_mlp": "digits, MLP",
    "stdlib_gpt": "standard library, GPT",
}
LABELS = {"accuracy": "test accuracy, %", "bits_per_byte": "bits per byte (lower is better)"}
METRICS = {"stdlib_gpt": "bits_per_byte"}
# One look a variant in every plot; what is not named is drawn in the order of the colours.
COLOURS = {
    "static": "#8c8c8c",
    "set": "#1f77b4",
    "rigl": "#d62728",
    "rigl, ERK": "#ff9896",
    "gmp": "#2ca02c",
    "dense, narrow": "#9467bd",
}
# The task of the table of structures in which time shows.
WIDE = "mnist1d_wide"
SHOWN = ("gmp", "set", "rigl", "rigl, ERK", "static", "dense, narrow")


def axes_of(ax: Axes, title: str, x: str, y: str) -> None:
    """The same frame for every plot."""
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def draw_methods(task: str, ax: Axes) -> None:
    """Score over sparsity, a line a variant, with standard errors."""
    rows = matching("methods", task=task)
    places = sorted(sparsity for sparsity in distinct(rows, "sparsity") if sparsity)
    for variant in SHOWN:
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["sparsity"])
        x = [places.index(row["sparsity"]) for row in own]
        y = [row["score"] for row in own]
        error = [row["score_error"] for row in own]
        name = NAMES.get(variant, variant)
        ax.errorbar(
            x, y, error, label=name, color=COLOURS[variant], marker="o", markersize=3.5, capsize=2, lw=1.4
        )
    for row in rows:
        if row["variant"] == "dense":
            ax.axhline(row["score"], color="black", lw=1, ls="--", label="dense")
    ax.set_xticks(range(len(places)), [f"{100 * one:g}%" for one in places])
    axes_of(ax, TITLES[task], "sparsity", LABELS[METRICS.get(task, "accuracy")])


def sparsities_of(rows: list[Row], task: str) -> set[float]:
    """At which a task was run."""
    return {row["sparsity"] for row in rows if row["task"] == task and row["sparsity"]}


def methods_figure() -> Figure:
    """A panel for each task that has more than one sparsity."""
    rows = load("methods")
    tasks = [task for task in distinct(rows, "task") if len(sparsities_of(rows, task)) > 1]
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.6), squeeze=False)
    for task, ax in zip(tasks, axes[0], strict=True):
        draw_methods(task, ax)
    axes[0][0].legend(fontsize=7, frameon=False, loc="lower left")
    return figure


def structure_figure() -> Figure:
    """Score over time to train, a point a pattern, a panel a sparsity: of the task whose layers are wide."""
    rows = matching("structure", task=WIDE)
    (dense,) = (row for row in rows if row["pattern"] == "dense")
    sparsities = sorted(sparsity for sparsity in distinct(rows, "sparsity") if sparsity)
    figure, axes = plt.subplots(1, len(sparsities), figsize=(3.6 * len(sparsities), 3.6), sharey=True)
    for sparsity, ax in zip(sparsities, axes, strict=True):
        for number, row in enumerate([dense, *(row for row in rows if row["sparsity"] == sparsity)]):
            x = row["seconds"] / dense["seconds"]
            colour = "black" if row is dense else f"C{number - 1}"
            y, error = row["score"], row["score_error"]
            ax.errorbar(x, y, error, marker="o", capsize=2, color=colour, label=row["pattern"])
        ax.set_xlim(left=0)
        axes_of(ax, f"RigL at {100 * sparsity:g}%", "time to train, dense = 1", LABELS["accuracy"])
    axes[-1].legend(fontsize=7, frameon=False)
    return figure


def equal_time_figure() -> Figure:
    """Score over seconds of training, a line a model, a panel a task and a machine."""
    table = load("equal_time")
    tasks = distinct(table, "task")
    machines = list(dict.fromkeys((row["processor"], row["dtype"]) for row in table))
    size = (4.6 * len(tasks), 3.2 * len(machines))
    figure, axes = plt.subplots(len(machines), len(tasks), figsize=size, squeeze=False)
    for (processor, dtype), line in zip(machines, axes, strict=True):
        for task, ax in zip(tasks, line, strict=True):
            rows = matching("equal_time", task=task, processor=processor, dtype=dtype)
            budget_panel(ax, rows, [f"{one:g}" for one in distinct(rows, "budget")])
            short = processor.replace("(R)", "").replace(" Processor", "")
            title = f"{TITLES[task]}; {short}, {dtype}"
            axes_of(ax, title, "seconds of training, one thread", LABELS[METRICS.get(task, "accuracy")])
    return figure


def equal_flops_figure() -> Figure:
    """Score over operations of training, a line a model, a panel a task."""
    table = load("equal_flops")
    tasks = distinct(table, "task")
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.2), squeeze=False)
    for task, ax in zip(tasks, axes[0], strict=True):
        rows = matching("equal_flops", task=task)
        budget_panel(ax, rows, [f"{one / 1e9:.3g}" for one in distinct(rows, "operations")])
        axes_of(ax, TITLES[task], "operations of training, 10⁹", LABELS[METRICS.get(task, "accuracy")])
    return figure


def budget_panel(ax: Axes, rows: Sequence[Row], ticks: Sequence[str]) -> None:
    """One line a model, over budgets that the ticks name."""
    for number, model in enumerate(distinct(rows, "model")):
        own = [row for row in rows if row["model"] == model]
        x = [row["budget"] for row in own]
        y = [row["score"] for row in own]
        error = [row["score_error"] for row in own]
        style = "--" if "dense" in model else "-"
        ax.errorbar(
            x, y, error, label=model, marker="o", markersize=3.5, capsize=2, ls=style, color=f"C{number}"
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(distinct(rows, "budget"), ticks)
    ax.legend(fontsize=7, frameon=False)


def transfer_figure() -> Figure:
    """Score over learning rate, a line a sparsity, a panel a parametrization."""
    rows = load("transfer")
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), sharey=True)
    for name, ax in zip(("standard", "supar"), axes, strict=True):
        for number, sparsity in enumerate(distinct(rows, "sparsity")):
            kind = name if sparsity else "standard"
            own = [row for row in rows if (row["parametrization"], row["sparsity"]) == (kind, sparsity)]
            x, y = [row["lr"] for row in own], [row["score"] for row in own]
            error = [row["score_error"] for row in own]
            label = f"{100 * sparsity:g}% sparse" if sparsity else "dense"
            ax.errorbar(x, y, error, label=label, marker="o", markersize=3.5, capsize=2, color=f"C{number}")
            best = min(range(len(y)), key=y.__getitem__)
            ax.plot(x[best], y[best], marker="o", markersize=9, mfc="none", color=f"C{number}")
        ax.set_xscale("log", base=2)
        ax.legend(fontsize=7, frameon=False)
        axes_of(ax, f"parametrization: {name}", "learning rate", LABELS["bits_per_byte"])
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "methods": methods_figure,
    "structure": structure_figure,
    "equal_time": equal_time_figure,
    "equal_flops": equal_flops_figure,
    "transfer": transfer_figure,
}


def draw_all(folder: Path) -> None:
    """Draws the plot of each table that was run."""
    # Fixed names inside the file, and text as text: the same figures give the same file.
    looks = {"svg.hashsalt": "rarefy", "svg.fonttype": "none", "font.size": 9}
    # Each text of a file names every font of this list.
    matplotlib.rcParams.update({**looks, "font.sans-serif": ["DejaVu Sans", "sans-serif"]})
    for name, draw in FIGURES.items():
        if not load(name):
            continue
        figure = draw()
        figure.tight_layout()
        save(figure, folder / f"results_{name}.svg")


def save(figure: Any, path: Path) -> None:
    """Writes a plot, the same file for the same figures."""
    figure.savefig(path, metadata={"Date": None})
    # matplotlib leaves blanks at the ends of lines, and writes six decimals where a tenth of a point is not seen.
    lines = (line.rstrip() for line in path.read_text().splitlines())
    text = re.sub(r"(\d\d\.\d)\d+", r"\1", "\n".join(lines))
    path.write_text(f"{text}\n")
    plt.close(figure)
