"""Constants, identities and batch normalisation folded into what stands before them.

Cases:

- ``Constant`` nodes become initialisers; ``Identity`` of an initialiser, or of a tensor inside the graph, disappears, and
  so does ``Dropout``, which does nothing at inference.
- ``BatchNormalization`` at inference after a ``Conv`` or ungrouped ``ConvTranspose`` whose output nothing else reads:
  weight and bias of that layer are scaled and shifted, in float64, and rounded once.

Everything else is left alone. Why: quantisation and FP16 look for ``Conv -> Relu``; a normalisation between them would be
one more rounding to eight bits, and one more pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


def fold(model: onnx.ModelProto) -> int:
    """Rewrites ``model`` in place; returns the number of nodes that were folded away (0 when called again)."""
    if any(a.type in (a.GRAPH, a.GRAPHS) for node in model.graph.node for a in node.attribute):
        return 0  # names of outer tensors may be used inside
    return _constants(model) + _identities(model) + _normalisations(model)


def _constants(model: onnx.ModelProto) -> int:
    kept, count = [], 0
    for node in model.graph.node:
        value = next((a for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(value.t)
            tensor.name = node.output[0]
            count += 1
        else:
            kept.append(node)
    if count:
        refill(model.graph.node, kept)
    return count


def _identities(model: onnx.ModelProto) -> int:
    outputs = {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    kept, count = [], 0
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = renamed.get(name, name)
        plain = node.op_type == "Identity" or (node.op_type == "Dropout" and not any(node.output[1:]))
        if plain and node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
            count += 1
        else:
            kept.append(node)
    if count:
        refill(model.graph.node, kept)
    return count


def _normalisations(model: onnx.ModelProto) -> int:
    from onnx import helper, numpy_helper

    tensors = {t.name: t for t in model.graph.initializer}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    for value in model.graph.output:
        readers[value.name] = readers.get(value.name, 0) + 1
    made_by = {name: node for node in model.graph.node for name in node.output}
    gone = []
    for norm in model.graph.node:
        if norm.op_type != "BatchNormalization" or any(name not in tensors for name in norm.input[1:5]):
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in norm.attribute}
        layer = made_by.get(norm.input[0])
        if layer is None or layer.op_type not in ("Conv", "ConvTranspose") or readers[norm.input[0]] != 1:
            continue
        groups = next((a.i for a in layer.attribute if a.name == "group"), 1)
        if attributes.get("training_mode", 0) or any(name not in tensors for name in layer.input[1:] if name):
            continue
        if layer.op_type == "ConvTranspose" and groups != 1:
            continue

        def array(name: str) -> Any:
            return numpy_helper.to_array(tensors[name]).astype(np.float64)

        gamma, beta, mean, variance = (array(name) for name in norm.input[1:5])
        factor = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
        weight = array(layer.input[1])
        axis = 0 if layer.op_type == "Conv" else 1
        shape = [1] * weight.ndim
        shape[axis] = -1
        bias = array(layer.input[2]) if len(layer.input) > 2 and layer.input[2] else np.zeros_like(factor)
        kind = numpy_helper.to_array(tensors[layer.input[1]]).dtype
        name = f"{norm.output[0]}/fold"  # a new name: other layers may share the old weights
        made = [
            numpy_helper.from_array((weight * factor.reshape(shape)).astype(kind), f"{name}/weight"),
            numpy_helper.from_array(((bias - mean) * factor + beta).astype(kind), f"{name}/bias"),
        ]
        model.graph.initializer.extend(made)
        first = layer.input[0]
        del layer.input[:]
        layer.input.extend([first, made[0].name, made[1].name])
        layer.output[0] = norm.output[0]
        gone.append(norm.output[0])
    if gone:
        kept = [n for n in model.graph.node if n.op_type != "BatchNormalization" or n.output[0] not in gone]
        refill(model.graph.node, kept)
        drop_unused(model)
    return len(gone)


def refill(field: Any, messages: Iterable[Any]) -> None:
    """Gives a repeated field (nodes, initialisers, ...) another content: by copies, as most of it lies in the field now."""
    copies = []
    for message in messages:
        copy = type(message)()
        copy.CopyFrom(message)
        copies.append(copy)
    del field[:]
    field.extend(copies)


def drop_unused(model: onnx.ModelProto) -> None:
    """Initialisers that nothing reads are dropped."""
    used = {name for node in model.graph.node for name in node.input} | {v.name for v in model.graph.output}
    kept = [t for t in model.graph.initializer if t.name in used]
    if len(kept) < len(model.graph.initializer):
        refill(model.graph.initializer, kept)


def sort_nodes(model: onnx.ModelProto) -> None:
    """Nodes in an order in which they can run."""
    ready = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input} | {""}
    made_by = {name: node for node in model.graph.node for name in node.output}
    done: dict[int, Any] = {}
    for node in model.graph.node:
        todo = [node]
        while todo:
            here = todo[-1]
            if id(here) in done:
                todo.pop()
                continue
            waiting = [made_by[n] for n in here.input if n not in ready and id(made_by[n]) not in done]
            if waiting:
                todo += waiting
            else:
                done[id(here)] = here
                ready.update(here.output)
                todo.pop()
    refill(model.graph.node, done.values())
