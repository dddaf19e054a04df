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
from functools import cached_property
from math import ceil, lcm, prod

import numpy as np
import numpy.typing as npt

from .contract.contract import Border
from .errors import TileError, size_text
from .field import AxisField, OutputField, TileSizes

Ints = npt.NDArray[np.int64]


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
    if image < 1:
        raise TileError(f"an image axis of {image} px cannot be tiled; it needs at least 1 px")
    before = _before(fields)
    need = max(before + ceil((ceil(image * f.scale) + f.shrink[1]) / f.scale) for f in fields)
    need = max(need, before + image, least)
    if sizes.fixed is None:
        size = sizes.at_least(need)
    else:
        size = sizes.fixed + max(0, -(-(need - sizes.fixed) // sizes.stride)) * sizes.stride
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
    if sizes.fixed is None:
        while kept(tile, sizes.stride, fields) <= 0:
            tile += sizes.stride
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
        boxed = replace(self, box=(start, stop))
        held = [boxed.covered(f) if blended else boxed.owned(f) for f in fields]
        kept = [k for k in range(len(self.starts)) if any(table[k][2] for table in held)]
        return replace(
            boxed, starts=tuple(self.starts[k] for k in kept), ends=tuple(self.ends[k] for k in kept if self.ends)
        )


def _last_start(canvas: Canvas, tile: int, stride: int) -> int:
    """Where the last tile begins, which ends with the canvas. TileError where it would be out of phase with the first."""
    last = canvas.size - tile
    if last % stride:
        raise TileError(
            f"tile {tile} px and canvas {canvas.size} px differ by {last} px, not a multiple of stride {stride}"
        )
    return last


def _axis_tiles(canvas: Canvas, tile: int, step: int, stride: int, *, evenly: bool = False) -> AxisTiles:
    last = _last_start(canvas, tile, stride)
    starts = sorted({min(start, last) for start in range(0, last + step, step)})
    if evenly and len(starts) > 2:
        # As many tiles, their overlaps alike: nearest multiples of the stride, never above step.
        gaps, strides = len(starts) - 1, last // stride
        starts = [(2 * k * strides + gaps) // (2 * gaps) * stride for k in range(len(starts))]
    return AxisTiles(canvas, tile, tuple(starts))


def _aligned_tiles(canvas: Canvas, tile: int, share: int, stride: int, fields: Sequence[AxisField]) -> AxisTiles:
    last = _last_start(canvas, tile, stride)
    count = _aligned_count(canvas, tile, share, lead(stride, fields))
    starts = [min(max(0, k * share - lead(stride, fields)), last) for k in range(count)]
    ends = [*(k * share for k in range(1, count)), canvas.image]
    return AxisTiles(canvas, tile, tuple(starts), tuple(ends))


def _aligned_count(canvas: Canvas, tile: int, share: int, ahead: int) -> int:
    """Tiles of an aligned grid: up to the first one that ends with the canvas, or owns the image's last pixel."""
    if tile == canvas.size:
        return 1
    return min(-(-canvas.image // share), 1 + -(-(canvas.size - tile + ahead) // share))


@dataclass(frozen=True)
class Placement:
    """Where the kept samples of some tiles come from and go to, for one output: int64 (tiles, axes)."""

    source: Ints
    target: Ints
    size: Ints


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
) -> TileGrid:
    """The tiles of an image.

    Args:
        image: Spatial shape in pixels.
        tile: Tile size in pixels per axis. Larger than the canvas: taken down to it.
        sizes: Accepted sizes per axis.
        outputs: What the outputs depend on, halos as they are to be used.
        overlap: Pixels shared by neighbouring tiles at least, per axis, for tiles that are blended (they are spread
            evenly). None: exact tiles, whose overlap follows from the halo.
        aligned: Exact tiles own equal stretches of the image (the last ones less).
        least: Pixels per axis that the canvas has at least; None: as many as the image takes.

    Raises:
        TileError: A tile that the graph does not accept or that keeps nothing; an overlap outside [0, tile).
    """
    if not len(image) == len(tile) == len(sizes):
        raise TileError(
            f"image {size_text(image)} and tile {size_text(tile)} do not both have the network's {len(sizes)} spatial axes"
        )
    axes = []
    for k, (n, t, s) in enumerate(zip(image, tile, sizes, strict=True)):
        fields = [output.field[k] for output in outputs]
        c = canvas(n, s, fields, 0 if least is None else least[k])
        if not s.accepts(t):
            raise TileError(_not_accepted(t, s))
        t = min(t, c.size)
        if overlap is not None:
            if not 0 <= overlap[k] < t:
                if t < tile[k] and 0 <= overlap[k] < tile[k]:
                    axes.append(AxisTiles(c, t, (0,)))  # the whole canvas is one tile: nothing to overlap
                    continue
                raise TileError(
                    f"overlap {overlap[k]} px is outside 0 to {tile[k] - 1} px, the tile being {tile[k]} px"
                )
            step = max(s.stride, (t - overlap[k]) // s.stride * s.stride)
            covered = covered_px(t, fields)
            if step > covered and t < c.size:
                raise TileError(
                    f"tiles of {t} px give results for {covered} px each and would lie {step} px apart, with gaps between; "
                    f"use an overlap of {t - covered} px or more"
                )
        else:
            share = aligned_step(t, s.stride, fields) if aligned else exact_step(t, s.stride, fields)
            if share <= 0:
                if t < c.size:
                    halo = max((sum(f.halo) for f in fields), default=0)
                    hint = (
                        "build again with --halo measured"
                        if s.fixed
                        else f"use {smallest_tile(s, fields, aligned=aligned)} px or more"
                    )
                    raise TileError(f"a tile of {t} px keeps nothing: its halo takes {halo} samples; {hint}")
                share = s.stride
            if aligned:
                axes.append(_aligned_tiles(c, t, share, s.stride, fields))
                continue
            step = share
        axes.append(_axis_tiles(c, t, step, s.stride, evenly=overlap is not None))
    grid = TileGrid(tuple(axes), tuple(outputs), blended=overlap is not None)
    if least is None:
        return grid
    return grid.part((0,) * len(image), image)  # whole tiles may lie behind the image, where nothing is wanted


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
    tile that keeps anything fits into ``max_px``, the smallest that does is returned.
    """
    kept = aligned_step if aligned else exact_step
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
        for t in range(c.size - s.stride, first - 1, -s.stride):
            if t + gain <= 0:
                break
            count = _aligned_count(c, t, t + gain, ahead) if aligned else 1 + -(-(c.size - t) // (t + gain))
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


def border_window(start: int, stop: int, size: int, border: Border) -> tuple[int, int]:
    """[first, last + 1) of the image pixels that ``[start, stop)`` needs when the border rule fills what lies outside.

    Empty (0, 0) where a constant border needs none.
    """
    if start >= 0 and stop <= size:
        return start, stop
    if border == "constant":
        return min(max(start, 0), size), max(min(stop, size), min(max(start, 0), size))
    index = np.arange(start, stop)
    if border == "edge" or size == 1:
        index = np.clip(index, 0, size - 1)
    else:
        period = 2 * (size - 1)
        index = np.abs(index) % period
        index = np.minimum(index, period - index)
    return int(index.min()), int(index.max()) + 1
