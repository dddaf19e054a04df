"""Plots of the benchmarks' own kinds: bars with their range, and what the stages of the pipeline did when."""

from __future__ import annotations

from collections.abc import Sequence

from unet_rt.outputs.charts import COLOURS, Box, Line, Sheet, Text, ticks

STAGES = ("read", "gather", "infer", "stitch", "write")
WIDE, TOP = 860, 44


def bars(title: str, rows: Sequence[tuple[str, float, float, float]], unit: str) -> Sheet:
    """Horizontal bars: (name, median, low, high), the whisker from fastest to slowest."""
    name_px, row_px = 330, 26
    most = max(high for *_, high in rows)
    scale = (WIDE - name_px - 90) / most
    sheet = Sheet((WIDE, TOP + row_px * len(rows) + 12))
    sheet.add(Text((12, 24), title, title=True))
    for k, (name, median, low, high) in enumerate(rows):
        y, colour = TOP + row_px * k, COLOURS[0] if name.startswith("unet-rt") else "#999999"
        middle = y + row_px / 2 - 3
        sheet.add(
            Text((name_px - 8, y + 15), name, "end"),
            Box((name_px, y), (scale * median, row_px - 6), colour),
            Line([(name_px + scale * low, middle), (name_px + scale * high, middle)]),
            Text((name_px + scale * high + 6, y + 15), f"{number(median)} {unit}"),
        )
    return sheet


def spans(title: str, recorded: Sequence[tuple[str, float, float]]) -> Sheet:
    """What each stage of the pipeline was doing when: (stage, start, stop) in seconds, a row per stage."""
    name_px, row_px = 150, 30
    begin, end = min(start for _, start, _ in recorded), max(stop for *_, stop in recorded)
    room, long = WIDE - name_px - 20, max(end - begin, 1e-9)
    stages = [stage for stage in STAGES if any(stage == s for s, *_ in recorded)]
    bottom = TOP + row_px * len(stages)
    sheet = Sheet((WIDE, bottom + 28))
    sheet.add(Text((12, 24), title, title=True))
    for k, stage in enumerate(stages):
        y, own = TOP + row_px * k, [(start - begin, stop - begin) for s, start, stop in recorded if s == stage]
        share = sum(stop - start for start, stop in own) / long
        sheet.add(Text((name_px - 8, y + 16), f"{stage} {share:.0%}", "end"))
        sheet.add(Box((name_px, y), (room, row_px - 8), "#eeeeee"))
        for start, stop in own:
            wide = max(room * (stop - start) / long, 0.3)
            sheet.add(Box((name_px + room * start / long, y), (wide, row_px - 8), COLOURS[k]))
    for value in ticks(0, long):
        x = name_px + room * value / long
        sheet.add(Line([(x, TOP), (x, bottom)], "#bbbbbb"), Text((x, bottom + 16), f"{value:g} s", "middle"))
    return sheet


def number(value: float, digits: int = 3) -> str:
    """``digits`` significant ones, thousands apart: 2,340, 12.3, 0.0457."""
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:#.{digits}g}".rstrip(".")
    return text if "e" not in text else f"{value:.{digits}f}"
