"""Arithmetic on constants: the small integer sums by which exporters compute shapes, in NumPy."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Larger constants (weights) are never needed by value.
MAX_ELEMENTS = 1 << 20

# ONNX element types by number, as far as constants are made of them here.
DTYPES: dict[int, Any] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
    10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip
ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2}
NUMBERS = {np.dtype(v): k for k, v in DTYPES.items()}


def element_type(array: Array) -> int:
    """ONNX number of an array's dtype."""
    return int(NUMBERS.get(array.dtype, 1))


def resolve_reshape(old: Sequence[int], new: Sequence[int], allow_zero: bool) -> tuple[int, ...] | None:
    """Target shape with 0 and -1 filled in; None where the element counts do not fit."""
    shape = [old[k] if d == 0 and not allow_zero and k < len(old) else int(d) for k, d in enumerate(new)]
    total = int(np.prod(old, dtype=np.int64))
    if -1 in shape:
        rest = int(np.prod([d for d in shape if d != -1], dtype=np.int64))
        if rest == 0 or total % rest:
            return None
        shape[shape.index(-1)] = total // rest
    return tuple(shape) if int(np.prod(shape, dtype=np.int64)) == total else None


def slice_range(size: int, start: int, end: int, step: int) -> tuple[int, int]:
    """First index and number of samples of an ONNX slice along an axis of ``size``."""
    indices = range(size)[slice(*_slice_bounds(size, start, end, step))]
    return (indices.start if len(indices) else 0), len(indices)


def _slice_bounds(size: int, start: int, end: int, step: int) -> tuple[int | None, int | None, int]:
    if step > 0:
        return max(start, -size), max(end, -size), step
    # For a negative step ONNX clamps `end` to -1, which in Python would mean the last element.
    stop = None if end < -size else end
    return min(start, size - 1), stop, step


def _div(a: Array, b: Array) -> Array:
    if np.issubdtype(a.dtype, np.integer):
        return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), dtype=a.dtype)
    return np.asarray(a / b, dtype=a.dtype)


def _mod(a: Array, b: Array, fmod: int) -> Array:
    return np.asarray(np.fmod(a, b) if fmod else np.mod(a, b))


_BINARY: dict[str, Callable[[Array, Array], Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": _div, "Equal": operator.eq,
    "Less": operator.lt, "LessOrEqual": operator.le, "Greater": operator.gt, "GreaterOrEqual": operator.ge,
    "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor,
}  # fmt: skip
_UNARY: dict[str, Callable[[Array], Any]] = {
    "Identity": lambda a: a, "Neg": operator.neg, "Abs": np.abs, "Floor": np.floor, "Ceil": np.ceil, "Round": np.rint,
    "Not": np.logical_not, "Sqrt": np.sqrt, "Sign": np.sign, "Dropout": lambda a: a,
}  # fmt: skip
_REDUCE: dict[str, Callable[..., Any]] = {
    "ReduceProd": np.prod, "ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min,
}  # fmt: skip


def axes_of(attributes: Mapping[str, Any], inputs: Sequence[Array | None], position: int) -> tuple[int, ...] | None:
    """``axes`` from an attribute (older opsets) or from an input (newer ones)."""
    if "axes" in attributes:
        return tuple(int(a) for a in attributes["axes"])
    if len(inputs) > position and (given := inputs[position]) is not None:
        return tuple(int(a) for a in given.ravel())
    return None


def evaluate_node(op: str, attributes: Mapping[str, Any], inputs: Sequence[Array | None]) -> Array | None:
    """Value of a node whose inputs are all known; None where ``op`` is not one of these."""
    x = inputs[0] if inputs else None
    a = attributes
    if _elements(op, a, inputs) > MAX_ELEMENTS:
        return None
    if op in _BINARY and len(inputs) == 2:
        p, q = inputs
        return None if p is None or q is None else np.asarray(_BINARY[op](p, q))
    if op in ("Min", "Max"):
        known = [v for v in inputs if v is not None]
        return np.asarray(reduce(np.minimum if op == "Min" else np.maximum, known))
    if op == "Range":
        start, limit, delta = (v for v in inputs if v is not None)
        return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)
    if op == "Concat":
        return np.concatenate([v for v in inputs if v is not None], axis=a["axis"])
    if x is None:
        return None
    if op in _UNARY:
        return np.asarray(_UNARY[op](x), dtype=x.dtype)
    if op == "Mod":
        return None if inputs[1] is None else _mod(x, inputs[1], a.get("fmod", 0))
    if op == "Cast":
        dtype = DTYPES.get(a["to"])
        return None if dtype is None else np.trunc(x).astype(dtype) if a["to"] in (6, 7) else x.astype(dtype)
    if op == "Gather":
        return None if inputs[1] is None else np.take(x, inputs[1].astype(np.int64), axis=a.get("axis", 0))
    if op in ("Unsqueeze", "Squeeze"):
        return _squeeze(op, x, axes_of(a, inputs, 1))
    if op == "Slice":
        return _slice(a, x, inputs)
    if op == "Reshape":
        target = a["shape"] if "shape" in a else inputs[1]
        shape = None if target is None else resolve_reshape(x.shape, [int(v) for v in target], bool(a.get("allowzero")))
        return None if shape is None else x.reshape(shape)
    if op == "Transpose":
        return x.transpose(a.get("perm"))
    if op == "ConstantOfShape":
        value = a.get("value", np.zeros(1, np.float32))
        return np.broadcast_to(np.asarray(value).reshape(()), tuple(int(d) for d in x))
    if op == "Expand" and inputs[1] is not None:
        shape = np.broadcast_shapes(x.shape, tuple(int(d) for d in inputs[1]))
        return np.broadcast_to(x, shape)
    if op == "Where" and inputs[1] is not None and inputs[2] is not None:
        return np.where(x, inputs[1], inputs[2])
    if op in _REDUCE:
        axes = axes_of(a, inputs, 1)
        return np.asarray(_REDUCE[op](x, axis=axes, keepdims=bool(a.get("keepdims", 1))), dtype=x.dtype)
    return None


