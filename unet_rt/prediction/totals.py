"""Totals of overlapping tiles on a device, from which blended bands are made."""

from __future__ import annotations

from math import prod

import numpy as np

from ..kernels import calls
from ..kernels.memory import DeviceArray
from ..kernels.request import Placement
from ..tiling.decision import decision_operation
from ..tiling.placement import blend_weight
from .work import Work
from .workspace import Shared


class Totals:
    """Sums of one output's tiles and weights: two buffers, since rows cannot be moved within one at once."""

    def __init__(self, shared: Shared) -> None:
        self._made, self._device, self._stream = shared.computation, shared.workspace.device, shared.session.stream
        take, output = shared.workspace, self._made.output
        tile = shared.works[0].grid.tile_out_shape(output)
        weight = blend_weight(tile, self._made.spec.blend, self._made.spec.placement)
        self._weight = take.empty("weight", tile, np.float32)
        pinned = take.pinned("weight", tile, np.float32)
        pinned[...] = weight
        self._device.copy_in(self._weight, pinned, self._stream)
        shapes = [self._shape(work) for work in shared.distinct()]
        self._memory = [take.empty(f"total {k}", (max(map(prod, shapes)),), np.float32) for k in range(2)]
        self.begin(shared.works[0])

    def _shape(self, work: Work) -> tuple[int, ...]:
        """Of the totals; the last "channel" is the sum of weights."""
        output, grid = self._made.output, work.grid
        whole = grid.out_shape(output)
        return (grid.outputs[output].channels + 1, min(grid.tile_out_shape(output)[0], whole[0]), *whole[1:])

    def begin(self, work: Work) -> None:
        """Starts a result: nothing was added to it yet."""
        shape = self._shape(work)
        self._sums = [memory[: prod(shape)].reshape(*shape) for memory in self._memory]
        self._rows = shape[1]
        self._top = 0  # row of the result that the totals' first row stands for
        self._device.zero(self._sums[0], self._stream)

    def add(self, tiles: DeviceArray, place: Placement) -> None:
        place, sums = place.from_row(self._top), self._sums[0]
        calls.tile_blend(tiles, place, self._weight, sums[:-1], sums[-1], stream=self._stream.handle)

    def finish(self, band: DeviceArray, start: int, stop: int, uncovered: DeviceArray | None) -> None:
        """Divides the rows that are final, and moves the others to the front."""
        rows = stop - start
        if rows:
            done, rest = self._sums
            calls.blend_finish(
                done[:-1, :rows],
                done[-1, :rows],
                band,
                decision_operation(self._made.decision),
                stream=self._stream.handle,
                uncovered=uncovered,
            )
            left = self._rows - rows
            self._device.zero(rest, self._stream)
            for k in range(len(done) if left > 0 else 0):
                self._device.copy(rest[k, :left], done[k, rows:], self._stream)
            self._sums.reverse()
        self._top = stop
