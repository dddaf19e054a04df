"""The files and folders of a result: checked, opened, given their name when they are whole."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import OutputError
from ..images.zarr import import_zarr
from ..outputs.labels import check_outside, hidden_base, is_zarr_output, label_place, register
from ..outputs.shape import Shape
from ..system import limits
from ..system.durable import Disk
from .plan import Plan
from .store import HELD_BYTES

if TYPE_CHECKING:
    from ..outputs.output import Output

BAND_BYTES = 2**26  # of a result at a time, where an output is made from blocks
LEAST_ROOM = 2**25  # that is taken for an output, however tight the bound


@dataclass(frozen=True)
class Room:
    """What the making of an output may hold.

    Attributes:
        band_bytes: Of a result at a time, where an output is made from blocks.
        window_px: Of a mask at a time, where objects are sought: each takes some 20 bytes.
        held_bytes: Of unpacked blocks.
    """

    band_bytes: int = BAND_BYTES
    window_px: int = 2**24
    held_bytes: int = HELD_BYTES


def room_of(plan: Plan, memory_bytes: int | None) -> Room:
    """The room that is left within a bound on this process's memory, once the result is computed."""
    if memory_bytes is None:
        return Room()
    plan.image.limit_cache(0)
    limits.release_memory()
    room = max(LEAST_ROOM, memory_bytes - limits.rss_bytes())
    return Room(min(BAND_BYTES, room // 8), min(Room.window_px, room // 60), min(HELD_BYTES, room // 3))


def check_target(out: Path, *, overwrite: bool) -> None:
    """OutputError for what can be known of an output before any work."""
    check_outside(out)
    if not is_zarr_output(out):
        from ..outputs.output import check_output

        check_output(out, overwrite=overwrite)
        return
    import_zarr(OutputError, out)
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; use --overwrite to replace it, or choose another name")
    if label_place(out) is None and not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist; create it, or choose another with --out")


def shape_of(plan: Plan) -> Shape:
    """What is written of a result."""
    image = plan.image
    return Shape(plan.shape, image.plane_shape, image.plane_axes, plan.decision.channels, plan.decision.dtype)


def open_file(
    plan: Plan, out: Path, channels: int, dtype: np.dtype[Any], nodata: float | None = None, *, overwrite: bool
) -> Output:
    """The file of a result, or of what is made of it."""
    from ..outputs.output import open_output

    return open_output(
        out,
        replace(shape_of(plan), channels=channels, dtype=dtype),
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
    disk, before, place = Disk(), folder.parent, label_place(out)
    if place is not None:
        out.parent.mkdir(exist_ok=True)
    disk.replace(folder, out)
    disk.sync_folder(out.parent)
    disk.sync_folder(before)
    if place is not None:
        register(place)


def _aside(out: Path) -> Path:
    base = hidden_base(out)
    return base.with_name(f".{base.name}.before")


def numbered_folder(out: Path) -> Path:
    """Where an OME-Zarr of ids is written until it is whole."""
    base = hidden_base(out)
    return base.with_name(f".{base.name}.instances")


def clear(out: Path) -> None:
    """Deletes what went aside, now or before a kill."""
    for folder in (_aside(out), numbered_folder(out)):
        shutil.rmtree(folder, ignore_errors=True)
