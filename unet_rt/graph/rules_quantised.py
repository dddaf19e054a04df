"""What quantised operators do to stride, halo and exactness: what those that they stand for do, by numbers that are fixed.

ONNX's own ``QLinearConv`` and ``ConvInteger`` stand with the other windows, matrix products with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .file import Node
from .tensor import ALL, RULES, Inputs, Tensor, Walk, first_input, rule, unknown

# (operator that it stands for, positions of the tensors, position of the result's zero point)
_STANDS_FOR: dict[str, tuple[str, tuple[int, ...], int]] = {
    "QLinearAdd": ("Add", (0, 3), 7),
    "QLinearMul": ("Mul", (0, 3), 7),
    "QLinearSigmoid": ("Sigmoid", (0,), 4),
    "QLinearLeakyRelu": ("LeakyRelu", (0,), 4),
    "QLinearAveragePool": ("AveragePool", (0,), 4),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,), 4),
    "QLinearReduceMean": ("ReduceMean", (0,), 4),
    "QLinearSoftmax": ("Softmax", (0,), 4),
    "QLinearWhere": ("Where", (0, 1, 4), 8),
    "QGemm": ("Gemm", (0, 3), 8),
    "MatMulIntegerToFloat": ("MatMul", (0, 1), -1),
}
_FLOAT = 1


def _numbers_vary(x: Inputs, tensors: Sequence[int]) -> bool:
    """Whether a scale or zero point comes from the image."""
    return any(t is not None and not t.constant for k, t in enumerate(x) if k not in tensors)


@rule(*_STANDS_FOR, pixels=ALL)
def _quantised(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    op, tensors, zero = _STANDS_FOR[node.op]
    if node.attributes.get("channels_last", 0):
        return unknown(state, node, x, "works on channels that come last, which is not followed")
    given = [x[k] for k in tensors if k < len(x)]
    if op == "Gemm" and len(x) > 6:
        given.append(x[6])
    here = replace(node, op=op)
    if op == "Softmax" and int(node.attributes.get("opset", 13)) < 13 <= state.graph.opset:
        return unknown(state, node, x, "normalises as an older opset does, which is not followed")
    results = RULES[op].apply(state, here, given)
    point = x[zero] if 0 <= zero < len(x) else None
    dtype = point.dtype if point is not None else _FLOAT
    results = [replace(t, dtype=dtype) for t in results]
    if _numbers_vary(x, [*tensors, 6] if op == "Gemm" else tensors) and not _at_fault(x):
        return unknown(state, node, x, "takes its scale from the image")
    return results


def _at_fault(x: Inputs) -> bool:
    """Whether what varies is at fault already: one reason is enough."""
    return any(t is not None and t.faults for t in x)


@rule("QLinearConcat", pixels=ALL)
def _concat(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    tensors = range(2, len(x), 3)
    if _numbers_vary(x, tensors):
        return unknown(state, node, x, "takes its scale from the image")
    (result,) = RULES["Concat"].apply(state, replace(node, op="Concat"), [x[k] for k in tensors])
    return [replace(result, dtype=x[1].dtype if x[1] is not None else first_input(x[2:]).dtype)]


@rule("DynamicQuantizeMatMul", pixels=ALL)
def _dynamic(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    (result,) = RULES["MatMul"].apply(state, replace(node, op="MatMul"), x[:2])
    fault = state.remark(node, "takes its range from all pixels of the tile")
    return [replace(result, dtype=_FLOAT, faults=result.faults | {fault})]
