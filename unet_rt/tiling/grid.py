"""Which tiles cover an image, and which samples of each tile's output are kept. Integers only, never pixels.

Worked example (one axis, one output, scale 1): image 1000 px, a same-padded network with stride 16 and halo 94, tile 512.
The canvas is 1008 px (the next multiple of 16; nothing in front). A tile keeps 512 - 94 - 94 = 324 samples, rounded down to
the stride: step 320. Tiles start at 0, 320 and 496 (the last is moved back to end with the canvas). Cores, in canvas
samples: [0, 418), [414, 738), [590, 1008). A sample belongs to the lowest tile whose core holds it, so tile 1 owns
[418, 738) and tile 2 [738, 1000), cropped to the image.

The paper's network (shrink 92 + 92, halo 0, stride 16, sizes 12 mod 16), image 1000 px: the canvas starts 92 px before
the image and is 1196 px long (1000 + 184 = 1184, next size that is 12 mod 16); tile 572 -> 388, step 384.

*Aligned* grids cut the image into equal stretches instead, for results that are written in chunks by several writers: tile k
owns pixels [k * share, (k + 1) * share). Above, a tile of 512 owns 320 px: it starts 96 px (94 up to the stride) before its
share, and 512 - 96 - 94 is rounded down to the stride. ``part`` takes the tiles for a rectangle of the image out of a grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from math import prod

import numpy as np
import numpy.typing as npt

from ..contract.contract import Border
from ..errors import TileError, size_text
from ..kernels.request import Ints, Placement
from .axis import (
    AxisTiles,
    Canvas,
    aligned_count,
    aligned_step,
    aligned_tiles,
    axis_tiles,
    border_window,
    canvas,
    exact_step,
    lead,
    smallest_tile,
)
from .field import AxisField, OutputField, TileSizes
from .placement import PlacementRule, blended_tiles

REMEMBERED = 64  # images' sizes, for callers that predict one picture after the other: choosing takes milliseconds


@dataclass(frozen=True)
class TileGrid:
    """All tiles of one image.

    Attributes:
        axes: One :class:`AxisTiles` per spatial axis.
        outputs: The output fields, halos as used (exact, measured or given).
        blended: Tiles overlap and are averaged with weights (networks without exact tiling); halos play no role.
    """

    axes: tuple[AxisTiles, ...]
    outputs: tuple[OutputField, ...]
    blended: bool = False

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Number of tiles per axis."""
        return tuple(len(axis.starts) for axis in self.axes)

    @property
    def tile(self) -> tuple[int, ...]:
        return tuple(axis.tile for axis in self.axes)

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def computed_px(self) -> int:
        return self.count * prod(self.tile)

    @property
    def image(self) -> tuple[int, ...]:
        """Spatial shape of the image in pixels."""
        return tuple(axis.canvas.image for axis in self.axes)

    @property
    def start(self) -> tuple[int, ...]:
        """First image pixel whose results are wanted, per axis: 0 but for parts."""
        return tuple(axis.wanted[0] for axis in self.axes)

    def part(self, start: Sequence[int], stop: Sequence[int]) -> TileGrid:
        """The tiles for the image pixels [start, stop), whose results are all that is wanted of them.

        In aligned grids, parts that begin where what a tile owns ends have no tile in common.
        """
        axes = []
        for k, (axis, low, high) in enumerate(zip(self.axes, start, stop, strict=True)):
            if not 0 <= low < high <= axis.canvas.image:
                raise TileError(f"pixels {low} to {high} are no part of an axis of {axis.canvas.image} px")
            axes.append(axis.part(low, high, [o.field[k] for o in self.outputs], blended=self.blended))
        return replace(self, axes=tuple(axes))

    def out_shape(self, output: int) -> tuple[int, ...]:
        """Spatial shape of the wanted output: the image's, or a part of it."""
        ends = [axis.samples(f) for axis, f in self._paired(self.outputs[output])]
        return tuple(stop - start for start, stop in ends)

    def out_start(self, output: int) -> tuple[int, ...]:
        """First wanted sample in the image's output, per axis: 0 but for parts."""
        return tuple(axis.samples(f)[0] for axis, f in self._paired(self.outputs[output]))

    def window(self, rows: Ints, border: Border) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(start, stop) of the image pixels that the tiles at grid indices ``rows`` (tiles, axes) need."""
        origins = self.origins(rows)
        low, high = origins.min(axis=0), origins.max(axis=0) + np.array(self.tile)
        ends = [border_window(int(a), int(b), n, border) for a, b, n in zip(low, high, self.image, strict=True)]
        return tuple(a for a, _ in ends), tuple(b for _, b in ends)

    def tile_out_shape(self, output: int) -> tuple[int, ...]:
        """Spatial shape of one tile's output."""
        fields = self.outputs[output].field
        return tuple(f.out_size(axis.tile) for axis, f in zip(self.axes, fields, strict=True))

    def origins(self, index: npt.ArrayLike) -> Ints:
        """Origins in image pixels, (tiles, axes), of the tiles with grid indices ``index`` (tiles, axes)."""
        index = np.asarray(index)
        columns = [np.array(a.starts)[index[:, k]] - a.canvas.before for k, a in enumerate(self.axes)]
        return np.stack(columns, axis=1).astype(np.int64)

    def row(self, k: int) -> Ints:
        """Grid indices (tiles, axes) of all tiles in the row ``k`` of the first axis, in row-major order."""
        rest = [range(n) for n in self.shape[1:]]
        return np.array([(k, *index) for index in itertools.product(*rest)], dtype=np.int64)

    def rows(self) -> Iterator[Ints]:
        for k in range(self.shape[0]):
            yield self.row(k)

    @cached_property
    def _owned(self) -> list[list[Ints]]:
        """Per output and axis an array (tiles along the axis, 3): source, target, size."""
        return [
            [np.array(axis.owned(f), dtype=np.int64) for axis, f in self._paired(output)] for output in self.outputs
        ]

    @cached_property
    def _covered(self) -> list[list[Ints]]:
        """As ``_owned``, but all a tile covers of the image, for blending."""
        return [[np.array(axis.covered(f), dtype=np.int64) for axis, f in self._paired(o)] for o in self.outputs]

    def _paired(self, output: OutputField) -> Iterator[tuple[AxisTiles, AxisField]]:
        return zip(self.axes, output.field, strict=True)

    def placement(self, index: npt.ArrayLike, output: int) -> Placement:
        """What the tiles at grid indices ``index`` contribute to an output, in samples of the wanted output."""
        index = np.asarray(index)
        table = (self._covered if self.blended else self._owned)[output]
        parts = np.stack([table[k][index[:, k]] for k in range(len(self.axes))], axis=1)  # (tiles, axes, 3)
        source, target, size = (np.ascontiguousarray(parts[..., j]) for j in range(3))
        return Placement(source, target, size)

    def band(self, k: int, output: int) -> tuple[int, int]:
        """[start, stop) along the first axis that is final once tile row ``k`` is done, and was not before it."""
        if not self.blended:
            _, target, size = self._owned[output][0][k]
            return int(target), int(target + size)
        table = self._covered[output][0]
        start = int(table[k][1]) if k else 0
        stop = int(table[k + 1][1]) if k + 1 < len(table) else self.out_shape(output)[0]
        return start, stop


