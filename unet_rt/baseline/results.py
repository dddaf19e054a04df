"""Raw results of an engine on the windows of a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.engine import Engine, EngineView
from ..engine.spec import EngineSpec
from ..kernels import calls
from ..kernels.request import Frame
from ..prediction.host import run
from ..prediction.work import Work
from ..tiling.decision import Decision
from ..tiling.grid import TileGrid
from .samples import SampleWindow

Array = npt.NDArray[Any]


def tile_of(
    sample: SampleWindow, spec: EngineSpec, tile: Sequence[int], threads: int, start: Sequence[int] | None = None
) -> Array:
    """(1, C, *tile): the sample as the network gets it, continued by the border rule where it is smaller.

    ``start``: the tile's first pixel per axis; None: the middle.
    """
    middle = [max(0, (n - t) // 2) for n, t in zip(sample.shape, tile, strict=True)]
    starts = np.array([middle if start is None else list(start)], dtype=np.int64)
    out = np.empty((1, spec.channels, *tile), dtype=np.float32)
    calls.tile_gather(
        sample.pixels,
        starts,
        out,
        frame=Frame(border=spec.contract.border or "mirror"),
        affine=sample.numbers,
        threads=threads,
    )
    return out


def raw_results(engine: Engine, sample: SampleWindow, grid: TileGrid, threads: int = 0) -> list[Array]:
    """:func:`raw_result` of every output, by the way that predictions go: one output after the other."""
    if len(engine.spec.outputs) > 1 and engine.device_session is None:
        engine = _Remembered(engine)
    return [raw_result(engine, sample, grid, threads, output) for output in range(len(engine.spec.outputs))]


class _Remembered(EngineView):
    """An engine that is given the same tiles once per output, and runs them the first time."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, engine.spec)
        self._results: dict[bytes, list[npt.NDArray[np.float32]]] = {}

    def run(self, batch: Array) -> list[npt.NDArray[np.float32]]:
        key = hashlib.sha256(batch.tobytes()).digest()
        if key not in self._results:
            self._results[key] = self._engine.run(batch)
        return self._results[key]


def raw_result(engine: Engine, sample: SampleWindow, grid: TileGrid, threads: int = 0, output: int = 0) -> Array:
    """The network's own values (K, *spatial), float32, of a sample."""
    channels = engine.spec.outputs[output].channels
    result = np.empty((channels, *grid.out_shape(output)), dtype=np.float32)

    def keep(work: Work, start: int, band: Array) -> None:
        result[:, start : start + band.shape[1]] = band

    decision = Decision("copy", channels, np.dtype(np.float32))
    with sample.source(engine.spec.contract) as source:
        run(engine, source, [Work(0, grid)], decision, keep, sample.affines, output=output, threads=threads)
    return result
