"""The class decision inside the graph: an output returns labels (uint8) where it returned the network's values.

The labels are those of :func:`unet_rt.stitch.decide` on the values, bit for bit: the first of equal classes (``ArgMax``), or
what is larger than a threshold of its channel (``Greater``, on the network's own values: a probability of 0.5 is the logit
0). A Softmax or Sigmoid at the end stays: rounded probabilities tie where logits do not.

Cases:

- Outputs of float32: ``ArgMax`` over the channels, which stay as an axis of length 1, or ``Greater`` with the thresholds as
  an initialiser; then ``Cast`` to uint8. The output keeps its name and its axes.
- Outputs of float16, bfloat16 or float64: a ``Cast`` to float32 first, as engines return their values.
- Outputs that hold integers, labels among them: left alone.
- Decisions that make no labels, labels by other numbers than 0, 1, 2, ..., graphs older than opset 12 (``ArgMax`` does not
  say which of equals it takes): refused.

Why no build uses it: values are needed to blend tiles, for probabilities and to prove parity, and the decision is a pass of
a kernel over values that are in the cache (``benchmarks/bench_passes.py`` has both). It is for graphs that are served
elsewhere, where a label is a byte on the wire and the values are four for every class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError

if TYPE_CHECKING:
    import onnx

    from ..stitch import Decision

_OLDEST = 12  # opset


def decision(model: onnx.ModelProto, output: str, decided: Decision, axes: str) -> int:
    """Rewrites ``model`` in place; returns the number of outputs rewritten (0 when called again).

    Args:
        model: A graph.
        output: Name of the output, (N, K, *spatial) in the order of ``axes``.
        decided: An ``argmax`` or ``threshold``, as :func:`unet_rt.stitch.decide` makes it of the contract.
        axes: Of the output, e.g. ``"NCYX"``.

    Raises:
        GraphError: No such output, or a decision that a graph cannot take.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    value = next((v for v in graph.output if v.name == output), None)
    if value is None:
        raise GraphError(
            f"the graph has no output {output!r}; its outputs are {', '.join(v.name for v in graph.output)}"
        )
    tensor = value.type.tensor_type
    if tensor.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
        return 0
    if decided.op not in ("argmax", "threshold"):
        raise GraphError(f"the decision {decided.op!r} makes no labels; use a mask's, argmax or threshold")
    if decided.values != tuple(range(len(decided.values))):
        raise GraphError(f"labels {decided.values} are not 0, 1, 2, ...; give labels their values behind the graph")
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST:
        raise GraphError(f"the decision needs opset {_OLDEST}, the graph has {opset}; export it again")
    if "C" not in axes:
        raise GraphError(f"an output of axes {axes} has no channels to decide between")
    channel, inner = axes.index("C"), f"{output}/values"
    for node in graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                if name == output:
                    names[k] = inner
    given = inner
    if tensor.elem_type != TensorProto.FLOAT:
        given = f"{inner}/fp32"
        graph.node.append(helper.make_node("Cast", [inner], [given], name=given, to=TensorProto.FLOAT))
    labels = f"{output}/labels"
    if decided.op == "argmax":
        graph.node.append(helper.make_node("ArgMax", [given], [labels], name=labels, axis=channel, keepdims=1))
        dim = tensor.shape.dim[channel]
        dim.Clear()
        dim.dim_value = 1
    else:
        limits = np.array(decided.threshold, np.float32).reshape([-1 if a == "C" else 1 for a in axes])
        graph.initializer.append(numpy_helper.from_array(limits, f"{output}/threshold"))
        graph.node.append(helper.make_node("Greater", [given, f"{output}/threshold"], [labels], name=labels))
    graph.node.append(helper.make_node("Cast", [labels], [output], name=f"{output}/uint8", to=TensorProto.UINT8))
    tensor.elem_type = TensorProto.UINT8
    return 1
