"""TIFF, BigTIFF, OME-TIFF, ImageJ stacks: windows by tifffile, only the strips and tiles that a window touches.

Pixels stored in one piece are mapped; others are decoded segment by segment, with a bounded cache of decoded segments,
so that the rows two bands share are decoded once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import ImageError, size_text
from .pixels import (
    CACHE_BYTES,
    GEO_TAGS,
    MAX_PIECE_BYTES,
    NODATA_TAG,
    UM,
    Array,
    MappedFile,
    Origin,
    Stored,
    Window,
    pick_level,
)

# Measured on a blank 8 MiB image: deflate 988 : 1, LZW 1157, Zstandard 30,500, JPEG XL 36,000, Brotli 599,000.
MAX_RATIO = 1_000_000


@dataclass(frozen=True)
class TiffBytes:
    """Where a TIFF lies: a local file, or a stream over something remote, which cannot be mapped."""

    size: int
    open: Callable[[], IO[bytes]]
    path: Path | None = None


def open_tiff(path: Path, name: str, level: int | None = None) -> Stored:
    """ImageError for anything that cannot be read exactly as stored."""
    place = TiffBytes(path.stat().st_size, lambda: path.open("rb", buffering=0), path)
    return open_tiff_bytes(place, name, level)


def open_tiff_bytes(place: TiffBytes, name: str, level: int | None = None) -> Stored:
    """``open_tiff`` for a place."""
    import tifffile

    with contextlib.ExitStack() as opened:
        try:
            with quiet():
                at = place.path if place.path is not None else opened.enter_context(place.open())
                tif = opened.enter_context(tifffile.TiffFile(at, name=None if at is place.path else name))
        except Exception as error:  # the parser meets any bytes; whatever it raises, the file is at fault
            raise ImageError(f"{name}: not a readable TIFF ({error}); copy it again from its source") from error
        try:
            with quiet():
                if place.path is not None and _is_geo(tif) and find_spec("rasterio") is not None:
                    from .geo import open_geo

                    return open_geo(place.path, name, level)
                return _stored(tif, place, name, level)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"{name}: corrupt TIFF ({type(error).__name__}: {error}); copy it again") from error


def check_whole(tif: Any, size: int, name: str) -> None:
    """ImageError where the last page of the file names a next one beyond the file's end: pages or levels are lost."""
    if not tif.pages:
        return
    form, stream, at = tif.tiff, tif.filehandle, int(tif.pages[-1].offset)
    stream.seek(at)
    (tags,) = struct.unpack(form.tagnoformat, stream.read(form.tagnosize))
    stream.seek(at + form.tagnosize + tags * form.tagsize)
    following = stream.read(form.offsetsize)
    end = at + form.tagnosize + tags * form.tagsize + form.offsetsize
    if len(following) == form.offsetsize:
        (offset,) = struct.unpack(form.offsetformat, following)
        end = offset + form.tagnosize if offset else end
    if end > size:
        raise _truncated(name, end, size)


