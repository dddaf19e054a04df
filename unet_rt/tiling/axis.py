"""Tiles along one axis: canvas, origins, steps and cores, in integers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, lcm

import numpy as np

from ..contract.contract import Border
from ..errors import TileError
from .field import AxisField, OutputField, TileSizes

LONGEST = 1 << 24  # pixels of an image along an axis; the largest slides have 2^18, and float32 counts no further


def per_axis(size: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    """A size along every axis: one number stands for all of them."""
    numbers = tuple(size) if isinstance(size, Iterable) else (size,)
    return numbers * spatial if len(numbers) == 1 else numbers


@dataclass(frozen=True)
class Canvas:
    """The padded image along one axis: ``before`` pixels in front of it, ``size`` pixels in all."""

    image: int
    before: int
    size: int


def canvas(image: int, sizes: TileSizes, fields: Sequence[AxisField], least: int = 0) -> Canvas:
    """The canvas of one axis: the shrink of every output added on both sides, then grown to a size the graph accepts.

    It depends on the image and the graph only, never on the tile: the network on the canvas, cropped to the image, is what
    "the whole-image result" means. Fixed-size graphs need a canvas of at least their size, congruent to it modulo the
    stride. With tiles of two sizes that is the larger one, ``least``, whichever is in use.
    """
    if not 1 <= image <= LONGEST:
        raise TileError(f"an image axis of {image} px cannot be tiled; images have 1 to {LONGEST} px along an axis")
    before = _before(fields)
    need = max(before + ceil((ceil(image * f.scale) + f.shrink[1]) / f.scale) for f in fields)
    need = max(need, before + image, least)
    if sizes.fixed is None:
        size = sizes.at_least(need)
    else:
        size = sizes.fixed + max(0, -(-(need - sizes.fixed) // sizes.stride)) * sizes.stride
    if sizes.exact_up_to is not None and size > sizes.exact_up_to:
        raise TileError(
            f"an image axis of {image} px needs a canvas of {size} px, and above {sizes.exact_up_to} px the network "
            "computes something else, so that tiles would not equal the whole image; predict parts of at most "
            f"{sizes.at_most(sizes.exact_up_to)} px, or export the network without the bound that inspect names"
        )
    return Canvas(image, before, size)


def _before(fields: Sequence[AxisField]) -> int:
    """Pixels of the canvas in front of the image."""
    before = max(0, *(ceil(f.shrink[0] / f.scale) for f in fields))
    return before + -before % lcm(
        *(f.scale.denominator for f in fields)
    )  # the first pixel has to meet an output sample


def exact_step(tile: int, stride: int, fields: Sequence[AxisField]) -> int:
    """Distance of tile origins in pixels: what a tile keeps between its halos, down to the stride; may be <= 0."""
    kept = min((f.out_size(tile) - sum(f.halo)) / f.scale for f in fields)
    return int(kept // stride) * stride


def aligned_step(tile: int, stride: int, fields: Sequence[AxisField]) -> int:
    """Pixels that a tile owns in an aligned grid: what is left of it behind its :func:`lead`, down to the stride."""
    ends = (
        (f.out_size(tile) - f.halo[1] - (_before(fields) * f.scale - f.shrink[0])) / f.scale - lead(stride, fields)
        for f in fields
    )
    return int(min(ends) // stride) * stride


def lead(stride: int, fields: Sequence[AxisField]) -> int:
    """Pixels by which a tile of an aligned grid starts in front of what it owns: a multiple of the stride."""
    behind = max((f.halo[0] - (_before(fields) * f.scale - f.shrink[0])) / f.scale for f in fields)
    return max(0, ceil(behind / stride) * stride)


def covered_px(tile: int, fields: Sequence[AxisField]) -> int:
    """Pixels along one axis that a tile has results for: all of it, but for what unpadded convolutions take away."""
    return int(min(f.out_size(tile) / f.scale for f in fields))


def smallest_tile(sizes: TileSizes, fields: Sequence[AxisField], *, aligned: bool = False) -> int:
    """Smallest accepted tile size along one axis that keeps at least one stride of samples."""
    tile, kept = sizes.at_least(1), aligned_step if aligned else exact_step
    least = kept(tile, sizes.stride, fields)  # a multiple of the stride; each stride more of tile keeps one more
    if sizes.fixed is None and least <= 0:
        tile += sizes.stride - least
    return tile


def smaller_tile(
    tile: Sequence[int], sizes: Sequence[TileSizes], outputs: Sequence[OutputField]
) -> tuple[int, ...] | None:
    """A tile of about half the sides, for memory that does not hold ``tile``; None where the halo leaves no such tile.

    A side is the smallest accepted one that is at least half of the tile's and owns a quarter of itself in an aligned
    grid (others keep no less). One that would be above three quarters of the tile's saves too little, and stays.
    """
    sides = []
    for k, (t, s) in enumerate(zip(tile, sizes, strict=True)):
        fields = [output.field[k] for output in outputs]
        side = s.at_least(-(-t // 2))
        while side < t and 4 * aligned_step(side, s.stride, fields) < side:
            side += s.stride
        sides.append(side if 4 * side <= 3 * t else t)
    return None if sides == list(tile) else tuple(sides)


@dataclass(frozen=True)
class AxisTiles:
    """Tiles along one axis.

    Attributes:
        canvas: The padded image.
        tile: Tile size in pixels.
        starts: Origins in canvas pixels, increasing; multiples of the stride.
        ends: Image pixels where what the tiles own ends at the latest, in aligned grids; else empty: as far as cores reach.
        box: [start, stop) of the image pixels whose results are wanted; None: all.
    """

    canvas: Canvas
    tile: int
    starts: tuple[int, ...]
    ends: tuple[int, ...] = ()
    box: tuple[int, int] | None = None

    @property
    def wanted(self) -> tuple[int, int]:
        """[start, stop) of the image pixels whose results are wanted."""
        return (0, self.canvas.image) if self.box is None else self.box

    def samples(self, field: AxisField) -> tuple[int, int]:
        """[start, stop) of the wanted samples in the image's output."""
        start, stop = self.wanted
        return ceil(start * field.scale), ceil(stop * field.scale)

    def owned(self, field: AxisField) -> list[tuple[int, int, int]]:
        """Per tile (first sample in the tile's output, first sample in the wanted output, number of samples).

        The wanted samples are covered once each; the number is 0 for tiles that own none of them.
        """
        first = int(self.canvas.before * field.scale - field.shrink[0])  # image sample 0 in the canvas's output
        begin, stop = (first + sample for sample in self.samples(field))
        size = field.out_size(self.tile)
        end = begin
        owned = []
        for k, start in enumerate(self.starts):
            origin = int(start * field.scale)
            lo = max(origin + (field.halo[0] if start else 0), end)  # at the canvas's edges there is no halo
            hi = min(origin + size - (field.halo[1] if start + self.tile < self.canvas.size else 0), stop)
            if self.ends:
                hi = min(hi, first + ceil(self.ends[k] * field.scale))
            if lo > end and hi > lo:
                raise TileError(
                    f"tile {self.tile} px leaves samples {end - first} to {lo - first} uncovered; use a larger tile"
                )
            count = max(0, hi - lo)
            owned.append((lo - origin, lo - begin, count))
            end = max(end, lo + count)
        return owned

    def covered(self, field: AxisField) -> list[tuple[int, int, int]]:
        """As :meth:`owned`, but all that a tile holds of the wanted samples, for blending."""
        first = int(self.canvas.before * field.scale - field.shrink[0])
        begin, end = (first + sample for sample in self.samples(field))
        size = field.out_size(self.tile)
        covered = []
        for start in self.starts:
            origin = int(start * field.scale)
            lo, hi = max(origin, begin), min(origin + size, end)
            covered.append((lo - origin, lo - begin, max(0, hi - lo)))
        return covered

    def part(self, start: int, stop: int, fields: Sequence[AxisField], *, blended: bool) -> AxisTiles:
        """The tiles that hold results for the image pixels [start, stop): those that own some, or all that cover some."""
        # Two tiles away nothing of a tile is wanted, whatever halos and shrinks are: only few tiles are looked at.
        near = slice(
            bisect_left(self.starts, start - 2 * self.tile),
            bisect_right(self.starts, stop + self.canvas.before + 2 * self.tile),
        )
        boxed = replace(self, starts=self.starts[near], ends=self.ends[near], box=(start, stop))
        held = [boxed.covered(f) if blended else boxed.owned(f) for f in fields]
        kept = [k for k in range(len(boxed.starts)) if any(table[k][2] for table in held)]
        return replace(
            boxed, starts=tuple(boxed.starts[k] for k in kept), ends=tuple(boxed.ends[k] for k in kept if self.ends)
        )


