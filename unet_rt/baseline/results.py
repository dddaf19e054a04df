"""Raw results of an engine on the windows of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.engine import Engine
from ..engine.spec import EngineSpec
from ..kernels import calls
from ..kernels.request import Frame
from ..prediction.run import run
from ..prediction.work import Computation, Work, Write
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
    """:func:`raw_result` of every output, by the way that predictions go; on the host tiles are run once for all."""
    return _run(engine, sample, grid, threads, range(len(engine.spec.outputs)))


def raw_result(engine: Engine, sample: SampleWindow, grid: TileGrid, threads: int = 0, output: int = 0) -> Array:
    """The network's own values (K, *spatial), float32, of a sample."""
    return _run(engine, sample, grid, threads, [output])[0]


def _run(engine: Engine, sample: SampleWindow, grid: TileGrid, threads: int, outputs: Sequence[int]) -> list[Array]:
    results, ways = list[Array](), list[tuple[Computation, Write]]()
    with sample.source(engine.spec.contract) as source:
        for output in outputs:
            channels = engine.spec.outputs[output].channels
            results.append(np.empty((channels, *grid.out_shape(output)), dtype=np.float32))

            def keep(work: Work, start: int, band: Array, result: Array = results[-1]) -> None:
                result[:, start : start + band.shape[1]] = band

            decision = Decision("copy", channels, np.dtype(np.float32))
            ways.append((Computation(engine, source, decision, sample.affines, output, threads=threads), keep))
        first, *others = ways
        run(first[0], [Work(0, grid)], first[1], beside=others)
    return results
