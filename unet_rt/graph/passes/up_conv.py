"""ConvTranspose with kernel = stride as a 1 x 1 convolution and DepthToSpace: the same sums, one per output sample.

Such an up-convolution (the paper's 2 x 2) has no overlap: output sample ``(s i + a, s j + b)`` of channel ``o`` is
``sum_c x[c, i, j] w[c, o, a, b] + bias[o]``, which is channel ``o s s + a s + b`` of a 1 x 1 convolution, put in place by
DepthToSpace in CRD order.

Cases: ConvTranspose in 2-D, square kernel equal to its strides, no dilation, padding, output padding or groups, weights
(and bias, if any) initialisers: rewritten. Everything else is left alone.

Why: ONNX Runtime's matrix kernel for ConvTranspose sums in another order when maps are small or threads are many, so
that a tile's bits differ from the whole image's (layers of more than 128 input channels); its 1 x 1 convolution does not.
It is an ordinary convolution, too, which every backend quantises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .fold import refill

if TYPE_CHECKING:
    import onnx


def up_conv(model: onnx.ModelProto) -> int:
    """Rewrites ``model`` in place; returns the number of nodes rewritten (0 when called again)."""
    from onnx import helper, numpy_helper

    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < 11:  # DepthToSpace has no CRD order before
        return 0
    weights = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:  # exporters write equal weights once, and Identity for the others
        if node.op_type == "Identity" and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
    replaced: set[str] = set()
    nodes, count = [], 0
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        kernel = _kernel(node, attributes, weights)
        if kernel is None:
            nodes.append(node)
            continue
        name, size = f"{node.output[0]}/up_conv", kernel
        title = node.name or node.output[0]  # names are optional, and no two nodes may share one
        w = numpy_helper.to_array(weights[node.input[1]])  # (C, O, s, s)
        flat = w.transpose(1, 2, 3, 0).reshape(-1, w.shape[0], 1, 1)  # (O s s, C, 1, 1)
        made = [numpy_helper.from_array(np.ascontiguousarray(flat), f"{name}/weight")]
        if len(node.input) > 2 and node.input[2]:
            bias = numpy_helper.to_array(weights[node.input[2]])
            made.append(numpy_helper.from_array(np.repeat(bias, size * size), f"{name}/bias"))
        model.graph.initializer.extend(made)
        inputs = [node.input[0], *(t.name for t in made)]
        nodes.append(helper.make_node("Conv", inputs, [name], name=f"{title}/conv", kernel_shape=[1, 1]))
        shuffle = helper.make_node(
            "DepthToSpace", [name], [node.output[0]], name=f"{title}/shuffle", blocksize=size, mode="CRD"
        )
        nodes.append(shuffle)
        replaced.update(node.input[1:])
        count += 1
    if count:
        refill(model.graph.node, nodes)
        nested = any(a.type in (a.GRAPH, a.GRAPHS) for node in nodes for a in node.attribute)
        unused = set() if nested else replaced - {name for node in nodes for name in node.input}
        kept = [t for t in model.graph.initializer if t.name not in unused]
        refill(model.graph.initializer, kept)
    return count


def _kernel(node: onnx.NodeProto, attributes: dict[str, Any], weights: dict[str, onnx.TensorProto]) -> int | None:
    """Side of the kernel of a node that can be rewritten, None for any other."""
    if node.op_type != "ConvTranspose" or node.domain not in ("", "ai.onnx"):
        return None
    if any(name not in weights for name in node.input[1:] if name):
        return None
    shape = list(weights[node.input[1]].dims)
    if len(shape) != 4 or shape[2] != shape[3]:
        return None
    size = int(shape[2])
    lists = ("strides", "dilations", "pads", "output_padding")
    ints = {key: list(value) for key, value in attributes.items() if key in lists}
    plain = (
        ints.get("strides", [1, 1]) == [size, size]
        and ints.get("dilations", [1, 1]) == [1, 1]
        and attributes.get("group", 1) == 1
        and not any(ints.get("pads", []))
        and not any(ints.get("output_padding", []))
        and "output_shape" not in attributes
        and attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    )
    return size if plain and size > 1 else None
