"""What travels with an engine: contract, stride, halo, tiles, precision, backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Annotated, Any, Literal

import numpy as np

from ..contract.contract import Contract
from ..contract.json import contract_from_json
from ..errors import ContractError, EngineError, TileError, size_text
from ..system.json import OPTIONAL, AtLeast, Count, Reader, Record, Size, from_json
from ..tiling.axis import canvas
from ..tiling.field import FieldRecord, OutputField, TileSizes
from ..tiling.grid import TileGrid, choose_tile, tile_grid, with_halo
from ..tiling.placement import Blend, PlacementRule
from .equality import Equality

Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class InputSpec(Record):
    """One graph input: its name, axes (``"NCYX"``), number of channels and dtype (a NumPy name)."""

    name: str
    axes: str
    channels: Count
    dtype: str = "float32"


@dataclass(frozen=True)
class EngineSpec(Record):
    """What travels with an engine.

    Attributes:
        contract: The input contract, complete.
        inputs: Graph inputs; a sample's channels are dealt to them in order.
        outputs: What the outputs depend on, with the halos computed from the graph.
        sizes: Accepted tile sizes per spatial axis.
        batch: The batch size the graph is fixed to, or None.
        halo: ``exact``, ``measured`` or ``given``.
        halo_limit: Samples that the halo is cut to where it is not exact, else None.
        tile: The tile chosen by build, in pixels. For exact networks of free size a bound on the tile's area.
        overlap: Pixels shared by neighbouring tiles where tiles are blended (not exact networks), else None.
        blend: Weights of blended tiles.
        placement: Where blended tiles lie, and whose weights they have.
        precision, backend, device: As built.
        run_batch: Tiles per run at which build measured it fastest; what ``predict`` uses unless told otherwise.
        batches: The batch sizes that its plan takes, ascending; empty: any.
        tiles: The tiles that its plan takes: ``tile``, and a smaller one for memory that does not hold it, on the same
            canvas; empty: any that the graph accepts.
        streams: Tiles that run beside each other, each on its share of the processor's threads.
        bytes_per_px: Memory that running takes per tile pixel, as measured by build (0: unknown); the device's memory
            for an engine on a GPU.
        made_on: Machine and library versions at build.
        options: Everything else that decided the result.
        settings: Those that the backend measured when it built the graph, in its own words; None: it has none.
        equal: How equal tiled results are to the whole-image result, as measured by build; None where nothing is promised,
            or nothing could be measured.
    """

    contract: Contract
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputField, ...]
    sizes: tuple[TileSizes, ...]
    batch: Count | None
    halo: Literal["exact", "measured", "given"]
    halo_limit: Size | None
    tile: tuple[Count, ...]
    overlap: tuple[Size, ...] | None
    blend: Blend
    precision: Precision
    backend: str
    device: str
    run_batch: Count = 1
    batches: tuple[Count, ...] = ()
    tiles: tuple[tuple[Count, ...], ...] = ()
    streams: Count = 1
    bytes_per_px: Annotated[float, AtLeast(0)] = 0.0
    made_on: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = field(default=None, metadata=OPTIONAL)
    equal: Equality | None = field(default=None, metadata=OPTIONAL)
    placement: PlacementRule = field(default="even", metadata=OPTIONAL)

    @property
    def exact(self) -> bool:
        """Whether tiles placed side by side equal whole-image inference (with the halo in use: by proof or measurement)."""
        return self.overlap is None

    @property
    def channels(self) -> int:
        """Channels of the image: those of all inputs together."""
        return sum(i.channels for i in self.inputs)

    @property
    def takes_whole_numbers(self) -> bool:
        """Whether an input takes integers: grey levels as they are, which the network normalises itself."""
        return any(np.dtype(i.dtype).kind in "iu" for i in self.inputs)

    @property
    def spatial(self) -> int:
        return len(self.sizes)

    @property
    def free_size(self) -> bool:
        return all(s.fixed is None for s in self.sizes)

    @property
    def runs_whole(self) -> bool:
        """Whether the network runs on whole images and tiles have to equal that."""
        return self.exact and self.free_size

    @property
    def exact_up_to(self) -> tuple[int | None, ...]:
        """Pixels of the canvas per axis up to which tiles equal the whole image; images that need more are refused."""
        return tuple(None if self.overlap is not None else s.exact_up_to for s in self.sizes)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Tiles per run that the engine takes, ascending; empty: any number."""
        if any("N" not in i.axes for i in self.inputs):
            return (1,)  # no batch axis: one tile at a time
        return self.batches or (() if self.batch is None else (self.batch,))

    @property
    def input_range(self) -> tuple[tuple[float, float], ...] | None:
        """(lowest, highest) normalised value that build saw, per channel or one pair for all; None where it saw none."""
        return _ranges(self.options.get("input_range"))

    def contract_of(self, output: int) -> Contract:
        """The contract as that of one output."""
        return self.contract.of_head(self.outputs[output].name)

    def head(self, name: str | None) -> int:
        """Number of the output called ``name``; None: the first.

        Raises:
            ContractError: The engine has no such output.
        """
        names = [output.name for output in self.outputs]
        if name is not None and name not in names:
            raise ContractError(f"the engine has no output {name!r}; its outputs are {', '.join(names)}")
        return 0 if name is None else names.index(name)

    def distance_of(self, output: int) -> int | None:
        """The output that holds distances over the samples of ``output``: called ``distance``, values of one channel."""
        for k, one in enumerate(self.outputs):
            said = self.contract_of(k)
            if k != output and one.name.lower() == "distance" and one.channels == 1:
                same = [f.scale for f in one.field] == [f.scale for f in self.outputs[output].field]
                return k if same and said.task in (None, "regression") else None
        return None

    def used_outputs(self) -> tuple[OutputField, ...]:
        """The outputs with the halo in use."""
        if self.halo_limit is None:
            return self.outputs
        return tuple(with_halo(o, self.halo_limit) for o in self.outputs)

    def grid(
        self,
        image: Sequence[int],
        tile: Sequence[int] | None = None,
        max_px: int | None = None,
        *,
        aligned: bool = False,
    ) -> TileGrid:
        """The tiles for an image of spatial shape ``image``.

        Args:
            image: Pixels per axis.
            tile: Tile size per axis. None: for exact networks the rectangle of at most ``max_px`` pixels (default: the
                area of the built tile) that computes least for this image; the built tile where the halo is not exact,
                unless ``max_px`` forbids it, and where the network cannot be tiled exactly.
            max_px: Bound on the tile's pixels.
            aligned: Tiles that are placed own equal stretches, for results that are written in blocks.

        Raises:
            TileError: A tile that the graph or the engine's plan does not accept, that keeps nothing, or that would
                change the answer (networks that cannot be tiled exactly have one tile: it is part of the model).
        """
        outputs = self.used_outputs()
        if tile is not None and len(tile) != self.spatial:
            raise TileError(
                f"tile {size_text(tile)} has {len(tile)} number(s), the network {self.spatial} spatial axes; "
                f"use e.g. {size_text((tile[0],) * self.spatial)}"
            )
        if self.overlap is not None:
            if tile is not None and tuple(tile) != self.tile:
                raise TileError(
                    f"tile {size_text(tile)} px differs from the engine's {size_text(self.tile)}: this network cannot be "
                    "tiled exactly, so its tile is part of the model; build again with --tile"
                )
            return tile_grid(image, self.tile, self.sizes, outputs, overlap=self.overlap, placement=self.placement)
        bound = prod(self.tile) if max_px is None else max_px
        if tile is None and self.halo_limit is not None and bound >= prod(self.tile):
            tile = self.tile  # narrower ones would have more seams than the halo was judged on
        elif tile is None:
            tile = choose_tile(image, self.sizes, outputs, bound, aligned=aligned)
        if not self.tiles:
            return tile_grid(image, tile, self.sizes, outputs, aligned=aligned)
        if tuple(tile) not in self.tiles:
            raise TileError(
                f"tile {size_text(tile)} px is not in the engine's plan, which takes "
                f"{' or '.join(map(size_text, self.tiles))} px; use one of these, or build it: unet-rt build MODEL.onnx "
                f"--samples IMAGES --backend {self.backend} --device {self.device} --tile {size_text(tile)}"
            )
        sizes = [replace(s, fixed=t) for s, t in zip(self.sizes, tile, strict=True)]
        return tile_grid(image, tile, sizes, outputs, aligned=aligned, least=self.tile)

    def smaller_grid(self, grid: TileGrid, *, aligned: bool = False) -> TileGrid | None:
        """The tiles for the same image that come next where memory does not hold those of ``grid``.

        Results are the same, as the halo is exact: the plan's smaller tile, or one of at most half the pixels. None:
        there are none, or results would change.
        """
        if self.overlap is not None or self.halo != "exact":
            return None
        size = prod(grid.tile)
        tile = next((t for t in self.tiles if prod(t) < size), None)
        if self.tiles and tile is None:
            return None
        try:
            smaller = self.grid(grid.image, tile, size // 2, aligned=aligned)
        except TileError:  # test-time augmentation has larger halos, beside which it may keep nothing
            return None
        return smaller if prod(smaller.tile) < size else None

    def canvas_shape(self, image: Sequence[int]) -> tuple[int, ...]:
        """Size in pixels of the canvas that whole-image inference runs on."""
        axes = enumerate(zip(image, self.sizes, strict=True))
        return tuple(canvas(n, s, [o.field[k] for o in self.outputs]).size for k, (n, s) in axes)


def read_spec(data: Mapping[str, Any], *, where: str, way_out: str) -> EngineSpec:
    """Inverse of ``EngineSpec.to_json``.

    Args:
        data: The spec as ``json.loads`` returned it, nothing but its fields.
        where: What errors begin with, e.g. the file.
        way_out: What to do about it.

    Raises:
        EngineError: Values of another type, out of range, or that do not go together; fields that are missing or unknown.
    """

    def contract(value: Any, where: str) -> Contract:
        if not isinstance(value, dict):
            raise EngineError(f"{where} is {value!r}, not an object; {way_out}")
        try:
            return contract_from_json(value)
        except ContractError as error:
            raise EngineError(f"{where}: {error}; {way_out}") from error

    def output(value: Any, where: str) -> OutputField:
        return from_json(FieldRecord, value, where=where, error=EngineError, way_out=way_out).output

    readers: dict[type, Reader] = {Contract: contract, OutputField: output}
    spec = from_json(EngineSpec, data, where=where, error=EngineError, way_out=way_out, readers=readers)
    fault = _fault(spec)
    if fault is not None:
        raise EngineError(f"{where}: {fault}; {way_out}")
    return spec


def _fault(spec: EngineSpec) -> str | None:
    """Which values of a spec do not go together; None if all do."""
    for name in ("inputs", "outputs", "sizes"):
        if not getattr(spec, name):
            return f"{name} is empty"
    axes = [("tile", len(spec.tile)), *(("tiles", len(tile)) for tile in spec.tiles)]
    axes += [] if spec.overlap is None else [("overlap", len(spec.overlap))]
    axes += [(f"output {output.name}", len(output.field)) for output in spec.outputs]
    named = [(f"input {one.name}", one.axes) for one in spec.inputs]
    named += [(f"output {one.name}", one.axes) for one in spec.outputs]
    for name, count in [*axes, *((name, len(set(letters) - set("NC"))) for name, letters in named)]:
        if count != spec.spatial:
            return f"{name} has {count} spatial axes, sizes {spec.spatial}"
    for name, letters in named:
        if len(set(letters)) != len(letters) or not letters.isalpha():
            return f"{name} has axes {letters!r}, not different letters"
    strange = next((one for one in spec.inputs if not _is_dtype(one.dtype)), None)
    if strange is not None:
        return f"input {strange.name} has dtype {strange.dtype!r}, which NumPy does not know"
    try:
        seen = spec.input_range
    except (TypeError, ValueError):
        return f"options.input_range is {spec.options['input_range']!r}, not pairs of numbers"
    if seen is not None and len(seen) not in (1, spec.channels):
        return f"options.input_range has {len(seen)} pairs for {spec.channels} channels"
    return None


def _is_dtype(name: str) -> bool:
    try:
        np.dtype(name)
    except (TypeError, ValueError):
        return False
    return True


def _ranges(value: Any) -> tuple[tuple[float, float], ...] | None:
    return None if value is None else tuple((float(low), float(high)) for low, high in value)
