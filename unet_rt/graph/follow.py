"""Constants computed from the size of the image, followed element by element through the arithmetic of exporters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import constants
from .constants import Array
from .numbers import Follower, LostError, Number, plain_number

_MAX_NUMBERS = 4096


@dataclass(frozen=True)
class Followed:
    """How the elements of a constant follow the size.

    Attributes:
        numbers: Its elements, one for all along an axis whose extent follows the image. Empty where lost.
        grown: Axes whose extent follows the image.
        lost: Why it cannot be followed, "" where it can.
    """

    numbers: NDArray[np.object_]
    grown: frozenset[int] = frozenset()
    lost: str = ""

    @property
    def changes(self) -> bool:
        """Whether an element is another number at another size, as far as is known."""
        return bool(self.lost) or not all(n.constant for n in self.numbers.ravel())


def lost(text: str) -> Followed:
    return Followed(np.empty(0, object), lost=text)


def plain_numbers(array: Array) -> NDArray[np.object_]:
    """The elements of an array that does not depend on the size."""
    if array.size > _MAX_NUMBERS:
        raise LostError("computes with more numbers than are followed")
    result = np.empty(array.shape, object)
    for index in np.ndindex(array.shape):
        result[index] = plain_number(array[index].item())
    return result


def _flag(value: bool) -> Number:
    return plain_number(int(value))


def _truth(n: Number) -> bool:
    if not n.constant:
        raise LostError("takes a number for yes or no")
    return bool(n.terms)


_POINTWISE: dict[str, Callable[..., Number]] = {
    "Add": lambda f, a, b: a + b,
    "Sub": lambda f, a, b: a - b,
    "Mul": lambda f, a, b: a * b,
    "Neg": lambda f, a: -a,
    "Abs": lambda f, a: a if f.holds(a) else -a,
    "Sign": lambda f, a: plain_number(0 if f.equal(a, Number({})) else 1 if f.holds(a) else -1),
    "Floor": lambda f, a: f.floor(a),
    "Ceil": lambda f, a: -f.floor(-a),
    "Round": lambda f, a: f.round(a),
    "Equal": lambda f, a, b: _flag(f.equal(a, b)),
    "Less": lambda f, a, b: _flag(not f.holds(a - b)),
    "LessOrEqual": lambda f, a, b: _flag(f.holds(b - a)),
    "Greater": lambda f, a, b: _flag(not f.holds(b - a)),
    "GreaterOrEqual": lambda f, a, b: _flag(f.holds(a - b)),
    "And": lambda f, a, b: _flag(_truth(a) and _truth(b)),
    "Or": lambda f, a, b: _flag(_truth(a) or _truth(b)),
    "Xor": lambda f, a, b: _flag(_truth(a) != _truth(b)),
    "Not": lambda f, a: _flag(not _truth(a)),
    "Where": lambda f, c, a, b: a if _truth(c) else b,
    "Min": lambda f, *given: reduce(lambda a, b: a if f.holds(b - a) else b, given),
    "Max": lambda f, *given: reduce(lambda a, b: a if f.holds(a - b) else b, given),
}
# Numbers go where they went before; of these operators all inputs but the first say where.
_MOVES = ("Gather", "Slice", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Dropout")
_INT = ("Cast", "Div", "Mod")


def follow(
    op: str,
    attributes: Mapping[str, Any],
    inputs: Sequence[tuple[Array | None, Followed | None]],
    result: Array,
    follower: Follower,
) -> Followed | None:
    """How the result of a node follows the size, whose inputs are constants, some of them followed; None: it does not.

    Args:
        op, attributes: The node.
        inputs: The value of each input at the size of the walk, and how it follows the size, where it does.
        result: Its value.
        follower: Collects where the answer holds.
    """
    try:
        for _, one in inputs:
            if one is not None and one.lost:
                return lost(one.lost)
        if not any(one is not None and (one.changes or one.grown) for _, one in inputs):
            return None
        found = _followed(op, attributes, inputs, result, follower)
        _check(found, result, follower.sizes)
        return found
    except (LostError, ValueError, IndexError, KeyError, TypeError) as reason:
        what = str(reason) if isinstance(reason, LostError) else "computes from the size in a way that is not followed"
        return lost(f"{follower.node[1]} {what}")


def _followed(
    op: str,
    attributes: Mapping[str, Any],
    inputs: Sequence[tuple[Array | None, Followed | None]],
    result: Array,
    follower: Follower,
) -> Followed:
    if op in _POINTWISE or op in _INT:
        return _pointwise(op, attributes, inputs, result, follower)
    grown = inputs[0][1].grown if inputs[0][1] is not None else frozenset[int]()
    if op in ("Expand", "ConstantOfShape"):
        return _spread(op, attributes, inputs, result)
    if op in _MOVES:
        if any(one is not None and (one.changes or one.grown) for _, one in inputs[1:]):
            raise LostError("takes numbers from where the size says")
        first = _numbers(inputs[0])
        if grown and op == "Transpose":
            order = list(attributes.get("perm") or reversed(range(first.ndim)))
            return Followed(first.transpose(order), frozenset(order.index(k) for k in grown))
        if grown and op == "Unsqueeze":
            axes = constants.axes_of(attributes, [array for array, _ in inputs], 1) or ()
            new = {a % result.ndim for a in axes}
            left = [k for k in range(result.ndim) if k not in new]
            return Followed(np.expand_dims(first, sorted(new)), frozenset(left[k] for k in grown))
        if grown and op not in ("Identity", "Dropout"):
            raise LostError("moves numbers of a list as long as the image")
        moved = constants.evaluate_node(op, attributes, [first, *(array for array, _ in inputs[1:])])
        return Followed(np.asarray(moved, object), grown)
    if any(one is not None and one.grown for _, one in inputs):
        raise LostError("computes with a list as long as the image")
    if op == "Concat":
        return Followed(np.concatenate([_numbers(one) for one in inputs], axis=attributes["axis"]))
    if op in ("ReduceProd", "ReduceSum"):
        axes_ = constants.axes_of(attributes, [array for array, _ in inputs], 1)
        keep = bool(attributes.get("keepdims", 1))
        each: Any = np.multiply.reduce if op == "ReduceProd" else np.add.reduce
        numbers = _numbers(inputs[0])
        reduced: Any = each(numbers, axis=tuple(range(numbers.ndim)) if axes_ is None else axes_, keepdims=keep)
        return Followed(_array(reduced))
    raise LostError("computes from the size in a way that is not followed")


def _numbers(one: tuple[Array | None, Followed | None]) -> NDArray[np.object_]:
    array, followed = one
    if followed is not None:
        return followed.numbers
    if array is None:
        raise LostError("computes with a number that is not known")
    return plain_numbers(array)


def _array(value: Any) -> NDArray[np.object_]:
    if isinstance(value, np.ndarray):
        return value
    result = np.empty((), object)
    result[()] = value
    return result


def _pointwise(
    op: str,
    attributes: Mapping[str, Any],
    inputs: Sequence[tuple[Array | None, Followed | None]],
    result: Array,
    follower: Follower,
) -> Followed:
    arrays = [_numbers(one) for one in inputs if one[0] is not None or one[1] is not None]
    grown: set[int] = set()
    for _, one in inputs:
        if one is not None:
            grown |= {k + result.ndim - one.numbers.ndim for k in one.grown}
    spread = np.broadcast_arrays(*arrays)
    if any(spread[0].shape[k] != 1 for k in grown):
        raise LostError("meets a list of one length with one as long as the image")
    floats = np.issubdtype(result.dtype, np.floating)
    numbers = np.empty(spread[0].shape, object)
    for index in np.ndindex(numbers.shape):
        given: list[Any] = [array[index] for array in spread]
        number = _one(op, attributes, given, floats, result.dtype == np.bool_, follower)
        # What does not change is what the walk has, rounding and all.
        numbers[index] = plain_number(result[index].item()) if floats and number.constant else number
    return Followed(numbers, frozenset(grown))


def _one(
    op: str, attributes: Mapping[str, Any], given: Sequence[Number], floats: bool, truths: bool, follower: Follower
) -> Number:
    if op == "Cast":
        if truths:
            return _flag(not follower.equal(given[0], Number({})))
        return follower.as_float(given[0], given) if floats else follower.truncate(given[0])
    if op == "Div":
        number = follower.divide(*given)
        number = number if floats else follower.truncate(number)
    elif op == "Mod":
        number = follower.modulo(given[0], given[1], bool(attributes.get("fmod", 0)))
    else:
        compares = op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Min", "Max", "Sign", "Mod")
        if compares and any(n.rounded for n in given):
            raise LostError("compares numbers that float32 rounds")
        number = _POINTWISE[op](follower, *given)
    return follower.as_float(number, given) if floats and op not in ("Floor", "Ceil", "Round") else number


def _spread(
    op: str, attributes: Mapping[str, Any], inputs: Sequence[tuple[Array | None, Followed | None]], result: Array
) -> Followed:
    """Expand, ConstantOfShape: a shape that follows the image, full of few numbers."""
    shape = _numbers(inputs[-1])
    if op == "ConstantOfShape":
        value = plain_numbers(np.asarray(attributes.get("value", np.zeros(1, np.float32))).reshape(-1)[:1])
        first, old = value.reshape((1,) * result.ndim), frozenset[int]()
    else:
        first = _numbers(inputs[0])
        old = inputs[0][1].grown if inputs[0][1] is not None else frozenset()
    lead = result.ndim - first.ndim
    grown = {k + lead for k in old}
    grown |= {k + result.ndim - len(shape) for k, n in enumerate(shape) if not n.constant}
    thin = [1 if k in grown else n for k, n in enumerate(result.shape)]
    if any(first.shape[k] != 1 for k in range(first.ndim) if k + lead in grown):
        raise LostError("meets a list of one length with one as long as the image")
    if math.prod(thin) > _MAX_NUMBERS:
        raise LostError("computes with more numbers than are followed")
    return Followed(np.broadcast_to(first, thin), frozenset(grown))


def _check(found: Followed, result: Array, sizes: Sequence[int]) -> None:
    """What was followed is what the walk has; LostError where it is not."""
    corner = result[tuple(slice(0, 1 if k in found.grown else None) for k in range(result.ndim))]
    if corner.shape != found.numbers.shape:
        raise LostError("computes from the size in a way that is not followed")
    for index in np.ndindex(corner.shape):
        number: Any = found.numbers[index]
        if not math.isclose(float(number.at(sizes)), float(corner[index]), rel_tol=1e-6):
            raise LostError("computes from the size in a way that is not followed")
