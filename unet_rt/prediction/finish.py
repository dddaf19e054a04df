"""What a computed result is made into: its file or array, numbered objects and their tables, the overlay."""

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
from .plan import Plan
from .request import Request, Tables
from .store import ArrayStore, DeviceStore, Readable, RowStore, ZarrStore
from .work import Array

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


def check_targets(asked: Request) -> None:
    """OutputError where something is there already that the result would replace, or its output cannot be made."""
    if asked.out is not None:
        check_target(asked.out, overwrite=asked.overwrite)
    tables = asked.tables or Tables()
    for path in (tables.objects, tables.areas, tables.geojson):
        if path is not None and path.exists() and not asked.overwrite:
            raise OutputError(f"{path}: exists already; use --overwrite to replace it, or choose another name")


def is_zarr(out: Path) -> bool:
    return out.suffix.lower() == ".zarr"


def shape_of(plan: Plan) -> Shape:
    """What is written of a result."""
    image = plan.image
    return Shape(plan.shape, image.plane_shape, image.plane_axes, plan.decision.channels, plan.decision.dtype)


def finish(plan: Plan, store: Readable | RowStore | DeviceStore, asked: Request, *, again: bool = False) -> Any:
    """Makes what was asked for of a computed result.

    Args:
        plan, asked: The result.
        store: Where it is.
        again: Whether an earlier run may have made the output already.

    Returns:
        The path written, or the array: planes first, then channels, then space.
    """
    overwrite = again or asked.overwrite
    if asked.overlay is not None:
        draw_overlay(plan, store, asked.overlay)
    if isinstance(store, RowStore):
        store.sink.commit()
        return asked.out
    array = store.array if isinstance(store, ArrayStore | DeviceStore) else None
    if not isinstance(store, DeviceStore):
        if asked.output == "instances":
            array = write_instances(plan, store, asked.out, asked.tables or Tables(), overwrite=overwrite)
        elif asked.out is not None:
            write_output(plan, store, asked.out, overwrite=overwrite)
    if asked.out is not None:
        return asked.out
    return None if array is None else array.reshape(*plan.image.plane_shape, *array.shape[1:])


# --- outputs --------------------------------------------------------------------------------------------------------


def bands(store: Readable, plan: Plan) -> Iterator[tuple[int, int, Array]]:
    """(plane, first row, band) of the whole result, in order."""
    lead = max(1, plan.decision.channels)
    rows = max(1, BAND_BYTES // (lead * prod(plan.shape[1:]) * plan.decision.dtype.itemsize))
    for plane in range(plan.image.planes):
        for start in range(0, plan.shape[0], rows):
            stop = min(start + rows, plan.shape[0])
            yield plane, start, store.window(plane, (start, *(0,) * (len(plan.shape) - 1)), (stop, *plan.shape[1:]))


def write_output(plan: Plan, store: Readable, out: Path, *, overwrite: bool) -> None:
    """Makes the output: the stage's OME-Zarr itself, or a file from its blocks."""
    if isinstance(store, ZarrStore):
        store.output.finish()
        move_folder(store.output.folder, out, overwrite=overwrite)
        return
    nodata = plan.nodata if plan.image.gaps else None
    with open_file(plan, out, plan.decision.channels, plan.decision.dtype, nodata, overwrite=overwrite) as sink:
        for plane, start, band in bands(store, plan):
            sink.write(plane, (start,) + (0,) * (len(plan.shape) - 1), band)
        sink.commit()


def open_file(
    plan: Plan, out: Path, channels: int, dtype: np.dtype[Any], nodata: float | None = None, *, overwrite: bool
) -> Output:
    """The file of a result, or of what is made of it."""
    return open_output(
        out,
        shape=plan.shape,
        planes=plan.image.planes,
        plane_shape=plan.image.plane_shape,
        plane_axes=plan.image.plane_axes,
        channels=channels,
        dtype=dtype,
        source=plan.image,
        overwrite=overwrite,
        nodata=nodata,
    )


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


def draw_overlay(plan: Plan, store: Readable | RowStore | DeviceStore, path: Path) -> None:
    if isinstance(store, RowStore | DeviceStore):
        collector = store.collector  # rows are not kept
    else:
        collector = OverlayCollector(plan.shape, plan.decision.values)
        for plane, start, band in bands(store, plan):
            if plane:
                break
            collector(plane, start, band)
    if collector is not None:
        collector.draw(plan.image, path)


def write_instances(plan: Plan, store: Readable, out: Path | None, tables: Tables, *, overwrite: bool) -> Array:
    """Numbers the objects of a finished mask, plane by plane; writes their image and tables.

    Returns:
        The ids, (planes, *spatial) uint32, where ``out`` is None, else an empty array.
    """
    image = plan.image
    ids = np.zeros((image.planes, *(plan.shape if out is None else (0,) * len(plan.shape))), np.uint32)
    window: tuple[int, ...] = (max(1, BAND_BYTES // 8 // prod(plan.shape[1:])), *plan.shape[1:])
    with ExitStack() as exits:
        sink: Output | ZarrOutput | None = None
        if out is not None and is_zarr(out):
            folder = _numbered(out)
            shutil.rmtree(folder, ignore_errors=True)
            shape = replace(shape_of(plan), channels=0, dtype=np.dtype(np.uint32))
            sink = ZarrOutput.create(folder, shape, plan.blocks.chunk, image.metadata, size_of(image, plan.shape))
            side = round(WINDOW_PX ** (2 / len(plan.shape)))
            window = tuple(max(c, side // c * c) for c in sink.chunk)
        elif out is not None:
            sink = exits.enter_context(open_file(plan, out, 0, np.dtype(np.uint32), overwrite=overwrite))

        def write(start: Sequence[int], block: Array, plane: int) -> None:
            if sink is not None:
                sink.write(plane, start, block)
            else:
                ids[plane][tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block

        names = {k: class_name(plan.engine.spec.contract, k) for k in range(1, len(plan.decision.values))}
        planes = [
            objects_module.find_objects(
                partial(_labels, plan, store, plane),
                plan.shape,
                window=window,
                write=partial(write, plane=plane),
                min_size=tables.min_size,
                pixel_size_um=size_of(image, plan.shape) or (),
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


def _labels(plan: Plan, store: Readable, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
    """A window of the mask; what holds no data is background."""
    labels = store.window(plane, start, stop)
    return np.where(labels == plan.nodata, 0, labels).astype(labels.dtype) if plan.image.gaps else labels
