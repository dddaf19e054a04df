"""What is known of a tensor while a graph is walked, and the table of rules, one per operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from . import constants
from . import line as lines
from .constants import Array
from .file import Constant, Graph, Node
from .follow import Followed, plain_numbers
from .infer import infer_shapes
from .line import Line
from .numbers import Bound, Follower, LostError, Number, Remark, size_number


def first_input(x: Inputs) -> Tensor:
    """The first input of a node; CannotRun where it has none."""
    if not x or x[0] is None:
        raise CannotRun("has no input")
    return x[0]


Part = Line | int
Axis = tuple[Part, ...]


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
        followed: How the elements of a constant computed from the image's size follow it; None for others.
        bounds: Sizes of the image at which everything on the way here is what it is at the size of the walk.
        faults, notes: Remarks about all nodes on the way here.
        pooled: For the indices of a MaxPool without overlap and padding: kernel per spatial axis.
    """

    axes: tuple[Axis, ...] | None
    dtype: int = 1
    constant: bool = False
    value: Array | Constant | None = None
    followed: Followed | None = None
    faults: frozenset[Remark] = frozenset()
    notes: frozenset[Remark] = frozenset()
    pooled: tuple[int, ...] = ()
    bounds: frozenset[Bound] = frozenset()

    @property
    def changes(self) -> bool:
        """Whether it is a constant that another size of the image would change, as far as is known."""
        return self.followed is not None and self.followed.changes

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
        sums: Additions per sample of all layers (see :mod:`unet_rt.graph.rounding`).
        trained: Nodes that do what they do in training alone, in sentences.
        order: The nodes as walked, with subgraphs inlined.
        work: Samples along the axes of all tensors so far, and what nodes cost that no rule covers.
    """

    graph: Graph
    sizes: tuple[int, ...]
    global_pools: frozenset[str] = frozenset()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    dropped: dict[int, int] = field(default_factory=dict)
    density: float = 0.0
    sums: float = 0.0
    trained: list[str] = field(default_factory=list)
    order: list[Node] = field(default_factory=list)
    whole_pools: set[str] = field(default_factory=set)
    work: int = 0

    @property
    def endless(self) -> bool:
        """Whether tensors are larger than those of any network of so many nodes."""
        return self.work > max(_FREE_WORK, _WORK * len(self.graph.nodes) * sum(self.sizes))

    def remark(self, node: Node, text: str) -> Remark:
        return node.index, f"{node} {text}"

    def follower(self, node: Node) -> Follower:
        return Follower(self.sizes, (node.index, str(node)))

    def length(self, axis: Axis) -> Number:
        """Samples along an axis, as a number that follows the size of the image."""
        result = Number({(): Fraction(1)})
        for p in axis:
            extra = Fraction(p) if isinstance(p, int) else p.size - p.scale * self.sizes[p.source]
            result *= Number({(): extra}) if isinstance(p, int) else size_number(p.source, p.scale, extra)
        return result

    def drop(self, line: Line, count: int) -> None:
        if count:
            self.dropped[line.source] = self.dropped.get(line.source, 0) + count

    def macs(self, per_sample: float, axes: Sequence[Axis]) -> None:
        """Count ``per_sample`` multiply-accumulates for every element of ``axes``."""
        count = float(per_sample)
        self.sums += per_sample
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


# Samples along axes that a walk may hold: per node, _WORK times those of the image; a few large tensors are free.
_WORK, _FREE_WORK = 2, 1 << 21

Inputs = list["Tensor | None"]
Rule = Callable[[Walk, Node, Inputs], "list[Tensor]"]
ALL = range(1 << 16)


@dataclass(frozen=True)
class Understood:
    """What a rule looks at: inputs that may hold pixels, and those whose numbers may follow the size of the image.

    Any other input has a say in the result that no rule follows: there only what never changes is allowed.
    """

    apply: Rule
    pixels: Sequence[int] = (0,)
    numbers: Sequence[int] = ()


RULES: dict[str, Understood] = {}


def rule(*ops: str, pixels: Sequence[int] = (0,), numbers: Sequence[int] = ()) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of operators of these names, that looks at these inputs."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = Understood(function, pixels, numbers)
        return function

    return register


def value_of(tensor: Tensor | None) -> Array | None:
    """Value of a constant, read from the file if need be; None where unknown or too large."""
    if tensor is None:
        return None
    if isinstance(tensor.value, Constant):
        return tensor.value.value()
    return tensor.value


def constant_tensor(array: Array) -> Tensor:
    """The tensor of a value that does not depend on pixels."""
    return Tensor(tuple(plain(n) for n in array.shape), constants.element_type(array), True, array)


def behind(tensor: Tensor, inputs: Sequence[Tensor | None]) -> Tensor:
    """``tensor`` with all that is said of ``inputs``, on which it depends."""
    given = [t for t in inputs if t is not None]
    return replace(
        tensor,
        faults=tensor.faults.union(*(t.faults for t in given)),
        notes=tensor.notes.union(*(t.notes for t in given)),
        bounds=tensor.bounds.union(*(t.bounds for t in given)),
    )


def at_fault(tensor: Tensor, *faults: Remark) -> Tensor:
    """``tensor`` with more remarks about what keeps it from being exact."""
    return replace(tensor, faults=tensor.faults.union(faults))


def numbers_of(tensor: Tensor | None) -> list[Number]:
    """The elements of a list of numbers that a rule reads, as they follow the size.

    Raises:
        LostError: They are not known, or cannot be followed.
    """
    array = value_of(tensor)
    if tensor is None or array is None:
        raise LostError("reads numbers that are not known")
    if tensor.followed is None:
        return list(plain_numbers(array.reshape(-1)))
    if tensor.followed.lost or tensor.followed.grown:
        raise LostError(f"reads numbers that cannot be followed: {tensor.followed.lost or 'a list that grows'}")
    return list(tensor.followed.numbers.reshape(-1))


def unknown(state: Walk, node: Node, given: Inputs, text: str) -> list[Tensor]:
    """Outputs of a node at fault: shapes by ONNX's own inference where it knows them, lines as far as sizes match."""
    fault = frozenset({state.remark(node, text)})
    described = [None if t is None or t.axes is None else (t.dtype, t.shape, _small(t)) for t in given]
    inferred: list[tuple[int, tuple[int, ...]] | None] = [None] * len(node.outputs)
    if all(d is not None or t is None for d, t in zip(described, given, strict=True)):
        inferred = infer_shapes(node, described, state.graph.opsets)
    base = next((t for t in given if t is not None and t.axes is not None and t.lines()), None)
    if base is None:
        base = next((t for t in given if t is not None and t.axes is not None and not t.constant), None)
    outputs = []
    for known_shape in inferred:
        if known_shape is not None:
            outputs.append(Tensor(_like(base, known_shape[1]), known_shape[0], faults=fault))
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
    if line is None or size < 2 or size > lines.LONGEST:
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
    faults = frozenset(state.remark(node, text) for text in texts)
    return Tensor(tuple(axes), given[0].dtype if dtype is None else dtype, faults=faults)
