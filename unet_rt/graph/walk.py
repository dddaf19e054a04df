"""One walk through a graph at one concrete size: for every tensor what its samples depend on.

A tensor is a constant (weights, shape arithmetic) or a field. Each tensor axis is a row-major product of parts: a
:class:`~unet_rt.graph.line.Line` follows a spatial axis of the input, a plain part (an ``int``) does not. Reshapes and
transposes move parts about; the rules below say what every operator does to them. What no rule covers is a node at
fault: the walk goes on as far as shapes are known, and everything behind the node is not exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np

from ..errors import size_text
from . import constants, file, rules_arithmetic, rules_layout, rules_quantised, rules_resize, rules_windows  # noqa: F401
from .file import Constant, Graph, Node
from .follow import Followed, follow, lost
from .line import TooLongError
from .numbers import LostError, Number
from .tensor import (
    RULES,
    Axis,
    CannotRun,
    Inputs,
    Tensor,
    Understood,
    Walk,
    at_fault,
    behind,
    constant_tensor,
    plain,
    unknown,
    value_of,
)

# What reading a malformed node raises: it must end as "not exact", never as a crash of whoever asked.
_MALFORMED = (ValueError, IndexError, KeyError, TypeError, ArithmeticError)
_UNKNOWN = 1 << 12  # work of asking ONNX for a shape


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


def _step(state: Walk, node: Node) -> None:
    if node.op == "If" and not node.domain:
        try:
            _branch(state, node)
        except _MALFORMED as error:
            state.broken.append(f"{node} cannot be read: {error}")
            fault = frozenset({state.remark(node, f"does not run at {size_text(state.sizes)}")})
            state.tensors |= {name: Tensor(None, faults=fault) for name in node.outputs}
        return
    given: Inputs = [state.tensors.get(name) if name else None for name in node.inputs]
    outputs = _outputs(state, node, given)
    state.work += sum(part.size for out in outputs for part in out.lines())
    constant = all(t is None or t.constant for t in given) and node.op not in _RANDOM
    missing = [Tensor(None, faults=frozenset({state.remark(node, "has an output that is not understood")}))]
    for name, out in zip(node.outputs, [*outputs, *missing * len(node.outputs)], strict=False):
        if name:
            out = behind(out, given)
            if constant and not out.constant:
                out = replace(out, constant=True, followed=_unread(node, given))
            state.tensors[name] = out
    state.order.append(node)


def _unread(node: Node, given: Inputs) -> Followed | None:
    """How a constant follows the size whose value is not computed."""
    if all(t is None or t.followed is None or not (t.changes or t.followed.grown) for t in given):
        return None
    return lost(f"{node} computes from the size in a way that is not followed")


_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")


def _outputs(state: Walk, node: Node, given: Inputs) -> list[Tensor]:
    try:
        return _understood(state, node, given)
    except CannotRun as reason:
        state.broken.append(f"{node} {reason}")
    except TooLongError as reason:
        state.broken.append(f"{node} {reason}")
        return unknown(state, node, given, str(reason))
    except LostError as reason:
        return unknown(state, node, given, str(reason))
    except _MALFORMED as error:
        state.broken.append(f"{node} cannot be read: {error}")
    return unknown(state, node, given, f"does not run at {size_text(state.sizes)}")


def _understood(state: Walk, node: Node, given: Inputs) -> list[Tensor]:
    if node.op == "Constant" and not node.domain:
        return [_constant_node(node)]
    if node.op in ("Shape", "Size") and not node.domain and given[0] is not None and given[0].axes is not None:
        return [_shape_of(state, node, given[0])]
    folded = _fold(state, node, given)
    if folded is not None:
        return [folded]
    understood = RULES.get(node.op) if node.domain in ("", "com.microsoft") else None
    if state.endless:
        raise TooLongError("is one of more and larger tensors than any network for images has")
    if understood is None:
        state.work += _UNKNOWN
        return unknown(state, node, given, "is not an operator whose dependence is known")
    if any(t is not None and t.axes is None for t in given):
        return [Tensor(None) for _ in node.outputs]
    return _unsaid(state, node, given, understood, understood.apply(state, node, given))


def _unsaid(state: Walk, node: Node, given: Inputs, understood: Understood, outputs: list[Tensor]) -> list[Tensor]:
    """``outputs`` of a rule, at fault where an input has a say that the rule does not look at."""
    if all(t is None or t.constant for t in given):
        return outputs
    for k, t in enumerate(given):
        if t is None or (not t.constant and (k in understood.pixels or t.faults)):
            continue  # what is at fault already says why
        if not t.constant:
            text = f"takes its input {k + 1} from the image"
        elif t.followed is not None and t.followed.lost:
            text = f"uses a number computed from the size of the image, which cannot be followed: {t.followed.lost}"
        elif t.changes and k not in understood.numbers:
            text = "uses a number computed from the size of the image"
        else:
            continue
        outputs = [o if o.faults else at_fault(o, state.remark(node, text)) for o in outputs]
    return outputs


def _constant_node(node: Node) -> Tensor:
    proto = node.attributes.get("value")
    if proto is not None and hasattr(proto, "dims"):
        return _constant(Constant(tuple(proto.dims), proto.data_type, proto, None))
    array = file.constant_attribute(node)
    return Tensor(None, constant=True) if array is None else constant_tensor(array)


def _shape_of(state: Walk, node: Node, x: Tensor) -> Tensor:
    part = slice(node.attributes.get("start", 0), node.attributes.get("end", x.rank))
    if node.op == "Size":
        result = constant_tensor(np.asarray(math.prod(x.shape), np.int64))
    else:
        result = constant_tensor(np.asarray(x.shape[part], np.int64))
    if x.followed is not None and (x.followed.lost or x.followed.grown):
        return replace(result, followed=lost(f"{node} measures what was made as large as the image"))
    if not x.lines():
        return result
    numbers = np.empty(x.rank, object)
    numbers[:] = [state.length(axis) for axis in x.axes or ()]
    if node.op == "Size":
        total = np.empty((), object)
        total[()] = math.prod(numbers, start=Number({(): Fraction(1)}))
        return replace(result, followed=Followed(total))
    return replace(result, followed=Followed(numbers[part]))


def _fold(state: Walk, node: Node, given: Inputs) -> Tensor | None:
    """The node as a constant, if all its inputs are known and small."""
    if node.domain or not given or any(t is not None and not t.constant for t in given):
        return None
    if sum(math.prod(t.shape) for t in given if t is not None and t.axes is not None) > constants.MAX_ELEMENTS:
        return None
    arrays = [value_of(t) for t in given]
    if any(t is not None and a is None for t, a in zip(given, arrays, strict=True)):
        return None
    attributes = dict(node.attributes)
    if node.op == "ConstantOfShape" and "value" in attributes:
        attributes["value"] = file.constant_attribute(node)
    try:
        with np.errstate(all="ignore"):  # numbers that a graph makes are its own; what divides by 0 is not followed
            result = constants.evaluate_node(node.op, attributes, arrays)
    except (ValueError, IndexError, KeyError, TypeError, ArithmeticError, MemoryError):
        return None
    if result is None or all(t is None or t.followed is None for t in given):
        return None if result is None else constant_tensor(result)
    follower = state.follower(node)
    inputs = [(a, None if t is None else t.followed) for a, t in zip(arrays, given, strict=True)]
    followed = follow(node.op, attributes, inputs, result, follower)
    return replace(constant_tensor(result), followed=followed, bounds=frozenset(follower.bounds))


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
    for inner in file.subgraph_nodes(branch, set(state.tensors)):
        # Remarks of the branch sort with its If.
        _step(state, replace(inner, index=node.index))
    unsure = condition_tensor.followed.lost if condition_tensor is not None and condition_tensor.followed else ""
    for name, value in zip(node.outputs, branch.output, strict=True):
        out = behind(state.tensors[value.name], [condition_tensor])
        if unsure:
            out = at_fault(out, state.remark(node, f"chooses its branch by the size, not followed: {unsure}"))
        state.tensors[name] = out
