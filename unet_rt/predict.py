"""The image line in one function: windows of an image, tiles, engine, stitched bands, output.

Three threads form a pipeline: one reads windows and gathers tiles, the caller's runs the engine, one stitches and writes.
Queues between them are short, so that memory is bounded by a few tile rows whatever the image. Engines on a GPU have a
pipeline of their own (``predict_device``).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import ceil, floor, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import kernels, machine
from .contract import Normalization
from .engine import Engine, EngineSpec
from .errors import BackendError, ContractError, ImageError, OutputError, TileError
from .normalize import Affine, Affines, OnePlane, affine
from .parity import class_name
from .pictures import OverlayCollector
from .stitch import BandStitcher, Decision, OutputKind, decide
from .tiles import Ints, TileGrid, border_window

if TYPE_CHECKING:
    from .device import Device, DeviceArray
    from .image import Source

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]  # (tiles done, tiles in all)
Write = Callable[[int, int, Array], None]  # (plane, first row, band)

_COUNTED = 2**18  # pixels counted at a time: they stay in the second-level cache
MEMORY_SHARE = 0.35  # of the memory that is free, for running one batch of tiles


@dataclass
class RunReport:
    """What one prediction did.

    Attributes:
        image: Name of the image.
        reading: How it was read, in a sentence.
        backend, precision, device: Where it ran.
        tile, halo: Tile in pixels and the halo used, in samples (before, after) per axis.
        tiles: Tiles computed.
        mpx: Megapixels of the image, all planes.
        seconds: Wall time; ``stages`` are seconds busy per stage (they overlap): read, gather, infer, stitch, write.
        peak_rss_bytes: Peak resident memory of the process so far.
        class_share: Share of pixels per label (masks only); for a multi-label task per class, which may overlap.
        outside_range: Share of pixels outside the value range seen at build, where that is known.
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


