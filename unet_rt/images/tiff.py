"""TIFF, BigTIFF, OME-TIFF, ImageJ stacks: windows by tifffile, only the strips and tiles that a window touches.

Pixels stored in one piece are mapped; others are decoded segment by segment, with a bounded cache of decoded segments,
so that the rows two bands share are decoded once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import ImageError, size_text
from .pixels import (
    GEO_TAGS,
    NODATA_TAG,
    UM,
    Array,
    MappedFile,
    Origin,
    Stored,
    pick_level,
)
from .places import lost_place, world_file
from .tiff_pages import MappedSeries, SegmentedSeries, truncated_error
from .views import turn_upright

ORIENTATION_TAG = 274
_PREVIEW_OR_MASK = 1 | 4  # bits of the subfile type
_KINDS_OF_EQUALS = ("ome", "generic", "uniform", "shaped")  # of others, slides above all, the first series is the image
# Measured on a blank 8 MiB image: deflate 988 : 1, LZW 1157, Zstandard 30,500, JPEG XL 36,000, Brotli 599,000.
MAX_RATIO = 1_000_000


@dataclass(frozen=True)
class TiffBytes:
    """Where a TIFF lies: a local file, or a stream over something remote, which cannot be mapped."""

    size: int
    open: Callable[[], IO[bytes]]
    path: Path | None = None


def open_tiff(path: Path, name: str, level: int | None = None, series: int | str | None = None) -> Stored:
    """ImageError for anything that cannot be read exactly as stored."""
    place = TiffBytes(path.stat().st_size, lambda: path.open("rb", buffering=0), path)
    return open_tiff_bytes(place, name, level, series)


def open_tiff_bytes(place: TiffBytes, name: str, level: int | None = None, series: int | str | None = None) -> Stored:
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
                if place.path is not None and _is_placed(tif, place.path) and find_spec("rasterio") is not None:
                    from .geo import open_geo

                    return open_geo(place.path, name, level)
                return _read_tiff(tif, place, name, level, series)
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
        raise truncated_error(name, end, size)


def _is_geo(tif: Any) -> bool:
    """Whether a TIFF is georeferenced, and nothing else."""
    return bool(tif.pages) and not (tif.is_ome or tif.is_imagej) and any(c in tif.pages[0].tags for c in GEO_TAGS)


def _is_placed(tif: Any, path: Path | None) -> bool:
    """Whether tags or a world file place a TIFF on the earth. A world file is that of one picture."""
    if _is_geo(tif) or path is None or world_file(path) is None:
        return _is_geo(tif)
    pictures = [] if tif.is_ome or tif.is_imagej else _pictures(tif)
    return len(pictures) == 1 and len(pictures[0].pages) == 1


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


def _pictures(tif: Any) -> list[Any]:
    """The series that are images: not previews and masks of others, unless there is nothing else."""
    return [s for s in tif.series if not int(s.keyframe.subfiletype) & _PREVIEW_OR_MASK] or list(tif.series)


def _pick_series(tif: Any, asked: int | str | None, name: str) -> tuple[Any, list[str]]:
    """(the series that is read, notes).

    Raises:
        ImageError: There are several and none was chosen, or there is no such one.
    """
    pictures = _pictures(tif)
    left_out = len(tif.series) - len(pictures)
    notes = [f"{left_out} preview{'s' if left_out > 1 else ''} or mask left out"] if left_out else []
    if asked is None and (len(pictures) == 1 or pictures[0].kind not in _KINDS_OF_EQUALS):
        return pictures[0], notes + ([f"series 0 of {len(pictures)}"] if len(pictures) > 1 else [])
    listed = ", ".join(
        f"{number}{f' {s.name}' if s.name else ''} ({s.axes} {size_text(s.shape)})" for number, s in enumerate(pictures)
    )
    if asked is None:
        fact = f"{name}: holds {len(pictures)} images"
        raise ImageError(
            f"{fact}: {listed}; choose one with --series N or NAME, or save the one wanted as its own file"
        )
    found = [number for number, s in enumerate(pictures) if asked in (number, str(number))]
    found = found or [number for number, s in enumerate(pictures) if s.name == asked]
    if len(found) != 1:
        raise ImageError(f"{name}: no single series is called {asked!r}; there are {listed}; choose with --series")
    picked = pictures[found[0]]
    called = f" ({picked.name})" if picked.name else ""
    return picked, [*notes, *([f"series {found[0]} of {len(pictures)}{called}"] if len(pictures) > 1 else [])]


def _read_tiff(tif: Any, place: TiffBytes, name: str, level: int | None, asked: int | str | None) -> Stored:
    if not tif.pages or not tif.series:
        raise ImageError(f"{name}: the TIFF holds no image; copy it again from its source")
    check_whole(tif, place.size, name)
    series, notes = _pick_series(tif, asked, name)
    levels = series.levels
    picked = pick_level(level, len(levels), name)
    key = levels[picked].keyframe
    if len(levels) > 1:
        notes.append(f"level {picked} of {len(levels)}")
    if _is_geo(tif):
        notes.append("its georeference is not carried over; pip install 'unet-rt[geo]' for that")
    elif place.path is not None and (beside := world_file(place.path)) is not None:
        notes.append(
            lost_place(beside)
            if _is_placed(tif, place.path)
            else f"{beside.name} is not read: it is no single picture's"
        )
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
    stored = Stored(
        _pixels(levels[picked], key, shape, place, name),  # last: what is opened here stays open
        axes,
        origin,
        names,
        alpha,
        size,
        tuple(notes),
        levels=tuple(level_shapes) if len(levels) > 1 else (),
        nodata=_nodata(series.keyframe),
        palette=_palette(key),
        series=len(_pictures(tif)),
    )
    # A georeference is that of the pixels as they lie in the file.
    return stored if _is_geo(tif) else turn_upright(stored, _orientation(series.keyframe))


def _orientation(key: Any) -> int:
    tag = key.tags.get(ORIENTATION_TAG)
    return int(tag.value) if tag is not None and isinstance(tag.value, int) else 1


def _palette(key: Any) -> Array | None:
    """The colours of a picture of indices, (n, 3) uint8; 16-bit ones as others cut them, by their upper byte."""
    table = key.colormap if int(key.photometric) == 3 and key.samplesperpixel == 1 else None
    if table is None or table.shape != (3, 2**key.bitspersample):
        return None
    shift = 8 if table.max() > 255 else 0  # some writers take 255 for the brightest
    colours: Array = (table >> shift).astype(np.uint8).T.copy()
    return colours


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
    elif photometric == 3 and _palette(key) is None:
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
            raise truncated_error(name, end, size)
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
            raise truncated_error(name, max(ends), size)
    if path is not None and all(page.is_contiguous for page in pages) and key.is_memmappable:
        bytes_per_page = math.prod(key.shape) * dtype.itemsize
        end = max(int(page.dataoffsets[0]) for page in pages) + bytes_per_page
        if end > size:
            raise truncated_error(name, end, size)
        return MappedSeries(MappedFile(path, name), [int(p.dataoffsets[0]) for p in pages], outer, key.shape, stored)
    return SegmentedSeries(pages, key, outer, place.open, name)


def _metadata(tif: Any, series: Any, key: Any) -> tuple[Origin, Mapping[str, float], tuple[str, ...]]:
    """(origin, micrometres per pixel by axis, channel names)."""
    resolution, unit = _resolution(key)
    sizes: dict[str, float] = {}
    if tif.is_ome and series.kind == "ome":
        tags, sizes, names = _ome(tif.ome_metadata, tif.series.index(series))
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


def _ome(xml: str, image: int) -> tuple[dict[str, Any], dict[str, float], tuple[str, ...]]:
    """(attributes of Pixels worth keeping, micrometres by axis, channel names) of one image."""
    from xml.etree import ElementTree

    root = ElementTree.fromstring(xml)
    every = [e for e in root.iter() if e.tag.rsplit("}", 1)[-1] == "Pixels"]
    if image >= len(every):
        return {}, {}, ()
    pixels = every[image]
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
