"""Which blocks a large result is computed in. Integers only, never pixels.

A block is a rectangle of the image: the unit of work, of what is written at once, and of what an interrupted run keeps.
Blocks are disjoint, end where what a tile owns ends (of an aligned grid, so that no tile is run for two of them), and hold
whole chunks of the stored result, so that no two writers share one.

Worked example (one axis): image 100,000 px, tile 2048, halo 94, stride 16. A tile owns 2048 - 96 - 94 px, rounded down to
1856. Chunks of 928 px (half of it, at most 1024), blocks of several tiles, say 8: block k is [14848 k, 14848 (k + 1)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract.contract import Contract
from ..engine.engine import Engine
from ..errors import ContractError, size_text
from ..images.normalize import Affines, OnePlane, affine
from ..images.open import open_image
from ..images.source import Source
from ..kernels.request import Affine
from ..outputs.shape import nodata_value
from ..system import limits
from ..tiling.decision import Decision, decide
from ..tiling.resample import input_span, resample, resampled_shape
from .blocks import Block, BlockPlan, plan_blocks, plan_of
from .request import Request
from .stage import Stage
from .work import filled

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
        ends = [input_span(a, b, n, m) for a, b, n, m in zip(start, stop, *shapes, strict=True)]
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
