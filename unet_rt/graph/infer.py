"""Shapes of a node's outputs by ONNX's own inference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference

from .constants import Array
from .file import Node, declared


def infer_shapes(
    node: Node, inputs: list[tuple[int, tuple[int, ...], Array | None] | None], opsets: Mapping[str, int]
) -> list[tuple[int, tuple[int, ...]] | None]:
    """(dtype, shape) of a node's outputs by ONNX's own rule; None where it does not know.

    Args:
        node: The node.
        inputs: Per input its dtype, shape and (small constants) its value; None where absent.
        opsets: Versions by domain.
    """
    try:  # without following numbers from node to node, which takes as long as the numbers are large
        inferred = onnx.shape_inference.infer_shapes(_alone(node, inputs, opsets))
    except Exception:  # noqa: BLE001 - its C++ raises what it likes on bad graphs; what it does not know is not known
        return [None] * len(node.outputs)
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for v in [*inferred.graph.output, *inferred.graph.value_info]:
        value = declared(v)
        if value.shape is not None and all(d is not None for d in value.shape):
            found[v.name] = (value.dtype, tuple(d for d in value.shape if d is not None))
    return [found.get(name) for name in node.outputs]


def _alone(
    node: Node, inputs: list[tuple[int, tuple[int, ...], Array | None] | None], opsets: Mapping[str, int]
) -> onnx.ModelProto:
    """A model of one node."""
    values, tensors = [], []
    for name, given in zip(node.inputs, inputs, strict=True):
        if not name or given is None:
            continue
        dtype, shape, array = given
        if array is not None:
            tensors.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(shape), name))
        else:
            values.append(onnx.helper.make_tensor_value_info(name, dtype, shape))
    outputs = [onnx.ValueInfoProto(name=name) for name in node.outputs if name]
    graph = onnx.helper.make_graph([node.proto], "node", values, outputs, initializer=tensors)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return onnx.helper.make_model(graph, opset_imports=imports)
