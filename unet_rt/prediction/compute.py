"""Results computed block by block, so that a run can be killed and go on, and several processes share one.

Blocks run through one pipeline, which does not drain between them; a thread of its own keeps what is finished. Where only
a region is wanted, or parts of the image hold no data, tiles that nothing is wanted of are not run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..kernels import calls
from ..kernels.request import Placement
from ..tiling.decision import Decision, decision_operation
from ..tiling.grid import TileGrid
from ..tiling.resample import resample
from .blocks import Block
from .host import run
from .plan import Array, Prepared
from .report import RunReport
from .run import with_smaller_tiles
from .work import Progress, Spans, Stop, StoppableQueue, Tally, Work

Put = Callable[
    [Block, Array, Tally], None
]  # (block, its part of the result: (K, *spatial) or (*spatial,), what was counted)


@dataclass(frozen=True)
class _BlockWork(Work):
    """What is to be computed of a block.

    Attributes:
        block: The block.
        start, stop: The pixels of it that a tile is needed for.
        wanted, valid: Of all its pixels: what the region holds, what is data; None: all.
    """

    block: Block
    start: tuple[int, ...]
    stop: tuple[int, ...]
    wanted: Array | None
    valid: Array | None

    @property
    def held_bytes(self) -> int:
        return sum(mask.nbytes for mask in (self.wanted, self.valid) if mask is not None)


def run_blocks(
    made: Prepared,
    numbers: Sequence[int],
    put: Put,
    *,
    done_tiles: int = 0,
    progress: Progress | None = None,
    trace: Spans | None = None,
) -> RunReport:
    """Computes blocks, in the order given.

    Where a GPU's memory does not hold the tiles, smaller ones fill the same blocks with the same result: nobody who works
    on other blocks of it needs to know. (Neighbouring blocks may then have some tiles in common, which are run for both.)

    Args:
        made: The result.
        numbers: Of the blocks.
        put: Keeps a block; called from one thread.
        done_tiles: Tiles that need not be run any more, for ``progress``.
        progress: Called with (tiles done, tiles in all).
        trace: As for :func:`unet_rt.prediction.host.run`.
    """
    settled = set[int]()  # blocks that were kept

    def attempt(grid: TileGrid, batch: int) -> RunReport:
        now = replace(made, plan=replace(made.plan, grid=grid), batch=batch)
        left = [number for number in numbers if number not in settled]
        before = done_tiles + sum(now.plan.tiles(number) for number in settled)
        return _attempt(now, left, put, settled, done_tiles=before, progress=progress, trace=trace)

    return with_smaller_tiles(made.engine, made.plan.grid, made.batch, attempt, asked=made.fixed_tile, aligned=True)


def _attempt(
    made: Prepared,
    numbers: Sequence[int],
    put: Put,
    settled: set[int],
    *,
    done_tiles: int,
    progress: Progress | None,
    trace: Spans | None,
) -> RunReport:
    """Computes blocks with the tiles of their plan, and adds those that were kept to ``settled``.

    Raises:
        TileMemoryError: No tile was run yet: all that was kept are blocks that need none.
    """
    stop, errors = threading.Event(), list[BaseException]()
    queue = StoppableQueue(1, stop)
    total = sum(map(made.plan.tiles, numbers))
    values: dict[int, Array] = {}
    spared = 0  # tiles that nothing is wanted of

    def keep() -> None:
        try:
            for item in queue:
                put(*item)
                settled.add(item[0].number)
        except Stop:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the pipeline, which raises it
            errors.append(error)
            stop.set()

    def hand_on(block: Block, result: Array, tally: Tally) -> None:
        try:
            queue.put((block, result, tally))
        except Stop:
            raise errors[0] if errors else Stop from None

    def works() -> Iterator[Work]:
        nonlocal spared
        for number in numbers:
            if stop.is_set():
                return
            block = made.plan.block(number)
            work = _work(made, block)
            if isinstance(work, _BlockWork):
                spared += made.plan.tiles(number) - work.grid.count
                yield work
            else:
                spared += made.plan.tiles(number)
                hand_on(block, work.result, _counted(made, block, work.result, work.wanted))

    def write(work: Work, start: int, band: Array) -> None:
        assert isinstance(work, _BlockWork)  # noqa: S101 - works() makes no others
        lead = band.ndim - len(work.grid.axes)
        shape = (*band.shape[:lead], *work.grid.out_shape(0))
        if work.block.number not in values:
            values[work.block.number] = np.empty(shape, band.dtype)
        whole = values[work.block.number]
        whole[(slice(None),) * lead + (slice(start, start + band.shape[lead]),)] = band

    def done(work: Work, tally: Tally) -> None:
        assert isinstance(work, _BlockWork)  # noqa: S101 - works() makes no others
        result = values.pop(work.block.number)
        whole = _complete(made, work, result)
        if whole is not result:  # what was counted is not what is stored
            tally.labels = _counted(made, work.block, whole, work.wanted).labels
        hand_on(work.block, whole, tally)

    def told(now: int, _: int) -> None:
        if progress is not None:
            progress(done_tiles + now + spared, done_tiles + total)

    keeper = threading.Thread(target=keep, name="keep")
    keeper.start()
    try:
        report = run(
            made.engine, made.seen, works(), made.first, write, made.affines,
            batch=made.batch, threads=made.threads, total=total, progress=told, done=done, trace=trace, stop=stop,
        )  # fmt: skip
        if progress is not None:
            progress(done_tiles + total, done_tiles + total)  # the last tiles may have been spared
        queue.put(None)
    except Stop:  # the last blocks could not be kept
        if not errors:
            raise
    except BaseException:
        stop.set()
        raise
    finally:
        keeper.join()
    if errors:
        raise errors[0]
    return report


@dataclass(frozen=True)
class _Settled:
    """The result of a block that no tile is needed for, and where it is wanted."""

    result: Array
    wanted: Array | None


def _counted(made: Prepared, block: Block, result: Array, wanted: Array | None) -> Tally:
    """Labels of a block's result, those of pixels that are not wanted or hold no data left out."""
    tally = Tally(made.decision.channels)
    if made.decision.dtype == np.uint8:
        kept = list(set(made.decision.values))
        inside = slice(None) if wanted is None else _at_samples(made, block, wanted)
        for counts, labels in zip(tally.labels, result if made.decision.channels else result[None], strict=True):
            found = np.bincount(labels[inside].reshape(-1), minlength=256)
            counts[kept] += found[kept]
    return tally