def _is_geo(tif: Any) -> bool:
    """Whether a TIFF is georeferenced, and nothing else."""
    return bool(tif.pages) and not (tif.is_ome or tif.is_imagej) and any(c in tif.pages[0].tags for c in GEO_TAGS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without tifffile's own log: it says what it then raises or works around, and the messages here say it better."""
    logger = logging.getLogger("tifffile")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _stored(tif: Any, place: TiffBytes, name: str, level: int | None) -> Stored:
    if not tif.pages or not tif.series:
        raise ImageError(f"{name}: the TIFF holds no image; copy it again from its source")
    check_whole(tif, place.size, name)
    series = tif.series[0]
    levels = series.levels
    picked = pick_level(level, len(levels), name)
    key = levels[picked].keyframe
    notes = []
    if len(tif.series) > 1:
        sizes = {s.keyframe.shape for s in tif.series}
        if series.kind in ("generic", "uniform") and len(sizes) > 1 and len(tif.series) == len(tif.pages):
            shapes = ", ".join(size_text(s.keyframe.shape) for s in tif.series[:3])
            raise ImageError(
                f"{name}: {len(tif.pages)} pages of different shapes ({shapes}, ...); save the one wanted as its own "
                "file"
            )
        notes.append(f"series 0 of {len(tif.series)}")
    if len(levels) > 1:
        notes.append(f"level {picked} of {len(levels)}")
    if _is_geo(tif):
        notes.append("its georeference is not carried over; pip install 'unet-rt[geo]' for that")
    _check_photometric(key, name, notes)
    _check_codec(key, name)
    level_shapes = [tuple(int(n) for n in each.shape) for each in levels]
    axes, shape = levels[picked].axes, level_shapes[picked]
    if axes != series.axes:
        raise ImageError(
            f"{name}: its levels differ in axes ({series.axes} and {axes}); save the one wanted as its own file"
        )
    if 0 in shape:
        raise ImageError(f"{name}: the image is empty ({size_text(shape)}); give one with pixels")
    origin, size, names = _metadata(tif, series, series.keyframe)
    if picked:
        ratio = {axis: full / n for axis, full, n in zip(axes, level_shapes[0], shape, strict=True)}
        size = {axis: um * ratio.get(axis, 1.0) for axis, um in size.items()}
        if origin.resolution is not None:
            across, down = origin.resolution
            origin = replace(origin, resolution=(across / ratio.get("X", 1.0), down / ratio.get("Y", 1.0)))
    colours = 0 if key.samplesperpixel == 1 else 3 if int(key.photometric) in (2, 6) else 1
    extra = [int(sample) for sample in key.extrasamples]
    alpha = colours if colours and len(extra) == 1 and extra[0] in (1, 2) else None
    if colours == 0 or axes.count("S") != 1 or (alpha is not None and shape[axes.index("S")] != colours + 1):
        alpha = None
    return Stored(
        _pixels(levels[picked], key, shape, place, name),  # last: what is opened here stays open
        axes,
        origin,
        names,
        alpha,
        size,
        tuple(notes),
        levels=tuple(level_shapes) if len(levels) > 1 else (),
        nodata=_nodata(series.keyframe),
    )


def _nodata(key: Any) -> float | None:
    """The value that GDAL's tag gives, whether or not the dtype can hold it."""
    tag = key.tags.get(NODATA_TAG)
    try:
        return None if tag is None else float(str(tag.value).strip("\0 "))
    except ValueError:
        return None


def _check_photometric(key: Any, name: str, notes: list[str]) -> None:
    photometric = int(key.photometric)
    if photometric == 0:
        notes.append("white is zero: values as stored")
    elif photometric == 3:
        notes.append("colour map ignored: values as stored")
    elif photometric in (5, 8, 9, 10) or (photometric == 6 and int(key.compression) not in (6, 7, 33007, 33003, 33005)):
        raise ImageError(
            f"{name}: {getattr(key.photometric, 'name', photometric)} colours; convert them to RGB, e.g. with Pillow "
            "or ImageMagick"
        )


def _check_codec(key: Any, name: str) -> None:
    """ImageError that names the extra, if this file's compression needs it."""
    import tifffile

    try:
        if int(key.compression) != 1:
            tifffile.TIFF.DECOMPRESSORS[key.compression]
        if int(key.predictor) != 1:
            tifffile.TIFF.UNPREDICTORS[key.predictor]
        if key.bitspersample not in (1, 8, 16, 32, 64):
            import imagecodecs  # noqa: F401
    except (KeyError, ImportError) as error:
        what = getattr(key.compression, "name", key.compression)
        raise ImageError(
            f"{name}: compression {what} (predictor {int(key.predictor)}, {key.bitspersample} bits) needs imagecodecs; "
            "pip install 'unet-rt[tiff]', or save the image uncompressed"
        ) from error


def _pixels(
    series: Any, key: Any, shape: tuple[int, ...], place: TiffBytes, name: str
) -> MappedSeries | SegmentedSeries:
    size, path = place.size, place.path
    dtype = np.dtype(series.dtype)
    need = math.prod(shape) * dtype.itemsize
    if need > size * MAX_RATIO:
        raise ImageError(
            f"{name}: declares {size_text(shape)} {dtype.name} ({need / 1e9:,.1f} GB) in a file of {size:,} "
            "bytes, which cannot hold them; the file is truncated or malicious"
        )
    stored = np.dtype(dtype.newbyteorder(key.parent.byteorder))
    if path is not None and series.dataoffset is not None and key.bitspersample == dtype.itemsize * 8:
        end = series.dataoffset + need
        if end > size:
            raise _truncated(name, end, size)
        file = MappedFile(path, name)
        return MappedSeries(file, [series.dataoffset], (), shape, stored)
    pages = list(series.pages)
    count = math.prod(shape) // math.prod(key.shape)
    if len(pages) != count or any(page is None for page in pages):
        here = sum(page is not None for page in pages)
        raise ImageError(
            f"{name}: {here} of the {count} pages that its metadata announces are in the file; "
            "the set is incomplete or split over files, which is not read: merge it into one file"
        )
    others = {page.parent.filehandle.name for page in pages}
    if len(others) > 1:
        raise ImageError(
            f"{name}: an OME-TIFF split over {len(others)} files, which is not read; merge it into one file"
        )
    outer = shape[: len(shape) - len(key.shape)]
    for page in pages:
        ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=False) if n]
        if ends and max(ends) > size:
            raise _truncated(name, max(ends), size)
    if path is not None and all(page.is_contiguous for page in pages) and key.is_memmappable:
        bytes_per_page = math.prod(key.shape) * dtype.itemsize
        end = max(int(page.dataoffsets[0]) for page in pages) + bytes_per_page
        if end > size:
            raise _truncated(name, end, size)
        return MappedSeries(MappedFile(path, name), [int(p.dataoffsets[0]) for p in pages], outer, key.shape, stored)
    return SegmentedSeries(pages, key, outer, place.open, name)


