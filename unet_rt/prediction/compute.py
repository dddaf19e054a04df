"""Blocks of a result through one pipeline, each to a store: so a run can be killed and go on, and several share one.

The pipeline does not drain between blocks. Where bands are a block's result as they are, they go straight to the store; else
a thread of its own keeps blocks that are finished. Where only a region is wanted, or parts of the image hold no data,
tiles that nothing is wanted of are not run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np

from ..kernels import calls
from ..kernels.memory import DeviceArray
from ..kernels.request import Placement
from ..tiling.decision import Decision, decision_operation
from ..tiling.grid import TileGrid
from ..tiling.resample import resample
from .blocks import Block
from .plan import Plan
from .report import RunReport, class_share
from .run import run, with_smaller_tiles
from .store import Rows
from .work import UNSEEN, Array, Done, Observer, Stop, StoppableQueue, Tally, Work, Write

# (block, its part of the result: (K, *spatial) or (*spatial,), what was counted)
Put = Callable[[Block, Array, Tally], None]


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
    plan: Plan,
    numbers: Sequence[int],
    put: Put | None,
    *,
    rows: Rows | None = None,
    target: DeviceArray | None = None,
    done_tiles: int = 0,
    observer: Observer = UNSEEN,
) -> RunReport:
    """Computes blocks, in the order given.

    Where a GPU's memory does not hold the tiles, smaller ones fill the same blocks with the same result: nobody who works
    on other blocks of it needs to know. (Neighbouring blocks may then have some tiles in common, which are run for both.)

    Args:
        plan: The result.
        numbers: Of the blocks.
        put: Keeps a block; called from one thread. None: ``rows`` takes the bands of a plain plan.
        rows: Takes bands of blocks as they are finished, from top to bottom; called from one thread. None, without
            ``put``: nothing is copied to the host, and labels are not counted.
        target: Where the planes of a result go that stays on a GPU.
        done_tiles: Tiles that need not be run any more, for the progress.
        observer: Who is told how it goes on.
    """
    kept = _Kept(Tally(plan.decision.channels))

    def attempt(grid: TileGrid, batch: int) -> RunReport:
        now = plan
        if grid is not plan.blocks.grid or batch != plan.batch:
            now = replace(plan, blocks=replace(plan.blocks, grid=grid), batch=batch)
        left = [number for number in numbers if number not in kept.numbers]
        before = done_tiles + sum(now.blocks.tiles(number) for number in kept.numbers)
        tried = _Attempt(now, left, kept, before, observer)
        return tried.stream(rows, target) if put is None else tried.keep(put)

    aligned = not plan.blocks.whole
    report = with_smaller_tiles(
        plan.engine, plan.blocks.grid, plan.batch, attempt, asked=plan.fixed_tile, aligned=aligned
    )
    report.class_share = class_share(kept.tally, plan.decision, plan.contract)
    return report


class _Kept:
    """Numbers of the blocks that were kept, and what was counted of them."""

    def __init__(self, tally: Tally) -> None:
        self.numbers, self.tally = set[int](), tally

    def add(self, block: Block, tally: Tally) -> None:
        self.numbers.add(block.number)
        self.tally.add(tally)


class _Attempt:
    """Blocks with the tiles of their plan.

    Both ways raise TileMemoryError where no tile was run yet: all that was kept are blocks that need none.
    """

    def __init__(self, plan: Plan, numbers: Sequence[int], kept: _Kept, done_tiles: int, observer: Observer) -> None:
        self._plan, self._numbers, self._kept = plan, numbers, kept
        self._done_tiles, self._observer = done_tiles, observer
        self._total = sum(map(plan.blocks.tiles, numbers))
        self._spared = 0  # tiles that nothing is wanted of
        self._stop = threading.Event()
        self._values: dict[int, Array] = {}

    def stream(self, rows: Rows | None, target: DeviceArray | None) -> RunReport:
        """Hands bands on as they are."""

        def write(work: Work, start: int, band: Array) -> None:
            assert isinstance(work, _BlockWork) and rows is not None  # noqa: S101, PT018 - as below
            rows(work.block, start, band)

        return self._run(None if rows is None else write, self._count, lambda *_: None, target)

    def keep(self, put: Put) -> RunReport:
        """Puts blocks together from their bands, and keeps them: in this thread where there is but one tile."""

        def settle(block: Block, values: Array, tally: Tally) -> None:
            put(block, values, tally)
            self._kept.add(block, tally)

        keeper: AbstractContextManager[Put] = nullcontext(settle)
        if self._total > 1:
            keeper = _Keeper(settle, self._stop)
        with keeper as hand_on:

            def done(work: Work, tally: Tally) -> None:
                assert isinstance(work, _BlockWork)  # noqa: S101 - _works() makes no others
                result = self._values.pop(work.block.number)
                whole = _complete(self._plan, work, result)
                if whole is not result:  # what was counted is not what is stored
                    tally.labels = _counted(self._plan, work.block, whole, work.wanted).labels
                hand_on(work.block, whole, tally)

            report = self._run(self._collect, done, hand_on)
            if self._spared and self._observer.progress is not None:
                whole = self._done_tiles + self._total
                self._observer.progress(whole, whole)  # the last tiles may have been spared
        return report

    def _run(self, write: Write | None, done: Done, settle: Put, target: DeviceArray | None = None) -> RunReport:
        return run(
            self._plan.computation(target),
            self._works(settle),
            write,
            done=done,
            observer=Observer(self._tell, self._observer.trace, self._observer.counts),
            total=self._total,
            stop=self._stop,
        )

    def _works(self, settle: Put) -> Iterator[Work]:
        """What is to be computed; blocks that need no tile are settled on the way."""
        for number in self._numbers:
            if self._stop.is_set():
                return
            block = self._plan.blocks.block(number)
            work = _work(self._plan, block)
            if isinstance(work, _BlockWork):
                self._spared += self._plan.blocks.tiles(number) - work.grid.count
                yield work
            else:
                self._spared += self._plan.blocks.tiles(number)
                settle(block, work.result, _counted(self._plan, block, work.result, work.wanted))

    def _collect(self, work: Work, start: int, band: Array) -> None:
        assert isinstance(work, _BlockWork)  # noqa: S101 - _works() makes no others
        lead = band.ndim - len(work.grid.axes)
        shape = (*band.shape[:lead], *work.grid.out_shape(self._plan.output))
        if work.block.number not in self._values:
            self._values[work.block.number] = np.empty(shape, band.dtype)
        whole = self._values[work.block.number]
        whole[(slice(None),) * lead + (slice(start, start + band.shape[lead]),)] = band

    def _count(self, work: Work, tally: Tally) -> None:
        assert isinstance(work, _BlockWork)  # noqa: S101 - _works() makes no others
        self._kept.add(work.block, tally)

    def _tell(self, now: int, _: int) -> None:
        if self._observer.progress is not None:
            self._observer.progress(self._done_tiles + now + self._spared, self._done_tiles + self._total)


class _Keeper:
    """Keeps finished blocks in a thread of its own while others are computed."""

    def __init__(self, settle: Put, stop: threading.Event) -> None:
        self._settle, self._stop = settle, stop
        self._queue = StoppableQueue(1, stop)
        self._errors = list[BaseException]()
        self._thread = threading.Thread(target=self._keep, name="keep")

    def _keep(self) -> None:
        try:
            for item in self._queue:
                self._settle(*item)
        except Stop:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the pipeline, which raises it
            self._errors.append(error)
            self._stop.set()

    def _put(self, block: Block, values: Array, tally: Tally) -> None:
        try:
            self._queue.put((block, values, tally))
        except Stop:
            raise self._errors[0] if self._errors else Stop from None

    def __enter__(self) -> Put:
        self._thread.start()
        return self._put

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._queue.put(None)
            else:
                self._stop.set()
        except Stop:  # the last blocks could not be kept
            if not self._errors:
                raise
        finally:
            self._thread.join()
        if self._errors and (kind is None or issubclass(kind, Stop)):
            raise self._errors[0]


@dataclass(frozen=True)
class _Settled:
    """The result of a block that no tile is needed for, and where it is wanted."""

    result: Array
    wanted: Array | None


def _counted(plan: Plan, block: Block, result: Array, wanted: Array | None) -> Tally:
    """Labels of a block's result, those of pixels that are not wanted or hold no data left out."""
    tally = Tally(plan.decision.channels)
    if plan.decision.dtype == np.uint8:
        kept = list(set(plan.decision.values))
        inside = slice(None) if wanted is None else _at_samples(plan, block, wanted)
        for counts, labels in zip(tally.labels, result if plan.decision.channels else result[None], strict=True):
            found = np.bincount(labels[inside].reshape(-1), minlength=256)
            counts[kept] += found[kept]
    return tally


