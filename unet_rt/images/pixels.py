"""Stored pixels: in memory, mapped from a file, or in chunks that decode whole; read by windows along all axes."""

from __future__ import annotations

import itertools
import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError, size_text

Array = NDArray[Any]
Window = tuple[slice, ...]

DTYPES = ("bool", "uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
CACHE_BYTES = 2**27  # decoded pieces kept: a row of 512-px tiles of a 100,000 px wide uint16 image is 100 MB
RUN_BYTES = 2**25  # of chunks that are asked for at once, so that their library can decode them side by side
MAX_PIECE_BYTES = 2**32  # of a strip, tile or chunk, which decodes only whole
MAX_WHOLE_PX = 2**30  # formats that only decode whole: 32,768 x 32,768, so that 20,000 x 20,000 passes
# TIFF tags that place a picture on the earth: pixel scale, tie points, transformation, coordinate system; GDAL's nodata.
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
NODATA_TAG = 42113
ZARR_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")  # files of zarr 3 and zarr 2
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


class CachedPixels(Protocol):
    """Pixels that decode by pieces and keep some of them.

    Attributes:
        piece_bytes: Of the largest piece, which decodes only whole.
    """

    @property
    def piece_bytes(self) -> int: ...

    def limit_cache(self, most: int) -> None:
        """Keeps no more than so many bytes, but the piece read last; 0: lets go of all."""
        ...


@dataclass(frozen=True)
class Origin:
    """Where pixels come from, as far as an output of the same image may repeat it.

    Attributes:
        kind: ``"ome"`` (OME-TIFF, OME-Zarr), ``"geo"``, ``"imagej"``, ``"tiff"``, ``"raster"`` or ``"array"``.
        resolution: TIFF tags: pixels per ``resolution_unit`` along x and y; None where there are none.
        resolution_unit: 1 none, 2 inch, 3 centimetre.
        tags: Further metadata of that kind: for ImageJ ``unit``, ``spacing``, ``finterval``, ...; for OME
            ``PhysicalSizeZ``, ``TimeIncrement``, ...; for georeferenced images ``crs`` (WKT) and ``transform`` (the six
            coefficients a to f of column, row -> x, y) or ``gcps`` (row, column, x, y, z of ground control points).
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
        levels: Shapes of all levels of a pyramid, finest first; empty where there is one level. All axes each.
        level: The one that is opened.
        level_sizes_um: ``pixel_size_um`` of all levels, where the file says them level by level.
        nodata: Value of pixels that hold no data, None where there is none.
        valid: Which pixels of a window (one slice per axis, all channels) hold data: bool, the channel axis of size 1;
            where a value cannot tell, as with a mask that the file holds.
        series: Images in the file, of which this is one; 0 for formats that hold one alone.
        palette: (n, 3) uint8: the colours that the pixels are indices into; None where they are no indices.
        files: Local files that say what the pixels are: none of them may change while the image is read.
        fingerprint: What tells these pixels from others, beyond the state of a file: JSON.
    """

    pixels: Pixels
    axes: str | None
    origin: Origin
    names: tuple[str, ...] = ()
    alpha: int | None = None
    pixel_size_um: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()
    levels: tuple[tuple[int, ...], ...] = ()
    level: int = 0
    level_sizes_um: tuple[Mapping[str, float], ...] = ()
    nodata: float | None = None
    valid: Callable[[Window], Array] | None = None
    series: int = 0
    palette: Array | None = None
    files: tuple[Path, ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a zarr array or group, and so an image rather than a folder of images."""
    return any((folder / name).is_file() for name in ZARR_METADATA)


def pick_level(level: int | None, count: int, name: str) -> int:
    """The level of a pyramid that was asked for, default the finest. ImageError where it does not exist."""
    if level is not None and not 0 <= level < count:
        there = f"levels 0 to {count - 1} (0 is the finest)" if count > 1 else "one level, 0"
        raise ImageError(f"{name}: level {level} does not exist; the image has {there}; choose with --level")
    return level or 0


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
        raise ImageError(f"{name}: the image is empty ({size_text(shape) or 'a single number'}); give one with pixels")


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
                f"{name}: the file is truncated: its header announces {need:,} bytes ({size_text(shape)} "
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


class LazyPixels:
    """An array of another library that lies on a disk or is made as it is read: HDF5, Zarr, Dask, ..."""

    def __init__(self, array: Any, name: str) -> None:
        self._array: Any = array
        self._name = name
        self.shape = tuple(int(n) for n in array.shape)
        self.dtype = np.dtype(array.dtype).newbyteorder("=")

    def read(self, window: Window) -> Array:
        try:
            pixels = np.asarray(self._array[window])
        except Exception as error:  # another library's storage: whatever it raises, these pixels cannot be had
            raise ImageError(
                f"{self._name}: cannot be read ({type(error).__name__}: {error}); check its file"
            ) from error
        return pixels.astype(self.dtype, copy=False)

    def close(self) -> None:
        self._array = None


class ChunkedPixels:
    """Pixels in chunks that decode whole, with a bounded cache of them: what two windows share is decoded once."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        chunk: Sequence[int],
        name: str,
        load: Callable[[Window], Array],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """``load`` gets windows of whole chunks (or up to the image's end) and may raise what its library raises."""
        self.shape = tuple(int(n) for n in shape)
        self.dtype = dtype.newbyteorder("=")
        self._chunk = tuple(int(c) for c in chunk)
        self._name = name
        self._load = load
        self._close = close
        piece = math.prod(map(min, self._chunk, self.shape)) * self.dtype.itemsize
        if piece > MAX_PIECE_BYTES:
            raise ImageError(
                f"{name}: stored in chunks of {piece / 1e9:.1f} GB, which decode only whole; save it in smaller ones"
            )
        self.piece_bytes = piece
        self._run = max(1, RUN_BYTES // piece)
        self._most = CACHE_BYTES
        self._cache: OrderedDict[tuple[int, ...], Array] = OrderedDict()
        self._cached = 0

    def read(self, window: Window) -> Array:
        ranges = [range(*part.indices(n)) for part, n in zip(window, self.shape, strict=True)]
        out = np.empty([len(r) for r in ranges], self.dtype)
        if out.size == 0:
            return out
        chunks = [range(r.start // c, -(-r.stop // c)) for r, c in zip(ranges, self._chunk, strict=True)]
        for index in itertools.product(*chunks):
            pixels = self._cache.get(index)
            if pixels is None:
                pixels = self._load_run(index, chunks[-1].stop)
            else:
                self._cache.move_to_end(index)
            origin = [i * c for i, c in zip(index, self._chunk, strict=True)]
            low = [max(r.start, o) for r, o in zip(ranges, origin, strict=True)]
            high = [min(r.stop, o + n) for r, o, n in zip(ranges, origin, pixels.shape, strict=True)]
            target = tuple(slice(a - r.start, b - r.start) for a, b, r in zip(low, high, ranges, strict=True))
            out[target] = pixels[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))]
        return out

    def _load_run(self, index: tuple[int, ...], stop: int) -> Array:
        """The chunk at ``index``; those after it along the last axis, up to ``stop``, are cached as well."""
        count = 1
        while count < self._run and index[-1] + count < stop and (*index[:-1], index[-1] + count) not in self._cache:
            count += 1
        start = [i * c for i, c in zip(index, self._chunk, strict=True)]
        spans = [*self._chunk[:-1], self._chunk[-1] * count]
        ends = [min(a + s, n) for a, s, n in zip(start, spans, self.shape, strict=True)]
        try:
            pixels = np.asarray(self._load(tuple(slice(a, b) for a, b in zip(start, ends, strict=True))))
        except Exception as error:  # decoders raise what they like on bad bytes; the storage is at fault
            raise ImageError(
                f"{self._name}: the chunks from {tuple(start)} to {tuple(ends)} cannot be read "
                f"({type(error).__name__}: {error}); copy it again from its source"
            ) from error
        width = self._chunk[-1]
        for i in range(count):
            part = np.array(pixels[..., i * width : (i + 1) * width], self.dtype)
            self._cache[(*index[:-1], index[-1] + i)] = part
            self._cached += part.nbytes
        first = self._cache[index]
        while self._cached > self._most and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return first

    def limit_cache(self, most: int) -> None:
        self._most = most
        self._run = max(1, min(self._run, most // 4 // self.piece_bytes))
        while self._cached > most and self._cache:
            self._cached -= self._cache.popitem(last=False)[1].nbytes

    def close(self) -> None:
        self._cache.clear()
        self._close()
