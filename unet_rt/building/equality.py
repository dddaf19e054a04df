"""Build, step 5: how equal tiled results of an engine are to its own whole-image result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..baseline.results import raw_results
from ..baseline.samples import SampleWindow
from ..baseline.tiles import judged_tile
from ..engine import parity
from ..engine.engine import Engine
from ..engine.equality import Equality
from ..errors import TileError

LEAST_TILES = 4  # that are compared, so that there are three origins beside the first


def measure_equality(engine: Engine, sample: SampleWindow, threads: int) -> Equality | None:
    """Compares tiles of an engine with its run on the whole of a window.

    Libraries choose kernels, and the order of sums, by the size of arrays and the place in them; the halo says nothing
    about that, and neither does a comparison with another library.

    Args:
        engine: The engine.
        sample: The window; one that is smaller than two tiles an axis is continued by its mirror image.
        threads: Of the kernels.

    Returns:
        None for engines that promise nothing (blended tiles, halos that are not exact) and for plans of one tile.
    """
    spec = engine.spec
    if not spec.runs_whole or spec.halo_limit is not None:
        return None
    tile = judged_tile(spec, sample.shape)
    grid = spec.grid(sample.shape, tile)
    if grid.count < LEAST_TILES:
        sample = _continued(sample, tuple(2 * n for n in tile))
        grid = spec.grid(sample.shape, tile)
    whole = spec.canvas_shape(sample.shape)
    try:
        alone = replace(spec, tile=whole).grid(sample.shape, whole)
    except TileError:  # the whole canvas is no tile of this graph
        return None
    once, tiled = (raw_results(engine, sample, one, threads) for one in (alone, grid))
    compared = [one for one in parity.compare_outputs(once, tiled, spec, sample.name) if one.judged]
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(once, tiled, strict=True))
    changes = [one.label_change for one in compared if one.label_change is not None]
    return Equality(
        "bits" if same else "rounding",
        max(one.relative for one in compared),
        max(changes) if changes else None,
        tile,
        sample.shape,
        grid.count,
    )


def _continued(sample: SampleWindow, least: tuple[int, ...]) -> SampleWindow:
    """The window, repeated in mirrors up to ``least`` pixels per axis."""
    more = [(0, max(0, want - have)) for have, want in zip(sample.shape, least, strict=True)]
    return replace(sample, pixels=np.pad(sample.pixels, [(0, 0), *more], mode="symmetric"))
