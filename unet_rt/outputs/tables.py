"""Tables of objects and of what classes cover, as CSV: of one image, and of all images of a folder in one."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError
from ..system.durable import open_whole
from ..system.json import Record
from .objects import Objects
from .pieces import Array


@dataclass(frozen=True)
class PlaneObjects:
    """The objects of one plane of an image.

    Attributes:
        found: The objects.
        plane: Its number among all planes, from 0.
        t, z: Its place in time and depth, where the image has such axes.
    """

    found: Objects
    plane: int = 0
    t: int | None = None
    z: int | None = None

    def row(self, image: str) -> dict[str, Any]:
        """What every line of a table begins with."""
        place = {"t": self.t, "z": self.z}
        return {"image": image} | {k: "" if n is None else n for k, n in place.items()} | {"plane": self.plane}


@dataclass(frozen=True)
class Summary(Record):
    """What was found in one image, all planes.

    Attributes:
        objects: How many.
        share: Of the pixels that belong to one.
        median_px: Of their areas, in pixels (voxels); None where there are none.
        median_area: The same in ``unit``, where the pixel size is known.
        unit: ``um2``, ``m2``, ...
    """

    objects: int
    share: float
    median_px: float | None
    median_area: float | None = None
    unit: str = ""

    @classmethod
    def of(cls, planes: Sequence[PlaneObjects]) -> Summary:
        found = [plane.found for plane in planes]
        areas = np.concatenate([one.area_px for one in found])
        median = float(np.median(areas)) if len(areas) else None
        share = float(areas.sum() / sum(prod(one.shape) for one in found))
        size = found[0].pixel_area
        if median is None or size is None:
            return cls(len(areas), share, median)
        return cls(len(areas), share, median, median * size, found[0].area_unit)


def write_table(
    path: str | os.PathLike[str], image: str, planes: Sequence[PlaneObjects], *, overwrite: bool = False
) -> None:
    """Writes objects as CSV, one line each.

    Columns: ``image``, ``t``, ``z`` (empty where there is no such axis), ``plane`` (from 0), ``id``, ``label``, ``class``,
    ``area_px`` and ``area_um2`` (``area_m2`` of maps; ``volume_px`` and ``volume_um3`` of volumes, ``volume_mm3`` of
    scanners), ``centroid_y``, ``centroid_x``, ``start_y``, ``start_x``, ``stop_y``, ``stop_x`` (pixels; ``_z`` first in
    volumes), ``touches_edge`` (0 or 1), ``mean_NAME`` for every channel of the image.

    Args:
        path: The file; it appears whole or not at all.
        image: Name of the image.
        planes: Its planes.
        overwrite: Replace what is there.

    Raises:
        OutputError: The file exists already, or cannot be written.
    """
    axes = "zyx"[-len(planes[0].found.shape) :]
    names = [f"{what}_{axis}" for what in ("centroid", "start", "stop") for axis in axes]
    means = [f"mean_{channel}" for channel in planes[0].found.channels]
    with open_whole(path, overwrite=overwrite) as stream:
        lines = csv.writer(stream, lineterminator="\n")
        areas = _area_names(planes[0].found)
        lines.writerow([*planes[0].row(image), "id", "label", "class", *areas, *names, "touches_edge", *means])
        for plane in planes:
            found, place = plane.found, list(plane.row(image).values())
            columns = [found.ids, found.label, map(found.class_name, found.label.tolist()), *_areas(found)]
            columns += [*found.centroid.T, *found.start.T, *found.stop.T, found.touches_edge.astype(int)]
            columns += [*found.means.T] if means else []
            lists = [c.tolist() if isinstance(c, np.ndarray) else c for c in columns]
            lines.writerows([*place, *line] for line in zip(*lists, strict=True))


def write_class_areas(
    path: str | os.PathLike[str], image: str, planes: Sequence[PlaneObjects], *, overwrite: bool = False
) -> None:
    """Writes what the objects of each class cover as CSV, one line per plane and class that has a name or an object.

    Columns: ``image``, ``t``, ``z``, ``plane``, ``label``, ``class``, ``objects`` (their number), ``area_px``, ``area_um2``
    (or as in :func:`write_table`, whose arguments and errors these are), ``share`` (of all pixels of the plane).
    """
    with open_whole(path, overwrite=overwrite) as stream:
        lines = csv.writer(stream, lineterminator="\n")
        names = ["label", "class", "objects", *_area_names(planes[0].found), "share"]
        lines.writerow([*planes[0].row(image), *names])
        for plane in planes:
            found, place = plane.found, plane.row(image).values()
            for label in sorted({*found.label.tolist(), *(k for k in found.class_names if k)}):
                of_class = found.label == label
                areas = [of.sum(where=of_class).item() for of in _areas(found)]
                share = areas[0] / prod(found.shape)
                count = int(of_class.sum())
                lines.writerow([*place, label, found.class_name(label), count, *areas, share])


def write_summary(path: str | os.PathLike[str], images: Mapping[str, Summary], *, overwrite: bool = False) -> None:
    """Writes one line per image as CSV: ``image``, ``objects``, ``area_share``, ``median_area_px``, and ``median_area_um2``
    (or in the unit of the image) where the pixel size of any is known. Errors: as :func:`write_table`."""
    units = sorted({one.unit for one in images.values()} - {""})
    with open_whole(path, overwrite=overwrite) as stream:
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow(["image", "objects", "area_share", "median_area_px", *(f"median_area_{unit}" for unit in units)])
        for image, one in images.items():
            sizes = [one.median_area if one.unit == unit else None for unit in units]
            lines.writerow([image, one.objects, one.share, *("" if n is None else n for n in (one.median_px, *sizes))])


def unite_tables(
    path: str | os.PathLike[str], tables: Iterable[Path], *, kept: Iterable[str] = (), overwrite: bool = False
) -> None:
    """Writes several tables as one, in order; columns that a table lacks are empty for its lines.

    Args:
        path: The table; it may be there already.
        tables: The tables.
        kept: Names of images whose lines of the table that is there are kept, in front of all others.
        overwrite: Replace what is there.

    Raises:
        OutputError: A table cannot be read, or the new one not be written.
    """
    target, kept = Path(path), set(kept)
    sources = [*([target] if kept and target.exists() else []), *tables]
    try:
        columns = list(dict.fromkeys(itertools.chain.from_iterable(map(_columns, sources))))
        with open_whole(target, overwrite=overwrite) as stream:
            lines = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
            lines.writeheader()
            for source in sources:
                with source.open(encoding="utf-8", newline="") as opened:
                    found = csv.DictReader(opened)
                    lines.writerows(line for line in found if source != target or line["image"] in kept)
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise OutputError(f"{target}: its tables cannot be put together ({error}); predict with --overwrite") from error


def _columns(table: Path) -> list[str]:
    with table.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened).fieldnames or ())


def _area_names(found: Objects) -> list[str]:
    what = "area" if len(found.shape) == 2 else "volume"
    return [f"{what}_px", *([f"{what}_{found.area_unit}"] if found.pixel_size_um else [])]


def _areas(found: Objects) -> list[Array]:
    size = found.pixel_area
    return [found.area_px, *([] if size is None else [found.area_px * size])]
