"""The pipeline of the image line: windows of an image, tiles, engine, stitched bands.

Three threads: one reads windows and gathers tiles, the caller's runs the engine, one stitches and hands bands on. Queues
between them are short, so that memory is bounded by a few rows of tiles whatever the image. What is computed is a list
of :class:`Work`: all tiles of a plane, or those for a part of it; the pipeline does not drain between them. Engines on a
GPU have a pipeline of their own (``predict_device``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, DeviceMemoryError, ImageError, TileMemoryError
from ..images.normalize import Affines, OnePlane, grey_levels
from ..kernels import calls
from ..kernels.request import Affine, Frame, Ints
from ..tiling.decision import Decision
from ..tiling.stitch import BandStitcher
from .repeats import Repeats, Results
from .report import RunReport, Seen
from .run import on_device
from .work import (
    Array,
    Done,
    Progress,
    Spans,
    StageClock,
    Stop,
    StoppableQueue,
    Tally,
    Work,
    Write,
    check_image,
    filled,
    fresh,
)

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.spec import EngineSpec
    from ..images.source import Source


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
        from . import device as predict_device

        if predict_device.serves(engine, output):
            return on_device(
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
                    frame=Frame(source.shape, start, border),
                    affine=numbers,
                    threads=threads,
                )
                if bad:
                    raise ImageError(
                        f"{source.name}: NaN or infinite pixels in plane {work.plane}, rows {start[0]} to {stop[0]} "
                        f"({bad} read); a network spreads them over its whole reach: replace them first"
                    )
                new, known = repeats.compact(tiles)
            yield _Item(work, tally, row, index[part], new, known, first=first == 0, last=part.stop == len(index))
