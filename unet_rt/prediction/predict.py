"""The image line in one function: an image, its tiles, the pipeline that runs them, an output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..contract.contract import Contract, Normalization
from ..engine.engine import Engine
from ..engine.heads import Headed
from ..engine.spec import EngineSpec
from ..engine.tta import Augmented, Tta
from ..errors import ContractError, ImageError, OutputError
from ..images.levels import PIXEL_SIZE_TOLERANCE, um_text
from ..images.normalize import affine
from ..outputs.pictures import OverlayCollector
from ..system import limits
from ..tiling.decision import Decision, OutputKind, decide, default_output
from ..tiling.grid import TileGrid
from . import blocks
from .host import run
from .report import RunReport
from .run import with_smaller_tiles
from .stage import stage_folder
from .work import Progress, Spans, Work

if TYPE_CHECKING:
    from ..images.source import Source
    from ..kernels.memory import DeviceArray, MemoryContext
    from .request import Tables


Array = npt.NDArray[Any]

MEMORY_SHARE = 0.35  # of the memory that is free, for running one batch of tiles


def predict(
    engine: Engine,
    image: Any,
    *,
    out: str | Path | None = None,
    output: OutputKind | Literal["instances"] | None = None,
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
    trace: Spans | None = None,
    level: int | str | None = None,
    pixel_size_um: Sequence[float] = (),
    resample: bool = False,
    tta: Tta = "none",
    region: str | Path | None = None,
    memory_bytes: int | None = None,
    shard: tuple[int, int] | None = None,
    scheduler: str | None = None,
    restart: bool = False,
    tables: Tables | None = None,
    head: str | None = None,
) -> Any:
    """Predicts one image of any size.

    An image on the engine's GPU (PyTorch, CuPy, or anything with ``__cuda_array_interface__``) stays there: its pixels
    are read after what its library's current stream holds (PyTorch's, CuPy's), and the result lies on the same device,
    complete when this function returns; a file is written in one go, however large. Normalisation by statistics of the
    image copies it to the host, band by band, once; so does ``luma``. Its labels are counted only where ``report`` asks,
    and pixels outside the value range not.

    Large results (of ``blocks.LARGE_PX`` pixels and more), OME-Zarr, shards and schedulers are computed block by block in a
    folder ``.NAME.stage`` beside ``out``: after a kill, a full disk or a power cut, the same call goes on where it
    stopped, and the result is the same bit for bit.

    Args:
        engine: From :func:`unet_rt.load`.
        image: NumPy or DLPack array (``(Y, X)``, ``(C, Y, X)``, ``(Y, X, C)``, ``(Z, Y, X)``, ...), a path or a URL.
        out: File to write (``.tif``, ``.png``, ``.npy``, ``.zarr``); None: an array is returned.
        output: ``"mask"`` (uint8), ``"probability"`` or ``"raw"`` (float32), ``"instances"`` (uint32: connected components
            of the mask, numbered). None: a mask, or raw for a regression.
        axes: Axes of the image, where they cannot be told from the file.
        channels: Which channels of the image, in the network's order.
        tile: Tile size in pixels per axis; None: chosen for this image within the engine's tile area, and a smaller one
            of the same result where a GPU's memory does not hold it.
        batch: Tiles per run; None: the engine's own number.
        threads: Threads of the kernels; 0: as many as affinity and quota allow.
        mask_values: Value of every label in a mask, e.g. ``(0, 255)``.
        normalization: For engines whose contract declares none; any other engine has its own.
        overlay: PNG of the mask drawn over the image, to be written as well (every k-th pixel of large images).
        overwrite: Replace an existing ``out``.
        progress: Called with (tiles done, tiles in all).
        report: Called with the :class:`RunReport` at the end.
        trace: Receives (stage, start, stop) of all that is timed, seconds of ``time.perf_counter``; not on a GPU.
        level: Of a pyramid: its number, 0 being the finest, or the size of its pixels as text (``"0.5um"``). None: the
            finest; with ``resample`` the coarsest whose pixels are at least as fine as those of training. The result has
            the pixels of the level that was read.
        pixel_size_um: Of the image (its finest level), micrometres along its spatial axes, where the file does not say or
            is wrong.
        resample: Bring the image to the pixel size of training (the contract's), and probabilities back before the
            class decision.
        tta: Test-time augmentation: mean probabilities over flips (``flip``), or flips and quarter turns (``d4``).
        region: An image of the same size; predictions are wanted where it is not 0.
        memory_bytes: Bound on the resident memory of this process; None: half of what is free beside it.
        shard: (index, count): only every count-th block, from block ``index`` on. Whoever finishes last writes ``out``.
        scheduler: ``local:N`` (processes) or ``tcp://host:port`` of a Dask scheduler that computes the blocks.
        restart: Throw away what an interrupted run has left of ``out``.
        tables: Tables of objects to be written as well (``output="instances"``).
        head: Name of the network's output to predict, where it has several; None: the first.

    Returns:
        The path written, or an array: planes of a stack first, then channels where the output has them, then space:
        ``(Y, X)`` for the mask of a 2-D image, ``(K, Y, X)`` for its probabilities. A NumPy array; for an image on the
        GPU a PyTorch tensor where it is one, else a :class:`unet_rt.kernels.memory.DeviceArray`.

    Raises:
        ImageError, ContractError, TileError, OutputError, BackendError: see their messages.
    """
    from ..images.open import Reading, open_image, where_of

    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ContractError(f"shard {shard[0]}/{shard[1]} is not one of 0/{shard[1]} to {shard[1] - 1}/{shard[1]}")
    if (shard is not None or scheduler is not None) and out is None:
        raise ContractError("shards and schedulers share a file or folder; give --out")
    several = "" if len(engine.spec.outputs) == 1 else ", ".join(o.name for o in engine.spec.outputs)
    if head is not None:
        engine = Headed(engine, head)
    if tta != "none":
        engine = Augmented(engine, tta, raw=output == "raw")
    spec = engine.spec
    batch = spec.run_batch if batch is None else batch
    with open_image(
        image,
        spec.contract,
        Reading(axes, channels, level, pixel_size_um, spec.contract.pixel_size_um if resample else ()),
        spatial=spec.spatial,
        network_channels=spec.channels,
    ) as source:
        place = None if out is None else Path(out)
        if place is not None and source.path is not None and _holds(place, source.path):
            raise OutputError(f"{out} is the image itself, or holds it; choose another output")
        kind: Any = "mask" if output == "instances" else output
        decision = decide(spec.contract, spec.outputs[0].channels, kind, tuple(mask_values))
        if overlay is not None and decision.dtype != np.uint8:
            raise ContractError("an overlay shows a mask; leave --overlay away, or use --output mask")
        if source.device is not None:
            _check_device(engine, source, source.device)
        normalization = normalization_of(spec, source, normalization)
        size = source.pixel_size_um or ()
        notes = _pixel_size_notes(spec.contract, source, resample=resample)
        notes += _batch_notes(engine, batch)
        notes += [f"output {spec.outputs[0].name} of {several}"] if several else []
        staged = place is not None and (
            place.suffix.lower() == ".zarr"
            or shard is not None
            or scheduler is not None
            or (source.device is None and source.planes * prod(source.shape) >= blocks.LARGE_PX)
            or stage_folder(place).exists()
        )
        if staged or resample or region is not None or source.gaps or output == "instances" or memory_bytes is not None:
            from . import blockwise as predict_large
            from .request import Request

            if source.device is not None:
                raise ImageError(
                    f"{source.name} lies on a GPU, where images are predicted as they are; copy it to the host (image.cpu())"
                )
            asked = Request(
                output=output or default_output(spec.contract),
                normalization=normalization,
                mask_values=tuple(mask_values),
                tile=None if tile is None else tuple(tile),
                batch=batch,
                threads=threads,
                pixel_size_um=size,
                resample=resample,
                region=None if region is None else where_of(region),
                memory_bytes=memory_bytes,
                shard=shard or (0, 1),
                tta=tta,
                head=head,
            )
            compute = None
            if scheduler is not None:
                from . import cluster

                names = channels if isinstance(channels, str | None) else tuple(channels)
                reading = Reading(axes, names, source.level, tuple(pixel_size_um))
                asked, compute = cluster.computing(scheduler, engine, image, reading, asked, str(out))
            finished, result = predict_large.predict(
                engine, source, asked, place, staged=staged, overwrite=overwrite, restart=restart, compute=compute,
                overlay=None if overlay is None else Path(overlay), tables=tables, progress=progress, trace=trace,
            )  # fmt: skip
        else:
            collector = None
            if overlay is not None:
                collector = OverlayCollector(_result_shape(spec, source), decision.values)
            finished, result = _at_once(
                engine, image, source, decision, normalization, place, tile=tile, batch=batch, threads=threads,
                collector=collector, overwrite=overwrite, counted=report is not None, progress=progress, trace=trace,
            )  # fmt: skip
            if collector is not None and overlay is not None:
                collector.draw(source, Path(overlay))
        finished.notes[:0] = notes
        if report is not None:
            report(finished)
        return result


def _holds(out: Path, image: Path) -> bool:
    """Whether an output would replace the image: it is the same file, or a folder around it."""
    return image.resolve().is_relative_to(out.resolve()) or (out.exists() and out.samefile(image))


def _result_shape(spec: EngineSpec, source: Source) -> tuple[int, ...]:
    """Spatial shape of a whole plane's result."""
    return tuple(ceil(n * f.scale) for n, f in zip(source.shape, spec.outputs[0].field, strict=True))


def _at_once(
    engine: Engine,
    image: Any,
    source: Source,
    decision: Decision,
    normalization: Normalization,
    out: Path | None,
    *,
    tile: Sequence[int] | None,
    batch: int,
    threads: int,
    collector: OverlayCollector | None,
    overwrite: bool,
    counted: bool,
    progress: Progress | None,
    trace: Spans | None,
) -> tuple[RunReport, Any]:
    """All planes from top to bottom, in one go: the report, and the path written or the array."""
    from ..outputs.output import open_output
    from ..outputs.shape import Shape
    from .device import free_bytes

    grid = plan(engine.spec, source, tile=tile, batch=batch, free_bytes=free_bytes(engine))
    affines = affine(normalization, source)
    shape = grid.out_shape(0)
    lead = (decision.channels,) if decision.channels else ()
    whole = (source.planes, *lead, *shape)

    def finish(write: Callable[[int, int, Array], None] | None, target: DeviceArray | None = None) -> RunReport:
        def both(work: Work, start: int, band: Array) -> None:
            if write is not None:
                write(work.plane, start, band)
            if collector is not None:
                collector(work.plane, start, band)

        def attempt(grid: TileGrid, batch: int) -> RunReport:
            works = [Work(plane, grid) for plane in range(source.planes)]
            if target is None:
                return run(
                    engine, source, works, decision, both, affines,
                    batch=batch, threads=threads, progress=progress, trace=trace,
                )  # fmt: skip
            from . import device as predict_device

            host = both if collector is not None or counted else None
            return predict_device.run(
                engine, source, works, decision, host, affines, batch=batch, progress=progress, target=target
            )

        return with_smaller_tiles(engine, grid, batch, attempt, asked=tile is not None)

    if out is not None:
        what = Shape(tuple(shape), source.plane_shape, source.plane_axes, decision.channels, decision.dtype)
        with open_output(out, what, source=source, overwrite=overwrite) as sink:

            def write(plane: int, start: int, band: Array) -> None:
                sink.write(plane, (start,) + (0,) * (len(shape) - 1), band)

            finished = finish(write)
            sink.commit()
        return finished, out
    result: Any
    if source.device is not None:
        from ..kernels.device import empty_like

        result, target = empty_like(image, whole, decision.dtype, source.device)
        finished = finish(None, target)
    else:
        result = np.empty(whole, dtype=decision.dtype)

        def keep(plane: int, start: int, band: Array) -> None:
            rows = slice(start, start + band.shape[len(lead)])
            (result[plane, :, rows] if lead else result[plane, rows])[...] = band

        finished = finish(keep)
    return finished, result.reshape(*source.plane_shape, *lead, *shape)


def _check_device(engine: Engine, source: Source, device: MemoryContext) -> None:
    """ImageError unless the engine can take an image from the device where it lies."""
    from . import device as predict_device

    session = engine.device_session
    if session is None and isinstance(engine, Augmented | Headed):
        raise ImageError(
            f"{source.name} lies on a GPU, and --tta and --head take tiles from the host; pass image.cpu()"
        )
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


def _batch_notes(engine: Engine, batch: int) -> list[str]:
    """What is to be said where more tiles are run at once than parity was judged with."""
    record = None if engine.folder is None else engine.folder.parity
    judged = [] if record is None else record.get("batch", [])
    if not judged or batch <= max(judged):
        return []
    return [
        f"{batch} tiles per run, and parity was judged with up to {max(judged)}; leave --batch away to stay with those"
    ]


def _pixel_size_notes(contract: Contract, source: Source, *, resample: bool) -> list[str]:
    """What resampling does, or what is to be said where image and training differ in pixel size by more than a tenth."""
    wanted, size = contract.pixel_size_um, source.pixel_size_um
    if not wanted or size is None or len(wanted) != len(size):
        return []
    here, there = um_text(size), um_text(wanted)
    if resample:
        level = f" of level {source.level}" if source.levels else ""
        return [f"the pixels{level}, {here} um, were brought to {there} um, and results back"]
    if all(abs(a / b - 1) <= PIXEL_SIZE_TOLERANCE for a, b in zip(size, wanted, strict=True)):
        return []
    text = f"WARNING: the image has pixels of {here} um, the network was trained on {there} um; --resample adapts the image"
    return [text]


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
        from ..images.normalize import missing_normalization

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
        free = limits.memory_bytes() if free_bytes is None else free_bytes
        fits = int(MEMORY_SHARE * free / (spec.bytes_per_px * batch))
        max_px = min(max_px, fits)
    return spec.grid(source.shape, tile, max_px)