def _elements(op: str, a: Mapping[str, Any], inputs: Sequence[Array | None]) -> int:
    """Elements that a result is computed of where those may be many more than the inputs', else 0."""
    known = [v for v in inputs if v is not None]
    if op in _BINARY or op in ("Min", "Max", "Where", "Mod"):
        return math.prod(np.broadcast_shapes(*(v.shape for v in known)))
    if op == "Range":
        start, limit, delta = (v.item() for v in known)
        return int((limit - start) / delta)
    if op == "Gather" and len(known) == 2 and known[0].size:
        return int(known[0].size // known[0].shape[a.get("axis", 0)] * known[1].size)
    return 0


def _squeeze(op: str, x: Array, axes: tuple[int, ...] | None) -> Array:
    if op == "Squeeze":
        return np.squeeze(x, axis=axes)
    if axes is None:
        raise ValueError("Unsqueeze has no axes")
    return np.expand_dims(x, axes)


def _slice(a: Mapping[str, Any], x: Array, inputs: Sequence[Array | None]) -> Array | None:
    if (bounds := slice_arguments(a, [None, *inputs[1:]], x.ndim)) is None:
        return None
    index = [slice(None)] * x.ndim
    for axis, start, end, step in bounds:
        index[axis] = slice(*_slice_bounds(x.shape[axis], start, end, step))
    return x[tuple(index)]


def slice_arguments(
    a: Mapping[str, Any], inputs: Sequence[Array | None], rank: int
) -> list[tuple[int, int, int, int]] | None:
    """(axis, start, end, step) of a Slice node; None where one of them is not known."""
    if "starts" in a:
        starts, ends = list(a["starts"]), list(a["ends"])
        axes, steps = list(a.get("axes", range(len(starts)))), [1] * len(starts)
    else:
        arrays = [*inputs, None, None, None, None][:5]
        given = [None if v is None else [int(n) for n in v.ravel()] for v in arrays]
        if given[1] is None or given[2] is None:
            return None
        starts, ends = given[1], given[2]
        axes = given[3] if given[3] is not None else list(range(len(starts)))
        steps = given[4] if given[4] is not None else [1] * len(starts)
    return [(axis % rank, s, e, step) for axis, s, e, step in zip(axes, starts, ends, steps, strict=True)]