def _work(made: Prepared, block: Block) -> _BlockWork | _Settled:
    """What is to be computed of a block, or its result where that is nothing."""
    wanted: Array | None = None
    if made.region is not None:
        plane = block.plane if made.region.planes > 1 else 0
        wanted = np.asarray(made.region.read(plane, block.start, block.stop).any(axis=0))
    valid: Array | None = made.image.valid(block.plane, block.start, block.stop)
    start, stop = block.start, block.stop
    if wanted is not None or valid is not None:
        both = np.ones((1,) * len(start), bool)
        for mask in (wanted, valid):
            both = both if mask is None else both & mask
        if not both.any():
            return _Settled(_marked(made, block, _outside(made, block), wanted, valid), wanted)
        ends = [np.flatnonzero(both.any(axis=tuple(j for j in range(both.ndim) if j != k))) for k in range(both.ndim)]
        start = tuple(a + int(e[0]) for a, e in zip(block.start, ends, strict=True))
        stop = tuple(a + int(e[-1]) + 1 for a, e in zip(block.start, ends, strict=True))
    samples = zip(made.samples(start), made.samples(stop), strict=True)
    if any(a >= b for a, b in samples):  # no sample lies at these pixels
        return _Settled(_marked(made, block, _outside(made, block), wanted, valid), wanted)
    grid = made.plan.grid.part(*made.plan.seen(start, stop))
    return _BlockWork(block.plane, grid, block, start, stop, wanted, valid)


def _outside(made: Prepared, block: Block) -> Array:
    """The result of a block where nothing is wanted: label 0, or NaN."""
    start, stop = made.place(block)
    lead = (made.decision.channels,) if made.decision.channels else ()
    shape = (*lead, *(b - a for a, b in zip(start, stop, strict=True)))
    return np.full(shape, made.decision.values[0] if made.decision.values else np.nan, made.decision.dtype)


def _complete(made: Prepared, work: _BlockWork, result: Array) -> Array:
    """A block's result from what the pipeline decided for its tiles."""
    if made.seen is not made.image:
        first, _ = made.plan.seen(work.start, work.stop)
        back = resample(result, first, work.start, work.stop, made.seen.shape, made.image.shape)
        result = back if made.first is made.decision else decided(back, made.decision, made.threads)
    if (work.start, work.stop) != (work.block.start, work.block.stop):
        whole, origin = _outside(made, work.block), made.place(work.block)[0]
        ends = zip(made.samples(work.start), made.samples(work.stop), origin, strict=True)
        lead = (slice(None),) * (whole.ndim - len(origin))
        whole[lead + tuple(slice(a - o, b - o) for a, b, o in ends)] = result
        result = whole
    return _marked(made, work.block, result, work.wanted, work.valid)


def _marked(made: Prepared, block: Block, result: Array, wanted: Array | None, valid: Array | None) -> Array:
    """The result with what is not wanted, and what is no data, overwritten."""
    if wanted is None and valid is None:
        return result
    result = result.copy()
    if wanted is not None:
        result[..., ~_at_samples(made, block, wanted)] = made.decision.values[0] if made.decision.values else np.nan
    if valid is not None:
        result[..., ~_at_samples(made, block, valid)] = made.nodata
    return result


def _at_samples(made: Prepared, block: Block, pixels: Array) -> Array:
    """A mask of a block's pixels at the samples of its result."""
    start, stop = made.place(block)
    for k, (a, b, first) in enumerate(zip(start, stop, block.start, strict=True)):
        if b - a != pixels.shape[k]:
            scale = made.plan.grid.outputs[0].field[k].scale
            index = np.array([int(j / scale) - first for j in range(a, b)])
            pixels = pixels.take(np.clip(index, 0, pixels.shape[k] - 1), axis=k)
    return pixels


def decided(values: Array, decision: Decision, threads: int = 0) -> Array:
    """(K, *spatial) float32 values to what a decision makes of them."""
    lead = () if decision.op == "argmax" else (max(decision.channels, 1),)
    out = np.empty((*lead, *values.shape[1:]), decision.dtype)
    zero = np.zeros((1, values.ndim - 1), np.int64)
    whole = Placement(zero, zero, np.array([values.shape[1:]], np.int64))
    calls.tile_stitch(np.ascontiguousarray(values[None]), whole, out, decision_operation(decision), threads=threads)
    return out[0] if decision.channels == 0 and out.ndim == values.ndim else out
