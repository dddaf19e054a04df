"""What a result is computed from and in: blocks, tiles, the decision, the numbers of the normalisation; made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod
from typing import Any

import numpy as np

from ..contract.contract import Contract, Normalization
from ..engine.engine import Engine
from ..engine.spec import EngineSpec
from ..errors import ContractError, size_text
from ..images.normalize import Affines, OnePlane, affine, statistics_text
from ..images.pixels import CACHE_BYTES
from ..images.reading import Reading
from ..images.source import Source
from ..kernels.memory import DeviceArray
from ..kernels.request import Affine
from ..outputs.shape import nodata_value
from ..system import limits
from ..tiling.decision import Decision, decide
from ..tiling.grid import TileGrid
from ..tiling.resample import resampled_shape
from .blocks import Block, BlockPlan, Picture, plan_blocks, plan_of, whole_planes
from .request import DECODING, Request, decision_of, in_blocks
from .resampled import Resampled
from .work import Computation

FREE_SHARE = 0.5  # of the memory that is free, where no bound is given
CACHE_SHARE = 0.2  # of the memory of a result that is made in blocks, for decoded pieces of the image
LEAST_MEMORY = 2**25  # below this, tiles would be of a few pixels
MEMORY_SHARE = 0.35  # of the memory that is free, for running one batch of tiles of a result made in one go


@dataclass(frozen=True)
class Plan:
    """A result that can be computed, block by block, in this process.

    Attributes:
        engine: Runs tiles.
        image: The image as it is stored.
        seen: The image as the network sees it: the same, or ``Resampled``.
        blocks: The blocks, and the tiles that fill them.
        output: Which output of the graph.
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
    blocks: BlockPlan
    output: int
    decision: Decision
    first: Decision
    affines: Affines | OnePlane
    region: Source | None = None
    nodata: float = 0.0
    batch: int = 1
    threads: int = 0
    fixed_tile: bool = False

    @property
    def contract(self) -> Contract:
        """That of the output."""
        return self.engine.spec.contract_of(self.output)

    @property
    def plain(self) -> bool:
        """Whether the bands of a block are its result as they are: nothing is to be left out, or brought back."""
        return self.region is None and not self.image.gaps and self.seen is self.image

    def computation(self, target: DeviceArray | None = None) -> Computation:
        """What all tiles have in common; ``target``: where results go that stay on a GPU."""
        first, output, batch = self.first, self.output, self.batch
        return Computation(self.engine, self.seen, first, self.affines, output, batch, self.threads, target)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape of the result."""
        return self.samples(self.blocks.image)

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Of the result: (planes, [K,] *spatial)."""
        lead = (self.decision.channels,) if self.decision.channels else ()
        return (self.image.planes, *lead, *self.shape)

    @property
    def cuts(self) -> list[list[int]]:
        """Per axis: samples of the result where blocks begin, and its end."""
        axes = len(self.blocks.cuts)
        return [[self.samples([cut] * axes)[k] for cut in cuts] for k, cuts in enumerate(self.blocks.cuts)]

    def place(self, block: Block) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """[start, stop) of a block in samples of the result."""
        return self.samples(block.start), self.samples(block.stop)

    def notes(self, normalization: Normalization | None) -> list[str]:
        """What is to be said of the numbers that were measured, once the result is computed."""
        text = statistics_text(normalization, self.image, self.affines.measured) if normalization is not None else ""
        return [text] if text else []

    def samples(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """The first samples at these pixels (or ends of them)."""
        if self.seen is not self.image:
            return tuple(pixels)
        fields = self.blocks.grid.outputs[self.output].field
        return tuple(ceil(n * f.scale) for n, f in zip(pixels, fields, strict=True))

    def close(self) -> None:
        if self.region is not None:
            self.region.close()


@dataclass(frozen=True)
class Record:
    """What an earlier run has settled of a result, so that all who work on it agree.

    Attributes:
        blocks: What :meth:`BlockPlan.to_json` gave.
        numbers: What :func:`numbers_json` gave.
        plane: Gives the numbers (JSON) of one plane, where each has its own: those that are kept under this name, else
            what is measured now.
    """

    blocks: Mapping[str, Any]
    numbers: Mapping[str, Any] | None
    plane: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]


def make_plan(engine: Engine, source: Source, asked: Request, record: Record | None = None) -> Plan:
    """The result that is asked for, ready to be computed.

    Args:
        engine: The engine, in the form that runs tiles.
        source: The image, open as long as the result is worked on.
        asked: What is asked for, settled.
        record: What an earlier run has settled; None: all is settled now.
    """
    spec = engine.spec
    output, decision = spec.head(asked.head), decision_of(asked, spec)
    first, shape = decision, None
    if asked.resample:
        shape = _resampled_shape(spec, output, source, asked)
        if decision.values:
            contract, channels = spec.contract_of(output), spec.outputs[output].channels
            first = decide(contract, channels, "probability")
            decision = decide(replace(contract, output_is="probabilities"), channels, "mask", asked.mask_values)
    if record is not None:
        blocks = plan_of(spec, source.shape, source.planes, record.blocks, seen=shape)
    elif asked.staged or in_blocks(asked, source):
        blocks = _blocks(engine, source, asked, decision, shape)
    else:
        grid = image_grid(spec, source, tile=asked.tile, batch=asked.batch or 1, free_bytes=_device_bytes(engine))
        blocks = whole_planes(source.shape, source.planes, grid)
    affines = _affines(asked, source, record)
    return Plan(
        engine,
        source,
        source if shape is None else Resampled(source, shape, affines, spec.takes_whole_numbers),
        blocks,
        output,
        decision,
        first,
        affines,
        region=None if asked.region is None else _region(asked.region, source),
        nodata=nodata_value(decision.dtype, decision.values),
        batch=asked.batch or 1,
        threads=asked.threads,
        fixed_tile=asked.tile is not None,
    )


