"""The image line in one function: open, request, plan, compute, store, finish."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..contract.contract import Normalization
from ..engine.engine import Engine
from ..engine.spec import EngineSpec
from ..engine.tta import Tta
from ..errors import OutputError, PixelRangeWarning
from ..images.reading import Reading
from ..images.source import Source
from ..outputs.pictures import OverlayCollector
from ..system import limits
from ..system.names import path_of
from ..tiling.axis import per_axis
from .compute import run_blocks
from .files import clear, open_file
from .finish import check_targets, finish
from .plan import Plan, make_plan
from .report import RunReport
from .request import Kind, Request, Tables, engine_form, notes_of, settle
from .store import ArrayStore, DeviceStore, RowStore
from .work import Observer, Progress, Spans


def predict(
    engine: Engine | str | Path,
    image: Any,
    *,
    out: str | Path | None = None,
    output: Kind | None = None,
    axes: str | None = None,
    channels: Sequence[int] | str | None = None,
    tile: int | Sequence[int] | None = None,
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
    series: int | str | None = None,
    nodata: float | None = None,
    classes: Sequence[str] = (),
) -> Any:
    """Predicts an image of any size, or several of them.

    An image on the engine's GPU (PyTorch, CuPy, or anything with ``__cuda_array_interface__``) stays there: its pixels
    are read after what its library's current stream holds (PyTorch's, CuPy's), and the result lies on the same device,
    complete when this function returns; a file is written in one go, however large. Normalisation by statistics of the
    image copies it to the host, band by band, once; so does ``luma``. Its labels are counted only where ``report`` asks,
    and pixels outside the value range not.

    Large results (of ``blocks.LARGE_PX`` pixels and more), OME-Zarr, shards and schedulers are computed block by block in a
    folder ``.NAME.stage`` beside ``out``: after a kill, a full disk or a power cut, the same call goes on where it
    stopped, and the result is the same bit for bit.

    Args:
        engine: From :func:`unet_rt.load`; or an engine folder, which is loaded for this call.
        image: NumPy or DLPack array (``(Y, X)``, ``(C, Y, X)``, ``(Y, X, C)``, ``(Z, Y, X)``, ...), a path or a URL; or a
            list of these, without ``out``.
        out: File to write (``.tif``, ``.png``, ``.npy``, ``.zarr``); None: an array is returned.
        output: ``"mask"`` (uint8), ``"probability"`` or ``"raw"`` (float32), ``"instances"`` (connected components
            of the mask, numbered: uint32, in files uint16 where the ids fit). None: a mask, or raw for a regression.
        axes: Axes of the image, where they cannot be told from the file.
        channels: Which channels of the image, in the network's order; ``"slices"`` of a stack: those around each plane.
        tile: Tile size in pixels per axis, a number for all axes; None: chosen for this image within the engine's tile
            area, and a smaller one of the same result where a GPU's memory does not hold it.
        batch: Tiles per run; None: the engine's own number.
        threads: Threads of the kernels; 0: as many as affinity and quota allow.
        mask_values: Value of every label in a mask, e.g. ``(0, 255)``.
        normalization: For engines whose contract declares none, or no scope of its statistics; any other has its own.
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
        memory_bytes: Bound on the resident memory of this process, the making of the output included; None: half of what
            is free beside it.
        shard: (index, count): only every count-th block, from block ``index`` on. Whoever finishes last writes ``out``.
        scheduler: ``local:N`` (processes) or ``tcp://host:port`` of a Dask scheduler that computes the blocks.
        restart: Throw away what an interrupted run has left of ``out``.
        tables: Tables of objects to be written as well (``output="instances"``).
        head: Name of the network's output to predict, where it has several; None: the first.
        series: Of a file that holds several images: its number, from 0, or its name.
        nodata: Value of pixels that hold no data, in place of what the file says; NaN may be one. They get no label.
        classes: Names of the classes in tables and reports, where the contract has none, or others.

    Returns:
        The path written, or an array: planes of a stack first, then channels where the output has them, then space:
        ``(Y, X)`` for the mask of a 2-D image, ``(K, Y, X)`` for its probabilities. A NumPy array; for an image on the
        GPU a PyTorch tensor where it is one, else a :class:`unet_rt.kernels.memory.DeviceArray`. Of a list a list.

    Raises:
        ImageError, ContractError, TileError, OutputError, BackendError: see their messages.

    Warns:
        PixelRangeWarning: More than a fifth of the pixels lie outside the range that build saw.
    """
    asked = Request(
        reading=Reading(
            axes,
            channels if isinstance(channels, str | None) else tuple(channels),
            level,
            tuple(pixel_size_um),
            series=series,
            nodata=nodata,
        ),
        out=None if out is None else path_of(out, OutputError),
        output=output,
        mask_values=tuple(mask_values),
        tile=None if tile is None else per_axis(tile, 1),
        batch=batch,
        threads=threads,
        normalization=normalization,
        overlay=None if overlay is None else path_of(overlay, OutputError),
        overwrite=overwrite,
        resample=resample,
        region=None if region is None else str(region),
        memory_bytes=memory_bytes,
        shard=shard,
        scheduler=scheduler,
        restart=restart,
        tables=tables,
        tta=tta,
        head=head,
        classes=tuple(classes),
    )
    observer = Observer(progress, trace, counts=report is not None)
    if isinstance(engine, Engine):
        return _predict_any(engine, image, asked, observer, report)
    from ..engine.load import load

    with load(engine, threads=threads or None) as opened:
        return _predict_any(opened, image, asked, observer, report)


def _predict_any(
    engine: Engine, image: Any, asked: Request, observer: Observer, report: Callable[[RunReport], None] | None
) -> Any:
    """The result of an image, or a list of those of several."""
    if isinstance(image, list | tuple):
        if asked.out is not None or asked.overlay is not None or asked.tables is not None:
            raise OutputError(
                f"{len(image)} images do not go into one file; call predict for each, with an out of its own"
            )
        return [_predict_any(engine, one, asked, observer, report) for one in image]
    form = engine_form(engine, asked)
    with _opened(image, form.spec, asked) as source:
        asked = settle(asked, form, source)
        if asked.staged:
            done, result = _in_stage(form, image, source, asked, observer)
        else:
            done, result = _at_once(form, image, source, asked, observer)
        done.notes[:0] = notes_of(asked, form, source)
    if report is not None:
        done.peak_rss_bytes = max(done.peak_rss_bytes, limits.peak_rss_bytes())  # its output was made since
    if done.range_warning:
        warnings.warn(done.range_warning, PixelRangeWarning, stacklevel=2)
    if report is not None:
        report(done)
    return result


def _opened(image: Any, spec: EngineSpec, asked: Request) -> Source:
    from ..images.open import open_image

    reading = replace(asked.reading, wanted_um=spec.contract.pixel_size_um if asked.resample else ())
    return open_image(image, spec.contract, reading, spatial=spec.spatial, network_channels=spec.channels)


def _at_once(engine: Engine, image: Any, source: Source, asked: Request, observer: Observer) -> tuple[RunReport, Any]:
    """A result that is made by this call or not at all: its report, and the path written or the array."""
    check_targets(asked)
    with (
        closing(make_plan(engine, source, asked)) as plan,
        _open_store(plan, asked, image, counted=observer.counts) as store,
    ):
        every = range(len(plan.blocks))
        if plan.plain or not isinstance(store, ArrayStore):
            target = store.target if isinstance(store, DeviceStore) else None
            done = run_blocks(plan, every, None, rows=store.write_rows, target=target, observer=observer)
        else:
            done = run_blocks(plan, every, store.keep, observer=observer)
        result = finish(plan, store, asked, done)
        done.notes += plan.notes(asked.normalization)
    if asked.out is not None:
        clear(asked.out)
    return done, result


@contextmanager
def _open_store(
    plan: Plan, asked: Request, image: Any, *, counted: bool
) -> Iterator[ArrayStore | RowStore | DeviceStore]:
    """Where a result goes: rows of a file as they come where they are its rows as they are, else an array."""
    decision, collector = plan.decision, None
    if asked.overlay is not None:
        collector = OverlayCollector(plan.shape, decision.values)
    if asked.out is not None and plan.plain and plan.blocks.whole and asked.output != "instances":
        with open_file(plan, asked.out, decision.channels, decision.dtype, overwrite=asked.overwrite) as sink:
            yield RowStore(sink, collector)
    elif plan.image.device is not None:
        from ..kernels.device import empty_like

        array, target = empty_like(image, plan.array_shape, decision.dtype, plan.image.device)
        yield DeviceStore(array, target, collector, counted=counted)
    else:
        yield ArrayStore(np.empty(plan.array_shape, decision.dtype), plan.place)


def _in_stage(engine: Engine, image: Any, source: Source, asked: Request, observer: Observer) -> tuple[RunReport, Path]:
    """A result that is kept block by block beside its output, so that the same call goes on: its report, and the path."""
    from .staged import Compute, predict_staged

    out = asked.out
    assert out is not None  # noqa: S101 - a stage lies beside an output
    compute: Compute | None = None
    if asked.scheduler is not None:
        from .cluster import delegate

        asked, compute = delegate(engine, image, asked, out)
    observer = replace(observer, counts=True)  # for whoever goes on, and reads the report
    return predict_staged(engine, source, asked, out, compute=compute, observer=observer), out
