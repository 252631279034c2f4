"""Matrices over parameters: topology change over time, balance of groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rarefy.callbacks.log_sparsity import common_prefix
from rarefy.report.chart import HeatMap
from rarefy.report.run_data import Run

MOST_COLUMNS = 96


def topology_map(run: Run) -> HeatMap | None:
    """Share of active connections that updates replaced, by parameter and step; None if none was logged."""
    grown = run.of_parameters("grown")
    if not grown:
        return None
    names = [name for name in run.sparse if name in grown]
    names += [name for name in grown if name not in names]
    steps = np.unique(np.concatenate([grown[name].steps for name in names]))
    edges = steps[np.arange(min(len(steps), MOST_COLUMNS)) * len(steps) // min(len(steps), MOST_COLUMNS)]
    values = np.full((len(names), len(edges)), np.nan)
    for row, name in enumerate(names):
        columns = np.searchsorted(edges, grown[name].steps, side="right") - 1
        counts = np.bincount(columns, minlength=len(edges))
        sums = np.bincount(columns, weights=grown[name].mean, minlength=len(edges))
        # numpy computes both sides of `where`, so the division must not be one by 0.
        values[row] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    several = (
        ""
        if len(steps) == len(edges)
        else f"each column is the mean of about {len(steps) / len(edges):.0f} updates"
    )
    labels = [f"{int(step):,}" for step in edges]
    title = "Connections replaced by each update"
    return HeatMap("topology", title, without_prefix(names), labels, values, subtitle=several)


def balance_map(run: Run) -> HeatMap | None:
    """Share of active connections by parameter and balanced group; None if there are no groups."""
    grouped = [mask for mask in run.masks if mask.groups]
    if not grouped:
        return None
    width = max(len(mask.groups) for mask in grouped)
    values = np.full((len(grouped), width), np.nan)
    for row, mask in enumerate(grouped):
        values[row, : len(mask.groups)] = mask.groups
    labels = [str(number) for number in range(1, width + 1)]
    names = [mask.name for mask in grouped]
    title = "Active connections in each group"
    return HeatMap("balance", title, without_prefix(names), labels, values, column_title="group")


def without_prefix(names: Sequence[str]) -> list[str]:
    """Names without the modules that all of them begin with.

    Example:
        >>> without_prefix(["model.layers.0.fc.weight", "model.layers.1.fc.weight"])
        ['0.fc.weight', '1.fc.weight']
    """
    shared = common_prefix(names).rpartition(".")[0] if len(names) > 1 else ""
    return [name.removeprefix(f"{shared}.") if shared else name for name in names]
