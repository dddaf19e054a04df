"""Pixels of a TIFF's pages, by windows: mapped where they lie in one piece, else decoded segment by segment."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np

from ..errors import ImageError
from .pixels import (
    CACHE_BYTES,
    MAX_PIECE_BYTES,
    Array,
    MappedFile,
    Window,
)


def truncated_error(name: str, end: int, size: int) -> ImageError:
    """What is raised for a file of ``size`` bytes whose pixels end at byte ``end``."""
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
        self.piece_bytes = self._bytes
        self._most = CACHE_BYTES
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
        while self._cached > self._most and len(self._cache) > 1:
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

    def limit_cache(self, most: int) -> None:
        self._most = most
        while self._cached > most and self._cache:
            self._cached -= self._cache.popitem(last=False)[1].nbytes

    def close(self) -> None:
        self._cache.clear()
        self._stream.close()
