"""Objects that touch, told apart one whole object at a time, so that no window and no block decides where they part.

``watershed``: from the deepest places of an object (those farthest from its edge, or where the network's own distance is
largest) basins grow until they meet. ``border``: the network has a class for the pixels between objects; what is left
without them are the seeds, and they grow into it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, ImageError, size_text
from .pieces import Array, Pieces, box_of, measure_pieces

How = Literal["none", "watershed", "border"]
Local = npt.NDArray[np.int32]

# By how much deeper than the pass between them two places have to be. Of the union of 3,985 nuclei drawn by hand in 48
# micrographs a share is found again as F1 (IoU above 0.5): 0.819 unsplit, with 0.5 px 0.936, 0.75 0.948, 1 0.946, 2 0.921.
DEPTH_PX = 0.75
DEPTH_SHARE = 0.1  # the same for a network's own distance, whose unit is its own: of the object's deepest place
SPLIT_BYTES = 100  # per pixel of an object's box while it is split: 95 measured, in 2-D and 3-D


@dataclass(frozen=True)
class Split:
    """How objects that touch are told apart.

    Attributes:
        how: ``watershed`` or ``border``.
        spool: Where the parts are kept until the ids are written.
        border: The label of the class between objects (``border``).
        distance: Reads the network's own distance, (start, stop) -> float; None: that to the edge of the object.
        sampling: Sizes of a pixel along the axes, in relation to each other; empty: all the same.
        room_bytes: What splitting one object may take; None: anything.
    """

    how: Literal["watershed", "border"]
    spool: IO[bytes]
    border: int = 0
    distance: Callable[[Sequence[int], Sequence[int]], Array] | None = None
    sampling: tuple[float, ...] = ()
    room_bytes: int | None = None

    @property
    def merges(self) -> bool:
        """Whether classes that touch are one object until it is split: the border belongs to all of them."""
        return self.how == "border"


def border_label(names: dict[int, str]) -> int:
    """The label of the class that lies between objects.

    Raises:
        ContractError: No class is called ``border``.
    """
    for label, name in names.items():
        if name.strip().lower() == "border":
            return label
    raise ContractError(
        f"splitting by border needs a class called border, and the classes are {', '.join(names.values()) or 'unnamed'}; "
        "use --split watershed"
    )


def morphology() -> tuple[Any, Any]:
    """scikit-image's modules of morphology and segmentation; ContractError where it is missing."""
    try:
        from skimage import morphology, segmentation
    except ModuleNotFoundError as error:
        raise ContractError(
            "splitting objects needs scikit-image, which is missing; pip install 'unet-rt[objects]'"
        ) from error
    return morphology, segmentation


