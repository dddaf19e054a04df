"""The pipeline of the image line on the host: windows of an image, tiles, engine, stitched bands.

Three threads: one reads windows and gathers tiles, the caller's runs the engine, one stitches and hands bands on. Queues
between them are short, so that memory is bounded by a few rows of tiles whatever the image. What is computed is a list
of :class:`Work`: all tiles of a plane, or those for a part of it; the pipeline does not drain between them. A single tile
has nothing to overlap with: it is gathered, run and stitched in the caller's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..engine.engine import Engine
from ..errors import DeviceMemoryError, TileMemoryError
from ..images.normalize import grey_levels
from ..kernels import calls
from ..kernels.request import Frame, Ints
from ..tiling.stitch import BandStitcher
from .repeats import Repeats, Results
from .report import RunReport, Seen
from .work import (
    UNSEEN,
    Array,
    Computation,
    Done,
    Observer,
    StageClock,
    Stop,
    StoppableQueue,
    Tally,
    Work,
    Write,
    check_finite,
    check_image,
    check_samples,
    filled,
    unseen,
)


@dataclass
class _Item:
    """Some tiles of one row of tiles on their way through the pipeline.

    Attributes:
        work, tally: What they belong to, and what is counted of it.
        row, index: The row of tiles, and grid indices (tiles, axes).
        tiles: Inputs to be run, (N, C, *tile), repeats left out.
        known: Number of each tile's distinct tile, and whether that one was there before.
        first, last: Whether it opens and closes the row.
        outputs: Of all tiles, (tiles, K, *tile_out), per output that is wanted; once they were run.
    """

    work: Work
    tally: Tally
    row: int
    index: Ints
    tiles: Array
    known: list[tuple[int, bool]]
    first: bool
    last: bool
    outputs: list[Array] = field(default_factory=list)


class _Way:
    """One output on its way from tiles to bands."""

    def __init__(self, computation: Computation, write: Write) -> None:
        self.computation, self.write = computation, write
        self.memory = Results()
        self._stitcher: BandStitcher | None = None

    def begin(self, work: Work, row: int) -> None:
        made = self.computation
        if row == 0 or self._stitcher is None:
            spec = made.spec
            self._stitcher = BandStitcher(
                work.grid, made.output, made.decision, spec.blend, spec.placement, made.threads
            )
        self._stitcher.begin(row)

    @property
    def stitcher(self) -> BandStitcher:
        assert self._stitcher is not None  # noqa: S101 - a row begins before its tiles
        return self._stitcher


class _Pipeline:
    """The three stages of a run. Each is called from one thread, with one item after the other."""

    def __init__(self, ways: Sequence[_Way], done: Done | None, observer: Observer, total: int) -> None:
        self.ways, self._done = ways, done
        self.made = ways[0].computation
        self.clock = StageClock(observer.trace)
        self.seen = Seen(self.made, read=observer.counts)
        self._repeats = Repeats()
        self._counts = observer.counts
        self._progress, self._finished, self._total = observer.progress, 0, total

    def tell(self, tiles: int) -> None:
        """Says that so many more tiles were run."""
        self._finished += tiles
        if self._progress is not None:
            self._progress(self._finished, self._total)

    def gather(self, works: Iterable[Work]) -> Iterator[_Item]:
        """Reads windows and fills tiles from them."""
        made = self.made
        for work in works:
            check_image(work, made.source)
            tally, looked = self.seen.begin(work), 0
            numbers = made.affines.plane(work.plane)
            wanted = made.spec.input_range
            levels = None if wanted is None else grey_levels(wanted, numbers)
            for row in range(work.grid.shape[0]):
                index = work.grid.row(row)
                start, stop = work.grid.window(index, made.border)
                with self.clock("read"):
                    window = filled(*made.source.read_valid(work.plane, start, stop), numbers)
                    tally.watch(unseen(window, start, work.grid, looked), levels)
                    looked = max(looked, stop[0])
                for first in range(0, len(index), made.batch):
                    part = slice(first, min(first + made.batch, len(index)))
                    with self.clock("gather"):
                        tiles, known = self._filled(work, window, start, (start[0], stop[0]), index[part])
                    last = part.stop == len(index)
                    yield _Item(work, tally, row, index[part], tiles, known, first=first == 0, last=last)

    def _filled(
        self, work: Work, window: Array, start: Sequence[int], rows: tuple[int, int], index: Ints
    ) -> tuple[Array, list[tuple[int, bool]]]:
        """The tiles at ``index`` from a window that begins at ``start``: those to be run, and which they are."""
        made = self.made
        tiles = np.empty((len(index), made.spec.channels, *work.grid.tile), dtype=np.float32)
        bad = calls.tile_gather(
            window,
            work.grid.origins(index),
            tiles,
            frame=Frame(made.source.shape, start, made.border),
            affine=made.affines.plane(work.plane),
            threads=made.threads,
        )
        check_finite(bad, made.source, work.plane, rows)
        return self._repeats.compact(tiles)

    def infer(self, item: _Item) -> None:
        """Runs the tiles of an item that were not run before."""
        results: Sequence[Array | None] = [None] * len(self.ways)
        if len(item.tiles):
            with self.clock("infer"):
                every = _run_tiles(self.made.engine, item.tiles, first=self._finished == 0)
            item.tiles = item.tiles[:0].copy()  # nobody needs them any more
            results = [every[way.computation.output] for way in self.ways]
            for way in self.ways:
                check_samples(every[way.computation.output].shape, item.work, way.computation.output)
        item.outputs = [way.memory.complete(r, item.known) for way, r in zip(self.ways, results, strict=True)]

    def stitch(self, item: _Item) -> None:
        """Places the tiles of an item, and hands the band on that they complete."""
        bands = []
        for way, outputs in zip(self.ways, item.outputs, strict=True):
            with self.clock("stitch"):
                if item.first:
                    way.begin(item.work, item.row)
                way.stitcher.add(outputs, item.index)
                if item.last:
                    bands.append((way, *way.stitcher.finish()))
                    if way is self.ways[0] and self._counts:
                        item.tally.count(bands[0][2], self.made.decision)
        if not item.last:
            return
        with self.clock("write"):
            for way, start, band in bands:
                if band.size:
                    way.write(item.work, start, band)
            if item.row == item.work.grid.shape[0] - 1:
                self.seen.end(item.tally)
                if self._done is not None:
                    self._done(item.work, item.tally)


def run(
    computation: Computation,
    works: Iterable[Work],
    write: Write,
    *,
    done: Done | None = None,
    observer: Observer = UNSEEN,
    total: int | None = None,
    stop: threading.Event | None = None,
    beside: Sequence[tuple[Computation, Write]] = (),
) -> RunReport:
    """Runs works, one after the other; tiles are taken from the host, wherever the engine runs them.

    Args:
        computation: What all tiles have in common.
        works: What is to be computed; taken as it is needed.
        write: Receives finished bands, those of a work from top to bottom, works in order. Called from one thread.
        done: Called after the last band of a work, from the thread that ``write`` is called from.
        observer: Who is told how it goes on.
        total: Tiles in all, where ``works`` is no sequence.
        stop: Set by the run when it ends early, and seen by whoever makes ``works``.
        beside: What else is made of the same tiles: computations that differ in output and decision.

    Tiles with the same pixels as one shortly before are not run again.

    Raises:
        TileMemoryError: A GPU's memory does not hold the first tiles, so that nothing was written.
        ImageError, TileError, BackendError: see their messages.
    """
    if total is None:
        works = list(works)
        total = sum(work.grid.count for work in works)
    pipeline = _Pipeline([_Way(computation, write), *(_Way(*other) for other in beside)], done, observer, total)

    if total == 1:
        _in_this_thread(pipeline, works)
    else:
        _in_threads(pipeline, works, stop or threading.Event())
    return pipeline.seen.report(pipeline.clock, computation.batch)


def _in_this_thread(pipeline: _Pipeline, works: Iterable[Work]) -> None:
    pipeline.tell(0)
    for item in pipeline.gather(works):
        pipeline.infer(item)
        pipeline.stitch(item)
        pipeline.tell(len(item.index))


def _in_threads(pipeline: _Pipeline, works: Iterable[Work], stop: threading.Event) -> None:
    errors = list[BaseException]()
    gathered, outputs = StoppableQueue(2, stop), StoppableQueue(2, stop)

    def gather() -> None:
        for item in pipeline.gather(works):
            gathered.put(item)
        gathered.put(None)

    def stitch() -> None:
        for item in outputs:
            pipeline.stitch(item)

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

    workers = [threading.Thread(target=guarded(work), name=work.__name__) for work in (gather, stitch)]
    try:
        for worker in workers:
            worker.start()
        pipeline.tell(0)
        for item in gathered:
            pipeline.infer(item)
            outputs.put(item)
            pipeline.tell(len(item.index))
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


def _run_tiles(engine: Engine, tiles: Array, *, first: bool) -> list[npt.NDArray[np.float32]]:
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
    return _run_tiles(engine, tiles, first=True)
