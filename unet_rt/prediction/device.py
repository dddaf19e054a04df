"""The pipeline of the image line on a GPU: rows of the image go in, bands of the result come out, all between stays there.

Three streams work at once: one copies the image's rows in, the session's gathers, infers and stitches, one copies
finished bands out; events between them say what waits for what. Two threads of the host feed them: one reads rows into
page-locked memory, one counts and writes bands; the caller's thread enqueues. Tiles run in batches of one size, which may
span rows of tiles and planes; only the last may be short, and what it computes beside is dropped. Buffers are rings of a
fixed number of slots, so that memory does not grow with the image; they are kept beside the session for the next one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..engine.engine import Engine
from ..errors import BackendError, DeviceMemoryError, TileMemoryError
from ..kernels import calls
from ..kernels.memory import DeviceArray
from ..kernels.request import Frame
from ..kernels.stream import Event, Stream
from ..tiling.decision import decision_operation
from .bands import BANDS, Bands
from .report import RunReport, Seen
from .rows import WINDOWS, Row, Rows
from .totals import Totals
from .work import Computation, Done, Progress, Stop, Work, Write, check_samples
from .workspace import WORKSPACES, Shared, workspace_of

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
    computation: Computation,
    works: Sequence[Work],
    write: Write | None,
    *,
    done: Done | None = None,
    progress: Progress | None = None,
    total: int | None = None,
) -> RunReport:
    """Runs works on the engine's device, as :func:`unet_rt.prediction.host.run` does on the host.

    Args:
        computation: What all tiles have in common; its engine is one that this module :func:`serves`. Its batch is made
            smaller where the device's memory does not hold that many tiles, which a note of the report says.
        works: What is to be computed. Their grids are parts of one: tiles of one size.
        write: As for :func:`unet_rt.prediction.host.run`. None: nothing is copied to the host, labels are not counted.
        done: As for :func:`unet_rt.prediction.host.run`.
        progress: Called from the caller's thread with (tiles done, tiles in all).
        total: Tiles in all, where the works are some of those of a result: batches have one size for all of it.

    The report's ``stages`` gather, infer and stitch are seconds on the device. Of an image on the device the pixels
    outside the value range are not counted.

    Raises:
        TileMemoryError: The device's memory does not hold the fewest tiles that the engine runs at once.
        ImageError, BackendError: see their messages.
    """
    engine = computation.engine
    session = engine.device_session
    if session is None or not serves(engine, computation.output):
        raise BackendError(
            f"the engine's tiles ({engine.spec.device}) cannot be filled on a GPU; build it again with --device cuda"
        )
    workspace = workspace_of(session)
    with workspace.lock:
        tiles = sum(work.grid.count for work in works)
        size, notes = engine.batch_for(min(computation.batch, total or tiles)), list[str]()
        held = session.held_bytes  # for the shapes of earlier predictions
        while True:
            sized = replace(computation, batch=size)
            job = _Job(Shared(sized, works, session, workspace, Seen(sized)), tiles, progress)
            try:
                with workspace.device.activate():  # for the kernels, too, whichever device it is
                    report = job.run(write, done)
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
    workspace = WORKSPACES.get(session)
    return session.stream.device.memory()[0] + session.held_bytes + (workspace.held_bytes if workspace else 0)


@dataclass
class _Piece:
    """Tiles of one row inside a batch."""

    row: Row
    first: int  # in the row's index
    count: int
    at: int  # in the batch

    @property
    def begins(self) -> bool:
        return self.first == 0

    @property
    def ends(self) -> bool:
        return self.first + self.count == len(self.row.index)


class _Job:
    """One run: the caller's thread enqueues, two others read and write."""

    def __init__(self, shared: Shared, total: int, progress: Progress | None) -> None:
        self._shared, self._made, self._session = shared, shared.computation, shared.session
        self._total, self._progress, self._told = total, progress, -1
        self._compute = shared.session.stream
        self._operation = decision_operation(shared.computation.decision)
        self._errors: list[BaseException] = []
        self._timer = _Timer(self._compute, shared)
        self.begun = False  # whether anything was read, run or written

    # --- before ---------------------------------------------------------------------------------------------------

    def _allocate(self, write: Write | None, done: Done | None) -> None:
        """All memory of the run, before any of it is used."""
        made, session, take = self._made, self._session, self._shared.workspace
        spec, work = made.spec, self._shared.works[0]  # all have its tiles and outputs
        shapes = [_graph_shape(i.axes, made.batch, i.channels, work.grid.tile) for i in spec.inputs]
        self._inputs = _empty(take.empty, "input", shapes, session.input_dtypes)
        self._outputs = _empty(take.empty, "output", session.output_shapes(shapes), session.output_dtypes)
        if len(self._outputs) != len(spec.outputs):
            raise BackendError(
                f"the engine returned {len(self._outputs)} outputs, and its spec names {len(spec.outputs)}; build it again"
            )
        self._tiles_in = [_batch_first(x, i.axes) for x, i in zip(self._inputs, spec.inputs, strict=True)]
        self._tiles_out = _batch_first(self._outputs[made.output], spec.outputs[made.output].axes)
        check_samples(self._tiles_out.shape, work, made.output)
        # Rows of tiles under way: those that a batch spans, those whose bands are not written, those that are read. A
        # counter is used again as it is: what is not 0 ends the run.
        counters = take.empty("counters", (2, made.batch + BANDS + WINDOWS + 2), np.uint64)
        if made.source.on_device:
            self._compute.after(made.source.stream)
        self._rows = Rows(self._shared, counters)
        self._bands = Bands(self._shared, counters, write, done)
        self._totals = Totals(self._shared) if work.grid.blended else None
        for memory in (*self._inputs, counters):
            # The rest of a short batch is computed, too: no accidental NaN or garbage.
            take.device.zero(memory, self._compute)

    # --- the run --------------------------------------------------------------------------------------------------

    def run(self, write: Write | None, done: Done | None) -> RunReport:
        workers: list[threading.Thread] = []
        try:
            self._allocate(write, done)
            self.begun = True
            for name, work in (("read", self._rows.read), ("write", self._bands.write)):
                if name == "write" or not self._made.source.on_device:
                    workers.append(threading.Thread(target=self._guarded(work), name=name))
                    workers[-1].start()
            self._tell()
            self._enqueue()
            self._bands.end()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.02)
                    self._tell()
        except Stop:
            pass
        except BaseException:
            self._shared.stop.set()
            raise
        finally:
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            self._drain(failed=self._shared.stop.is_set())
        if self._errors:
            raise self._errors[0]
        self._tell()
        self._timer.finish()
        return self._shared.seen.report(self._shared.clock, self._made.batch)

    def _drain(self, *, failed: bool) -> None:
        """Waits for all streams: nothing may use the buffers, or the caller's arrays, any more."""
        for stream in (self._shared.workspace.copy_in, self._compute, self._shared.workspace.copy_out):
            try:
                stream.synchronize()
            except BackendError as error:
                if not failed:
                    self._errors.append(error)

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def body() -> None:
            try:
                # The session may record its launches while this thread waits.
                self._shared.workspace.device.bear_captures()
                work()
            except Stop:
                pass
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
                self._errors.append(error)
                self._shared.stop.set()

        return body

    def _tell(self) -> None:
        if self._progress is not None and self._bands.finished != self._told:
            self._told = self._bands.finished
            self._progress(self._told, self._total)

    # --- computing: the caller's thread ---------------------------------------------------------------------------

    def _enqueue(self) -> None:
        held, pieces = 0, list[_Piece]()
        for row in self._rows:
            if self._shared.stop.is_set():
                raise Stop
            first = 0
            while first < len(row.index):
                piece = _Piece(row, first, min(self._made.batch - held, len(row.index) - first), held)
                if not held:
                    self._timer.begin()
                self._gather(piece)
                pieces.append(piece)
                first, held = first + piece.count, held + piece.count
                if piece.ends:
                    self._rows.release(row)
                if held == self._made.batch:
                    self._flush(pieces)
                    held, pieces = 0, []
        if held:
            self._flush(pieces)

    def _gather(self, piece: _Piece) -> None:
        row, numbers, first = piece.row, piece.row.numbers, 0
        part = slice(piece.first, piece.first + piece.count)
        for tiles, given in zip(self._tiles_in, self._made.spec.inputs, strict=True):
            channels = slice(first, first + given.channels)
            first += given.channels
            calls.tile_gather(
                row.pixels[channels],
                row.origins[part],
                tiles[piece.at : piece.at + piece.count],
                frame=Frame(self._made.source.shape, row.start, self._made.border),
                affine=replace(numbers, offset=numbers.offset[channels], divisor=numbers.divisor[channels]),
                stream=self._compute.handle,
                non_finite=self._bands.counter(0, row),
            )

    def _flush(self, pieces: list[_Piece]) -> None:
        """Runs a batch and stitches what it holds."""
        self._timer.mark(1)
        self._session.run_device(self._inputs, self._outputs)
        self._timer.mark(2)
        for piece in pieces:
            self._stitch(piece)
        self._timer.mark(3)
        self._tell()

    def _stitch(self, piece: _Piece) -> None:
        row, output = piece.row, self._made.output
        tiles = self._tiles_out[piece.at : piece.at + piece.count]
        place = row.work.grid.placement(row.index[piece.first : piece.first + piece.count], output)
        start, stop = row.work.grid.band(row.row, output)
        if self._totals is not None:
            if row.row == 0 and piece.begins:
                self._totals.begin(row.work)
            self._totals.add(tiles, place)
        else:
            if piece.begins:
                self._view = self._bands.open(row, start, stop)
            calls.tile_stitch(tiles, place.from_row(start), self._view, self._operation, stream=self._compute.handle)
        if piece.ends:
            if self._totals is not None:
                band = self._bands.open(row, start, stop)
                self._totals.finish(band, start, stop, self._bands.counter(1, row))
            self._bands.close(row, start, stop)


