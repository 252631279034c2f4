"""Charts as data; `svg.py` and `png.py` draw them, `page.py` writes them into a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from rarefy.report.series import Series

Style: TypeAlias = Literal["line", "steps", "points"]
Unit: TypeAlias = Literal["number", "percent"]


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        label: for the legend.
        series: the points; drawn with a band where each stands for several.
        style: straight lines, a staircase, or points alone.
        dashed: whether the line is dashed.
    """

    label: str
    series: Series
    style: Style = "line"
    dashed: bool = False


@dataclass(frozen=True)
class LineChart:
    """Curves over the steps of a run.

    Args:
        key: short name, used for file names and anchors.
        title: what it shows.
        lines: at least one with a point.
        unit: of the values.
        marks: steps marked at the foot of the chart.
        marks_label: what the marks are.
        last_step: where the axis ends; None for the last point.
        subtitle: a line below the title.
    """

    key: str
    title: str
    lines: Sequence[Line]
    unit: Unit = "number"
    marks: Sequence[int] = ()
    marks_label: str = "update steps"
    last_step: int | None = None
    subtitle: str = ""

    @property
    def steps(self) -> tuple[float, float]:
        """The ends of the axis of steps."""
        first = min(float(line.series.steps[0]) for line in self.lines)
        last = max(float(line.series.steps[-1]) for line in self.lines)
        last = max(last, self.last_step or 0)
        # A single step needs an axis of some width to lie on.
        return (first, last) if last > first else (first - 0.5, last + 0.5)

    @property
    def values(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        low = min(float(line.series.low.min()) for line in self.lines)
        return low, max(float(line.series.high.max()) for line in self.lines)

    @property
    def axis(self) -> tuple[float, float]:
        """The ends of the axis of values: from 0 for percentages, up to 100% where they come near it."""
        low, high = self.values
        if self.unit == "percent":
            return 0.0, 1.0 if high >= 0.5 else max(high * 1.15, 0.01)
        if self.is_logarithmic:
            return low / 1.1, high * 1.1
        # A constant curve has no height of its own, and one of zeros no size either.
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        return low - room, high + room

    @property
    def is_logarithmic(self) -> bool:
        """Whether the values spread so far that a linear axis would hide most of them."""
        # By the means, or one spike in a thinned curve would flatten all the others.
        low = min(float(line.series.mean.min()) for line in self.lines)
        high = max(float(line.series.mean.max()) for line in self.lines)
        return self.unit == "number" and self.values[0] > 0 and high / low >= 100


@dataclass(frozen=True)
class HeatMap:
    """A matrix of numbers in colour.

    Args:
        key: short name, used for file names and anchors.
        title: what it shows.
        rows: a label each.
        columns: a label each.
        values: [rows, columns]; NaN where there is none.
        row_title: what rows are.
        column_title: what columns are.
        unit: of the values.
        low: the value without colour; values below it look the same.
        subtitle: a line below the title.
    """

    key: str
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    row_title: str = "parameter"
    column_title: str = "step"
    unit: Unit = "percent"
    low: float = 0.0
    subtitle: str = ""

    @property
    def high(self) -> float:
        """The value with full colour."""
        found = self.values[np.isfinite(self.values)]
        # Never `low` itself, by whose distance the colours are divided.
        return max(float(found.max()), self.low + 1e-9) if found.size else self.low + 1.0


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Args:
        columns: headings.
        rows: as many cells as headings each.
        numeric: which columns are numbers, for alignment and sorting.
        caption: what it shows.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Args:
        key: its anchor.
        title: its heading.
        text: paragraphs.
        charts: in order.
        tables: in order, after the charts.
        missing: what is not there, and what to turn on for it.
        source: text that is shown as it is.
    """

    key: str
    title: str
    text: Sequence[str] = ()
    charts: Sequence[LineChart | HeatMap] = ()
    tables: Sequence[Table] = ()
    missing: Sequence[str] = ()
    source: str = ""