def _work(plan: Plan, block: Block) -> _BlockWork | _Settled:
    """What is to be computed of a block, or its result where that is nothing."""
    if plan.plain and plan.blocks.whole:
        return _BlockWork(block.plane, plan.blocks.grid, block, block.start, block.stop, None, None)
    wanted: Array | None = None
    if plan.region is not None:
        plane = block.plane if plan.region.planes > 1 else 0
        wanted = np.asarray(plan.region.read(plane, block.start, block.stop).any(axis=0))
    valid: Array | None = plan.image.valid(block.plane, block.start, block.stop)
    start, stop = block.start, block.stop
    if wanted is not None or valid is not None:
        both = np.ones((1,) * len(start), bool)
        for mask in (wanted, valid):
            both = both if mask is None else both & mask
        if not both.any():
            return _Settled(_marked(plan, block, _outside(plan, block), wanted, valid), wanted)
        ends = [np.flatnonzero(both.any(axis=tuple(j for j in range(both.ndim) if j != k))) for k in range(both.ndim)]
        start = tuple(a + int(e[0]) for a, e in zip(block.start, ends, strict=True))
        stop = tuple(a + int(e[-1]) + 1 for a, e in zip(block.start, ends, strict=True))
    samples = zip(plan.samples(start), plan.samples(stop), strict=True)
    if any(a >= b for a, b in samples):  # no sample lies at these pixels
        return _Settled(_marked(plan, block, _outside(plan, block), wanted, valid), wanted)
    grid = plan.blocks.grid.part(*plan.blocks.seen(start, stop))
    return _BlockWork(block.plane, grid, block, start, stop, wanted, valid)


