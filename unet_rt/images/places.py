"""Where a picture lies on the earth: transform or ground control points, from tags or from a world file beside it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError
from .pixels import Origin, Stored


def world_file(path: Path) -> Path | None:
    """The file beside a picture that places it (``a.tif``: ``a.tfw``, ``a.tifw``, ``a.wld``), None where there is none."""
    suffix = path.suffix.lower()
    if len(suffix) < 3:
        return None
    names = (f"{suffix[:2]}{suffix[-1]}w", f"{suffix}w", ".wld")
    beside = (path.with_suffix(name) for each in names for name in (each, each.upper()))
    return next((file for file in beside if file.is_file()), None)


def place_of(dataset: Any, path: Path) -> tuple[dict[str, Any], dict[str, float], str]:
    """Where a picture lies.

    Args:
        dataset: Opened by rasterio.
        path: Of its file, beside which a world file or a projection (``.prj``) may lie.

    Returns:
        What an output of the same picture repeats, micrometres per pixel, and a sentence where tags alone do not say it.

    Raises:
        ImageError: What lies beside the file cannot be read.
    """
    crs, transform = dataset.crs, dataset.transform
    points, points_crs = dataset.gcps
    if points:
        crs = points_crs or crs
        tags = {"gcps": tuple((p.row, p.col, p.x, p.y, p.z or 0.0) for p in points)}
        return (
            {**tags, "crs": None if crs is None else crs.to_wkt()},
            {},
            f"placed by {len(points)} ground control points",
        )
    file = world_file(path)
    # Tags of a TIFF come first, and then its world file is none of its files.
    used = file is not None and (dataset.driver != "GTiff" or file.name in {Path(each).name for each in dataset.files})
    if file is not None and transform.is_identity:
        raise ImageError(f"{file}: does not hold the six numbers of a world file; mend it, or move it away")
    crs = crs or _projection(path)
    note = ""
    if file is not None and used:
        note = f"placed by {file.name}" + ("" if crs else ", which names no coordinate system")
    sizes: dict[str, float] = {}
    if crs is not None and crs.is_projected:
        metres = float(crs.linear_units_factor[1])
        sizes = {
            "X": float(np.hypot(transform.a, transform.d)) * metres * 1e6,
            "Y": float(np.hypot(transform.b, transform.e)) * metres * 1e6,
        }
    return {"transform": tuple(transform)[:6], "crs": None if crs is None else crs.to_wkt()}, sizes, note


def _projection(path: Path) -> Any:
    """The coordinate system of the ``.prj`` beside a picture, as rasterio has it; None where there is none."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    file = path.with_suffix(".prj")
    if not file.is_file():
        return None
    try:
        return CRS.from_wkt(file.read_text(encoding="utf-8"))
    except (CRSError, OSError, ValueError) as error:
        raise ImageError(
            f"{file}: no coordinate system can be read from it ({error}); mend it, or move it away"
        ) from error


def lost_place(file: Path) -> str:
    """What is to be said where a world file is not read."""
    return f"the place in {file.name} is not carried over; pip install 'unet-rt[geo]' for that"


def add_place(stored: Stored, path: Path, *, turned: bool) -> Stored:
    """A picture of a format that knows no places, with that of its world file.

    ``turned``: the pixels are no longer as they are stored, which is what a world file places.
    """
    file = world_file(path)
    if file is None:
        return stored
    if turned:
        return replace(stored, notes=(*stored.notes, f"{file.name} is of the picture as stored, and not carried over"))
    if find_spec("rasterio") is None:
        return replace(stored, notes=(*stored.notes, lost_place(file)))
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path) as dataset:
            tags, sizes, note = place_of(dataset, path)
    return replace(stored, origin=Origin("geo", tags=tags), pixel_size_um=sizes, notes=(*stored.notes, note))
