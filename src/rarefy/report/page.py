"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files

import numpy as np

from rarefy.report.chart import HeatMap, Line, LineChart, Section, Table
from rarefy.report.scale import readable
from rarefy.report.svg import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    HeatFrame,
    heat_map,
    line_chart,
)

MOST_TABLE_ROWS = 40
MOST_TABLE_COLUMNS = 12
# Names and configuration may be a stranger's; whatever gets onto the page can load and send nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(
    title: str, headlines: Iterable[tuple[str, str]], sections: Sequence[Section], foot: str = ""
) -> str:
    """A whole page.

    Args:
        title: its heading.
        headlines: the figures that matter most: name, value.
        sections: in order.
        foot: the last line.

    Example:
        >>> text = page("a run", [("step", "10")], [Section("loss", "Loss", missing=["Nothing was logged."])])
        >>> "://" in text, "Nothing was logged." in text
        (False, True)
    """
    links = "".join(f'<a href="#{one.key}">{escape(one.title)}</a>' for one in sections)
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in headlines
    )
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title><style>{_resource('report.css')}</style></head><body>",
            f"<header><h1>{escape(title)}</h1><dl class='tiles'>{tiles}</dl><nav>{links}</nav></header><main>",
            *map(_section, sections),
            f"</main><footer>{escape(foot)}</footer><div id='tip' hidden></div>",
            f"<script>{_resource('report.js')}</script></body></html>",
        ]
    )


def _resource(name: str) -> str:
    return files("rarefy.report").joinpath(name).read_text(encoding="utf-8")


def _section(section: Section) -> str:
    parts = [f'<section id="{section.key}" aria-labelledby="h-{section.key}">']
    parts.append(f'<h2 id="h-{section.key}">{escape(section.title)}</h2>')
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    parts += [_figure(chart) for chart in section.charts]
    parts += [
        f'<div class="wide">{_table(table, sortable=len(table.rows) > 1)}</div>' for table in section.tables
    ]
    parts += [f'<p class="missing">{_with_code(text)}</p>' for text in section.missing]
    if section.source:
        parts.append(
            f"<details><summary>Configuration</summary><pre>{escape(section.source)}</pre></details>"
        )
    return "\n".join([*parts, "</section>"])


def _with_code(text: str) -> str:
    """Text whose parts in back quotes are code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _figure(chart: LineChart | HeatMap) -> str:
    told = describe(chart)
    is_lines = isinstance(chart, LineChart)
    drawing = line_chart(chart, told) if is_lines else heat_map(chart, told)
    legend = _legend(chart) if is_lines else _scale(chart)
    # A `</script>` in a name would end the element, hence the replacement of `<` below.
    data = json.dumps(_line_data(chart) if is_lines else _heat_data(chart), separators=(",", ":"))
    subtitle = f"<small>{escape(chart.subtitle)}</small>" if chart.subtitle else ""
    return (
        f'<figure class="{"lines" if is_lines else "heat"}"><figcaption>{escape(chart.title)}{subtitle}</figcaption>'
        f'{legend}{drawing}<script type="application/json">{data.replace("<", "&lt;")}</script>'
        f"<details><summary>As a table</summary><div class='wide'>{_table(table_of(chart))}</div></details></figure>"
    )


def describe(chart: LineChart | HeatMap) -> str:
    """A chart in one sentence."""
    if isinstance(chart, LineChart):
        facts = [
            f"{line.label}: {readable(float(line.series.mean[0]), chart.unit)} at step {line.series.steps[0]:,.0f}, "
            f"{readable(line.series.last, chart.unit)} at step {line.series.steps[-1]:,.0f}"
            for line in chart.lines
        ]
        return "; ".join(facts)
    found = chart.values[np.isfinite(chart.values)]
    low, high = (readable(float(value), chart.unit) for value in (found.min(), found.max()))
    return f"{len(chart.rows)} rows ({chart.row_title}), {len(chart.columns)} columns, from {low} to {high}"


def _legend(chart: LineChart) -> str:
    entries = [
        f'<span class="key c{i % COLOURS}{" dashed" if line.dashed else ""}"></span>{escape(line.label)}'
        for i, line in enumerate(chart.lines)
    ]
    if any(line.series.is_thinned for line in chart.lines):
        entries.append("<span class='key shade'></span>range of the values behind a point")
    if chart.marks:
        entries.append(f"<span class='key tickmark'></span>{escape(chart.marks_label)}")
    return f"<p class='legend'>{''.join(f'<span>{entry}</span>' for entry in entries)}</p>"


def _scale(chart: HeatMap) -> str:
    ends = [escape(readable(value, chart.unit)) for value in (chart.low, chart.high)]
    return f"<p class='legend'><span>{ends[0]} <span class='ramp'></span> {ends[1]}</span></p>"


def _line_data(chart: LineChart) -> dict[str, object]:
    """What the page's script needs to name the point under the pointer."""
    first, last = chart.steps
    return {
        "frame": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "steps": [first, last],
        "lines": [
            {
                "label": line.label,
                "x": line.series.steps.tolist(),
                "y": _texts(line, chart),
                "held": line.style == "steps",
            }
            for line in chart.lines
        ],
    }


