"""Tiles whose pixels equal those of a recent tile are not run again: background of slides, fill of sparse arrays.

Equal means bit by bit, so the result is the one that running would give. The thread that gathers finds repeats, the one that
runs the engine keeps results; both keep the same few tiles, the ones used last, because they see the same sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

KEPT = 2  # distinct tiles that are remembered: background and one more; results of large tiles are large
_PROBED = 4096  # samples compared before the whole tile is


class _Recent(OrderedDict[int, Any]):
    """Values by number, the ones used last."""

    def use(self, number: int) -> None:
        self.move_to_end(number)

    def keep(self, number: int, value: Any) -> None:
        self[number] = value
        while len(self) > KEPT:
            self.popitem(last=False)


class Repeats:
    """Finds tiles that were there shortly before. Tiles it is given are kept, not copied: nobody may write into them."""

    def __init__(self) -> None:
        self._recent = _Recent()
        self._count = 0

    def compact(self, tiles: Array) -> tuple[Array, list[tuple[int, bool]]]:
        """Sorts out repeats.

        Args:
            tiles: (N, C, *tile); the new ones are moved to the front.

        Returns:
            The new tiles, and for each of all N (the number of its distinct tile, whether that one was there before).
        """
        known: list[tuple[int, bool]] = []
        count = 0
        for tile in tiles:
            bits = tile.reshape(-1).view(np.uint32)
            probe = bits[:: max(1, bits.size // _PROBED)].copy()
            number = self._find(bits, probe)
            known.append((self._count if number is None else number, number is not None))
            if number is not None:
                self._recent.use(number)
                continue
            if tile is not tiles[count]:
                tiles[count] = tile
            self._recent.keep(self._count, (probe, tiles[count].reshape(-1).view(np.uint32)))
            self._count += 1
            count += 1
        return tiles[:count], known

    def _find(self, bits: Array, probe: Array) -> int | None:
        for number, (known_probe, known) in self._recent.items():
            if np.array_equal(probe, known_probe) and np.array_equal(bits, known):
                return number
        return None


class Results:
    """Outputs of recent tiles, in step with :class:`Repeats`."""

    def __init__(self) -> None:
        self._recent = _Recent()

    def complete(self, outputs: Array | None, known: list[tuple[int, bool]]) -> Array:
        """Outputs (N, K, *tile_out) of all tiles, from those of the new ones (None: there are none)."""
        fresh = iter(() if outputs is None else outputs)
        every = []
        for number, old in known:
            if old:
                self._recent.use(number)
            else:
                self._recent.keep(number, next(fresh))
            every.append(self._recent[number])
        if outputs is not None and len(outputs) == len(known):
            return outputs
        return every[0][None] if len(every) == 1 else np.stack(every)
