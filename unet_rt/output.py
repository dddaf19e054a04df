"""Outputs, written band by band under a temporary name and renamed when they are whole: .png, .tif, .npy.

Whatever happens in between (an error, SIGTERM, a full disk), the name asked for holds the whole output or what it held
before.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from .errors import OutputError, size_text
from .images.pixels import MAX_WHOLE_PX, NODATA_TAG, Array, Origin
from .images.source import Source
from .system.durable import Disk, part_path, parts_of

SUFFIXES = (".png", ".tif", ".tiff", ".npy")
# Strips of a compressed mask: 2**18 samples are 64 rows of 4096; small enough for windows, large enough to pack.
STRIP_SAMPLES = 2**18
# Larger pictures are stored in tiles, for viewers and windows; smaller ones in strips, which any program reads.
TILED_PX = 4096
TILE_PX = 512
TILE_ROW_BYTES = 2**27  # rows of tiles that are held until they are complete, all channels
# Masks of nuclei and of EM: level 3 packs 38 : 1 at 105 MB/s, level 4 33 : 1 at 49, level 6 58 : 1 at 37, level 9 at 4.
COMPRESSION_LEVEL = 3
CLASSIC_TIFF_BYTES = 2**32 - 2**25  # offsets are 32 bits; some room for the directories


@dataclass(frozen=True)
class Shape:
    """What is written: ``plane_shape`` pictures of ``channels`` channels (0: no such axis) of ``spatial`` samples."""

    spatial: tuple[int, ...]
    plane_shape: tuple[int, ...]
    plane_axes: str
    channels: int
    dtype: np.dtype[Any]

    @property
    def planes(self) -> int:
        return math.prod(self.plane_shape)

    @property
    def full(self) -> tuple[int, ...]:
        """The shape of the stored array: plane axes, channels if there are any, spatial axes."""
        return (*self.plane_shape, *((self.channels,) if self.channels else ()), *self.spatial)

    @property
    def axes(self) -> str:
        return self.plane_axes + ("C" if self.channels else "") + "ZYX"[-len(self.spatial) :]

    @property
    def nbytes(self) -> int:
        return math.prod(self.full) * self.dtype.itemsize

    def offset(self, plane: int, channel: int, row: int) -> int:
        """Bytes before a row (of the first spatial axis) in the C-ordered array."""
        rows = (plane * max(1, self.channels) + channel) * self.spatial[0] + row
        return rows * math.prod(self.spatial[1:]) * self.dtype.itemsize


class Writer(Protocol):
    """One format. ``write`` gets a checked (K, rows, ...) block; ``finish`` completes the file; ``close`` lets go."""

    def write(self, plane: int, row: int, block: Array) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Output:
    """An output being written. Bands of a plane arrive in order along the first spatial axis, at full width.

    ``commit`` makes the whole file appear under its name; leaving the ``with`` block without it, or ``abort``, leaves
    nothing behind.
    """

    path: Path
    shape: Shape
    _part: Path
    _writer: Writer
    _rows: dict[int, int] = field(default_factory=dict)
    _open: bool = True

    def write(self, plane: int, start: Sequence[int], block: Array) -> None:
        """Writes a band.

        Args:
            plane: Index of the plane.
            start: Its first sample along each spatial axis; all but the first are 0.
            block: (K, rows, ...), or (rows, ...) without a channel axis (a leading axis of 1 is accepted).

        Raises:
            OutputError: The disk is full or the file cannot be written; everything written is removed.
            ValueError: The block does not continue the plane.
        """
        if not self._open:
            raise ValueError(f"{self.path.name}: written to after it was closed")
        channels = max(1, self.shape.channels)
        if block.ndim == len(self.shape.spatial):
            block = block[None]
        rows = block.shape[1]
        row, done = int(start[0]), self._rows.get(plane, 0)
        expected = (channels, rows, *self.shape.spatial[1:])
        if (
            block.shape != expected
            or any(start[1:])
            or row != done
            or row + rows > self.shape.spatial[0]
            or not 0 <= plane < self.shape.planes
        ):
            raise ValueError(
                f"{self.path.name}: block {block.shape} at plane {plane}, {tuple(start)} does not continue row {done} "
                f"of {self.shape.spatial} x {channels} channels, {self.shape.planes} planes"
            )
        if block.dtype != self.shape.dtype:
            if not np.can_cast(block.dtype, self.shape.dtype, "safe"):
                raise ValueError(f"{self.path.name}: {block.dtype} block for a {self.shape.dtype} output")
            block = block.astype(self.shape.dtype)
        with self._guarded():
            self._writer.write(plane, row, block)
        self._rows[plane] = row + rows

    def commit(self) -> None:
        """Completes the file, makes it durable and gives it its name."""
        if not self._open:
            raise ValueError(f"{self.path.name}: already closed")
        missing = [p for p in range(self.shape.planes) if self._rows.get(p, 0) != self.shape.spatial[0]]
        if missing:
            self.abort()
            raise ValueError(f"{self.path.name}: {len(missing)} planes are not complete, plane {missing[0]} first")
        with self._guarded():
            self._writer.finish()
            self._writer.close()
            disk = Disk()
            disk.sync_file(self._part)
            disk.replace(self._part, self.path)
        self._open = False
        with contextlib.suppress(OSError):  # some file systems sync no folders
            disk.sync_folder(self.path.parent)

    def abort(self) -> None:
        """Removes what was written. Does nothing after ``commit`` or a second time."""
        if not self._open:
            return
        self._open = False
        try:
            # A writer that still has something to flush to a full disk says so; the file goes away all the same.
            with contextlib.suppress(OSError, ValueError):
                self._writer.close()
        finally:
            self._part.unlink(missing_ok=True)

    def __del__(self) -> None:
        # An interruption may come before the ``with`` block that would remove the file has begun.
        if "_open" in vars(self):
            self.abort()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror or error}); nothing was left behind; free some "
                "space or choose another folder with --out"
            ) from error
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """What can be said before any work: suffix, existing file, folder.

    Raises:
        OutputError: The output would fail.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{path}: suffix {path.suffix!r} is not a format written here; use {', '.join(SUFFIXES)}")
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path}: a folder has this name; choose another name")
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist; create it, or choose another with --out")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; use --overwrite to replace it, or choose another name")
    probe = part_path(path)
    try:
        with probe.open("xb"):
            pass
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: the folder cannot be written to ({error.strerror or error}); choose another with --out"
        ) from error
    return path


