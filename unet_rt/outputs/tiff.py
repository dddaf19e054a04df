"""TIFF files, plain or packed by tiles, with OME metadata."""

from __future__ import annotations

import math
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError
from ..images.pixels import NODATA_TAG, Array, Origin
from ..images.source import Source
from .plain import COMPRESSION_LEVEL, RowFile, write_all
from .shape import Shape, ome_axes

# Strips of a compressed mask: 2**18 samples are 64 rows of 4096; small enough for windows, large enough to pack.
STRIP_SAMPLES = 2**18
# Larger pictures are stored in tiles, for viewers and windows; smaller ones in strips, which any program reads.
TILED_PX = 4096
TILE_PX = 512
TILE_ROW_BYTES = 2**27  # rows of tiles that are held until they are complete, all channels


CLASSIC_TIFF_BYTES = 2**32 - 2**25  # offsets are 32 bits; some room for the directories


def extra_tags(source: Source | None, shape: Shape, nodata: float | None) -> tuple[Any, ...]:
    """TIFF tags for where the picture lies on the earth, and for samples without data."""
    tags: tuple[Any, ...] = ()
    if nodata is not None:
        text = "nan" if math.isnan(nodata) else f"{nodata:.17g}"
        tags = ((NODATA_TAG, "s", 0, text, True),)
    if source is not None and source.metadata.kind == "geo" and len(shape.spatial) == 2:
        from .geo import geo_tags

        tags += geo_tags(source.metadata, tuple(n / m for n, m in zip(source.shape, shape.spatial, strict=True)))
    return tags


@dataclass(frozen=True)
class _TiffForm:
    """How tifffile is to write an output: its own metadata, and that of the source as far as the form allows."""

    file: dict[str, Any]
    series: dict[str, Any]


def tiff_form(
    path: Path, shape: Shape, origin: Origin, size: tuple[float, ...] | None, extra: tuple[Any, ...]
) -> _TiffForm:
    """How an output is written as TIFF: OME, ImageJ or plain, with its tags, and BigTIFF where it is large."""
    lower = path.name.lower()
    ome = lower.endswith((".ome.tif", ".ome.tiff")) or origin.kind == "ome"
    axes, full = shape.axes, shape.full
    big = shape.nbytes > CLASSIC_TIFF_BYTES
    imagej = (
        not ome
        and not big
        and not extra
        and origin.kind == "imagej"
        and shape.dtype.name in ("uint8", "uint16", "float32")
        and _in_order(axes, "TZCYX")
    )
    geo = not ome and origin.kind == "geo" and shape.planes == 1
    if not ome and not imagej and not geo and size is not None and len(full) > 2 and not _in_order(axes, "IYX"):
        ome = True  # axes and pixel sizes of more than a picture need a form that names them
    series: dict[str, Any] = {"photometric": "minisblack", "software": "unet-rt", "extratags": extra}
    if full[-1] == 1 and len(full) > 2:
        # Without these, tifffile takes the last axis of a picture that is one pixel wide for its samples.
        series |= {"planarconfig": "separate", "extrasamples": ()}
    if geo and shape.channels > 1:
        # Bands of one picture, which programs for maps expect, rather than a page each.
        series |= {"planarconfig": "separate", "extrasamples": (0,) * (shape.channels - 1)}
    if size is not None and not geo:
        series |= {"resolution": (1e4 / size[-1], 1e4 / size[-2]), "resolutionunit": "CENTIMETER"}
    elif origin.resolution is not None and origin.kind != "raster":
        series |= {"resolution": origin.resolution, "resolutionunit": origin.resolution_unit}
    if ome:
        series["metadata"] = {"axes": ome_axes(axes), **_ome_tags(origin, size)}
        return _TiffForm({"ome": True, "bigtiff": big}, series)
    if imagej:
        tags = {k: v for k, v in origin.tags.items() if k in ("unit", "spacing", "finterval", "fps", "tunit")}
        if size is not None:
            tags["unit"] = "micron"
            series |= {"resolution": (1 / size[-1], 1 / size[-2]), "resolutionunit": "NONE"}
            if len(size) == 3:
                tags["spacing"] = size[0]
        series["metadata"] = {"axes": axes, **tags}
        return _TiffForm({"imagej": True, "byteorder": "<"}, series)
    plain = geo or _in_order(axes, "IYX")
    series["metadata"] = None if plain else {"axes": axes}
    return _TiffForm({"bigtiff": big}, series)


def _in_order(axes: str, among: str) -> bool:
    positions = [among.find(letter) for letter in axes]
    return -1 not in positions and positions == sorted(positions)


def _ome_tags(origin: Origin, size: tuple[float, ...] | None) -> dict[str, Any]:
    tags = dict(origin.tags) if origin.kind == "ome" else {}
    if size is not None:
        for axis, um in zip("ZYX"[-len(size) :], size, strict=True):
            tags |= {f"PhysicalSize{axis}": um, f"PhysicalSize{axis}Unit": "µm"}
    return tags


