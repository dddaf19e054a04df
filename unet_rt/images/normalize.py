"""Normalisation: from the contract's words to two numbers per channel, from statistics of the whole image.

``value = (clip(x) - offset) / divisor``. Statistics are streamed by bands, in float64, and never taken over a tile;
they are taken after clipping, because the clip comes first in the formula. Percentiles are exact (order statistics by
repeated histograms of 16 bits at a time, interpolated as ``numpy.percentile`` does), whatever the image's size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..contract.contract import Normalization
from ..contract.words import CHOICES
from ..errors import ContractError
from ..kernels.request import Affine
from .pixels import Array
from .slices import Slices
from .source import Source
from .statistics import measure, percentiles

Float32 = NDArray[np.float32]
MEASURED = ("minmax", "percentile", "zscore")  # methods whose numbers are statistics


@dataclass(frozen=True)
class OnePlane:
    """Numbers already known, in the form of :class:`Affines`: the same for every plane."""

    numbers: Affine

    def plane(self, plane: int) -> Affine:
        return self.numbers

    @property
    def measured(self) -> Sequence[Affine]:
        """The numbers that are known so far."""
        return (self.numbers,)


Keep = Callable[[int, Callable[[], Affine]], Affine]  # (plane, what measures its numbers) -> these, measured or known


class Affines:
    """The numbers for each plane of an image; computed once, per plane where :func:`decide_scope` says so.

    Attributes:
        same: All planes have the same.
    """

    def __init__(self, normalization: Normalization, source: Source, keep: Keep | None = None) -> None:
        """``keep``: is asked for a plane's numbers, where each has its own, before they are measured."""
        self.normalization = normalization = decide_scope(normalization, source)
        self._source = source
        self._keep = keep
        self._lock = threading.Lock()
        self._planes: dict[int, Affine] = {}
        self._slices: dict[int | None, tuple[float, float]] = {}
        self.same = normalization.method not in MEASURED or not _each_plane(normalization, source)
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

    @property
    def measured(self) -> Sequence[Affine]:
        """The numbers that are known so far."""
        return tuple(self._planes.values())

    def _numbers(self, plane: int | None) -> Affine:
        how, source = self.normalization, self._source
        count = source.channels
        if how.method in MEASURED and isinstance(source, Slices):
            numbers = self._numbers_of_slices(source, plane)
        elif how.method in MEASURED:
            # Scope "image" takes all channels for one.
            groups = [tuple(range(count))] if how.scope == "image" else [(c,) for c in range(count)]
            measured = [_measured_numbers(how, source, group, plane) for group in groups]
            numbers = measured * count if how.scope == "image" else measured
        else:
            numbers = _declared_numbers(how, source)
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

    def _numbers_of_slices(self, source: Slices, plane: int | None) -> list[tuple[float, float]]:
        """(offset, divisor) per channel: of the whole stack, or of each slice by itself, wherever it comes as a channel."""
        planes = [None] * source.channels if plane is None else source.planes_of(plane)
        for one in (plane if p is None else p for p in planes):
            if one not in self._slices:
                self._slices[one] = _measured_numbers(self.normalization, source.stack, (0,), one)
        return [self._slices[plane if p is None else p] for p in planes]


def decide_scope(normalization: Normalization, source: Source) -> Normalization:
    """The normalisation with a scope: where none is declared, a plane of a stack is normalised as it would be alone.

    A volume of a 3-D network is not told from others of its series.
    """
    if normalization.scope is not None:
        return normalization
    if isinstance(source, Slices):
        return replace(normalization, scope="channel")  # slices that are seen together are compared
    return replace(normalization, scope="slice" if len(source.shape) == 2 and source.planes > 1 else "channel")


def _each_plane(normalization: Normalization, source: Source) -> bool:
    """Whether each plane has statistics of its own. To a 2-D network a plane of a stack is an image."""
    return normalization.scope == "slice" or (
        normalization.scope == "image"
        and len(source.shape) == 2
        and source.planes > 1
        and not isinstance(source, Slices)  # which are seen together, and compared
    )


def statistics_text(normalization: Normalization, source: Source, measured: Sequence[Affine]) -> str:
    """What the statistics of a stack's normalisation were taken over, and the range of those ``measured``, for a report.

    Empty where nothing is to be said: of a single plane, or where nothing is measured.
    """
    if normalization.method not in MEASURED or source.planes == 1:
        return ""
    how, what = decide_scope(normalization, source), "planes" if len(source.shape) == 2 else "volumes"
    over = f"{'each' if _each_plane(how, source) else 'all'} of {source.planes} {what} "
    over += "by itself" if _each_plane(how, source) else "together"
    if source.channels > 1:
        over += ", channels together" if how.scope == "image" else ", per channel"
    text = f"normalisation {how.method}: statistics of {over}"
    if not measured:
        return text
    offset, divisor = (np.stack([getattr(m, name) for m in measured]) for name in ("offset", "divisor"))
    named = (
        {"mean": offset, "deviation": divisor} if how.method == "zscore" else {"low": offset, "high": offset + divisor}
    )
    return text + ": " + ", ".join(f"{name} {_range_text(values)}" for name, values in named.items())


def _range_text(values: Float32) -> str:
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return low if low == high else f"{low} to {high}"


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


def _declared_numbers(how: Normalization, source: Source) -> list[tuple[float, float]]:
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


def _measured_numbers(
    how: Normalization, source: Source, group: tuple[int, ...], plane: int | None
) -> tuple[float, float]:
    """(offset, divisor) of the channels of a group, over one plane or all of them."""
    if how.method == "percentile":
        low, high = percentiles(source, how.percentiles, channels=group, plane=plane, clip=how.clip)
        return low, high - low + how.eps
    moments = measure(source, channels=group, plane=plane, clip=how.clip)
    if how.method == "minmax":
        return moments.low, moments.high - moments.low + how.eps
    return moments.mean, moments.std + how.eps


def normalize_pixels(pixels: Array, numbers: Affine) -> Float32:
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


# What is left open -------------------------------------------------------------------------------------------------


def missing_normalization(source: Source) -> ContractError:
    """The refusal of integer pixels with no normalisation declared anywhere: their range, and the choices.

    The range is that of the middle of the image: the refusal does not wait until all of it is read.
    """
    plane, start, stop = source.middle_band()
    pixels = source.read_band(plane, start, stop)
    where = "" if source.planes == 1 and stop - start == source.shape[0] else " in its middle"
    return ContractError(
        f"no normalisation is declared, and {source.name} holds {source.dtype} pixels from {pixels.min():g} to "
        f"{pixels.max():g}{where}: nothing says what the network was trained on. Declare it with --normalize: {CHOICES}"
    )