def open_output(
    path: str | os.PathLike[str],
    *,
    shape: Sequence[int],
    channels: int = 0,
    dtype: DTypeLike = "uint8",
    planes: int = 1,
    plane_shape: Sequence[int] | None = None,
    plane_axes: str | None = None,
    source: Source | None = None,
    overwrite: bool = False,
    pixel_size_um: Sequence[float] | None = None,
    nodata: float | None = None,
) -> Output:
    """Starts an output.

    Args:
        path: ``.png`` (uint8 or uint16, one plane), ``.tif``/``.tiff`` (``.ome.tif`` for OME) or ``.npy``.
        shape: Spatial shape of a plane, (Y, X) or (Z, Y, X).
        channels: 0 for a label mask.
        planes: Number of planes, if they have no shape of their own.
        plane_shape, plane_axes: Default: those of ``source`` if their number is ``planes``, else one axis.
        source: The image; its pixel size and metadata are carried over.
        pixel_size_um: Where the output has another pixel size than the source, e.g. at another scale.
        nodata: What the caller writes where the source holds no data (see ``nodata_value``); TIFF declares it.

    Raises:
        OutputError: Before any work: unknown suffix, existing file, folder, dtype or shape that the format cannot hold.
    """
    target = check_output(path, overwrite=overwrite)
    spatial = tuple(int(n) for n in shape)
    if plane_shape is None and source is not None and source.planes == planes:
        plane_shape, plane_axes = source.plane_shape, source.plane_axes
    if plane_shape is None:
        plane_shape, plane_axes = ((), "") if planes == 1 else ((planes,), "I")
    if plane_axes is None:
        plane_axes = "TINPRV"[: len(plane_shape)]
    what = Shape(spatial, tuple(int(n) for n in plane_shape), plane_axes, channels, np.dtype(dtype))
    if what.dtype == np.bool_:
        what = Shape(what.spatial, what.plane_shape, what.plane_axes, channels, np.dtype("uint8"))
    part = part_path(target)
    suffix = target.suffix.lower()
    packed = suffix in (".tif", ".tiff") and what.dtype.kind in "iu"
    free = shutil.disk_usage(target.parent).free
    if suffix != ".png" and not packed and what.nbytes > free:
        raise OutputError(
            f"{target}: needs {what.nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {target.parent}; free some "
            "space or choose another folder with --out"
        )
    size = tuple(pixel_size_um) if pixel_size_um is not None else size_of(source, spatial)
    origin = source.metadata if source is not None else Origin("array")
    writer: Writer
    try:
        extra = _extra_tags(source, what, nodata) if suffix in (".tif", ".tiff") else ()
        if suffix == ".png":
            writer = _PngWriter(target, part, what, origin)
        elif suffix == ".npy":
            writer = _NpyWriter(part, what)
        elif packed:
            writer = _PackedTiffWriter(part, what, _tiff_form(target, what, origin, size, extra))
        else:
            writer = _PlainTiffWriter(target, part, what, _tiff_form(target, what, origin, size, extra))
        return Output(target, what, part, writer)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def size_of(source: Source | None, spatial: tuple[int, ...]) -> tuple[float, ...] | None:
    """The source's pixel size, scaled where the output has another number of samples."""
    if source is None or source.pixel_size_um is None or len(source.shape) != len(spatial):
        return None
    return tuple(s * n / m for s, n, m in zip(source.pixel_size_um, source.shape, spatial, strict=True))


