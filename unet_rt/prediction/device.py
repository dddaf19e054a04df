"""The image line on a GPU: bands of the image go in, bands of the result come out, all between stays on the device.

Three streams work at once: one copies the image's rows in, the session's gathers, infers and stitches, one copies
finished bands out; events between them say what waits for what. Two threads of the host feed them: one reads rows into
page-locked memory, one counts and writes bands; the caller's thread enqueues. Tiles run in batches of one size, which may
span rows of tiles and planes; only the last may be short, and what it computes beside is dropped. Buffers are rings of a
fixed number of slots, so that memory does not grow with the image; they are kept beside the session for the next one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, DeviceMemoryError, ImageError, TileMemoryError
from ..images.normalize import grey_levels
from ..kernels import calls
from ..kernels.memory import DeviceArray, MemoryContext, memory_behind
from ..kernels.request import Frame, Ints, Placement
from ..tiling.decision import Decision, decision_operation
from ..tiling.stitch import blend_weight, uncovered_error
from .report import Seen
from .work import StageClock, Stop, StoppableQueue, Work, check_image, filled, fresh

if TYPE_CHECKING:
    from ..backends.session import DeviceSession
    from ..engine.engine import Engine
    from ..engine.spec import EngineSpec
    from ..images.normalize import Affines, OnePlane
    from ..images.source import Source
    from ..kernels.request import Affine
    from ..kernels.stream import Event
    from .report import RunReport
    from .work import Done, Progress, Tally, Write


Array = npt.NDArray[Any]

WINDOWS = 3  # rows of tiles whose pixels are on the device: one computed from, one there, one on its way
BANDS = 3  # bands of the result: one stitched, one copied out, one counted and written
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16))


def serves(engine: Engine, output: int = 0) -> bool:
    """Whether an engine's tiles can be filled and read on its device: it has one, and its dtypes are the kernels'."""
    session = engine.device_session
    return (
        session is not None
        and all(dtype in _FLOATS for dtype in session.input_dtypes)
        and session.output_dtypes[output] in _FLOATS
    )


def run(
    engine: Engine,
    source: Source,
    works: Sequence[Work],
    decision: Decision,
    write: Write | None,
    affines: Affines | OnePlane,
    *,
    output: int = 0,
    batch: int = 1,
    total: int | None = None,
    progress: Progress | None = None,
    done: Done | None = None,
    target: DeviceArray | None = None,
) -> RunReport:
    """Runs works on the engine's device, as :func:`unet_rt.prediction.host.run` does on the host.

    Args:
        engine: One that this module :func:`serves`.
        source: The image, on the host or on the engine's device.
        works: What is to be computed. Their grids are parts of one: tiles of one size.
        decision: What becomes of output ``output``.
        write: As for :func:`unet_rt.prediction.host.run`. None: nothing is copied to the host, labels are not counted.
        affines: The image's normalisation in numbers.
        output: Which output of the graph.
        batch: Tiles per run; fewer where the device's memory does not hold them, which a note of the report says.
        total: Tiles in all, where the works are some of those of a result: batches have one size for all of it.
        progress: Called from the caller's thread with (tiles done, tiles in all).
        done: As for :func:`unet_rt.prediction.host.run`.
        target: (planes, [K,] *spatial) on the device, filled by works that are whole planes; it may have no other user
            until this function returns.

    The report's ``stages`` gather, infer and stitch are seconds on the device. Of an image on the device the pixels
    outside the value range are not counted.

    Raises:
        TileMemoryError: The device's memory does not hold the fewest tiles that the engine runs at once.
        ImageError, BackendError: see their messages.
    """
    session = engine.device_session
    if session is None or not serves(engine, output):
        raise BackendError(
            f"the engine's tiles ({engine.spec.device}) cannot be filled on a GPU; build it again with --device cuda"
        )
    workspace = _workspace(session)
    with workspace.lock:
        tiles = sum(work.grid.count for work in works)
        size, notes = engine.batch_for(min(batch, total or tiles)), list[str]()
        held = session.held_bytes  # for the shapes of earlier predictions
        while True:
            job = _Job(
                engine, session, workspace, source, works, decision, write, affines, output, size, tiles, done, target
            )
            try:
                with workspace.device.activate():  # for the kernels, too, whichever device it is
                    report = job.run(progress)
                report.notes.extend(notes)
                return report
            except DeviceMemoryError as error:
                if job.begun:
                    raise
                workspace.free()
                session.give_back()
                if held:
                    held = 0
                    continue
                less = engine.fewer(size)
                if less == size:
                    raise TileMemoryError(str(error), size) from error
                notes = [f"{error}; {less} tiles per run instead of {size}"]
                size = less
            finally:
                workspace.trim()


def free_bytes(engine: Engine) -> int | None:
    """Memory of the engine's GPU for running tiles; None on a CPU.

    What is free, and what session and buffers hold from earlier predictions: the next one uses or frees that.
    """
    session = engine.gpu_session
    if session is None:
        return None
    workspace = _WORKSPACES.get(session)
    return session.stream.device.memory()[0] + session.held_bytes + (workspace.held_bytes if workspace else 0)


# --- memory kept from one prediction to the next --------------------------------------------------------------------


class _Workspace:
    """Streams and buffers of one session. Buffers are found by name and replaced when they are too small."""

    def __init__(self, device: MemoryContext) -> None:
        self.device = device
        self.lock = threading.Lock()  # one prediction at a time
        self.copy_in = device.stream()
        self.copy_out = device.stream()
        self._on_device: dict[str, DeviceArray] = {}
        self._pinned: dict[str, Array] = {}
        self._used: set[str] = set()

    @property
    def held_bytes(self) -> int:
        """Of the device's memory."""
        return sum(held.nbytes for held in list(self._on_device.values()))

    def empty(self, name: str, shape: Sequence[int], dtype: npt.DTypeLike) -> DeviceArray:
        """Device memory, C-contiguous; what it held before is of no meaning."""
        kind = np.dtype(dtype)
        size = _room(prod(shape) * kind.itemsize)
        self._used.add(name)
        held = self._on_device.get(name)
        if held is None or held.nbytes < size:
            if held is not None:
                del self._on_device[name]
                held.free()
            held = self._on_device[name] = self.device.empty((size,), np.uint8)
        return DeviceArray(self.device, held.pointer, shape, kind, owner=held)

    def pinned(self, name: str, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Page-locked host memory."""
        kind = np.dtype(dtype)
        size = prod(shape) * kind.itemsize
        self._used.add(name)
        held = self._pinned.get(name)
        if held is None or held.nbytes < size:
            self._pinned.pop(name, None)
            held = None
            held = self._pinned[name] = self.device.pinned((_room(size),), np.uint8)
        return held[:size].view(kind).reshape(tuple(shape))

    def trim(self) -> None:
        """Frees what the last prediction did not use: another network output, another kind of image."""
        for name in set(self._on_device) - self._used:
            self._on_device.pop(name).free()
        for name in set(self._pinned) - self._used:
            del self._pinned[name]
        self._used.clear()

    def free(self) -> None:
        self._used.clear()
        self.trim()


def _room(size: int) -> int:
    return max(256, -(-size // 256) * 256)


_WORKSPACES: WeakKeyDictionary[Any, _Workspace] = WeakKeyDictionary()
_MAKING = threading.Lock()


def _workspace(session: DeviceSession) -> _Workspace:
    with _MAKING:
        found = _WORKSPACES.get(session)
        if found is None:
            found = _WORKSPACES[session] = _Workspace(memory_behind(session.stream))
            session.at_close(found.free)
        return found


# --- one prediction -------------------------------------------------------------------------------------------------


@dataclass
class _Window:
    """A slot for the pixels of one row of tiles, on both sides of the bus."""

    pinned: Array
    memory: DeviceArray
    copied: Event  # the pixels are on the device; the pinned memory may be filled again
    read: Event  # all tiles were gathered; the device's memory may be filled again


@dataclass
class _Band:
    """A slot for one band of the result. ``memory`` is None where bands are stitched into the caller's array."""

    pinned: Array | None
    memory: DeviceArray | None
    done: Event  # it is stitched
    copied: Event  # it is on the host


@dataclass
class _Row:
    """One row of tiles with its pixels."""

    work: Work
    tally: Tally
    row: int
    index: Ints
    origins: Ints
    numbers: Affine
    pixels: DeviceArray  # (C, *spatial)
    start: tuple[int, ...]  # the pixels' place in the image
    rows: tuple[int, int]  # image rows that it reads, for messages
    counter: int  # which of the counters counts its non-finite pixels
    window: _Window | None = None


@dataclass
class _Piece:
    """Tiles of one row inside a batch."""

    row: _Row
    first: int  # in the row's index
    count: int
    at: int  # in the batch

    @property
    def begins(self) -> bool:
        return self.first == 0

    @property
    def ends(self) -> bool:
        return self.first + self.count == len(self.row.index)


@dataclass
class _Finished:
    """A band on its way out; ``pinned`` is None where nothing is copied to the host."""

    row: _Row
    start: int
    rows: int
    band: _Band
    pinned: Array | None


class _Job:
    """The state of one run."""

    def __init__(
        self,
        engine: Engine,
        session: DeviceSession,
        workspace: _Workspace,
        source: Source,
        works: Sequence[Work],
        decision: Decision,
        write: Write | None,
        affines: Affines | OnePlane,
        output: int,
        batch: int,
        total: int,
        done: Done | None,
        target: DeviceArray | None,
    ) -> None:
        self.engine, self.session, self.workspace, self.source, self.works = engine, session, workspace, source, works
        self.grid = works[0].grid  # all have its tiles and outputs
        self.spec: EngineSpec = engine.spec
        self.decision, self.write, self.affines, self.output, self.target = decision, write, affines, output, target
        self.operation = decision_operation(decision)
        self.device, self.compute = workspace.device, session.stream
        self.total, self.done = total, done
        self.batch = batch
        self.begun = False  # whether anything was read, run or written
        self.clock = StageClock()
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.seen = Seen(decision)
        self._looked = 0  # rows of the image that were looked at already, of the work that is read
        self.finished = 0  # tiles whose bands were written
        self.real = source.dtype.kind == "f"  # integers are always finite
        self.border = self.spec.contract.border or "mirror"

    # --- before ---------------------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """All memory of the run, before any of it is used."""
        grid, device, take = self.grid, self.device, self.workspace
        shapes = [_graph_shape(i.axes, self.batch, i.channels, grid.tile) for i in self.spec.inputs]
        out_shapes = self.session.output_shapes(shapes)
        self.inputs = [
            take.empty(f"input {k}", shape, dtype)
            for k, (shape, dtype) in enumerate(zip(shapes, self.session.input_dtypes, strict=True))
        ]
        self.outputs = [
            take.empty(f"output {k}", shape, dtype)
            for k, (shape, dtype) in enumerate(zip(out_shapes, self.session.output_dtypes, strict=True))
        ]
        if len(self.outputs) != len(self.spec.outputs):
            raise BackendError(
                f"the engine returned {len(self.outputs)} outputs, and its spec names {len(self.spec.outputs)}; "
                "build it again"
            )
        self.tiles_in = [_batch_first(x, i.axes) for x, i in zip(self.inputs, self.spec.inputs, strict=True)]
        self.tiles_out = _batch_first(self.outputs[self.output], self.spec.outputs[self.output].axes)
        expected = grid.tile_out_shape(self.output)
        if self.tiles_out.shape[2:] != expected:
            raise BackendError(
                f"the engine returned {self.tiles_out.shape[2:]} samples for a tile of {grid.tile}, and the graph "
                f"says {expected}; the engine does not belong to its spec: build it again"
            )
        # Rows of tiles under way: those that a batch spans, those whose bands are not written, those that are read. A
        # counter is used again as it is: what is not 0 ends the run.
        count = self.batch + BANDS + WINDOWS + 2
        self.counters = take.empty("counters", (2, count), np.uint64)  # non-finite pixels; samples in no tile
        self.counted = take.pinned("counters", (2, count), np.uint64)
        self.counter_count = count
        self.windows: list[_Window] = []
        self.whole: DeviceArray | None = None
        if self.source.on_device:
            self.compute.after(self.source.stream)
        else:
            self._allocate_windows()
        self._allocate_bands()
        for memory in (*self.inputs, self.counters):
            device.zero(
                memory, self.compute
            )  # the rest of a short batch is computed, too: no accidental NaN or garbage

    def _allocate_windows(self) -> None:
        source, sizes = self.source, [1]
        for work in self._distinct():
            for row in range(work.grid.shape[0]):
                start, stop = work.grid.window(work.grid.row(row), self.border)
                sizes.append(prod(b - a for a, b in zip(start, stop, strict=True)))
        shape = (source.channels, max(sizes))
        for k in range(min(WINDOWS, sum(work.grid.shape[0] for work in self.works))):
            self.windows.append(
                _Window(
                    self.workspace.pinned(f"window {k}", (prod(shape),), source.dtype),
                    self.workspace.empty(f"window {k}", (prod(shape),), source.dtype),
                    self.device.event(),
                    self.device.event(),
                )
            )

    def _allocate_bands(self) -> None:
        decision, sizes = self.decision, [1]
        for work in self._distinct():
            for row in range(work.grid.shape[0]):
                start, stop = work.grid.band(row, self.output)
                sizes.append(prod(self._band_shape(work, stop - start)))
        shape = (max(sizes),)
        self.bands = [
            _Band(
                None if self.write is None else self.workspace.pinned(f"band {k}", (prod(shape),), decision.dtype),
                None if self.target is not None else self.workspace.empty(f"band {k}", (prod(shape),), decision.dtype),
                self.device.event(),
                self.device.event(),
            )
            for k in range(min(BANDS, sum(work.grid.shape[0] for work in self.works)))
        ]
        self.blend = _Blend(self) if self.grid.blended else None

    def _distinct(self) -> list[Work]:
        """One work for each grid: all planes of a stack have the same."""
        return list({id(work.grid): work for work in self.works}.values())

    def _band_shape(self, work: Work, rows: int) -> tuple[int, ...]:
        """As the kernels take a band: without channel axis for argmax alone."""
        lead = () if self.decision.op == "argmax" else (max(self.decision.channels, 1),)
        return (*lead, rows, *work.grid.out_shape(self.output)[1:])

    # --- the run --------------------------------------------------------------------------------------------------

    def run(self, progress: Progress | None) -> RunReport:
        begun = time.perf_counter()
        self._timings: deque[tuple[Event, ...]] = deque()
        self._spare: list[tuple[Event, ...]] = []
        workers: list[threading.Thread] = []
        try:
            self._allocate()
            self.begun = True
            self.rows: StoppableQueue = StoppableQueue(WINDOWS, self.stop)
            self.free_windows: StoppableQueue = StoppableQueue(WINDOWS, self.stop)
            self.free_bands: StoppableQueue = StoppableQueue(BANDS, self.stop)
            self.written: StoppableQueue = StoppableQueue(BANDS + 1, self.stop)
            for window in self.windows:
                self.free_windows.put(window)
            for band in self.bands:
                self.free_bands.put(band)
            for name, work in (("read", self._read), ("write", self._write)):
                if name == "write" or not self.source.on_device:
                    workers.append(threading.Thread(target=self._guarded(work), name=name))
                    workers[-1].start()
            self._progress, self._told = progress, -1
            self._tell()
            self._enqueue()
            self.written.put(None)
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.02)
                    self._tell()
        except Stop:
            pass
        except BaseException:
            self.stop.set()
            raise
        finally:
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            self._drain(failed=self.stop.is_set())
        if self.errors:
            raise self.errors[0]
        self._tell()
        while self._timings:
            self._account(self._timings.popleft())
        return self.seen.report(self.spec, self.source, self.output, self.batch, begun, self.clock)

    def _drain(self, *, failed: bool) -> None:
        """Waits for all streams: nothing may use the buffers, or the caller's arrays, any more."""
        for stream in (self.workspace.copy_in, self.compute, self.workspace.copy_out):
            try:
                stream.synchronize()
            except BackendError as error:
                if not failed:
                    self.errors.append(error)

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def body() -> None:
            try:
                self.device.bear_captures()  # the session may record its launches while this thread waits
                work()
            except Stop:
                pass
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
                self.errors.append(error)
                self.stop.set()

        return body

    def _tell(self) -> None:
        if self._progress is not None and self.finished != self._told:
            self._told = self.finished
            self._progress(self._told, self.total)

    # --- reading: a thread of its own -----------------------------------------------------------------------------

    def _read(self) -> None:
        stream = self.workspace.copy_in
        for row in self._planned():
            work, (start, stop) = row.work, row.work.grid.window(row.index, self.border)
            window = row.window = self.free_windows.get()
            with self.clock("read"):
                pixels = filled(*self.source.read_valid(work.plane, start, stop), row.numbers)
                seen = self.spec.input_range
                levels = None if seen is None else grey_levels(seen, row.numbers)
                row.tally.watch(fresh(pixels, start, work.grid, self._looked), levels)
                self._looked = max(self._looked, stop[0])
                window.copied.synchronize()  # the last copy out of this memory is over
                placed, packed, row.pixels = _packed(pixels, window.pinned, window.memory)
                np.copyto(placed, pixels[:1] if placed.shape[0] != pixels.shape[0] else pixels)
            stream.wait(window.read)
            if packed.nbytes:
                self.device.copy_in(window.memory[: packed.size], packed, stream)
            stream.record(window.copied)
            row.start, row.rows = start, (start[0], stop[0])
            self.rows.put(row)
        self.rows.put(None)

    def _planned(self) -> Iterator[_Row]:
        """All rows of tiles; their pixels are yet to come."""
        number, nothing = 0, self.counters[0, :0]
        for work in self.works:
            check_image(work, self.source)
            numbers, tally = self.affines.plane(work.plane), self.seen.begin(work)
            self._looked = 0
            for row in range(work.grid.shape[0]):
                index = work.grid.row(row)
                start = tuple(0 for _ in self.source.shape)
                yield _Row(
                    work, tally, row, index, work.grid.origins(index), numbers, nothing, start, (0, 0),
                    number % self.counter_count,
                )  # fmt: skip
                number += 1

    def _rows(self) -> Iterator[_Row]:
        """Rows of tiles whose pixels are on the device, or will be there when the stream gets to them."""
        if not self.source.on_device:
            yield from self.rows
            return
        for row in self._planned():
            start, stop = row.work.grid.window(row.index, self.border)
            row.pixels, row.rows = self.source.device_plane(row.work.plane), (start[0], stop[0])
            yield row

    # --- computing: the caller's thread ---------------------------------------------------------------------------

    def _enqueue(self) -> None:
        held, pieces = 0, list[_Piece]()
        for row in self._rows():
            if self.stop.is_set():
                raise Stop
            if row.window is not None:
                self.compute.wait(row.window.copied)
            first = 0
            while first < len(row.index):
                piece = _Piece(row, first, min(self.batch - held, len(row.index) - first), held)
                if not held:
                    self._begin_timing()
                self._gather(piece)
                pieces.append(piece)
                first, held = first + piece.count, held + piece.count
                if first == len(row.index) and row.window is not None:
                    self.compute.record(row.window.read)
                    self.free_windows.put(row.window)
                if held == self.batch:
                    self._flush(pieces)
                    held, pieces = 0, []
        if held:
            self._flush(pieces)

    def _gather(self, piece: _Piece) -> None:
        row, numbers, first = piece.row, piece.row.numbers, 0
        part = slice(piece.first, piece.first + piece.count)
        for tiles, given in zip(self.tiles_in, self.spec.inputs, strict=True):
            channels = slice(first, first + given.channels)
            first += given.channels
            calls.tile_gather(
                row.pixels[channels],
                row.origins[part],
                tiles[piece.at : piece.at + piece.count],
                frame=Frame(self.source.shape, row.start, self.border),
                affine=replace(numbers, offset=numbers.offset[channels], divisor=numbers.divisor[channels]),
                stream=self.compute.handle,
                non_finite=self._counter(0, row.counter) if self.real else None,
            )

    def _flush(self, pieces: list[_Piece]) -> None:
        """Runs a batch and stitches what it holds."""
        self._mark(1)
        self.session.run_device(self.inputs, self.outputs)
        self._mark(2)
        for piece in pieces:
            self._stitch(piece)
        self._mark(3)
        self._tell()

    def _stitch(self, piece: _Piece) -> None:
        row = piece.row
        tiles = self.tiles_out[piece.at : piece.at + piece.count]
        place = row.work.grid.placement(row.index[piece.first : piece.first + piece.count], self.output)
        start, stop = row.work.grid.band(row.row, self.output)
        if self.blend is not None:
            if row.row == 0 and piece.begins:
                self.blend.begin(row.work)
            self.blend.add(tiles, place)
        else:
            if piece.begins:
                self._open_band(row, start, stop)
            calls.tile_stitch(tiles, place.from_row(start), self._view, self.operation, stream=self.compute.handle)
        if piece.ends:
            if self.blend is not None:
                self._open_band(row, start, stop)
                self.blend.finish(self._view, start, stop, self._counter(1, row.counter))
            self._close_band(row, start, stop)

    def _open_band(self, row: _Row, start: int, stop: int) -> None:
        """Takes the next free slot; its last band was written, hence copied, hence nothing on the device uses it."""
        self._band: _Band = self.free_bands.get()
        if self._band.memory is not None:
            shape = self._band_shape(row.work, stop - start)
            self._view = self._band.memory[: prod(shape)].reshape(*shape)
        else:
            assert self.target is not None  # noqa: S101 - bands have memory, or there is a target
            rows = slice(start, stop)
            plane = self.target[row.work.plane]
            if self.decision.op != "argmax" and not self.decision.channels:
                plane = plane[None]
            self._view = plane[rows] if self.decision.op == "argmax" else plane[:, rows]

    def _close_band(self, row: _Row, start: int, stop: int) -> None:
        band, out = self._band, self.workspace.copy_out
        self.compute.record(band.done)
        out.wait(band.done)
        pinned = None
        if band.pinned is not None and self._view.size:
            pinned = band.pinned[: self._view.size].reshape(self._view.shape)
            if self._view.contiguous:
                self.device.copy_out(pinned, self._view, out)
            else:
                for k in range(len(pinned)):
                    self.device.copy_out(pinned[k], self._view[k], out)
        for kind in self._counting():
            self.device.copy_out(
                self.counted[kind, row.counter : row.counter + 1], self._counter(kind, row.counter), out
            )
        out.record(band.copied)
        self.written.put(_Finished(row, start, stop - start, band, pinned))

    def _counting(self) -> tuple[int, ...]:
        return (0,) * self.real + (1,) * (self.blend is not None)

    def _counter(self, kind: int, number: int) -> DeviceArray:
        return self.counters[kind, number : number + 1]

    # --- writing: a thread of its own -----------------------------------------------------------------------------

    def _write(self) -> None:
        decision, spatial = self.decision, len(self.source.shape)
        for item in self.written:
            item.band.copied.synchronize()
            self._check(item)
            band, row = item.pinned, item.row
            with self.clock("write"):
                if band is not None and self.write is not None:
                    if decision.channels == 0 and band.ndim > spatial:
                        band = band[0]
                    row.tally.count(band, decision)
                    self.write(row.work, item.start, band)
                if row.row == row.work.grid.shape[0] - 1:
                    self.seen.end(row.tally)
                    if self.done is not None:
                        self.done(row.work, row.tally)
            self.finished += len(row.index)
            self.free_bands.put(item.band)

    def _check(self, item: _Finished) -> None:
        """Raises for what the device counted in a row of tiles."""
        row = item.row
        bad = int(self.counted[0, row.counter]) if self.real else 0
        if bad:
            raise ImageError(
                f"{self.source.name}: NaN or infinite pixels in plane {row.work.plane}, rows {row.rows[0]} to {row.rows[1]} "
                f"({bad} read); a network spreads them over its whole reach: replace them first"
            )
        bare = int(self.counted[1, row.counter]) if self.blend is not None else 0
        if bare:
            raise uncovered_error(bare, item.start, item.start + item.rows)

    # --- seconds on the device ------------------------------------------------------------------------------------

    def _begin_timing(self) -> None:
        while self._timings and self._timings[0][3].done():
            self._account(self._timings.popleft())
        self._marks = self._spare.pop() if self._spare else tuple(self.device.event(timing=True) for _ in range(4))
        self._mark(0)

    def _mark(self, k: int) -> None:
        self.compute.record(self._marks[k])
        if k == 3:
            self._timings.append(self._marks)

    def _account(self, marks: tuple[Event, ...]) -> None:
        for stage, a, b in (("gather", 0, 1), ("infer", 1, 2), ("stitch", 2, 3)):
            self.clock.seconds[stage] += marks[b].seconds_since(marks[a])
        self._spare.append(marks)


