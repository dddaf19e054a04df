"""Tiles of a graph against its whole-image result, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from unet_rt.graph.report import GraphReport


def session_of(model: onnx.ModelProto) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # As the graph stands: what optimisers make of it is theirs to prove.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def largest_difference(report: GraphReport, session: Any, tile: Sequence[int], canvas: Sequence[int]) -> float:
    """Of tiles at the corners and within to the whole, relative to the largest value of each channel."""
    rng = np.random.default_rng(tile[0] * canvas[1])
    image = rng.normal(0, 1, (1, 2, *canvas)).astype(np.float32)
    whole = session.run(None, {"x": image})[0]
    worst = 0.0
    for corner in (0, 1, 2):
        origin = []
        for c, t, s in zip(canvas, tile, report.sizes, strict=True):
            origin.append((0, c - t, min(c - t, s.stride))[corner])
        window = tuple(slice(o, o + t) for o, t in zip(origin, tile, strict=True))
        part = session.run(None, {"x": np.ascontiguousarray(image[(..., *window)])})[0]
        inner, outer = [], []
        for k, f in enumerate(report.outputs[0].field):
            assert part.shape[2 + k] == f.out_size(tile[k])
            assert whole.shape[2 + k] == f.out_size(canvas[k])
            start = f.halo[0] if origin[k] > 0 else 0
            stop = part.shape[2 + k] - (f.halo[1] if origin[k] + tile[k] < canvas[k] else 0)
            assert start < stop
            shift = int(origin[k] * f.scale)
            inner.append(slice(start, stop))
            outer.append(slice(start + shift, stop + shift))
        a, b = part[(..., *inner)], whole[(..., *outer)]
        largest = np.maximum(np.abs(whole).max(axis=(0, 2, 3), keepdims=True), np.finfo(np.float32).tiny)
        worst = max(worst, float((np.abs(a - b) / largest).max()))
    return worst
