"""Crops of a fixed-size export, counted from the far edge, so that they fit other sizes, too.

An unpadded U-Net crops a skip connection to the up-sampled tensor beside it. Exported at one size, the crop is a Slice
with constants for both ends: samples 4 to 60 of 64. Skip and up-sampled tensor grow alike with the image, so what is
constant at every size is the number of samples left out at either end: 4 to -4. At the size of the export both say the
same; whether the network is the same at other sizes is for the caller to prove.

Cases: Slice with constant starts, ends and axes, no steps but 1, whose input has a known size, along axes 2 and beyond,
that ends before the last sample, and whose result goes into a Concat, by way of other such Slices or not: rewritten.
Everything else is left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def free_crops(model: onnx.ModelProto) -> int:
    """Rewrites ``model`` in place; returns the number of nodes rewritten (0 when called again)."""
    from onnx import numpy_helper, shape_inference

    try:
        inferred = shape_inference.infer_shapes(model).graph
    except Exception:  # noqa: BLE001 - its C++ raises what it likes on bad graphs, which nothing can be read from
        return 0
    sizes = {v.name: _shape(v) for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    constants = {t.name: t for t in model.graph.initializer if t.dims == [] or len(t.dims) == 1}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def feeds_concat(name: str) -> bool:
        return bool(readers.get(name)) and all(
            node.op_type == "Concat" or (node.op_type == "Slice" and feeds_concat(node.output[0]))
            for node in readers[name]
        )

    def numbers(name: str) -> list[int] | None:
        return [int(n) for n in numpy_helper.to_array(constants[name]).reshape(-1)] if name in constants else None

    count = 0
    for node in model.graph.node:
        if node.op_type != "Slice" or len(node.input) < 4 or not feeds_concat(node.output[0]):
            continue
        starts, ends, axes = (numbers(name) for name in node.input[1:4])
        steps = numbers(node.input[4]) if len(node.input) > 4 and node.input[4] else [1]
        shape = sizes.get(node.input[0])
        if starts is None or ends is None or axes is None or steps is None or set(steps) != {1} or shape is None:
            continue
        new = [_from_the_far_edge(end, axis, shape) for end, axis in zip(ends, axes, strict=True)]
        if new == ends:
            continue
        for k, values in enumerate((starts, new, axes, steps if len(node.input) > 4 else []), start=1):
            if values:  # all of them, since their integer types must agree
                node.input[k] = f"{node.output[0]}/slice_{k}"
                model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), node.input[k]))
        count += 1
    return count


def _from_the_far_edge(end: int, axis: int, shape: list[int | None]) -> int:
    axis = axis + len(shape) if axis < 0 else axis
    size = shape[axis] if axis < len(shape) else None
    return end - size if axis >= 2 and size is not None and 0 < end < size else end


def _shape(value: onnx.ValueInfoProto) -> list[int | None]:
    return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
