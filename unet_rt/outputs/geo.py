"""GeoTIFF: the tags that place an output on the earth where its source lies."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ..errors import OutputError
from ..images.pixels import GEO_TAGS, Origin


def geo_tags(origin: Origin, scale: Sequence[float]) -> tuple[tuple[int, int, int, Any, bool], ...]:
    """Tags for ``tifffile`` with the coordinate system and transform, or ground control points, of a georeferenced source.

    rasterio encodes them, in a picture of one pixel; the output itself is written as every TIFF is here.

    Args:
        origin: Of kind ``"geo"``.
        scale: Pixels of the source per sample of the output, along Y and X.

    Raises:
        OutputError: rasterio is missing.
    """
    try:
        import rasterio
    except ImportError as error:
        raise OutputError("GeoTIFF needs rasterio, which is missing; pip install 'unet-rt[geo]'") from error
    import tifffile
    from rasterio.control import GroundControlPoint
    from rasterio.transform import Affine

    place: dict[str, Any]
    if "gcps" in origin.tags:
        points, (down, across) = origin.tags["gcps"], scale
        place = {"gcps": [GroundControlPoint(row / down, column / across, *at) for row, column, *at in points]}
    else:
        place = {"transform": Affine(*scaled_transform(origin, scale))}
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", width=1, height=1, count=1, dtype="uint8", crs=origin.tags["crs"], **place):
            pass
        encoded = io.BytesIO(memory.read())
    with tifffile.TiffFile(encoded) as tiff:
        tags = [tag for tag in tiff.pages.first.tags if tag.code in GEO_TAGS]
        return tuple((tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in tags)


def crs_name(wkt: str) -> str:
    """What GeoJSON calls a coordinate system: a URN where it has an EPSG number, else its own text (WKT).

    Longitude and latitude on WGS 84, in this order, are OGC's CRS84, as GDAL writes it.
    """
    import rasterio

    code = rasterio.crs.CRS.from_wkt(wkt).to_epsg()
    if code is None:
        return wkt
    return "urn:ogc:def:crs:OGC:1.3:CRS84" if code == 4326 else f"urn:ogc:def:crs:EPSG::{code}"


def scaled_transform(origin: Origin, scale: Sequence[float]) -> tuple[float, float, float, float, float, float]:
    """The six coefficients of a source's transform for an output with ``scale`` pixels of it per sample, along Y and X."""
    a, b, c, d, e, f = origin.tags["transform"]
    down, across = scale
    # Both transforms map the corner of the picture to the same place.
    return a * across, b * down, c, d * across, e * down, f
