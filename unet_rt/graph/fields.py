"""Halo, reach and shrink of one output along one axis, from what its samples depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np

from ..tiling.field import AxisField, Pair
from .line import Line
from .tensor import Tensor, sole_line


def field_lines(tensor: Tensor) -> list[Line]:
    return [line for axis in tensor.axes or () if (line := sole_line(axis)) is not None]


def halo_of(line: Line) -> Pair:
    low, high = np.flatnonzero(line.touched_low), np.flatnonzero(line.touched_high)
    return (int(low[-1]) + 1 if len(low) else 0), (line.size - int(high[0]) if len(high) else 0)


def shrink_of(line: Line, size: int) -> Pair:
    """Samples missing before and after, against ``scale`` samples per pixel.

    Where none are missing, sample j belongs to pixel j / scale: strided convolutions read half a stride to the left of
    it, and no shift is made of that. Otherwise the place decides, halves go to the middle.
    """
    total = math.floor(size * line.scale - line.size)
    at = line.place * line.scale - Fraction(1, 2)
    before = min(range(min(0, total), max(0, total) + 1), key=lambda n: (abs(n - at), abs(2 * n - total)))
    return before, total - before


def gives_whole_samples(line: Line, size: int) -> bool:
    """Whether ``size`` pixels give a whole number of samples by the line's scale."""
    return (size * line.scale).denominator == 1


def as_measured(line: Line, size: int) -> Line:
    """``line`` at ``size`` px, the only size there is, by the scale that its samples have where its own gives none.

    65 px, 33, 17, and back by Resize to 33 and 65: the scale is 1, not what strides and ratios make of it.
    """
    if gives_whole_samples(line, size):
        return line
    scale = Fraction(line.size, size)
    return replace(line, scale=scale, place=1 / scale / 2, stride=scale.denominator)


def axis_field(line: Line, size: int) -> AxisField:
    halo, shrink = halo_of(line), shrink_of(line, size)
    core = np.arange(line.size)[halo[0] : line.size - halo[1]]
    if not len(core):
        core = np.arange(line.size)
    place = (core + shrink[0]) * line.scale.denominator // line.scale.numerator
    reach = (
        max(0, int((place - line.low[core]).max(initial=0))),
        max(0, int((line.high[core] - place).max(initial=0))),
    )
    return AxisField(line.stride, reach, halo, shrink, line.scale)


def kept_step(field: AxisField, size: int, stride: int) -> int:
    """Input pixels by which tiles of ``size`` px may advance: what an inner tile keeps, rounded down to the stride."""
    try:
        kept = field.out_size(size) - sum(field.halo)
    except ValueError:
        return 0
    return math.floor(Fraction(kept) / field.scale) // stride * stride
