"""What element-wise operators, norms, reductions and products do to stride, halo and exactness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import constants
from .file import Node
from .numbers import Remark
from .tensor import (
    ALL,
    CannotRun,
    Inputs,
    Tensor,
    Walk,
    axis_size,
    broadcast,
    first_input,
    is_tracked,
    plain,
    rule,
    unknown,
    value_of,
)

_BOOLEAN = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf")


@rule(
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Elu", "Erf",
    "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal",
    "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan",
    "Tanh", "ThresholdedRelu", "IsNaN", "IsInf", "FastGelu", "QuickGelu",
)  # fmt: skip
def _unary(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    if any(t is not None and not t.constant for t in x[1:]):
        return unknown(state, node, x, "takes its bounds from the image")
    return [Tensor(first.axes, 9 if node.op in _BOOLEAN else first.dtype)]


@rule("Dropout")
def _dropout(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    training = value_of(x[2]) if len(x) > 2 else None
    first = first_input(x)
    if len(x) > 2 and x[2] is not None and (training is None or bool(training)):
        text = "drops at random: the network was exported in training mode"
        state.trained.append(f"{node} {text}")
        return unknown(state, node, x, text)
    return [Tensor(first.axes, first.dtype), Tensor(first.axes, 9)][: len(node.outputs)]


@rule(
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "Mod", "BitShift", "BitwiseAnd", "BitwiseOr",
    "BitwiseXor", "BitwiseNot", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor",
    "PRelu", "BiasGelu", pixels=ALL,
)  # fmt: skip
def _elementwise(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    return [broadcast(state, node, [t for t in x if t is not None], 9 if node.op in _BOOLEAN else None)]


@rule("Where", pixels=ALL)
def _where(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    given = [t for t in x if t is not None]
    return [broadcast(state, node, given, given[1].dtype)]


@rule("Cast")
def _cast(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    return [Tensor(first_input(x).axes, int(node.attributes["to"]))]


@rule("CastLike", pixels=ALL)
def _cast_like(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    return [Tensor(first_input(x).axes, x[1].dtype if x[1] is not None else 1)]


@rule("QuantizeLinear", "DequantizeLinear")
def _quantize(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    if any(t is not None and not t.constant for t in x[1:]):
        return unknown(state, node, x, "takes its scale from the image")
    if node.op == "DequantizeLinear":
        return [Tensor(first.axes, x[1].dtype if x[1] is not None else 1)]
    zero = x[2] if len(x) > 2 else None
    return [Tensor(first.axes, zero.dtype if zero is not None else int(node.attributes.get("output_dtype", 0)) or 2)]


@rule("DynamicQuantizeLinear")
def _dynamic_quantize(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    fault = frozenset({state.remark(node, "takes its range from all pixels of the tile")})
    return [Tensor(first_input(x).axes, 2, faults=fault), Tensor((), 1, faults=fault), Tensor((), 2, faults=fault)]


@rule("BatchNormalization")
def _batch_norm(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    texts = []
    if node.attributes.get("training_mode", 0) or len([o for o in node.outputs if o]) > 1:
        texts.append("takes its statistics from the batch: the network was exported in training mode")
        state.trained.append(f"{node} {texts[0]}")
    return [Tensor(first.axes, first.dtype, faults=frozenset(state.remark(node, t) for t in texts))]


# --------------------------------------------------------------------------------------- statistics over some axes


def _spread(t: Tensor, axes: Sequence[int]) -> bool:
    """Whether any of ``axes`` follows the image."""
    return t.axes is not None and any(is_tracked(t.axes[a % t.rank]) for a in axes)


def _normalize(state: Walk, node: Node, x: Tensor, axes: Sequence[int], text: str) -> list[Tensor]:
    faults = frozenset({state.remark(node, text)}) if _spread(x, axes) else frozenset()
    return [Tensor(x.axes, x.dtype, faults=faults)]


@rule("InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization", "GroupNorm")
def _instance_norm(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    axes = range(2, first.rank)
    if node.op == "MeanVarianceNormalization":
        axes = node.attributes.get("axes", [0, 2, 3])
    elif node.op == "GroupNorm":
        axes = range(first.rank)
    return _normalize(state, node, first, axes, "normalises by mean and deviation over the whole image")


@rule("LayerNormalization", "RMSNormalization")
def _layer_norm(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    axis = int(node.attributes.get("axis", -1)) % first.rank
    return _normalize(
        state, node, first, range(axis, first.rank), "normalises by mean and deviation over the whole image"
    )


@rule("LpNormalization")
def _lp_norm(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    return _normalize(
        state, node, first_input(x), [int(node.attributes.get("axis", -1))], "normalises over the whole image"
    )


@rule("LRN")
def _lrn(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    return _normalize(state, node, first_input(x), [1], "normalises over neighbours in space")


@rule("Softmax", "LogSoftmax", "Hardmax")
def _softmax(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    if state.graph.opset >= 13:
        axes: Sequence[int] = [int(node.attributes.get("axis", -1))]
        text = "normalises over the whole image"
    else:
        axes = range(int(node.attributes.get("axis", 1)) % first.rank, first.rank)
        text = f"of opset {state.graph.opset} normalises over all axes from its axis on, space among them"
    return _normalize(state, node, first, axes, text)


@rule("CumSum")
def _cumsum(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    axis = value_of(x[1])
    first = first_input(x)
    axes = range(first.rank) if axis is None else [int(axis.reshape(()))]
    return _normalize(state, node, first, axes, "sums up along the image")


@rule(
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip
def _reduce(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    if len(x) > 1 and x[1] is not None and value_of(x[1]) is None:
        return unknown(state, node, x, "reduces over axes that depend on the image")
    axes = constants.axes_of(node.attributes, [None, *(value_of(t) for t in x[1:])], 1)
    if not axes:
        if node.attributes.get("noop_with_empty_axes", 0):
            return [first]
        axes = tuple(range(first.rank))
    return [_reduce_axes(state, node, first, axes, bool(node.attributes.get("keepdims", 1)), first.dtype)]


def _reduce_axes(state: Walk, node: Node, x: Tensor, axes: Sequence[int], keep: bool, dtype: int) -> Tensor:
    over = {a % x.rank for a in axes}
    faults: frozenset[Remark] = frozenset()
    if _spread(x, list(over)):
        faults = frozenset({state.remark(node, "reduces over the whole image")})
    left = [plain(1) if k in over else a for k, a in enumerate(x.axes or ()) if keep or k not in over]
    return Tensor(tuple(left), dtype, faults=faults)


@rule("ArgMax", "ArgMin")
def _argmax(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    a = node.attributes
    return [_reduce_axes(state, node, first_input(x), [int(a.get("axis", 0))], bool(a.get("keepdims", 1)), 7)]


@rule("TopK")
def _topk(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, k = first_input(x), value_of(x[1])
    axis = int(node.attributes.get("axis", -1)) % first.rank
    if k is None or _spread(first, [axis]):
        return unknown(state, node, x, "picks the largest values of the whole image")
    axes = tuple(plain(int(k.ravel()[0])) if n == axis else a for n, a in enumerate(first.axes or ()))
    return [Tensor(axes, first.dtype), Tensor(axes, 7)]


# -------------------------------------------------------------------------------------------------- matrix products


@rule("MatMul", "MatMulInteger", pixels=(0, 1))
@rule("QLinearMatMul", pixels=(0, 3))
def _matmul(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    a, b = first_input(x), x[3] if node.op == "QLinearMatMul" else x[1]
    if b is None or a.rank < 2 or b.rank < 2:
        return unknown(state, node, x, "multiplies vectors")
    ax, bx = a.axes or (), b.axes or ()
    if axis_size(ax[-1]) != axis_size(bx[-2]):
        raise CannotRun(f"multiplies {axis_size(ax[-1])} columns by {axis_size(bx[-2])} rows")
    texts = []
    if is_tracked(ax[-1]) or is_tracked(bx[-2]):
        texts.append("sums over the whole image (attention over space)")
    if is_tracked(ax[-2]) and is_tracked(bx[-1]):
        texts.append("relates every position to every other (attention over space)")
    given = [replace(t, axes=(plain(1), *t.axes[:-2]), value=None) for t in (a, b) if t.axes is not None]
    batch = broadcast(state, node, given)
    axes = (*(batch.axes or ())[1:], ax[-2], bx[-1])
    if not (is_tracked(ax[-2]) and is_tracked(bx[-1])):
        state.macs(axis_size(ax[-1]) if not is_tracked(ax[-1]) else 1, axes)
    dtype = 6 if node.op == "MatMulInteger" else a.dtype
    return [Tensor(axes, dtype, faults=batch.faults | {state.remark(node, t) for t in texts})]


@rule("Gemm", pixels=ALL)
def _gemm(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    a, b = first_input(x), x[1]
    if b is None or a.rank != 2 or b.rank != 2:
        raise CannotRun("needs two matrices")
    ax = (a.axes or ())[::-1] if node.attributes.get("transA", 0) else a.axes or ()
    bx = (b.axes or ())[::-1] if node.attributes.get("transB", 0) else b.axes or ()
    if axis_size(ax[1]) != axis_size(bx[0]):
        raise CannotRun(f"multiplies {axis_size(ax[1])} columns by {axis_size(bx[0])} rows")
    texts = []
    if is_tracked(ax[1]) or is_tracked(bx[0]):
        texts.append("sums over the whole image")
    if is_tracked(ax[0]) and is_tracked(bx[1]):
        texts.append("relates every position to every other")
    state.macs(axis_size(ax[1]) if not is_tracked(ax[1]) else 1, (ax[0], bx[1]))
    result = Tensor((ax[0], bx[1]), a.dtype, faults=frozenset(state.remark(node, t) for t in texts))
    if len(x) > 2 and x[2] is not None:
        return [replace(broadcast(state, node, [result, x[2]]), faults=result.faults)]
    return [result]


@rule("Attention", pixels=ALL)
def _attention(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    q, v = first_input(x), x[2]
    if v is None or node.domain or q.rank not in (3, 4) or len(x) > 3:
        return unknown(state, node, x, "attends over positions")
    spread = any(t is not None and _spread(t, [t.rank - 2]) for t in x)
    faults = frozenset({state.remark(node, "attends over the whole image")}) if spread else frozenset()
    return [Tensor((*(q.axes or ())[:-1], (v.axes or ())[-1]), q.dtype, faults=faults)]
