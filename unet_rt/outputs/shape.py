"""Shape, element type and places of a result that is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from ..errors import OutputError
from ..images.pixels import Array
from ..images.source import Source


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


def ome_axes(axes: str) -> str:
    """OME knows T, C, Z besides Y and X; a sequence of another kind takes a letter that is free."""
    for letter in axes:
        if letter not in "TZCYX":
            free = next((f for f in "TZC" if f not in axes), None)
            if free is None:
                raise OutputError(f"OME holds at most five axes T, C, Z, Y, X; this output is {axes}; use .npy")
            axes = axes.replace(letter, free)
    return axes
