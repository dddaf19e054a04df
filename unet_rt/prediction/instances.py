"""Numbered objects of a finished mask: their image, tables and outlines."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..contract.contract import Contract
from ..engine.parity import class_name
from ..images.open import open_image
from ..images.source import Source
from ..outputs import objects as objects_module
from ..outputs import outlines
from ..outputs import tables as tables_module
from ..outputs.output import Output
from ..outputs.shape import size_of
from ..outputs.zarr import ZarrOutput
from .files import Room, is_zarr, move_folder, numbered_folder, open_file, shape_of
from .plan import Plan
from .request import Tables
from .store import Readable
from .work import Array


def write_instances(
    plan: Plan, store: Readable, out: Path | None, tables: Tables, room: Room, *, overwrite: bool
) -> Array:
    """Numbers the objects of a finished mask, plane by plane; writes their image and tables.

    Returns:
        The ids, (planes, *spatial) uint32, where ``out`` is None, else an empty array.
    """
    image = plan.image
    ids = np.zeros((image.planes, *(plan.shape if out is None else (0,) * len(plan.shape))), np.uint32)
    window: tuple[int, ...] = (max(1, room.window_px // 2 // prod(plan.shape[1:])), *plan.shape[1:])
    with ExitStack() as exits:
        sink: Output | ZarrOutput | None = None
        if out is not None and is_zarr(out):
            folder = numbered_folder(out)
            shutil.rmtree(folder, ignore_errors=True)
            shape = replace(shape_of(plan), channels=0, dtype=np.dtype(np.uint32))
            sink = ZarrOutput.create(folder, shape, plan.blocks.chunk, image.metadata, size_of(image, plan.shape))
            side = int(room.window_px ** (1 / len(plan.shape)))
            window = tuple(max(c, side // c * c) for c in sink.chunk)
        elif out is not None:
            sink = exits.enter_context(open_file(plan, out, 0, np.dtype(np.uint32), overwrite=overwrite))

        def write(start: Sequence[int], block: Array, plane: int) -> None:
            if sink is not None:
                sink.write(plane, start, block)
            else:
                ids[plane][tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block

        names = {k: class_name(plan.contract, k) for k in range(1, len(plan.decision.values))}
        found = (
            objects_module.find_objects(
                partial(_labels, plan, store, plane),
                plan.shape,
                window=window,
                write=partial(write, plane=plane),
                min_size=tables.min_size,
                pixel_size_um=size_of(image, plan.shape) or (),
            )
            for plane in range(image.planes)
        )
        planes = [replace(objects, class_names=names) for objects in found]
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
    if "transform" in image.metadata.tags:
        place = {"transform": image.metadata.tags["transform"], "crs": image.metadata.tags["crs"]}
    with open_image(ids, Contract(), spatial=2) as source:
        outlines.write_geojson(
            path, found, lambda start, stop: source.read(0, start, stop)[0], overwrite=overwrite, **place
        )


def _labels(plan: Plan, store: Readable, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
    """A window of the mask; what holds no data is background."""
    labels = store.window(plane, start, stop)
    return np.where(labels == plan.nodata, 0, labels).astype(labels.dtype) if plan.image.gaps else labels
