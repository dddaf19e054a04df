"""Results that take blocks: kept in a stage beside the output or in memory, shared by shards, then made into the output."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..contract.contract import Contract
from ..engine.parity import class_name
from ..errors import OutputError
from ..images.open import open_image
from ..images.source import Source
from ..images.zarr import import_zarr
from ..outputs import objects as objects_module
from ..outputs import outlines
from ..outputs import tables as tables_module
from ..outputs.output import Output, check_output, open_output
from ..outputs.pictures import OverlayCollector
from ..outputs.shape import Shape, size_of
from ..outputs.zarr import ZarrOutput
from ..system.durable import Disk
from .plan import Prepared
from .request import Array, Tables
from .store import Store, ZarrStore

WINDOW_PX = 4096  # side of the windows in which objects are sought, about
BAND_BYTES = 2**26  # of a result at a time, where an output is made from blocks


def check_target(out: Path, *, overwrite: bool) -> None:
    """OutputError for what can be known of an output before any work."""
    if not is_zarr(out):
        check_output(out, overwrite=overwrite)
        return
    import_zarr(OutputError, out)
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; use --overwrite to replace it, or choose another name")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist; create it, or choose another with --out")


def is_zarr(out: Path) -> bool:
    return out.suffix.lower() == ".zarr"


def _shape(made: Prepared) -> Shape:
    image = made.image
    return Shape(made.shape, image.plane_shape, image.plane_axes, made.decision.channels, made.decision.dtype)


# --- outputs --------------------------------------------------------------------------------------------------------


def bands(store: Store, made: Prepared) -> Iterator[tuple[int, int, Array]]:
    """(plane, first row, band) of the whole result, in order."""
    lead = max(1, made.decision.channels)
    rows = max(1, BAND_BYTES // (lead * prod(made.shape[1:]) * made.decision.dtype.itemsize))
    for plane in range(made.image.planes):
        for start in range(0, made.shape[0], rows):
            stop = min(start + rows, made.shape[0])
            yield plane, start, store.window(plane, (start, *(0,) * (len(made.shape) - 1)), (stop, *made.shape[1:]))


def write_output(made: Prepared, store: Store, out: Path, *, overwrite: bool) -> None:
    """Makes the output: the stage's OME-Zarr itself, or a file from its blocks."""
    if isinstance(store, ZarrStore):
        store.output.finish()
        move_folder(store.output.folder, out, overwrite=overwrite)
        return
    nodata = made.nodata if made.image.gaps else None
    with _opened(made, out, made.decision.channels, made.decision.dtype, nodata, overwrite=overwrite) as sink:
        for plane, start, band in bands(store, made):
            sink.write(plane, (start,) + (0,) * (len(made.shape) - 1), band)
        sink.commit()


def _opened(
    made: Prepared, out: Path, channels: int, dtype: np.dtype[Any], nodata: float | None = None, *, overwrite: bool
) -> Output:
    image = made.image
    shape = Shape(made.shape, image.plane_shape, image.plane_axes, channels, dtype)
    return open_output(out, shape, source=image, overwrite=overwrite, nodata=nodata)


def move_folder(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Gives a finished folder its name; what had the name before goes aside, until :func:`clear`."""
    if out.exists():
        if not overwrite:
            raise OutputError(f"{out}: exists already; use --overwrite to replace it, or choose another name")
        shutil.rmtree(_aside(out), ignore_errors=True)
        out.rename(_aside(out))
    disk, before = Disk(), folder.parent
    disk.replace(folder, out)
    disk.sync_folder(out.parent)
    disk.sync_folder(before)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.before")


def _numbered(out: Path) -> Path:
    """Where an OME-Zarr of ids is written until it is whole."""
    return out.with_name(f".{out.name}.instances")


def clear(out: Path) -> None:
    """Deletes what went aside, now or before a kill."""
    for folder in (_aside(out), _numbered(out)):
        shutil.rmtree(folder, ignore_errors=True)


def draw_overlay(made: Prepared, store: Store, path: Path) -> None:
    collector = OverlayCollector(made.shape, made.decision.values)
    for plane, start, band in bands(store, made):
        if plane:
            break
        collector(plane, start, band)
    collector.draw(made.image, path)


def write_instances(made: Prepared, store: Store, out: Path | None, tables: Tables, *, overwrite: bool) -> Array:
    """Numbers the objects of a finished mask, plane by plane; writes their image and tables.

    Returns:
        The ids, (planes, *spatial) uint32, where ``out`` is None, else an empty array.
    """
    image = made.image
    ids = np.zeros((image.planes, *(made.shape if out is None else (0,) * len(made.shape))), np.uint32)
    window: tuple[int, ...] = (max(1, BAND_BYTES // 8 // prod(made.shape[1:])), *made.shape[1:])
    with ExitStack() as exits:
        sink: Output | ZarrOutput | None = None
        if out is not None and is_zarr(out):
            folder = _numbered(out)
            shutil.rmtree(folder, ignore_errors=True)
            shape = replace(_shape(made), channels=0, dtype=np.dtype(np.uint32))
            sink = ZarrOutput.create(folder, shape, made.plan.chunk, image.metadata, size_of(image, made.shape))
            side = round(WINDOW_PX ** (2 / len(made.shape)))
            window = tuple(max(c, side // c * c) for c in sink.chunk)
        elif out is not None:
            sink = exits.enter_context(_opened(made, out, 0, np.dtype(np.uint32), overwrite=overwrite))

        def write(start: Sequence[int], block: Array, plane: int) -> None:
            if sink is not None:
                sink.write(plane, start, block)
            else:
                ids[plane][tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block

        names = {k: class_name(made.engine.spec.contract, k) for k in range(1, len(made.decision.values))}
        planes = [
            replace(
                objects_module.find_objects(
                    partial(_labels, made, store, plane),
                    made.shape,
                    window=window,
                    write=partial(write, plane=plane),
                    min_size=tables.min_size,
                    pixel_size_um=size_of(image, made.shape) or (),
                ),
                class_names=names,
            )
            for plane in range(image.planes)
        ]
        if isinstance(sink, ZarrOutput) and out is not None:
            sink.finish()
            move_folder(sink.folder, out, overwrite=overwrite)
        elif isinstance(sink, Output):
            sink.commit()
    if tables.objects is not None:
        tables_module.write_table(tables.objects, planes, overwrite=overwrite)
    if tables.areas is not None:
        tables_module.write_class_areas(tables.areas, planes, overwrite=overwrite)
    if tables.geojson is not None:
        _write_outlines(planes[0], image, ids[0] if out is None else out, tables.geojson, overwrite=overwrite)
    return ids


def _write_outlines(found: objects_module.Objects, image: Source, ids: Any, path: Path, *, overwrite: bool) -> None:
    """Outlines of the ids in an array or file: in map coordinates where the image has them, else in pixels."""
    place = {}
    if image.metadata.kind == "geo":
        place = {"transform": image.metadata.tags["transform"], "crs": image.metadata.tags["crs"]}
    with open_image(ids, Contract(), spatial=2) as source:
        outlines.write_geojson(
            path, found, lambda start, stop: source.read(0, start, stop)[0], overwrite=overwrite, **place
        )


def _labels(made: Prepared, store: Store, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
    """A window of the mask; what holds no data is background."""
    labels = store.window(plane, start, stop)
    return np.where(labels == made.nodata, 0, labels).astype(labels.dtype) if made.image.gaps else labels
