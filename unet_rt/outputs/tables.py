"""Tables of objects and of what classes cover, as CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ..system.durable import open_whole
from .objects import Objects
from .pieces import Array


def write_table(path: str | os.PathLike[str], planes: Sequence[Objects], *, overwrite: bool = False) -> None:
    """Writes objects as CSV, one line each.

    Columns: ``plane`` (from 0; only for several planes), ``id``, ``label``, ``class``, ``area_px`` and ``area_um2``
    (``volume_px`` and ``volume_um3`` of volumes), ``centroid_y``, ``centroid_x``, ``start_y``, ``start_x``, ``stop_y``,
    ``stop_x`` (pixels; ``_z`` first in volumes), ``touches_edge`` (0 or 1).

    Args:
        path: The file; it appears whole or not at all.
        planes: The objects of each plane.
        overwrite: Replace what is there.

    Raises:
        OutputError: The file exists already, or cannot be written.
    """
    axes = "zyx"[-len(planes[0].shape) :]
    names = [f"{what}_{axis}" for what in ("centroid", "start", "stop") for axis in axes]
    with open_whole(path, overwrite=overwrite) as stream:
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow([*_plane(planes, "plane"), "id", "label", "class", *_area_names(planes), *names, "touches_edge"])
        for number, found in enumerate(planes):
            columns = [found.ids, found.label, map(found.class_name, found.label.tolist()), *_areas(found)]
            columns += [*found.centroid.T, *found.start.T, *found.stop.T, found.touches_edge.astype(int)]
            lists = [c.tolist() if isinstance(c, np.ndarray) else c for c in columns]
            lines.writerows([*_plane(planes, number), *line] for line in zip(*lists, strict=True))


def write_class_areas(path: str | os.PathLike[str], planes: Sequence[Objects], *, overwrite: bool = False) -> None:
    """Writes what the objects of each class cover as CSV, one line per class that has a name or an object.

    Columns: ``plane`` (only for several planes), ``label``, ``class``, ``objects`` (their number), ``area_px``,
    ``area_um2`` (``volume_...`` of volumes), ``share`` (of all pixels of the mask). Arguments and errors are those of
    :func:`write_table`.
    """
    with open_whole(path, overwrite=overwrite) as stream:
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow([*_plane(planes, "plane"), "label", "class", "objects", *_area_names(planes), "share"])
        for number, found in enumerate(planes):
            for label in sorted({*found.label.tolist(), *(k for k in found.class_names if k)}):
                of_class = found.label == label
                areas = [of.sum(where=of_class).item() for of in _areas(found)]
                share = areas[0] / prod(found.shape)
                count = int(of_class.sum())
                lines.writerow([*_plane(planes, number), label, found.class_name(label), count, *areas, share])


def _plane(planes: Sequence[Objects], value: Any) -> list[Any]:
    return [value] if len(planes) > 1 else []


def _area_names(planes: Sequence[Objects]) -> list[str]:
    what, power = ("area", 2) if len(planes[0].shape) == 2 else ("volume", 3)
    return [f"{what}_px", *([f"{what}_um{power}"] if planes[0].pixel_size_um else [])]


def _areas(found: Objects) -> list[Array]:
    area_um = found.area_um
    return [found.area_px, *([] if area_um is None else [area_um])]