def _truncated(name: str, end: int, size: int) -> ImageError:
    return ImageError(
        f"{name}: the file is truncated: its pixels end at byte {end:,}, the file at {size:,}; copy it again from its "
        "source"
    )


class MappedSeries:
    """Pages stored in one piece each. ``outer`` axes choose the page, ``inner`` ones lie in it."""

    def __init__(
        self,
        file: MappedFile,
        offsets: Sequence[int],
        outer: tuple[int, ...],
        inner: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self._file = file
        self._offsets = offsets
        self._outer = outer
        self._inner = tuple(int(n) for n in inner)
        self._stored = dtype
        self.shape = (*outer, *self._inner)
        self.dtype = dtype.newbyteorder("=")

    def read(self, window: Window) -> Array:
        def page(number: int) -> Array:
            view = self._file.array(self._offsets[number], self._inner, self._stored)
            return self._file.copy(view[window[len(self._outer) :]])

        return _read_pages(window, self._outer, page)

    def close(self) -> None:
        self._file.close()


def _read_pages(window: Window, outer: tuple[int, ...], page: Any) -> Array:
    """The pages of a window, as one array with all axes."""
    if not outer:
        return np.asarray(page(0))
    picked = [range(*part.indices(n)) for part, n in zip(window, outer, strict=False)]
    numbers = np.ravel_multi_index(np.meshgrid(*picked, indexing="ij"), outer)
    arrays = [page(int(number)) for number in numbers.ravel()]
    stacked = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
    return stacked.reshape(*numbers.shape, *arrays[0].shape)


class SegmentedSeries:
    """Pages stored in strips or tiles that are decoded one by one."""

    def __init__(
        self, pages: Sequence[Any], key: Any, outer: tuple[int, ...], reopen: Callable[[], IO[bytes]], name: str
    ) -> None:
        self._name = name
        self._key = key
        self._outer = outer
        self._inner = tuple(int(n) for n in key.shape)
        self._shaped = tuple(int(n) for n in key.shaped)  # (separate samples, depth, length, width, samples)
        self.shape = (*outer, *self._inner)
        self.dtype = np.dtype(key.dtype).newbyteorder("=")
        self._offsets = [(tuple(page.dataoffsets), tuple(page.databytecounts)) for page in pages]
        samples = self._shaped[4]
        if key.is_tiled:
            self._segment = (key.tiledepth, key.tilelength, key.tilewidth)
        else:
            self._segment = (1, min(int(key.rowsperstrip), self._shaped[2]), self._shaped[3])
        self._grid = tuple(-(-n // s) for n, s in zip(self._shaped[1:4], self._segment, strict=True))
        self._bytes = math.prod(self._segment) * samples * self.dtype.itemsize
        segments = self._shaped[0] * math.prod(self._grid)
        for offsets, counts in self._offsets:
            if len(offsets) < segments or len(counts) < segments:
                raise ImageError(
                    f"{name}: {min(len(offsets), len(counts))} of its {segments} strips or tiles are in the file; "
                    "it is truncated or corrupt; copy it again from its source"
                )
        if self._bytes > MAX_PIECE_BYTES:
            raise ImageError(
                f"{name}: stored in pieces of {self._bytes / 1e9:.1f} GB, which decode only whole; save it as a tiled "
                "TIFF"
            )
        self._cache: OrderedDict[tuple[int, int], Array] = OrderedDict()
        self._cached = 0
        self._decode = key.decode
        self._stream = reopen()

    def read(self, window: Window) -> Array:
        return _read_pages(window, self._outer, lambda number: self._page(number, window[len(self._outer) :]))

    def _page(self, number: int, window: Window) -> Array:
        """A window of one page."""
        ranges = self._ranges(window)
        (s0, s1), (d0, d1), (h0, h1), (w0, w1), (c0, c1) = ranges
        out = np.empty([b - a for a, b in ranges], self.dtype)
        depth, length, width = self._segment
        for s in range(s0, s1):
            for d in range(d0 // depth, -(-d1 // depth)):
                for h in range(h0 // length, -(-h1 // length)):
                    for w in range(w0 // width, -(-w1 // width)):
                        index = ((s * self._grid[0] + d) * self._grid[1] + h) * self._grid[2] + w
                        origin = (d * depth, h * length, w * width)
                        pixels = self._segment_pixels(number, index, origin)
                        low = [max(a, o) for a, o in zip((d0, h0, w0), origin, strict=True)]
                        high = [
                            min(b, o + n) for b, o, n in zip((d1, h1, w1), origin, (depth, length, width), strict=True)
                        ]
                        target = tuple(slice(a - b, c - b) for a, b, c in zip(low, (d0, h0, w0), high, strict=True))
                        source = tuple(slice(a - o, c - o) for a, o, c in zip(low, origin, high, strict=True))
                        out[s - s0][target] = pixels[source][..., c0:c1]
        return out.reshape([len(range(*part.indices(n))) for part, n in zip(window, self._inner, strict=True)])

    def _ranges(self, window: Window) -> list[tuple[int, int]]:
        """The window along the page's five stored axes; those that the page's shape leaves out have size 1."""
        ranges: list[tuple[int, int]] = []
        rest = list(zip(window, self._inner, strict=True))
        # Sizes agree in order, with ones dropped: walk from the end.
        for n in reversed(self._shaped):
            if rest and rest[-1][1] == n and (n != 1 or len(rest) == len(self._shaped) - len(ranges)):
                part, size = rest.pop()
                start, stop, _ = part.indices(size)
                ranges.append((start, stop))
            elif n == 1:
                ranges.append((0, 1))
            else:
                raise ImageError(
                    f"{self._name}: page shape {self._inner} does not follow from its stored shape {self._shaped}; "
                    "save the image again with another program"
                )
        return ranges[::-1]

    def _segment_pixels(self, page: int, index: int, origin: tuple[int, int, int]) -> Array:
        cached = self._cache.get((page, index))
        if cached is not None:
            self._cache.move_to_end((page, index))
            return cached
        pixels = self._decoded(page, index, origin)
        self._cache[page, index] = pixels
        self._cached += pixels.nbytes
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return pixels

    def _decoded(self, page: int, index: int, origin: tuple[int, int, int]) -> Array:
        """One segment, (depth, length, width, samples)."""
        offset, count = int(self._offsets[page][0][index]), int(self._offsets[page][1][index])
        where = f"{self._name}: the strip or tile at row {origin[1]}, column {origin[2]} of page {page}"
        try:
            self._stream.seek(offset)
            data = self._stream.read(count)
        except Exception as error:  # remote file systems have errors of their own beside OSError
            raise ImageError(f"{where} cannot be read ({error}); check the disk or network") from error
        if len(data) < count:
            raise ImageError(
                f"{where} ends early ({len(data):,} of {count:,} bytes); copy the file again from its source"
            )
        tables: dict[str, Any] = {}
        if self._key.jpegtables is not None:
            tables["jpegtables"] = self._key.jpegtables
        if self._key.jpegheader is not None:
            tables["jpegheader"] = self._key.jpegheader
        try:
            # A segment of no bytes is one that the writer left out: the decoder answers None, and it reads as nodata.
            pixels, _, shape = self._decode(data if count else None, index, _fullsize=False, **tables)
            if pixels is None:
                return np.full((*shape[:3], self._shaped[4]), self._key.nodata, self.dtype)
            decoded = np.asarray(pixels)
            if decoded.shape != tuple(shape):
                decoded = decoded.reshape(shape)
        except Exception as error:  # decoders raise what they like on bad bytes; the file is at fault
            raise ImageError(f"{where} is corrupt ({error}); copy the file again from its source") from error
        return decoded if decoded.dtype == self.dtype else decoded.astype(self.dtype)

    def close(self) -> None:
        self._cache.clear()
        self._stream.close()


def _metadata(tif: Any, series: Any, key: Any) -> tuple[Origin, Mapping[str, float], tuple[str, ...]]:
    """(origin, micrometres per pixel by axis, channel names)."""
    resolution, unit = _resolution(key)
    sizes: dict[str, float] = {}
    if tif.is_ome and series.kind == "ome":
        tags, sizes, names = _ome(tif.ome_metadata)
        return Origin("ome", resolution, unit, tags), sizes, names
    if tif.is_imagej and series.kind == "imagej":
        found = dict(tif.imagej_metadata or {})
        wanted = ("unit", "spacing", "finterval", "fps", "min", "max", "Labels", "tunit", "mode")
        tags = {k: found[k] for k in wanted if k in found}
        um = UM.get(str(found.get("unit", "")).strip().lower())
        if um is not None and resolution is not None:
            sizes = {"X": um / resolution[0], "Y": um / resolution[1]}
            if "spacing" in found:
                sizes["Z"] = um * abs(float(found["spacing"]))
        labels = found.get("Labels")
        per_channel = series.axes.count("C") == 1 and labels is not None and series.axes.strip("C") == "YX"
        return Origin("imagej", resolution, unit, tags), sizes, tuple(map(str, labels or ())) if per_channel else ()
    if resolution is not None and unit == 3:
        # Inches are print hints (72, 96, 300 dpi); centimetres are what microscopes and scanners write.
        sizes = {"X": 1e4 / resolution[0], "Y": 1e4 / resolution[1]}
    return Origin("tiff", resolution, unit), sizes, ()


def _resolution(key: Any) -> tuple[tuple[float, float] | None, int]:
    tags = {code: key.tags[code].value for code in (282, 283) if code in key.tags}
    values = []
    for code in (282, 283):
        value = tags.get(code)
        if not isinstance(value, tuple) or len(value) != 2 or not value[0] or not value[1]:
            return None, 1
        values.append(value[0] / value[1])
    unit = key.tags[296].value if 296 in key.tags else 2
    return (values[0], values[1]), int(unit)


def _ome(xml: str) -> tuple[dict[str, Any], dict[str, float], tuple[str, ...]]:
    """(attributes of Pixels worth keeping, micrometres by axis, channel names) of the first image."""
    from xml.etree import ElementTree

    root = ElementTree.fromstring(xml)
    pixels = next((e for e in root.iter() if e.tag.rsplit("}", 1)[-1] == "Pixels"), None)
    if pixels is None:
        return {}, {}, ()
    keys = [f"PhysicalSize{axis}{unit}" for axis in "XYZ" for unit in ("", "Unit")]
    tags: dict[str, Any] = {
        k: pixels.attrib[k] for k in (*keys, "TimeIncrement", "TimeIncrementUnit") if k in pixels.attrib
    }
    sizes = {}
    for axis in "XYZ":
        um = UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm").strip().lower())
        value = pixels.get(f"PhysicalSize{axis}")
        if um is not None and value is not None and float(value) > 0:
            sizes[axis] = float(value) * um
    for key, value in list(tags.items()):
        if not key.endswith("Unit"):
            tags[key] = float(value)
    channels = [e.get("Name", "") for e in pixels if e.tag.rsplit("}", 1)[-1] == "Channel"]
    return tags, sizes, tuple(channels) if all(channels) else ()