def image_grid(
    spec: EngineSpec,
    source: Source,
    *,
    tile: Sequence[int] | None = None,
    batch: int = 1,
    free_bytes: int | None = None,
) -> TileGrid:
    """The tiles for an image, no larger than the memory that is free allows (``free_bytes``; None: the host's)."""
    max_px = prod(spec.tile)
    if spec.bytes_per_px and spec.exact:
        free = limits.recent_memory_bytes() if free_bytes is None else free_bytes
        max_px = min(max_px, int(MEMORY_SHARE * free / (spec.bytes_per_px * batch)))
    return spec.grid(source.shape, tile, max_px)


def _blocks(
    engine: Engine, source: Source, asked: Request, decision: Decision, shape: tuple[int, ...] | None
) -> BlockPlan:
    """Blocks within the memory that is asked for, or free."""
    free, bound = limits.memory_bytes(), asked.memory_bytes
    memory = (int(FREE_SHARE * free) if bound is None else bound - limits.rss_bytes()) // asked.processes
    memory -= _keep_pieces(source, memory)
    if memory < LEAST_MEMORY:
        taken = f"{limits.rss_bytes() / 1e6:,.0f} MB are taken by the process with its engine"
        raise ContractError(
            f"too little memory to predict {source.name} in: {taken}, {max(0, memory) // 10**6} MB are left for tiles "
            f"and blocks; use {'a larger --memory' if bound is not None else 'a machine with more memory that is free'}"
        )
    on_device = _device_bytes(engine)
    if on_device is not None and not engine.spec.tiles:  # a plan's tiles are not sized, but tried
        memory = min(memory, int(FREE_SHARE * on_device) if bound is None else memory)
    return plan_blocks(
        engine.spec,
        Picture(tuple(source.shape), source.planes, source.channels * source.dtype.itemsize, shape),
        decision,
        memory_bytes=memory,
        tile=asked.tile,
        batch=asked.batch or 1,
        output=engine.spec.head(asked.head),
    )


def _keep_pieces(source: Source, memory: int) -> int:
    """Limits what of the image is kept decoded to its share of the memory.

    Returns:
        Bytes that a piece takes beyond this share, as it decodes only whole.
    """
    share = max(0, int(CACHE_SHARE * memory))
    source.limit_cache(min(CACHE_BYTES, share))
    return max(0, DECODING * source.piece_bytes - share)


def _device_bytes(engine: Engine) -> int | None:
    if engine.gpu_session is None:
        return None
    from .device import free_bytes

    return free_bytes(engine)


def _resampled_shape(spec: EngineSpec, output: int, source: Source, asked: Request) -> tuple[int, ...]:
    wanted = spec.contract.pixel_size_um
    if not wanted:
        raise ContractError("--resample needs the pixel size of training; build the engine with --pixel-size")
    if not asked.size_um:
        raise ContractError(f"{source.name} does not say its pixel size; give it with --pixel-size, in micrometres")
    if any(f.scale != 1 for f in spec.outputs[output].field):
        raise ContractError(
            "--resample needs a network whose output has as many samples as its input; resample yourself"
        )
    return resampled_shape(source.shape, asked.size_um, wanted)


def _region(path: str, source: Source) -> Source:
    from ..images.open import open_image

    region = open_image(path, Contract(), Reading(indices=True), spatial=len(source.shape))
    if region.shape != source.shape or region.planes not in (1, source.planes):
        shape = size_text(region.shape)
        region.close()
        raise ContractError(
            f"{path}: the region has {region.planes} planes of {shape} px, and {source.name} {source.planes} of "
            f"{size_text(source.shape)}; draw it on the image"
        )
    return region


# --- numbers of the normalisation -----------------------------------------------------------------------------------


def _affines(asked: Request, source: Source, record: Record | None) -> Affines | OnePlane:
    assert asked.normalization is not None  # noqa: S101 - the request is settled
    if record is None:
        return affine(asked.normalization, source)
    if record.numbers is not None:
        return OnePlane(_from_json(record.numbers))

    def keep(plane: int, measure: Callable[[], Affine]) -> Affine:
        return _from_json(record.plane(f"{plane:08d}", lambda: _to_json(measure())))

    return affine(asked.normalization, source, keep)


def numbers_json(affines: Affines | OnePlane) -> dict[str, Any] | None:
    """One plane's numbers where they are those of all planes."""
    if isinstance(affines, Affines) and not affines.same:
        return None
    return _to_json(affines.plane(0))


def _to_json(one: Affine) -> dict[str, Any]:
    """Float32 numbers as JSON has them: they come back the same bits."""
    return {"offset": one.offset.tolist(), "divisor": one.divisor.tolist(), "clip": one.clip}


def _from_json(data: Mapping[str, Any]) -> Affine:
    clip = None if data["clip"] is None else (float(data["clip"][0]), float(data["clip"][1]))
    return Affine(np.array(data["offset"], np.float32), np.array(data["divisor"], np.float32), clip)
