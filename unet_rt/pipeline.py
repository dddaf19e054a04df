"""The pipeline of the image line: windows of an image, tiles, engine, stitched bands.

Three threads: one reads windows and gathers tiles, the caller's runs the engine, one stitches and hands bands on. Queues
between them are short, so that memory is bounded by a few rows of tiles whatever the image. What is computed is a list
of :class:`Work`: all tiles of a plane, or those for a part of it; the pipeline does not drain between them. Engines on a
GPU have a pipeline of their own (``predict_device``).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import ceil, floor, prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .engine.parity import class_name
from .errors import BackendError, ImageError, TileError, size_text
from .images.normalize import Affine, Affines, OnePlane, grey_levels
from .kernels import calls
from .kernels.device import DeviceMemoryError, TileMemoryError
from .repeats import Repeats, Results
from .system import limits
from .tiling.decision import Decision
from .tiling.grid import Ints, TileGrid
from .tiling.stitch import BandStitcher

if TYPE_CHECKING:
    from .contract.contract import Contract
    from .engine.engine import Engine
    from .engine.spec import EngineSpec
    from .images.source import Source


Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]  # (tiles done, tiles in all)
Spans = list[tuple[str, float, float]]  # (stage, start, stop) in seconds of time.perf_counter

DEVICE_WORKS = 64  # that a GPU's pipeline is given at once,
DEVICE_HELD_BYTES = 2**25  # and what they may hold together: little beside what a process with a GPU takes anyway
_COUNTED = 2**18  # pixels counted at a time: they stay in the second-level cache


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


@dataclass
class RunReport:
    """What one prediction did.

    Attributes:
        image: Name of the image.
        reading: How it was read, in a sentence.
        backend, precision, device: Where it ran.
        tile, halo: Tile in pixels and the halo used, in samples (before, after) per axis.
        tiles: Tiles computed.
        batch: Tiles per run, at most; fewer than asked where a GPU's memory did not hold them.
        mpx: Megapixels of the image, all planes.
        seconds: Wall time; ``stages`` are seconds busy per stage (they overlap): read, gather, infer, stitch, write.
        peak_rss_bytes: Peak resident memory of the process so far.
        class_share: Share of pixels per label (masks only); for a multi-label task per class, which may overlap.
        outside_range: Share of pixels that lie outside the range seen at build as the network gets them, normalised:
            grey levels say little where an image is normalised by its own statistics. None where build saw no samples.
        notes: What else is worth saying.
    """

    image: str
    reading: str
    backend: str
    precision: str
    device: str
    tile: tuple[int, ...] = ()
    halo: tuple[tuple[int, int], ...] | None = None
    tiles: int = 0
    batch: int = 1
    mpx: float = 0.0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    class_share: dict[str, float] = field(default_factory=dict)
    outside_range: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def mpx_per_s(self) -> float:
        return self.mpx / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mpx_per_s": self.mpx_per_s}


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


@dataclass
class _Item:
    """Some tiles of one row of tiles on their way through the pipeline.

    Attributes:
        work, tally: What they belong to, and what is counted of it.
        row, index: The row of tiles, and grid indices (tiles, axes).
        tiles: Inputs to be run, (N, C, *tile), repeats left out; after that outputs of all tiles, (tiles, K, *tile_out).
        known: Number of each tile's distinct tile, and whether that one was there before.
        first, last: Whether it opens and closes the row.
    """

    work: Work
    tally: Tally
    row: int
    index: Ints
    tiles: Array
    known: list[tuple[int, bool]]
    first: bool
    last: bool


def run(
    engine: Engine,
    source: Source,
    works: Iterable[Work],
    decision: Decision,
    write: Write,
    affines: Affines | OnePlane,
    *,
    output: int = 0,
    batch: int = 1,
    threads: int = 0,
    total: int | None = None,
    progress: Progress | None = None,
    done: Done | None = None,
    trace: Spans | None = None,
    stop: threading.Event | None = None,
) -> RunReport:
    """Runs works on a source, one after the other.

    Args:
        engine: Runs tiles (N, C, *tile).
        source: The image.
        works: What is to be computed; taken as it is needed.
        decision: What becomes of output ``output``.
        write: Receives finished bands, those of a work from top to bottom, works in order. Called from one thread.
        affines: The image's normalisation in numbers.
        output: Which output of the graph.
        batch: Tiles per run.
        threads: Of the kernels.
        total: Tiles in all, where ``works`` is no sequence.
        progress: Called from the caller's thread with (tiles done, tiles in all).
        done: Called after the last band of a work, from the thread that ``write`` is called from.
        trace: Receives (stage, start, stop) of everything that is timed.
        stop: Set by the run when it ends early, and seen by whoever makes ``works``.

    An engine on a GPU whose tiles the kernels can fill there runs there from end to end (``predict_device``); another
    one takes its tiles from the host. Tiles with the same pixels as one shortly before are not run again.

    Raises:
        TileMemoryError: A GPU's memory does not hold the first tiles, so that nothing was written.
        ImageError, TileError, BackendError: see their messages.
    """
    spec = engine.spec
    stop = stop or threading.Event()
    if total is None:
        works = list(works)
        total = sum(work.grid.count for work in works)
    if engine.device_session is not None:
        from . import predict_device

        if predict_device.serves(engine, output):
            return _on_device(
                engine, source, works, decision, write, affines,
                output=output, batch=batch, total=total, progress=progress, done=done,
            )  # fmt: skip
    begun = time.perf_counter()
    clock, errors = StageClock(trace), list[BaseException]()
    gathered, outputs = StoppableQueue(2, stop), StoppableQueue(2, stop)
    seen = Seen(decision)

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def body() -> None:
            try:
                work()
            except Stop:
                pass
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
                errors.append(error)
                stop.set()

        return body

    def gather() -> None:
        repeats = Repeats()
        for work in works:
            check_image(work, source)
            numbers = affines.plane(work.plane)
            for item in _gather(spec, source, work, seen.begin(work), numbers, batch, threads, clock, repeats):
                gathered.put(item)
        gathered.put(None)

    def stitch() -> None:
        for item in outputs:
            with clock("stitch"):
                if item.first:
                    if item.row == 0:
                        stitcher = BandStitcher(item.work.grid, output, decision, spec.blend, threads)
                    stitcher.begin(item.row)
                stitcher.add(item.tiles, item.index)
                if not item.last:
                    continue
                start, band = stitcher.finish()
                item.tally.count(band, decision)
            with clock("write"):
                if band.size:
                    write(item.work, start, band)
                if item.row == item.work.grid.shape[0] - 1:
                    seen.end(item.tally)
                    if done is not None:
                        done(item.work, item.tally)

    workers = [threading.Thread(target=guarded(work), name=work.__name__) for work in (gather, stitch)]
    finished, memory = 0, Results()
    try:
        for worker in workers:
            worker.start()
        if progress is not None:
            progress(0, total)
        for item in gathered:
            results = None
            if len(item.tiles):
                with clock("infer"):
                    results = _results(engine, item.tiles, first=finished == 0)[output]
                expected = item.work.grid.tile_out_shape(output)
                if results.shape[2:] != expected:
                    raise BackendError(
                        f"the engine returned {results.shape[2:]} samples for a tile of {item.work.grid.tile}, and the "
                        f"graph says {expected}; the engine does not belong to its spec: build it again"
                    )
            item.tiles = memory.complete(results, item.known)
            finished += len(item.index)
            outputs.put(item)
            if progress is not None:
                progress(finished, total)
        outputs.put(None)
    except Stop:
        pass
    except BaseException:
        stop.set()
        raise
    finally:
        for worker in workers:
            if worker.ident is not None:  # it was started
                worker.join()
    if errors:
        raise errors[0]
    return seen.report(spec, source, output, batch, begun, clock)


def _results(engine: Engine, tiles: Array, *, first: bool) -> list[npt.NDArray[np.float32]]:
    """What the engine makes of tiles; where a GPU's memory does not hold the ``first`` ones, others may be tried."""
    session = engine.gpu_session
    held = 0 if session is None else session.held_bytes  # for the shapes of earlier predictions
    try:
        return engine.run(tiles)
    except DeviceMemoryError as error:
        if not first or session is None:
            raise
        session.give_back()
        if not held:
            raise TileMemoryError(str(error), len(tiles)) from error
    return _results(engine, tiles, first=True)


