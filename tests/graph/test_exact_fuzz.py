"""Wherever a drawn network is called exact, its tiles are the whole's, at several sizes, in ONNX Runtime.

``UNET_RT_FUZZ`` is the number of networks (200 by default), ``UNET_RT_FUZZ_SEED`` the first seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from drawn_networks import Drawing, draw_network

from unet_rt.graph.analysis import analyse, analyse_model
from unet_rt.graph.file import read_graph
from unet_rt.graph.free import free_spatial
from unet_rt.graph.report import GraphReport, inspect

pytest.importorskip("onnxruntime")
tiles_and_whole = pytest.importorskip("tiles_and_whole")

COUNT = int(os.environ.get("UNET_RT_FUZZ", "200"))
FIRST = int(os.environ.get("UNET_RT_FUZZ_SEED", "0"))
EXACT_SHARE = 0.4
LARGEST = 640  # canvas in pixels that is still run


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


def verdict(model: onnx.ModelProto, traits: str) -> str:
    """``exact``, ``not exact`` or ``untested`` (nothing of it can be); raises where exact is not true."""
    report = inspect(model)
    if not report.exact:
        assert report.outputs[0].reasons, f"{traits}: not exact, and no reason"
        return "not exact"
    session, tested = tiles_and_whole.session_of(model), 0
    for tile, canvas in arrangements(report):
        error = tiles_and_whole.largest_difference(report, session, tile, canvas)
        assert error <= report.rounding(canvas), (
            f"{traits}: tiles of {tile} px differ by {error:.2g} on a canvas of {canvas} px, and it is "
            f"called exact: {report.sizes}"
        )
        tested += 1
    return "exact" if tested else "untested"


def reflected(d: Drawing) -> str:
    """A tile hardly larger than a reflecting pad brought one of its edges to the other."""
    w, bias = d.const(d.weights(2, 2, 2, 2), np.float32), d.const([-0.3, -0.1], np.float32)
    y = d.node("Conv", "x", w, bias, kernel_shape=[2, 2], auto_pad="SAME_LOWER")
    return d.node("Pad", y, d.const([0, 0, 2, 3, 0, 0, 3, 0]), mode="reflect")


# Seeds of networks that the analysis could not read.
FOUND = {83: "one size gave an output with axes of the image, the next one without"}


@pytest.mark.onnxruntime
@pytest.mark.parametrize("seed", FOUND)
def test_what_could_not_be_read_once_is_not_exact(seed: int) -> None:
    assert verdict(*draw_network(seed)) == "not exact"


@pytest.mark.onnxruntime
def test_what_was_called_exact_once_and_was_not_stays_right() -> None:
    d = Drawing(np.random.default_rng(0))
    assert verdict(d.model(reflected(d)), "a reflecting pad") in ("exact", "not exact")


@pytest.mark.onnxruntime
def test_exact_is_true_of_drawn_networks() -> None:
    found = []
    for seed in range(FIRST, FIRST + COUNT):
        model, traits = draw_network(seed)
        found.append(verdict(model, f"seed {seed} ({traits})"))
    assert found.count("exact") >= EXACT_SHARE * len(found), {word: found.count(word) for word in set(found)}


def baked(model: onnx.ModelProto, size: Sequence[int]) -> onnx.ModelProto:
    """The model as exporters write it at one size: what it computes from its size is a constant."""
    tensors = analyse(read_graph(model)).walk(size).tensors
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for dim, n in zip(result.graph.input[0].type.tensor_type.shape.dim, (1, 2, *size), strict=True):
        dim.dim_value = n
    del result.graph.node[:]
    for node in model.graph.node:
        known = [(name, tensors[name].value if name in tensors else None) for name in node.output]
        if all(isinstance(value, np.ndarray) for _, value in known):
            result.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v), name) for name, v in known)
        else:
            result.graph.node.append(node)
    return result


@pytest.mark.onnxruntime
def test_what_is_freed_of_drawn_networks_is_exact() -> None:
    """Exported at one size, and called exact by what is rewritten: the same bits there, and tiles equal the whole."""
    freed = rewritten = 0
    for seed in range(FIRST, FIRST + COUNT // 4):
        model, traits = draw_network(seed)
        size = (96, 72) if seed % 2 else (64, 128)
        fixed = baked(model, size)
        analysis, source = analyse_model(fixed)
        if not all(o.exact for o in analysis.outputs) or any(s.fixed is not None for s in analysis.sizes):
            continue
        free = free_spatial(fixed)[0]
        freed += free is not fixed
        rewritten += source is not fixed
        image = {"x": np.random.default_rng(seed).normal(size=(1, 2, *size)).astype(np.float32)}
        a, b = (tiles_and_whole.session_of(one).run(None, image)[0] for one in (fixed, free))
        assert np.array_equal(a, b), f"seed {seed} ({traits}): freed, it is another network at {size} px"
        verdict(free, f"seed {seed} ({traits}), freed from {size} px")
    assert freed >= EXACT_SHARE / 2 * (COUNT // 4)
    assert rewritten or COUNT < 100