def tile_grid(
    image: Sequence[int],
    tile: Sequence[int],
    sizes: Sequence[TileSizes],
    outputs: Sequence[OutputField],
    *,
    overlap: Sequence[int] | None = None,
    aligned: bool = False,
    least: Sequence[int] | None = None,
    placement: PlacementRule = "even",
) -> TileGrid:
    """The tiles of an image; those of a size seen shortly before are remembered.

    Args:
        image: Spatial shape in pixels.
        tile: Tile size in pixels per axis. Larger than the canvas: taken down to it.
        sizes: Accepted sizes per axis.
        outputs: What the outputs depend on, halos as they are to be used.
        overlap: Pixels shared by neighbouring tiles at least, per axis, for tiles that are blended. None: exact tiles,
            whose overlap follows from the halo.
        aligned: Exact tiles own equal stretches of the image (the last ones less).
        least: Pixels per axis that the canvas has at least; None: as many as the image takes.
        placement: Where blended tiles lie.

    Raises:
        TileError: A tile that the graph does not accept or that keeps nothing; an overlap outside [0, tile).
    """
    pixels = (tuple(image), tuple(tile), None if overlap is None else tuple(overlap))
    whole = None if least is None else tuple(least)
    return _tile_grid(*pixels, tuple(sizes), tuple(outputs), aligned, whole, placement)