def with_smaller_tiles(
    engine: Engine,
    grid: TileGrid,
    batch: int,
    attempt: Callable[[TileGrid, int], RunReport],
    *,
    asked: bool,
    aligned: bool = False,
) -> RunReport:
    """Runs tiles; where a GPU's memory does not hold them, fewer at once, and then smaller ones of the same result.

    A note of the report says what was run instead of what, and why.

    Args:
        engine: Runs the tiles.
        grid: The tiles.
        batch: Tiles per run.
        attempt: Runs the tiles of a grid, so many at once, from the start.
        asked: The user chose the tile, which is not changed: the error names the smaller one.
        aligned: Whether ``grid`` is aligned.

    Raises:
        TileMemoryError: There are no smaller tiles of the same result, or the tile was ``asked`` for.
    """
    tried, size, notes, why = grid, batch, list[str](), ""
    while True:
        try:
            report = attempt(tried, size)
        except TileMemoryError as error:
            fewer = engine.fewer(error.batch)
            if fewer < error.batch:
                size, notes = fewer, [f"{error}; {fewer} tiles per run instead of {error.batch}"]
                continue
            smaller = engine.spec.smaller_grid(tried, aligned=aligned)
            if smaller is None:
                raise
            if asked:
                raise TileMemoryError(
                    f"{error}; --tile {size_text(tried.tile)} was asked: use --tile {size_text(smaller.tile)}, or leave "
                    "--tile away",
                    error.batch,
                ) from error
            tried, size, notes, why = smaller, batch, [], why or str(error)
        else:
            if tried is not grid:
                text = f"tiles of {size_text(tried.tile)} px instead of {size_text(grid.tile)}, for the same result"
                notes.insert(0, f"{why}; {text}")
            report.notes[:0] = notes
            return report


