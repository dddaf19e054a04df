"""Numbered objects of a finished mask: their image, tables and outlines."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..engine.parity import class_name
from ..errors import OutputError
from ..images.source import Source
from ..outputs.labels import is_zarr_output, label_place
from ..outputs.objects import SPOOL_BYTES, Numbered, Sought, Unit, find_objects
from ..outputs.outlines import Outlined, write_geojson
from ..outputs.output import Output
from ..outputs.shape import size_of
from ..outputs.split import Split, border_label
from ..outputs.tables import PlaneObjects, Summary, write_class_areas, write_table
from ..outputs.zarr import ZarrOutput
from ..system import limits
from .distance import ReadPlane, distances
from .files import Room, move_folder, numbered_folder, open_file, shape_of
from .plan import FREE_SHARE, Plan
from .request import Request, Tables
from .stage import stage_folder
from .store import Readable
from .work import Array

SCANNER_UM = 100  # pixels of this size and more are measured in millimetres

Sink = Output | ZarrOutput | Array


def write_instances(
    plan: Plan, store: Readable, asked: Request, room: Room, *, overwrite: bool
) -> tuple[Array, Summary]:
    """Numbers the objects of a finished mask, plane by plane; writes their image and tables.

    Returns:
        (the ids, (planes, *spatial) uint32, where ``asked.out`` is None, else an empty array; what was found).
    """
    out, tables = asked.out, asked.tables or Tables()
    ids = np.zeros((plan.image.planes, *(plan.shape if out is None else (0,) * len(plan.shape))), np.uint32)
    with ExitStack() as exits:
        spool = exits.enter_context(tempfile.SpooledTemporaryFile(SPOOL_BYTES))
        found = list(_find(plan, store, asked, room, exits, spool))
        sink = ids if out is None else _open_sink(plan, out, max(map(len, found)), exits, overwrite=overwrite)
        planes = [_write(plan, sink, plane, one, means=tables.measured) for plane, one in enumerate(found)]
        if isinstance(sink, ZarrOutput) and out is not None:
            sink.finish()
            move_folder(sink.folder, out, overwrite=overwrite)
        elif isinstance(sink, Output):
            sink.commit()
        name = Path(plan.image.name).name
        if tables.objects is not None:
            write_table(tables.objects, name, planes, overwrite=overwrite)
        if tables.areas is not None:
            write_class_areas(tables.areas, name, planes, overwrite=overwrite)
        if tables.geojson is not None:
            _write_outlines(plan, found, planes, tables.geojson, overwrite=overwrite)
    return ids, Summary.of(planes)


# --- finding --------------------------------------------------------------------------------------------------------


def _find(
    plan: Plan, store: Readable, asked: Request, room: Room, exits: ExitStack, spool: IO[bytes]
) -> Iterator[Numbered]:
    tables = asked.tables or Tables()
    size = size_of(plan.image, plan.shape) or ()
    split, read_distance = None, None
    if tables.split != "none":
        border = border_label(_class_names(plan)) if tables.split == "border" else 0
        split = Split(tables.split, spool, border, sampling=size, room_bytes=_split_bytes(asked))
        read_distance = _distance(plan, asked, exits) if tables.split == "watershed" else None
    for plane in range(plan.image.planes):
        if split is not None and read_distance is not None:
            split = replace(split, distance=partial(read_distance, plane))
        yield find_objects(
            partial(_labels, plan, store, plane),
            plan.shape,
            Sought(tables.min_size, split=split),
            window=_window(plan, asked.out, room.window_px),
            pixel_size_um=size,
        )


def _distance(plan: Plan, asked: Request, exits: ExitStack) -> ReadPlane | None:
    output = plan.engine.spec.distance_of(plan.output)
    if output is None:
        return None
    folder = stage_folder(asked.out) / "distance" if asked.out is not None and asked.staged else None
    return exits.enter_context(distances(plan, output, folder))


def _split_bytes(asked: Request) -> int:
    """What splitting one object may take."""
    if asked.memory_bytes is not None:
        return max(0, asked.memory_bytes - limits.rss_bytes()) // asked.processes
    return int(FREE_SHARE * limits.memory_bytes()) // asked.processes


def _window(plan: Plan, out: Path | None, px: int) -> tuple[int, ...]:
    """What is looked at at a time: whole chunks of an OME-Zarr, rows of anything else."""
    if out is not None and is_zarr_output(out):
        side = px ** (1 / len(plan.shape))
        return tuple(int(max(c, side // c * c)) for c in plan.blocks.chunk)
    return (max(1, px // 2 // prod(plan.shape[1:])), *plan.shape[1:])


def _labels(plan: Plan, store: Readable, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
    """A window of the mask; what holds no data is background."""
    labels = store.window(plane, start, stop)
    return np.where(labels == plan.nodata, 0, labels).astype(labels.dtype) if plan.image.gaps else labels


# --- writing --------------------------------------------------------------------------------------------------------


def _open_sink(plan: Plan, out: Path, most: int, exits: ExitStack, *, overwrite: bool) -> Output | ZarrOutput:
    """The image of ids: of 16 bits where they fit, which more programs read."""
    dtype = np.dtype(np.uint16 if most <= np.iinfo(np.uint16).max else np.uint32)
    if not is_zarr_output(out):
        if out.suffix.lower() == ".png" and dtype != np.uint16:
            raise OutputError(f"{out}: PNG holds ids up to 65,535, and there are {most:,}; name it {out.stem}.tif")
        return exits.enter_context(open_file(plan, out, 0, dtype, overwrite=overwrite))
    folder = numbered_folder(out)
    shutil.rmtree(folder, ignore_errors=True)
    shape = replace(shape_of(plan), channels=0, dtype=dtype)
    size = size_of(plan.image, plan.shape)
    return ZarrOutput.create(folder, shape, plan.blocks.chunk, plan.image.metadata, size, over=label_place(out))


def _write(plan: Plan, sink: Sink, plane: int, found: Numbered, *, means: bool) -> PlaneObjects:
    """Writes the ids of a plane, and measures the image's channels on the way where ``means`` are wanted."""
    image, sums = plan.image, None
    if means and image.shape == plan.shape:
        sums = np.zeros((len(image.channel_names), len(found) + 1))
    for start, ids in found.windows():
        stop = [a + n for a, n in zip(start, ids.shape, strict=True)]
        if isinstance(sink, Output | ZarrOutput):
            sink.write(plane, start, ids.astype(sink.shape.dtype, copy=False))
        else:
            sink[plane][tuple(map(slice, start, stop))] = ids
        if sums is not None and (last := int(ids.max())):
            for total, pixels in zip(sums, image.read_stored(plane, start, stop), strict=True):
                total[: last + 1] += np.bincount(ids.reshape(-1), weights=pixels.reshape(-1), minlength=last + 1)
    objects = replace(found.objects, class_names=_class_names(plan), unit=_unit(image))
    if sums is not None:
        objects = replace(objects, channels=image.channel_names, means=(sums[:, 1:] / np.maximum(objects.area_px, 1)).T)
    index = dict(zip(image.plane_axes, np.unravel_index(plane, image.plane_shape or (1,)), strict=False))
    t, z = (None if letter not in index else int(index[letter]) for letter in "TZ")
    return PlaneObjects(objects, plane, t, z)