class _Blend:
    """Totals of overlapping tiles on the device: two buffers, since rows cannot be moved within one at once."""

    def __init__(self, job: _Job) -> None:
        grid, take = job.grid, job.workspace
        self._job = job
        tile = grid.tile_out_shape(job.output)
        weight = blend_weight(tile, job.spec.blend)
        self._weight = take.empty("weight", tile, np.float32)
        given = take.pinned("weight", tile, np.float32)
        given[...] = weight
        job.device.copy_in(self._weight, given, job.compute)
        shapes = [self._shape(work) for work in job._distinct()]
        self._memory = [take.empty(f"total {k}", (max(map(prod, shapes)),), np.float32) for k in range(2)]
        self.begin(job.works[0])

    def _shape(self, work: Work) -> tuple[int, ...]:
        """Of the totals; the last "channel" is the sum of weights."""
        out, grid = self._job.output, work.grid
        whole = grid.out_shape(out)
        return (grid.outputs[out].channels + 1, min(grid.tile_out_shape(out)[0], whole[0]), *whole[1:])

    def begin(self, work: Work) -> None:
        """Starts a result: nothing was added to it yet."""
        shape = self._shape(work)
        self._sums = [memory[: prod(shape)].reshape(*shape) for memory in self._memory]
        self._rows = shape[1]
        self._top = 0  # row of the result that the totals' first row stands for
        self._job.device.zero(self._sums[0], self._job.compute)

    def add(self, tiles: DeviceArray, place: Placement) -> None:
        place = place.from_row(self._top)
        sums = self._sums[0]
        calls.tile_blend(tiles, place, self._weight, sums[:-1], sums[-1], stream=self._job.compute.handle)

    def finish(self, band: DeviceArray, start: int, stop: int, uncovered: DeviceArray) -> None:
        """Divides the rows that are final, and moves the others to the front."""
        rows, job = stop - start, self._job
        if rows:
            done, rest = self._sums
            calls.blend_finish(
                done[:-1, :rows],
                done[-1, :rows],
                band,
                job.operation,
                stream=job.compute.handle,
                uncovered=uncovered,
            )
            left = self._rows - rows
            job.device.zero(rest, job.compute)
            for k in range(len(done) if left > 0 else 0):
                job.device.copy(rest[k, :left], done[k, rows:], job.compute)
            self._sums.reverse()
        self._top = stop


