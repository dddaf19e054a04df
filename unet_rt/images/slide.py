"""Whole slides at one level: by tiffslide, else by openslide, whichever is installed and reads the format."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError
from .pixels import Array, ChunkedPixels, Origin, Stored, Window, pick_level

# Read at a time and cached: one to four of the tiles that scanners write (240 to 512, sometimes 1024).
CHUNK_PX = 512
_TIFF_SUFFIXES = (".svs", ".ndpi", ".scn", ".bif", ".svslide")


def open_slide(path: Path, name: str, level: int | None = None, series: int | str | None = None) -> Stored:
    """Red, green and blue of one level.

    Raises:
        ImageError: It cannot be read, has no such level, or no library is there for it.
    """
    is_tiff = path.suffix.lower() in _TIFF_SUFFIXES
    if is_tiff and find_spec("tiffslide") is not None:
        return _by_tiffslide(path, name, level)
    if find_spec("openslide") is not None:
        return _by_openslide(path, name, level)
    if is_tiff:
        from .tiff import open_tiff

        found = open_tiff(path, name, level, series)
        note = "read as a plain TIFF; pip install 'unet-rt[slides]' for its pixel size"
        return replace(found, notes=(*found.notes, note))
    raise ImageError(
        f"{name}: {path.suffix} slides are read by openslide, which is missing; pip install openslide-python openslide-bin"
    )


def _by_tiffslide(path: Path, name: str, level: int | None) -> Stored:
    from tiffslide import TiffSlide

    from .tiff import check_whole, quiet

    class Slide(TiffSlide):
        """Takes locations at the level that is read, where the base class, like openslide, takes those of level 0."""

        def _read_region_loc_transform(self, location: tuple[int, int], level: int) -> tuple[int, int]:
            return location

    with contextlib.ExitStack() as opened, quiet():
        try:
            slide: Any = Slide(path)
            opened.callback(slide.close)
            check_whole(slide.ts_tifffile, path.stat().st_size, name)
            picked, shapes = _levels(slide, level, name)
            axes = slide.properties["tiffslide.series-axes"]
            probe = slide.read_region((0, 0), picked, (1, 1), as_array=True)
        except ImageError:
            raise
        except Exception as error:  # the parsers meet any bytes; whatever they raise, the file is at fault
            raise ImageError(f"{name}: not a readable slide ({error}); copy it again from its source") from error
        opened.pop_all()

    def load(window: Window) -> Array:
        left, top = window[1].start, window[0].start
        size = (window[1].stop - left, window[0].stop - top)
        pixels: Array = slide.read_region((left, top), picked, size, as_array=True, padding=False)
        return pixels[..., window[2]]

    samples = int(probe.shape[-1])
    shape = (*shapes[picked], samples)
    pixels = ChunkedPixels(shape, probe.dtype, (CHUNK_PX, CHUNK_PX, samples), name, load, slide.close)
    size = (slide.properties.get("tiffslide.mpp-y"), slide.properties.get("tiffslide.mpp-x"))
    found = "YXS" if axes == "YXS" else "YXC"
    return _read_slide(pixels, found, picked, shapes, size, ())


def _by_openslide(path: Path, name: str, level: int | None) -> Stored:
    import openslide

    with contextlib.ExitStack() as opened:
        try:
            slide = opened.enter_context(openslide.OpenSlide(path))
            picked, shapes = _levels(slide, level, name)
        except (openslide.OpenSlideError, OSError) as error:
            raise ImageError(f"{name}: not a readable slide ({error}); copy it again from its source") from error
        opened.pop_all()
    downsample = slide.level_downsamples[picked]
    background = slide.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
    paper = np.array([int(background[i : i + 2], 16) for i in (0, 2, 4)], np.uint16)

    def load(window: Window) -> Array:
        left, top = window[1].start, window[0].start
        size = (window[1].stop - left, window[0].stop - top)
        place = (round(left * downsample), round(top * downsample))
        pixels = np.asarray(slide.read_region(place, picked, size))
        colours, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:].astype(np.uint16)
        # What was not scanned is transparent; it has the colour that the file names for it.
        mixed = (colours * alpha + paper * (255 - alpha) + 127) // 255
        return mixed.astype(np.uint8)[..., window[2]]

    pixels = ChunkedPixels((*shapes[picked], 3), np.dtype(np.uint8), (CHUNK_PX, CHUNK_PX, 3), name, load, slide.close)
    size = (slide.properties.get(openslide.PROPERTY_NAME_MPP_Y), slide.properties.get(openslide.PROPERTY_NAME_MPP_X))
    notes = () if float(downsample).is_integer() else (f"read at 1/{downsample:.4f}, to the nearest pixel of level 0",)
    return _read_slide(pixels, "YXS", picked, shapes, size, notes)


def _levels(slide: Any, level: int | None, name: str) -> tuple[int, list[tuple[int, int]]]:
    """(level to read, (Y, X) of all)."""
    shapes = [(int(height), int(width)) for width, height in slide.level_dimensions]
    return pick_level(level, len(shapes), name), shapes


def _read_slide(
    pixels: ChunkedPixels,
    axes: str,
    picked: int,
    shapes: Sequence[tuple[int, int]],
    size_um: tuple[Any, Any],
    notes: tuple[str, ...],
) -> Stored:
    sizes = {}
    for axis, um, full, n in zip("YX", size_um, shapes[0], shapes[picked], strict=True):
        with contextlib.suppress(TypeError, ValueError):  # not all scanners write it
            if float(um) > 0:
                sizes[axis] = float(um) * (full / n)
    samples = pixels.shape[-1]
    if len(shapes) > 1:
        notes = (f"level {picked} of {len(shapes)}", *notes)
    return Stored(
        pixels,
        axes,
        Origin("tiff"),
        pixel_size_um=sizes,
        notes=notes,
        levels=tuple((*shape, samples) for shape in shapes) if len(shapes) > 1 else (),
    )
