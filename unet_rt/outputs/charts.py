"""Charts, drawn with Pillow: figures against a setting or against time, and points that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .pictures import COLOURS, save

PANEL_PX = (560, 360)
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 44
ROW_PX = 22  # of the names below a chart


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title, x_label: Its texts.
        series: Name -> points (x, y), in order of x; one point is a mark.
        marks: Name -> one point that stands out.
        log_y: Logarithmic ordinate, where all values are above 0.
    """

    title: str
    x_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    marks: Mapping[str, tuple[float, float]] | None = None
    log_y: bool = False


def chart(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side as PNG; whole or not at all."""
    from PIL import Image, ImageDraw

    width, height = PANEL_PX
    sheet = Image.new("RGB", (width * len(panels), height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, panel in enumerate(panels):
        _draw(pen, panel, k * width)
    save(np.asarray(sheet), path)


def scatter(title: str, x_label: str, points: Sequence[tuple[str, float, float]], path: Path) -> None:
    """Points (name, x, y) in one chart, each named below it in its colour, as PNG; whole or not at all.

    Those that are not finite have no place in the chart and are named alone.
    """
    from PIL import Image, ImageDraw

    width, height = PANEL_PX
    sheet = Image.new("RGB", (width, height + ROW_PX * len(points) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    drawn = [(x, y) for _, x, y in points if math.isfinite(x) and math.isfinite(y)]
    place = _frame(pen, title, x_label, [x for x, _ in drawn], [y for _, y in drawn])
    for k, (name, x, y) in enumerate(points):
        colour, row = _colour(k), height + ROW_PX * k + ROW_PX // 2
        for px, py in (*([place(x, y)] if (x, y) in drawn else ()), (LEFT, row)):
            # equal points show as rings, the first one innermost
            r = 4 + k
            pen.ellipse((px - r, py - r, px + r, py + r), outline=colour, width=2)
        pen.text((LEFT + len(points) + 14, row - 6), f"{name}: {x:.3g}, {y:.6g}", fill="black")
    save(np.asarray(sheet), path)


def _draw(pen: Any, panel: Panel, left: int) -> None:
    width, height = PANEL_PX
    points = [q for line in panel.series.values() for q in line if math.isfinite(q[1])]
    log = panel.log_y and all(y > 0 for _, y in points)
    place = _frame(pen, panel.title, panel.x_label, [x for x, _ in points], [y for _, y in points], left, log)
    right, bottom = left + width - RIGHT, height - BOTTOM
    for k, (name, line) in enumerate(panel.series.items()):
        colour = _colour(k)
        where = [place(x, y) for x, y in line if math.isfinite(y)]
        if len(where) > 1:
            pen.line(where, fill=colour, width=2)
        for x, y in where if len(where) < 30 else ():
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        if len(panel.series) > 1:
            pen.text((right - 8 - 6 * len(name), bottom - 16 * (len(panel.series) - k)), name, fill=colour)
    for name, (px, py) in (panel.marks or {}).items():
        x, y = place(px, py)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), outline="black", width=2)
        pen.text((min(x + 8, right - 6 * len(name) - 4), min(y + 8, bottom - 14)), name, fill="black")


def _colour(k: int) -> tuple[int, ...]:
    return tuple(int(c) for c in COLOURS[1:][(k + 4) % (len(COLOURS) - 1)])


def _frame(
    pen: Any,
    title: str,
    x_label: str,
    across: Sequence[float],
    up: Sequence[float],
    left: int = 0,
    log: bool = False,
) -> Callable[[float, float], tuple[float, float]]:
    """Title, frame, grid and numbers of one chart; returns where a point lies on the sheet."""
    width, height = PANEL_PX
    pen.text((left + LEFT, 8), title, fill="black")
    pen.text((left + width // 2 - 3 * len(x_label), height - 18), x_label, fill="black")
    xs = _span(across or [0.0])
    ys = _span([math.log10(y) for y in up] if log else up or [0.0])

    def place(x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if log else y
        return (
            left + LEFT + (x - xs[0]) / (xs[1] - xs[0]) * (width - LEFT - RIGHT),
            height - BOTTOM - (y - ys[0]) / (ys[1] - ys[0]) * (height - TOP - BOTTOM),
        )

    frame = (left + LEFT, TOP, left + width - RIGHT, height - BOTTOM)
    if not up:
        return place
    for value in _ticks(*ys):
        shown = 10**value if log else value
        _, y = place(xs[0], shown)
        pen.line((frame[0], y, frame[2], y), fill=(225, 225, 225))
        text = f"{shown:.3g}" if log else f"{shown:g}"
        pen.text((frame[0] - 6 - 6 * len(text), y - 6), text, fill="black")
    for value in _ticks(*xs):
        x, _ = place(value, 10 ** ys[0] if log else ys[0])
        pen.line((x, frame[3], x, frame[3] + 4), fill="black")
        text = f"{value:g}"
        pen.text((x - 3 * len(text), frame[3] + 7), text, fill="black")
    pen.rectangle(frame, outline="black")
    return place


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest with a little room; never empty."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or max(abs(high), 1.0) * 0.05
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]