class PlainTiffWriter(RowFile):
    """Uncompressed: the file is laid out first, so that rows of any plane and channel go where they belong."""

    def __init__(self, path: Path, part: Path, shape: Shape, form: _TiffForm) -> None:
        import tifffile

        with tifffile.TiffWriter(part, **form.file) as tiff:
            tiff.write(None, shape=shape.full, dtype=shape.dtype, **form.series)
        with tifffile.TiffFile(part) as laid:
            series, order = laid.series[0], laid.byteorder
            if series.dataoffset is None or series.nbytes != shape.nbytes:
                raise OutputError(f"{path}: {shape.axes} cannot be laid out as one TIFF; use .npy")
            offset = int(series.dataoffset)
        super().__init__(part.open("rb+", buffering=0), offset, shape, shape.dtype.newbyteorder(order))


def _tile(shape: Shape) -> tuple[int, int] | None:
    """Length and width of tiles; None for strips."""
    height, width = shape.spatial[-2:]
    if max(height, width) <= TILED_PX:
        return None
    length = min(TILE_PX, -(-height // 16) * 16)  # a multiple of 16, as the format wants
    row = width * max(1, shape.channels) * shape.dtype.itemsize
    while length > 64 and length * row > TILE_ROW_BYTES:
        length = -(-length // 32) * 16
    return length, min(TILE_PX, -(-width // 16) * 16)


class PackedTiffWriter:
    """Integers, compressed in strips, or in tiles where the picture is large.

    Bands hold all channels, while the pages of a TIFF follow each other: strips and tiles are kept in an unnamed file
    (masks shrink 20 to 80 times) and copied in the order of the pages at the end.
    """

    def __init__(self, part: Path, shape: Shape, form: _TiffForm) -> None:
        self._form = form
        self._part = part
        self._shape = shape
        self._pages_per_plane = max(1, shape.channels) * math.prod(shape.spatial[:-2])
        self._height, self._width = shape.spatial[-2:]
        self._tile = _tile(shape)
        self._strip = self._tile[0] if self._tile else max(1, min(self._height, STRIP_SAMPLES // self._width))
        self._across = -(-self._width // self._tile[1]) if self._tile else 1
        pieces = -(-self._height // self._strip) * self._across
        self._where: list[list[tuple[int, int]]] = [
            [(0, 0)] * pieces for _ in range(shape.planes * self._pages_per_plane)
        ]
        # Rows of a strip, or of a row of tiles, that is not complete, per (plane, channel).
        self._held: dict[tuple[int, int], list[Array]] = {}
        self._end = 0
        part.touch()
        # No name where the system can: nothing is left behind even by kill -9.
        self._spool = tempfile.TemporaryFile(dir=part.parent, prefix=f"{part.name}.", buffering=0)  # noqa: SIM115

    def write(self, plane: int, row: int, block: Array) -> None:
        for channel, rows in enumerate(block):
            if len(self._shape.spatial) == 3:
                for i, picture in enumerate(rows):
                    page = (plane * max(1, self._shape.channels) + channel) * self._shape.spatial[0] + row + i
                    for start in range(0, self._height, self._strip):
                        self._pack(page, start // self._strip, picture[start : start + self._strip])
                continue
            page = plane * max(1, self._shape.channels) + channel
            held = self._held.setdefault((plane, channel), [])
            at = row
            while len(rows):
                # Up to the next multiple of the strip's height, so that strips do not depend on the bands.
                count = min(len(rows), self._strip - at % self._strip)
                held.append(np.array(rows[:count]))
                rows, at = rows[count:], at + count
                if at % self._strip == 0 or at == self._height:
                    self._pack(page, (at - 1) // self._strip, np.concatenate(held))
                    held.clear()

    def _pack(self, page: int, strip: int, rows: Array) -> None:
        length, width = self._tile or rows.shape
        for i in range(self._across):
            piece = rows[:, i * width : (i + 1) * width]
            if piece.shape != (length, width):  # tiles are whole: what lies beyond the picture is 0
                piece = np.pad(piece, ((0, length - piece.shape[0]), (0, width - piece.shape[1])))
            self._keep(page, strip * self._across + i, piece)

    def _keep(self, page: int, index: int, pixels: Array) -> None:
        little = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
        packed = zlib.compress(little.data, COMPRESSION_LEVEL)
        write_all(self._spool, np.frombuffer(packed, np.uint8))
        self._where[page][index] = (self._end, len(packed))
        self._end += len(packed)

    def finish(self) -> None:
        import tifffile

        with tifffile.TiffWriter(self._part, **(self._form.file | {"byteorder": "<"})) as tiff:
            tiff.write(
                self._packed(),
                shape=self._shape.full,
                dtype=self._shape.dtype,
                compression="zlib",
                **({"tile": self._tile} if self._tile else {"rowsperstrip": self._strip}),
                **self._form.series,
            )

    def _packed(self) -> Iterator[bytes]:
        for page in self._where:
            for offset, count in page:
                self._spool.seek(offset)
                yield self._spool.read(count)

    def close(self) -> None:
        self._spool.close()