def _graph_shape(axes: str, batch: int, channels: int, tile: Sequence[int]) -> tuple[int, ...]:
    """Shape of a graph's input; a graph without N or C takes a single sample or channel."""
    spatial = iter(tile)
    return tuple(batch if a == "N" else channels if a == "C" else next(spatial) for a in axes)


def _batch_first(array: DeviceArray, axes: str) -> DeviceArray:
    """A view (N, C, *spatial) of an array with a graph's axes."""
    order = [a for a in ("N", "C") if a in axes] + [a for a in axes if a not in "NC"]
    view = array.transpose(*(axes.index(a) for a in order))
    for position, axis in enumerate("NC"):
        if axis not in axes:
            view = view[(slice(None),) * position + (None,)]
    return view


def _packed(pixels: Array, pinned: Array, memory: DeviceArray) -> tuple[Array, Array, DeviceArray]:
    """Where the pixels (C, *spatial) go: (view of the pinned memory, the same as one stretch, the view of it on the device).

    Their axes keep the order that they have in memory, which makes the copy a quick one, and a channel that stands for
    all of them is copied once.
    """
    repeated = pixels.shape[0] if pixels.strides[0] == 0 and pixels.shape[0] > 1 else 0
    if repeated:
        pixels = pixels[:1]
    order = sorted(range(pixels.ndim), key=lambda k: (-abs(pixels.strides[k]), k))
    shape = tuple(pixels.shape[k] for k in order)
    back = tuple(order.index(k) for k in range(pixels.ndim))
    packed = pinned[: prod(shape)]
    view = memory[: prod(shape)].reshape(*shape).transpose(*back)
    return packed.reshape(shape).transpose(back), packed, view.repeat_first(repeated) if repeated else view
