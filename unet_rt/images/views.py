"""Pixels as they are meant where a file stores them otherwise: turned, or as indices into a palette."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .pixels import Array, Pixels, Stored, Window


class TurnedPixels:
    """Pixels stored in another orientation than they are seen in: 1 to 8, as in TIFF and EXIF."""

    def __init__(self, pixels: Pixels, axes: str, orientation: int) -> None:
        self.stored = pixels
        self._y, self._x = axes.index("Y"), axes.index("X")
        # From the picture as stored: rows and columns change places first, then rows or columns run backwards.
        self._transposed = orientation >= 5
        self._backwards = [orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)]
        self.shape = self.turn(pixels.shape)
        self.dtype = pixels.dtype

    def turn(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape as stored -> as seen; or back."""
        turned = list(shape)
        if self._transposed:
            turned[self._y], turned[self._x] = shape[self._x], shape[self._y]
        return tuple(turned)

    def read(self, window: Window) -> Array:
        parts, flip = list(window), []
        for axis, backwards in zip((self._y, self._x), self._backwards, strict=True):
            if backwards:
                start, stop, _ = window[axis].indices(self.shape[axis])
                parts[axis] = slice(self.shape[axis] - stop, self.shape[axis] - start)
                flip.append(axis)
        if self._transposed:
            parts[self._y], parts[self._x] = parts[self._x], parts[self._y]
        pixels = self.stored.read(tuple(parts))
        if self._transposed:
            pixels = pixels.swapaxes(self._y, self._x)
        return np.ascontiguousarray(np.flip(pixels, tuple(flip)))

    def close(self) -> None:
        self.stored.close()


def turn_upright(stored: Stored, orientation: int) -> Stored:
    """The image as its orientation tag says it is seen, and its metadata with it."""
    axes = stored.axes or ""
    if not 2 <= orientation <= 8:
        return stored
    if axes.count("Y") != 1 or axes.count("X") != 1:
        return replace(stored, notes=(*stored.notes, f"TIFF orientation {orientation} ignored: its axes are unknown"))
    pixels = TurnedPixels(stored.pixels, axes, orientation)
    origin, sizes = stored.origin, dict(stored.pixel_size_um)
    if orientation >= 5:
        if origin.resolution is not None:
            origin = replace(origin, resolution=origin.resolution[::-1])
        swapped = {"X": "Y", "Y": "X"}
        sizes = {swapped.get(axis, axis): um for axis, um in sizes.items()}
    return replace(
        stored,
        pixels=pixels,
        origin=origin,
        pixel_size_um=sizes,
        levels=tuple(pixels.turn(shape) for shape in stored.levels),
        notes=(*stored.notes, f"turned as TIFF orientation {orientation} says"),
    )


class PalettePixels:
    """The colours, or grey levels, that stored indices stand for."""

    def __init__(self, indices: Pixels, values: Array) -> None:
        """``values``: (n,) grey levels or (n, 3) colours, which are one more axis, the last."""
        self.stored = indices
        self._values = values
        self._axes = len(indices.shape)
        self.shape = (*indices.shape, *values.shape[1:])
        self.dtype = values.dtype

    def read(self, window: Window) -> Array:
        colours = (slice(None), *window[self._axes :])  # a part of the colours, where there are any
        return np.ascontiguousarray(self._values[colours][self.stored.read(window[: self._axes])])

    def close(self) -> None:
        self.stored.close()


def write_out_palette(stored: Stored) -> Stored:
    """The image with its palette's colours in the place of indices; grey where all of the palette is.

    A palette whose colours all rise (or all fall) from index to index shows intensities: the indices are these.
    """
    palette = stored.palette
    if palette is None:
        return stored
    steps = np.diff(palette.astype(np.int64), axis=0)
    if (steps >= 0).all() or (steps <= 0).all():
        return replace(stored, palette=None, notes=(*stored.notes, "colour map ignored: values as stored"))
    grey = bool((palette == palette[:, :1]).all())
    pixels, valid, nodata = stored.pixels, stored.valid, stored.nodata
    axes = len(pixels.shape)

    def holds_data(window: Window) -> Array:
        indices = window[:axes]
        mask = valid(indices) if valid is not None else pixels.read(indices) != nodata
        return mask if grey else mask[..., None]

    return replace(
        stored,
        pixels=PalettePixels(pixels, palette[:, 0] if grey else palette),
        axes=stored.axes if grey or stored.axes is None else stored.axes + "S",
        levels=stored.levels if grey else tuple((*shape, 3) for shape in stored.levels),
        notes=(*stored.notes, "grey palette written out" if grey else "palette written out"),
        palette=None,
        valid=holds_data if valid is not None or nodata is not None else None,  # an index told it, no colour does
        nodata=None,
    )
