"""What the pipelines work on and share: works, their tally, checks of tiles, queues that can be stopped."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, ImageError, TileError, size_text
from ..images.normalize import Affines, OnePlane
from ..kernels.request import Affine
from ..tiling.decision import Decision
from ..tiling.grid import TileGrid

if TYPE_CHECKING:
    from ..contract.contract import Border
    from ..engine.engine import Engine
    from ..engine.spec import EngineSpec
    from ..images.source import Source
    from ..kernels.memory import DeviceArray


Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]  # (tiles done, tiles in all)
Spans = list[tuple[str, float, float]]  # (stage, start, stop) in seconds of time.perf_counter


_COUNTED = 2**18  # pixels counted at a time: they stay in the second-level cache


@dataclass(frozen=True)
class Observer:
    """Who is told how a run goes on.

    Attributes:
        progress: Called from the caller's thread with (tiles done, tiles in all).
        trace: Receives (stage, start, stop) of everything that is timed.
        counts: Whether anybody reads the labels that the report counts.
    """

    progress: Progress | None = None
    trace: Spans | None = None
    counts: bool = True


UNSEEN = Observer()


@dataclass(frozen=True)
class Computation:
    """What all tiles of a run have in common.

    Attributes:
        engine: Runs tiles (N, C, *tile).
        source: The image, as the network sees it; on the host or on the engine's device.
        decision: What becomes of output ``output``.
        affines: The image's normalisation in numbers.
        output: Which output of the graph.
        batch: Tiles per run.
        threads: Of the kernels.
        target: (planes, [K,] *spatial) on the engine's device, filled there by works that are whole planes; it may have
            no other user until the run is over. None: results go to the host.
    """

    engine: Engine
    source: Source
    decision: Decision
    affines: Affines | OnePlane
    output: int = 0
    batch: int = 1
    threads: int = 0
    target: DeviceArray | None = None

    @property
    def spec(self) -> EngineSpec:
        return self.engine.spec

    @property
    def border(self) -> Border:
        return self.spec.contract.border or "mirror"


@dataclass(frozen=True)
class Work:
    """What is to be computed of one plane: the tiles of ``grid``, all of an image's or those of a part."""

    plane: int
    grid: TileGrid

    @property
    def held_bytes(self) -> int:
        """Memory that it holds while it waits."""
        return 0


class Tally:
    """What was counted of one work or of several.

    Attributes:
        labels: Pixels per channel and value of a mask, int64 (channels, 256).
        seen: Raw pixels looked at; ``outside`` are those whose normalised value is outside the range that build saw.
    """

    def __init__(self, channels: int) -> None:
        self.labels = np.zeros((max(1, channels), 256), dtype=np.int64)
        self.seen = self.outside = 0

    def add(self, other: Tally) -> None:
        self.labels += other.labels
        self.seen += other.seen
        self.outside += other.outside

    def count(self, band: Array, decision: Decision) -> None:
        """Counts the labels of a band of a mask; other bands count nothing."""
        if decision.dtype == np.uint8:
            for counts, labels in zip(self.labels, band if decision.channels else band[None], strict=True):
                count_labels(counts, labels, decision.values)

    def watch(self, pixels: Array, levels: npt.NDArray[np.float64] | None) -> None:
        """Counts raw pixels (C, ...) outside ``levels``, the lowest and highest of each channel; None counts nothing."""
        if levels is not None and pixels.size:
            for channel, (low, high) in zip(pixels, levels.tolist(), strict=True):
                lowest, highest = channel.min(), channel.max()
                if not lowest >= low or not highest <= high:  # with NaN, too
                    self.outside += _outside(channel[None], low, high)
            self.seen += pixels.size

    def outside_share(self) -> float | None:
        return self.outside / self.seen if self.seen else None


Write = Callable[[Work, int, Array], None]  # (work, first row in its wanted output, band)
Done = Callable[[Work, Tally], None]


class StageClock:
    """Seconds busy per stage; each stage belongs to one thread. ``trace`` receives every stretch of it."""

    def __init__(self, trace: Spans | None = None) -> None:
        self.seconds = dict.fromkeys(("read", "gather", "infer", "stitch", "write"), 0.0)
        self.trace = trace

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            stop = time.perf_counter()
            self.seconds[stage] += stop - start
            if self.trace is not None:
                self.trace.append((stage, start, stop))