@lru_cache(maxsize=REMEMBERED)
def _tile_grid(
    image: tuple[int, ...],
    tile: tuple[int, ...],
    overlap: tuple[int, ...] | None,
    sizes: tuple[TileSizes, ...],
    outputs: tuple[OutputField, ...],
    aligned: bool,
    least: tuple[int, ...] | None,
    placement: PlacementRule,
) -> TileGrid:
    if not len(image) == len(tile) == len(sizes):
        raise TileError(
            f"image {size_text(image)} and tile {size_text(tile)} do not both have the network's {len(sizes)} spatial axes"
        )
    axes = []
    for k, (n, t, s) in enumerate(zip(image, tile, sizes, strict=True)):
        fields = [output.field[k] for output in outputs]
        if not s.accepts(t):
            raise TileError(_not_accepted(t, s))
        if overlap is not None:
            axes.append(blended_tiles(n, t, overlap[k], s, fields, placement))
        else:
            axes.append(_exact_tiles(canvas(n, s, fields, 0 if least is None else least[k]), t, s, fields, aligned))
    grid = TileGrid(tuple(axes), tuple(outputs), blended=overlap is not None)
    if least is None:
        return grid
    return grid.part((0,) * len(image), image)  # whole tiles may lie behind the image, where nothing is wanted


def _exact_tiles(c: Canvas, tile: int, sizes: TileSizes, fields: Sequence[AxisField], aligned: bool) -> AxisTiles:
    t = min(tile, c.size)
    share = aligned_step(t, sizes.stride, fields) if aligned else exact_step(t, sizes.stride, fields)
    if share <= 0:
        if t < c.size:
            halo = max((sum(f.halo) for f in fields), default=0)
            hint = (
                "build again with --halo measured"
                if sizes.fixed
                else f"use {smallest_tile(sizes, fields, aligned=aligned)} px or more"
            )
            raise TileError(f"a tile of {t} px keeps nothing: its halo takes {halo} samples; {hint}")
        share = sizes.stride
    if aligned:
        return aligned_tiles(c, t, share, sizes.stride, fields)
    return axis_tiles(c, t, share, sizes.stride)


def _not_accepted(tile: int, sizes: TileSizes) -> str:
    if sizes.fixed is not None:
        return f"tile {tile} px is not the graph's fixed size; use {sizes.fixed}"
    if tile < sizes.minimum:
        return f"tile {tile} px is below the smallest size {sizes.at_least(1)} px that the graph accepts"
    low, high = sizes.at_most(tile), sizes.at_least(tile)
    rule = (
        f"a multiple of stride {sizes.stride}"
        if sizes.remainder == 0
        else f"{sizes.remainder} modulo stride {sizes.stride}"
    )
    return f"tile {tile} px is not {rule}; use {low} or {high}"


def with_halo(output: OutputField, halo: int) -> OutputField:
    """The output with a halo of at most ``halo`` samples on every side."""
    cut = tuple(replace(f, halo=(min(f.halo[0], halo), min(f.halo[1], halo))) for f in output.field)
    return replace(output, field=cut)


