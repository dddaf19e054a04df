"""Bands of a result on their way from the device: stitched, copied by a stream of their own, written by a thread."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..kernels.memory import DeviceArray
from ..kernels.stream import Event
from ..tiling.stitch import uncovered_error
from .rows import Row
from .work import Array, Done, StoppableQueue, Work, Write, check_finite
from .workspace import Shared

BANDS = 3  # bands of the result: one stitched, one copied out, one counted and written


@dataclass
class Band:
    """A slot for one band of the result. ``memory`` is None where bands are stitched into the caller's array."""

    pinned: Array | None
    memory: DeviceArray | None
    done: Event  # it is stitched
    copied: Event  # it is on the host


@dataclass
class _Finished:
    """A band on its way out; ``pinned`` is None where nothing is copied to the host."""

    row: Row
    start: int
    rows: int
    band: Band
    pinned: Array | None


class Bands:
    """The bands of a run. ``finished`` counts the tiles whose bands were written."""

    def __init__(self, shared: Shared, counters: DeviceArray, write: Write | None, done: Done | None) -> None:
        """``counters``: (2, count): non-finite pixels, and samples in no tile, per row of tiles in turn."""
        self._shared, self._made, self._counters = shared, shared.computation, counters
        self._put, self._done = write, done
        self._decision, self._output = self._made.decision, self._made.output
        self._blended = shared.works[0].grid.blended
        self._real = self._made.source.dtype.kind == "f"  # integers are always finite
        self._counted = shared.workspace.pinned("counters", counters.shape, counters.dtype)
        self._free = StoppableQueue(BANDS, shared.stop)
        self._written = StoppableQueue(BANDS + 1, shared.stop)
        self.finished = 0
        self._allocate()

    def _allocate(self) -> None:
        sizes, workspace, dtype = [1], self._shared.workspace, self._decision.dtype
        for work in self._shared.distinct():
            for row in range(work.grid.shape[0]):
                start, stop = work.grid.band(row, self._output)
                sizes.append(prod(self._shape(work, stop - start)))
        shape = (max(sizes),)
        for k in range(min(BANDS, self._shared.rows)):
            pinned = None if self._put is None else workspace.pinned(f"band {k}", shape, dtype)
            memory = None if self._made.target is not None else workspace.empty(f"band {k}", shape, dtype)
            self._free.put(Band(pinned, memory, workspace.device.event(), workspace.device.event()))

    def _shape(self, work: Work, rows: int) -> tuple[int, ...]:
        """As the kernels take a band: without channel axis for argmax alone."""
        lead = () if self._decision.op == "argmax" else (max(self._decision.channels, 1),)
        return (*lead, rows, *work.grid.out_shape(self._output)[1:])

    def counter(self, kind: int, row: Row) -> DeviceArray | None:
        """Where the device counts a row's non-finite pixels (0) or samples in no tile (1); None where there are none."""
        if not (self._blended if kind else self._real):
            return None
        found: DeviceArray = self._counters[kind, row.counter : row.counter + 1]
        return found

    def open(self, row: Row, start: int, stop: int) -> DeviceArray:
        """Takes the next free slot; its last band was written, hence copied, hence nothing on the device uses it."""
        self._band: Band = self._free.get()
        if self._band.memory is not None:
            shape = self._shape(row.work, stop - start)
            self._view = self._band.memory[: prod(shape)].reshape(*shape)
        else:
            assert self._made.target is not None  # noqa: S101 - bands have memory, or there is a target
            rows = slice(start, stop)
            plane = self._made.target[row.work.plane]
            if self._decision.op != "argmax" and not self._decision.channels:
                plane = plane[None]
            self._view = plane[rows] if self._decision.op == "argmax" else plane[:, rows]
        view: DeviceArray = self._view
        return view

    def close(self, row: Row, start: int, stop: int) -> None:
        """Sends the band that was opened last on its way."""
        band, workspace = self._band, self._shared.workspace
        device, out = workspace.device, workspace.copy_out
        self._shared.session.stream.record(band.done)
        out.wait(band.done)
        pinned = None
        if band.pinned is not None and self._view.size:
            pinned = band.pinned[: self._view.size].reshape(self._view.shape)
            if self._view.contiguous:
                device.copy_out(pinned, self._view, out)
            else:
                for k in range(len(pinned)):
                    device.copy_out(pinned[k], self._view[k], out)
        for kind in (0, 1):
            counter = self.counter(kind, row)
            if counter is not None:
                device.copy_out(self._counted[kind, row.counter : row.counter + 1], counter, out)
        out.record(band.copied)
        self._written.put(_Finished(row, start, stop - start, band, pinned))

    def end(self) -> None:
        """No bands follow."""
        self._written.put(None)

    def write(self) -> None:
        """Counts and hands on finished bands, in a thread of its own."""
        spatial = len(self._made.source.shape)
        for item in self._written:
            item.band.copied.synchronize()
            self._check(item)
            band, row = item.pinned, item.row
            with self._shared.clock("write"):
                if band is not None and self._put is not None:
                    if self._decision.channels == 0 and band.ndim > spatial:
                        band = band[0]
                    row.tally.count(band, self._decision)
                    self._put(row.work, item.start, band)
                if row.row == row.work.grid.shape[0] - 1:
                    self._shared.seen.end(row.tally)
                    if self._done is not None:
                        self._done(row.work, row.tally)
            self.finished += len(row.index)
            self._free.put(item.band)

    def _check(self, item: _Finished) -> None:
        """Raises for what the device counted in a row of tiles."""
        row = item.row
        if self._real:
            check_finite(int(self._counted[0, row.counter]), self._made.source, row.work.plane, row.rows)
        bare = int(self._counted[1, row.counter]) if self._blended else 0
        if bare:
            raise uncovered_error(bare, item.start, item.start + item.rows)
