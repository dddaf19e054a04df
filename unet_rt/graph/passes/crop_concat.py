"""A centre crop and a concatenation as one node ``unet_rt::CropConcat``, for backends that have a kernel of ours for it.

Cases: a Concat along the channels of two 2-D feature maps (N, C, H, W), whose first is cut by one or several Slices with
constant bounds, step 1, along H and W only, by as much on both sides (or one sample less in front: the centre is rounded
down): rewritten. Crops computed from shapes, maps that are not cut, 1-D and 3-D ones: left alone.

No other backend knows the node, so the rewritten graph goes nowhere but into a plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .fold import refill

if TYPE_CHECKING:
    import onnx


DOMAIN, OPERATOR = "unet_rt", "CropConcat"
_FARTHEST = 1 << 31  # exporters write "to the end" as a number of this size or more


def crop_concat(model: onnx.ModelProto) -> int:
    """Rewrites ``model`` in place; returns the number of nodes written (0 when called again)."""
    from onnx import helper, shape_inference

    graph = model.graph
    shapes = {
        value.name: [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
        for value in shape_inference.infer_shapes(model).graph.value_info
        if value.type.tensor_type.HasField("shape")
    }
    constants = _constants(model)
    producers = {name: node for node in graph.node for name in node.output}
    count = 0
    for index, node in enumerate(graph.node):
        if node.op_type != "Concat" or len(node.input) != 2 or _attribute(node, "axis") not in (1, -3):
            continue
        if any(len(shapes.get(name, ())) != 4 for name in node.input):
            continue
        skip = _uncrop(node.input[0], producers, constants, shapes)
        if skip is None:
            continue
        graph.node[index].CopyFrom(
            helper.make_node(
                OPERATOR,
                [skip, node.input[1]],
                list(node.output),
                name=node.name,
                domain=DOMAIN,
                plugin_namespace=DOMAIN,
                plugin_version="1",
                aot=1,
            )
        )
        count += 1
    if count:
        if all(entry.domain != DOMAIN for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        _drop_unused_slices(model)
    return count


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def _constants(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Small integers, by name: bounds of Slices."""
    from onnx import numpy_helper

    tensors = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensors[node.output[0]] = value
    found = {}
    for name, tensor in tensors.items():
        if tensor.data_type in (tensor.INT32, tensor.INT64) and len(tensor.dims) <= 1:
            found[name] = [int(n) for n in np.atleast_1d(numpy_helper.to_array(tensor))]
    return found


def _uncrop(
    name: str,
    producers: dict[str, onnx.NodeProto],
    constants: dict[str, list[int]],
    shapes: dict[str, list[int | None]],
) -> str | None:
    """The tensor that ``name`` is the centre of, None if it is not a centre crop."""
    cut = {2: [0, 0], 3: [0, 0]}  # samples in front and behind, per axis
    while (node := producers.get(name)) is not None and node.op_type == "Slice" and len(node.input) > 2:
        bounds = [constants.get(given) for given in node.input[1:]]
        sizes = shapes.get(node.input[0], [None] * 4)
        if any(b is None for b in bounds) or len(sizes) != 4:
            return None
        starts, ends, axes, steps = _fill([b for b in bounds if b is not None])
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            behind = _behind(end, sizes[axis])
            if axis % 4 not in cut or step != 1 or start < 0 or behind is None:
                return None
            cut[axis % 4][0] += start
            cut[axis % 4][1] += behind
        name = node.input[0]
    if any(behind - front not in (0, 1) for front, behind in cut.values()):
        return None
    return name if any(map(any, cut.values())) else None


def _fill(bounds: list[list[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Starts, ends, axes and steps of a Slice; the last two may be left out."""
    starts, ends, *more = bounds
    axes = more[0] if more else list(range(len(starts)))
    return starts, ends, axes, more[1] if len(more) > 1 else [1] * len(starts)


def _behind(end: int, size: int | None) -> int | None:
    """Samples that a Slice leaves out at the end of an axis, None if that depends on a size that is not known."""
    if end < 0:
        return -end
    if end >= _FARTHEST:
        return 0
    return None if size is None else max(size - end, 0)


def _drop_unused_slices(model: onnx.ModelProto) -> None:
    while True:
        used = {name for node in model.graph.node for name in node.input} | {v.name for v in model.graph.output}
        kept = [n for n in model.graph.node if n.op_type != "Slice" or used.intersection(n.output)]
        if len(kept) == len(model.graph.node):
            return
        refill(model.graph.node, kept)