def predict(
    engine: Engine,
    image: Any,
    *,
    out: str | Path | None = None,
    output: OutputKind | None = None,
    axes: str | None = None,
    channels: Sequence[int] | str | None = None,
    tile: Sequence[int] | None = None,
    batch: int | None = None,
    threads: int = 0,
    mask_values: Sequence[int] = (),
    normalization: Normalization | None = None,
    overlay: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Callable[[RunReport], None] | None = None,
) -> Any:
    """Predicts one image of any size.

    An image on the engine's GPU (PyTorch, CuPy, or anything with ``__cuda_array_interface__``) stays there: its pixels
    are read after what its library's current stream holds (PyTorch's, CuPy's), and the result lies on the same device,
    complete when this function returns. Normalisation by statistics of the image copies it to the host, band by band,
    once; so does ``luma``. Its labels are counted only where ``report`` asks, and pixels outside the value range not.

    Args:
        engine: From :func:`unet_rt.load`.
        image: NumPy or DLPack array (``(Y, X)``, ``(C, Y, X)``, ``(Y, X, C)``, ``(Z, Y, X)``, ...), or a path.
        out: File to write (``.tif``, ``.png``, ``.npy``); None: an array is returned.
        output: ``"mask"`` (uint8), ``"probability"`` or ``"raw"`` (float32). None: a mask, or raw for a regression.
        axes: Axes of the image, where they cannot be told from the file.
        channels: Which channels of the image, in the network's order.
        tile: Tile size in pixels per axis; None: chosen for this image within the engine's tile area.
        batch: Tiles per run; None: the engine's own number.
        threads: Threads of the kernels; 0: as many as affinity and quota allow.
        mask_values: Value of every label in a mask, e.g. ``(0, 255)``.
        normalization: For engines whose contract declares none; any other engine has its own.
        overlay: PNG of the mask drawn over the image, to be written as well (every k-th pixel of large images).
        overwrite: Replace an existing ``out``.
        progress: Called with (tiles done, tiles in all).
        report: Called with the :class:`RunReport` at the end.

    Returns:
        The path written, or an array: planes of a stack first, then channels where the output has them, then space:
        ``(Y, X)`` for the mask of a 2-D image, ``(K, Y, X)`` for its probabilities. A NumPy array; for an image on the
        GPU a PyTorch tensor where it is one, else a :class:`unet_rt.device.DeviceArray`.

    Raises:
        ImageError, ContractError, TileError, OutputError, BackendError: see their messages.
    """
    from .image import open_image
    from .output import open_output

    spec = engine.spec
    batch = spec.run_batch if batch is None else batch
    with open_image(
        image, spec.contract, axes=axes, channels=channels, spatial=spec.spatial, network_channels=spec.channels
    ) as source:
        if out is not None and source.path is not None and Path(out).exists() and Path(out).samefile(source.path):
            raise OutputError(f"{out} is the image itself; choose another output")
        decision = decide(spec.contract, spec.outputs[0].channels, output, tuple(mask_values))
        if overlay is not None and decision.dtype != np.uint8:
            raise ContractError("an overlay shows a mask; leave --overlay away, or use --output mask")
        if source.device is not None:
            _check_device(engine, source, source.device)
        free = None if engine.device_session is None else engine.device_session.stream.device.memory()[0]
        grid = plan(spec, source, tile=tile, batch=batch, free_bytes=free)
        affines = affine(normalization_of(spec, source, normalization), source)
        shape = grid.out_shape(0)
        collector = None if overlay is None else OverlayCollector(shape, decision.values)

        lead = (decision.channels,) if decision.channels else ()
        whole = (source.planes, *lead, *shape)

        def finish(write: Write | None, target: DeviceArray | None = None) -> RunReport:
            def both(plane: int, start: int, band: Array) -> None:
                if write is not None:
                    write(plane, start, band)
                if collector is not None:
                    collector(plane, start, band)

            if target is None:
                return run(
                    engine, source, grid, decision, both, affines, batch=batch, threads=threads, progress=progress
                )
            from . import predict_device

            host = both if collector is not None or report is not None else None
            return predict_device.run(
                engine, source, grid, decision, host, affines, batch=batch, progress=progress, target=target
            )

        result: Any = None
        if out is not None:
            with open_output(
                out,
                shape=shape,
                planes=source.planes,
                plane_shape=source.plane_shape,
                plane_axes=source.plane_axes,
                channels=decision.channels,
                dtype=decision.dtype,
                source=source,
                overwrite=overwrite,
            ) as sink:

                def write(plane: int, start: int, band: Array) -> None:
                    sink.write(plane, (start,) + (0,) * (len(shape) - 1), band)

                finished = finish(write)
                sink.commit()
        elif source.device is not None:
            from .device import empty_like

            result, target = empty_like(image, whole, decision.dtype, source.device)
            finished = finish(None, target)
        else:
            result = np.empty(whole, dtype=decision.dtype)

            def keep(plane: int, start: int, band: Array) -> None:
                rows = slice(start, start + band.shape[len(lead)])
                (result[plane, :, rows] if lead else result[plane, rows])[...] = band

            finished = finish(keep)
        if collector is not None and overlay is not None:
            collector.draw(source, Path(overlay))
        if report is not None:
            report(finished)
        if out is not None:
            return Path(out)
        return result.reshape(*source.plane_shape, *lead, *shape)


def _check_device(engine: Engine, source: Source, device: Device) -> None:
    """ImageError unless the engine can take an image from the device where it lies."""
    from . import predict_device

    session = engine.device_session
    if session is None or session.stream.device.index != device.index:
        raise ImageError(
            f"{source.name} lies on cuda:{device.index} and the engine runs on {engine.spec.device}; copy the image to "
            "the host (image.cpu()), or load an engine built for its device"
        )
    if not predict_device.serves(engine):
        raise ImageError(
            f"{source.name} lies on a GPU, and the engine takes {session.input_dtypes[0]} tiles, which are not filled "
            "there; copy the image to the host (image.cpu())"
        )


def normalization_of(spec: EngineSpec, source: Source, given: Normalization | None) -> Normalization:
    """The contract's normalisation; ``given`` where it declares none; none at all for floating-point pixels.

    Raises:
        ContractError: Two declarations, or integer pixels and none.
    """
    declared = spec.contract.normalization
    if declared is not None:
        if given is not None and given != declared:
            raise ContractError(
                f"the engine was built and proven with normalisation {declared.method}; build it again to change that"
            )
        return declared
    if given is not None:
        return given
    if source.dtype.kind in "iu":
        from .contract_io import missing_normalization

        raise missing_normalization(source)
    return Normalization("none")


