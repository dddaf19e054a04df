"""A float16 or bfloat16 graph in float32: every number that it holds, exactly, and arithmetic that rounds less.

Cases: initialisers, constants and the declared types of inputs, outputs and tensors, in branches, too; casts to the half
type become casts to float32, and those from one float type to the same are gone over by whoever runs them. Local functions
are inlined first. Integers, float32 and float64 are left alone.

Infinity is infinity, and the largest number of the half type, to which converters cut what it cannot hold, stays it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .half import RECORD

if TYPE_CHECKING:
    import onnx


def widen(model: onnx.ModelProto) -> int:
    """Rewrites ``model`` in place, its weights inside; returns the number of tensors and types changed (0: none)."""
    from onnx import TensorProto, inliner

    halves: set[int] = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    if model.functions:
        model.CopyFrom(inliner.inline_local_functions(model))
    count = _widen_graph(model.graph, halves)
    if count:
        del model.graph.value_info[:]
        for k in reversed(range(len(model.metadata_props))):
            if model.metadata_props[k].key == RECORD:  # of what is undone here
                del model.metadata_props[k]
    return count


def _widen_graph(graph: onnx.GraphProto, halves: set[int]) -> int:
    from onnx import TensorProto

    count = sum(_widen_tensor(t, halves) for t in graph.initializer)
    count += sum(_widen_tensor(t.values, halves) for t in graph.sparse_initializer)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in halves:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            count += 1
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == attribute.TENSOR:
                count += _widen_tensor(attribute.t, halves)
            elif attribute.type == attribute.INT and attribute.name in ("to", "dtype", "output_dtype"):
                if attribute.i in halves:
                    attribute.i = TensorProto.FLOAT
                    count += 1
            elif attribute.type in (attribute.GRAPH, attribute.GRAPHS):
                inner = [attribute.g] if attribute.type == attribute.GRAPH else attribute.graphs
                count += sum(_widen_graph(g, halves) for g in inner)
    return count


def _widen_tensor(tensor: onnx.TensorProto, halves: set[int]) -> int:
    from onnx import numpy_helper

    if tensor.data_type not in halves:
        return 0
    values: Any = np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return 1