class Parts:
    """The parts of objects that were split: measured, and kept until they are written into windows.

    Attributes:
        shape: Of the mask.
        labels: By key, what an object is made of that stays whole; 0: its parts stand for it, or there are none.
    """

    def __init__(self, split: Split, shape: Sequence[int], structure: Array) -> None:
        self.shape, self._split, self._structure = tuple(shape), split, structure
        self._found: list[Pieces] = []
        self._rows = 0
        self._low: list[Sequence[int]] = []
        self._high: list[Sequence[int]] = []
        self._where: list[tuple[int, int, str, int]] = []  # offset and size in the spool, dtype, first row of its parts
        self._last: tuple[int, Array] | None = None
        self.labels: dict[int, int] = {}

    def check_room(self, low: Sequence[int], high: Sequence[int]) -> None:
        """ImageError where an object of this box (``high`` excluded) is too large to be split."""
        sides = [b - a for a, b in zip(low, high, strict=True)]
        need, room = prod(sides) * SPLIT_BYTES, self._split.room_bytes
        if room is not None and need > room:
            raise ImageError(
                f"an object that covers {size_text(sides)} px takes about {need / 1e6:,.0f} MB to be split, and "
                f"{max(0, room) / 1e6:,.0f} MB are there; use more --memory, or --split none"
            )

    def add(self, key: int, low: Sequence[int], inside: npt.NDArray[np.bool_], labels: Array) -> None:
        """Splits an object.

        Args:
            key: Its name in :attr:`labels`.
            low: The first corner of its box.
            inside: Which pixels of the box are its own.
            labels: The mask in the box.
        """
        high = [a + n for a, n in zip(low, inside.shape, strict=True)]
        self.check_room(low, high)
        if self._split.how == "border":
            parts, made_of = _by_border(inside, labels, self._split.border, self._structure)
        else:
            distance = None if self._split.distance is None else self._split.distance(low, high)
            parts = _by_depth(inside, distance, self._split.sampling, self._structure)
            made_of = [int(labels[inside][0])] * int(parts.max())
        if len(made_of) < 2:
            self.labels[key] = made_of[0] if made_of else 0
            return
        self._found.append(measure_pieces(parts, np.array(made_of, np.int64), low, self.shape))
        small = parts.astype(np.min_scalar_type(len(made_of)))
        data = zlib.compress(small.data, 1)
        self._split.spool.seek(0, 2)
        self._where.append((self._split.spool.tell(), len(data), small.dtype.str, self._rows))
        self._split.spool.write(data)
        self._low.append(tuple(low))
        self._high.append(tuple(high))
        self._rows += len(made_of)
        self.labels[key] = 0

    def pieces(self) -> Pieces:
        """All parts, one per row."""
        return Pieces.concatenated(self._found, len(self.shape))

    def paste(self, start: Sequence[int], ids: npt.NDArray[np.uint32], rows: npt.NDArray[np.uint32]) -> None:
        """Writes the ids of parts into those of a window; ``rows``: the id of every row of :meth:`pieces`."""
        if not self._where:
            return
        stop = np.array(start) + ids.shape
        low, high = np.array(self._low), np.array(self._high)
        for k in np.flatnonzero(((low < stop) & (high > start)).all(axis=1)).tolist():
            parts = self._read(k)
            first, last = np.maximum(low[k], start), np.minimum(high[k], stop)
            part = parts[box_of(first - low[k], last - low[k])]
            table = np.concatenate([[0], rows[self._where[k][3] : self._where[k][3] + int(parts.max())]]).astype(
                ids.dtype
            )
            window = ids[box_of(first - start, last - start)]
            np.copyto(window, table[part], where=part > 0)

    def _read(self, k: int) -> Array:
        if self._last is None or self._last[0] != k:  # a large object lies in windows one after the other
            offset, size, dtype, _ = self._where[k]
            self._split.spool.seek(offset)
            pixels = np.frombuffer(zlib.decompress(self._split.spool.read(size)), np.dtype(dtype))
            self._last = k, pixels.reshape([b - a for a, b in zip(self._low[k], self._high[k], strict=True)])
        return self._last[1]


def _by_depth(
    inside: npt.NDArray[np.bool_], distance: Array | None, sampling: Sequence[float], structure: Array
) -> Local:
    """Parts of an object from 1 on, one around each place that is deep beyond doubt; all 1 where there is but one."""
    from scipy import ndimage

    shapes, basins = morphology()
    if distance is None:
        unit = [s / min(sampling) for s in sampling] if sampling else None
        # One pixel around: beyond the box is outside, also at the edge of the image, where objects are cut.
        depth = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=unit)[(slice(1, -1),) * inside.ndim]
        height = DEPTH_PX
    else:
        values = np.where(inside, np.nan_to_num(distance.astype(np.float64)), 0)
        depth = values - values[inside].min()
        height = max(float(depth.max()) * DEPTH_SHARE, 1e-6)
        depth[~inside] = -height
    tops = shapes.reconstruction(depth - height, depth, footprint=structure)
    seeds, count = ndimage.label(shapes.local_maxima(tops, footprint=structure) & inside, structure, output=np.int32)
    if count < 2:
        return inside.astype(np.int32)
    parts: Local = basins.watershed(-depth, seeds, mask=inside, connectivity=structure).astype(np.int32)
    return parts


def _by_border(inside: npt.NDArray[np.bool_], labels: Array, border: int, structure: Array) -> tuple[Local, list[int]]:
    """(parts of an object from 1 on, the class of each): what the border leaves apart, grown over it to the nearest."""
    from scipy import ndimage

    _, basins = morphology()
    seeds, made_of = np.zeros(inside.shape, np.int32), list[int]()
    for value in np.unique(labels[inside]).tolist():
        if value != border:
            # By faces: a border one pixel wide that runs askew parts what lies on its sides.
            found, count = ndimage.label(inside & (labels == value), output=np.int32)
            seeds[found > 0] = found[found > 0] + len(made_of)
            made_of += [int(value)] * count
    if not made_of:
        return seeds, made_of
    away = ndimage.distance_transform_edt(seeds == 0)
    parts: Local = basins.watershed(away, seeds, mask=inside, connectivity=structure).astype(np.int32)
    return parts, made_of