def _texts(line: Line, chart: LineChart) -> list[str]:
    return [readable(value, chart.unit) for value in line.series.mean.tolist()]


def _heat_data(chart: HeatMap) -> dict[str, object]:
    frame = HeatFrame.of(chart)
    # JSON has no NaN.
    rounded = np.where(np.isfinite(chart.values), np.round(chart.values, 4), -1.0).tolist()
    area = [round(frame.left), WIDTH - RIGHT, TOP, TOP + frame.cell_height * frame.rows]
    names = {"rows": list(chart.rows), "columns": list(chart.columns), "columnTitle": chart.column_title}
    return {"frame": area, **names, "values": rounded, "percent": chart.unit == "percent"}


def table_of(chart: LineChart | HeatMap) -> Table:
    """Some of a chart's numbers, for those who cannot use the drawing."""
    if isinstance(chart, LineChart):
        steps = np.unique(np.concatenate([line.series.steps for line in chart.lines]))
        chosen = steps[_spread(len(steps), MOST_TABLE_ROWS)]
        rows = [
            (f"{step:,.0f}", *(_at(line, step, chart) for line in chart.lines)) for step in chosen.tolist()
        ]
        columns = ("step", *(line.label for line in chart.lines))
        return Table(columns, rows, frozenset(range(len(columns))))
    columns = _spread(len(chart.columns), MOST_TABLE_COLUMNS)
    rows = [(name, *(_cell(chart, row, column) for column in columns)) for row, name in enumerate(chart.rows)]
    names = (chart.row_title, *(f"{chart.column_title} {chart.columns[column]}" for column in columns))
    return Table(names, rows, frozenset(range(1, len(names))))


def _spread(count: int, most: int) -> list[int]:
    """Indices from the first to the last, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _at(line: Line, step: float, chart: LineChart) -> str:
    """The value at a step; of a staircase the one in force, else that of a point right there."""
    steps = line.series.steps
    place = int(np.searchsorted(steps, step, side="right")) - 1
    is_there = place >= 0 and (line.style == "steps" or steps[place] == step)
    return readable(float(line.series.mean[place]), chart.unit) if is_there else ""


def _cell(chart: HeatMap, row: int, column: int) -> str:
    value = float(chart.values[row, column])
    return readable(value, chart.unit) if np.isfinite(value) else ""


def _table(table: Table, sortable: bool = False) -> str:
    kinds = ["num" if index in table.numeric else "txt" for index in range(len(table.columns))]
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    head = "".join(
        f'<th scope="col" class="{kind}">{_heading(name, sortable)}</th>'
        for name, kind in zip(table.columns, kinds, strict=True)
    )
    top = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
    return f"<table>{caption}{top}<tbody>{''.join(_rows(table, kinds))}</tbody></table>"


def _heading(name: str, sortable: bool) -> str:
    return f'<button type="button">{escape(name)}</button>' if sortable and name else escape(name)


def _rows(table: Table, kinds: Sequence[str]) -> Iterator[str]:
    for row in table.rows:
        cells = (f'<td class="{kind}">{escape(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))
        yield f"<tr>{''.join(cells)}</tr>"
