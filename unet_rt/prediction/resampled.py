"""An image at another number of pixels, resampled while it is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..images.normalize import Affines, OnePlane
from ..images.source import Source
from ..tiling.resample import input_span, resample
from .work import Array, filled


class Resampled(Source):
    """An image brought to another number of pixels while it is read; its pixels are float32.

    They are rounded for networks that take ``whole`` numbers.
    """

    def __init__(
        self, source: Source, shape: tuple[int, ...], affines: Affines | OnePlane, whole: bool = False
    ) -> None:
        self.__dict__.update(vars(source))
        self._inner, self._affines = source, affines
        self.shape = shape
        self._whole = whole
        self.dtype = np.dtype(np.float32)

    def read(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        if any(a == b for a, b in zip(start, stop, strict=True)):  # of tiles that lie outside, with a constant border
            return np.empty((self.channels, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
        shapes = self._inner.shape, self.shape
        ends = [input_span(a, b, n, m) for a, b, n, m in zip(start, stop, *shapes, strict=True)]
        first = tuple(a for a, _ in ends)
        last = tuple(b for _, b in ends)
        window = filled(*self._inner.read_valid(plane, first, last), self._affines.plane(plane))
        pixels = resample(window, first, start, stop, *shapes)
        return np.rint(pixels) if self._whole else pixels

    def valid(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> None:
        """Not asked of resampled pixels: those without data are filled before."""

    def read_valid(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> tuple[Array, None]:
        return self.read(plane, start, stop), None
