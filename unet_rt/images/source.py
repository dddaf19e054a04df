"""An opened image: windows of its pixels, whatever stores them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ContractError, ImageError, size_text
from .arrays import DevicePixels
from .axes import ChannelChoice, Layout
from .pixels import Array, Pixels, Stored
from .views import PalettePixels, TurnedPixels

if TYPE_CHECKING:
    from ..kernels.memory import DeviceArray, MemoryContext


BAND_SAMPLES = 2**22  # samples read at a time where a whole image is gone through: 8 MiB of uint16


class Source:
    """An opened image: ``planes`` pictures (or volumes) of ``channels`` channels and the same spatial shape.

    Attributes:
        name: The file's name, or ``"array"``.
        path: The file or Zarr folder, None for arrays and URLs.
        axes: Axes as stored, e.g. ``"TCZYX"``.
        shape: (Y, X) or (Z, Y, X).
        channels: Channels that the network gets.
        dtype: Of the pixels that ``read`` returns.
        planes: Pictures in the image.
        plane_shape, plane_axes: The plane axes that ``planes`` flattens (last one fastest), e.g. (12, 31) and "TZ".
        reading: One line: how axes and channels were read.
        pixel_size_um: Micrometres per pixel along the spatial axes; None where not known for all of them.
        metadata: Where the pixels come from, for the output.
        gaps: Whether pixels may hold no data; see :meth:`valid`.
        channel_names: Of all stored channels, by metadata; their numbers where these name none.
        levels: Spatial shapes of all levels of a pyramid, finest first; empty where there is one level.
        level: The level that is read.
        nodata: The value of pixels that hold no data, None where none is declared; see :meth:`valid`.
        device, stream: The GPU on which the pixels lie, None if they do not, and the stream (cudaStream_t) on which they
            were made. ``read`` copies to the host.
        on_device: :meth:`device_plane` gives the pixels where they lie; luma and channels in no even order it does not.
    """

    def __init__(self, name: str, path: Path | None, stored: Stored, layout: Layout, choice: ChannelChoice) -> None:
        self.name = name = name if path is None else path.name or str(path)
        self.path = path
        self.axes = layout.axes
        self.shape = layout.space
        self.channels = 1 if choice.luma else len(choice.channels)
        self.dtype = np.dtype("uint8") if stored.pixels.dtype == np.bool_ else stored.pixels.dtype
        self.planes = layout.plane_count
        self.plane_shape = layout.plane_shape
        self.plane_axes = layout.plane_axes
        self.metadata = stored.origin
        named = len(stored.names) == layout.channels and len(set(stored.names)) == layout.channels
        self.channel_names = tuple(stored.names) if named else tuple(map(str, range(layout.channels)))
        self.levels = tuple(tuple(shape[i] for i in layout.spatial) for shape in stored.levels)
        self.level = stored.level
        self.nodata = stored.nodata
        sizes = [stored.pixel_size_um.get("ZYX"[-len(self.shape) :][i]) for i in range(len(self.shape))]
        self.pixel_size_um = tuple(s for s in sizes if s is not None) if None not in sizes else None
        self._pixels = stored.pixels
        self._valid = stored.valid
        self.gaps = stored.valid is not None or stored.nodata is not None
        self._files = tuple((file, file_state(file, name)) for file in stored.files)
        self._fingerprint = dict(stored.fingerprint)
        self._layout = layout
        self._choice = choice
        on_gpu = isinstance(stored.pixels, DevicePixels)
        self.on_device = on_gpu and not choice.luma and _step(choice.channels) is not None
        self.device: MemoryContext | None = (
            stored.pixels.array.device if isinstance(stored.pixels, DevicePixels) else None
        )
        self.stream = stored.pixels.stream if isinstance(stored.pixels, DevicePixels) else 0
        notes = "; ".join((*layout.notes, *stored.notes))
        self.reading = (
            f"{name} {layout.axes} {size_text(layout.shape)} {stored.pixels.dtype.name}: {choice.text}, "
            f"{len(self.shape)}-D network over {self.planes} plane{'s' if self.planes != 1 else ''}"
            f"{f' ({notes})' if notes else ''}"
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The local files that say what the pixels are: a file's header may name others."""
        return tuple(file for file, _ in self._files)

    def read(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        """Pixels [start, stop) of one plane: (C, *spatial), any strides; possibly a view, so do not write into it.

        Called from one thread at a time.
        """
        window = self._window(plane, start, stop)
        if any(low == high for low, high in zip(start, stop, strict=True)):
            return np.empty((self.channels, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
        with self._guarded(plane, start, stop):
            if self._choice.luma:
                return _luma(self._channels(window, (0, 1, 2)))[None]
            return self._channels(window, self._choice.channels)

    def valid(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> NDArray[np.bool_] | None:
        """Which pixels [start, stop) of one plane hold data: (*spatial); None where all of them do.

        By the mask that the file holds, else by its nodata value: a pixel without data has it in all stored channels.
        Called from the thread that reads.
        """
        window = self._window(plane, start, stop)
        if not self.gaps or any(low == high for low, high in zip(start, stop, strict=True)):
            return None
        if self._layout.channel is not None:
            window[self._layout.channel] = slice(0, self._layout.channels)
        with self._guarded(plane, start, stop):
            if self._valid is not None:
                mask = np.asarray(self._arrange(self._valid(tuple(window))).view(np.bool_).all(axis=0), np.bool_)
                if self.dtype.kind == "f":
                    mask = mask & self._holds_data(self._arrange(self._pixels.read(tuple(window))))
            else:
                mask = self._holds_data(self._arrange(self._pixels.read(tuple(window))))
        return None if bool(mask.all()) else mask

    def read_valid(
        self, plane: int, start: Sequence[int], stop: Sequence[int]
    ) -> tuple[Array, NDArray[np.bool_] | None]:
        """What :meth:`read` and :meth:`valid` give; where one value means "no data", from the same pixels, read once."""
        empty = any(low == high for low, high in zip(start, stop, strict=True))
        if empty or not self.gaps or self._valid is not None:
            return self.read(plane, start, stop), self.valid(plane, start, stop)
        window = self._window(plane, start, stop)
        if self._layout.channel is not None:
            window[self._layout.channel] = slice(0, self._layout.channels)
        with self._guarded(plane, start, stop):
            every = self._arrange(self._pixels.read(tuple(window)))
            mask = self._holds_data(every)
            if self._choice.luma:
                pixels = _luma(every[:3])[None]
            elif self._layout.channel is None:
                pixels = np.broadcast_to(every, (len(self._choice.channels), *every.shape[1:]))
            else:
                pixels = every if self._takes_all else every[list(self._choice.channels)]
        return pixels, None if bool(mask.all()) else mask

    @property
    def _takes_all(self) -> bool:
        """Whether the network gets all stored channels as they are."""
        return self._choice.channels == tuple(range(self._layout.channels))

    def _holds_data(self, pixels: Array) -> NDArray[np.bool_]:
        """(C, *spatial) of all stored channels -> (*spatial): where one of them is not the nodata value.

        NaN is none of the pixels that a network can take: one channel that is wanted and holds it suffices.
        """
        nodata = self.nodata
        if nodata is None or nodata == nodata:
            holds = np.asarray((pixels != nodata).any(axis=0), np.bool_)
        else:
            holds = np.ones(pixels.shape[1:], np.bool_)
        if pixels.dtype.kind == "f":
            for channel in set(self._choice.channels):
                holds &= ~np.isnan(pixels[channel])
        return holds

    def read_stored(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        """As :meth:`read`, but all stored channels, whatever the network gets: (stored, *spatial)."""
        window = self._window(plane, start, stop)
        if self._layout.channel is not None:
            window[self._layout.channel] = slice(0, self._layout.channels)
        with self._guarded(plane, start, stop):
            return self._arrange(self._pixels.read(tuple(window)))

    def fingerprint(self) -> dict[str, Any] | None:
        """What tells this image from others and from itself after a change, as JSON; None for an array.

        A file: path, size, time of its last change, level; a Zarr: path or URL, level, and a hash of its metadata. No pixel
        is read, so that a chunk of a Zarr that was replaced goes unnoticed.
        """
        return dict(self._fingerprint) or None

    @contextlib.contextmanager
    def _guarded(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Iterator[None]:
        """Names the window in errors of its pixels, and notices where the file is no longer the one opened."""
        for file, state in self._files:
            if file_state(file, self.name) != state:
                raise ImageError(f"{file}: changed while it was being read; start again when nothing writes to it")
        try:
            yield
        except ImageError as error:
            place = f"plane {plane}, " if self.planes > 1 else ""
            raise ImageError(f"{error} ({place}window {_numbers(start)} to {_numbers(stop)})") from error

    def _window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> list[slice]:
        """Of the stored axes; the first channel."""
        if not 0 <= plane < self.planes:
            raise ImageError(f"{self.name}: plane {plane} does not exist; the image has {self.planes}")
        if any(not 0 <= a <= b <= n for a, b, n in zip(start, stop, self.shape, strict=True)):
            raise ImageError(
                f"{self.name}: window {tuple(start)} to {tuple(stop)} is not inside the image ({size_text(self.shape)})"
            )
        window = [slice(0, 1)] * len(self._layout.shape)
        for position, index in zip(
            self._layout.planes, np.unravel_index(plane, self.plane_shape or (1,)), strict=False
        ):
            window[position] = slice(int(index), int(index) + 1)
        for position, low, high in zip(self._layout.spatial, start, stop, strict=True):
            window[position] = slice(int(low), int(high))
        return window

    def device_plane(self, plane: int) -> DeviceArray:
        """All pixels of one plane of an image on a GPU, (C, *spatial), any strides; a view of the caller's memory."""
        layout, pixels = self._layout, self._pixels
        if not isinstance(pixels, DevicePixels) or not self.on_device:
            raise ImageError(f"{self.name} does not lie on a GPU; read() it")
        front = layout.planes if layout.channel is None else (*layout.planes, layout.channel)
        view = pixels.array.transpose(*front, *layout.spatial)
        for index in np.unravel_index(plane, self.plane_shape or (1,))[: len(layout.planes)]:
            view = view[int(index)]
        if view.dtype == np.bool_:
            view = view.view(np.uint8)
        wanted = self._choice.channels
        if layout.channel is None:
            return view[None].repeat_first(len(wanted))
        step = _step(wanted) or 0
        if step == 0:
            return view[wanted[0] : wanted[0] + 1].repeat_first(len(wanted))
        stop = wanted[-1] + (1 if step > 0 else -1)
        return view[wanted[0] : None if stop < 0 else stop : step]

    def _channels(self, window: list[slice], wanted: tuple[int, ...]) -> Array:
        """The wanted stored channels of a window, (C, *spatial)."""
        position = self._layout.channel
        if position is None:
            pixels = self._arrange(self._pixels.read(tuple(window)))
            return np.broadcast_to(pixels, (len(wanted), *pixels.shape[1:]))
        step = wanted[1] - wanted[0] if len(wanted) > 1 else 1
        if list(wanted) == [wanted[0] + i * step for i in range(len(wanted))] and abs(step) == 1:
            window[position] = slice(min(wanted), max(wanted) + 1)
            return self._arrange(self._pixels.read(tuple(window)))[::step]
        distinct = {}
        for channel in sorted(set(wanted)):
            window[position] = slice(channel, channel + 1)
            distinct[channel] = self._arrange(self._pixels.read(tuple(window)))[0]
        if len(distinct) == 1:
            only = distinct[wanted[0]]
            return np.broadcast_to(only, (len(wanted), *only.shape))
        return np.stack([distinct[channel] for channel in wanted])

    def _arrange(self, pixels: Array) -> Array:
        """All stored axes -> (C, *spatial), without copying."""
        layout = self._layout
        front = layout.planes if layout.channel is None else (*layout.planes, layout.channel)
        moved = pixels.transpose(*front, *layout.spatial)
        for _ in layout.planes:
            moved = moved[0]
        if layout.channel is None:
            moved = moved[None]
        return moved.view(np.uint8) if moved.dtype == np.bool_ else moved

    def bands(self, samples: int = BAND_SAMPLES) -> Iterator[tuple[int, int, int]]:
        """(plane, start, stop) of bands along the first spatial axis that together are the whole image."""
        rows = max(1, samples // max(1, math.prod(self.shape[1:]) * self.channels))
        for plane in range(self.planes):
            for start in range(0, self.shape[0], rows):
                yield plane, start, min(start + rows, self.shape[0])

    def middle_band(self, samples: int = BAND_SAMPLES) -> tuple[int, int, int]:
        """The band in the middle of the middle plane: what a look at the image takes, however large that is."""
        rows = max(1, samples // max(1, math.prod(self.shape[1:]) * self.channels))
        start = max(0, (self.shape[0] - rows) // 2)
        return self.planes // 2, start, min(start + rows, self.shape[0])

    def read_band(self, plane: int, start: int, stop: int) -> Array:
        """Rows [start, stop) of the first spatial axis, all of the others: (C, rows, ...)."""
        rest = self.shape[1:]
        return self.read(plane, (start, *(0 for _ in rest)), (stop, *rest))

    @property
    def piece_bytes(self) -> int:
        """Of the largest piece of the file that decodes only whole; 0 where windows are read as they are."""
        return int(getattr(_innermost(self._pixels), "piece_bytes", 0))

    def limit_cache(self, most: int) -> None:
        """Keeps no more than so many bytes of decoded pieces, but the one read last; 0: lets go of all."""
        pixels: Any = _innermost(self._pixels)
        if hasattr(pixels, "limit_cache"):
            pixels.limit_cache(most)

    def close(self) -> None:
        self._pixels.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Source {self.reading}>"


def _innermost(pixels: Pixels) -> Pixels:
    """The pixels as they are stored, below views that turn them or write out a palette."""
    while isinstance(pixels, TurnedPixels | PalettePixels):
        pixels = pixels.stored
    return pixels


def _numbers(position: Sequence[int]) -> str:
    return f"({', '.join(str(int(n)) for n in position)})"


def _step(channels: Sequence[int]) -> int | None:
    """Distance between channels that are evenly spaced (0: the same again), else None."""
    steps = {b - a for a, b in pairwise(channels)} or {1}
    return steps.pop() if len(steps) == 1 else None


def _luma(colours: Array) -> Array:
    """(3, ...) -> (...): ITU-R 601 luminance in the pixels' dtype; integers by the usual 16-bit fixed-point weights."""
    red, green, blue = colours
    if colours.dtype in (np.uint8, np.uint16):
        mixed: Array = 19595 * red.astype(np.uint32) + 38470 * green.astype(np.uint32)
        mixed = mixed + 7471 * blue.astype(np.uint32) + np.uint32(1 << 15)
        return (mixed >> 16).astype(colours.dtype)
    if colours.dtype.kind != "f":
        raise ContractError(f"luma of {colours.dtype} colours is not defined; choose one with --channels 0, 1 or 2")
    real: Array = 0.299 * red.astype(np.float64) + 0.587 * green.astype(np.float64) + 0.114 * blue.astype(np.float64)
    return real.astype(colours.dtype)


def file_state(file: Path, name: str) -> tuple[int, int]:
    """(bytes, time of the last change in nanoseconds)."""
    try:
        found = file.stat()
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error}); check {file}") from error
    return found.st_size, found.st_mtime_ns