def plan(
    spec: EngineSpec,
    source: Source,
    *,
    tile: Sequence[int] | None = None,
    batch: int = 1,
    free_bytes: int | None = None,
) -> TileGrid:
    """The tiles for an image, no larger than the memory that is free allows (``free_bytes``; None: the host's)."""
    if batch < 1:
        raise ContractError(f"a batch of {batch} tiles cannot be run; use 1 or more")
    max_px = prod(spec.tile)
    if spec.bytes_per_px and spec.exact:
        free = machine.memory_bytes() if free_bytes is None else free_bytes
        fits = int(MEMORY_SHARE * free / (spec.bytes_per_px * batch))
        max_px = min(max_px, fits)
    return spec.grid(source.shape, tile, max_px)


@dataclass
class _Batch:
    """Some tiles of one tile row on their way through the pipeline; ``last`` closes the row."""

    plane: int
    row: int
    index: Ints
    tiles: Array
    first: bool
    last: bool


class StageClock:
    """Seconds busy per stage; each stage belongs to one thread."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("read", "gather", "infer", "stitch", "write"), 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


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


def run(
    engine: Engine,
    source: Source,
    grid: TileGrid,
    decision: Decision,
    write: Write,
    affines: Affines | OnePlane,
    *,
    output: int = 0,
    batch: int = 1,
    threads: int = 0,
    progress: Progress | None = None,
) -> RunReport:
    """Runs all planes of a source; ``write(plane, first row, band)`` receives finished bands in order.

    Args:
        engine: Runs tiles (N, C, *tile).
        source: The image.
        grid: Its tiles.
        decision: What becomes of output ``output``.
        write: Called from one thread, bands of a plane from top to bottom, planes in order.
        affines: The image's normalisation in numbers.
        output: Which output of the graph.
        batch: Tiles per run.
        threads: Of the kernels.
        progress: Called from the caller's thread with (tiles done, tiles in all).

    An engine on a GPU whose tiles the kernels can fill there runs there from end to end (``predict_device``); another
    one takes its tiles from the host.
    """
    spec = engine.spec
    planned = tuple(axis.canvas.image for axis in grid.axes)
    if planned != tuple(source.shape):
        raise TileError(
            f"the tiles are those of an image of {_by(planned)} px, and {source.name} has {_by(source.shape)}; "
            "plan them anew"
        )
    if engine.device_session is not None:
        from . import predict_device

        if predict_device.serves(engine, output):
            return predict_device.run(
                engine, source, grid, decision, write, affines, output=output, batch=batch, progress=progress
            )
    begun = time.perf_counter()
    clock, stop, errors = StageClock(), threading.Event(), list[BaseException]()
    gathered, outputs = StoppableQueue(2, stop), StoppableQueue(2, stop)
    watch = RangeWatch(spec.contract.value_range)
    shares = np.zeros((max(1, decision.channels), 256), dtype=np.int64)  # pixels per channel and value of a mask

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
        for plane in range(source.planes):
            for item in _gather_plane(spec, source, grid, plane, affines.plane(plane), batch, threads, clock, watch):
                gathered.put(item)
        gathered.put(None)

    def stitch() -> None:
        stitcher = BandStitcher(grid, output, decision, spec.blend, threads)
        for item in outputs:
            with clock("stitch"):
                if item.first:
                    if item.row == 0:
                        stitcher = BandStitcher(grid, output, decision, spec.blend, threads)
                    stitcher.begin(item.row)
                stitcher.add(item.tiles, item.index)
                if not item.last:
                    continue
                start, band = stitcher.finish()
                if decision.dtype == np.uint8:
                    for counts, labels in zip(shares, band if decision.channels else band[None], strict=True):
                        count_labels(counts, labels, decision.values)
            if band.size:
                with clock("write"):
                    write(item.plane, start, band)

    workers = [threading.Thread(target=guarded(work), name=work.__name__) for work in (gather, stitch)]
    done, total = 0, source.planes * grid.count
    try:
        for worker in workers:
            worker.start()
        if progress is not None:
            progress(0, total)
        for item in gathered:
            with clock("infer"):
                results = engine.run(item.tiles)
            expected = grid.tile_out_shape(output)
            if results[output].shape[2:] != expected:
                raise BackendError(
                    f"the engine returned {results[output].shape[2:]} samples for a tile of {grid.tile}, and the graph "
                    f"says {expected}; the engine does not belong to its spec: build it again"
                )
            item.tiles = results[output]
            done += len(item.index)
            outputs.put(item)
            if progress is not None:
                progress(done, total)
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
    return finished_report(spec, source, grid, decision, output, begun, clock, shares, watch)


def finished_report(
    spec: EngineSpec,
    source: Source,
    grid: TileGrid,
    decision: Decision,
    output: int,
    begun: float,
    clock: StageClock,
    shares: npt.NDArray[np.int64],
    watch: RangeWatch,
) -> RunReport:
    """The report of a run that began at ``begun`` (``time.perf_counter``) and is over."""
    return RunReport(
        image=source.name,
        reading=source.reading,
        backend=spec.backend,
        precision=spec.precision,
        device=spec.device,
        tile=grid.tile,
        halo=None if grid.blended else tuple(f.halo for f in grid.outputs[output].field),
        tiles=source.planes * grid.count,
        mpx=source.planes * prod(source.shape) / 1e6,
        seconds=time.perf_counter() - begun,
        stages={name: round(s, 4) for name, s in clock.seconds.items()},
        peak_rss_bytes=machine.peak_rss_bytes(),
        class_share=_class_share(shares, decision, spec),
        outside_range=watch.share(),
        notes=_seam_notes(spec, grid),
    )


def _class_share(shares: npt.NDArray[np.int64], decision: Decision, spec: EngineSpec) -> dict[str, float]:
    total = int(shares[0].sum())
    if not total:
        return {}
    values = decision.values
    if decision.channels:  # multi-label: a mask per class
        return {class_name(spec.contract, k): float(counts[values[1]] / total) for k, counts in enumerate(shares)}
    names = spec.contract.classes if decision.op == "argmax" else ("off", "on")
    return {
        (names[k] if k < len(names) else str(k)): float(shares[0, value] / total)
        for k, value in enumerate(values)
        if values.index(value) == k
    }


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


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


class RangeWatch:
    """Counts pixels outside the value range that build saw."""

    def __init__(self, value_range: tuple[float, float] | None):
        self._range, self._seen, self._outside = value_range, 0, 0

    def __call__(self, pixels: Array) -> None:
        if self._range is not None and pixels.size:
            low, high = self._range
            lowest, highest = pixels.min(), pixels.max()
            if not lowest >= low or not highest <= high:  # with NaN, too
                self._outside += _outside(pixels, low, high)
            self._seen += pixels.size

    def share(self) -> float | None:
        return self._outside / self._seen if self._seen else None


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


def _gather_plane(
    spec: EngineSpec,
    source: Source,
    grid: TileGrid,
    plane: int,
    numbers: Affine,
    batch: int,
    threads: int,
    clock: StageClock,
    watch: RangeWatch,
) -> Iterator[_Batch]:
    border = spec.contract.border or "mirror"
    seen = 0  # rows of the image that were looked at already
    for row in range(grid.shape[0]):
        index = grid.row(row)
        origins = grid.origins(index)
        rows = border_window(int(origins[0, 0]), int(origins[0, 0]) + grid.tile[0], source.shape[0], border)
        window_start = (rows[0], *(0,) * (len(source.shape) - 1))
        with clock("read"):
            window = source.read(plane, window_start, (rows[1], *source.shape[1:]))
            watch(window[:, max(seen - rows[0], 0) :])
            seen = max(seen, rows[1])
        for k in range(0, len(index), batch):
            part = slice(k, min(k + batch, len(index)))
            tiles = np.empty((part.stop - part.start, spec.channels, *grid.tile), dtype=np.float32)
            with clock("gather"):
                bad = kernels.tile_gather(
                    window,
                    origins[part],
                    tiles,
                    image_shape=source.shape,
                    window_start=window_start,
                    border=border,
                    offset=numbers.offset,
                    divisor=numbers.divisor,
                    clip=numbers.clip,
                    threads=threads,
                )
            if bad:
                raise ImageError(
                    f"{source.name}: NaN or infinite pixels in plane {plane}, rows {rows[0]} to {rows[1]} ({bad} read); "
                    "a network spreads them over its whole reach: replace them first"
                )
            yield _Batch(plane, row, index[part], tiles, first=k == 0, last=part.stop == len(index))
