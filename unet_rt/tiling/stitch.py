"""From tile outputs to finished bands of the result: place or blend, then decide (softmax, argmax, threshold).

Bands are handed on in order along the first spatial axis; nothing of an earlier band is kept, so memory does not grow
with the image.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import TileError
from ..kernels import calls
from ..kernels.request import Ints
from .decision import Decision, decision_operation
from .grid import TileGrid
from .placement import Blend, PlacementRule, blend_weight


def uncovered_error(samples: int, start: int, stop: int) -> TileError:
    """What is raised for rows [start, stop) of a blended result with samples that no tile holds."""
    return TileError(f"{samples} samples of rows {start} to {stop} lie in no tile; use a larger overlap between tiles")


class BandStitcher:
    """Collects the tiles of one tile row after another and returns the finished band of each.

    Use per plane and output: for every row, ``begin(k)``, ``add(tiles, index)`` any number of times, ``finish()``.
    """

    def __init__(
        self,
        grid: TileGrid,
        output: int,
        decision: Decision,
        blend: Blend = "gaussian",
        placement: PlacementRule = "even",
        threads: int = 0,
    ):
        self._grid, self._output, self._decision, self._threads = grid, output, decision, threads
        self._operation = decision_operation(decision)
        self._width = grid.out_shape(output)[1:]
        self._row = 0
        self._missing = 0  # tiles of this row that were not added yet
        self._band: npt.NDArray[Any] | None = None
        if grid.blended:
            tile = grid.tile_out_shape(output)
            self._weight = blend_weight(tile, blend, placement)
            rows = min(tile[0], grid.out_shape(output)[0])
            channels = grid.outputs[output].channels
            self._total = np.zeros((channels, rows, *self._width), dtype=np.float32)
            self._weights = np.zeros((rows, *self._width), dtype=np.float32)
            self._top = 0  # row of the result that the accumulators' first row stands for

    def begin(self, row: int) -> None:
        self._row = row
        self._missing = prod(self._grid.shape[1:])
        start, stop = self._grid.band(row, self._output)
        if not self._grid.blended:
            self._band = self._new_band(stop - start)

    def add(self, tiles: npt.NDArray[Any], index: Ints) -> None:
        """``tiles`` (N, K, *tile_out) are the outputs of the tiles at grid indices ``index`` (N, axes) of this row.

        Raises:
            TileError: More tiles than the row lacks, or not as many as indices.
        """
        if len(index) > self._missing:
            raise TileError(f"{len(index)} tiles for row {self._row}, which lacks {self._missing}; begin the next row")
        self._missing -= len(index)
        place = self._grid.placement(index, self._output)
        if self._grid.blended:
            place = place.from_row(self._top)
            calls.tile_blend(tiles, place, self._weight, self._total, self._weights, threads=self._threads)
        else:
            place = place.from_row(self._grid.band(self._row, self._output)[0])
            calls.tile_stitch(tiles, place, self._band, self._operation, threads=self._threads)

    def finish(self) -> tuple[int, npt.NDArray[Any]]:
        """(first row of the band in the result, band). Shape ([channels,] rows, ...); an empty band has 0 rows.

        Raises:
            TileError: Tiles of the row are missing, or leave gaps: nothing is made up in their place.
        """
        if self._missing:
            tiles = prod(self._grid.shape[1:])
            raise TileError(
                f"only {tiles - self._missing} of {tiles} tiles of row {self._row} were added; add them all"
            )
        start, stop = self._grid.band(self._row, self._output)
        if not self._grid.blended:
            band, self._band = self._band, None
            if band is None:
                raise TileError("finish() without begin()")
        else:
            rows = stop - start
            band = self._new_band(rows)
            if rows:
                total = np.ascontiguousarray(self._total[:, :rows])
                weights = self._weights[:rows]
                bare = calls.blend_finish(total, weights, band, self._operation, threads=self._threads)
                if bare:
                    raise uncovered_error(bare, start, stop)
                self._shift(rows)
            self._top = stop
        return start, band[0] if self._decision.channels == 0 and band.ndim > 1 + len(self._width) else band

    def _new_band(self, rows: int) -> npt.NDArray[Any]:
        # argmax has no channel axis; a binary threshold has one of length 1 until finish() takes it away
        lead = () if self._decision.op == "argmax" else (max(self._decision.channels, 1),)
        return np.empty((*lead, rows, *self._width), dtype=self._decision.dtype)

    def _shift(self, rows: int) -> None:
        """Moves the unfinished rows of the accumulators to the front."""
        for rows_first in (np.moveaxis(self._total, 1, 0), self._weights):
            left = len(rows_first) - rows
            rows_first[:left] = rows_first[rows:].copy()
            rows_first[left:] = 0
