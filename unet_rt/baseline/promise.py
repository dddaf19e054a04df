"""The promise of exact tiles, held against the FP32 graph itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.engine import Engine
from ..engine.spec import EngineSpec
from ..errors import size_text
from ..tiling.grid import TileGrid
from .model import LABEL_OPS, Model
from .results import raw_results
from .samples import SampleWindow

Array = npt.NDArray[Any]

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


def decisions(model: Model) -> set[str]:
    """Outputs that are labels already."""
    report = model.report
    return {o.name for o, op in zip(report.outputs, report.final_ops, strict=True) if op in LABEL_OPS}


def _difference(whole: Array, tiled: Array, rounding: float, labels: bool) -> tuple[float, float]:
    """How far two results lie apart, and how far they may."""
    if labels:
        return float((whole != tiled).mean()), LABELS_CHANGED
    error = np.abs(whole.astype(np.float64) - tiled)
    same = (whole == tiled) | (np.isnan(whole) & np.isnan(tiled))
    finite = np.abs(whole[np.isfinite(whole)])
    return float(np.where(same, 0.0, error).max(initial=0.0)), rounding * max(1.0, float(finite.max(initial=0.0)))
