"""Pieces of objects: what one window holds of each, which of them touch, and the objects that they make."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


Ints = npt.NDArray[np.int64]


Connectivity = Literal["full", "face"]


def box_of(start: Sequence[int], stop: Sequence[int]) -> tuple[slice, ...]:
    """The window [start, stop) as an index."""
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


@dataclass(frozen=True)
class Pieces:
    """Pieces, or whole objects, one per row; positions in pixels of the mask, ``high`` included.

    ``first`` is the place of the first pixel in raster order.
    """

    label: Ints
    area: Ints
    position_sum: Ints
    low: Ints
    high: Ints
    first: Ints

    @classmethod
    def concatenated(cls, parts: Sequence[Pieces], axes: int) -> Pieces:
        empty = cls.empty(np.zeros(0, np.int64), axes)
        return cls(*(np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in vars(empty)))

    @classmethod
    def empty(cls, label: Ints, axes: int) -> Pieces:
        """As many as there are labels, to be filled by :meth:`add`."""
        n, most = len(label), np.iinfo(np.int64).max
        return cls(
            label,
            np.zeros(n, np.int64),
            np.zeros((n, axes), np.int64),
            np.full((n, axes), most),
            np.full((n, axes), -1),
            np.full(n, most),
        )

    def add(self, row: Ints, parts: Pieces) -> None:
        """Takes parts into the rows that they belong to."""
        np.add.at(self.area, row, parts.area)
        np.add.at(self.position_sum, row, parts.position_sum)
        np.minimum.at(self.low, row, parts.low)
        np.maximum.at(self.high, row, parts.high)
        np.minimum.at(self.first, row, parts.first)

    def take(self, rows: Ints) -> Pieces:
        return Pieces(*(getattr(self, name)[rows] for name in vars(self)))


def measure_pieces(local: npt.NDArray[np.int32], labels: Ints, start: Sequence[int], shape: Sequence[int]) -> Pieces:
    """The pieces of a window, measured by runs along the last axis: there are far fewer of them than pixels."""
    measured = Pieces.empty(labels, len(shape))
    differs = local[..., 1:] != local[..., :-1]
    begins, ends = local != 0, local != 0
    begins[..., 1:] &= differs
    ends[..., :-1] &= differs
    begin, end = np.flatnonzero(begins), np.flatnonzero(ends)
    length = end - begin + 1
    at = np.stack(np.unravel_index(begin, local.shape), axis=1) + np.array(start, np.int64)
    last = at.copy()
    last[:, -1] += length - 1
    position_sum = at * length[:, None]
    position_sum[:, -1] += length * (length - 1) // 2
    first = np.ravel_multi_index(tuple(at.T), tuple(shape))
    row = local.reshape(-1)[begin].astype(np.int64) - 1
    measured.add(row, Pieces(labels[row], length, position_sum, at, last, first))
    return measured


def unite(pieces: Pieces, touching: Ints) -> tuple[Pieces, Ints]:
    """(whole objects in the order of their first pixels, the row among them of every piece)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(pieces.label)
    a, b = touching[pieces.label[touching[:, 0]] == pieces.label[touching[:, 1]]].T
    _, group = connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(n, n)), directed=False)
    label = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
    label[group] = pieces.label
    objects = Pieces.empty(label, pieces.low.shape[1])
    objects.add(group, pieces)
    order = np.argsort(objects.first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return objects.take(order), place[group]


class Seams:
    """Which pieces touch across the sides of windows, which come in raster order of the axes given.

    Per axis k it keeps the numbers of the pieces that lie in the layer of pixels just below the windows at hand: a plane
    across k that reaches over the whole mask along the axes after k (whose windows follow before the next along k), and
    over the window along those before.
    """

    def __init__(self, shape: Sequence[int], connectivity: Connectivity):
        self._shape = tuple(shape)
        reach = (-1, 0, 1) if connectivity == "full" else (0,)
        self._shifts = list(itertools.product(reach, repeat=len(shape) - 1))
        self._below: list[npt.NDArray[np.int32] | None] = [None] * len(shape)
        self._here: list[npt.NDArray[np.int32] | None] = [None] * len(shape)
        self._pairs: list[Ints] = []

    def add(self, index: Sequence[int], start: Sequence[int], local: npt.NDArray[np.int32], offset: int) -> None:
        """A window: its index among windows, its first pixel, its pieces, and how many pieces came before."""
        axes = range(len(self._shape))
        for k in axes:
            if not any(index[k + 1 :]):  # the first window of a layer along k
                self._below[k] = self._here[k] if index[k] else None
                across = [local.shape[j] if j < k else self._shape[j] for j in axes if j != k]
                self._here[k] = np.zeros(across, np.int32)
            place = [0 if j < k else start[j] for j in axes if j != k]
            low, high = (local[(*[slice(None)] * k, side)] for side in (0, -1))
            here, below = self._here[k], self._below[k]
            if here is not None:
                ends = [a + n for a, n in zip(place, high.shape, strict=True)]
                here[box_of(place, ends)] = np.where(high, high + offset, 0)
            if below is not None:
                self._meet(low, below, place, offset)

    def _meet(
        self, low: npt.NDArray[np.int32], below: npt.NDArray[np.int32], place: Sequence[int], offset: int
    ) -> None:
        keys: list[Ints] = []
        for shift in self._shifts:
            # The part of ``low`` whose neighbours by this shift lie inside ``below``.
            first = [max(0, -(a + s)) for a, s in zip(place, shift, strict=True)]
            end = [min(n, m - a - s) for n, m, a, s in zip(low.shape, below.shape, place, shift, strict=True)]
            move = [a + s for a, s in zip(place, shift, strict=True)]
            own = low[box_of(first, end)]
            other = below[
                box_of(
                    [a + m for a, m in zip(first, move, strict=True)], [a + m for a, m in zip(end, move, strict=True)]
                )
            ]
            both = (own > 0) & (other > 0)
            keys.append(np.unique((own[both].astype(np.int64) + offset) << 32 | other[both]))
        key = np.unique(np.concatenate(keys))
        self._pairs.append(np.stack([key >> 32, key & 0xFFFFFFFF], axis=1) - 1)

    def touching(self) -> Ints:
        """(M, 2) pairs of pieces, counted from 0 over all windows."""
        return np.concatenate([np.zeros((0, 2), np.int64), *self._pairs])
