"""Specs and tiles that the baseline is run with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import get_args

from ..engine.spec import EngineSpec
from ..errors import TileError, size_text
from ..tiling.axis import covered_px, exact_step
from ..tiling.grid import TileGrid, cost_ratio, square_tile, tile_grid
from ..tiling.placement import TOOLS, Blend, PlacementRule, blended_step, usual_overlap
from .model import Model
from .runner import baseline_name


def untiled_spec(model: Model) -> EngineSpec:
    """The spec of a model before anything is decided: FP32, exact halo, smallest tile."""
    report = model.report
    return EngineSpec(
        contract=model.contract,
        inputs=model.input_specs(),
        outputs=report.outputs,
        sizes=report.sizes,
        batch=report.batch,
        halo="exact",
        halo_limit=None,
        tile=square_tile(report.sizes, report.outputs, 1),
        overlap=None,
        blend="gaussian",
        precision="fp32",
        backend=baseline_name(),
        device="cpu",
    )


def blended_spec(
    spec: EngineSpec,
    tile: Sequence[int] | None,
    given: Path,
    *,
    blend: Blend = "gaussian",
    overlap: Sequence[int] | None = None,
    placement: PlacementRule = "even",
) -> EngineSpec:
    """The spec of a network that cannot be tiled exactly: its tile is the user's, the trained one, or the graph's own.

    Neighbouring tiles share ``overlap`` pixels per axis; None: half a tile (a quarter, placed as MONAI does), or as
    much more as it takes to leave no gap between the results of unpadded networks. Pixels beyond the image are mirrored
    unless the contract says otherwise, and 0 where tiles are placed as another tool does.

    Raises:
        TileError: No tile is declared anywhere, or the graph does not accept it; an overlap of another number of axes; a
            placement that the tool it is of has not for such a network.
    """
    fixed = tuple(s.fixed for s in spec.sizes if s.fixed is not None)
    only = fixed if len(fixed) == len(spec.sizes) else ()  # a graph of one size has no other tile, whatever is declared
    chosen = tuple(tile or only or spec.contract.trained_tile)
    if not chosen:
        raise TileError(
            f"{given.name} cannot be tiled exactly ({spec.outputs[0].reasons[0]}), so the tile size changes its answer; "
            "pass the tile it was trained with: --tile HxW"
        )
    if len(chosen) != spec.spatial:
        raise TileError(f"tile {size_text(chosen)} needs {spec.spatial} numbers, one per spatial axis")
    for t, s in zip(chosen, spec.sizes, strict=True):
        if not s.accepts(t):
            near = " or ".join(map(str, sorted({s.at_most(t), s.at_least(t)})))
            raise TileError(f"tile {t} px is not accepted by the graph; use {near}")
    if overlap is None:
        covered = [covered_px(t, [o.field[k] for o in spec.outputs]) for k, t in enumerate(chosen)]
        overlap = [max(usual_overlap(t, placement), t - n) for t, n in zip(chosen, covered, strict=True)]
    elif len(overlap) != spec.spatial:
        raise TileError(f"overlap {size_text(overlap)} needs {spec.spatial} numbers, one per spatial axis")
    if placement != "even":
        _check_placement(spec, placement)
    contract = replace(spec.contract, border=spec.contract.border or ("mirror" if placement == "even" else "zero"))
    return replace(spec, contract=contract, tile=chosen, overlap=tuple(overlap), blend=blend, placement=placement)


def _check_placement(spec: EngineSpec, placement: PlacementRule) -> None:
    """TileError where the tool does otherwise with such a network, so that its results would not be met."""
    tool = TOOLS.get(placement)
    if tool is None:
        raise TileError(f"placement {placement!r} is unknown; use {', '.join(get_args(PlacementRule))}")
    for output in spec.outputs:
        if any(f.scale != 1 or any(f.shrink) for f in output.field):
            raise TileError(
                f"--placement {placement}: output {output.name} has not the size of the image, and {tool}'s placement is "
                "for networks whose outputs have; leave it away"
            )
    border = spec.contract.border
    if placement == "nnunet" and border not in (None, "zero"):
        raise TileError(
            f"--placement nnunet: nnU-Net pads images smaller than its window with 0, and border {border} is declared; "
            "pass --border zero"
        )


def kept_share(spec: EngineSpec, tile: Sequence[int]) -> float:
    """Kept over computed pixels of inner tiles; 0 where the tile keeps nothing."""
    if spec.overlap is not None:
        steps = [
            blended_step(t, o, s.stride, spec.placement) for t, o, s in zip(tile, spec.overlap, spec.sizes, strict=True)
        ]
        return prod(steps) / prod(tile)
    ratio = cost_ratio(tile, spec.sizes, spec.used_outputs())
    return 0.0 if ratio is None else 1 / ratio


def largest_halo(spec: EngineSpec) -> int:
    """The largest halo of any output and axis, in samples."""
    return max((max(f.halo) for o in spec.outputs for f in o.field), default=0)


def keeps(spec: EngineSpec, tile: Sequence[int]) -> bool:
    """Whether tiles of this size keep anything."""
    outputs = spec.used_outputs()
    return all(
        exact_step(t, s.stride, [o.field[k] for o in outputs]) > 0
        for k, (t, s) in enumerate(zip(tile, spec.sizes, strict=True))
    )


def whole_grid(spec: EngineSpec, shape: Sequence[int]) -> TileGrid:
    """One tile: the whole canvas."""
    return tile_grid(shape, spec.canvas_shape(shape), spec.sizes, spec.outputs)


def seam_tile(spec: EngineSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """A tile smaller than an image of ``shape``, so that it has seams; the engine's own where it is part of the model."""
    if not spec.runs_whole:
        return spec.tile
    tile = square_tile(spec.sizes, spec.used_outputs(), max(prod(shape) // 4, 1))
    tile = tuple(min(a, b) for a, b in zip(tile, spec.tile, strict=True))
    return tile if keeps(spec, tile) else spec.tile


SEAM_KEPT = 0.2  # kept over computed pixels of the tiles that parity is judged with


def judged_tile(spec: EngineSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """A tile that gives an image of ``shape`` seams at a bearable cost; the engine's own where it is part of the model.

    Halos do not shrink with the image: quarters of a small one (:func:`seam_tile`) may compute it dozens of times over.
    """
    if not spec.runs_whole:
        return spec.tile
    for share in (0.25, 0.5, 0.75):
        tile = square_tile(spec.sizes, spec.used_outputs(), max(round(prod(shape) * share), 1))
        tile = tuple(min(a, b) for a, b in zip(tile, spec.tile, strict=True))
        if keeps(spec, tile) and kept_share(spec, tile) >= SEAM_KEPT:
            return tile
    return spec.tile
