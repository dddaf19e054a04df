"""Microscopes' own files by bioio: scenes, channels by name, pixel sizes; windows by its Dask arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError
from .pixels import Array, ChunkedPixels, Origin, Stored, Window, pick_level

_LETTERS = "TCZYXS"


def open_bioio(
    path: Path, name: str, level: int | None, series: int | str | None, called: str, extra: str | None
) -> Stored:
    """One scene of a microscope's own file.

    Args:
        path, name, level, series: As for other formats.
        called: Name of the format.
        extra: What brings bioio and its reader for the format; None: only Java's Bio-Formats reads it.

    Raises:
        ImageError: bioio or its reader is missing, it cannot be read, or has no such scene.
    """
    way = f"pip install 'unet-rt[{extra}]'" if extra else "pip install bioio bioio-bioformats (which needs Java)"
    way += ", or export it as OME-TIFF"
    try:
        import bioio
    except ImportError as error:
        raise ImageError(f"{name}: {called} is read by bioio, which is missing; {way}") from error
    try:
        image: Any = bioio.BioImage(path)
        scenes = [str(scene) for scene in image.scenes]
    except Exception as error:  # readers raise what they like: none is installed, or the file is at fault
        if "unsupported" in type(error).__name__.lower():
            raise ImageError(f"{name}: {called} needs a reader of bioio's that is not installed; {way}") from error
        raise ImageError(f"{name}: not a readable {called} file ({error}); copy it again from its source") from error
    picked = _pick_scene(scenes, series, name)
    try:
        image.set_scene(picked)
        levels = list(image.resolution_levels)
        chosen = pick_level(level, len(levels), name)
        shapes = []
        for number in levels:
            image.set_resolution_level(number)
            shapes.append(tuple(int(n) for n in image.xarray_dask_data.shape))
        image.set_resolution_level(levels[chosen])
        data = image.xarray_dask_data
        axes = "".join(str(axis).upper() for axis in data.dims)
        sizes = {axis: um for axis in "ZYX" if (um := getattr(image.physical_pixel_sizes, axis, None))}
        names = tuple(str(channel) for channel in image.channel_names or ())
    except ImageError:
        raise
    except Exception as error:  # as above
        raise ImageError(f"{name}: scene {scenes[picked]} cannot be read ({error}); copy the file again") from error
    notes = [f"series {picked} of {len(scenes)} ({scenes[picked]})"] if len(scenes) > 1 else []
    notes += [f"level {chosen} of {len(levels)}"] if len(levels) > 1 else []
    return Stored(
        _pixels(data.data, name),
        axes,
        Origin("ome"),
        names=names if "C" in axes and len(names) == data.shape[axes.index("C")] else (),
        pixel_size_um={axis: float(um) for axis, um in sizes.items() if float(um) > 0},
        notes=tuple(notes),
        levels=tuple(shapes) if len(levels) > 1 else (),
        series=len(scenes),
    )


def _pick_scene(scenes: list[str], asked: int | str | None, name: str) -> int:
    """ImageError where there are several and none was chosen, or there is no such one."""
    if asked is None and len(scenes) == 1:
        return 0
    listed = ", ".join(f"{number} {scene}" for number, scene in enumerate(scenes))
    if asked is None:
        raise ImageError(f"{name}: holds {len(scenes)} images: {listed}; choose one with --series N or NAME")
    found = [number for number in range(len(scenes)) if asked in (number, str(number))]
    found = found or [number for number, scene in enumerate(scenes) if scene == asked]
    if len(found) != 1:
        raise ImageError(f"{name}: no single series is called {asked!r}; there are {listed}; choose with --series")
    return found[0]


def _pixels(array: Any, name: str) -> ChunkedPixels:
    """The array by its own chunks, each of which is made once for all windows beside each other."""

    def load(window: Window) -> Array:
        return np.asarray(array[window].compute(scheduler="synchronous"))

    return ChunkedPixels(array.shape, np.dtype(array.dtype), [c[0] for c in array.chunks], name, load)