def _outside(plan: Plan, block: Block) -> Array:
    """The result of a block where nothing is wanted: label 0, or NaN."""
    start, stop = plan.place(block)
    lead = (plan.decision.channels,) if plan.decision.channels else ()
    shape = (*lead, *(b - a for a, b in zip(start, stop, strict=True)))
    return np.full(shape, plan.decision.values[0] if plan.decision.values else np.nan, plan.decision.dtype)


def _complete(plan: Plan, work: _BlockWork, result: Array) -> Array:
    """A block's result from what the pipeline decided for its tiles."""
    if plan.seen is not plan.image:
        first, _ = plan.blocks.seen(work.start, work.stop)
        back = resample(result, first, work.start, work.stop, plan.seen.shape, plan.image.shape)
        result = back if plan.first is plan.decision else apply_decision(back, plan.decision, plan.threads)
    if (work.start, work.stop) != (work.block.start, work.block.stop):
        whole, origin = _outside(plan, work.block), plan.place(work.block)[0]
        ends = zip(plan.samples(work.start), plan.samples(work.stop), origin, strict=True)
        lead = (slice(None),) * (whole.ndim - len(origin))
        whole[lead + tuple(slice(a - o, b - o) for a, b, o in ends)] = result
        result = whole
    return _marked(plan, work.block, result, work.wanted, work.valid)


def _marked(plan: Plan, block: Block, result: Array, wanted: Array | None, valid: Array | None) -> Array:
    """The result with what is not wanted, and what is no data, overwritten."""
    if wanted is None and valid is None:
        return result
    result = result.copy()
    if wanted is not None:
        result[..., ~_at_samples(plan, block, wanted)] = plan.decision.values[0] if plan.decision.values else np.nan
    if valid is not None:
        result[..., ~_at_samples(plan, block, valid)] = plan.nodata
    return result


def _at_samples(plan: Plan, block: Block, pixels: Array) -> Array:
    """A mask of a block's pixels at the samples of its result."""
    start, stop = plan.place(block)
    for k, (a, b, first) in enumerate(zip(start, stop, block.start, strict=True)):
        if b - a != pixels.shape[k]:
            scale = plan.blocks.grid.outputs[plan.output].field[k].scale
            index = np.array([int(j / scale) - first for j in range(a, b)])
            pixels = pixels.take(np.clip(index, 0, pixels.shape[k] - 1), axis=k)
    return pixels


def apply_decision(values: Array, decision: Decision, threads: int = 0) -> Array:
    """(K, *spatial) float32 values to what a decision makes of them."""
    lead = () if decision.op == "argmax" else (max(decision.channels, 1),)
    out = np.empty((*lead, *values.shape[1:]), decision.dtype)
    zero = np.zeros((1, values.ndim - 1), np.int64)
    whole = Placement(zero, zero, np.array([values.shape[1:]], np.int64))
    calls.tile_stitch(np.ascontiguousarray(values[None]), whole, out, decision_operation(decision), threads=threads)
    return out[0] if decision.channels == 0 and out.ndim == values.ndim else out
