"""Labels at the end of a graph, replaced by the values that they are made of.

Labels cannot be blended, say nothing of how sure they are, and hide from parity how far it is to another answer. What
makes them of the values is done here anyway, behind the stitching.

Cases, for an output that is one of these or was moved, cast or reshaped after it:

- ``ArgMax`` over channels (of ties the first, as here): its input. A Softmax before it stays.
- ``Greater`` and ``GreaterOrEqual`` of the values and one constant number: the values, and the constant becomes the
  declared threshold, unless the file declares one.

Left alone: an ArgMax over space, or whose input is an output already; several constants; ``ArgMin``, ``Less``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..tensor import Tensor, is_tracked
from .outputs import keep_outputs

if TYPE_CHECKING:
    import onnx

LABELS = ("ArgMax", "Greater", "GreaterOrEqual")
_MOVES = ("Cast", "Identity", "Squeeze", "Unsqueeze", "Transpose", "Reshape", "Flatten")
_SIGMOID = ("Sigmoid", "HardSigmoid")


def label_nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that makes labels of values, by the output of the graph that it ends in."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for value in model.graph.output:
        node = made_by.get(value.name)
        while node is not None and node.op_type in _MOVES and not node.domain:
            node = made_by.get(node.input[0])
        if node is not None and node.op_type in LABELS and not node.domain:
            found[value.name] = node
    return found


def give_values(model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Rewrites ``model`` in place.

    Args:
        model: The model.
        tensors: What is known of its tensors, from a walk at any size.

    Returns:
        What was done, one sentence per output; () when called again.
    """
    from onnx import helper

    given = {value.name for value in model.graph.output}
    done = []
    for name, node in label_nodes(model).items():
        values = node.input[0]
        tensor = tensors.get(values)
        if values in given or tensor is None or tensor.axes is None or tensor.constant:
            continue
        channels = _channels(node, tensor)
        if channels is None:
            continue
        if node.op_type == "ArgMax":
            text = (
                f"ArgMax at the end is left to unet-rt: the output is {values}, the {channels} channels it chooses from"
            )
        else:
            threshold = _one_number(tensors.get(node.input[1]))
            if threshold is None or not _declare_threshold(model, values, threshold, channels):
                continue
            text = f"{node.op_type} at the end is left to unet-rt: the output is {values}, its threshold {threshold:g}"
        for k, value in enumerate(model.graph.output):
            if value.name == name:
                axes = zip(tensor.axes, tensor.shape, strict=True)
                shape = [f"{values}_{j}" if is_tracked(axis) or not j else n for j, (axis, n) in enumerate(axes)]
                model.graph.output[k].CopyFrom(helper.make_tensor_value_info(values, tensor.dtype, shape))
        given = {value.name for value in model.graph.output}
        done.append(text)
    if done:
        keep_outputs(model, given)
    return tuple(done)


def _channels(node: onnx.NodeProto, tensor: Tensor) -> int | None:
    """Channels that a node decides over; None where it decides over something else."""
    from onnx import helper

    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type != "ArgMax":
        plain = [n for axis, n in zip(tensor.axes or (), tensor.shape, strict=True) if not is_tracked(axis)]
        return math.prod(plain)
    axis = int(attributes.get("axis", 0)) % tensor.rank
    if attributes.get("select_last_index", 0) or is_tracked((tensor.axes or ())[axis]) or tensor.shape[axis] < 2:
        return None
    return tensor.shape[axis]


def _one_number(tensor: Tensor | None) -> float | None:
    from ..tensor import value_of

    array = value_of(tensor) if tensor is not None and tensor.constant else None
    if array is None or array.size != 1 or not np.isfinite(array).all():
        return None
    return float(array.reshape(()))


def _declare_threshold(model: onnx.ModelProto, values: str, threshold: float, channels: int) -> bool:
    """Puts the threshold into the metadata, as what the file says of itself; False where it is no probability."""
    node = next((n for n in model.graph.node if values in n.output), None)
    probabilities = node is not None and node.op_type in _SIGMOID
    if probabilities and not 0 <= threshold <= 1:
        return False
    share = threshold if probabilities else 1 / (1 + math.exp(-max(min(threshold, 700.0), -700.0)))
    known = {p.key for p in model.metadata_props}
    said = {
        "unet_rt.task": "binary" if channels == 1 else "multilabel",
        "unet_rt.output_is": "probabilities" if probabilities else "logits",
        "unet_rt.threshold": repr(share),
    }
    if "unet_rt.contract" not in known:
        for key, value in said.items():
            if key not in known:
                model.metadata_props.add(key=key, value=value)
    return True
