"""What travels with an engine: contract, stride, halo, tiles, precision, backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from ..contract.contract import Contract
from ..contract.json import contract_from_json
from ..errors import ContractError, TileError, size_text
from ..tiling.axis import canvas
from ..tiling.field import OutputField, TileSizes
from ..tiling.grid import TileGrid, choose_tile, tile_grid, with_halo
from ..tiling.stitch import Blend

Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class InputSpec:
    """One graph input: its name, axes (``"NCYX"``), number of channels and dtype (a NumPy name)."""

    name: str
    axes: str
    channels: int
    dtype: str = "float32"


@dataclass(frozen=True)
class EngineSpec:
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
        precision, backend, device: As built.
        run_batch: Tiles per run at which build measured it fastest; what ``predict`` uses unless told otherwise.
        batches: The batch sizes that its plan takes, ascending; empty: any.
        tiles: The tiles that its plan takes: ``tile``, and a smaller one for memory that does not hold it, on the same
            canvas; empty: any that the graph accepts.
        bytes_per_px: Memory that running takes per tile pixel, as measured by build (0: unknown); the device's memory
            for an engine on a GPU.
        made_on: Machine and library versions at build.
        options: Everything else that decided the result.
    """

    contract: Contract
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputField, ...]
    sizes: tuple[TileSizes, ...]
    batch: int | None
    halo: Literal["exact", "measured", "given"]
    halo_limit: int | None
    tile: tuple[int, ...]
    overlap: tuple[int, ...] | None
    blend: Blend
    precision: Precision
    backend: str
    device: str
    run_batch: int = 1
    batches: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    bytes_per_px: float = 0.0
    made_on: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether tiles placed side by side equal whole-image inference (with the halo in use: by proof or measurement)."""
        return self.overlap is None

    @property
    def channels(self) -> int:
        """Channels of the image: those of all inputs together."""
        return sum(i.channels for i in self.inputs)

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
            return tile_grid(image, self.tile, self.sizes, outputs, overlap=self.overlap)
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

    def to_json(self) -> dict[str, Any]:
        return {
            "contract": self.contract.to_json(),
            "inputs": [vars(i) for i in self.inputs],
            "outputs": [o.to_json() for o in self.outputs],
            "sizes": [vars(s) for s in self.sizes],
            "batch": self.batch,
            "halo": self.halo,
            "halo_limit": self.halo_limit,
            "tile": list(self.tile),
            "overlap": None if self.overlap is None else list(self.overlap),
            "blend": self.blend,
            "precision": self.precision,
            "backend": self.backend,
            "device": self.device,
            "run_batch": self.run_batch,
            "batches": list(self.batches),
            "tiles": [list(tile) for tile in self.tiles],
            "bytes_per_px": self.bytes_per_px,
            "made_on": dict(self.made_on),
            "options": dict(self.options),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineSpec:
        inputs = tuple(InputSpec(**i) for i in data["inputs"])
        seen = _ranges(data["options"].get("input_range"))
        if seen is not None and len(seen) not in (1, sum(i.channels for i in inputs)):
            raise ValueError(f"input_range {seen!r}")
        return cls(
            contract=contract_from_json(data["contract"]),
            inputs=inputs,
            outputs=tuple(OutputField.from_json(o) for o in data["outputs"]),
            sizes=tuple(TileSizes(**s) for s in data["sizes"]),
            batch=data["batch"],
            halo=data["halo"],
            halo_limit=data["halo_limit"],
            tile=_pixels(data, "tile", data["tile"], 1),
            overlap=None if data["overlap"] is None else _pixels(data, "overlap", data["overlap"], 0),
            blend=data["blend"],
            precision=data["precision"],
            backend=data["backend"],
            device=data["device"],
            run_batch=_count(data["run_batch"]),
            batches=tuple(_count(n) for n in data["batches"]),
            tiles=tuple(_pixels(data, "tiles", tile, 1) for tile in data["tiles"]),
            bytes_per_px=data["bytes_per_px"],
            made_on=data["made_on"],
            options=data["options"],
        )


def _pixels(data: Mapping[str, Any], key: str, value: Any, least: int) -> tuple[int, ...]:
    """``value``, of ``key``: one whole number per spatial axis."""
    if len(value) != len(data["sizes"]) or any(not isinstance(n, int) or n < least for n in value):
        raise ValueError(f"{key} {value!r}")
    return tuple(value)


def _ranges(value: Any) -> tuple[tuple[float, float], ...] | None:
    return None if value is None else tuple((float(low), float(high)) for low, high in value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"batch {value!r}")
    return value
