"""Stored pixels: an array in memory, or one mapped from a file, read by windows along all of its axes."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import ImageError

Array = NDArray[Any]
Window = tuple[slice, ...]

DTYPES = ("bool", "uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
MAX_WHOLE_PX = 2**30  # formats that only decode whole: 32,768 x 32,768, so that 20,000 x 20,000 passes
# Micrometres per unit, by the names that ImageJ, OME-XML and OME-Zarr use.
UM = {
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "\\u00b5m": 1.0,
    "μm": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "inch": 25400.0,
    "in": 25400.0,
    "å": 1e-4,
    "pm": 1e-6,
    "nanometer": 1e-3,
    "millimeter": 1e3,
    "angstrom": 1e-4,
    "picometer": 1e-6,
    "centimeter": 1e4,
    "meter": 1e6,
}


class Pixels(Protocol):
    """Pixels of any number of axes. ``read`` takes one slice with step 1 per axis and returns all of these axes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def read(self, window: Window) -> Array: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Origin:
    """Where pixels come from, as far as an output of the same image may repeat it.

    Attributes:
        kind: ``"ome"``, ``"imagej"``, ``"tiff"``, ``"raster"`` or ``"array"``.
        resolution: TIFF tags: pixels per ``resolution_unit`` along x and y; None where there are none.
        resolution_unit: 1 none, 2 inch, 3 centimetre.
        tags: Further metadata of that kind: for ImageJ ``unit``, ``spacing``, ``finterval``, ...
    """

    kind: str
    resolution: tuple[float, float] | None = None
    resolution_unit: int = 1
    tags: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Stored:
    """An opened image before its axes are read.

    Attributes:
        axes: From metadata, None where there are none.
        names: Channel names.
        alpha: Index of the alpha channel, None if there is none.
        pixel_size_um: Micrometres per pixel by axis letter.
        notes: Facts for the printed reading.
    """

    pixels: Pixels
    axes: str | None
    origin: Origin
    names: tuple[str, ...] = ()
    alpha: int | None = None
    pixel_size_um: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()


def check_pixels(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    """ImageError for an empty axis or a dtype that no image has."""
    if dtype.name not in DTYPES:
        way = {
            "c": "take its absolute value or one of its parts",
            "O": "save it as a plain numeric array",
            "i": "convert it, e.g. .astype('int32')",
            "u": "convert it, e.g. .astype('uint32')",
        }.get(dtype.kind, "convert it to a numeric dtype")
        raise ImageError(f"{name}: pixels of dtype {dtype} cannot be predicted; {way} ({', '.join(DTYPES)} are read)")
    if not shape or min(shape) < 1:
        raise ImageError(
            f"{name}: the image is empty ({'x'.join(map(str, shape)) or 'a single number'}); give one with pixels"
        )


class ArrayPixels:
    """Pixels in memory. Windows are views."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.shape = tuple(array.shape)
        self.dtype = array.dtype

    def read(self, window: Window) -> Array:
        return self._array[window]

    def close(self) -> None:
        pass


class MappedFile:
    """A file mapped read-only. Windows of arrays in it are copied, and the pages given back to the system."""

    def __init__(self, path: Path, name: str) -> None:
        try:
            with path.open("rb") as stream:
                self.size = os.fstat(stream.fileno()).st_size
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ImageError(f"{name}: cannot be read ({error}); check the file and its permissions") from error

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], order: str = "C") -> Array:
        """A view; the caller has checked that it lies inside the file."""
        strides = np.dtype(dtype).itemsize
        steps = []
        for n in reversed(shape) if order == "C" else shape:
            steps.append(strides)
            strides *= n
        return np.ndarray(shape, dtype, self._map, offset, tuple(reversed(steps) if order == "C" else steps))

    def copy(self, view: Array) -> Array:
        """The view's pixels in memory, in native byte order."""
        pixels = np.array(view, dtype=view.dtype.newbyteorder("="), order="K", copy=True)
        if hasattr(self._map, "madvise") and self.size > 2**26:
            # Without this the resident size of a long run grows to that of the file.
            self._map.madvise(mmap.MADV_DONTNEED)
        return pixels

    def close(self) -> None:
        try:
            self._map.close()
        except BufferError:
            pass  # a view is still held by the caller; the map goes with it


class MappedPixels:
    """One array of a mapped file."""

    def __init__(
        self, file: MappedFile, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], name: str, order: str = "C"
    ) -> None:
        need = offset + math.prod(shape) * dtype.itemsize
        if need > file.size:
            file.close()
            raise ImageError(
                f"{name}: the file is truncated: its header announces {need:,} bytes ({'x'.join(map(str, shape))} "
                f"{dtype.name}), it has {file.size:,}; copy it again from its source"
            )
        self._file = file
        self._view: Array | None = file.array(offset, shape, dtype, order)
        self.shape = shape
        self.dtype = dtype.newbyteorder("=")

    def read(self, window: Window) -> Array:
        if self._view is None:
            raise ValueError("read from a closed image")
        return self._file.copy(self._view[window])

    def close(self) -> None:
        self._view = None
        self._file.close()