def _on_device(
    engine: Engine, source: Source, works: Iterable[Work], decision: Decision, write: Write, affines: Affines | OnePlane,
    *, output: int, batch: int, total: int, progress: Progress | None, done: Done | None,
) -> RunReport:  # fmt: skip
    """Runs works on the engine's device, some at a time: they are taken as they are needed."""
    from . import predict_device

    begun, reports = time.perf_counter(), list[RunReport]()
    seen = Seen(decision)
    for group in _groups(works):
        before = sum(report.tiles for report in reports)

        def told(now: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + now, total)

        def ended(work: Work, tally: Tally) -> None:
            seen.end(tally)
            if done is not None:
                done(work, tally)

        try:
            report = predict_device.run(
                engine, source, group, decision, write, affines,
                output=output, batch=batch, total=total, progress=told, done=ended,
            )  # fmt: skip
        except TileMemoryError as error:
            if not reports:
                raise
            raise DeviceMemoryError(str(error)) from error  # others took memory meanwhile, and tiles were run
        reports.append(report)
        batch = report.batch  # what memory did not hold is not tried again
    if not reports:
        return seen.report(engine.spec, source, output, batch, begun, StageClock())
    merged = together(reports)
    merged.seconds = time.perf_counter() - begun
    merged.class_share, merged.outside_range = (
        class_share(seen.tally, decision, engine.spec),
        seen.tally.outside_share(),
    )
    return merged


def _groups(works: Iterable[Work]) -> Iterator[list[Work]]:
    """Works, some at a time; those of a group are made when it is asked for."""
    group, held = list[Work](), 0
    for work in works:
        group.append(work)
        held += work.held_bytes
        if len(group) == DEVICE_WORKS or held >= DEVICE_HELD_BYTES:
            yield group
            group.clear()  # the caller is done with them, and knows them still
            held = 0
    if group:
        yield group


def together(reports: Sequence[RunReport]) -> RunReport:
    """One report of several runs on one image: sums of their work and stages; the first one's everything else."""
    first = reports[0]
    return replace(
        first,
        tiles=sum(r.tiles for r in reports),
        batch=min(r.batch for r in reports),
        mpx=sum(r.mpx for r in reports),
        seconds=sum(r.seconds for r in reports),
        stages={name: round(sum(r.stages.get(name, 0.0) for r in reports), 4) for name in first.stages},
        peak_rss_bytes=max(r.peak_rss_bytes for r in reports),
        notes=list(dict.fromkeys(note for r in reports for note in r.notes)),
    )