class Stop(Exception):
    """Another stage of the pipeline has ended early."""


class StoppableQueue:
    """A short queue between two threads that ends for both when ``stop`` is set."""

    def __init__(self, size: int, stop: threading.Event):
        self._queue: queue.Queue[Any] = queue.Queue(size)
        self._stop = stop

    def put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        raise Stop

    def get(self) -> Any:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
        raise Stop

    def __iter__(self) -> Iterator[Any]:
        """Items until None."""
        while (item := self.get()) is not None:
            yield item


def check_image(work: Work, source: Source) -> None:
    """TileError where tiles are those of an image of another size."""
    if work.grid.image != tuple(source.shape):
        raise TileError(
            f"the tiles are those of an image of {size_text(work.grid.image)} px, and {source.name} has "
            f"{size_text(source.shape)}; plan them anew"
        )


def check_samples(found: Sequence[int], work: Work, output: int) -> None:
    """BackendError where a tile's output (N, K, *samples) is not what the graph says."""
    expected = work.grid.tile_out_shape(output)
    if tuple(found[2:]) != expected:
        raise BackendError(
            f"the engine returned {tuple(found[2:])} samples for a tile of {work.grid.tile}, and the graph says "
            f"{expected}; the engine does not belong to its spec: build it again"
        )


def check_finite(bad: int, source: Source, plane: int, rows: tuple[int, int]) -> None:
    """ImageError where ``bad`` pixels of some rows, as tiles read them, are not finite."""
    if bad:
        raise ImageError(
            f"{source.name}: NaN or infinite pixels (as float32) in plane {plane}, rows {rows[0]} to {rows[1]} ({bad} "
            "read); a network spreads them over its whole reach: replace them first, or give pixels that are NaN no label "
            "with --nodata nan"
        )


def count_labels(counts: npt.NDArray[np.int64], labels: Array, values: Sequence[int]) -> None:
    """Adds the pixels per value to ``counts`` (256,). ``labels`` hold no other values."""
    distinct = sorted(set(values))
    flat = labels.reshape(-1)
    if len(distinct) > 8:
        counts += np.bincount(flat, minlength=256)
        return
    # A comparison per value is ten times as fast as bincount, which widens to int64. The last value has the rest.
    for k in range(0, flat.size, _COUNTED):
        part = flat[k : k + _COUNTED]
        left = part.size
        for value in distinct[:-1]:
            found = int(np.count_nonzero(part == value))
            counts[value] += found
            left -= found
        counts[distinct[-1]] += left


def _outside(pixels: Array, low: float, high: float) -> int:
    """Pixels (C, rows, ...) below ``low`` or above ``high``; NaN is neither."""
    if pixels.dtype.kind in "iu":
        ends = np.iinfo(pixels.dtype)
        if low > ends.max or high < ends.min:
            return pixels.size
        # Bounds of the pixels' own kind, which are compared ten times as fast.
        low, high = ceil(max(low, ends.min)), floor(min(high, ends.max))
    rows = max(1, _COUNTED * pixels.shape[1] // pixels.size)
    found = 0
    for k in range(0, pixels.shape[1], rows):
        part = pixels[:, k : k + rows]
        found += int(np.count_nonzero(part < low)) + int(np.count_nonzero(part > high))
    return found


def unseen(pixels: Array, start: Sequence[int], grid: TileGrid, seen: int) -> Array:
    """Pixels of a window (C, *spatial) at ``start`` that a grid's results are wanted for, from image row ``seen`` on."""
    window: list[slice] = [slice(None)]
    for k, (axis, first, n) in enumerate(zip(grid.axes, start, pixels.shape[1:], strict=True)):
        low, high = axis.wanted
        low = max(low, seen) if k == 0 else low
        window.append(slice(min(max(low - first, 0), n), min(max(high - first, 0), n)))
    return pixels[tuple(window)]


def filled(pixels: Array, valid: Array | None, numbers: Affine) -> Array:
    """Pixels (C, *spatial) with those that hold no data replaced by what is normalised to (about) 0."""
    if valid is None:
        return pixels
    offset = numbers.offset.reshape(-1, *(1,) * (pixels.ndim - 1)).astype(np.float64)
    if pixels.dtype.kind in "iu":
        ends = np.iinfo(pixels.dtype)
        offset = np.clip(np.rint(offset), ends.min, ends.max)
    return np.where(valid, pixels, offset.astype(pixels.dtype))