def _class_names(plan: Plan) -> dict[int, str]:
    return {k: class_name(plan.contract, k) for k in range(1, len(plan.decision.values))}


def _unit(image: Source) -> Unit:
    """Metres for maps, millimetres for scanners, micrometres for microscopes."""
    if image.metadata.kind == "geo":
        return "m"
    return "mm" if image.pixel_size_um and min(image.pixel_size_um) >= SCANNER_UM else "um"


def _write_outlines(
    plan: Plan, found: Sequence[Numbered], planes: Sequence[PlaneObjects], path: Path, *, overwrite: bool
) -> None:
    """Outlines: in map coordinates where the image has them, else in pixels of the finest level, as viewers count."""
    image = plan.image
    down, across = (n / m for n, m in zip(image.levels[0] if image.levels else image.shape, plan.shape, strict=True))
    place: dict[str, Any] = {"transform": (across, 0.0, 0.0, 0.0, down, 0.0)}
    if "transform" in image.metadata.tags:
        from ..outputs.geo import crs_name, scaled_transform

        crs = image.metadata.tags["crs"]
        scale = [n / m for n, m in zip(image.shape, plan.shape, strict=True)]
        place = {"transform": scaled_transform(image.metadata, scale), "crs": crs and crs_name(crs)}
    pictures = []
    for one, plane in zip(found, planes, strict=True):
        # Pages of a file that say nothing of themselves are moments to QuPath.
        where = (plane.z or 0, plane.t if plane.t is not None else plane.plane if plane.z is None else 0)
        pictures.append(Outlined(plane.found, one.read, where if image.plane_axes else None))
    write_geojson(path, pictures, window=found[0].window, overwrite=overwrite, **place)