class Seen:
    """What a run has done so far, for its report."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision
        self.tally = Tally(decision.channels)
        self.tiles = self.px = 0
        self.grid: TileGrid | None = None

    def begin(self, work: Work) -> Tally:
        """The tally of a new work."""
        self.grid = self.grid or work.grid
        self.tiles += work.grid.count
        self.px += prod(stop - start for start, stop in (axis.wanted for axis in work.grid.axes))
        return Tally(self._decision.channels)

    def end(self, tally: Tally) -> None:
        self.tally.add(tally)

    def report(
        self, spec: EngineSpec, source: Source, output: int, batch: int, begun: float, clock: StageClock
    ) -> RunReport:
        """The report of a run that began at ``begun`` (``time.perf_counter``) and is over."""
        grid = self.grid
        exact = grid is not None and not grid.blended
        return RunReport(
            image=source.name,
            reading=source.reading,
            backend=spec.backend,
            precision=spec.precision,
            device=spec.device,
            tile=() if grid is None else grid.tile,
            halo=tuple(f.halo for f in grid.outputs[output].field) if grid is not None and exact else None,
            tiles=self.tiles,
            batch=batch,
            mpx=self.px / 1e6,
            seconds=time.perf_counter() - begun,
            stages={name: round(s, 4) for name, s in clock.seconds.items()},
            peak_rss_bytes=limits.peak_rss_bytes(),
            class_share=class_share(self.tally, self._decision, spec),
            outside_range=self.tally.outside_share(),
            notes=[] if grid is None else _seam_notes(spec, grid),
        )


def check_image(work: Work, source: Source) -> None:
    """TileError where tiles are those of an image of another size."""
    if work.grid.image != tuple(source.shape):
        raise TileError(
            f"the tiles are those of an image of {size_text(work.grid.image)} px, and {source.name} has "
            f"{size_text(source.shape)}; plan them anew"
        )


def class_share(tally: Tally, decision: Decision, spec: EngineSpec) -> dict[str, float]:
    """Share of the counted pixels per class name; of a multi-label mask per class, which may overlap."""
    shares = tally.labels
    total = int(shares[0].sum())
    if not total:
        return {}
    values = decision.values
    if decision.channels:  # multi-label: a mask per class
        return {class_name(spec.contract, k): float(counts[values[1]] / total) for k, counts in enumerate(shares)}
    return {name: float(shares[0, value] / total) for value, name in label_names(decision, spec.contract).items()}


def label_names(decision: Decision, contract: Contract) -> dict[int, str]:
    """What each value of a mask of one channel means; where several classes share a value, the first of them."""
    names: dict[int, str] = {}
    for k, value in enumerate(decision.values):
        names.setdefault(value, class_name(contract, k) if decision.op == "argmax" else ("off", "on")[k])
    return names


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


def _seam_notes(spec: EngineSpec, grid: TileGrid) -> list[str]:
    """Where the halo is not exact, smaller tiles have more seams than those it was judged on."""
    if spec.halo_limit is None or all(
        a.tile >= min(t, a.canvas.size) for a, t in zip(grid.axes, spec.tile, strict=True)
    ):
        return []
    return ["the tile is smaller than the built one, and the halo is not exact: there are more seams than were judged"]


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


def fresh(pixels: Array, start: Sequence[int], grid: TileGrid, seen: int) -> Array:
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


def _gather(
    spec: EngineSpec,
    source: Source,
    work: Work,
    tally: Tally,
    numbers: Affine,
    batch: int,
    threads: int,
    clock: StageClock,
    repeats: Repeats,
) -> Iterator[_Item]:
    border, grid = spec.contract.border or "mirror", work.grid
    levels = None if spec.input_range is None else grey_levels(spec.input_range, numbers)
    seen = 0  # rows of the image that were looked at already
    for row in range(grid.shape[0]):
        index = grid.row(row)
        origins = grid.origins(index)
        start, stop = grid.window(index, border)
        with clock("read"):
            window = filled(*source.read_valid(work.plane, start, stop), numbers)
            tally.watch(fresh(window, start, grid, seen), levels)
            seen = max(seen, stop[0])
        for first in range(0, len(index), batch):
            part = slice(first, min(first + batch, len(index)))
            tiles = np.empty((part.stop - first, spec.channels, *grid.tile), dtype=np.float32)
            with clock("gather"):
                bad = calls.tile_gather(
                    window,
                    origins[part],
                    tiles,
                    image_shape=source.shape,
                    window_start=start,
                    border=border,
                    offset=numbers.offset,
                    divisor=numbers.divisor,
                    clip=numbers.clip,
                    threads=threads,
                )
                if bad:
                    raise ImageError(
                        f"{source.name}: NaN or infinite pixels in plane {work.plane}, rows {start[0]} to {stop[0]} "
                        f"({bad} read); a network spreads them over its whole reach: replace them first"
                    )
                new, known = repeats.compact(tiles)
            yield _Item(work, tally, row, index[part], new, known, first=first == 0, last=part.stop == len(index))
