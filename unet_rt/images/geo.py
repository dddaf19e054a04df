"""GeoTIFF and COG by rasterio: windows at one level, with coordinate system, transform and nodata."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError
from .pixels import CACHE_BYTES, Array, Origin, Stored, Window, check_pixels, pick_level
from .places import place_of

_COLOURS = ("red", "green", "blue", "alpha")


def open_by_rasterio(path: Path, name: str, level: int | None, kind: str) -> Stored:
    """JPEG 2000 or VRT (``kind``), which nothing else here reads."""
    called = {"jp2": "JPEG 2000", "vrt": "VRT"}[kind]
    if find_spec("rasterio") is None:
        raise ImageError(f"{name}: {called} is read by rasterio, which is missing; pip install 'unet-rt[geo]'")
    return open_geo(path, name, level, called)


def open_geo(path: Path, name: str, level: int | None = None, called: str = "GeoTIFF") -> Stored:
    """ImageError for anything that cannot be read exactly as stored. Needs rasterio."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with _gdal():
            shapes = []
            with rasterio.open(path) as full:
                shapes += [full.shape, *((-(-full.height // f), -(-full.width // f)) for f in full.overviews(1))]
            picked = pick_level(level, len(shapes), name)
            dataset = rasterio.open(path, **({"overview_level": picked - 1} if picked else {}))
            shapes[picked] = dataset.shape  # as stored: some writers round down
    except (RasterioError, OSError, ValueError) as error:
        raise ImageError(f"{name}: not a readable {called} ({error}); copy it again from its source") from error
    try:
        with _gdal():
            return _read_geo(dataset, path, shapes, picked, name)
    except BaseException:
        dataset.close()
        raise


def _read_geo(dataset: Any, path: Path, shapes: list[tuple[int, int]], picked: int, name: str) -> Stored:
    from rasterio.enums import MaskFlags

    if len(set(dataset.dtypes)) > 1:
        raise ImageError(f"{name}: bands of different dtypes ({', '.join(dataset.dtypes)}); save them as one dtype")
    if dataset.count == 0:
        raise ImageError(f"{name}: the file holds no bands; copy it again from its source")
    dtype = np.dtype(dataset.dtypes[0])
    colours = tuple(c.name for c in dataset.colorinterp)
    rgb = dataset.count in (3, 4) and colours == _COLOURS[: dataset.count]
    axes = "YX" if dataset.count == 1 else "SYX" if rgb else "CYX"
    check_pixels((dataset.count, *dataset.shape), dtype, name)
    pixels = GeoPixels(dataset, dtype, name)
    notes = [f"level {picked} of {len(shapes)}"] if len(shapes) > 1 else []
    # All that GDAL has to say which pixels hold data: a nodata value, a mask in the file or beside it, an alpha channel.
    flags = dataset.mask_flag_enums
    masked = any(MaskFlags.all_valid not in band for band in flags)
    if dataset.nodata is not None:
        notes.append(f"nodata {dataset.nodata:g}")
    elif masked:
        alpha = any(MaskFlags.alpha in band for band in flags)
        notes.append(f"nodata by the {'alpha channel' if alpha else 'mask in the file'}")
    tags, sizes, note = place_of(dataset, path)
    notes += [note] if note else []
    # NaN is no data, whether or not the file says so.
    nan = dtype.kind == "f"
    nodata = None if dataset.nodata is None else float(dataset.nodata)
    if nan and nodata is None and not masked:
        nodata = math.nan
        notes.append("NaN is nodata")
    lead = (dataset.count,) if dataset.count > 1 else ()
    placed = "gcps" in tags or tags["crs"] is not None or not dataset.transform.is_identity
    names = tuple(dataset.descriptions)
    return Stored(
        pixels,
        axes,
        Origin("geo", tags=tags) if placed else Origin("tiff"),
        names=names if all(names) else (),
        alpha=3 if rgb and dataset.count == 4 else None,
        pixel_size_um=sizes,
        notes=tuple(notes),
        levels=tuple((*lead, *shape) for shape in shapes) if len(shapes) > 1 else (),
        nodata=nodata,
        palette=_palette(dataset, dtype) if colours == ("palette",) else None,
        valid=pixels.valid if masked else None,
    )


def _palette(dataset: Any, dtype: np.dtype[Any]) -> Array | None:
    """The colours of a band of indices, (n, 3) uint8."""
    if dtype.name not in ("uint8", "uint16"):
        return None
    colours = np.zeros((np.iinfo(dtype).max + 1, 3), np.uint8)
    for index, colour in dataset.colormap(1).items():
        colours[index] = colour[:3]
    return colours


class GeoPixels:
    """Bands of an open dataset: (Y, X), or (C, Y, X) where there are several."""

    def __init__(self, dataset: Any, dtype: np.dtype[Any], name: str) -> None:
        self._dataset = dataset
        self._name = name
        self._most = CACHE_BYTES
        height, width = dataset.block_shapes[0]
        self.piece_bytes = height * width * dtype.itemsize * (1 if dataset.interleaving is None else dataset.count)
        self._lead = (dataset.count,) if dataset.count > 1 else ()
        self.shape = (*self._lead, *dataset.shape)
        self.dtype = dtype

    def read(self, window: Window) -> Array:
        bands = list(range(*window[0].indices(self._lead[0]))) if self._lead else [0]
        with self._guarded(), _gdal(self._most):
            pixels: Array = self._dataset.read([band + 1 for band in bands], window=self._place(window))
        return pixels if self._lead else pixels[0]

    def valid(self, window: Window) -> Array:
        """Where at least one band holds data, by nodata value or mask: bool, (1,) Y, X."""
        with self._guarded(), _gdal(self._most):
            mask: Array = self._dataset.dataset_mask(window=self._place(window)) > 0
        return mask[None] if self._lead else mask

    def _place(self, window: Window) -> Any:
        from rasterio.windows import Window as Place

        height, width = self.shape[-2:]
        (top, bottom, _), (left, right, _) = window[-2].indices(height), window[-1].indices(width)
        return Place(left, top, right - left, bottom - top)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (
            Exception
        ) as error:  # GDAL has its own errors beside rasterio's; whatever it raises, the file is at fault
            raise ImageError(f"{self._name}: cannot be read ({error}); copy it again from its source") from error

    def limit_cache(self, most: int) -> None:
        """GDAL keeps blocks for all files that are open; it lets go of them at the next read."""
        self._most = max(most, 2**20)

    def close(self) -> None:
        self._dataset.close()


@contextlib.contextmanager
def _gdal(cache_bytes: int = CACHE_BYTES) -> Iterator[None]:
    """GDAL with as much cache as other formats have here, and no warning that a picture lacks a georeference."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=cache_bytes):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield
