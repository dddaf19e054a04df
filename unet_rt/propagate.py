"""One walk through a graph at one concrete size: for every tensor what its samples depend on.

A tensor is a constant (weights, shape arithmetic) or a field. Each tensor axis is a row-major product of parts: a
:class:`~unet_rt.line.Line` follows a spatial axis of the input, a plain part (an ``int``) does not. Reshapes and
transposes move parts about; the rules below say what every operator does to them. What no rule covers is a node at
fault: the walk goes on as far as shapes are known, and everything behind the node is not exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from . import line as lines
from . import onnx_file, shapes
from .errors import size_text
from .line import Line, Sampling
from .onnx_file import Constant, Graph, Node
from .shapes import Array

Part = Line | int
Axis = tuple[Part, ...]
# A sentence about a node, with the node's place in the graph to sort by.
Remark = tuple[int, str]


def part_size(part: Part) -> int:
    return part.size if isinstance(part, Line) else part


def axis_size(axis: Axis) -> int:
    return math.prod(part_size(p) for p in axis)


def plain(size: int) -> Axis:
    return (size,)


def tracked(axis: Axis) -> bool:
    return any(isinstance(p, Line) for p in axis)


def sole_line(axis: Axis) -> Line | None:
    """The line that the axis consists of, if it is nothing else."""
    parts = [p for p in axis if isinstance(p, Line) or p != 1]
    return parts[0] if len(parts) == 1 and isinstance(parts[0], Line) else None


@dataclass(frozen=True)
class Tensor:
    """What is known of a tensor.

    Attributes:
        axes: Its axes, or None where even the shape is unknown.
        dtype: ONNX element type.
        constant: It does not depend on pixels.
        value: Its value, for small constants; initialisers are read from the file when somebody looks.
        sized: A constant computed from the image's size.
        faults, notes: Remarks about all nodes on the way here.
        pooled: For the indices of a MaxPool without overlap and padding: kernel per spatial axis.
    """

    axes: tuple[Axis, ...] | None
    dtype: int = 1
    constant: bool = False
    value: Array | Constant | None = None
    sized: bool = False
    faults: frozenset[Remark] = frozenset()
    notes: frozenset[Remark] = frozenset()
    pooled: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        if self.axes is None:
            raise CannotRun("its shape is unknown")
        return tuple(axis_size(a) for a in self.axes)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def bytes(self) -> int:
        return 0 if self.axes is None else math.prod(self.shape) * shapes.ELEMENT_BYTES.get(self.dtype, 4)

    def lines(self) -> list[Line]:
        return [p for axis in self.axes or () for p in axis if isinstance(p, Line)]


class CannotRun(Exception):
    """The graph cannot run at this size. Raised and caught by the walk, never shown."""


@dataclass
class Walk:
    """State and results of one walk.

    Attributes:
        tensors: Every tensor by name.
        broken: Why the graph cannot run at this size (empty if it can).
        dropped: Samples per spatial axis behind the last window of some pooling or convolution.
        density: Multiply-accumulates per input pixel, in the limit of a large image.
        numbers: Constants computed from the size that take part in pixel arithmetic, by node.
        order: The nodes as walked, with subgraphs inlined.
    """

    graph: Graph
    sizes: tuple[int, ...]
    global_pools: frozenset[str] = frozenset()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    dropped: dict[int, int] = field(default_factory=dict)
    density: float = 0.0
    numbers: dict[str, bytes] = field(default_factory=dict)
    order: list[Node] = field(default_factory=list)
    whole_pools: set[str] = field(default_factory=set)

    def remark(self, node: Node, text: str) -> Remark:
        return node.index, f"{node} {text}"

    def drop(self, line: Line, count: int) -> None:
        if count:
            self.dropped[line.source] = self.dropped.get(line.source, 0) + count

    def macs(self, per_sample: float, axes: Sequence[Axis]) -> None:
        """Count ``per_sample`` multiply-accumulates for every element of ``axes``."""
        count = float(per_sample)
        followed: set[int] = set()
        for axis in axes:
            for part in axis:
                if isinstance(part, Line):
                    count *= float(part.scale)
                    followed.add(part.source)
                else:
                    count *= part
        # What is computed once per image, or once per row, costs nothing in the limit of a large image.
        if len(followed) == len(self.sizes):
            self.density += count


Inputs = list["Tensor | None"]
Rule = Callable[[Walk, Node, Inputs], "list[Tensor]"]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


def walk(
    graph: Graph,
    inputs: Mapping[str, tuple[Axis, ...]],
    sizes: tuple[int, ...],
    global_pools: frozenset[str] = frozenset(),
    strict: bool = False,
) -> Walk:
    """Propagate through ``graph`` at concrete ``sizes``.

    Args:
        graph: The graph.
        inputs: Axes of every graph input.
        sizes: Size per spatial axis.
        global_pools: Pooling nodes whose kernel is the size that the graph was exported with.
        strict: Stop where the graph cannot run, with no tensors behind that.
    """
    state = Walk(graph, sizes, global_pools)
    for value in graph.inputs:
        state.tensors[value.name] = Tensor(inputs[value.name], value.dtype)
    for name, constant in graph.constants.items():
        state.tensors[name] = _constant(constant)
    for node in graph.nodes:
        _step(state, node)
        if strict and state.broken:
            break
    return state


def _constant(constant: Constant) -> Tensor:
    axes = tuple(plain(n) for n in constant.shape)
    return Tensor(axes, constant.dtype, constant=True, value=constant)


def value_of(tensor: Tensor | None) -> Array | None:
    """Value of a constant, read from the file if need be; None where unknown or too large."""
    if tensor is None:
        return None
    if isinstance(tensor.value, Constant):
        return tensor.value.value()
    return tensor.value


def known(array: Array, sized: bool = False, inputs: Sequence[Tensor | None] = ()) -> Tensor:
    axes = tuple(plain(n) for n in array.shape)
    faults, notes = _remarks(inputs)
    return Tensor(axes, shapes.element_type(array), True, array, sized, faults, notes)


def _remarks(inputs: Sequence[Tensor | None]) -> tuple[frozenset[Remark], frozenset[Remark]]:
    faults = frozenset[Remark]().union(*(t.faults for t in inputs if t is not None))
    notes = frozenset[Remark]().union(*(t.notes for t in inputs if t is not None))
    return faults, notes


def _step(state: Walk, node: Node) -> None:
    if node.op == "If" and not node.domain:
        _branch(state, node)
        return
    given: Inputs = [state.tensors.get(name) if name else None for name in node.inputs]
    outputs = _outputs(state, node, given)
    faults, notes = _remarks(given)
    constant = all(t is None or t.constant for t in given) and node.op not in _RANDOM
    sized = any(t is not None and t.sized for t in given)
    for name, out in zip(node.outputs, outputs, strict=False):
        if name:
            out = replace(out, faults=out.faults | faults, notes=out.notes | notes)
            if constant and not out.constant:
                out = replace(out, constant=True)
            if constant and sized:
                out = replace(out, sized=True)
            state.tensors[name] = out
    for name in node.outputs[len(outputs) :]:
        if name:
            text = state.remark(node, "has an output that is not understood")
            state.tensors[name] = Tensor(None, faults=faults | {text}, notes=notes)
    state.order.append(node)


_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")


def _outputs(state: Walk, node: Node, given: Inputs) -> list[Tensor]:
    if node.op == "Constant" and not node.domain:
        return [_constant_node(node)]
    if node.op in ("Shape", "Size") and not node.domain and given[0] is not None and given[0].axes is not None:
        return [_shape_of(node, given[0])]
    folded = _fold(node, given)
    if folded is not None:
        return [folded]
    understood = RULES.get(node.op) if node.domain in ("", "com.microsoft") else None
    try:
        if understood is None:
            return _unknown(state, node, given, "is not an operator whose dependence is known")
        if any(t is not None and t.axes is None for t in given):
            return [Tensor(None) for _ in node.outputs]
        return understood(state, node, given)
    except CannotRun as reason:
        state.broken.append(f"{node} {reason}")
    except (ValueError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        # A malformed node must end as "not exact", never as a crash of whoever asked.
        state.broken.append(f"{node} cannot be read: {error}")
    return _unknown(state, node, given, f"does not run at {size_text(state.sizes)}")


def _constant_node(node: Node) -> Tensor:
    proto = node.attributes.get("value")
    if proto is not None and hasattr(proto, "dims"):
        return _constant(Constant(tuple(proto.dims), proto.data_type, proto, None))
    array = onnx_file.constant_attribute(node)
    return Tensor(None, constant=True) if array is None else known(array)


def _shape_of(node: Node, x: Tensor) -> Tensor:
    shape = x.shape
    if node.op == "Size":
        return replace(known(np.asarray(math.prod(shape), np.int64)), sized=bool(x.lines()))
    start, end = node.attributes.get("start", 0), node.attributes.get("end", len(shape))
    part = slice(start, end)
    sized = any(tracked(a) for a in (x.axes or ())[part])
    return replace(known(np.asarray(shape[part], np.int64)), sized=sized)


def _fold(node: Node, given: Inputs) -> Tensor | None:
    """The node as a constant, if all its inputs are known and small."""
    if node.domain or not given or any(t is not None and not t.constant for t in given):
        return None
    if sum(math.prod(t.shape) for t in given if t is not None and t.axes is not None) > shapes.MAX_ELEMENTS:
        return None
    arrays = [value_of(t) for t in given]
    if any(t is not None and a is None for t, a in zip(given, arrays, strict=True)):
        return None
    attributes = dict(node.attributes)
    if node.op == "ConstantOfShape" and "value" in attributes:
        attributes["value"] = onnx_file.constant_attribute(node)
    try:
        result = shapes.evaluate(node.op, attributes, arrays)
    except (ValueError, IndexError, KeyError, TypeError, ZeroDivisionError):
        return None
    return None if result is None else known(result, any(t is not None and t.sized for t in given), given)


def _branch(state: Walk, node: Node) -> None:
    """An If whose condition is known: its branch becomes part of the graph."""
    condition_tensor = state.tensors.get(node.inputs[0])
    condition = value_of(condition_tensor)
    if condition is None or condition.size != 1:
        text = state.remark(node, "chooses its branch by what is in the image")
        faults = (condition_tensor.faults if condition_tensor is not None else frozenset()) | {text}
        for name in node.outputs:
            state.tensors[name] = Tensor(None, faults=faults)
        state.order.append(node)
        return
    branch = node.attributes["then_branch" if bool(condition.reshape(())) else "else_branch"]
    for t in branch.initializer:
        state.tensors[t.name] = _constant(Constant(tuple(t.dims), t.data_type, t, state.graph.folder))
    for inner in onnx_file.subgraph_nodes(branch, set(state.tensors)):
        # Remarks of the branch sort with its If.
        _step(state, replace(inner, index=node.index))
    for name, value in zip(node.outputs, branch.output, strict=True):
        state.tensors[name] = state.tensors[value.name]


def _unknown(state: Walk, node: Node, given: Inputs, text: str) -> list[Tensor]:
    """Outputs of a node at fault: shapes by ONNX's own inference where it knows them, lines as far as sizes match."""
    fault = frozenset({state.remark(node, text)})
    described = [None if t is None or t.axes is None else (t.dtype, t.shape, _small(t)) for t in given]
    inferred: list[tuple[int, tuple[int, ...]] | None] = [None] * len(node.outputs)
    if all(d is not None or t is None for d, t in zip(described, given, strict=True)):
        inferred = onnx_file.infer_shapes(node, described, state.graph.opsets)
    base = next((t for t in given if t is not None and t.axes is not None and t.lines()), None)
    if base is None:
        base = next((t for t in given if t is not None and t.axes is not None and not t.constant), None)
    outputs = []
    for known_shape in inferred:
        if known_shape is not None:
            outputs.append(Tensor(_like(base, known_shape[1]), known_shape[0], faults=fault))
        elif base is not None and node.domain:  # of another domain: most likely element-wise
            outputs.append(Tensor(base.axes, base.dtype, faults=fault))
        else:
            outputs.append(Tensor(None, faults=fault))
    return outputs


def _small(tensor: Tensor) -> Array | None:
    if not tensor.constant or math.prod(tensor.shape) > 1024:
        return None
    return value_of(tensor)


def _like(base: Tensor | None, shape: tuple[int, ...]) -> tuple[Axis, ...]:
    """Axes of ``shape`` with the lines of ``base`` where the sizes say that they go on."""
    if base is None or base.axes is None:
        return tuple(plain(n) for n in shape)
    if len(base.axes) == len(shape):
        return tuple(_rescaled(axis, n) for axis, n in zip(base.axes, shape, strict=True))
    left = list(base.lines())
    axes: list[Axis] = []
    for n in shape:
        match = next((line for line in left if line.size == n), None)
        if match is not None:
            left.remove(match)
        axes.append(plain(n) if match is None else (match,))
    return tuple(axes)


def _rescaled(axis: Axis, size: int) -> Axis:
    if axis_size(axis) == size:
        return axis
    line = sole_line(axis)
    if line is None or size < 2:
        return plain(size)
    if size % line.size == 0:
        return (lines.repeat(line, size // line.size),)
    if line.size % size == 0:
        k = line.size // size
        return (lines.window(line, k, k, 1, 0, size),)
    return plain(size)


# ---------------------------------------------------------------------------------------------------- element-wise


def _merge_axis(state: Walk, node: Node, axes: list[tuple[Axis, Tensor, int]], size: int) -> tuple[Axis, list[str]]:
    """One axis of an element-wise result. Each entry: the axis, its tensor, the axis' number in it."""
    wide = [(a, t, k) for a, t, k in axes if axis_size(a) == size]
    following = [(a, t) for a, t, _ in wide if tracked(a)]
    if not following:
        return plain(size), []
    base, texts = following[0][0], []
    same: list[Axis] = []
    for axis, tensor, k in wide:
        if tracked(axis):
            alike = [p if isinstance(p, int) else None for p in axis] == [
                p if isinstance(p, int) else None for p in base
            ]
            if alike:
                same.append(axis)
            else:
                texts.append("mixes tensors whose axes do not match")
        elif size > 1 and not _uniform(tensor, k):
            if tensor.constant:
                texts.append("uses a constant with spatial extent")
            elif not tensor.faults:
                texts.append("mixes a tensor that follows the image with one that does not")
    parts: list[Part] = []
    for column in zip(*same, strict=True):
        followed = [p for p in column if isinstance(p, Line)]
        if not followed:
            parts.append(column[0])
            continue
        try:
            parts.append(lines.merge(followed))
        except ValueError as reason:
            texts.append(str(reason))
            parts.append(followed[0])
    return tuple(parts), texts


def _uniform(tensor: Tensor, axis: int) -> bool:
    """Whether a constant is the same all along ``axis``."""
    if not tensor.constant:
        return False
    array = value_of(tensor)
    if array is None or array.size > shapes.MAX_ELEMENTS * 16:
        return False
    if array.strides[axis] == 0:
        return True
    first = np.take(array, [0], axis=axis)
    return bool(np.all((array == first) | ((array != array) & (first != first))))


def merged(state: Walk, node: Node, given: Sequence[Tensor], dtype: int | None = None) -> Tensor:
    """Element-wise result of ``given`` under broadcasting."""
    rank = max(t.rank for t in given)
    axes: list[Axis] = []
    texts: list[str] = []
    for k in range(rank):
        here: list[tuple[Axis, Tensor, int]] = []
        for t in given:
            at = k - (rank - t.rank)
            if at >= 0 and t.axes is not None:
                here.append((t.axes[at], t, at))
        size = max(axis_size(a) for a, _, _ in here)
        if any(axis_size(a) == 0 for a, _, _ in here):
            raise CannotRun("has an empty input")
        if any(axis_size(a) not in (1, size) for a, _, _ in here):
            raise CannotRun(f"meets sizes {' and '.join(str(axis_size(a)) for a, _, _ in here)}")
        if size > 1 and any(tracked(a) and axis_size(a) == 1 for a, _, _ in here):
            raise CannotRun("meets a single sample that would be spread over the image")
        axis, found = _merge_axis(state, node, here, size)
        axes.append(axis)
        texts += found
    if any(not t.constant for t in given):
        note_numbers(state, node, given)
    faults = frozenset(state.remark(node, text) for text in texts)
    return Tensor(tuple(axes), given[0].dtype if dtype is None else dtype, faults=faults)


def note_numbers(state: Walk, node: Node, given: Sequence[Tensor]) -> None:
    """Remember constants computed from the size that enter pixel arithmetic: they must not change with the tile."""
    for t in given:
        if t.constant and t.sized:
            array = value_of(t)
            if array is None:
                state.numbers[str(node)] = str(state.sizes).encode()
            elif array.size:
                # One value along axes of the image: merged() has seen to it that they are uniform there.
                corner = array[tuple(slice(0, 1 if n > 64 else n) for n in array.shape)]
                state.numbers[str(node)] = np.ascontiguousarray(corner).tobytes()


_BOOLEAN = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf")


@rule(
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Elu", "Erf",
    "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal",
    "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan",
    "Tanh", "ThresholdedRelu", "IsNaN", "IsInf", "FastGelu", "QuickGelu",
)  # fmt: skip
def _unary(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    if any(t is not None and not t.constant for t in x[1:]):
        return _unknown(state, node, x, "takes its bounds from the image")
    note_numbers(state, node, [t for t in x[1:] if t is not None])
    return [Tensor(first.axes, 9 if node.op in _BOOLEAN else first.dtype)]


def _first(x: Inputs) -> Tensor:
    if not x or x[0] is None:
        raise CannotRun("has no input")
    return x[0]


@rule("Dropout")
def _dropout(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    training = value_of(x[2]) if len(x) > 2 else None
    first = _first(x)
    if len(x) > 2 and x[2] is not None and (training is None or bool(training)):
        return _unknown(state, node, x, "drops at random: the network was exported in training mode")
    return [Tensor(first.axes, first.dtype), Tensor(first.axes, 9)][: len(node.outputs)]


@rule(
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "Mod", "BitShift", "BitwiseAnd", "BitwiseOr",
    "BitwiseXor", "BitwiseNot", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor",
    "PRelu", "BiasGelu",
)  # fmt: skip
def _elementwise(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    return [merged(state, node, [t for t in x if t is not None], 9 if node.op in _BOOLEAN else None)]


@rule("Where")
def _where(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    given = [t for t in x if t is not None]
    return [merged(state, node, given, given[1].dtype)]


@rule("Cast")
def _cast(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    return [Tensor(_first(x).axes, int(node.attributes["to"]))]


@rule("CastLike")
def _cast_like(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    return [Tensor(_first(x).axes, x[1].dtype if x[1] is not None else 1)]


@rule("QuantizeLinear", "DequantizeLinear")
def _quantize(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    if any(t is not None and not t.constant for t in x[1:]):
        return _unknown(state, node, x, "takes its scale from the image")
    if node.op == "DequantizeLinear":
        return [Tensor(first.axes, x[1].dtype if x[1] is not None else 1)]
    zero = x[2] if len(x) > 2 else None
    return [Tensor(first.axes, zero.dtype if zero is not None else int(node.attributes.get("output_dtype", 0)) or 2)]


@rule("DynamicQuantizeLinear")
def _dynamic_quantize(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    fault = frozenset({state.remark(node, "takes its range from all pixels of the tile")})
    return [Tensor(_first(x).axes, 2, faults=fault), Tensor((), 1, faults=fault), Tensor((), 2, faults=fault)]


@rule("BatchNormalization")
def _batch_norm(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    texts = []
    if node.attributes.get("training_mode", 0) or len([o for o in node.outputs if o]) > 1:
        texts.append("takes its statistics from the batch: the network was exported in training mode")
    return [Tensor(first.axes, first.dtype, faults=frozenset(state.remark(node, t) for t in texts))]


# --------------------------------------------------------------------------------------- statistics over some axes


def _spread(t: Tensor, axes: Sequence[int]) -> bool:
    """Whether any of ``axes`` follows the image."""
    return t.axes is not None and any(tracked(t.axes[a % t.rank]) for a in axes)


def _normalised(state: Walk, node: Node, x: Tensor, axes: Sequence[int], text: str) -> list[Tensor]:
    faults = frozenset({state.remark(node, text)}) if _spread(x, axes) else frozenset()
    return [Tensor(x.axes, x.dtype, faults=faults)]


@rule("InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization", "GroupNorm")
def _instance_norm(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    axes = range(2, first.rank)
    if node.op == "MeanVarianceNormalization":
        axes = node.attributes.get("axes", [0, 2, 3])
    elif node.op == "GroupNorm":
        axes = range(first.rank)
    return _normalised(state, node, first, axes, "normalises by mean and deviation over the whole image")


@rule("LayerNormalization", "RMSNormalization")
def _layer_norm(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    axis = int(node.attributes.get("axis", -1)) % first.rank
    return _normalised(
        state, node, first, range(axis, first.rank), "normalises by mean and deviation over the whole image"
    )


@rule("LpNormalization")
def _lp_norm(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    return _normalised(
        state, node, _first(x), [int(node.attributes.get("axis", -1))], "normalises over the whole image"
    )


@rule("LRN")
def _lrn(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    return _normalised(state, node, _first(x), [1], "normalises over neighbours in space")


@rule("Softmax", "LogSoftmax", "Hardmax")
def _softmax(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    if state.graph.opset >= 13:
        axes: Sequence[int] = [int(node.attributes.get("axis", -1))]
        text = "normalises over the whole image"
    else:
        axes = range(int(node.attributes.get("axis", 1)) % first.rank, first.rank)
        text = f"of opset {state.graph.opset} normalises over all axes from its axis on, space among them"
    return _normalised(state, node, first, axes, text)


@rule("CumSum")
def _cumsum(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    axis = value_of(x[1])
    first = _first(x)
    axes = range(first.rank) if axis is None else [int(axis.reshape(()))]
    return _normalised(state, node, first, axes, "sums up along the image")


@rule(
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip
def _reduce(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    if len(x) > 1 and x[1] is not None and value_of(x[1]) is None:
        return _unknown(state, node, x, "reduces over axes that depend on the image")
    axes = shapes.axes_of(node.attributes, [None, *(value_of(t) for t in x[1:])], 1)
    if not axes:
        if node.attributes.get("noop_with_empty_axes", 0):
            return [first]
        axes = tuple(range(first.rank))
    return [_reduced(state, node, first, axes, bool(node.attributes.get("keepdims", 1)), first.dtype)]


def _reduced(state: Walk, node: Node, x: Tensor, axes: Sequence[int], keep: bool, dtype: int) -> Tensor:
    over = {a % x.rank for a in axes}
    faults: frozenset[Remark] = frozenset()
    if _spread(x, list(over)):
        faults = frozenset({state.remark(node, "reduces over the whole image")})
    left = [plain(1) if k in over else a for k, a in enumerate(x.axes or ()) if keep or k not in over]
    return Tensor(tuple(left), dtype, faults=faults)


@rule("ArgMax", "ArgMin")
def _argmax(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    a = node.attributes
    return [_reduced(state, node, _first(x), [int(a.get("axis", 0))], bool(a.get("keepdims", 1)), 7)]


@rule("TopK")
def _topk(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, k = _first(x), value_of(x[1])
    axis = int(node.attributes.get("axis", -1)) % first.rank
    if k is None or _spread(first, [axis]):
        return _unknown(state, node, x, "picks the largest values of the whole image")
    axes = tuple(plain(int(k.ravel()[0])) if n == axis else a for n, a in enumerate(first.axes or ()))
    return [Tensor(axes, first.dtype), Tensor(axes, 7)]


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    fault = frozenset({state.remark(node, "pools over the whole image")})
    axes = (first.axes or ())[:2] + tuple(plain(1) for _ in range(first.rank - 2))
    return [Tensor(axes, first.dtype, faults=fault)]


# --------------------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class _Windows:
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    auto: str


def _windows(node: Node, kernel: Sequence[int]) -> _Windows:
    n, a = len(kernel), node.attributes
    pads = [int(p) for p in a.get("pads", [0] * (2 * n))]
    return _Windows(
        tuple(int(k) for k in kernel),
        tuple(int(s) for s in a.get("strides", [1] * n)),
        tuple(int(d) for d in a.get("dilations", [1] * n)),
        tuple(pads[:n]),
        tuple(pads[n:]),
        str(a.get("auto_pad", "NOTSET")),
    )


def _window_size(n: int, kernel: int, stride: int, before: int, after: int, auto: str, ceil: bool) -> tuple[int, int]:
    """(output samples, padding before) of a convolution or pooling whose dilated kernel spans ``kernel`` samples."""
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        out = -(-n // stride)
        total = max(0, (out - 1) * stride + kernel - n)
        return out, (total // 2 if auto == "SAME_UPPER" else total - total // 2)
    if auto == "VALID":
        before = after = 0
    span = n + before + after - kernel
    if span < 0:
        raise CannotRun(f"needs {kernel} samples and has {n + before + after}")
    out = (-(-span // stride) if ceil else span // stride) + 1
    if ceil and (out - 1) * stride >= n + before:
        out -= 1  # a window must begin inside the samples or the padding before them
    return out, before


def _slide(state: Walk, node: Node, axis: Axis, k: int, w: _Windows, ceil: bool) -> tuple[Axis, list[str]]:
    """One axis of a convolution or pooling."""
    n = axis_size(axis)
    kernel, stride, dilation = w.kernel[k], w.strides[k], w.dilations[k]
    span = (kernel - 1) * dilation + 1
    size, before = _window_size(n, span, stride, w.before[k], w.after[k], w.auto, ceil)
    texts = []
    if w.auto in ("SAME_UPPER", "SAME_LOWER") and stride > 1 and n % stride:
        # The padding before depends on the size; a tile of another phase would read other pixels.
        texts.append(f"pads by {w.auto}, which shifts with sizes that are no multiple of its stride {stride}")
    line = sole_line(axis)
    if line is None:
        if not tracked(axis) or (span == 1 and stride == 1 and size == n):
            return (axis if size == n and tracked(axis) else plain(size)), texts
        return plain(size), [*texts, "slides over a flattened axis"]
    state.drop(line, lines.dropped(line, kernel, stride, dilation, before, size))
    return (lines.window(line, kernel, stride, dilation, before, size),), texts


def _slid(state: Walk, node: Node, x: Tensor, w: _Windows, ceil: bool = False) -> tuple[list[Axis], frozenset[Remark]]:
    if x.rank != len(w.kernel) + 2:
        raise CannotRun(f"has a kernel of {len(w.kernel)} axes and an input of {x.rank}")
    results = [_slide(state, node, axis, k, w, ceil) for k, axis in enumerate((x.axes or ())[2:])]
    faults = frozenset(state.remark(node, text) for _, texts in results for text in texts)
    if x.axes is not None and tracked(x.axes[1]):
        faults |= {state.remark(node, "sums over an axis that follows the image")}
    return [axis for axis, _ in results], faults


@rule("Conv", "ConvInteger", "QLinearConv", "FusedConv")
def _conv(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    weight = x[3] if node.op == "QLinearConv" else x[1]
    if weight is None:
        raise CannotRun("has no weights")
    if not weight.constant:
        return _unknown(state, node, x, "takes its weights from the image")
    group = int(node.attributes.get("group", 1))
    out_channels, per_group, *kernel = weight.shape
    if first.shape[1] != per_group * group:
        raise CannotRun(f"has weights for {per_group * group} channels and an input of {first.shape[1]}")
    axes, faults = _slid(state, node, first, _windows(node, kernel))
    result = (*(first.axes or ())[:1], plain(out_channels), *axes)
    state.macs(per_group * math.prod(kernel), result)
    dtype = 6 if node.op == "ConvInteger" else first.dtype
    extra = [t for t in x[8:] if t is not None] if node.op == "FusedConv" else []
    if extra:
        return _unknown(state, node, x, "is fused with more than is understood")
    return [Tensor(result, dtype, faults=faults)]


@rule("MaxPool", "AveragePool", "LpPool")
def _pool(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    w = _windows(node, node.attributes["kernel_shape"])
    shape = first.shape[2:]
    spans = [(k - 1) * d + 1 for k, d in zip(w.kernel, w.dilations, strict=True)]
    whole = all(k == n > 1 for k, n in zip(spans, shape, strict=True)) and not any(w.before) and not any(w.after)
    if whole:
        state.whole_pools.add(node.name)
    if node.name in state.global_pools:
        fault = frozenset(
            {state.remark(node, f"pools over the whole image: its kernel {size_text(w.kernel)} is a baked size")}
        )
        return [Tensor((*(first.axes or ())[:2], *(plain(1) for _ in shape)), first.dtype, faults=fault)]
    axes, faults = _slid(state, node, first, w, bool(node.attributes.get("ceil_mode", 0)))
    result = (*(first.axes or ())[:2], *axes)
    outputs = [Tensor(result, first.dtype, faults=faults)]
    if len(node.outputs) > 1 and node.outputs[1]:
        simple = w.kernel == w.strides and not any((*w.before, *w.after)) and set(w.dilations) == {1}
        fault = frozenset({state.remark(node, "gives positions counted over the whole image")})
        outputs.append(Tensor(result, 7, faults=fault, pooled=w.kernel if simple else ()))
    return outputs


@rule("MaxUnpool")
def _unpool(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, indices = _first(x), x[1]
    kernel = tuple(int(k) for k in node.attributes["kernel_shape"])
    strides = tuple(int(s) for s in node.attributes.get("strides", [1] * len(kernel)))
    if indices is None or indices.pooled != kernel or strides != kernel or len(x) > 2:
        return _unknown(state, node, x, "puts values where another node says")
    result = [*(first.axes or ())[:2]]
    for axis, other, k in zip((first.axes or ())[2:], (indices.axes or ())[2:], kernel, strict=True):
        a, b = sole_line(axis), sole_line(other)
        result.append(plain(axis_size(axis) * k) if a is None or b is None else (lines.repeat(lines.merge([a, b]), k),))
    # The positions count over the whole image: not exact, by the fault that the indices bring along.
    return [Tensor(tuple(result), first.dtype)]


@rule("ConvTranspose")
def _conv_transpose(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, weight, a = _first(x), x[1], node.attributes
    if weight is None or not weight.constant:
        return _unknown(state, node, x, "takes its weights from the image")
    in_channels, per_group, *kernel = weight.shape
    if first.shape[1] != in_channels:
        raise CannotRun(f"has weights for {in_channels} channels and an input of {first.shape[1]}")
    w = _windows(node, kernel)
    extra = [int(p) for p in a.get("output_padding", [0] * len(kernel))]
    target = [int(n) for n in a["output_shape"]][-len(kernel) :] if "output_shape" in a else None
    axes: list[Axis] = []
    texts: list[str] = []
    for k, axis in enumerate((first.axes or ())[2:]):
        n, span = axis_size(axis), (w.kernel[k] - 1) * w.dilations[k] + 1
        full = w.strides[k] * (n - 1) + extra[k] + span
        if target is not None or w.auto in ("SAME_UPPER", "SAME_LOWER"):
            size = n * w.strides[k] if target is None else target[k]
            total = max(0, full - size)
            before = total // 2 if w.auto == "SAME_UPPER" else total - total // 2
        else:
            before = 0 if w.auto == "VALID" else w.before[k]
            size = full - before - (0 if w.auto == "VALID" else w.after[k])
        if size < 1:
            raise CannotRun(f"leaves {size} samples")
        line = sole_line(axis)
        if line is None:
            texts += ["slides over a flattened axis"] if tracked(axis) else []
            axes.append(plain(size))
        else:
            moved = lines.transposed_window(line, w.kernel[k], w.strides[k], w.dilations[k], before, size)
            axes.append((moved,))
    batch = (first.axes or ())[:1]
    state.macs(per_group * math.prod(kernel), (first.axes or ()))
    faults = frozenset(state.remark(node, text) for text in texts)
    return [Tensor((*batch, plain(per_group * int(a.get("group", 1))), *axes), first.dtype, faults=faults)]


# ---------------------------------------------------------------------------------------------------------- resize


@rule("Resize", "Upsample")
def _resize(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, a = _first(x), node.attributes
    rank = first.rank
    old = node.op == "Upsample" or state.graph.opset < 11
    position = 1 if old else 2
    given_scales = a.get("scales", value_of(x[position]) if len(x) > position else None)
    given_sizes = value_of(x[3]) if len(x) > 3 else None
    scales = None if given_scales is None or len(given_scales) == 0 else [float(s) for s in given_scales]
    sizes = None if given_sizes is None or len(given_sizes) == 0 else [int(s) for s in given_sizes]
    if scales is None and sizes is None:
        return _unknown(state, node, x, "takes its size from the image")
    axes = [int(k) % rank for k in a.get("axes", range(rank))]
    policy = a.get("keep_aspect_ratio_policy", "stretch")
    result = list(first.axes or ())
    texts: list[str] = []
    notes: list[str] = []
    if sizes is not None and policy != "stretch":
        ratios = [s / axis_size(result[k]) for k, s in zip(axes, sizes, strict=True)]
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        sizes = [round(ratio * axis_size(result[k])) for k in axes]
    for i, k in enumerate(axes):
        n = axis_size(result[k])
        if sizes is not None:
            size, factor = sizes[i], Fraction(sizes[i], n)
        elif scales is not None:
            # As the backends do: the scale and the product in float32.
            size = int(np.floor(np.float32(scales[i]) * np.float32(n)))
            factor = _fraction(scales[i])
        if size < 1:
            raise CannotRun(f"leaves {size} samples")
        if size == n and factor == 1:
            continue
        line = sole_line(result[k])
        if line is None:
            if tracked(result[k]):
                texts.append("resizes a flattened axis")
            result[k] = plain(size)
            continue
        if sizes is not None and not x[3].sized:  # type: ignore[union-attr]
            texts.append(f"resizes to {size} samples whatever the size of the image")
        moved, fault, note = _resized(node, line, size, factor)
        result[k] = (moved,)
        texts += fault
        notes += note
    return [
        Tensor(
            tuple(result),
            first.dtype,
            faults=frozenset(state.remark(node, t) for t in texts),
            notes=frozenset(state.remark(node, t) for t in notes),
        )
    ]


def _fraction(scale: float) -> Fraction:
    """The simple fraction that a float32 scale stands for."""
    simple = Fraction(scale).limit_denominator(256)
    return (
        simple if simple > 0 and abs(float(simple) / scale - 1) < 2e-7 else Fraction(scale).limit_denominator(1 << 20)
    )


def _resized(node: Node, line: Line, size: int, factor: Fraction) -> tuple[Line, list[str], list[str]]:
    a = node.attributes
    old = node.op == "Upsample"
    mode = {"bilinear": "linear", "trilinear": "linear"}.get(a.get("mode", "nearest"), a.get("mode", "nearest"))
    coordinates = a.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    rounding = a.get("nearest_mode", "floor" if old else "round_prefer_floor")
    texts: list[str] = []
    notes: list[str] = []
    slope, half = 1 / factor, Fraction(1, 2)
    n = line.size
    if coordinates == "align_corners":
        texts.append("aligns corners: its positions stretch with the size")
        sampling = Sampling(Fraction(n - 1, size - 1) if size > 1 and n > 1 else slope, Fraction(0))
    elif coordinates == "asymmetric":
        sampling = Sampling(slope, Fraction(0))
    elif coordinates == "tf_half_pixel_for_nn":
        sampling = Sampling(slope, slope / 2)
    elif coordinates in ("half_pixel", "pytorch_half_pixel"):
        sampling = Sampling(slope, slope / 2 - half)
    elif coordinates == "half_pixel_symmetric":
        sampling = Sampling(slope, slope / 2 - half)
        if factor * n != size:
            texts.append("centres on the image (half_pixel_symmetric), which shifts with the size")
    else:
        texts.append(f"reads by {coordinates}, which depends on the size")
        sampling = Sampling(slope, slope / 2 - half)
    dyadic = _is_power_of_two(factor.numerator) and _is_power_of_two(factor.denominator)
    if mode == "nearest":
        exact_scale = Fraction(float(np.float32(float(factor)))) == factor
        if not exact_scale and lines.near_tie(sampling, size, rounding):
            texts.append(f"picks neighbours by a factor of {factor}, which float32 coordinates decide by rounding")
        moved = lines.nearest(line, sampling, size, rounding)
    elif mode in ("linear", "cubic"):
        moved = lines.interpolated(line, sampling, size, mode, bool(a.get("antialias", 0)))
        if not dyadic and coordinates != "align_corners":
            notes.append(
                f"({mode}, factor {factor}) is exact up to float32 coordinates: at most about {_drift(200):.0e} of the "
                f"difference between neighbours near pixel 200, {_drift(60_000):.0e} near pixel 60,000"
            )
    else:
        texts.append(f"interpolates by {mode}, which is unknown")
        moved = lines.interpolated(line, sampling, size, "cubic", False)
    if coordinates == "align_corners":  # for the report: what the factor would be without the stretch
        ratio = Fraction(size, n)
        scale = line.scale * ratio
        moved = replace(
            moved,
            scale=scale,
            place=line.place + (1 / ratio / 2 - half) / line.scale,
            stride=math.lcm(line.stride, scale.denominator),
        )
    return moved, texts, notes


def _drift(pixel: int) -> float:
    """Rounding of a float32 coordinate near ``pixel``."""
    return pixel * 2.0**-24


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


# --------------------------------------------------------------------------------------------- moving samples about


@rule("Pad")
def _pad(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, a = _first(x), node.attributes
    given = a.get("pads", a.get("paddings"))
    if given is None:
        given = value_of(x[1]) if len(x) > 1 else None
    if given is None:
        return _unknown(state, node, x, "pads by what is in the image")
    pads = [int(p) for p in given]
    axes = range(first.rank)
    if len(x) > 3 and x[3] is not None:
        chosen = value_of(x[3])
        if chosen is None:
            return _unknown(state, node, x, "pads axes that depend on the image")
        axes = [int(k) % first.rank for k in chosen.ravel()]  # type: ignore[assignment]
    if len(x) > 2 and x[2] is not None:
        if not x[2].constant:
            return _unknown(state, node, x, "pads with a value taken from the image")
        note_numbers(state, node, [x[2]])
    mode = str(a.get("mode", "constant"))
    result, texts = list(first.axes or ()), []
    for position, k in enumerate(axes):
        before, after = pads[position], pads[position + len(pads) // 2]
        result[k], found = _padded(result[k], before, after, mode)
        texts += found
    return [Tensor(tuple(result), first.dtype, faults=frozenset(state.remark(node, t) for t in texts))]


def _padded(axis: Axis, before: int, after: int, mode: str) -> tuple[Axis, list[str]]:
    n = axis_size(axis)
    if before == 0 and after == 0:
        return axis, []
    if n + before + after < 1:
        raise CannotRun(f"leaves {n + before + after} samples")
    if mode == "reflect" and max(before, after) >= n:
        raise CannotRun(f"reflects {max(before, after)} of {n} samples")
    line = sole_line(axis)
    if line is None:
        return plain(n + before + after), (["pads a flattened axis"] if tracked(axis) else [])
    moved = lines.pad(line, before, after, mode)
    return (moved,), (["wraps around the image"] if mode == "wrap" else [])


@rule("Slice")
def _slice(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    bounds = shapes.slice_arguments(node.attributes, [None, *(value_of(t) for t in x[1:])], first.rank)
    if bounds is None or any(t is not None and not t.constant for t in x[1:]):
        return _unknown(state, node, x, "cuts where the image's content says")
    result, texts = list(first.axes or ()), []
    for k, start, end, step in bounds:
        n = axis_size(result[k])
        begin, size = shapes.slice_range(n, start, end, step)
        if size < 1:
            raise CannotRun("cuts everything away")
        if size == n and step == 1:
            continue
        line = sole_line(result[k])
        if line is None or step < 0:
            if tracked(result[k]):
                texts.append("turns the image round" if step < 0 else "cuts a flattened axis")
            result[k] = result[k] if size == n and tracked(result[k]) else plain(size)
            continue
        if step > 1:
            state.drop(line, max(0, n - begin - size * step))
        result[k] = (lines.take(line, begin, step, size),)
    return [Tensor(tuple(result), first.dtype, faults=frozenset(state.remark(node, t) for t in texts))]


@rule("Split")
def _split(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, a = _first(x), node.attributes
    k = int(a.get("axis", 0)) % first.rank
    axis = (first.axes or ())[k]
    n = axis_size(axis)
    parts = a.get("split", value_of(x[1]) if len(x) > 1 else None)
    if parts is None:
        each = -(-n // len(node.outputs))
        parts = [min(each, n - i * each) for i in range(len(node.outputs))]
    parts = [int(p) for p in parts]
    line, outputs, start = sole_line(axis), [], 0
    for size in parts:
        here = plain(size) if line is None else (lines.take(line, start, 1, size),)
        faults = (
            frozenset({state.remark(node, "cuts a flattened axis")}) if line is None and tracked(axis) else frozenset()
        )
        axes = tuple(here if i == k else other for i, other in enumerate(first.axes or ()))
        outputs.append(Tensor(axes, first.dtype, faults=faults))
        start += size
    return outputs


@rule("Concat")
def _concat(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    given = [t for t in x if t is not None]
    rank = given[0].rank
    k = int(node.attributes["axis"]) % rank
    if any(t.rank != rank for t in given):
        raise CannotRun("meets tensors of different rank")
    along = [(t.axes or ())[k] for t in given]
    thin = [replace(t, axes=tuple(plain(1) if i == k else a for i, a in enumerate(t.axes or ()))) for t in given]
    thin = [replace(t, value=None) if t.constant and not _flat(given[i], k) else t for i, t in enumerate(thin)]
    for i in range(rank):
        found = {axis_size((t.axes or ())[i]) for t in thin}
        if len(found) > 1:
            raise CannotRun(f"meets sizes {' and '.join(str(axis_size((t.axes or ())[i])) for t in thin)}")
    joined = merged(state, node, [replace(t, value=_thin_value(g, k)) for t, g in zip(thin, given, strict=True)])
    axis: Axis = plain(sum(axis_size(a) for a in along))
    if any(tracked(a) for a in along):
        at = max((i for i, a in enumerate(along) if tracked(a)), key=lambda i: axis_size(along[i]))
        before, after = sum(axis_size(a) for a in along[:at]), sum(axis_size(a) for a in along[at + 1 :])
        line = sole_line(along[at])
        if line is None:
            return _unknown(state, node, x, "lengthens a flattened axis")
        if not all(t.constant for i, t in enumerate(given) if i != at):
            fault = state.remark(node, "lines up several images along space, or wraps one around")
            joined = replace(joined, faults=joined.faults | {fault})
        axis = (lines.pad(line, before, after, "constant"),)
    return [replace(joined, axes=tuple(axis if i == k else a for i, a in enumerate(joined.axes or ())))]


def _flat(tensor: Tensor, axis: int) -> bool:
    return _thin_value(tensor, axis) is not None


def _thin_value(tensor: Tensor, axis: int) -> Array | None:
    """Any one layer along ``axis`` of a constant whose layers need not agree."""
    if not tensor.constant or (array := value_of(tensor)) is None or array.shape[axis] == 0:
        return None
    if array.shape[axis] == 1:
        return array
    # Uniform in space means uniform in every layer: a layer that is not makes the whole not uniform.
    layers = [np.take(array, [i], axis=axis) for i in range(min(array.shape[axis], 64))]
    for layer in layers:
        if any(n > 1 and not np.all(layer == np.take(layer, [0], axis=i)) for i, n in enumerate(layer.shape)):
            return layer
    return layers[0]


@rule("Transpose")
def _transpose(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    order = node.attributes.get("perm", list(reversed(range(first.rank))))
    return [Tensor(tuple((first.axes or ())[int(k)] for k in order), first.dtype, pooled=first.pooled)]


@rule("Squeeze")
def _squeeze(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    axes = shapes.axes_of(node.attributes, [None, *(value_of(t) for t in x[1:])], 1)
    gone = {a % first.rank for a in axes} if axes is not None else {k for k, n in enumerate(first.shape) if n == 1}
    if any(first.shape[k] != 1 for k in gone):
        raise CannotRun(f"would remove an axis of shape {list(first.shape)}")
    return [Tensor(tuple(a for k, a in enumerate(first.axes or ()) if k not in gone), first.dtype)]


@rule("Unsqueeze")
def _unsqueeze(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    axes = shapes.axes_of(node.attributes, [None, *(value_of(t) for t in x[1:])], 1) or ()
    rank = first.rank + len(axes)
    new, rest = {a % rank for a in axes}, list(first.axes or ())
    return [Tensor(tuple(plain(1) if k in new else rest.pop(0) for k in range(rank)), first.dtype)]


@rule("Reshape", "Flatten")
def _reshape(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, a = _first(x), node.attributes
    if node.op == "Flatten":
        k = int(a.get("axis", 1))
        k = k if k >= 0 else k + first.rank
        target: tuple[int, ...] = (math.prod(first.shape[:k]), math.prod(first.shape[k:]))
    else:
        given = a.get("shape", value_of(x[1]) if len(x) > 1 else None)
        if given is None:
            return _unknown(state, node, x, "takes its shape from the image")
        resolved = shapes.resolve_reshape(first.shape, [int(v) for v in given], bool(a.get("allowzero", 0)))
        if resolved is None:
            raise CannotRun(f"cannot give {list(first.shape)} the shape {[int(v) for v in given]}")
        target = resolved
    axes = redistribute(first.axes or (), target)
    if axes is None:
        return _unknown(state, node, x, "mixes the image's axes with others")
    return [Tensor(axes, first.dtype)]


def redistribute(axes: Sequence[Axis], target: Sequence[int]) -> tuple[Axis, ...] | None:
    """Parts of ``axes`` dealt out in row-major order to axes of the sizes ``target``; None where they do not fit."""
    queue: list[Part] = [p for axis in axes for p in axis if isinstance(p, Line) or p != 1]
    result: list[Axis] = []
    for size in target:
        need, taken = size, list[Part]()
        while need > 1 or (size == 1 and not taken and queue and part_size(queue[0]) == 1):
            if not queue:
                return None
            part = queue[0]
            n = part_size(part)
            if need % n == 0:
                taken.append(queue.pop(0))
                need //= n
            elif n % need == 0 and isinstance(part, int):
                taken.append(need)
                queue[0], need = n // need, 1
            elif n % need == 0 and isinstance(part, Line):
                k = n // need
                taken.append(lines.window(part, k, k, 1, 0, need))
                queue[0], need = k, 1
            elif isinstance(part, int) and (common := math.gcd(need, n)) > 1:
                taken.append(common)
                queue[0], need = n // common, need // common
            else:
                return None
        result.append(_joined(taken) or plain(1))
    return tuple(result) if all(part_size(p) == 1 for p in queue) else None


def _joined(parts: list[Part]) -> Axis:
    """(line, k) is the line with every sample k times: what a pixel shuffle leaves."""
    if len(parts) == 2 and isinstance(parts[0], Line) and isinstance(parts[1], int):
        return (lines.repeat(parts[0], parts[1]),)
    return tuple(parts)


@rule("DepthToSpace", "SpaceToDepth")
def _shuffle(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, b = _first(x), int(node.attributes["blocksize"])
    deep = node.op == "SpaceToDepth"
    channels = first.shape[1]
    if not deep and channels % (b * b):
        raise CannotRun(f"cannot deal {channels} channels out to blocks of {b} x {b}")
    result: list[Axis] = [(first.axes or ())[0], plain(channels * b * b if deep else channels // (b * b))]
    for axis in (first.axes or ())[2:]:
        n, line = axis_size(axis), sole_line(axis)
        if deep and n % b:
            raise CannotRun(f"cannot cut {n} samples into blocks of {b}")
        if line is None:
            result.append(plain(n // b if deep else n * b))
        else:
            result.append((lines.window(line, b, b, 1, 0, n // b) if deep else lines.repeat(line, b),))
    return [Tensor(tuple(result), first.dtype)]


@rule("Expand")
def _expand(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = _first(x)
    shape = value_of(x[1]) if len(x) > 1 else None
    if shape is None:
        return _unknown(state, node, x, "takes its shape from the image")
    return [merged_shape(first, [int(n) for n in shape])]


def merged_shape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x`` broadcast to ``shape``."""
    rank = max(x.rank, len(shape))
    axes = [plain(1)] * (rank - x.rank) + list(x.axes or ())
    wanted = [1] * (rank - len(shape)) + list(shape)
    result = []
    for axis, n in zip(axes, wanted, strict=True):
        have = axis_size(axis)
        if have != n and 1 not in (have, n):
            raise CannotRun(f"cannot spread {have} samples over {n}")
        result.append(axis if have == n or n == 1 else plain(n))
    return Tensor(tuple(result), x.dtype)


@rule("Tile")
def _tile(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, times = _first(x), value_of(x[1])
    if times is None:
        return _unknown(state, node, x, "repeats as often as the image says")
    result, texts = [], []
    for axis, k in zip(first.axes or (), times.ravel(), strict=True):
        if int(k) == 1:
            result.append(axis)
            continue
        if tracked(axis):
            texts.append("repeats the image")
        result.append(plain(axis_size(axis) * int(k)))
    return [Tensor(tuple(result), first.dtype, faults=frozenset(state.remark(node, t) for t in texts))]


@rule("Gather")
def _gather(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, indices = _first(x), x[1]
    k = int(node.attributes.get("axis", 0)) % max(1, first.rank)
    if indices is None:
        raise CannotRun("has no indices")
    axes = first.axes or ()
    if not indices.constant:
        if not first.constant:
            return _unknown(state, node, x, "reads where the image's content says")
        return [Tensor((*axes[:k], *(indices.axes or ()), *axes[k + 1 :]), first.dtype)]
    array = value_of(indices)
    if not tracked(axes[k]):
        return [Tensor((*axes[:k], *(indices.axes or ()), *axes[k + 1 :]), first.dtype)]
    line = sole_line(axes[k])
    if array is None or line is None or array.ndim != 1 or (moved := _gathered(line, array)) is None:
        return _unknown(state, node, x, "reads by a list of positions in the image")
    return [Tensor((*axes[:k], (moved,), *axes[k + 1 :]), first.dtype)]


def _gathered(line: Line, indices: Array) -> Line | None:
    """A gather that is a crop, a stride, nearest up-sampling or a padding in disguise."""
    at = np.where(indices < 0, indices + line.size, indices).astype(np.int64)
    m, n = len(at), line.size
    if m == 0 or at.min() < 0 or at.max() >= n:
        return None
    steps = np.diff(at)
    if m > 1 and (steps == steps[0]).all() and steps[0] > 0:
        return lines.take(line, int(at[0]), int(steps[0]), m)
    if m % n == 0 and (at == np.arange(m) // (m // n)).all():
        return lines.repeat(line, m // n)
    # Padding: a run over the whole line with something before and after.
    start = np.flatnonzero(at[:-1] * 0 + (steps == 1)) if m > 1 else np.zeros(0, np.int64)
    for s in start[:1] if at[0] == 0 else start:
        if at[s] == 0 and s + n <= m and (at[s : s + n] == np.arange(n)).all():
            before, after = int(s), m - int(s) - n
            mode = "reflect" if (lines.mirrored(np.arange(-before, n + after), n) == at).all() else "edge"
            expected = lines.mirrored if mode == "reflect" else (lambda i, k: np.clip(i, 0, k - 1))
            if (expected(np.arange(-before, n + after, dtype=np.int64), n) == at).all():
                return lines.pad(line, before, after, mode)
    return None


# -------------------------------------------------------------------------------------------------- matrix products


@rule("MatMul", "MatMulInteger", "QLinearMatMul")
def _matmul(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    a, b = _first(x), x[3] if node.op == "QLinearMatMul" else x[1]
    if b is None or a.rank < 2 or b.rank < 2:
        return _unknown(state, node, x, "multiplies vectors")
    ax, bx = a.axes or (), b.axes or ()
    if axis_size(ax[-1]) != axis_size(bx[-2]):
        raise CannotRun(f"multiplies {axis_size(ax[-1])} columns by {axis_size(bx[-2])} rows")
    texts = []
    if tracked(ax[-1]) or tracked(bx[-2]):
        texts.append("sums over the whole image (attention over space)")
    if tracked(ax[-2]) and tracked(bx[-1]):
        texts.append("relates every position to every other (attention over space)")
    given = [replace(t, axes=(plain(1), *t.axes[:-2]), value=None) for t in (a, b) if t.axes is not None]
    batch = merged(state, node, given)
    axes = (*(batch.axes or ())[1:], ax[-2], bx[-1])
    if not (tracked(ax[-2]) and tracked(bx[-1])):
        state.macs(axis_size(ax[-1]) if not tracked(ax[-1]) else 1, axes)
    dtype = 6 if node.op == "MatMulInteger" else a.dtype
    return [Tensor(axes, dtype, faults=batch.faults | {state.remark(node, t) for t in texts})]


@rule("Gemm")
def _gemm(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    a, b = _first(x), x[1]
    if b is None or a.rank != 2 or b.rank != 2:
        raise CannotRun("needs two matrices")
    ax = (a.axes or ())[::-1] if node.attributes.get("transA", 0) else a.axes or ()
    bx = (b.axes or ())[::-1] if node.attributes.get("transB", 0) else b.axes or ()
    if axis_size(ax[1]) != axis_size(bx[0]):
        raise CannotRun(f"multiplies {axis_size(ax[1])} columns by {axis_size(bx[0])} rows")
    texts = []
    if tracked(ax[1]) or tracked(bx[0]):
        texts.append("sums over the whole image")
    if tracked(ax[0]) and tracked(bx[1]):
        texts.append("relates every position to every other")
    state.macs(axis_size(ax[1]) if not tracked(ax[1]) else 1, (ax[0], bx[1]))
    result = Tensor((ax[0], bx[1]), a.dtype, faults=frozenset(state.remark(node, t) for t in texts))
    if len(x) > 2 and x[2] is not None:
        return [replace(merged(state, node, [result, x[2]]), faults=result.faults)]
    return [result]


@rule("Attention")
def _attention(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    q, v = _first(x), x[2]
    if v is None or node.domain or q.rank not in (3, 4) or len(x) > 3:
        return _unknown(state, node, x, "attends over positions")
    spread = any(t is not None and _spread(t, [t.rank - 2]) for t in x)
    faults = frozenset({state.remark(node, "attends over the whole image")}) if spread else frozenset()
    return [Tensor((*(q.axes or ())[:-1], (v.axes or ())[-1]), q.dtype, faults=faults)]
