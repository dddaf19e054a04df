"""The network of the paper (Ronneberger et al., 2015) with drawn weights: a graph of its size where none is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LEVELS = 5
CLASSES = 2
SEED = 0
MARGINS = (88, 40, 16, 4)  # px that a skip loses on every side, the finest first


class _Drawing:
    """Nodes and weights as they are drawn."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(SEED)
        self._count = 0

    def constant(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        self._count += 1
        self.nodes.append(helper.make_node(kind, list(inputs), [f"t{self._count}"], **attributes))
        return f"t{self._count}"

    def conv(self, x: str, wide: int, out: int, side: int, kind: str = "Conv") -> str:
        """A convolution whose weights keep the spread of values (He et al., 2015)."""
        shape = (wide, out, side, side) if kind == "ConvTranspose" else (out, wide, side, side)
        fan = wide if kind == "ConvTranspose" else wide * side * side
        weight = self._random.normal(0, np.sqrt(2 / fan), shape).astype(np.float32)
        strides = [2, 2] if kind == "ConvTranspose" else [1, 1]
        bias = self.constant(np.zeros(out, np.float32))
        return self.add(kind, x, self.constant(weight), bias, kernel_shape=[side, side], strides=strides)

    def double(self, x: str, wide: int, out: int) -> str:
        for channels in (wide, out):
            x = self.add("Relu", self.conv(x, channels, out, 3))
        return x


def write_paper(path: Path, width: int = 64) -> None:
    """Writes the paper's network as ONNX: 572 px become 388, without padding; free sizes and batches.

    Args:
        path: Where to write.
        width: Channels of the first level; the paper has 64 (31 million weights).
    """
    d = _Drawing()
    x, wide, skips = "x", 1, list[str]()
    for level in range(LEVELS):
        if level:
            x = d.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        x = d.double(x, wide, width << level)
        wide = width << level
        skips.append(x)
    for level in reversed(range(LEVELS - 1)):
        x = d.conv(x, wide, wide // 2, 2, "ConvTranspose")
        margin = MARGINS[level]
        ends = [d.constant(np.array([n, n], np.int64)) for n in (margin, -margin)]
        skip = d.add("Slice", skips[level], *ends, d.constant(np.array([2, 3], np.int64)))
        x = d.double(d.add("Concat", skip, x, axis=1), wide, wide // 2)
        wide //= 2
    d.nodes[-1].output[0] = x = "features"
    d.nodes.append(
        helper.make_node("Conv", [x, d.constant(head_weights(width)), d.constant(np.zeros(CLASSES, np.float32))], ["y"])
    )
    graph = helper.make_graph(
        d.nodes,
        "paper",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES, "u", "v"])],
        d.weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def head_weights(width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Weights of the last convolution."""
    drawn = np.random.default_rng(SEED + 1).normal(0, np.sqrt(1 / width), (CLASSES, width, 1, 1))
    return drawn.astype(np.float32)
