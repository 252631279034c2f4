"""Charts as PNG files, through matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rarefy.disk import writing
from rarefy.errors import RarefyError
from rarefy.report.chart import HeatMap, Line, LineChart
from rarefy.report.scale import readable

COLOURS = ("#2463a8", "#c4561a", "#2f7d4f", "#a8871c", "#b03a5b", "#4a8d9c", "#666666")
MARKS = "#8a4fa3"
WIDTH = 8.0
HEIGHT = 2.8
DOTS_PER_INCH = 120
# matplotlib's renderer refuses 2^16 pixels and more.
MOST_PIXELS = 60_000
MOST_RUGS = 300
MOST_LABELS = 40
MOST_SIDE = 30.0


def save_png(charts: Sequence[LineChart | HeatMap], path: Path, title: str = "") -> None:
    """Draws charts one below the other into one PNG file.

    Args:
        charts: at least one.
        path: the file; its folder is made when missing.
        title: above the first chart.

    Raises:
        RarefyError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _new_figure([_height(chart) for chart in charts])
    for axes, chart in zip(figure.axes, charts, strict=True):
        if isinstance(chart, LineChart):
            _draw_lines(axes, chart)
        else:
            _draw_heat(figure, axes, chart)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=min(DOTS_PER_INCH, MOST_PIXELS / figure.get_figheight()))


def _new_figure(heights: Sequence[float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RarefyError("PNG files need matplotlib; pip install 'rarefy[plot]'") from error
    # Without pyplot, which keeps every figure in a global list and may look for a display.
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    return figure


def _height(chart: LineChart | HeatMap) -> float:
    return HEIGHT if isinstance(chart, LineChart) else min(MOST_SIDE, 1.6 + 0.14 * len(chart.rows))


def _draw_lines(axes: Any, chart: LineChart) -> None:
    for line, colour in zip(chart.lines, _cycled(len(chart.lines)), strict=True):
        _draw_line(axes, line, colour)
    axes.set_xlim(*chart.steps)
    if chart.is_logarithmic:
        axes.set_yscale("log")
    axes.set_ylim(*chart.axis)
    # Ticks are sums, such as 0.30000000000000004.
    axes.yaxis.set_major_formatter(lambda value, _: readable(round(value, 9), chart.unit))
    rugs = np.asarray(chart.marks)[:: max(1, len(chart.marks) // MOST_RUGS)]
    if len(rugs):
        foot = axes.get_xaxis_transform()
        axes.vlines(rugs, 0, 0.06, color=MARKS, linewidth=1.0, transform=foot, label=chart.marks_label)
    _decorate(axes, chart)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(lambda value, _: readable(value))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")


def _draw_line(axes: Any, line: Line, colour: str) -> None:
    series = line.series
    options = {"color": colour, "label": line.label}
    if line.style == "points":
        axes.plot(series.steps, series.mean, "o", markersize=3, **options)
        return
    where = {"drawstyle": "steps-post"} if line.style == "steps" else {}
    axes.plot(series.steps, series.mean, "--" if line.dashed else "-", linewidth=1.4, **where, **options)
    if series.is_thinned:
        axes.fill_between(series.steps, series.low, series.high, color=colour, alpha=0.18, linewidth=0)


def _draw_heat(figure: Any, axes: Any, chart: HeatMap) -> None:
    values = np.ma.masked_invalid(chart.values)
    image = axes.imshow(
        values, aspect="auto", cmap="Blues", vmin=chart.low, vmax=chart.high, interpolation="nearest"
    )
    for set_ticks, labels in ((axes.set_yticks, chart.rows), (axes.set_xticks, chart.columns)):
        most = MOST_LABELS if labels is chart.rows else 10
        shown = range(0, len(labels), max(1, -(-len(labels) // most)))
        set_ticks(list(shown), [labels[index] for index in shown], fontsize=6)
    _decorate(axes, chart)
    axes.set_xlabel(chart.column_title)
    bar = figure.colorbar(image, ax=axes)
    bar.ax.yaxis.set_major_formatter(lambda value, _: readable(round(value, 9), chart.unit))


def _decorate(axes: Any, chart: LineChart | HeatMap) -> None:
    axes.set_title(chart.title, loc="left", fontsize=10)
    if chart.subtitle:
        axes.set_title(chart.subtitle, loc="right", fontsize=7, color="#555555")


def _cycled(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
