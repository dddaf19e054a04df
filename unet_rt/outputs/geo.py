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

    down, across = scale
    place: dict[str, Any]
    if "gcps" in origin.tags:
        points = origin.tags["gcps"]
        place = {"gcps": [GroundControlPoint(row / down, column / across, *at) for row, column, *at in points]}
    else:
        a, b, c, d, e, f = origin.tags["transform"]
        # Both transforms map the corner of the picture to the same place.
        place = {"transform": Affine(a * across, b * down, c, d * across, e * down, f)}
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", width=1, height=1, count=1, dtype="uint8", crs=origin.tags["crs"], **place):
            pass
        encoded = io.BytesIO(memory.read())
    with tifffile.TiffFile(encoded) as tiff:
        tags = [tag for tag in tiff.pages.first.tags if tag.code in GEO_TAGS]
        return tuple((tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in tags)
