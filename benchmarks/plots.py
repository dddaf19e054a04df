"""Plots as SVG: bars, lines, spans of time. Text and nothing but Python, so that a rerun of the same figures is the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

# Okabe & Ito (2008): told apart by colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STAGES = ("read", "gather", "infer", "stitch", "write")
FONT = 'font-family="sans-serif" font-size="13"'
Point = tuple[float, float]


def number(value: float, digits: int = 3) -> str:
    """``digits`` significant ones, thousands apart: 2,340, 12.3, 0.0457."""
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:#.{digits}g}".rstrip(".")
    return text if "e" not in text else f"{value:.{digits}f}"


def _sheet(wide: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{height}" {FONT}>',
        f'<rect width="{wide}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def bars(title: str, rows: Sequence[tuple[str, float, float, float]], unit: str) -> str:
    """An SVG of horizontal bars: (name, median, low, high), the whisker from fastest to slowest."""
    wide, name_px, row_px, top = 860, 330, 26, 44
    room = wide - name_px - 90
    most = max(high for _, _, _, high in rows)
    height = top + row_px * len(rows) + 12

    def x(value: float) -> float:
        return name_px + room * value / most

    parts = []
    for k, (name, median, low, high) in enumerate(rows):
        y = top + row_px * k
        colour = COLOURS[0] if name.startswith("unet-rt") else "#999999"
        middle = y + row_px / 2 - 3
        parts += [
            f'<text x="{name_px - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{name_px}" y="{y}" width="{room * median / most:.1f}" height="{row_px - 6}" fill="{colour}"/>',
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}" stroke="black"/>',
            f'<text x="{x(high) + 6:.1f}" y="{y + 15}">{number(median)} {escape(unit)}</text>',
        ]
    return _sheet(wide, height, title, parts)


def spans(title: str, recorded: Sequence[tuple[str, float, float]]) -> str:
    """An SVG of what each stage of the pipeline was doing when: (stage, start, stop) in seconds, a line per stage."""
    wide, name_px, row_px, top = 860, 150, 30, 44
    begin, end = min(start for _, start, _ in recorded), max(stop for *_, stop in recorded)
    room, long = wide - name_px - 20, max(end - begin, 1e-9)
    stages = [stage for stage in STAGES if any(stage == s for s, *_ in recorded)]
    parts = []
    for k, stage in enumerate(stages):
        y = top + row_px * k
        own = [(start - begin, stop - begin) for s, start, stop in recorded if s == stage]
        share = sum(stop - start for start, stop in own) / long
        parts.append(f'<text x="{name_px - 8}" y="{y + 16}" text-anchor="end">{stage} {share:.0%}</text>')
        parts.append(f'<rect x="{name_px}" y="{y}" width="{room}" height="{row_px - 8}" fill="#eeeeee"/>')
        parts += [
            f'<rect x="{name_px + room * start / long:.2f}" y="{y}" width="{max(room * (stop - start) / long, 0.3):.2f}" '
            f'height="{row_px - 8}" fill="{COLOURS[k]}"/>'
            for start, stop in own
        ]
    bottom = top + row_px * len(stages)
    for value in ticks(0, long):
        x = name_px + room * value / long
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#bbbbbb"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g} s</text>')
    return _sheet(wide, bottom + 28, title, parts)


def lines(
    title: str, x_label: str, series: Mapping[str, Sequence[Point]], *, log: bool = False, zero: bool = True
) -> str:
    """An SVG of lines over one abscissa: name -> points (x, y).

    ``log``: both axes logarithmic, to base 2; else the ordinate begins at 0 unless ``zero`` says otherwise.
    """
    wide, height, left, right, top, bottom = 640, 360, 70, 180, 44, 48
    points = [p for line in series.values() for p in line]
    scale = math.log2 if log else float
    xs = sorted({scale(x) for x, _ in points})
    ys = [scale(y) for _, y in points] + ([0.0] if zero and not log else [])
    x_low, x_long = xs[0], (xs[-1] - xs[0]) or 1.0
    y_low, y_high = (math.floor(min(ys)), math.ceil(max(ys))) if log else (min(ys), max(ys) * 1.05)
    y_long = (y_high - y_low) or 1.0

    def place(x: float, y: float) -> Point:
        across = (scale(x) - x_low) / x_long * (wide - left - right)
        return left + across, height - bottom - (scale(y) - y_low) / y_long * (height - top - bottom)

    parts = [f'<text x="{(left + wide - right) / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>']
    every = max(1, math.ceil(y_long / 8))
    shown = [2.0**k for k in range(int(y_low), int(y_high) + 1, every)] if log else ticks(y_low, y_high)
    for value in shown:
        _, y = place(points[0][0], value)
        parts.append(f'<line x1="{left}" x2="{wide - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in sorted({x for x, _ in points}):
        x, _ = place(value, shown[0])
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{value:g}</text>')
    for k, (name, line) in enumerate(series.items()):
        where = [place(*p) for p in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[k]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLOURS[k]}"/>' for x, y in where]
        parts.append(f'<text x="{wide - right + 10}" y="{top + 20 * k + 12}" fill="{COLOURS[k]}">{escape(name)}</text>')
    return _sheet(wide, height, title, parts)


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]
