"""The tables that the command line prints: the plan before a run, the result after it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rarefy.run.preview import CostPlan, ParameterPlan, RunPreview, UpdatePlan

# rich measures a table inside a width; this one holds every table whole.
_WIDEST = 400


def print_whole(tables: Table | Group) -> None:
    """Prints tables as wide as they are, even where the terminal is narrower."""
    console = Console()
    widest = console.measure(tables, options=console.options.update(width=_WIDEST)).maximum
    console.width = max(console.width, widest)
    console.print(tables)


def preview_tables(preview: RunPreview) -> Group:
    """Everything that `--validate_only` shows."""
    return Group(
        parameter_table(preview.parameters),
        update_table(preview.updates),
        cost_table(preview.cost),
        f"{_step_line(preview)}; the run has {preview.total_steps:,} steps",
    )


def _step_line(preview: RunPreview) -> str:
    return preview.problem if preview.loss is None else f"one step on one batch: loss {preview.loss:.4f}"


def parameter_table(plans: Iterable[ParameterPlan]) -> Table:
    """Every parameter, sparse or dense, with the totals."""
    plans = list(plans)
    table = Table(title="Parameters", title_justify="left", box=SIMPLE)
    for column in ("parameter", "shape", "filter, or why dense", "algorithm"):
        table.add_column(column)
    for column in ("start", "first update", "end", "kept"):
        table.add_column(column, justify="right")
    table.add_column("pattern")
    table.add_column("storage")
    for plan in plans:
        # As Text: a glob such as `[ab]*` would be taken for rich's markup.
        table.add_row(*map(Text, _parameter_row(plan)))
    table.add_section()
    table.add_row(*map(Text, _total_row(plans)))
    return table


def _parameter_row(plan: ParameterPlan) -> list[str]:
    targets = [f"{stage.target:.4g}" for stage in plan.stages] or ["", "", ""]
    kept = f"{plan.size:,}"
    if plan.stages:
        # One number where first and last are the same.
        counts = dict.fromkeys(f"{stage.kept:,}" for stage in (plan.stages[0], plan.stages[-1]))
        kept = f"{' → '.join(counts)} of {kept}"
    shape = " × ".join(map(str, plan.shape))
    return [plan.name, shape, plan.reason, plan.algorithm, *targets, kept, plan.structure, plan.storage]


def _total_row(plans: list[ParameterPlan]) -> list[str]:
    sparse = [plan for plan in plans if plan.stages]
    total = sum(plan.size for plan in plans)
    covered = sum(plan.size for plan in sparse)
    # At the start, after the first update and at the end.
    kept = [sum(plan.stages[moment].kept for plan in sparse) for moment in range(3)]
    shares = [f"{1 - count / covered:.4g}" if covered else "" for count in kept]
    facts = f"{len(sparse)} of {len(plans)} are sparse"
    left = f"{total - covered + kept[-1]:,} of {total:,}"
    return ["all", "", facts, "", *shares, left, "", ""]


def plan_table(plans: Iterable[ParameterPlan], updates: Iterable[UpdatePlan]) -> Table:
    """The sparse parameters in short: one line for all that a filter treats alike, then the update steps."""
    alike: dict[tuple[str, ...], list[ParameterPlan]] = {}
    for plan in plans:
        if plan.stages:
            targets = " → ".join(dict.fromkeys(f"{stage.target:.4g}" for stage in plan.stages))
            alike.setdefault((plan.algorithm, plan.reason, targets, plan.structure), []).append(plan)
    table = Table("algorithm", "filter", "sparsity", "pattern", "weights", "kept", title="Plan", box=SIMPLE)
    for facts, members in alike.items():
        kept = sum(plan.stages[-1].kept for plan in members)
        size = sum(plan.size for plan in members)
        table.add_row(*map(Text, [*facts, str(len(members)), f"{kept:,} of {size:,}"]))
    # Algorithms with the same schedule say it once.
    lines = dict.fromkeys(_update_line(plan) for plan in updates)
    table.caption = "\n".join(lines)
    table.title_justify = "left"
    table.caption_justify = "left"
    return table


def _update_line(plan: UpdatePlan) -> str:
    if plan.first is None:
        return f"{plan.algorithm}: the topology stays"
    updates = "1 update" if plan.count == 1 else f"{plan.count:,} updates"
    return f"{plan.algorithm}: {updates}, from step {plan.first:,} to step {plan.last:,}"


def update_table(plans: Iterable[UpdatePlan]) -> Table:
    """When topologies change."""
    table = Table("algorithm", "first update", "last update", "updates", title="Updates", box=SIMPLE)
    table.title_justify = "left"
    for plan in plans:
        first, last = ("never" if step is None else f"{step:,}" for step in (plan.first, plan.last))
        table.add_row(plan.algorithm, first, last, f"{plan.count:,}")
    return table


def cost_table(cost: CostPlan) -> Table:
    """What a step costs against the same step with every weight dense."""
    table = Table("per step", "dense", "sparse", "ratio", title="Predicted cost", box=SIMPLE)
    table.title_justify = "left"
    for name, dense, sparse, unit in (
        ("operations, inactive connections left out", cost.dense_flops, cost.sparse_flops, "FLOP"),
        ("weights, gradients, optimizer state, masks", cost.dense_bytes, cost.stored_bytes, "B"),
    ):
        ratio = f"{sparse / dense:.2f}" if dense else ""
        table.add_row(name, _scaled(dense, unit), _scaled(sparse, unit), ratio)
    return table


def _scaled(value: int, unit: str) -> str:
    power = min(5, int(math.log10(value) // 3)) if value else 0
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"


def result_table(rows: Iterable[tuple[str, str]]) -> Table:
    """What a run ends with."""
    table = Table(show_header=False, title="Result", title_justify="left", box=SIMPLE)
    for name, value in rows:
        table.add_row(name, Text(value))
    return table
