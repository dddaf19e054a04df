"""PNG and npy files, written row by row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import OutputError, size_text
from ..images.pixels import MAX_WHOLE_PX, Array, Origin
from .shape import Shape

# Masks of nuclei and of EM: level 3 packs 38 : 1 at 105 MB/s, level 4 33 : 1 at 49, level 6 58 : 1 at 37, level 9 at 4.
COMPRESSION_LEVEL = 3


class PngWriter:
    """One plane, kept in memory: the format is encoded whole."""

    def __init__(self, path: Path, part: Path, shape: Shape, origin: Origin) -> None:
        advice = f"name it {path.stem}.tif instead"
        if shape.planes != 1 or len(shape.spatial) != 2:
            raise OutputError(f"{path}: PNG holds one plane, this is {shape.axes} {size_text(shape.full)}; {advice}")
        deep = shape.dtype == np.uint16
        if shape.dtype != np.uint8 and not (deep and shape.channels <= 1):
            raise OutputError(
                f"{path}: PNG holds 8 bits, or 16 without channels; this is {shape.dtype} with {shape.channels} "
                f"channels; {advice}"
            )
        if shape.channels > 4:
            raise OutputError(f"{path}: PNG holds up to 4 channels, this has {shape.channels}; {advice}")
        if math.prod(shape.spatial) > MAX_WHOLE_PX:
            raise OutputError(f"{path}: {size_text(shape.spatial)} is too large for a PNG; {advice}")
        self._part = part
        self._dpi = origin.resolution if origin.kind == "raster" else None
        self._pixels = np.zeros((max(1, shape.channels), *shape.spatial), shape.dtype)
        part.touch()

    def write(self, plane: int, row: int, block: Array) -> None:
        self._pixels[:, row : row + block.shape[1]] = block

    def finish(self) -> None:
        from PIL import Image

        pixels = self._pixels[0] if len(self._pixels) == 1 else np.ascontiguousarray(np.moveaxis(self._pixels, 0, -1))
        options: dict[str, Any] = {} if self._dpi is None else {"dpi": self._dpi}
        with self._part.open("wb") as stream:
            Image.fromarray(pixels).save(stream, "PNG", compress_level=COMPRESSION_LEVEL, **options)

    def close(self) -> None:
        pass


class RowFile:
    """A C-ordered array at an offset of a file, written by rows."""

    def __init__(self, stream: IO[bytes], offset: int, shape: Shape, dtype: np.dtype[Any]) -> None:
        self._stream = stream
        self._offset = offset
        self._shape = shape
        self._dtype = dtype

    def write(self, plane: int, row: int, block: Array) -> None:
        for channel, rows in enumerate(block):
            self._stream.seek(self._offset + self._shape.offset(plane, channel, row))
            write_all(self._stream, np.ascontiguousarray(rows, self._dtype))

    def finish(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def write_all(stream: IO[bytes], array: Array) -> None:
    """Raw streams may write less than asked for; a short write without an error is a nearly full disk."""
    data = array.reshape(-1).view(np.uint8).data
    while len(data):
        done = stream.write(data)
        data = data[done:]


def _npy_header(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


class NpyWriter(RowFile):
    """A .npy file whose rows are written to their places, plane by plane."""

    def __init__(self, part: Path, shape: Shape) -> None:
        stream = part.open("wb", buffering=0)
        _npy_header(stream, shape.full, shape.dtype)
        super().__init__(stream, stream.tell(), shape, shape.dtype)
