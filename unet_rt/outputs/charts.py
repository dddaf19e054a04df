"""Charts: figures against a setting or against time, and points that are compared, as PNG or as SVG.

A chart is laid out once, as shapes on a :class:`Sheet`. SVG is their text, so that the same figures make the same file and
nothing but Python is needed; PNG is drawn with Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

# Okabe & Ito (2008): told apart by colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
GRID, TEXT_PX = "#dddddd", 13
SIZE = (640, 360)
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 44, 48
NAMES_PX = 156  # beside a chart of several lines
ROW_PX = 22  # of a name below a chart
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}  # of texts, as Pillow names them
Point = tuple[float, float]
Place = Callable[[float, float], Point]


@dataclass(frozen=True)
class Line:
    """Points joined by a line."""

    points: Sequence[Point]
    colour: str = "black"
    width: float = 1


@dataclass(frozen=True)
class Box:
    """A rectangle: its corner, width and height in px, filled with a colour or outlined in black."""

    corner: Point
    size: Point
    fill: str = "none"


@dataclass(frozen=True)
class Ring:
    """A circle: filled where it is a point, outlined where others may lie below it."""

    middle: Point
    radius: float
    colour: str
    filled: bool = True


@dataclass(frozen=True)
class Text:
    """A text whose baseline is at a point: its ``start``, ``middle`` or ``end``."""

    at: Point
    text: str
    anchor: str = "start"
    colour: str = "black"
    title: bool = False


@dataclass
class Sheet:
    """A white sheet of so many px, and the shapes on it in the order in which they are drawn."""

    size: tuple[float, float]
    shapes: list[Line | Box | Ring | Text] = field(default_factory=list)

    def add(self, *shapes: Line | Box | Ring | Text) -> None:
        self.shapes += shapes

    def svg(self) -> str:
        """The sheet as SVG."""
        width, height = self.size
        font = f'font-family="sans-serif" font-size="{TEXT_PX}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {font}>'
        ground = f'<rect width="{width}" height="{height}" fill="white"/>'
        return "\n".join([head, ground, *map(_svg, self.shapes), "</svg>"]) + "\n"

    def save(self, path: Path) -> None:
        """Writes the sheet as PNG; whole or not at all."""
        import numpy as np
        from PIL import Image, ImageDraw

        from .pictures import save

        image = Image.new("RGB", (math.ceil(self.size[0]), math.ceil(self.size[1])), "white")
        pen = ImageDraw.Draw(image)
        for shape in self.shapes:
            _draw(pen, shape)
        save(np.asarray(image), path)


def _svg(shape: Line | Box | Ring | Text) -> str:
    match shape:
        case Line(points, colour, width):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
        case Box((x, y), (width, height), fill):
            stroke = ' stroke="black"' if fill == "none" else ""
            return f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" fill="{fill}"{stroke}/>'
        case Ring((x, y), radius, colour, filled):
            how = f'fill="{colour}"' if filled else f'fill="none" stroke="{colour}" stroke-width="2"'
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {how}/>'
        case Text((x, y), text, anchor, colour, title):
            weight = ' font-size="15" font-weight="bold"' if title else ""
            return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'


def _draw(pen: Any, shape: Line | Box | Ring | Text) -> None:
    match shape:
        case Line(points, colour, width):
            pen.line(list(points), fill=colour, width=round(width))
        case Box((x, y), (width, height), fill):
            fills = {"outline": "black"} if fill == "none" else {"fill": fill}
            pen.rectangle((x, y, x + width, y + height), **fills)
        case Ring((x, y), r, colour, filled):
            fills = {"fill": colour} if filled else {"outline": colour}
            pen.ellipse((x - r, y - r, x + r, y + r), width=2, **fills)
        case Text(at, text, anchor, colour, title):
            pen.text(at, text, fill=colour, anchor=ANCHORS[anchor], font_size=15 if title else TEXT_PX)


# --- charts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """What a chart's axes are: their texts, which are logarithmic (to base 2), whether the ordinate begins at 0.

    ``most`` is where the ordinate ends, of values that cannot be larger, such as shares.
    """

    title: str
    x_label: str
    log_x: bool = False
    log_y: bool = False
    zero: bool = False
    most: float | None = None


def lines(axes: Axes, series: Mapping[str, Sequence[Point]], marks: Mapping[str, Point] | None = None) -> Sheet:
    """Lines over one abscissa: name -> points (x, y) in order of x; ``marks`` are points that stand out, by name.

    Points that are not finite are left out. An ordinate is logarithmic only where all values are above 0.
    """
    finite = {name: [p for p in line if math.isfinite(p[1])] for name, line in series.items()}
    points = [p for line in finite.values() for p in line]
    sheet = Sheet(SIZE)
    axes = replace(axes, log_y=axes.log_y and all(y > 0 for _, y in points))
    values = sorted({x for x, _ in points})
    place = _frame(sheet, axes, points, RIGHT + NAMES_PX * (len(series) > 1), values if len(values) <= 12 else ())
    for k, (name, line) in enumerate(finite.items()):
        colour, where = COLOURS[k % len(COLOURS)], [place(*p) for p in line]
        if len(where) > 1:
            sheet.add(Line(where, colour, 2))
        sheet.add(*(Ring(p, 3.5, colour) for p in (where if len(where) < 30 else ())))
        if len(series) > 1:
            sheet.add(Text((SIZE[0] - NAMES_PX - RIGHT + 10, TOP + 20 * k + 12), name, colour=colour))
    for name, point in (marks or {}).items():
        x, y = place(*point)
        right = x > SIZE[0] / 2
        sheet.add(Ring((x, y), 5, "black", filled=False))
        sheet.add(Text((x - 9 if right else x + 9, y + 18), name, "end" if right else "start"))
    return sheet


def scatter(axes: Axes, points: Sequence[tuple[str, float, float]]) -> Sheet:
    """Points (name, x, y) in one chart, each named below it in its colour.

    Those that are not finite have no place in the chart and are named alone.
    """
    sheet = Sheet((SIZE[0], SIZE[1] + ROW_PX * len(points) + 8))
    drawn = [(x, y) for _, x, y in points if math.isfinite(x) and math.isfinite(y)]
    place = _frame(sheet, axes, drawn, RIGHT)
    for k, (name, x, y) in enumerate(points):
        colour, row = COLOURS[k % len(COLOURS)], SIZE[1] + ROW_PX * k + ROW_PX // 2
        # equal points show as rings, the first one innermost
        places = [*([place(x, y)] if (x, y) in drawn else ()), (LEFT, row)]
        sheet.add(*(Ring(p, 4 + k, colour, filled=False) for p in places))
        sheet.add(Text((LEFT + len(points) + 14, row + 5), f"{name}: {x:.3g}, {y:.6g}"))
    return sheet


def beside(sheets: Sequence[Sheet]) -> Sheet:
    """Sheets side by side as one."""
    whole = Sheet((sum(s.size[0] for s in sheets), max(s.size[1] for s in sheets)))
    left = 0.0
    for sheet in sheets:
        whole.add(*(_shifted(shape, left) for shape in sheet.shapes))
        left += sheet.size[0]
    return whole


def _shifted(shape: Line | Box | Ring | Text, by: float) -> Line | Box | Ring | Text:
    match shape:
        case Line():
            return replace(shape, points=[(x + by, y) for x, y in shape.points])
        case Box():
            return replace(shape, corner=(shape.corner[0] + by, shape.corner[1]))
        case Ring():
            return replace(shape, middle=(shape.middle[0] + by, shape.middle[1]))
        case Text():
            return replace(shape, at=(shape.at[0] + by, shape.at[1]))


def _frame(sheet: Sheet, axes: Axes, points: Sequence[Point], right: float, at: Sequence[float] = ()) -> Place:
    """Title, frame, grid and numbers of one chart, the abscissa's ``at`` these values or round ones; returns where a
    point lies on the sheet."""
    across, up = SIZE[0] - LEFT - right, SIZE[1] - TOP - BOTTOM
    x_low, x_high = _span([x for x, _ in points], log=axes.log_x)
    y_low, y_high = _span([y for _, y in points] + [0.0] * axes.zero, log=axes.log_y)
    y_high = y_high if axes.most is None else axes.most

    def place(x: float, y: float) -> Point:
        x, y = math.log2(x) if axes.log_x else x, math.log2(y) if axes.log_y else y
        return LEFT + (x - x_low) / (x_high - x_low) * across, TOP + (y_high - y) / (y_high - y_low) * up

    bottom = TOP + up
    sheet.add(Text((12, 24), axes.title, title=True))
    sheet.add(Text((LEFT + across / 2, SIZE[1] - 8), axes.x_label, "middle"))
    left, lowest = 2**x_low if axes.log_x else x_low, 2**y_low if axes.log_y else y_low
    if not points:
        return place
    for value in _numbers(y_low, y_high, log=axes.log_y):
        _, y = place(left, value)
        sheet.add(Line([(LEFT, y), (LEFT + across, y)], GRID), Text((LEFT - 6, y + 4), f"{value:.4g}", "end"))
    for value in at or _numbers(x_low, x_high, log=axes.log_x):
        x, _ = place(value, lowest)
        sheet.add(Line([(x, bottom), (x, bottom + 4)]), Text((x, bottom + 18), f"{value:g}", "middle"))
    sheet.add(Box((LEFT, TOP), (across, up)))
    return place


def _span(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    """Lowest and highest with a little room, never empty; of logarithms where ``log``."""
    found = [math.log2(v) for v in values] if log else list(values)
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    room = 0.04 * (high - low) or max(abs(high), 1.0) * 0.05
    return low if low == 0 <= high else low - room, high + room


def _numbers(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers between; powers of two where the axis is logarithmic and holds two of them."""
    if not log:
        return ticks(low, high)
    first, last = math.ceil(low), math.floor(high)
    every = max(1, math.ceil((last - first) / 8))
    powers = [2.0**k for k in range(first, last + 1, every)]
    return powers if len(powers) > 1 else ticks(2**low, 2**high)


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]
