"""Activation ranges from real tiles: what eight bits have to cover.

Tiles come from the user's images, and never from those that parity is judged on (:func:`split`). Five ways to a range:

``minmax``      everything that was seen
``percentile``  all but the 0.01 % farthest out on either side
``tight``       all but 0.03 %
``entropy``     the clipping whose eight-bit histogram tells least apart from the full one (Kullback-Leibler, as TensorRT)
``mse``         the clipping of least squared error: what is cut off against what is rounded

Which one serves is measured, per network (``search.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..baseline.results import tile_of
from ..baseline.samples import SampleWindow, constant_reason
from ..errors import EngineError, ImageError, size_text
from ..graph.passes.qdq import Range
from ..system.json import Record, Size, from_json
from .activations import Distribution, probe

if TYPE_CHECKING:
    import onnx

    from ..engine.spec import EngineSpec


Array = npt.NDArray[Any]
RangeMethod = Literal["minmax", "percentile", "tight", "entropy", "mse"]
METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "tight", "mse", "entropy")

CUT_OFF = {"percentile": 1e-4, "tight": 3e-4}  # share on either side
CLIPS = np.concatenate([[1.0], 2.0 ** -np.arange(0.25, 5.01, 0.25)])  # of the larger side, tried by mse and entropy
CALIBRATION_SHARE = 3  # every third window calibrates, the others judge
SMALLEST_BLOCK_PX = 48  # a window is not cut into blocks narrower than this


@dataclass(frozen=True)
class Calibration(Record):
    """What was seen on the calibration tiles.

    Attributes:
        ranges: Per method and tensor.
        means: Per tensor the mean of each channel; for the correction of biases.
        positions: Per tensor the samples per channel that were seen; for the cost of layers.
        windows: Name and SHA-256 of the windows that tiles were taken from.
        tiles: How many.
    """

    ranges: Mapping[str, Mapping[str, Range]]
    means: Mapping[str, tuple[float, ...]]
    positions: Mapping[str, int]
    windows: tuple[tuple[str, str], ...] = ()
    tiles: int = 0

    def to_json(self) -> dict[str, Any]:
        """The calibration as JSON values."""
        tensors = {
            name: {method: (ranges[name].low, ranges[name].high) for method, ranges in self.ranges.items()}
            for name in next(iter(self.ranges.values()))
        }
        windows = tuple(_Window(name, digest) for name, digest in self.windows)
        return _CalibrationRecord(1, self.tiles, windows, tensors, self.means, self.positions).to_json()

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """Reads what :meth:`to_json` wrote.

        Raises:
            EngineError: It is damaged.
        """
        record = from_json(
            _CalibrationRecord,
            data,
            where="the calibration is damaged",
            error=EngineError,
            way_out="build the engine again with --samples",
        )
        methods = next(iter(record.tensors.values()))
        ranges = {method: {name: Range(*entry[method]) for name, entry in record.tensors.items()} for method in methods}
        windows = tuple((window.name, window.sha256) for window in record.windows)
        return cls(ranges, record.means, record.positions, windows, record.tiles)

    def dumps(self) -> str:
        """The calibration as the text of a JSON file."""
        return json.dumps(self.to_json()) + "\n"


@dataclass(frozen=True)
class _Window:
    """A window that tiles were taken from."""

    name: str
    sha256: str


@dataclass(frozen=True)
class _CalibrationRecord(Record):
    """A :class:`Calibration` as it is written: its ranges by tensor, then by method."""

    schema: Literal[1]
    tiles: Size
    windows: tuple[_Window, ...]
    tensors: Mapping[str, Mapping[str, tuple[float, float]]]
    means: Mapping[str, tuple[float, ...]]
    positions: Mapping[str, Size]

    def __post_init__(self) -> None:
        if len({frozenset(methods) for methods in self.tensors.values()}) != 1:
            raise ValueError("its tensors have none, or not the same, methods")


def calibrate(
    model: onnx.ModelProto, names: Sequence[str], tiles: Iterable[Sequence[Array]], *, threads: int = 0
) -> Calibration:
    """Ranges of the tensors ``names`` of an FP32 graph over tiles as the network gets them.

    Raises:
        ImageError: No tile, tiles that prove nothing (constant, or noise), or activations that are not finite.
    """
    kept: list[Sequence[Array]] = []
    reason = "there is none"
    for inputs in tiles:
        why = next((w for x in inputs if (w := constant_reason(x)) is not None), None)
        if why is None:
            kept.append(inputs)
        else:
            reason = why
    if not kept:
        raise ImageError(f"no tile to calibrate INT8 on: {reason}; pass images like those the network will see")
    found = probe(model, names, kept, threads=threads)
    broken = next((name for name, d in found.items() if not d.finite), None)
    if broken is not None:
        raise ImageError(f"activations of {broken} are not finite on the samples; check --normalize")
    ranges: dict[str, dict[str, Range]] = {
        method: {name: range_of(d, method) for name, d in found.items()} for method in METHODS
    }
    means = {name: tuple(float(v) for v in d.means.ravel()) for name, d in found.items()}
    return Calibration(ranges, means, {name: d.positions for name, d in found.items()}, (), len(kept))


def range_of(found: Distribution, method: RangeMethod) -> Range:
    """The range by one method, never wider than what was seen and always with zero inside."""
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if low == high or method == "minmax":
        return Range(low, high)
    if method in CUT_OFF:
        share = np.cumsum(found.counts) / max(1, found.counts.sum())
        width = 2 * found.span / len(found.counts)
        first = int(np.searchsorted(share, CUT_OFF[method]))
        last = int(np.searchsorted(share, 1 - CUT_OFF[method]))
        return Range(
            max(low, min(0.0, -found.span + width * first)), min(high, max(0.0, -found.span + width * (last + 1)))
        )
    cost = _squared_error if method == "mse" else _divergence
    best = Range(low, high)
    for side in ("both", "low"):  # the shorter side once more on its own: a long tail there costs the other one bits
        tried = []
        for clip in CLIPS:
            limit = max(-best.low, best.high) * clip if side == "both" else None
            if limit is None:
                short = min(-best.low, best.high) * clip
                option = replace(best, low=-short) if -best.low < best.high else replace(best, high=short)
            else:
                option = Range(max(best.low, -limit), min(best.high, limit))
            tried.append((cost(found, option), option))
        best = min(tried, key=lambda entry: entry[0])[1]
        if best.low == 0.0 or best.high == 0.0:
            break
    return best


def _squared_error(found: Distribution, option: Range) -> float:
    """Squared error per value of 256 levels over ``option``: rounding inside, the distance to its end outside."""
    x, n = found.centres, found.counts
    step = (option.high - option.low) / 255
    outside = np.maximum(option.low - x, 0) + np.maximum(x - option.high, 0)
    # zero is a level, and half of all activations are zero: no rounding there
    rounding = np.where((outside == 0) & (np.abs(x) > found.span / len(n)), step**2 / 12, 0.0)
    return float(((outside**2 + rounding) * n).sum())


def _divergence(found: Distribution, option: Range) -> float:
    """Kullback-Leibler divergence of the histogram cut to ``option`` from its rendering in 256 levels."""
    x, p = found.centres, found.counts.astype(np.float64)
    p[np.abs(x) <= found.span / len(p)] = 0.0  # zero is a level of its own
    inside = (x >= option.low) & (x <= option.high)
    if not p[inside].any():
        return float("inf")
    clipped = np.where(inside, p, 0.0)
    first, last = np.flatnonzero(inside)[[0, -1]]
    clipped[first] += p[x < option.low].sum()
    clipped[last] += p[x > option.high].sum()
    level = np.clip(((x - option.low) / (option.high - option.low) * 255).round(), 0, 255).astype(np.int64)
    held = np.where(inside, p, 0.0)
    total = np.bincount(level, held, 256)
    shared = np.bincount(level, (held > 0).astype(np.float64), 256)
    q = np.where(held > 0, (total / np.maximum(shared, 1))[level], 0.0)
    clipped, q = clipped / clipped.sum(), q / q.sum()
    seen = clipped > 0
    return float((clipped[seen] * np.log(clipped[seen] / np.maximum(q[seen], 1e-12))).sum())


# --- samples --------------------------------------------------------------------------------------------------------


def split(
    samples: Sequence[SampleWindow], *, smallest_px: int = SMALLEST_BLOCK_PX
) -> tuple[list[SampleWindow], list[SampleWindow], str]:
    """(windows to calibrate on, windows to judge on, a sentence about it); no pixel is in both.

    Copies of a window count once: an image that is there twice would calibrate and judge.

    Three windows or more: a third calibrates, in order of how far their values go as the network gets them, the farthest
    among them: what judges lies inside the range that was seen. The first window never calibrates (reports are about
    it). Fewer: each is cut along its longest axis, one third calibrates and two judge; from whichever end, and along
    whichever axis, leaves two parts that prove something (an image may have an empty margin).

    Raises:
        ImageError: A window is too small to be cut in two, or empty wherever it is cut.
    """
    different = dict[str, SampleWindow]()
    for sample in samples:
        different.setdefault(sample.sha256, sample)
    copies = len(samples) - len(different)
    if copies:
        calibrating, judging, note = split(list(different.values()), smallest_px=smallest_px)
        return calibrating, judging, f"{note}; {copies} of the samples are copies of others, and left out"
    if len(samples) >= CALIBRATION_SHARE:
        order = sorted(range(1, len(samples)), key=lambda k: -farthest_value(samples[k]))
        chosen = order[::CALIBRATION_SHARE]
        calibrating = [samples[k] for k in chosen]
        judging = [s for k, s in enumerate(samples) if k not in chosen]
        return calibrating, judging, f"{len(calibrating)} of {len(samples)} sample windows calibrate, the others judge"
    calibrating, judging = [], []
    for sample in samples:
        for part, whole in zip(_cut(sample, smallest_px), (calibrating, judging), strict=True):
            whole.append(part)
    count = "the one sample window is" if len(samples) == 1 else "the two sample windows are"
    return calibrating, judging, f"{count} cut: one third calibrates, two thirds judge; three or more images prove more"


def _cut(sample: SampleWindow, smallest_px: int) -> tuple[SampleWindow, SampleWindow]:
    """A third of a window and the rest of it, neither of them constant or noise."""
    reason = ""
    for axis in sorted(range(len(sample.shape)), key=lambda k: -sample.shape[k]):
        size = sample.shape[axis]
        third = size // 3
        if third < smallest_px:
            break
        for start, stop in ((0, third), (size - third, size)):
            rest = (stop, size) if start == 0 else (0, start)
            small, large = _block(sample, axis, start, stop), _block(sample, axis, *rest)
            found = [(part.name, why) for part in (small, large) if (why := constant_reason(part.pixels)) is not None]
            if not found:
                return small, large
            reason = reason or "{}: {}".format(*found[0])
    if reason:
        raise ImageError(
            f"{sample.name} cannot be cut into a part to calibrate on and one to judge on: wherever it is cut, one proves "
            f"nothing ({reason}); pass three or more images"
        )
    raise ImageError(
        f"{sample.name} is too small to be cut into a part to calibrate on and one to judge on "
        f"({size_text(sample.shape)} px); pass three or more images"
    )


def input_ranges(sample: SampleWindow) -> Array:
    """(C, 2) float64: lowest and highest value of each channel of a window as the network gets it, normalised."""
    axes = tuple(range(1, sample.pixels.ndim))
    numbers, ends = sample.numbers, list[Array]()
    for end in (sample.pixels.min(axis=axes), sample.pixels.max(axis=axes)):
        value = end.astype(np.float64)
        value = value if numbers.clip is None else np.clip(value, *numbers.clip)
        ends.append((value - numbers.offset) / numbers.divisor)
    found: Array = np.sort(np.stack(ends, axis=1), axis=1)  # a divisor may be negative
    return found


def farthest_value(sample: SampleWindow) -> float:
    """How far from zero the values of a window go as the network gets them."""
    return float(np.abs(input_ranges(sample)).max())


def _block(sample: SampleWindow, axis: int, start: int, stop: int) -> SampleWindow:
    import hashlib

    pixels = np.ascontiguousarray(np.take(sample.pixels, np.arange(start, stop), axis=axis + 1))
    place = tuple(s + (start if k == axis else 0) for k, s in enumerate(sample.start))
    return replace(
        sample,
        name=f"{sample.name} {'ZYX'[-len(sample.shape) :][axis]} {start}:{stop}",
        pixels=pixels,
        start=place,
        sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
    )


def tile_starts(sample: SampleWindow, tile: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Origins of up to ``count`` tiles of a window that differ in brightness and structure.

    Of a grid of places the brightest, the darkest and the most varied come first: the range of values, foreground and
    background.
    """
    grids = [
        sorted({int(v) for v in np.linspace(0, max(0, n - t), min(5, -(-n // t) + 1))})
        for n, t in zip(sample.shape, tile, strict=True)
    ]
    places = [tuple(int(g[i]) for g, i in zip(grids, index, strict=True)) for index in np.ndindex(*map(len, grids))]
    if len(places) <= count:
        return places

    def part(start: tuple[int, ...]) -> Array:
        window = tuple(slice(a, a + t, max(1, t // 64)) for a, t in zip(start, tile, strict=True))
        return sample.pixels[(slice(None), *window)].astype(np.float64)

    parts = [part(place) for place in places]
    orders = [
        sorted(range(len(places)), key=lambda k: -float(parts[k].var())),
        sorted(range(len(places)), key=lambda k: -float(parts[k].max())),
        sorted(range(len(places)), key=lambda k: float(parts[k].mean())),
    ]
    chosen = dict.fromkeys(k for row in zip(*orders, strict=True) for k in row)
    return [places[k] for k in list(chosen)[:count]]


def draw_tiles(
    samples: Sequence[SampleWindow], spec: EngineSpec, tile: Sequence[int], count: int, threads: int
) -> list[Array]:
    """Up to ``count`` tiles (1, C, *tile), normalised, dealt evenly to the windows; the first of every window first."""
    share = -(-count // len(samples))
    starts = [tile_starts(sample, tile, share) for sample in samples]
    tiles: list[Array] = []
    for turn in range(share):
        for sample, places in zip(samples, starts, strict=True):
            if turn < len(places) and len(tiles) < count:
                tiles.append(tile_of(sample, spec, tile, threads, start=places[turn]))
    return tiles
