"""Wherever a drawn network is called exact, its tiles are the whole's, at several sizes, in ONNX Runtime.

``UNET_RT_FUZZ`` is the number of networks (200 by default), ``UNET_RT_FUZZ_SEED`` the first seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from drawn_networks import draw_network

from unet_rt.graph.report import GraphReport, inspect

ort = pytest.importorskip("onnxruntime")

COUNT = int(os.environ.get("UNET_RT_FUZZ", "200"))
FIRST = int(os.environ.get("UNET_RT_FUZZ_SEED", "0"))
EXACT_SHARE = 0.4
LARGEST = 640  # canvas in pixels that is still run


def session_of(model: onnx.ModelProto) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # As the graph stands: what optimisers make of it is theirs to prove.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def arrangements(report: GraphReport) -> Iterator[tuple[list[int], list[int]]]:
    """(tile, canvas): two tiles on canvases of other residues than the graph's own, and at the bound of exactness."""
    fields, sizes = report.outputs[0].field, report.sizes
    for tile_strides, canvas_strides in ((2, (1, 3)), (3, (5, 2)), (2, (4, 11))):
        tile, canvas = [], []
        for f, s, more in zip(fields, sizes, canvas_strides, strict=True):
            edges = int((sum(f.halo) + sum(f.shrink)) / f.scale) + 1
            tile.append(s.at_least(edges + tile_strides * s.stride))
            canvas.append(tile[-1] + more * s.stride)
        if max(canvas) <= LARGEST and all(s.accepts(c) for s, c in zip(sizes, canvas, strict=True)):
            yield tile, canvas
    if any(s.exact_up_to is not None for s in sizes):
        bound = [c if s.exact_up_to is None else s.at_most(s.exact_up_to) for c, s in zip(tile, sizes, strict=True)]
        if max(bound) <= LARGEST and all(b >= t for b, t in zip(bound, tile, strict=True)):
            yield tile, bound


def largest_difference(report: GraphReport, session: Any, tile: Sequence[int], canvas: Sequence[int]) -> float:
    """Of tiles at the corners and within to the whole, relative to the largest value."""
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
        worst = max(worst, float(np.abs(a - b).max() / max(1.0, np.abs(b).max())))
    return worst


def tolerance(report: GraphReport, canvas: Sequence[int]) -> float:
    """Sums in another order, and float32 coordinates where a resize is no power of two."""
    return 1e-5 + (max(canvas) * 2.0**-18 if report.outputs[0].note else 0.0)


def verdict(seed: int) -> str:
    """``exact``, ``not exact`` or ``kept`` (nothing of it can be tested); raises where exact is not true."""
    model, traits = draw_network(seed)
    report = inspect(model)
    if not report.exact:
        assert report.outputs[0].reasons, f"{seed} ({traits}): not exact, and no reason"
        return "not exact"
    session, tested = session_of(model), 0
    for tile, canvas in arrangements(report):
        error = largest_difference(report, session, tile, canvas)
        assert error <= tolerance(report, canvas), (
            f"seed {seed} ({traits}): tiles of {tile} px differ by {error:.2g} on a canvas of {canvas} px, and it is "
            f"called exact: {report.sizes}"
        )
        tested += 1
    return "exact" if tested else "untested"


@pytest.mark.onnxruntime
def test_exact_is_true_of_drawn_networks() -> None:
    found = [verdict(seed) for seed in range(FIRST, FIRST + COUNT)]
    assert found.count("exact") >= EXACT_SHARE * len(found), {word: found.count(word) for word in set(found)}
