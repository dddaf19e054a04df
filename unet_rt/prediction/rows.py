"""Rows of tiles with their pixels on the device: read by a thread of the host, copied by a stream of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from ..images.normalize import grey_levels
from ..kernels.memory import DeviceArray
from ..kernels.request import Affine, Ints
from ..kernels.stream import Event
from .work import Array, StoppableQueue, Tally, Work, check_image, filled, unseen
from .workspace import Shared

WINDOWS = 3  # rows of tiles whose pixels are on the device: one computed from, one there, one on its way


@dataclass
class Window:
    """A slot for the pixels of one row of tiles, on both sides of the bus."""

    pinned: Array
    memory: DeviceArray
    copied: Event  # the pixels are on the device; the pinned memory may be filled again
    read: Event  # all tiles were gathered; the device's memory may be filled again


@dataclass
class Row:
    """One row of tiles with its pixels."""

    work: Work
    tally: Tally
    row: int
    index: Ints
    origins: Ints
    numbers: Affine
    pixels: DeviceArray  # (C, *spatial)
    start: tuple[int, ...]  # the pixels' place in the image
    rows: tuple[int, int]  # image rows that it reads, for messages
    counter: int  # which of the counters counts its non-finite pixels
    window: Window | None = None


class Rows:
    """All rows of tiles of a run, in order, each with its pixels on the device or on their way."""

    def __init__(self, shared: Shared, counters: DeviceArray) -> None:
        """``counters``: (2, count), used in turn by rows of tiles."""
        self._shared, self._made, self._counters = shared, shared.computation, counters
        self._source = self._made.source
        self._ready = StoppableQueue(WINDOWS, shared.stop)
        self._free = StoppableQueue(WINDOWS, shared.stop)
        self._looked = 0  # rows of the image that were looked at already, of the work that is read
        if not self._source.on_device:
            self._allocate()

    def _allocate(self) -> None:
        sizes, workspace = [1], self._shared.workspace
        for work in self._shared.distinct():
            for row in range(work.grid.shape[0]):
                start, stop = work.grid.window(work.grid.row(row), self._made.border)
                sizes.append(prod(b - a for a, b in zip(start, stop, strict=True)))
        shape, dtype = (self._source.channels * max(sizes),), self._source.dtype
        for k in range(min(WINDOWS, self._shared.rows)):
            memory = workspace.pinned(f"window {k}", shape, dtype), workspace.empty(f"window {k}", shape, dtype)
            self._free.put(Window(*memory, workspace.device.event(), workspace.device.event()))

    def read(self) -> None:
        """Reads the pixels of all rows of an image on the host, in a thread of its own."""
        stream, device = self._shared.workspace.copy_in, self._shared.workspace.device
        for row in self._planned():
            work, (start, stop) = row.work, row.work.grid.window(row.index, self._made.border)
            window = row.window = self._free.get()
            with self._shared.clock("read"):
                pixels = filled(*self._source.read_valid(work.plane, start, stop), row.numbers)
                seen = self._made.spec.input_range
                levels = None if seen is None else grey_levels(seen, row.numbers)
                row.tally.watch(unseen(pixels, start, work.grid, self._looked), levels)
                self._looked = max(self._looked, stop[0])
                window.copied.synchronize()  # the last copy out of this memory is over
                placed, packed, row.pixels = pack(pixels, window.pinned, window.memory)
                np.copyto(placed, pixels[:1] if placed.shape[0] != pixels.shape[0] else pixels)
            stream.wait(window.read)
            if packed.nbytes:
                device.copy_in(window.memory[: packed.size], packed, stream)
            stream.record(window.copied)
            row.start, row.rows = start, (start[0], stop[0])
            self._ready.put(row)
        self._ready.put(None)

    def _planned(self) -> Iterator[Row]:
        """All rows of tiles; their pixels are yet to come."""
        number, nothing = 0, self._counters[0, :0]
        for work in self._shared.works:
            check_image(work, self._source)
            numbers, tally = self._made.affines.plane(work.plane), self._shared.seen.begin(work)
            self._looked = 0
            for row in range(work.grid.shape[0]):
                index = work.grid.row(row)
                start = tuple(0 for _ in self._source.shape)
                yield Row(
                    work, tally, row, index, work.grid.origins(index), numbers, nothing, start, (0, 0),
                    number % self._counters.shape[1],
                )  # fmt: skip
                number += 1

    def __iter__(self) -> Iterator[Row]:
        """Rows of tiles whose pixels are on the device, or will be there when the session's stream gets to them."""
        if not self._source.on_device:
            for row in self._ready:
                self._shared.session.stream.wait(row.window.copied)
                yield row
            return
        for row in self._planned():
            start, stop = row.work.grid.window(row.index, self._made.border)
            row.pixels, row.rows = self._source.device_plane(row.work.plane), (start[0], stop[0])
            yield row

    def release(self, row: Row) -> None:
        """All tiles of a row are gathered: its memory may be filled again once the session's stream got there."""
        if row.window is not None:
            self._shared.session.stream.record(row.window.read)
            self._free.put(row.window)


def pack(pixels: Array, pinned: Array, memory: DeviceArray) -> tuple[Array, Array, DeviceArray]:
    """Where the pixels (C, *spatial) go: (view of the pinned memory, the same as one stretch, the view of it on the device).

    Their axes keep the order that they have in memory, which makes the copy a quick one, and a channel that stands for
    all of them is copied once.
    """
    repeated = pixels.shape[0] if pixels.strides[0] == 0 and pixels.shape[0] > 1 else 0
    if repeated:
        pixels = pixels[:1]
    order = sorted(range(pixels.ndim), key=lambda k: (-abs(pixels.strides[k]), k))
    shape = tuple(pixels.shape[k] for k in order)
    back = tuple(order.index(k) for k in range(pixels.ndim))
    packed = pinned[: prod(shape)]
    view = memory[: prod(shape)].reshape(*shape).transpose(*back)
    return packed.reshape(shape).transpose(back), packed, view.repeat_first(repeated) if repeated else view
