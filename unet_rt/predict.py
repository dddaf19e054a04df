"""The image line in one function: an image, its tiles, the pipeline that runs them, an output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import machine
from .contract import Normalization
from .engine import Engine, EngineSpec
from .errors import ContractError, ImageError, OutputError
from .normalize import affine
from .pictures import OverlayCollector
from .pipeline import Progress, RunReport, Spans, Work, run
from .stitch import OutputKind, decide
from .tiles import TileGrid

if TYPE_CHECKING:
    from .device import Device, DeviceArray
    from .image import Source

Array = npt.NDArray[Any]

MEMORY_SHARE = 0.35  # of the memory that is free, for running one batch of tiles


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
    trace: Spans | None = None,
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
        trace: Receives (stage, start, stop) of all that is timed, seconds of ``time.perf_counter``; not on a GPU.

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

        works = [Work(plane, grid) for plane in range(source.planes)]

        def finish(write: Callable[[int, int, Array], None] | None, target: DeviceArray | None = None) -> RunReport:
            def both(work: Work, start: int, band: Array) -> None:
                if write is not None:
                    write(work.plane, start, band)
                if collector is not None:
                    collector(work.plane, start, band)

            if target is None:
                return run(
                    engine, source, works, decision, both, affines,
                    batch=batch, threads=threads, progress=progress, trace=trace,
                )  # fmt: skip
            from . import predict_device

            host = both if collector is not None or report is not None else None
            return predict_device.run(
                engine, source, works, decision, host, affines, batch=batch, progress=progress, target=target
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
