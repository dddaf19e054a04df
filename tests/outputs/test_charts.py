"""Charts: the same shapes as text and as pixels, whatever the figures are."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from unet_rt.outputs.charts import COLOURS, Axes, Sheet, beside, lines, scatter, ticks

SVG = "{http://www.w3.org/2000/svg}"


def texts(sheet: Sheet) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(sheet.svg()).iter(f"{SVG}text")]


def test_a_chart_is_the_same_as_text_and_as_pixels(tmp_path: Path) -> None:
    sheet = lines(Axes("IoU < 1", "step"), {"a": [(1, 0.5), (2, 0.75)], "b": [(1, 0.25), (2, 0.25)]})
    assert (
        sheet.svg() == lines(Axes("IoU < 1", "step"), {"a": [(1, 0.5), (2, 0.75)], "b": [(1, 0.25), (2, 0.25)]}).svg()
    )
    assert {"IoU < 1", "step", "a", "b", "1", "2"} <= set(texts(sheet))
    sheet.save(tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (360, 640, 3)
    circles = [c for c in ElementTree.fromstring(sheet.svg()).iter(f"{SVG}circle")]
    assert len(circles) == 4
    for circle in circles:  # every point is where the text says, in its colour
        x, y = round(float(circle.attrib["cx"])), round(float(circle.attrib["cy"]))
        assert "#{:02x}{:02x}{:02x}".format(*pixels[y, x]) == circle.attrib["fill"]
    assert {c.attrib["fill"] for c in circles} == set(COLOURS[:2])


def test_what_is_not_finite_has_no_place(tmp_path: Path) -> None:
    sheet = lines(Axes("loss", "step", log_y=True), {"loss": [(1, math.nan), (2, 4.0), (3, 1.0)]})
    assert sheet.svg().count("<circle") == 2
    assert {"1", "2", "4"} <= set(texts(sheet))  # powers of two
    empty = lines(Axes("loss", "step"), {"loss": [(1, math.nan)]})
    assert empty.svg().count("<circle") == 0
    empty.save(tmp_path / "empty.png")
    points = scatter(Axes("agreement", "Mpx/s"), [("a", 1.0, 100.0), ("b", 1.0, 100.0), ("c", 2.0, math.nan)])
    assert points.svg().count("<circle") == 2 + 3  # in the chart, and before each name
    assert "c: 2, nan" in texts(points)


def test_a_logarithm_of_nothing_is_not_taken() -> None:
    sheet = lines(Axes("loss", "step", log_y=True), {"loss": [(1, 0.0), (2, 4.0)]})
    assert sheet.svg().count("<circle") == 2


def test_charts_lie_side_by_side() -> None:
    one = lines(Axes("one", "x"), {"": [(0, 0), (1, 1)]})
    both = beside([one, one])
    assert both.size == (1280, 360)
    x = [float(c.attrib["cx"]) for c in ElementTree.fromstring(both.svg()).iter(f"{SVG}circle")]
    assert x[2:] == pytest.approx([v + 640 for v in x[:2]], abs=0.1)


def test_ticks_are_round() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(90.5, 100.2) == [92, 94, 96, 98, 100]