def nodata_value(dtype: DTypeLike, labels: Sequence[int] = ()) -> float:
    """What marks samples without data in an output: NaN, or the largest integer that is not among the labels."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return math.nan
    return next(n for n in range(np.iinfo(kind).max, -1, -1) if n not in labels)


def _extra_tags(source: Source | None, shape: Shape, nodata: float | None) -> tuple[Any, ...]:
    """TIFF tags for where the picture lies on the earth, and for samples without data."""
    tags: tuple[Any, ...] = ()
    if nodata is not None:
        text = "nan" if math.isnan(nodata) else f"{nodata:.17g}"
        tags = ((NODATA_TAG, "s", 0, text, True),)
    if source is not None and source.metadata.kind == "geo" and len(shape.spatial) == 2:
        from .output_geo import geo_tags

        tags += geo_tags(source.metadata, tuple(n / m for n, m in zip(source.shape, shape.spatial, strict=True)))
    return tags


def remove_parts(path: Path) -> None:
    """Deletes what killed processes have left of an output; none may be at it."""
    for part in parts_of(path):
        part.unlink(missing_ok=True)


class _PngWriter:
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


class _RowFile:
    """A C-ordered array at an offset of a file, written by rows."""

    def __init__(self, stream: IO[bytes], offset: int, shape: Shape, dtype: np.dtype[Any]) -> None:
        self._stream = stream
        self._offset = offset
        self._shape = shape
        self._dtype = dtype

    def write(self, plane: int, row: int, block: Array) -> None:
        for channel, rows in enumerate(block):
            self._stream.seek(self._offset + self._shape.offset(plane, channel, row))
            _write_all(self._stream, np.ascontiguousarray(rows, self._dtype))

    def finish(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _write_all(stream: IO[bytes], array: Array) -> None:
    """Raw streams may write less than asked for; a short write without an error is a nearly full disk."""
    data = array.reshape(-1).view(np.uint8).data
    while len(data):
        done = stream.write(data)
        data = data[done:]


def _npy_header(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


class _NpyWriter(_RowFile):
    def __init__(self, part: Path, shape: Shape) -> None:
        stream = part.open("wb", buffering=0)
        _npy_header(stream, shape.full, shape.dtype)
        super().__init__(stream, stream.tell(), shape, shape.dtype)


@dataclass(frozen=True)
class _TiffForm:
    """How tifffile is to write an output: its own metadata, and that of the source as far as the form allows."""

    file: dict[str, Any]
    series: dict[str, Any]


def _tiff_form(
    path: Path, shape: Shape, origin: Origin, size: tuple[float, ...] | None, extra: tuple[Any, ...]
) -> _TiffForm:
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


def ome_axes(axes: str) -> str:
    """OME knows T, C, Z besides Y and X; a sequence of another kind takes a letter that is free."""
    for letter in axes:
        if letter not in "TZCYX":
            free = next((f for f in "TZC" if f not in axes), None)
            if free is None:
                raise OutputError(f"OME holds at most five axes T, C, Z, Y, X; this output is {axes}; use .npy")
            axes = axes.replace(letter, free)
    return axes


def _ome_tags(origin: Origin, size: tuple[float, ...] | None) -> dict[str, Any]:
    tags = dict(origin.tags) if origin.kind == "ome" else {}
    if size is not None:
        for axis, um in zip("ZYX"[-len(size) :], size, strict=True):
            tags |= {f"PhysicalSize{axis}": um, f"PhysicalSize{axis}Unit": "µm"}
    return tags


class _PlainTiffWriter(_RowFile):
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


class _PackedTiffWriter:
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
        _write_all(self._spool, np.frombuffer(packed, np.uint8))
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
