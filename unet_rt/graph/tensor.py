"""What is known of a tensor while a graph is walked, and the table of rules, one per operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import constants, file
from . import line as lines
from .constants import Array
from .file import Constant, Graph, Node
from .line import Line


def first_input(x: Inputs) -> Tensor:
    """The first input of a node; CannotRun where it has none."""
    if not x or x[0] is None:
        raise CannotRun("has no input")
    return x[0]


Part = Line | int
Axis = tuple[Part, ...]
# A sentence about a node, with the node's place in the graph to sort by.
Remark = tuple[int, str]


def part_size(part: Part) -> int:
    """Samples along a part of an axis: a line's, or the number itself."""
    return part.size if isinstance(part, Line) else part


def axis_size(axis: Axis) -> int:
    """Samples along an axis: the product over its parts."""
    return math.prod(part_size(p) for p in axis)


def plain(size: int) -> Axis:
    """An axis of ``size`` samples that follow no axis of the image."""
    return (size,)


def is_tracked(axis: Axis) -> bool:
    """Whether an axis follows an axis of the image."""
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
        return 0 if self.axes is None else math.prod(self.shape) * constants.ELEMENT_BYTES.get(self.dtype, 4)

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
    """Registers a function as the rule of operators of these names."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


def value_of(tensor: Tensor | None) -> Array | None:
    """Value of a constant, read from the file if need be; None where unknown or too large."""
    if tensor is None:
        return None
    if isinstance(tensor.value, Constant):
        return tensor.value.value()
    return tensor.value


def constant_tensor(array: Array, sized: bool = False, inputs: Sequence[Tensor | None] = ()) -> Tensor:
    """The tensor of a value that does not depend on pixels; ``sized``: it depends on the image's size."""
    axes = tuple(plain(n) for n in array.shape)
    faults, notes = remarks(inputs)
    return Tensor(axes, constants.element_type(array), True, array, sized, faults, notes)


def remarks(inputs: Sequence[Tensor | None]) -> tuple[frozenset[Remark], frozenset[Remark]]:
    """(faults, notes) of a node's inputs, which its outputs inherit."""
    faults = frozenset[Remark]().union(*(t.faults for t in inputs if t is not None))
    notes = frozenset[Remark]().union(*(t.notes for t in inputs if t is not None))
    return faults, notes


def unknown(state: Walk, node: Node, given: Inputs, text: str) -> list[Tensor]:
    """Outputs of a node at fault: shapes by ONNX's own inference where it knows them, lines as far as sizes match."""
    fault = frozenset({state.remark(node, text)})
    described = [None if t is None or t.axes is None else (t.dtype, t.shape, _small(t)) for t in given]
    inferred: list[tuple[int, tuple[int, ...]] | None] = [None] * len(node.outputs)
    if all(d is not None or t is None for d, t in zip(described, given, strict=True)):
        inferred = file.infer_shapes(node, described, state.graph.opsets)
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
        return tuple(_rescale(axis, n) for axis, n in zip(base.axes, shape, strict=True))
    left = list(base.lines())
    axes: list[Axis] = []
    for n in shape:
        match = next((line for line in left if line.size == n), None)
        if match is not None:
            left.remove(match)
        axes.append(plain(n) if match is None else (match,))
    return tuple(axes)


def _rescale(axis: Axis, size: int) -> Axis:
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
    following = [(a, t) for a, t, _ in wide if is_tracked(a)]
    if not following:
        return plain(size), []
    base, texts = following[0][0], []
    same: list[Axis] = []
    for axis, tensor, k in wide:
        if is_tracked(axis):
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
            parts.append(lines.merge_lines(followed))
        except ValueError as reason:
            texts.append(str(reason))
            parts.append(followed[0])
    return tuple(parts), texts


def _uniform(tensor: Tensor, axis: int) -> bool:
    """Whether a constant is the same all along ``axis``."""
    if not tensor.constant:
        return False
    array = value_of(tensor)
    if array is None or array.size > constants.MAX_ELEMENTS * 16:
        return False
    if array.strides[axis] == 0:
        return True
    first = np.take(array, [0], axis=axis)
    return bool(np.all((array == first) | ((array != array) & (first != first))))


def broadcast(state: Walk, node: Node, given: Sequence[Tensor], dtype: int | None = None) -> Tensor:
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
        if size > 1 and any(is_tracked(a) and axis_size(a) == 1 for a, _, _ in here):
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
