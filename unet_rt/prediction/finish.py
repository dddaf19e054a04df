"""What a computed result is made into: its file or array, numbered objects and their tables, the overlay."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..outputs.labels import check_outside
from ..outputs.pictures import OverlayCollector
from .files import Room, check_target, move_folder, open_file, room_of
from .plan import Plan
from .report import RunReport
from .request import Request, Tables
from .store import ArrayStore, DeviceStore, PackedStore, Readable, RowStore, ZarrStore
from .work import Array


def check_targets(asked: Request) -> None:
    """OutputError where something is there already that the result would replace, or its output cannot be made."""
    if asked.out is not None:
        check_target(asked.out, overwrite=asked.overwrite)
    tables = asked.tables or Tables()
    if asked.overlay is not None:
        check_outside(asked.overlay)
    for path in (tables.objects, tables.areas, tables.geojson):
        if path is not None:
            check_outside(path)
        if path is not None and path.exists() and not asked.overwrite:
            raise OutputError(f"{path}: exists already; use --overwrite to replace it, or choose another name")


def finish(
    plan: Plan, store: Readable | RowStore | DeviceStore, asked: Request, report: RunReport, *, again: bool = False
) -> Any:
    """Makes what was asked for of a computed result.

    Args:
        plan, asked: The result.
        store: Where it is.
        report: Receives what was found of objects.
        again: Whether an earlier run may have made the output already.

    Returns:
        The path written, or the array: planes first, then channels, then space.
    """
    overwrite = again or asked.overwrite
    room = Room() if isinstance(store, RowStore | DeviceStore) else room_of(plan, asked.memory_bytes)
    if isinstance(store, PackedStore):
        store.held_bytes = room.held_bytes
    if asked.overlay is not None:
        draw_overlay(plan, store, asked.overlay, room)
    if isinstance(store, RowStore):
        store.sink.commit()
        return asked.out
    array = store.array if isinstance(store, ArrayStore | DeviceStore) else None
    if not isinstance(store, DeviceStore):
        if asked.output == "instances":
            from .instances import write_instances  # SciPy's and the tables' are not every prediction's

            array, report.found = write_instances(plan, store, asked, room, overwrite=overwrite)
        elif asked.out is not None:
            write_output(plan, store, asked.out, room, overwrite=overwrite)
    if asked.out is not None:
        return asked.out
    return None if array is None else array.reshape(*plan.image.plane_shape, *array.shape[1:])


# --- outputs --------------------------------------------------------------------------------------------------------


def bands(store: Readable, plan: Plan, band_bytes: int) -> Iterator[tuple[int, int, Array]]:
    """(plane, first row, band) of the whole result, in order."""
    lead = max(1, plan.decision.channels)
    rows = max(1, band_bytes // (lead * prod(plan.shape[1:]) * plan.decision.dtype.itemsize))
    for plane in range(plan.image.planes):
        for start in range(0, plan.shape[0], rows):
            stop = min(start + rows, plan.shape[0])
            yield plane, start, store.window(plane, (start, *(0,) * (len(plan.shape) - 1)), (stop, *plan.shape[1:]))


def write_output(plan: Plan, store: Readable, out: Path, room: Room, *, overwrite: bool) -> None:
    """Makes the output: the stage's OME-Zarr itself, or a file from its blocks."""
    if isinstance(store, ZarrStore):
        store.output.finish()
        move_folder(store.output.folder, out, overwrite=overwrite)
        return
    nodata = plan.nodata if plan.image.gaps else None
    with open_file(plan, out, plan.decision.channels, plan.decision.dtype, nodata, overwrite=overwrite) as sink:
        for plane, start, band in bands(store, plan, room.band_bytes):
            sink.write(plane, (start,) + (0,) * (len(plan.shape) - 1), band)
        sink.commit()


def draw_overlay(plan: Plan, store: Readable | RowStore | DeviceStore, path: Path, room: Room) -> None:
    if isinstance(store, RowStore | DeviceStore):
        collector = store.collector  # rows are not kept
    else:
        collector = OverlayCollector(plan.shape, plan.decision.values)
        for plane, start, band in bands(store, plan, room.band_bytes):
            if plane:
                break
            collector(plane, start, band)
    if collector is not None:
        collector.draw(plan.image, path)
