"""Where blended tiles lie along an axis, and how much each of their samples weighs.

Tiles of a network that cannot be exact are part of it, so they lie where its users expect them: by this package's own rule
(``even``), or as MONAI's ``sliding_window_inference`` (``monai``) or nnU-Net's ``nnUNetPredictor`` (``nnunet``) lay them.

Worked example (one axis): image 250 px, stride 16, tile 96, overlap 48. ``even``: the canvas is 256 px, and tiles lie at
multiples of the stride: 0, 48, 80, 128, 160. ``monai`` steps 48 px and moves the last one back: 0, 48, 96, 144, 154.
``nnunet`` takes as many windows and spreads them: 0, 38, 77, 116, 154.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ..errors import TileError
from .axis import AxisTiles, Canvas, axis_tiles, canvas, covered_px
from .field import AxisField, TileSizes

Blend = Literal["gaussian", "constant"]
PlacementRule = Literal["even", "monai", "nnunet"]
TOOLS = {"monai": "MONAI", "nnunet": "nnU-Net"}

LEAST_WEIGHT = 1e-3  # a corner that one tile alone covers is divided by a sound number
NNUNET_PEAK = 10  # largest weight; with it the smallest ones of a plane are still above zero in float16


def usual_overlap(tile: int, rule: PlacementRule) -> int:
    """Pixels that neighbours share unless told otherwise: half a tile, of MONAI's a quarter, as its own default."""
    return tile - int(0.75 * tile) if rule == "monai" else tile // 2


def blended_step(tile: int, overlap: int, stride: int, rule: PlacementRule) -> int:
    """Distance of tile origins in pixels, at most: a multiple of the stride where tiles keep its phase."""
    if rule != "even":
        return tile - overlap
    return max(stride, (tile - overlap) // stride * stride)


def blended_tiles(
    image: int, tile: int, overlap: int, sizes: TileSizes, fields: Sequence[AxisField], rule: PlacementRule
) -> AxisTiles:
    """Tiles along an axis that share at least ``overlap`` pixels (``monai``, ``nnunet``: as theirs do).

    Raises:
        TileError: An overlap outside [0, tile); steps that leave gaps between the results of unpadded networks.
    """
    if not 0 <= overlap < tile:
        raise TileError(f"overlap {overlap} px is outside 0 to {tile - 1} px, the tile being {tile} px")
    if rule != "even":
        return _library_tiles(image, tile, overlap, rule)
    c = canvas(image, sizes, fields)
    t = min(tile, c.size)
    if t < tile and overlap >= t:
        return AxisTiles(c, t, (0,))  # the whole canvas is one tile: nothing to overlap
    step = blended_step(t, overlap, sizes.stride, rule)
    covered = covered_px(t, fields)
    if step > covered and t < c.size:
        raise TileError(
            f"tiles of {t} px give results for {covered} px each and would lie {step} px apart, with gaps between; "
            f"use an overlap of {t - covered} px or more"
        )
    return axis_tiles(c, t, step, sizes.stride, evenly=True)


def _library_tiles(image: int, tile: int, overlap: int, rule: PlacementRule) -> AxisTiles:
    """Windows that never leave the image, whatever the stride; one that is larger has the image in its middle."""
    size = max(image, tile)
    c = Canvas(image, (size - image) // 2, size)
    if rule == "monai":
        return axis_tiles(c, tile, tile - overlap, 1)
    last = size - tile
    # nnU-Net's step is a share of the window: half of an odd one is no whole number of pixels
    step = tile / 2 if overlap == tile // 2 else tile - overlap
    gaps = ceil(last / step)
    starts = {round(last / gaps * k) for k in range(gaps + 1)} if gaps else {0}
    return AxisTiles(c, tile, tuple(sorted(starts)))


def blend_weight(shape: tuple[int, ...], blend: Blend, rule: PlacementRule = "even") -> npt.NDArray[np.float32]:
    """Weight of every sample of a tile's output, float32, never zero.

    ``gaussian``: sigma = an eighth of the tile per axis. As MONAI weighs tiles, it is 1 in the middle and at least 1e-3.
    nnU-Net's lies about the sample ``n // 2``, is 10 there, and is rounded to float16, where the weights of corners are
    coarse; what is rounded to 0 gets the smallest weight that is not.

    Raises:
        TileError: An unknown ``blend``.
    """
    if blend not in get_args(Blend):
        raise TileError(f"blend {blend!r} is unknown; use {' or '.join(get_args(Blend))}")
    weight = np.ones(shape, dtype=np.float64)
    if blend == "constant":
        return weight.astype(np.float32)
    for k, n in enumerate(shape):
        middle = n // 2 if rule == "nnunet" else (n - 1) / 2
        profile = np.exp(-0.5 * ((np.arange(n) - middle) / (n / 8)) ** 2)
        weight *= profile.reshape([-1 if j == k else 1 for j in range(len(shape))])
    if rule == "nnunet":
        coarse = (NNUNET_PEAK * weight).astype(np.float16).astype(np.float32)
        return np.where(coarse == 0, coarse[coarse > 0].min(), coarse)
    return np.maximum(weight, LEAST_WEIGHT).astype(np.float32)
