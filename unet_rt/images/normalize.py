"""Normalisation: from the contract's words to two numbers per channel, from statistics of the whole image.

``value = (clip(x) - offset) / divisor``. Statistics are streamed by bands, in float64, and never taken over a tile;
they are taken after clipping, because the clip comes first in the formula. Percentiles are exact (order statistics by
repeated histograms of 16 bits at a time, interpolated as ``numpy.percentile`` does), whatever the image's size.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..contract.contract import Normalization
from ..contract.words import CHOICES
from ..errors import ContractError, ImageError
from ..kernels import calls
from ..kernels.request import Affine
from .pixels import Array
from .source import Source

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class OnePlane:
    """Numbers already known, in the form of :class:`Affines`: the same for every plane."""

    numbers: Affine

    def plane(self, plane: int) -> Affine:
        return self.numbers


Keep = Callable[[int, Callable[[], Affine]], Affine]  # (plane, what measures its numbers) -> these, measured or known


class Affines:
    """The numbers for each plane of an image; computed once, per plane where the scope is ``slice``.

    Attributes:
        same: All planes have the same.
    """

    def __init__(self, normalization: Normalization, source: Source, keep: Keep | None = None) -> None:
        """``keep``: is asked for a plane's numbers, where each has its own, before they are measured."""
        self.normalization = normalization
        self._source = source
        self._keep = keep
        self._lock = threading.Lock()
        self._planes: dict[int, Affine] = {}
        self.same = normalization.method not in ("minmax", "percentile", "zscore") or normalization.scope != "slice"
        if self.same:
            self._planes[0] = self._numbers(None)

    def plane(self, plane: int) -> Affine:
        """The numbers of one plane. With scope ``slice`` the first call reads the plane (ImageError as for reading)."""
        key = 0 if self.same else plane
        with self._lock:
            if key not in self._planes:
                measure = partial(self._numbers, plane)
                self._planes[key] = measure() if self._keep is None else self._keep(plane, measure)
            return self._planes[key]

    def _numbers(self, plane: int | None) -> Affine:
        how, source = self.normalization, self._source
        count = source.channels
        if how.method in ("minmax", "percentile", "zscore"):
            # Scope "image" takes all channels for one.
            groups = [tuple(range(count))] if how.scope == "image" else [(c,) for c in range(count)]
            measured = [_measured(how, source, group, plane) for group in groups]
            numbers = measured * count if how.scope == "image" else measured
        else:
            numbers = _declared(how, source)
        # float64 until here: the kernels take float32, rounded once.
        offset = np.array([pair[0] for pair in numbers], np.float32)
        divisor = np.array([pair[1] for pair in numbers], np.float32)
        if not (np.isfinite(offset).all() and np.isfinite(divisor).all() and divisor.all()):
            raise ContractError(
                f"{source.name}: normalisation {how.method} gives offset {offset.tolist()} and divisor "
                f"{divisor.tolist()}; "
                "the divisor must not be 0; check --normalize"
            )
        return Affine(offset, divisor, _clip(how, numbers, source.name))


def affine(normalization: Normalization, source: Source, keep: Keep | None = None) -> Affines:
    """The numbers that turn ``source``'s pixels into the network's input; ``keep`` as for :class:`Affines`.

    Raises:
        ContractError: The normalisation does not fit the pixels' dtype or the number of channels.
        ImageError: Statistics met NaN or infinite pixels.
    """
    return Affines(normalization, source, keep)


def _clip(how: Normalization, numbers: Sequence[tuple[float, float]], name: str) -> tuple[float, float] | None:
    """Grey levels that pixels are clipped to, so that what comes out lies within ``clip_after`` as well."""
    if how.clip_after is None:
        return how.clip
    if len(set(numbers)) > 1:
        raise ContractError(
            f"{name}: clip_after {how.clip_after} stands for other grey levels in each of {len(numbers)} channels, and all "
            "are clipped alike; take statistics over the whole image (--normalize-scope image), or leave clip_after out"
        )
    offset, divisor = numbers[0]
    low, high = sorted(offset + divisor * value for value in how.clip_after)  # a divisor may be negative
    if how.clip is None:
        return low, high
    return min(max(how.clip[0], low), high), min(max(how.clip[1], low), high)


