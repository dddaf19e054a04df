"""Numbers that a graph computes from its size, written as constants where every size gives the same.

Exporters with free sizes compute the ends of a centre crop, the target of an up-sampling or a padding from ``Shape``.
Converters that know a graph at one size keep what these come to there, and are wrong at every other. Counted from the
far edge, and as a factor, the same numbers are constants.

Cases: starts and ends of Slice, ``sizes`` of Resize (which becomes ``scales``), pads of Pad, that are computed from the
size, and that two walks at different sizes give alike, counted from either end: rewritten. Everything else is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from ..constants import Array
from ..tensor import Tensor, value_of
from .outputs import keep_outputs

if TYPE_CHECKING:
    import onnx

TO_THE_END = 2**31 - 1  # the end of a slice that goes to the last sample

Tensors = Mapping[str, Tensor]


def plain_sizes(model: onnx.ModelProto, first: Tensors, second: Tensors) -> int:
    """Rewrites ``model`` in place; returns the number of nodes rewritten (0 when called again).

    Args:
        model: The graph.
        first, second: What two walks know of its tensors, at sizes that differ along every axis.
    """
    walks, count = (first, second), 0
    for node in model.graph.node:
        new: dict[int, Array] | None = None
        if node.op_type == "Slice":
            new = _slice(node, walks)
        elif node.op_type == "Resize":
            new = _resize(node, walks)
        elif node.op_type == "Pad" and len(node.input) > 1:
            new = _same(node, 1, walks)
        for k, array in (new or {}).items():
            _write(model, node, k, array)
        count += bool(new)
    if count:  # what made the numbers is of no more use
        keep_outputs(model, {value.name for value in model.graph.output})
    return count


def _computed(name: str, walks: Sequence[Tensors]) -> bool:
    """Whether a constant follows the size, as far as is known: those that were written down are left alone."""
    return bool(name) and any((t := walk.get(name)) is not None and t.followed is not None for walk in walks)


def _values(name: str, walks: Sequence[Tensors]) -> list[Array] | None:
    found = [value_of(walk.get(name)) for walk in walks]
    return None if any(v is None for v in found) else [np.asarray(v) for v in found]


def _same(node: onnx.NodeProto, k: int, walks: Sequence[Tensors]) -> dict[int, Array] | None:
    """An input that is the same at both sizes."""
    if not _computed(node.input[k], walks):
        return None
    values = _values(node.input[k], walks)
    return {k: values[0]} if values is not None and np.array_equal(values[0], values[1]) else None


def _slice(node: onnx.NodeProto, walks: Sequence[Tensors]) -> dict[int, Array] | None:
    """Starts and ends, counted from the near edge or from the far one."""
    if not any(_computed(name, walks) for name in node.input[1:3]):
        return None
    found = [_values(name, walks) for name in node.input[1:3]]
    shapes = [walk[node.input[0]].shape for walk in walks if node.input[0] in walk]
    if len(shapes) < 2 or any(v is None for v in found):
        return None
    axes = _values(node.input[3], walks) if len(node.input) > 3 and node.input[3] else None
    numbers = [v for v in found if v is not None]
    along = np.arange(numbers[0][0].size) if axes is None else axes[0].reshape(-1)
    new = dict[int, Array]()
    for k, values in enumerate(numbers, start=1):
        plain = [
            _from_an_edge([int(v.reshape(-1)[at]) for v in values], [s[int(axis)] for s in shapes], end=k == 2)
            for at, axis in enumerate(along)
        ]
        if any(n is None for n in plain):
            return None
        new[k] = np.array(plain, np.int64)
    if axes is not None:  # of one integer type with the bounds
        new[3] = along.astype(np.int64)
    if len(node.input) > 4 and node.input[4]:
        steps = _values(node.input[4], walks)
        if steps is None or not np.array_equal(steps[0], steps[1]):
            return None
        new[4] = steps[0].astype(np.int64)
    return new


def _from_an_edge(numbers: Sequence[int], sizes: Sequence[int], *, end: bool) -> int | None:
    """A bound of a slice that holds at both sizes; None where there is none."""
    if end and all(n >= size for n, size in zip(numbers, sizes, strict=True)):
        return TO_THE_END
    if numbers[0] == numbers[1]:
        return numbers[0]
    left = {n - size for n, size in zip(numbers, sizes, strict=True) if n >= 0}
    return left.pop() if len(left) == 1 and all(n >= 0 for n in numbers) and min(left) < 0 else None


def _resize(node: onnx.NodeProto, walks: Sequence[Tensors]) -> dict[int, Array] | None:
    """``sizes`` as factors, where both sizes give the same."""
    if len(node.input) < 4 or not _computed(node.input[3], walks) or any(a.name == "axes" for a in node.attribute):
        return None
    wanted = _values(node.input[3], walks)
    shapes = [walk[node.input[0]].shape for walk in walks if node.input[0] in walk]
    if wanted is None or len(shapes) < 2:
        return None
    factors = [
        [Fraction(int(n), size) for n, size in zip(want.reshape(-1), shape, strict=True)]
        for want, shape in zip(wanted, shapes, strict=True)
    ]
    return {2: np.array([float(f) for f in factors[0]], np.float32)} if factors[0] == factors[1] else None


def _write(model: onnx.ModelProto, node: onnx.NodeProto, k: int, array: Array) -> None:
    from onnx import numpy_helper

    name = f"{node.output[0]}/plain_{k}"
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    node.input[k] = name
    if node.op_type == "Resize":
        del node.input[3:]