def _last_start(canvas: Canvas, tile: int, stride: int) -> int:
    """Where the last tile begins, which ends with the canvas. TileError where it would be out of phase with the first."""
    last = canvas.size - tile
    if last % stride:
        raise TileError(
            f"tile {tile} px and canvas {canvas.size} px differ by {last} px, not a multiple of stride {stride}"
        )
    return last


def axis_tiles(canvas: Canvas, tile: int, step: int, stride: int, *, evenly: bool = False) -> AxisTiles:
    """Tiles along an axis, one every ``step`` pixels, the last moved back to end with the canvas."""
    last = _last_start(canvas, tile, stride)
    starts = sorted({min(start, last) for start in range(0, last + step, step)})
    if evenly and len(starts) > 2:
        # As many tiles, their overlaps alike: nearest multiples of the stride, never above step.
        gaps, strides = len(starts) - 1, last // stride
        starts = [(2 * k * strides + gaps) // (2 * gaps) * stride for k in range(len(starts))]
    return AxisTiles(canvas, tile, tuple(starts))


def aligned_tiles(canvas: Canvas, tile: int, share: int, stride: int, fields: Sequence[AxisField]) -> AxisTiles:
    """Tiles along an axis that own equal stretches of ``share`` pixels of the image each."""
    last = _last_start(canvas, tile, stride)
    ahead = lead(stride, fields)
    count = aligned_count(canvas, tile, share, ahead)
    starts = [min(max(0, k * share - ahead), last) for k in range(count)]
    ends = [*(k * share for k in range(1, count)), canvas.image]
    return AxisTiles(canvas, tile, tuple(starts), tuple(ends))


def aligned_count(canvas: Canvas, tile: int, share: int, ahead: int) -> int:
    """Tiles of an aligned grid: up to the first one that ends with the canvas, or owns the image's last pixel."""
    if tile == canvas.size:
        return 1
    return min(-(-canvas.image // share), 1 + -(-(canvas.size - tile + ahead) // share))


def border_window(start: int, stop: int, size: int, border: Border) -> tuple[int, int]:
    """[first, last + 1) of the image pixels that ``[start, stop)`` needs when the border rule fills what lies outside.

    Empty (0, 0) where a constant or zero border needs none.
    """
    if start >= 0 and stop <= size:
        return start, stop
    if border in ("constant", "zero"):
        return min(max(start, 0), size), max(min(stop, size), min(max(start, 0), size))
    index = np.arange(start, stop)
    if border == "edge" or size == 1:
        index = np.clip(index, 0, size - 1)
    else:
        period = 2 * (size - 1)
        index = np.abs(index) % period
        index = np.minimum(index, period - index)
    return int(index.min()), int(index.max()) + 1