class _Timer:
    """Seconds that the device takes for gathering, inferring and stitching, by events between them."""

    def __init__(self, stream: Stream, shared: Shared) -> None:
        self._stream, self._clock, self._device = stream, shared.clock, shared.workspace.device
        self._timings: deque[tuple[Event, ...]] = deque()
        self._spare: list[tuple[Event, ...]] = []

    def begin(self) -> None:
        while self._timings and self._timings[0][3].done():
            self._account(self._timings.popleft())
        self._marks = self._spare.pop() if self._spare else tuple(self._device.event(timing=True) for _ in range(4))
        self.mark(0)

    def mark(self, k: int) -> None:
        self._stream.record(self._marks[k])
        if k == 3:
            self._timings.append(self._marks)

    def finish(self) -> None:
        while self._timings:
            self._account(self._timings.popleft())

    def _account(self, marks: tuple[Event, ...]) -> None:
        for stage, a, b in (("gather", 0, 1), ("infer", 1, 2), ("stitch", 2, 3)):
            self._clock.seconds[stage] += marks[b].seconds_since(marks[a])
        self._spare.append(marks)


def _empty(
    take: Callable[..., DeviceArray], name: str, shapes: Sequence[Sequence[int]], dtypes: Sequence[np.dtype]
) -> list[DeviceArray]:
    return [take(f"{name} {k}", *made) for k, made in enumerate(zip(shapes, dtypes, strict=True))]


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
