"""Which blocks a large result is computed in. Integers only, never pixels.

A block is a rectangle of the image: the unit of work, of what is written at once, and of what an interrupted run keeps.
Blocks are disjoint, end where what a tile owns ends (of an aligned grid, so that no tile is run for two of them), and hold
whole chunks of the stored result, so that no two writers share one.

Worked example (one axis): image 100,000 px, tile 2048, halo 94, stride 16. A tile owns 2048 - 96 - 94 px, rounded down to
1856. Chunks of 928 px (half of it, at most 1024), blocks of several tiles, say 8: block k is [14848 k, 14848 (k + 1)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from itertools import pairwise
from math import ceil, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract.contract import Contract
from ..engine.engine import Engine
from ..engine.spec import EngineSpec
from ..errors import ContractError, TileError, size_text
from ..images.normalize import Affine, Affines, OnePlane, affine
from ..images.open import open_image
from ..images.source import Source
from ..outputs.shape import nodata_value
from ..system import limits
from ..tiling.axis import AxisTiles
from ..tiling.decision import Decision, decide
from ..tiling.grid import TileGrid
from ..tiling.resample import needed, resample, resampled_shape
from .request import Request
from .stage import Stage
from .work import filled

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
    """

    image: tuple[int, ...]
    grid: TileGrid
    planes: int
    cuts: tuple[tuple[int, ...], ...]
    chunk: tuple[int, ...]

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
        ends = [(a, b) if n == m else needed(a, b, n, m) for a, b, n, m in sides]
        return tuple(a for a, _ in ends), tuple(b for _, b in ends)

    @cached_property
    def _counts(self) -> list[list[int]]:
        """Per axis: tiles along it for each stretch between cuts."""
        counts = []
        for k, cuts in enumerate(self.cuts):
            fields = [o.field[k] for o in self.grid.outputs]
            n, m = self.grid.image[k], self.image[k]
            ends = [(a, b) if n == m else needed(a, b, n, m) for a, b in pairwise(cuts)]
            parts = [self.grid.axes[k].part(a, b, fields, blended=self.grid.blended) for a, b in ends]
            counts.append([len(part.starts) for part in parts])
        return counts

    def tiles(self, number: int) -> int:
        """Tiles that a block takes."""
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


