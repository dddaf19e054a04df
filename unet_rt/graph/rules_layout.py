"""What operators that move samples do to stride, halo and exactness: slices, reshapes, transposes, concatenations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from . import constants
from . import line as lines
from .constants import Array
from .file import Node
from .line import Line
from .numbers import Follower, Number, plain_number
from .tensor import (
    ALL,
    Axis,
    CannotRun,
    Inputs,
    Part,
    Tensor,
    Walk,
    at_fault,
    axis_size,
    broadcast,
    first_input,
    is_tracked,
    numbers_of,
    part_size,
    plain,
    rule,
    sole_line,
    unknown,
    value_of,
)


@rule("Slice", numbers=(1, 2))
def _slice(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    bounds = constants.slice_arguments(node.attributes, [None, *(value_of(t) for t in x[1:])], first.rank)
    if bounds is None or any(t is not None and not t.constant for t in x[1:]):
        return unknown(state, node, x, "cuts where the image's content says")
    result, texts = list(first.axes or ()), list[str]()
    follower = state.follower(node)
    places = _places(node, x, bounds)
    for (k, start, end, step), (first_number, end_number) in zip(bounds, places, strict=True):
        n = axis_size(result[k])
        texts += _cut(follower, state.length(result[k]), first_number, end_number) if step > 0 else []
        begin, size = constants.slice_range(n, start, end, step)
        if size < 1:
            raise CannotRun("cuts everything away")
        if size == n and step == 1:
            continue
        line = sole_line(result[k])
        if line is None or step < 0:
            if is_tracked(result[k]):
                texts.append("turns the image round" if step < 0 else "cuts a flattened axis")
            result[k] = result[k] if size == n and is_tracked(result[k]) else plain(size)
            continue
        if step > 1:
            state.drop(line, max(0, n - begin - size * step))
        result[k] = (lines.take(line, begin, step, size),)
    faults = frozenset(state.remark(node, t) for t in texts)
    return [Tensor(tuple(result), first.dtype, faults=faults, bounds=frozenset(follower.bounds))]


def _places(node: Node, x: Inputs, bounds: Sequence[tuple[int, int, int, int]]) -> list[tuple[Number, Number]]:
    """Start and end of each cut, as they follow the size of the image."""
    if "starts" in node.attributes:
        return [(plain_number(start), plain_number(end)) for _, start, end, _ in bounds]
    return list(zip(numbers_of(x[1]), numbers_of(x[2]), strict=True))


def _cut(follower: Follower, length: Number, start: Number, end: Number) -> list[str]:
    """Why a cut from ``start`` to ``end`` is another one in a larger image; finds up to where it is not."""

    def place(number: Number) -> Number:
        if not follower.holds(number):
            number = number + length
            return number if follower.holds(number) else Number({})
        return length if follower.holds(number - length) else number

    before, after = place(start), length - place(end)
    if before.constant and after.constant:
        return []
    return ["cuts at a place that does not follow the size of the image"]


@rule("Split", numbers=(1,))
def _split(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, a = first_input(x), node.attributes
    k = int(a.get("axis", 0)) % first.rank
    axis = (first.axes or ())[k]
    n = axis_size(axis)
    parts = a.get("split", value_of(x[1]) if len(x) > 1 else None)
    if parts is None:
        each = -(-n // len(node.outputs))
        parts = [min(each, n - i * each) for i in range(len(node.outputs))]
    parts = [int(p) for p in parts]
    if sum(parts) != n:
        raise CannotRun(f"deals {n} samples out in {parts}")
    numbers = numbers_of(x[1]) if len(x) > 1 and x[1] is not None else [plain_number(p) for p in parts]
    line, outputs, start, at = sole_line(axis), [], 0, plain_number(0)
    for size, number in zip(parts, numbers, strict=True):
        here = plain(size) if line is None else (lines.take(line, start, 1, size),)
        texts = ["cuts a flattened axis"] if line is None and is_tracked(axis) else []
        if not (number.constant if line is None else at.constant and (state.length(axis) - at - number).constant):
            texts.append("cuts at a place that does not follow the size of the image")
        axes = tuple(here if i == k else other for i, other in enumerate(first.axes or ()))
        outputs.append(Tensor(axes, first.dtype, faults=frozenset(state.remark(node, text) for text in texts)))
        start, at = start + size, at + number
    return outputs


@rule("Concat", pixels=ALL)
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
    joined = broadcast(state, node, [replace(t, value=_thin_value(g, k)) for t, g in zip(thin, given, strict=True)])
    axis: Axis = plain(sum(axis_size(a) for a in along))
    if any(is_tracked(a) for a in along):
        at = max((i for i, a in enumerate(along) if is_tracked(a)), key=lambda i: axis_size(along[i]))
        before, after = sum(axis_size(a) for a in along[:at]), sum(axis_size(a) for a in along[at + 1 :])
        line = sole_line(along[at])
        if line is None:
            return unknown(state, node, x, "lengthens a flattened axis")
        if any(i != at and t.followed is not None and k in t.followed.grown for i, t in enumerate(given)):
            fault = state.remark(node, "lengthens the image by what grows with it")
            joined = at_fault(joined, fault)
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
    first = first_input(x)
    order = node.attributes.get("perm", list(reversed(range(first.rank))))
    return [Tensor(tuple((first.axes or ())[int(k)] for k in order), first.dtype, pooled=first.pooled)]


@rule("Squeeze")
def _squeeze(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    axes = constants.axes_of(node.attributes, [None, *(value_of(t) for t in x[1:])], 1)
    gone = {a % first.rank for a in axes} if axes is not None else {k for k, n in enumerate(first.shape) if n == 1}
    if any(first.shape[k] != 1 for k in gone):
        raise CannotRun(f"would remove an axis of shape {list(first.shape)}")
    faults = frozenset({state.remark(node, "drops an axis of the image, cut to one sample")})
    lines_gone = any(is_tracked(a) for k, a in enumerate(first.axes or ()) if k in gone)
    left = tuple(a for k, a in enumerate(first.axes or ()) if k not in gone)
    return [Tensor(left, first.dtype, faults=faults if lines_gone else frozenset())]


@rule("Unsqueeze")
def _unsqueeze(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    axes = constants.axes_of(node.attributes, [None, *(value_of(t) for t in x[1:])], 1) or ()
    rank = first.rank + len(axes)
    new, rest = {a % rank for a in axes}, list(first.axes or ())
    return [Tensor(tuple(plain(1) if k in new else rest.pop(0) for k in range(rank)), first.dtype)]


@rule("Reshape", "Flatten", numbers=(1,))
def _reshape(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, a = first_input(x), node.attributes
    if node.op == "Flatten":
        k = int(a.get("axis", 1))
        k = k if k >= 0 else k + first.rank
        target: tuple[int, ...] = (math.prod(first.shape[:k]), math.prod(first.shape[k:]))
    else:
        given = a.get("shape", value_of(x[1]) if len(x) > 1 else None)
        if given is None:
            return unknown(state, node, x, "takes its shape from the image")
        resolved = constants.resolve_reshape(first.shape, [int(v) for v in given], bool(a.get("allowzero", 0)))
        if resolved is None:
            raise CannotRun(f"cannot give {list(first.shape)} the shape {[int(v) for v in given]}")
        target = resolved
    axes = redistribute(first.axes or (), target)
    if axes is None:
        return unknown(state, node, x, "mixes the image's axes with others")
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
        result.append(_join(taken) or plain(1))
    return tuple(result) if all(p == 1 for p in queue) else None


def _join(parts: list[Part]) -> Axis:
    """(line, k) is the line with every sample k times: what a pixel shuffle leaves."""
    if len(parts) == 2 and isinstance(parts[0], Line) and isinstance(parts[1], int):
        return (lines.repeat(parts[0], parts[1]),)
    return tuple(parts)


@rule("DepthToSpace", "SpaceToDepth")
def _shuffle(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, b = first_input(x), int(node.attributes["blocksize"])
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


@rule("Expand", numbers=(1,))
def _expand(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first = first_input(x)
    shape = value_of(x[1]) if len(x) > 1 else None
    if shape is None:
        return unknown(state, node, x, "takes its shape from the image")
    result = merged_shape(first, [int(n) for n in shape])
    for number, axis in zip(reversed(numbers_of(x[1])), reversed(result.axes or ()), strict=False):
        if not number.constant and not is_tracked(axis):
            return [at_fault(result, state.remark(node, "spreads numbers over the size of the image"))]
    return [result]


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
    first, times = first_input(x), value_of(x[1])
    if times is None:
        return unknown(state, node, x, "repeats as often as the image says")
    result, texts = [], []
    for axis, k in zip(first.axes or (), times.ravel(), strict=True):
        if int(k) == 1:
            result.append(axis)
            continue
        if is_tracked(axis):
            texts.append("repeats the image")
        result.append(plain(axis_size(axis) * int(k)))
    return [Tensor(tuple(result), first.dtype, faults=frozenset(state.remark(node, t) for t in texts))]


@rule("Gather", pixels=(0, 1))
def _gather(state: Walk, node: Node, x: Inputs) -> list[Tensor]:
    first, indices = first_input(x), x[1]
    k = int(node.attributes.get("axis", 0)) % max(1, first.rank)
    if indices is None:
        raise CannotRun("has no indices")
    axes = first.axes or ()
    if not indices.constant:
        if not first.constant:
            return unknown(state, node, x, "reads where the image's content says")
        return [Tensor((*axes[:k], *(indices.axes or ()), *axes[k + 1 :]), first.dtype)]
    array = value_of(indices)
    if not is_tracked(axes[k]):
        return [Tensor((*axes[:k], *(indices.axes or ()), *axes[k + 1 :]), first.dtype)]
    line = sole_line(axes[k])
    if array is None or line is None or array.ndim != 1 or (moved := _gather_line(line, array)) is None:
        return unknown(state, node, x, "reads by a list of positions in the image")
    return [Tensor((*axes[:k], (moved,), *axes[k + 1 :]), first.dtype)]


def _gather_line(line: Line, indices: Array) -> Line | None:
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
            mode = "reflect" if (lines.mirror_index(np.arange(-before, n + after), n) == at).all() else "edge"
            expected = lines.mirror_index if mode == "reflect" else (lambda i, k: np.clip(i, 0, k - 1))
            if (expected(np.arange(-before, n + after, dtype=np.int64), n) == at).all():
                return lines.pad(line, before, after, mode)
    return None