def choose_tile(
    image: Sequence[int],
    sizes: Sequence[TileSizes],
    outputs: Sequence[OutputField],
    max_px: int,
    *,
    aligned: bool = False,
) -> tuple[int, ...]:
    """The tile of at most ``max_px`` pixels that computes the fewest pixels for this image; rectangles are welcome.

    A tile as wide as the canvas has no halo at its sides. Ties go to the longer last axis (contiguous rows). Where no
    tile that keeps anything fits into ``max_px``, the smallest that does is returned. Choices are remembered.
    """
    return _choose_tile(tuple(image), tuple(sizes), tuple(outputs), max_px, aligned)


@lru_cache(maxsize=REMEMBERED)
def _choose_tile(
    image: tuple[int, ...],
    sizes: tuple[TileSizes, ...],
    outputs: tuple[OutputField, ...],
    max_px: int,
    aligned: bool,
) -> tuple[int, ...]:
    kept = aligned_step if aligned else exact_step
    least = [1 if s.fixed is None else s.fixed for s in sizes]
    options = []  # per axis: (tile, tiles along the axis)
    for k, (n, s) in enumerate(zip(image, sizes, strict=True)):
        fields = [output.field[k] for output in outputs]
        c = canvas(n, s, fields)
        if s.fixed is not None:
            step = max(kept(s.fixed, s.stride, fields), s.stride)
            options.append([(s.fixed, 1 + -(-(c.size - s.fixed) // step))])
            continue
        first = min(smallest_tile(s, fields, aligned=aligned), c.size)
        ahead = lead(s.stride, fields) if aligned else 0
        gain = kept(first, s.stride, fields) - first  # a stride more of tile keeps a stride more
        best = {1: c.size}  # number of tiles -> smallest tile that does with it
        # Longer ones are never within the bound, and a long image has many of them.
        longest = max(first, min(c.size - s.stride, max_px // (prod(least) // least[k])))
        for t in range(longest - (longest - c.size) % s.stride, first - 1, -s.stride):
            if t + gain <= 0:
                break
            count = aligned_count(c, t, t + gain, ahead) if aligned else 1 + -(-(c.size - t) // (t + gain))
            best[count] = min(t, best.get(count, t))
        options.append([(t, count) for count, t in best.items()])
    grids = np.meshgrid(*(np.arange(len(option)) for option in options), indexing="ij")
    tiles = np.stack([np.array([t for t, _ in o])[g] for o, g in zip(options, grids, strict=True)]).reshape(
        len(options), -1
    )
    counts = np.stack([np.array([n for _, n in o])[g] for o, g in zip(options, grids, strict=True)]).reshape(
        tiles.shape
    )
    px, computed = tiles.prod(axis=0), (tiles * counts).prod(axis=0)
    inside = np.flatnonzero(px <= max_px)
    if inside.size:
        # Keys from the last to the first: the fewest pixels, then the longest last axis, then the one before it.
        best = inside[np.lexsort((*(-tiles[:, inside]), computed[inside]))[0]]
    else:
        best = np.lexsort((computed, px))[0]
    return tuple(int(t) for t in tiles[:, best])


def cost_ratio(tile: Sequence[int], sizes: Sequence[TileSizes], outputs: Sequence[OutputField]) -> float | None:
    """Computed over kept pixels of inner tiles; None where the tile keeps nothing."""
    ratio = Fraction(1)
    for k, (t, s) in enumerate(zip(tile, sizes, strict=True)):
        step = exact_step(t, s.stride, [output.field[k] for output in outputs])
        if step <= 0:
            return None
        ratio *= Fraction(t, step)
    return float(ratio)


def square_tile(sizes: Sequence[TileSizes], outputs: Sequence[OutputField], area: int) -> tuple[int, ...]:
    """The accepted tile nearest to a square (cube) of ``area`` pixels that keeps something."""
    side = round(area ** (1 / len(sizes)))
    tile = []
    for k, s in enumerate(sizes):
        smallest = smallest_tile(s, [o.field[k] for o in outputs])
        low, high = max(s.at_most(side), smallest), max(s.at_least(side), smallest)
        tile.append(low if side - low <= high - side else high)
    return tuple(tile)