def plan_blocks(
    spec: EngineSpec,
    image: Sequence[int],
    planes: int,
    decision: Decision,
    *,
    pixel_bytes: int,
    memory_bytes: int,
    tile: Sequence[int] | None = None,
    batch: int = 1,
    output: int = 0,
    seen: Sequence[int] | None = None,
) -> BlockPlan:
    """Plans the blocks of an image.

    Args:
        spec: Of the engine.
        image: Spatial shape in pixels.
        planes: Planes of the image.
        decision: What is stored of output ``output``.
        pixel_bytes: Of one pixel of the image, all of the network's channels.
        memory_bytes: What all of it may take beside the loaded engine.
        tile: Tile size; None: the rectangle that computes least for this image in that memory.
        batch: Tiles per run.
        output: Which output of the graph.
        seen: Spatial shape that the network sees, where the image is resampled.

    Raises:
        TileError: The tile does not serve.
        ContractError: The memory does not suffice for the smallest tile.
    """
    fields = spec.used_outputs()[output]
    scale = float(prod(f.scale for f in fields.field))
    floats = 4 * (spec.channels + fields.channels * scale)  # bytes per tile pixel of inputs and outputs
    per_px = batch * (max(spec.bytes_per_px, floats) + 6 * floats)  # while it runs, and for tiles that wait
    bound = int(RUNNING_SHARE * memory_bytes / per_px)
    given = image if seen is None else seen
    grid = spec.grid(given, tile, min(bound, prod(spec.tile)) if spec.exact else None, aligned=True)
    if prod(grid.tile) > bound and tile is None:
        grid = spec.smaller_grid(grid, aligned=True) or grid  # a plan's, which is of no size between
    if prod(grid.tile) > bound:
        raise ContractError(
            f"tiles of {size_text(grid.tile)} px, {batch} at a time, take about "
            f"{ceil(prod(grid.tile) * per_px / RUNNING_SHARE / 1e6)} MB, and {max(0, memory_bytes) // 10**6} MB are there; "
            "use more --memory, a smaller --batch or a smaller --tile"
        )
    if seen is not None:
        return _resampled_plan(image, grid, planes, floats, BLOCK_SHARE * memory_bytes)
    stored = decision.dtype.itemsize * max(1, decision.channels) * scale
    shares = [_share(spec, k, axis) for k, axis in enumerate(grid.axes)]
    counts = [1] * len(shares)  # tiles along each axis of a block: long rows, which files like
    for k in reversed(range(len(shares))):
        whole = -(-image[k] // shares[k])

        def fits(count: int, k: int = k) -> bool:
            tiles = [*counts[:k], count, *counts[k + 1 :]]
            sides = [min(n, c * s) for n, c, s in zip(image, tiles, shares, strict=True)]
            window = prod(side + t for side, t in zip(sides, grid.tile, strict=True)) * pixel_bytes
            return 2 * window + 4 * prod(sides) * stored <= BLOCK_SHARE * memory_bytes

        most = max(1, min(whole, TILES // prod(counts)))
        counts[k] = next((count for count in range(most, 1, -1) if fits(count)), 1)
        if counts[k] < whole:
            break
    blocks = [share * count for share, count in zip(shares, counts, strict=True)]
    cuts = tuple(_cuts(axis, block) for axis, block in zip(grid.axes, blocks, strict=True))
    samples = zip(shares, fields.field, grid.out_shape(output), strict=True)
    return BlockPlan(tuple(image), grid, planes, cuts, tuple(_chunk(share * f.scale, n) for share, f, n in samples))


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


Array = npt.NDArray[Any]


class Resampled(Source):
    """An image brought to another number of pixels while it is read; its pixels are float32."""

    def __init__(self, source: Source, shape: tuple[int, ...], affines: Affines | OnePlane) -> None:
        self.__dict__.update(vars(source))
        self._inner, self._affines = source, affines
        self.shape = shape
        self.dtype = np.dtype(np.float32)

    def read(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        if any(a == b for a, b in zip(start, stop, strict=True)):  # of tiles that lie outside, with a constant border
            return np.empty((self.channels, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
        shapes = self._inner.shape, self.shape
        ends = [needed(a, b, n, m) for a, b, n, m in zip(start, stop, *shapes, strict=True)]
        first = tuple(a for a, _ in ends)
        last = tuple(b for _, b in ends)
        window = filled(*self._inner.read_valid(plane, first, last), self._affines.plane(plane))
        return resample(window, first, start, stop, *shapes)

    def valid(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> None:
        """Not asked of resampled pixels: those without data are filled before."""

    def read_valid(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> tuple[Array, None]:
        return self.read(plane, start, stop), None


@dataclass(frozen=True)
class Prepared:
    """A result that can be computed, block by block, in this process.

    Attributes:
        engine: Runs tiles.
        image: The image as it is stored.
        seen: The image as the network sees it: the same, or ``Resampled``.
        plan: The blocks.
        decision: What is stored.
        first: What the pipeline decides where the image is resampled: probabilities or values; else ``decision``.
        affines: The image's normalisation in numbers.
        region: Where predictions are wanted: other than 0; None: everywhere.
        nodata: Value of results where the image holds no data.
        batch, threads: Tiles per run; threads of the kernels.
        fixed_tile: The tile was asked for: it stays, even where a GPU's memory does not hold it.
    """

    engine: Engine
    image: Source
    seen: Source
    plan: BlockPlan
    decision: Decision
    first: Decision
    affines: Affines | OnePlane
    region: Source | None = None
    nodata: float = 0.0
    batch: int = 1
    threads: int = 0
    fixed_tile: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape of the result."""
        return self.samples(self.plan.image)

    @property
    def cuts(self) -> list[list[int]]:
        """Per axis: samples of the result where blocks begin, and its end."""
        axes = len(self.plan.cuts)
        return [[self.samples([cut] * axes)[k] for cut in cuts] for k, cuts in enumerate(self.plan.cuts)]

    def place(self, block: Block) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """[start, stop) of a block in samples of the result."""
        return self.samples(block.start), self.samples(block.stop)

    def samples(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """The first samples at these pixels (or ends of them)."""
        if self.seen is not self.image:
            return tuple(pixels)
        return tuple(ceil(n * f.scale) for n, f in zip(pixels, self.plan.grid.outputs[0].field, strict=True))


FREE_SHARE = 0.5  # of the memory that is free, where no bound is given


def prepare(engine: Engine, source: Source, asked: Request, stage: Stage | None = None) -> Prepared:
    """The result that is asked for, ready to be computed.

    Args:
        engine: The engine.
        source: The image, open as long as the result is worked on.
        asked: What is asked for.
        stage: Of a run that was begun: its plan and numbers are taken; None: they are made.
    """
    from .device import free_bytes

    spec = engine.spec
    channels = spec.outputs[0].channels
    kind: Any = "mask" if asked.output == "instances" else asked.output
    decision = first = decide(spec.contract, channels, kind, asked.mask_values)
    shape = None
    if asked.resample:
        shape = _resampled(engine, source, asked)
        if kind == "mask":
            first = decide(spec.contract, channels, "probability")
            settled = replace(spec.contract, output_is="probabilities")
            decision = decide(settled, channels, "mask", asked.mask_values)
    affines: Affines | OnePlane
    if stage is None:
        affines = affine(asked.normalization, source)
    elif stage.run["numbers"] is not None:
        affines = OnePlane(_affine(stage.run["numbers"]))
    else:
        affines = affine(asked.normalization, source, partial(_kept, stage))
    seen = source if shape is None else Resampled(source, shape, affines)
    if stage is not None:
        plan = plan_of(spec, source.shape, source.planes, stage.run["plan"], seen=shape)
    else:
        free, given = limits.memory_bytes(), asked.memory_bytes
        on_device = free_bytes(engine)
        if on_device is not None and not spec.tiles:  # a plan's tiles are not sized, but tried
            free = min(free, on_device)
        plan = plan_blocks(
            spec,
            source.shape,
            source.planes,
            decision,
            pixel_bytes=source.channels * source.dtype.itemsize,
            memory_bytes=(int(FREE_SHARE * free) if given is None else given - limits.rss_bytes()) // asked.processes,
            tile=asked.tile,
            batch=asked.batch,
            seen=shape,
        )
    region = None if asked.region is None else _region(asked.region, source)
    nodata = nodata_value(decision.dtype, decision.values)
    return Prepared(
        engine, source, seen, plan, decision, first, affines, region, nodata, asked.batch, asked.threads,
        fixed_tile=asked.tile is not None,
    )  # fmt: skip


def _resampled(engine: Engine, source: Source, asked: Request) -> tuple[int, ...]:
    wanted = engine.spec.contract.pixel_size_um
    if not wanted:
        raise ContractError("--resample needs the pixel size of training; build the engine with --pixel-size")
    if not asked.pixel_size_um:
        raise ContractError(f"{source.name} does not say its pixel size; give it with --pixel-size, in micrometres")
    if any(f.scale != 1 for f in engine.spec.outputs[0].field):
        raise ContractError(
            "--resample needs a network whose output has as many samples as its input; resample yourself"
        )
    return resampled_shape(source.shape, asked.pixel_size_um, wanted)


def _region(path: str, source: Source) -> Source:
    region = open_image(path, Contract(), spatial=len(source.shape))
    if region.shape != source.shape or region.planes not in (1, source.planes):
        shape = size_text(region.shape)
        region.close()
        raise ContractError(
            f"{path}: the region has {region.planes} planes of {shape} px, and {source.name} {source.planes} of "
            f"{size_text(source.shape)}; draw it on the image"
        )
    return region


def numbers(affines: Affines | OnePlane) -> dict[str, Any] | None:
    """One plane's numbers where they are those of all planes."""
    if isinstance(affines, Affines) and not affines.same:
        return None
    return _json(affines.plane(0))


def _kept(stage: Stage, plane: int, measure: Callable[[], Affine]) -> Affine:
    """A plane's numbers from the stage, measured where nobody has done so yet."""
    return _affine(stage.kept(f"{plane:08d}", lambda: _json(measure())))


def _json(one: Affine) -> dict[str, Any]:
    """Float32 numbers as JSON has them: they come back the same bits."""
    return {"offset": one.offset.tolist(), "divisor": one.divisor.tolist(), "clip": one.clip}


def _affine(data: dict[str, Any]) -> Affine:
    clip = None if data["clip"] is None else (float(data["clip"][0]), float(data["clip"][1]))
    return Affine(np.array(data["offset"], np.float32), np.array(data["divisor"], np.float32), clip)


def close(made: Prepared) -> None:
    if made.region is not None:
        made.region.close()
