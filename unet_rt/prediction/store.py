"""Where a result goes while it is computed: an array, rows of a file, packed blocks, chunks of an OME-Zarr."""

from __future__ import annotations

import io
import itertools
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import OutputError
from ..kernels.memory import DeviceArray
from ..outputs.pictures import OverlayCollector
from ..system.durable import Disk, part_path, remove_part
from .blocks import Block
from .work import Array, Tally

if TYPE_CHECKING:  # which take their time
    from ..outputs.output import Output
    from ..outputs.zarr import ZarrOutput

Rows = Callable[[Block, int, Array], None]  # (block, first row in it, band: ([K,] rows, ...))
Place = tuple[tuple[int, ...], tuple[int, ...]]  # [start, stop) in samples of the result


HELD_BYTES = 2**28  # of unpacked blocks, while an output is made of them
_LEVEL = 1  # of zlib: packed blocks live for the time of the run


class Readable(Protocol):
    """Where a result can be read back."""

    def window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        """Samples [start, stop) of finished blocks: (K, *spatial) or (*spatial,)."""
        ...


class BlockStore(Readable, Protocol):
    """Where a stage keeps the data of blocks until all are there."""

    def write(self, block: Block, values: Array) -> list[Path]:
        """Writes (K, *spatial) or (*spatial,); returns the files that hold it, yet to be synced."""
        ...


class PackedStore:
    """One packed file per block, for outputs that are written from top to bottom at the end."""

    def __init__(self, folder: Path, cuts: Sequence[Sequence[int]]) -> None:
        """``cuts``: per axis, samples of the result where blocks begin, and its end."""
        self._folder, self._cuts = folder, cuts
        self.held_bytes = HELD_BYTES
        self._shape = tuple(len(c) - 1 for c in cuts)
        self._held: OrderedDict[int, Array] = OrderedDict()  # the ones read last
        folder.mkdir(exist_ok=True)

    def write(self, block: Block, values: Array) -> list[Path]:
        stream = io.BytesIO()
        np.save(stream, values, allow_pickle=False)
        path = self._path(block.number)
        part = part_path(path)  # another process may have finished the same block
        try:
            part.write_bytes(zlib.compress(stream.getbuffer(), _LEVEL))
            Disk().replace(part, path)
        except BaseException:  # half of it would take the room that a full disk lacks
            remove_part(part)
            raise
        return [path]

    def holds(self, number: int) -> bool:
        """Whether a block was written."""
        return self._path(number).exists()

    def window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        ranges = [
            [k for k, (a, b) in enumerate(pairwise(cuts)) if a < high and b > low]
            for cuts, low, high in zip(self._cuts, start, stop, strict=True)
        ]
        result: Array | None = None
        for index in itertools.product(*ranges):
            values = self._block(plane * prod(self._shape) + int(np.ravel_multi_index(index, self._shape)))
            lead = values.shape[: values.ndim - len(index)]
            if result is None:
                result = np.empty((*lead, *(b - a for a, b in zip(start, stop, strict=True))), values.dtype)
            source, target = [], []
            for k, cuts, low, high in zip(index, self._cuts, start, stop, strict=True):
                first, last = max(cuts[k], low), min(cuts[k + 1], high)
                source.append(slice(first - cuts[k], last - cuts[k]))
                target.append(slice(first - low, last - low))
            lead_all = (slice(None),) * len(lead)
            result[lead_all + tuple(target)] = values[lead_all + tuple(source)]
        assert result is not None  # noqa: S101 - windows are not empty
        return result

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}"

    def _block(self, number: int) -> Array:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        path = self._path(number)
        try:
            values: Array = np.load(io.BytesIO(zlib.decompress(path.read_bytes())), allow_pickle=False)
        except (OSError, ValueError, EOFError, zlib.error) as error:
            raise OutputError(
                f"{path}: a finished block cannot be read back ({error}); use --restart to begin anew"
            ) from error
        self._held[number] = values
        while len(self._held) > 1 and sum(v.nbytes for v in self._held.values()) > self.held_bytes:
            self._held.popitem(last=False)
        return values


class ZarrStore:
    """Chunks of an OME-Zarr image, which becomes the output as it is."""

    def __init__(self, output: ZarrOutput, place: Callable[[Block], Place]) -> None:
        self.output, self._place = output, place

    def write(self, block: Block, values: Array) -> list[Path]:
        return self.output.write(block.plane, self._place(block)[0], values)

    def window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        return self.output.read(plane, start, stop)


class ArrayStore:
    """An array (planes, [K,] *spatial) in memory."""

    def __init__(self, array: Array, place: Callable[[Block], Place]) -> None:
        self.array, self._place = array, place

    def keep(self, block: Block, values: Array, tally: Tally) -> None:
        """A whole block; what was counted of it is counted elsewhere."""
        start, stop = self._place(block)
        self.array[block.plane][(..., *map(slice, start, stop))] = values

    def write_rows(self, block: Block, start: int, band: Array) -> None:
        """Rows of a block, from its row ``start`` on."""
        (top, *first), (_, *last) = self._place(block)
        rows = slice(top + start, top + start + band.shape[band.ndim - 1 - len(first)])
        self.array[block.plane][(..., rows, *map(slice, first, last))] = band

    def window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        view: Array = self.array[plane][(..., *map(slice, start, stop))]
        return view


class RowStore:
    """A file that is written row by row, plane by plane, as they are finished; an overlay is collected on the way."""

    def __init__(self, sink: Output, collector: OverlayCollector | None) -> None:
        self.sink, self.collector = sink, collector

    def write_rows(self, block: Block, start: int, band: Array) -> None:
        """Rows of a whole plane."""
        self.sink.write(block.plane, (start,) + (0,) * (len(block.start) - 1), band)
        if self.collector is not None:
            self.collector(block.plane, start, band)


class DeviceStore:
    """An array on a GPU, filled there; bands are copied to the host for an overlay or to be counted.

    Attributes:
        array: The caller's, in their library's type, (planes, [K,] *spatial).
        target: The same.
        write_rows: What takes the bands on the host; None: nothing needs them there.
    """

    def __init__(self, array: Any, target: DeviceArray, collector: OverlayCollector | None, *, counted: bool) -> None:
        self.array, self.target, self.collector = array, target, collector
        self.write_rows: Rows | None = self._collect if counted or collector is not None else None

    def _collect(self, block: Block, start: int, band: Array) -> None:
        if self.collector is not None:
            self.collector(block.plane, start, band)
