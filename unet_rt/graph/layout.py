"""Which axes of a graph's inputs are batch, channels and space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .file import Graph, Node, Value
from .line import input_line
from .tensor import Axis, plain, value_of
from .walk import walk

SPATIAL = {1: "X", 2: "YX", 3: "ZYX"}


def spatial_letters(letters: str) -> str:
    """The letters of axes that are spatial, in their order."""
    return "".join(a for a in letters if a in "ZYX")


_LAYOUT_FREE = {
    "Cast", "Identity", "Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Clip", "BatchNormalization", "LeakyRelu",
    "Tanh",
    "InstanceNormalization", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
    "Pad", "Dropout", "Neg", "Abs", "Sqrt", "Pow", "Log",
    "Exp",
}  # fmt: skip
_LAYOUT_KNOWN = {
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "DepthToSpace",
    "SpaceToDepth", "ConvInteger", "QLinearConv", "InstanceNormalization", "BatchNormalization", "FusedConv", "LRN",
}  # fmt: skip


def layout(graph: Graph, value: Value) -> tuple[str, int]:
    """Axes of an input as letters, and its number of channels, from the first layer that says which is which."""
    rank = len(value.shape or ())
    shape = value.shape or ()
    labels: dict[str, list[int | None]] = {value.name: list(range(rank))}
    for node in graph.nodes:
        here = labels.get(node.inputs[0]) if node.inputs and not node.domain else None
        if here is None:
            here = next((labels[i] for i in node.inputs if i in labels), None)
            if here is None or node.op not in ("Add", "Mul", "Concat"):
                continue
        if node.op in _LAYOUT_KNOWN and 3 <= len(here) <= 5:
            return _letters_of(graph, node, here, shape)
        if node.op in _LAYOUT_FREE or node.op == "Concat":
            result = here
        elif node.op == "Transpose":
            order = node.attributes.get("perm", list(reversed(range(len(here)))))
            result = [here[k] for k in order]
        elif node.op == "Unsqueeze":
            axes = node.attributes.get("axes")
            if axes is None and len(node.inputs) > 1:
                axes = _axes_constant(graph, node.inputs[1])
            if axes is None:
                continue
            n, rest = len(here) + len(axes), list(here)
            new = {int(a) % n for a in axes}
            result = [None if k in new else rest.pop(0) for k in range(n)]
        else:
            continue
        for name in node.outputs:
            labels.setdefault(name, result)
    return _guess_letters(shape)


def _axes_constant(graph: Graph, name: str) -> list[int] | None:
    if name in graph.constants:
        array = graph.constants[name].value()
        return None if array is None else [int(a) for a in array.ravel()]
    node = graph.producers().get(name)
    if node is None or node.op != "Constant":
        return None
    given = walk(replace_nodes(graph, (node,)), {v.name: () for v in graph.inputs}, ()).tensors.get(name)
    array = value_of(given)
    return None if array is None else [int(a) for a in array.ravel()]


def replace_nodes(graph: Graph, nodes: tuple[Node, ...]) -> Graph:
    """``graph`` with other nodes."""
    return Graph(
        nodes, graph.inputs, graph.outputs, graph.constants, graph.opset, graph.opsets, graph.metadata, graph.folder
    )


def _letters_of(graph: Graph, node: Node, labels: list[int | None], shape: Sequence[int | None]) -> tuple[str, int]:
    letters = ["?"] * len(shape)
    for k, label in enumerate(labels):
        if label is not None:
            letters[label] = "N" if k == 0 else "C" if k == 1 else SPATIAL[len(labels) - 2][k - 2]
    channel = labels[1]
    channels = shape[channel] if channel is not None else 1
    if channels is None:
        weight = (
            graph.constants.get(node.inputs[3 if node.op == "QLinearConv" else 1]) if len(node.inputs) > 1 else None
        )
        channels = 1
        if (
            weight is not None
            and node.op in ("Conv", "ConvInteger", "QLinearConv", "FusedConv")
            and len(weight.shape) > 1
        ):
            channels = weight.shape[1] * int(node.attributes.get("group", 1))
        elif weight is not None and weight.shape:
            channels = weight.shape[0]
    return "".join(letters), channels


def _guess_letters(shape: Sequence[int | None]) -> tuple[str, int]:
    rank = len(shape)
    few = [n is not None and n <= 4 for n in shape]
    if rank in (4, 5):
        spatial = SPATIAL[rank - 2]
        if few[-1] and not few[1]:
            return f"N{spatial}C", shape[-1] or 1
        return f"NC{spatial}", shape[1] or 1
    if rank == 3:
        if few[-1] and not few[0]:
            return "YXC", shape[-1] or 1
        return ("CYX", shape[0] or 1) if few[0] else ("NYX", 1)
    return ("YX", 1) if rank == 2 and not any(few) else ("?" * rank, 1)


def free_export(letters: Mapping[str, str]) -> str:
    """What to do about baked sizes, with the line of code: for inputs of these axes."""
    names = {"Z": "depth", "Y": "height", "X": "width"}
    axes = {name: {k: names[a] for k, a in enumerate(own) if a in names} for name, own in letters.items()}
    given = {name: own for name, own in axes.items() if own}
    return (
        "for other sizes export it with free ones (dynamic axes): torch.onnx.export(model, image, "
        f'"free.onnx", input_names={list(letters)}, dynamic_axes={given})'
    )


def input_axes(
    graph: Graph, letters: Mapping[str, str], channels: Mapping[str, int], sizes: tuple[int, ...], batch: int
) -> dict[str, tuple[Axis, ...]]:
    """Concrete axes of every input."""
    result = {}
    for value in graph.inputs:
        own = letters[value.name]
        spatial = spatial_letters(own)
        axes: list[Axis] = []
        for letter, n in zip(own, value.shape or (), strict=True):
            if letter in spatial and len(spatial) == len(sizes):
                k = spatial.index(letter)
                axes.append((input_line(k, sizes[k]),))
            elif letter == "N":
                axes.append(plain(batch))
            elif letter == "C":
                axes.append(plain(channels[value.name]))
            else:
                axes.append(plain(n or 1))
        result[value.name] = tuple(axes)
    return result
