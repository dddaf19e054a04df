"""Samples along one tensor axis: which input pixels each depends on, and whether a tile edge touches it.

Pure geometry of windows, resizing and padding over concrete sizes. No ONNX, no pixels. Everything costs O(samples), and
windows of many taps O(samples x log taps): numbers in a file may be large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

# A tap: for every output sample the index of one input sample (may lie outside), where it exists, and where its weight
# is not zero. A zero weight leaves the value alone, yet 0 x NaN is NaN: it counts as dependence and not as a touch.
Tap = tuple[Integers, Booleans | None, Booleans | None]


# Samples along an axis: walks are over some thousand pixels, and networks enlarge them a few times.
LONGEST = 1 << 19
FEW = 16  # taps that are combined one after the other


class TooLongError(ValueError):
    """An axis of more samples than those of any image that a graph is walked at."""


def _samples(size: int) -> Integers:
    """0, 1, 2, ... below ``size``."""
    if size > LONGEST:
        raise TooLongError(f"gives {size} samples along an axis, beyond any image")
    return np.arange(size, dtype=np.int64)


@dataclass(frozen=True)
class Line:
    """Samples along a tensor axis that follows one spatial axis of the input.

    Attributes:
        source: Index of the spatial axis of the input.
        low, high: Lowest and highest input pixel that each sample depends on.
        touched_low, touched_high: Whether the low or high tile edge takes part in the sample's value.
        scale: Samples per input pixel.
        place: Position of the centre of sample 0 in input pixels, where pixel ``p`` spans ``[p, p + 1)``.
        stride: Least common multiple of the denominators of ``scale`` on the way here.
    """

    source: int
    low: Integers
    high: Integers
    touched_low: Booleans
    touched_high: Booleans
    scale: Fraction
    place: Fraction
    stride: int

    @property
    def size(self) -> int:
        return len(self.low)

    @property
    def width(self) -> int:
        """Largest number of input pixels that a sample depends on."""
        return int((self.high - self.low).max()) + 1 if self.size else 0


def input_line(source: int, size: int) -> Line:
    """The line of the input itself: each pixel depends on itself."""
    pixels = _samples(size)
    none = np.zeros(size, dtype=np.bool_)
    return Line(source, pixels, pixels, none, none, Fraction(1), Fraction(1, 2), 1)


def combine(
    line: Line,
    taps: Iterable[Tap],
    scale: Fraction,
    place: Fraction,
    outside: Callable[[Integers, int], Integers] | None = None,
) -> Line:
    """A line whose samples each combine several samples of ``line``.

    Taps that fall outside ``line`` are edge rules at work (padding, clamping, a clipped window): the sample is touched,
    and depends on what ``outside`` maps the index to (default: the nearest sample).
    """
    n = line.size
    low = high = touched_low = touched_high = None
    for index, exists, weighs in taps:
        inside = index if outside is None else outside(index, n)
        inside = np.clip(inside, 0, n - 1)
        lo, hi = line.low[inside], line.high[inside]
        tl = line.touched_low[inside] | (index < 0)
        th = line.touched_high[inside] | (index >= n)
        if weighs is not None:
            tl, th = tl & weighs, th & weighs
        if exists is not None:
            big = np.iinfo(np.int64).max
            lo, hi = np.where(exists, lo, big), np.where(exists, hi, -big)
            tl, th = tl & exists, th & exists
        if low is None or high is None or touched_low is None or touched_high is None:
            low, high, touched_low, touched_high = lo, hi, tl, th
        else:
            low, high = np.minimum(low, lo), np.maximum(high, hi)
            touched_low, touched_high = touched_low | tl, touched_high | th
    if low is None or high is None or touched_low is None or touched_high is None:
        raise ValueError("a sample needs at least one tap")
    return _made(line, low, high, touched_low, touched_high, scale, place)


def _made(
    line: Line,
    low: Integers,
    high: Integers,
    touched_low: Booleans,
    touched_high: Booleans,
    scale: Fraction,
    place: Fraction,
) -> Line:
    empty = low > high
    if empty.any():  # a transposed convolution with gaps: the value is the bias alone
        at = np.floor((np.arange(len(low)) + 0.5) / float(scale) + float(place) - 0.5 / float(scale)).astype(np.int64)
        at = np.clip(at, 0, int(line.high.max()))
        low, high = np.where(empty, at, low), np.where(empty, at, high)
    stride = math.lcm(line.stride, scale.denominator)
    return Line(line.source, low, high, touched_low, touched_high, scale, place, stride)


def _combine_runs(line: Line, first: Integers, count: Integers, step: int, scale: Fraction, place: Fraction) -> Line:
    """As :func:`combine`, for ``count`` taps per sample, one every ``step`` samples of ``line`` from ``first`` on.

    Taps outside count once: all of them are the nearest sample. Those inside are a range of the samples of one residue
    modulo ``step``, and the least of a range is that of two overlapping ones whose lengths are a power of two.
    """
    n, big = line.size, np.iinfo(np.int64).max
    values = np.stack([line.low, -line.high, -1 * line.touched_low, -1 * line.touched_high])
    skipped = np.maximum(0, -(first // step))
    inside = np.maximum(0, np.minimum(count, (n - 1 - first) // step + 1) - skipped)
    start = np.where(inside > 0, first + skipped * step, 0)
    apart = min(step, n)
    rows = -(-n // apart)
    table = np.full((4, rows * apart), big)
    table[:, :n] = values
    table = table.reshape(4, rows, apart).transpose(0, 2, 1).reshape(4, -1)
    at = start % apart * rows + start // apart
    found = np.full((4, len(first)), big)
    length, longest = 1, int(inside.max(initial=0))
    while length <= longest:
        chosen = np.flatnonzero((inside >= length) & (inside < 2 * length))
        left = at[chosen]
        found[:, chosen] = np.minimum(table[:, left], table[:, left + inside[chosen] - length])
        table = np.minimum(table[:, :-length], table[:, length:])
        length *= 2
    for sample, touched, outside in ((0, 2, first < 0), (n - 1, 3, first + (count - 1) * step >= n)):
        outside &= count > 0
        edge = values[:, sample : sample + 1].copy()
        edge[touched] = -1
        found = np.where(outside, np.minimum(found, edge), found)
    none = found[0] == big
    found[2:, none] = 0
    high = np.where(none, -big, -found[1])
    return _made(line, found[0], high, found[2] < 0, found[3] < 0, scale, place)


def window(line: Line, kernel: int, stride: int, dilation: int, pad: int, size: int) -> Line:
    """``size`` windows of ``kernel`` taps; window 0 starts ``pad`` samples before the line."""
    start = _samples(size) * stride - pad
    place = line.place + (Fraction((kernel - 1) * dilation, 2) - pad) / line.scale
    if kernel > FEW:
        return _combine_runs(line, start, np.full(size, kernel), dilation, line.scale / stride, place)
    return combine(line, ((start + t * dilation, None, None) for t in range(kernel)), line.scale / stride, place)


def unreached(line: Line, kernel: int, stride: int, dilation: int, pad: int, size: int) -> int:
    """Samples of ``line`` behind the last window that no window reaches, though one more stride would have."""
    last = (size - 1) * stride - pad + (kernel - 1) * dilation
    between = max(0, stride - (kernel - 1) * dilation - 1)
    return max(0, line.size - 1 - last - between)


def transposed_window(line: Line, kernel: int, stride: int, dilation: int, pad: int, size: int) -> Line:
    """Transposed convolution: tap ``t`` brings input ``i`` to sample ``j`` where j = i * stride - pad + t * dilation."""
    j = _samples(size) + pad
    place = line.place + (pad - Fraction((kernel - 1) * dilation, 2)) / stride / line.scale
    if kernel <= FEW:
        at = (j - t * dilation for t in range(kernel))
        return combine(line, ((a // stride, a % stride == 0, None) for a in at), line.scale * stride, place)
    common = math.gcd(stride, dilation)
    cycle = stride // common  # taps that meet an input are so far apart
    tap = j // common * pow(dilation // common, -1, cycle) % cycle  # the first of them
    count = np.where((j % common == 0) & (tap < kernel), (kernel - 1 - tap) // cycle + 1, 0)
    step = dilation // common
    first = (j - tap * dilation) // stride - (count - 1) * step
    return _combine_runs(line, first, count, step, line.scale * stride, place)


def take(line: Line, start: int, step: int, size: int) -> Line:
    """Every ``step``-th sample from ``start``; indices outside belong to nobody and must not occur."""
    index = _samples(size) * step + start
    return combine(line, [(index, None, None)], line.scale / step, line.place + start / line.scale)


def repeat(line: Line, times: int) -> Line:
    """Each sample ``times`` times in a row (nearest up-sampling, pixel shuffle)."""
    index = _samples(line.size * times) // times
    place = line.place + (Fraction(1, 2 * times) - Fraction(1, 2)) / line.scale
    return combine(line, [(index, None, None)], line.scale * times, place)


def mirror_index(index: Integers, size: int) -> Integers:
    """Indices outside reflected at the first and last sample (NumPy's ``reflect``)."""
    if size == 1:
        return np.zeros_like(index)
    period = 2 * (size - 1)
    index = np.abs(index) % period
    return np.where(index >= size, period - index, index)


def pad(line: Line, before: int, after: int, mode: str) -> Line:
    """Padding by ``before`` and ``after`` samples; negative crops."""
    index = _samples(before + line.size + after) - before
    outside = mirror_index if mode == "reflect" else None
    return combine(line, [(index, None, None)], line.scale, line.place - before / line.scale, outside)


@dataclass(frozen=True)
class Sampling:
    """How a Resize reads: where output sample ``x`` lies in input samples, exactly ``numerator(x) / denominator``.

    ``slope`` and ``intercept`` are those of ``x -> slope * x + intercept``.
    """

    slope: Fraction
    intercept: Fraction

    def at(self, size: int) -> tuple[Integers, Integers, int]:
        """Floor and remainder of each position as integers, and the denominator of the remainder."""
        d = math.lcm(self.slope.denominator, self.intercept.denominator)
        n = _samples(size) * int(self.slope * d) + int(self.intercept * d)
        return n // d, n % d, d


def nearest(line: Line, sampling: Sampling, size: int, rounding: str) -> Line:
    """Nearest-neighbour resize; ``rounding`` is ONNX's nearest_mode."""
    floor, rest, d = sampling.at(size)
    if rounding == "floor":
        index = floor
    elif rounding == "ceil":
        index = floor + (rest > 0)
    elif rounding == "round_prefer_ceil":
        index = floor + (2 * rest >= d)
    else:
        index = floor + (2 * rest > d)
    scale = line.scale / sampling.slope
    place = line.place + (sampling.slope / 2 - Fraction(1, 2)) / line.scale
    return combine(line, [(index, None, None)], scale, place)


def near_tie(sampling: Sampling, size: int, rounding: str) -> bool:
    """Whether a position lies where rounding of the coordinate decides which neighbour is read."""
    _, rest, d = sampling.at(size)
    tie = 0 if rounding in ("floor", "ceil") else d
    return bool(((2 * rest) % (2 * d) == tie).any())


def interpolate(line: Line, sampling: Sampling, size: int, mode: str, antialias: bool) -> Line:
    """Linear or cubic resize, with the wider filter of ``antialias`` where it shrinks."""
    floor, rest, d = sampling.at(size)
    scale = line.scale / sampling.slope
    place = line.place + sampling.intercept / line.scale
    half = 1 if mode == "linear" else 2
    if antialias and sampling.slope > 1:
        support = half * sampling.slope
        # |floor + t - position| < support, in units of 1 / (d * support.denominator)
        unit, edge = d * support.denominator, support.numerator * d
        place_in = rest * support.denominator
        least, most = (place_in - edge) // unit + 1, -((-place_in - edge) // unit) - 1
        return _combine_runs(line, floor + least, most - least + 1, 1, scale, place)
    on = rest == 0

    def taps() -> Iterable[Tap]:
        for t in range(1 - half, half + 1):
            yield floor + t, None, (np.ones_like(on) if t == 0 else ~on)

    return combine(line, taps(), scale, place)


def merge_lines(lines: list[Line]) -> Line:
    """Samples that depend on the same sample of every line. The place is that of the most direct branch.

    Raises:
        ValueError: The lines follow different axes, or differ in size or scale.
    """
    first = lines[0]
    if any(other.source != first.source for other in lines):
        raise ValueError("mixes the spatial axes")
    if any(other.size != first.size for other in lines):
        raise ValueError(f"meets sizes {' and '.join(str(o.size) for o in lines)}")
    if any(other.scale != first.scale for other in lines):
        raise ValueError(f"meets scales {' and '.join(str(o.scale) for o in lines)}")
    if len(lines) == 1:
        return first
    direct = min(lines, key=lambda line: line.width)
    return replace(
        direct,
        low=np.minimum.reduce([o.low for o in lines]),
        high=np.maximum.reduce([o.high for o in lines]),
        touched_low=np.logical_or.reduce([o.touched_low for o in lines]),
        touched_high=np.logical_or.reduce([o.touched_high for o in lines]),
        stride=math.lcm(*(o.stride for o in lines)),
    )
