"""Charts as inline SVG; colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from rarefy.report.chart import HeatMap, Line, LineChart
from rarefy.report.scale import log_ticks, readable, ticks

WIDTH = 880
HEIGHT = 300
LEFT = 64
RIGHT = 16
TOP = 12
BOTTOM = 40
MOST_MARKS = 300
# As many as the style sheet has: .c0 to .c7.
COLOURS = 8
MOST_CELLS_APART = 48
LABELS_WIDTH = 330
# The mean width of a letter of the style sheet's font; SVG cannot be asked how wide a text is.
LETTER = 6.1
HEAT_COLOUR = (36, 99, 168)


@dataclass(frozen=True)
class Frame:
    """Where the numbers of a line chart lie on the drawing."""

    steps: tuple[float, float]
    axis: tuple[float, float]
    is_logarithmic: bool

    @classmethod
    def of(cls, chart: LineChart) -> Frame:
        """The frame that holds all of a chart."""
        return cls(chart.steps, chart.axis, chart.is_logarithmic)

    def x(self, step: float) -> float:
        """Where a step lies."""
        first, last = self.steps
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Where a value lies."""
        low, high = self.axis
        if self.is_logarithmic:
            low = math.log(low)
            high = math.log(high)
            # A loss of exactly zero has no logarithm.
            value = math.log(max(value, 1e-300))
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    @property
    def value_ticks(self) -> list[float]:
        """Round values within the axis."""
        found = log_ticks(*self.axis) if self.is_logarithmic else []
        return found if len(found) > 1 else ticks(*self.axis, 5)


def line_chart(chart: LineChart, description: str) -> str:
    """A line chart.

    Args:
        chart: what to draw.
        description: the same in words, for those who do not see it.
    """
    frame = Frame.of(chart)
    parts = [*_grid(frame, chart), *_marks(frame, chart.marks)]
    for number, line in enumerate(chart.lines):
        parts += _line(frame, line, f"c{number % COLOURS}")
    return _svg(chart.key, chart.title, description, HEIGHT, parts)


def _svg(key: str, title: str, description: str, height: float, parts: Sequence[str]) -> str:
    name = escape(f"{title}. {description}", quote=True)
    head = f'<svg id="svg-{key}" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}">'
    return f"{head}<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"


def _grid(frame: Frame, chart: LineChart) -> Iterator[str]:
    foot = HEIGHT - BOTTOM
    for value in frame.value_ticks:
        y = frame.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        label = readable(value, chart.unit)
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for step in ticks(*frame.steps, 9):
        if step == int(step):
            x = frame.x(step)
            yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{foot}" y2="{foot + 4}"/>'
            yield f'<text class="tick" x="{x:.1f}" y="{foot + 18}" text-anchor="middle">{readable(step)}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{foot}" y2="{foot}"/>'
    yield f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'


