"""Statistics of a whole image, streamed by bands: range, mean, deviation and exact percentiles of its pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ImageError
from ..kernels import calls
from .pixels import Array
from .source import Source


@dataclass(frozen=True)
class Moments:
    """Of a set of pixels: their number, range, mean and standard deviation (``ddof`` 0)."""

    count: int
    low: float
    high: float
    mean: float
    std: float


def measure(
    source: Source,
    *,
    channels: Sequence[int] | None = None,
    plane: int | None = None,
    clip: tuple[float, float] | None = None,
) -> Moments:
    """One pass over an image (or one plane of it). ImageError for non-finite pixels."""
    if source.dtype in _COUNTABLE and clip is None:
        return _moments_of_counts(source, channels, plane)
    count, mean, squares = 0, 0.0, 0.0
    low, high = math.inf, -math.inf
    for band in _bands(source, channels, plane, clip):
        low, high = min(low, float(band.min())), max(high, float(band.max()))
        n = band.size
        band_mean = float(band.mean(dtype=np.float64))
        spread = band.astype(np.float64)
        spread -= band_mean
        flat = spread.reshape(-1)
        # Chan, Golub and LeVeque's update: no cancellation, whatever the offset of the pixels.
        delta = band_mean - mean
        squares += float(flat @ flat) + delta * delta * count * n / (count + n)
        mean += delta * n / (count + n)
        count += n
    _refuse_empty(source, count)
    return Moments(count, low, high, mean, math.sqrt(squares / count))


FEW_PX = 2**14  # sorted as fast as the 65,536 counts of a histogram are added up
_COUNTABLE = tuple(np.dtype(name) for name in ("u1", "i1", "u2", "i2"))  # few values: counting them is quickest


def _moments_of_counts(source: Source, channels: Sequence[int] | None, plane: int | None) -> Moments:
    """From how often each value occurs: sums of integers, exact, and one rounding each."""
    bits = source.dtype.itemsize * 8
    counts = np.zeros(1 << bits, np.int64)
    for band in _bands(source, channels, plane, None):
        calls.histogram(_keys(band), counts)
    found = np.flatnonzero(counts)
    values = found - (1 << (bits - 1) if source.dtype.kind == "i" else 0)
    times = [int(n) for n in counts[found]]
    count = sum(times)
    _refuse_empty(source, count)
    total = sum(n * int(v) for n, v in zip(times, values, strict=True))
    mean = total / count
    squares = float(np.dot(counts[found].astype(np.float64), (values - mean) ** 2))
    return Moments(count, float(values[0]), float(values[-1]), mean, math.sqrt(squares / count))


def value_range(source: Source) -> tuple[float, float]:
    """(lowest, highest) raw pixel of the channels that the network gets. ImageError for non-finite pixels."""
    low, high = math.inf, -math.inf
    for band in _bands(source, None, None, None):
        low, high = min(low, float(band.min())), max(high, float(band.max()))
    return low, high


def percentiles(
    source: Source,
    percent: Sequence[float],
    *,
    channels: Sequence[int] | None = None,
    plane: int | None = None,
    clip: tuple[float, float] | None = None,
) -> list[float]:
    """Exact percentiles, as ``numpy.percentile`` of the pixels in float64; one pass per 16 bits of the dtype."""
    planes = source.planes if plane is None else 1
    count = math.prod(source.shape) * planes * (source.channels if channels is None else len(channels))
    if source.gaps:
        count = sum(band.size for band in _bands(source, channels, plane, None))
        _refuse_empty(source, count)
    at = [q / 100 * (count - 1) for q in percent]
    below = [math.floor(position) for position in at]
    ranks = sorted({rank for b in below for rank in (b, min(b + 1, count - 1))})
    # Clipping does not change the order, so it is applied to the few numbers that come out.
    values = dict(zip(ranks, _order_statistics(source, ranks, channels, plane, count), strict=True))
    if clip is not None:
        values = {rank: min(max(value, clip[0]), clip[1]) for rank, value in values.items()}
    result = []
    for position, b in zip(at, below, strict=True):
        low, high = values[b], values[min(b + 1, count - 1)]
        t = position - b
        # Interpolated from the nearer end, as NumPy does, so that the numbers are the same to the last bit.
        result.append(low + (high - low) * t if t < 0.5 else high - (high - low) * (1 - t))
    return result


def _order_statistics(
    source: Source, ranks: Sequence[int], channels: Sequence[int] | None, plane: int | None, count: int
) -> list[float]:
    """The ``rank``-th smallest pixel for each rank: digit by digit, each pass a histogram of 16 bits; few are sorted."""
    if count <= FEW_PX:
        few = np.concatenate([band.ravel() for band in _bands(source, channels, plane, None)])
        return [float(value) for value in np.partition(few, ranks)[list(ranks)]]
    bits = source.dtype.itemsize * 8
    digits = max(1, bits // 16)
    width = min(bits, 16)
    prefix = dict.fromkeys(ranks, 0)
    left = dict(zip(ranks, ranks, strict=True))
    for digit in range(digits):
        shift = width * (digits - 1 - digit)
        counts = {p: np.zeros(1 << width, np.int64) for p in set(prefix.values())}
        for band in _bands(source, channels, plane, None):
            keys = _keys(band)
            low = (keys >> keys.dtype.type(shift)) & keys.dtype.type((1 << width) - 1) if digits > 1 else keys
            for p, histogram in counts.items():
                inside = low if digit == 0 else low[(keys >> keys.dtype.type(shift + width)) == p]
                calls.histogram(inside if digits == 1 else inside.astype(np.uint16), histogram)
        sums = {p: np.cumsum(histogram) for p, histogram in counts.items()}
        for rank in ranks:
            upto = sums[prefix[rank]]
            value = int(np.searchsorted(upto, left[rank], side="right"))
            left[rank] -= int(upto[value - 1]) if value else 0
            prefix[rank] = (prefix[rank] << width) | value
    return [_from_key(prefix[rank], source.dtype) for rank in ranks]


def _keys(pixels: Array) -> Array:
    """Unsigned integers in the same order as the pixels."""
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    unsigned = np.dtype(f"u{size}")
    top = unsigned.type(1 << (8 * size - 1))
    raw = np.ascontiguousarray(pixels).view(unsigned)
    if kind == "u":
        return raw
    if kind == "i":
        turned: Array = raw ^ top
        return turned
    # Floats: all bits of negative ones are turned round, the sign bit of the others. -0 comes below 0, equal in value.
    return np.where(raw & top, ~raw, raw | top)


def _from_key(key: int, dtype: np.dtype[np.generic]) -> float:
    size = dtype.itemsize
    top = 1 << (8 * size - 1)
    if dtype.kind == "i":
        key ^= top
    elif dtype.kind == "f":
        key = key ^ top if key & top else ~key & ((1 << (8 * size)) - 1)
    value: float = float(np.array(key, f"u{size}").view(dtype))
    return value


def _bands(
    source: Source, channels: Sequence[int] | None, plane: int | None, clip: tuple[float, float] | None
) -> Iterator[Array]:
    """The pixels of an image band by band, (C, ...), checked to be finite; those that hold no data are left out."""
    wanted = range(source.channels) if channels is None else channels
    for number, start, stop in source.bands():
        if plane is not None and number != plane:
            continue
        rest = source.shape[1:]
        band, valid = source.read_valid(number, (start, *(0 for _ in rest)), (stop, *rest))
        if len(wanted) != source.channels:
            band = band[list(wanted)] if len(wanted) > 1 else band[wanted[0] : wanted[0] + 1]
        _refuse_non_finite(source, band if valid is None else np.where(valid, band, 0), number, start, wanted)
        if valid is not None:
            band = band[:, valid]
            if not band.size:
                continue
        if clip is not None:
            band = np.clip(band.astype(np.float64), *clip)
        yield band


def _refuse_empty(source: Source, count: int) -> None:
    if not count:
        raise ImageError(f"{source.name}: no pixel holds data, so there is nothing to take statistics of")


def _refuse_non_finite(source: Source, band: Array, plane: int, start: int, channels: Sequence[int]) -> None:
    if band.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(band.astype(np.float32, copy=False))  # as which they are computed with
    if not bad.any():
        return
    channel, row, *rest = (int(i) for i in np.argwhere(bad)[0])
    place = (start + row, *rest)
    raise ImageError(
        f"{source.name}: {int(bad.sum())} NaN or infinite pixels (as float32) in rows {start} to "
        f"{start + band.shape[1] - 1} of plane {plane}, the first in channel {channels[channel]} at {place}; replace "
        "them, e.g. with numpy.nan_to_num, or give pixels that are NaN no label with --nodata nan"
    )
