"""How an image is read, as far as its user says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """How an image is read, as far as the user says it.

    Attributes:
        axes: One letter per stored axis; None: as the file says, or as its shape can be read.
        channels: Indices, names, or ``"luma"``; text is parsed. None: those that the network asks for.
        level: Of a pyramid (Zarr, TIFF, whole slide): its number, 0 being the finest, or the size of its pixels as text,
            e.g. ``"0.5um"``; None: 0, or by ``wanted_um``.
        series: Of a TIFF that holds several images: its number, from 0, or its name; None: there is one.
        pixel_size_um: Of the finest level along the spatial axes, in place of what the file says; one number stands for
            all axes.
        wanted_um: Pixel size that the image is to be brought to: without ``level``, the coarsest level is read whose pixels
            are at least as fine.
        nodata: Value of pixels that hold no data, in place of what the file says; NaN may be one.
        glance: Channels that a rule drops (alpha, equal colours) are looked at in one band of the image, not in all of it:
            enough to ask what is missing before anything is read.
        indices: Indices into a palette of a TIFF are the values, as in masks: its colours are for the eye.
    """

    axes: str | None = None
    channels: Sequence[int] | str | None = None
    level: int | str | None = None
    pixel_size_um: Sequence[float] = ()
    wanted_um: Sequence[float] = ()
    glance: bool = False
    indices: bool = False
    nodata: float | None = None
    series: int | str | None = None
