"""How a result is cut into blocks that tiles fill. Integers only, never pixels.

A block is a rectangle of the image: the unit of work, of what is written at once, and of what an interrupted run keeps.
Blocks are disjoint, end where what a tile owns ends (of an aligned grid, so that no tile is run for two of them), and hold
whole chunks of the stored result, so that no two writers share one. A plane that is computed in one go is one block.

Worked example (one axis): image 100,000 px, tile 2048, halo 94, stride 16. A tile owns 2048 - 96 - 94 px, rounded down to
1856. Chunks of 928 px (half of it, at most 1024), blocks of several tiles, say 8: block k is [14848 k, 14848 (k + 1)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import ceil, prod
from typing import Any

import numpy as np

from ..engine.spec import EngineSpec
from ..errors import ContractError, TileError, size_text
from ..tiling.axis import AxisTiles
from ..tiling.decision import Decision
from ..tiling.grid import TileGrid
from ..tiling.resample import input_span

LARGE_PX = 2**26  # from 8192 x 8192 on a file is made in blocks: half a minute of a small network is worth keeping
TILES = 16  # per block: a block is some seconds of work, and one writing to disk
CHUNK = 1024  # longest side of a chunk in samples: 1 MiB of a mask

# What of the memory goes where: running a batch of tiles, and blocks on their way (window, band, block, packed block).
RUNNING_SHARE, BLOCK_SHARE = 0.5, 0.25


@dataclass(frozen=True)
class Block:
    """One unit of work: the pixels [start, stop) of a plane."""

    number: int
    plane: int
    start: tuple[int, ...]
    stop: tuple[int, ...]


@dataclass(frozen=True)
class BlockPlan:
    """All blocks of an image, numbered plane by plane in row-major order.

    Attributes:
        image: Spatial shape of the image in pixels.
        grid: The tiles of the whole image; of the resampled one where the network sees another number of pixels.
        planes: Planes of the image.
        cuts: Per axis: image pixels where blocks begin, ascending, and the image's end.
        chunk: Per axis: samples of a stored chunk.
        whole: Every plane is one block, in one go: its tiles are those of the grid, which need not be aligned.
    """

    image: tuple[int, ...]
    grid: TileGrid
    planes: int
    cuts: tuple[tuple[int, ...], ...]
    chunk: tuple[int, ...]
    whole: bool = False

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Blocks per axis."""
        return tuple(len(cuts) - 1 for cuts in self.cuts)

    def __len__(self) -> int:
        return self.planes * prod(self.shape)

    def block(self, number: int) -> Block:
        plane, place = divmod(number, prod(self.shape))
        index = [int(k) for k in np.unravel_index(place, self.shape)]
        start = tuple(cuts[k] for k, cuts in zip(index, self.cuts, strict=True))
        return Block(number, plane, start, tuple(cuts[k + 1] for k, cuts in zip(index, self.cuts, strict=True)))

    def seen(self, start: Sequence[int], stop: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The pixels [start, stop) as the network sees them: of the resampled image, with those that interpolation takes."""
        sides = zip(start, stop, self.grid.image, self.image, strict=True)
        ends = [(a, b) if n == m else input_span(a, b, n, m) for a, b, n, m in sides]
        return tuple(a for a, _ in ends), tuple(b for _, b in ends)

    @cached_property
    def _counts(self) -> list[list[int]]:
        """Per axis: tiles along it for each stretch between cuts."""
        counts = []
        for k, cuts in enumerate(self.cuts):
            fields = [o.field[k] for o in self.grid.outputs]
            n, m = self.grid.image[k], self.image[k]
            ends = [(a, b) if n == m else input_span(a, b, n, m) for a, b in pairwise(cuts)]
            parts = [self.grid.axes[k].part(a, b, fields, blended=self.grid.blended) for a, b in ends]
            counts.append([len(part.starts) for part in parts])
        return counts

    def tiles(self, number: int) -> int:
        """Tiles that a block takes."""
        if self.whole:
            return self.grid.count
        index = np.unravel_index(number % prod(self.shape), self.shape)
        return prod(counts[int(k)] for counts, k in zip(self._counts, index, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Enough to make the same plan again with :func:`plan_of`."""
        return {"tile": list(self.grid.tile), "cuts": [list(cuts) for cuts in self.cuts], "chunk": list(self.chunk)}


def plan_of(
    spec: EngineSpec, image: Sequence[int], planes: int, data: Mapping[str, Any], *, seen: Sequence[int] | None = None
) -> BlockPlan:
    """The plan that :meth:`BlockPlan.to_json` described."""
    grid = spec.grid(image if seen is None else seen, data["tile"], aligned=True)
    return BlockPlan(tuple(image), grid, planes, tuple(tuple(cuts) for cuts in data["cuts"]), tuple(data["chunk"]))


def whole_planes(image: Sequence[int], planes: int, grid: TileGrid) -> BlockPlan:
    """The plan of an image that is computed plane by plane, each in one go."""
    return BlockPlan(tuple(image), grid, planes, tuple((0, n) for n in image), tuple(image), whole=True)


@dataclass(frozen=True)
class Picture:
    """An image in numbers.

    Attributes:
        shape: Spatial shape in pixels.
        planes: Planes of the image.
        pixel_bytes: Of one pixel, all of the network's channels.
        seen: Spatial shape that the network sees, where the image is resampled.
    """

    shape: tuple[int, ...]
    planes: int
    pixel_bytes: int
    seen: tuple[int, ...] | None = None


def plan_blocks(
    spec: EngineSpec,
    picture: Picture,
    decision: Decision,
    *,
    memory_bytes: int,
    tile: Sequence[int] | None = None,
    batch: int = 1,
    output: int = 0,
) -> BlockPlan:
    """Plans the blocks of an image.

    Args:
        spec: Of the engine.
        picture: The image.
        decision: What is stored of output ``output``.
        memory_bytes: What all of it may take beside the loaded engine.
        tile: Tile size; None: the rectangle that computes least for this image in that memory.
        batch: Tiles per run.
        output: Which output of the graph.

    Raises:
        TileError: The tile does not serve.
        ContractError: The memory does not suffice for the smallest tile.
    """
    image, fields = picture.shape, spec.used_outputs()[output]
    scale = float(prod(f.scale for f in fields.field))
    floats = 4 * (spec.channels + fields.channels * scale)  # bytes per tile pixel of inputs and outputs
    per_px = batch * (max(spec.bytes_per_px, floats) + 6 * floats)  # while it runs, and for tiles that wait
    bound = int(RUNNING_SHARE * memory_bytes / per_px)
    grid = spec.grid(picture.seen or image, tile, min(bound, prod(spec.tile)) if spec.exact else None, aligned=True)
    if prod(grid.tile) > bound and tile is None:
        grid = spec.smaller_grid(grid, aligned=True) or grid  # a plan's, which is of no size between
    if prod(grid.tile) > bound:
        raise ContractError(
            f"tiles of {size_text(grid.tile)} px, {batch} at a time, take about "
            f"{ceil(prod(grid.tile) * per_px / RUNNING_SHARE / 1e6)} MB, and {max(0, memory_bytes) // 10**6} MB are there; "
            "use more --memory, a smaller --batch or a smaller --tile"
        )
    if picture.seen is not None:
        return _resampled_plan(image, grid, picture.planes, floats, BLOCK_SHARE * memory_bytes)
    stored = decision.dtype.itemsize * max(1, decision.channels) * scale
    shares = [_share(spec, k, axis) for k, axis in enumerate(grid.axes)]
    counts = _tiles_of_block(picture, grid, shares, stored, BLOCK_SHARE * memory_bytes)
    sides = [share * count for share, count in zip(shares, counts, strict=True)]
    cuts = tuple(_cuts(axis, side) for axis, side in zip(grid.axes, sides, strict=True))
    samples = zip(shares, fields.field, grid.out_shape(output), strict=True)
    return BlockPlan(image, grid, picture.planes, cuts, tuple(_chunk(share * f.scale, n) for share, f, n in samples))


def _tiles_of_block(
    picture: Picture, grid: TileGrid, shares: Sequence[int], stored: float, memory_bytes: float
) -> list[int]:
    """Tiles along each axis of a block: long rows, which files like.

    ``shares``: pixels that a tile adds along each axis; ``stored``: bytes of the result per pixel.
    """
    image, counts = picture.shape, [1] * len(shares)
    for k in reversed(range(len(shares))):
        whole = -(-image[k] // shares[k])

        def fits(count: int, k: int = k) -> bool:
            tiles = [*counts[:k], count, *counts[k + 1 :]]
            sides = [min(n, c * s) for n, c, s in zip(image, tiles, shares, strict=True)]
            window = prod(side + t for side, t in zip(sides, grid.tile, strict=True)) * picture.pixel_bytes
            return 2 * window + 4 * prod(sides) * stored <= memory_bytes

        most = max(1, min(whole, TILES // prod(counts)))
        counts[k] = next((count for count in range(most, 1, -1) if fits(count)), 1)
        if counts[k] < whole:
            break
    return counts


def _resampled_plan(image: Sequence[int], grid: TileGrid, planes: int, floats: float, memory_bytes: float) -> BlockPlan:
    """Blocks of whole chunks, about as large as four tiles: neighbours run the tiles between them twice.

    ``floats``: bytes of a sample's inputs and outputs; a block is held about four times while it is resampled.
    """
    chunk = round(CHUNK ** (2 / len(image)))
    sides = [max(1, round(2 * t * n / m / chunk)) * chunk for t, n, m in zip(grid.tile, image, grid.image, strict=True)]
    while 4 * floats * prod(min(s, n) for s, n in zip(sides, image, strict=True)) > memory_bytes and max(sides) > chunk:
        longest = sides.index(max(sides))
        sides[longest] = max(chunk, sides[longest] // 2 // chunk * chunk)
    cuts = tuple((*range(0, n, side), n) for n, side in zip(image, sides, strict=True))
    return BlockPlan(tuple(image), grid, planes, cuts, tuple(min(n, chunk) for n in image))


def _share(spec: EngineSpec, k: int, axis: AxisTiles) -> int:
    """Pixels that a tile adds along an axis: blocks are multiples of it."""
    if len(axis.starts) == 1:
        return axis.canvas.image
    if spec.overlap is not None:
        stride = spec.sizes[k].stride
        return min(axis.canvas.image, max(stride, (axis.tile - spec.overlap[k]) // stride * stride))
    return axis.ends[0]


def _cuts(axis: AxisTiles, block: int) -> tuple[int, ...]:
    """Where blocks begin; the last tile owns all that is left, so no block begins inside of that."""
    image = axis.canvas.image
    last = axis.ends[-2] if len(axis.ends) > 1 else 0 if axis.ends else image - 1
    return (*(start for start in range(0, image, block) if start <= last), image)


def _chunk(share: Fraction, samples: int) -> int:
    """Samples of a chunk: what a tile adds, halved until it is at most ``CHUNK``; that of a single tile is free."""
    if share >= samples:
        return min(samples, CHUNK)
    if share.denominator != 1:
        raise TileError(f"a tile adds {share} samples, which is no whole number of them; use another tile")
    chunk = int(share)
    while chunk > CHUNK and chunk % 2 == 0:
        chunk //= 2
    return chunk
