"""Whether a graph is called exact whose tiles are not the whole image's, in ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in ("helpers", "graph")]

import numpy as np
import onnx
import tiles_and_whole
from test_exact_fuzz import arrangements

from unet_rt.graph.report import inspect


def main(path: str) -> int:
    """1 where that is so, else 0."""
    model = onnx.load(path)
    try:
        report = inspect(path)
        session = tiles_and_whole.session_of(model)
    except Exception:  # noqa: BLE001 - no library runs it
        return 0
    if not report.exact or len(report.inputs) != 1 or len(report.outputs) != 1:
        return 0
    for tile, canvas in arrangements(report):
        try:
            with np.errstate(all="ignore"):
                error = tiles_and_whole.largest_difference(report, session, tile, canvas)
        except AssertionError:
            print(f"sizes of tiles of {tile} px on {canvas} px differ")
            return 1
        except Exception:  # noqa: BLE001 - nor at this size
            return 0
        if error > report.rounding(canvas):
            print(f"tiles of {tile} px on {canvas} px differ by {error:.2g}")
            return 1
    return 0
