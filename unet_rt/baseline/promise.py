"""The promise of exact tiles, held against the FP32 graph itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract.contract import Normalization
from ..engine.engine import Engine
from ..engine.spec import EngineSpec
from ..errors import size_text
from ..tiling.grid import TileGrid
from .model import LABEL_OPS, Model, baseline_engine, open_model
from .results import raw_results
from .samples import SampleWindow, unscaled
from .tiles import seam_tile, whole_grid

Array = npt.NDArray[Any]

SMALLEST = float(np.finfo(np.float32).tiny)  # below, float32 has fewer digits, and some processors none
LABELS_CHANGED = 1e-3  # of outputs that are decisions already: rounding moves what lies on the fence


def promised(spec: EngineSpec) -> bool:
    """Whether the graph was judged exact, and its tiles keep the whole halo."""
    return spec.runs_whole and spec.halo_limit is None


def broken_promise(
    baseline: Engine, model: Model, sample: SampleWindow, whole: Sequence[Array], grid: TileGrid, threads: int = 0
) -> str:
    """Why tiles of the FP32 graph are not its whole-image result, though it was judged exact; "" where they are.

    Args:
        baseline: Runs the graph in FP32.
        model: The graph.
        sample: The image.
        whole: Its results on the whole canvas, per output.
        grid: The tiles.
        threads: Of the kernels.
    """
    if not promised(baseline.spec) or grid.count < 2 or model.quantised:
        return ""  # one rounding may turn a whole step of a quantiser, which no bound covers: the budget judges
    canvas = [axis.canvas.size for axis in grid.axes]
    tiled = raw_results(baseline, sample, grid, threads)
    for output, one, other in zip(baseline.spec.outputs, whole, tiled, strict=True):
        error, allowed = _difference(one, other, model.report.rounding(canvas), output.name in decisions(model))
        if not error <= allowed:
            return (
                f"{sample.name}: FP32 tiles of {size_text(grid.tile)} px differ from the whole image by {error:.2e} in "
                f"output {output.name}, where rounding explains {allowed:.1e}: the graph was judged exact, and is not. "
                "This is a defect of unet-rt, whatever the budget; please report it with the model"
            )
    return ""


def broken_exam(graph: Path, spec: EngineSpec, tile: Array, work: Path, threads: int = 0) -> str:
    """As :func:`broken_promise`, for a tile (C, *spatial) as the network gets it, where there are no images.

    A tile that no smaller one cuts is continued by a quarter, mirrored, and cut by tiles of its own size.

    Args:
        graph: The graph as given, of which ``spec`` says what it was judged to be.
        spec: Of the engine.
        tile: One of its exam.
        work: Folder for what is made on the way.
        threads: Of backend and kernels.
    """
    if not promised(spec):
        return ""
    spec = replace(spec, contract=replace(spec.contract, normalization=Normalization("none")))
    small = seam_tile(spec, tile.shape[1:])
    if spec.grid(tile.shape[1:], small).count < 2:
        small = spec.tile
        tile = np.pad(tile, [(0, 0), *((0, n // 4) for n in tile.shape[1:])], mode="symmetric")
    digest = hashlib.sha256(np.ascontiguousarray(tile).tobytes()).hexdigest()
    shape = tuple(tile.shape[1:])
    sample = SampleWindow("exam tile 0", None, tile, unscaled(len(tile)), (0,) * len(shape), 0, shape, "", digest)
    model = open_model(graph, work, options=spec.contract)
    with baseline_engine(model, spec, threads=threads) as baseline:
        whole = raw_results(baseline, sample, whole_grid(spec, shape), threads)
        return broken_promise(baseline, model, sample, whole, spec.grid(shape, small), threads)


def decisions(model: Model) -> set[str]:
    """Outputs that are labels already."""
    report = model.report
    return {o.name for o, op in zip(report.outputs, report.final_ops, strict=True) if op in LABEL_OPS}


def _difference(whole: Array, tiled: Array, rounding: float, labels: bool) -> tuple[float, float]:
    """How far two results (K, *spatial) lie apart, and how far they may: in the channel that goes farthest beyond."""
    if labels:
        return float((whole != tiled).mean()), LABELS_CHANGED
    error = np.abs(whole.astype(np.float64) - tiled)
    same = (whole == tiled) | (np.isnan(whole) & np.isnan(tiled))
    errors = np.where(same, 0.0, error).reshape(len(whole), -1).max(axis=1)
    # Each channel by its own largest value: beside one of thousands, one of thousandths would hide whatever it is.
    largest = np.abs(np.where(np.isfinite(whole), whole, 0.0)).reshape(len(whole), -1).max(axis=1)
    allowed = rounding * np.maximum(largest, SMALLEST)
    worst = int(np.argmax(errors / allowed)) if rounding else int(np.argmax(errors))
    return float(errors[worst]), float(allowed[worst])