def _declared(how: Normalization, source: Source) -> list[tuple[float, float]]:
    """(offset, divisor) per channel, from the declaration alone."""
    count = source.channels
    if how.method == "none":
        return [(0.0, 1.0)] * count
    if how.method == "scale":
        return [(0.0, float(how.scale))] * count
    if how.method == "dtype":
        if source.dtype.kind not in "iu":
            raise ContractError(
                f"{source.name}: --normalize dtype divides by the largest value of an integer dtype, and the pixels "
                f"are {source.dtype}; use scale=N with the largest value there can be, or none"
            )
        return [(0.0, float(np.iinfo(source.dtype).max))] * count
    mean, std = (
        _per_channel(values, count, what, source.name) for values, what in ((how.mean, "mean"), (how.std, "std"))
    )
    return [(m * how.scale, s * how.scale) for m, s in zip(mean, std, strict=True)]


def _per_channel(values: Sequence[float], count: int, what: str, name: str) -> list[float]:
    if len(values) not in (1, count):
        raise ContractError(
            f"{name}: the normalisation declares {len(values)} numbers for {what}, the network has {count} channels; "
            f"give 1 or {count}"
        )
    return [float(values[0])] * count if len(values) == 1 else [float(v) for v in values]


def _measured(how: Normalization, source: Source, group: tuple[int, ...], plane: int | None) -> tuple[float, float]:
    """(offset, divisor) of the channels of a group, over one plane or all of them."""
    if how.method == "percentile":
        low, high = percentiles(source, how.percentiles, channels=group, plane=plane, clip=how.clip)
        return low, high - low + how.eps
    moments = measure(source, channels=group, plane=plane, clip=how.clip)
    if how.method == "minmax":
        return moments.low, moments.high - moments.low + how.eps
    return moments.mean, moments.std + how.eps


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


def normalised(pixels: Array, numbers: Affine) -> Float32:
    """(C, *spatial) pixels as the network gets them; the slow twin of what ``tile_gather`` does on its way."""
    wide = pixels.dtype in (np.int32, np.uint32, np.float64)
    kind = np.float64 if wide else np.float32
    values: Array = pixels.astype(kind)
    if numbers.clip is not None:
        values = np.clip(values, kind(numbers.clip[0]), kind(numbers.clip[1]))
    along = (-1, *(1 for _ in range(pixels.ndim - 1)))
    offset: Array = numbers.offset.astype(kind).reshape(along)
    divisor: Array = numbers.divisor.astype(kind).reshape(along)
    result: Float32 = ((values - offset) / divisor).astype(np.float32)
    return result


def grey_levels(seen: Sequence[tuple[float, float]], numbers: Affine) -> NDArray[np.float64]:
    """(C, 2) grey levels between which pixels are normalised to values within ``seen``, a few roundings of float32 apart.

    Args:
        seen: (lowest, highest) normalised value, per channel, or one pair for all.
        numbers: Normalisation of the image. Where it clips no farther out than ``seen``, no pixel is outside: infinity.
    """
    offset, divisor = numbers.offset.astype(np.float64)[:, None], numbers.divisor.astype(np.float64)[:, None]
    ends = np.broadcast_to(np.asarray(seen, np.float64), (len(offset), 2))
    slack = 4 * np.finfo(np.float32).eps * np.abs(ends).max(axis=1, keepdims=True)
    levels: NDArray[np.float64] = np.sort(offset + divisor * (ends + slack * np.array([-1.0, 1.0])), axis=1)
    if numbers.clip is not None:
        levels[levels[:, 0] <= numbers.clip[0], 0] = -np.inf
        levels[levels[:, 1] >= numbers.clip[1], 1] = np.inf
    return levels


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
    values = dict(zip(ranks, _order_statistics(source, ranks, channels, plane), strict=True))
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
    source: Source, ranks: Sequence[int], channels: Sequence[int] | None, plane: int | None
) -> list[float]:
    """The ``rank``-th smallest pixel for each rank: digit by digit, each pass a histogram of the next 16 bits."""
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
        for rank in ranks:
            upto = np.cumsum(counts[prefix[rank]])
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
    bad = ~np.isfinite(band)
    if not bad.any():
        return
    channel, row, *rest = (int(i) for i in np.argwhere(bad)[0])
    place = (start + row, *rest)
    raise ImageError(
        f"{source.name}: {int(bad.sum())} NaN or infinite pixels in rows {start} to {start + band.shape[1] - 1} of "
        f"plane {plane}, the first in channel {channels[channel]} at {place}; replace them, e.g. with numpy.nan_to_num"
    )


# What is left open -------------------------------------------------------------------------------------------------


def missing_normalization(source: Source) -> ContractError:
    """The refusal of integer pixels with no normalisation declared anywhere: their range, and the choices."""
    low, high = value_range(source)
    return ContractError(
        f"no normalisation is declared, and {source.name} holds {source.dtype} pixels from {low:g} to {high:g}: "
        f"nothing says what the network was trained on. Declare it with --normalize: {CHOICES}"
    )