def _marks(frame: Frame, steps: Sequence[int]) -> Iterator[str]:
    foot = HEIGHT - BOTTOM
    stride = max(1, len(steps) // MOST_MARKS)
    path = "".join(f"M{frame.x(step):.1f} {foot}v-8" for step in steps[::stride])
    if path:
        yield f'<path class="mark" d="{path}"/>'


def _line(frame: Frame, line: Line, colour: str) -> Iterator[str]:
    series = line.series
    points = [(frame.x(x), frame.y(y)) for x, y in zip(series.steps, series.mean, strict=True)]
    # A path through one point draws nothing.
    if line.style == "points" or len(points) == 1:
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
        yield f'<g class="dots {colour}">{dots}</g>'
        return
    if series.is_thinned:
        above = [(x, frame.y(y)) for (x, _), y in zip(points, series.high, strict=True)]
        below = [(x, frame.y(y)) for (x, _), y in zip(points, series.low, strict=True)]
        yield f'<path class="band {colour}" d="{_path([*above, *reversed(below)])}Z"/>'
    if line.style == "steps":
        corners = [corner for a, b in pairwise(points) for corner in ((b[0], a[1]), b)]
        points = [points[0], *corners]
    dashed = " dashed" if line.dashed else ""
    yield f'<path class="line {colour}{dashed}" d="{_path(points)}"/>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


# ---- heat maps ----


@dataclass(frozen=True)
class HeatFrame:
    """Where the cells of a heat map lie on the drawing."""

    left: float
    cell_height: float
    rows: int

    @classmethod
    def of(cls, chart: HeatMap) -> HeatFrame:
        """Rows as high as many of them allow, labels as wide as they need."""
        count = len(chart.rows)
        height = 18 if count <= 40 else 13 if count <= 120 else 5
        longest = max(len(_short(label)) for label in chart.rows)
        return cls(min(LABELS_WIDTH, 16 + LETTER * longest), height, count)

    @property
    def height(self) -> float:
        """Of the whole drawing."""
        return TOP + self.cell_height * self.rows + BOTTOM


def heat_map(chart: HeatMap, description: str) -> str:
    """A heat map; its cells are one embedded picture, so that many of them stay cheap.

    Args:
        chart: what to draw.
        description: the same in words, for those who do not see it.
    """
    frame = HeatFrame.of(chart)
    width = WIDTH - RIGHT - frame.left
    height = frame.cell_height * frame.rows
    picture = (
        f'<image x="{frame.left:.0f}" y="{TOP}" width="{width:.0f}" height="{height:.0f}" '
        f'preserveAspectRatio="none" href="{picture_of(chart)}"/>'
    )
    border = f'<rect class="frame" x="{frame.left:.0f}" y="{TOP}" width="{width:.0f}" height="{height:.0f}"/>'
    parts = [picture, _gaps(frame, chart), border, *_heat_labels(frame, chart)]
    return _svg(chart.key, chart.title, description, frame.height, parts)


def _gaps(frame: HeatFrame, chart: HeatMap) -> str:
    """Lines between the cells, where these are few enough."""
    columns = len(chart.columns)
    right = WIDTH - RIGHT
    foot = TOP + frame.cell_height * frame.rows
    if columns > MOST_CELLS_APART or frame.cell_height < 10:
        return ""
    width = (right - frame.left) / columns
    upright = (f"M{frame.left + column * width:.1f} {TOP}V{foot:.1f}" for column in range(1, columns))
    level = (f"M{frame.left:.1f} {TOP + row * frame.cell_height:.1f}H{right}" for row in range(1, frame.rows))
    return f'<path class="gap" d="{"".join((*upright, *level))}"/>'


def _heat_labels(frame: HeatFrame, chart: HeatMap) -> Iterator[str]:
    stride = max(1, math.ceil(13 / frame.cell_height))
    for row in range(0, frame.rows, stride):
        y = TOP + (row + 0.5) * frame.cell_height + 4
        label = escape(_short(chart.rows[row]))
        yield f'<text class="row" x="{frame.left - 8:.0f}" y="{y:.1f}" text-anchor="end">{label}</text>'
    width = (WIDTH - RIGHT - frame.left) / len(chart.columns)
    foot = TOP + frame.rows * frame.cell_height
    stride = max(1, math.ceil(len(chart.columns) / 10))
    for column in range(0, len(chart.columns), stride):
        x = frame.left + (column + 0.5) * width
        label = escape(chart.columns[column])
        yield f'<text class="tick" x="{x:.1f}" y="{foot + 16:.0f}" text-anchor="middle">{label}</text>'
    middle = (frame.left + WIDTH - RIGHT) / 2
    yield f'<text class="tick" x="{middle:.0f}" y="{foot + 34:.0f}" text-anchor="middle">{chart.column_title}</text>'


def _short(label: str, most: int = 51) -> str:
    # Names of parameters differ at their ends.
    return label if len(label) <= most else "…" + label[-most + 1 :]


def picture_of(chart: HeatMap) -> str:
    """The cells as a PNG data URI of one pixel each; the more colour, the higher the value, none where missing.

    Example:
        >>> one = HeatMap("k", "t", ["a"], ["1"], np.ones((1, 1)))
        >>> picture_of(one)[:22]
        'data:image/png;base64,'
    """
    values = chart.values
    share = np.clip((np.nan_to_num(values) - chart.low) / (chart.high - chart.low), 0, 1)
    pixels = np.empty((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = HEAT_COLOUR
    # A little colour even at 0, to tell it from what is missing.
    pixels[..., 3] = np.where(np.isfinite(values), 14 + 241 * share, 0).round()
    return "data:image/png;base64," + base64.b64encode(png_bytes(pixels)).decode()


def png_bytes(pixels: np.ndarray) -> bytes:
    """A PNG file.

    Args:
        pixels: [height, width, 4], bytes: red, green, blue, opacity.

    Example:
        >>> png_bytes(np.zeros((1, 1, 4), dtype=np.uint8))[1:4]
        b'PNG'
    """
    height, width = pixels.shape[:2]
    # PNG wants the kind of filter in front of each row; 0 is none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    # Eight bits a channel, colour type 6 (red, green, blue, opacity), nothing interlaced.
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
