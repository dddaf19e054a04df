"""Line charts, drawn with Pillow: loss and IoU while training, figures against a setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unet_rt.pictures import COLOURS, save

from .trainer import Progress

PANEL_PX = (560, 360)
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 44


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


def training_curves(history: Sequence[Progress], path: Path) -> None:
    """Loss and validation IoU against the step, the best one marked; a PNG."""
    best = max(history, key=lambda p: p.iou)
    panels = [
        Panel(
            "training loss (weighted cross entropy)", "step", {"loss": [(p.step, p.loss) for p in history]}, None, True
        ),
        Panel(
            "validation IoU",
            "step",
            {"IoU": [(p.step, p.iou) for p in history]},
            {f"best {best.iou:.4f}": (best.step, best.iou)},
        ),
    ]
    chart(panels, path)


def chart(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side as PNG; whole or not at all."""
    from PIL import Image, ImageDraw

    width, height = PANEL_PX
    sheet = Image.new("RGB", (width * len(panels), height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, panel in enumerate(panels):
        _draw(pen, panel, k * width)
    save(np.asarray(sheet), path)


def _draw(pen: Any, panel: Panel, left: int) -> None:
    width, height = PANEL_PX
    points = [q for line in panel.series.values() for q in line if math.isfinite(q[1])]
    pen.text((left + LEFT, 8), panel.title, fill="black")
    pen.text((left + width // 2 - 3 * len(panel.x_label), height - 18), panel.x_label, fill="black")
    if not points:
        return
    log = panel.log_y and all(y > 0 for _, y in points)
    xs = _span([x for x, _ in points])
    ys = _span([math.log10(y) if log else y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if log else y
        return (
            left + LEFT + (x - xs[0]) / (xs[1] - xs[0]) * (width - LEFT - RIGHT),
            height - BOTTOM - (y - ys[0]) / (ys[1] - ys[0]) * (height - TOP - BOTTOM),
        )

    frame = (left + LEFT, TOP, left + width - RIGHT, height - BOTTOM)
    for value in _ticks(*ys):
        shown = 10**value if log else value
        _, y = place(xs[0], shown)
        pen.line((frame[0], y, frame[2], y), fill=(225, 225, 225))
        text = f"{shown:.3g}"
        pen.text((frame[0] - 6 - 6 * len(text), y - 6), text, fill="black")
    for value in _ticks(*xs):
        x, _ = place(value, 10 ** ys[0] if log else ys[0])
        pen.line((x, frame[3], x, frame[3] + 4), fill="black")
        text = f"{value:g}"
        pen.text((x - 3 * len(text), frame[3] + 7), text, fill="black")
    pen.rectangle(frame, outline="black")
    for k, (name, line) in enumerate(panel.series.items()):
        colour = tuple(int(c) for c in COLOURS[1:][(k + 4) % (len(COLOURS) - 1)])
        where = [place(x, y) for x, y in line if math.isfinite(y)]
        if len(where) > 1:
            pen.line(where, fill=colour, width=2)
        for x, y in where if len(where) < 30 else ():
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        if len(panel.series) > 1:
            pen.text((frame[2] - 8 - 6 * len(name), frame[3] - 16 * (len(panel.series) - k)), name, fill=colour)
    for name, (px, py) in (panel.marks or {}).items():
        x, y = place(px, py)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), outline="black", width=2)
        pen.text((min(x + 8, frame[2] - 6 * len(name) - 4), min(y + 8, frame[3] - 14)), name, fill="black")


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
