"""Outputs that are lists of pixels, made images again.

Keras ports end in (N, Y * X, C): a Reshape before the Softmax, which once took the last axis of two alone. The Reshape
goes, and what follows it works along the axes as they were.

Cases: a Reshape or Flatten that joins neighbouring axes of an image, Y and X among them, with nothing behind it up to the
output but element-wise operators (of such tensors and of constants along axes that were not joined), Softmax, LogSoftmax
and Transpose. Everything else is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..line import Line
from ..tensor import Tensor, sole_line

if TYPE_CHECKING:
    import onnx

Groups = tuple[tuple[int, ...], ...]  # of each axis of a list of pixels, the axes of the image that it joins

_ALONG_NONE = (
    "Sigmoid", "HardSigmoid", "Relu", "LeakyRelu", "Tanh", "Exp", "Log", "Neg", "Clip", "Cast", "Identity", "Dropout",
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip
_ALONG_ONE = ("Softmax", "LogSoftmax")


def lists_pixels(tensor: Tensor | None) -> bool:
    """Whether an axis of a tensor runs over several axes of the image at once."""
    return tensor is not None and any(sum(isinstance(p, Line) for p in axis) > 1 for axis in tensor.axes or ())


def give_images(model: onnx.ModelProto, tensors: Mapping[str, Tensor], fixed: bool) -> tuple[str, ...]:
    """Rewrites ``model`` in place.

    Args:
        model: The model.
        tensors: What is known of its tensors, from a walk at a size per axis that no other has.
        fixed: Whether that is the only size of the model.

    Returns:
        What was done, one sentence per output; () when called again, or where an operator stands in the way.
    """
    wanted = [value.name for value in model.graph.output if lists_pixels(tensors.get(value.name))]
    if not wanted:
        return ()
    plan = _Plan(tensors)
    for node in model.graph.node:
        if not plan.take(node):
            return ()
    if any(name not in plan.groups for name in wanted):
        return ()
    plan.apply()
    for value in model.graph.output:
        if value.name in plan.groups:
            _declare(value, plan.groups[value.name], plan.shapes[value.name], fixed)
    del model.graph.value_info[:]
    return tuple(
        f"output {name} is an image again, and no list of pixels: its last Reshape is undone" for name in wanted
    )


class _Plan:
    """What becomes of the nodes, decided for all of them before one is changed."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.groups: dict[str, Groups] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the images, as walked
        self._changes: list[tuple[onnx.NodeProto, str, Any]] = []

    def take(self, node: onnx.NodeProto) -> bool:
        """Whether the node can stay behind images instead of lists of pixels."""
        here = [name for name in node.input if name in self.groups]
        if not here:
            return self._begin(node)
        groups, shape = self.groups[here[0]], self.shapes[here[0]]
        if node.domain or any(self.groups[name] != groups for name in here):
            return False
        if node.op_type == "Transpose":
            order = [int(k) for k in _attribute(node, "perm", list(reversed(range(len(groups)))))]
            moved = [k for axis in order for k in groups[axis]]
            self._changes.append((node, "perm", moved))
            sizes = iter(range(len(moved)))
            groups = tuple(tuple(next(sizes) for _ in groups[axis]) for axis in order)
            shape = tuple(shape[k] for k in moved)
        elif node.op_type in _ALONG_ONE:
            axis = int(_attribute(node, "axis", -1)) % len(groups)
            if len(groups[axis]) != 1:
                return False
            self._changes.append((node, "axis", groups[axis][0]))
        elif node.op_type not in _ALONG_NONE or not all(self._fits(name, groups) for name in node.input):
            return False
        for name in node.output:
            self.groups[name], self.shapes[name] = groups, shape
        return True

    def _begin(self, node: onnx.NodeProto) -> bool:
        """Notes a node that makes a list of pixels of an image; False where it does so in another way."""
        result = self.tensors.get(node.output[0]) if node.output else None
        if not lists_pixels(result) or node.op_type not in ("Reshape", "Flatten") or result is None:
            return True
        image = self.tensors.get(node.input[0])
        if image is None or lists_pixels(image) or sum(sole_line(a) is not None for a in image.axes or ()) < 2:
            return True
        groups = _joined(image.shape, result.shape)
        if groups is None:
            return True
        self.groups[node.output[0]], self.shapes[node.output[0]] = groups, image.shape
        self._changes.append((node, "", None))
        return True

    def _fits(self, name: str, groups: Groups) -> bool:
        """Whether an input means the same beside images."""
        if name in self.groups or not name:
            return True
        tensor = self.tensors.get(name)
        if tensor is None or not tensor.constant or tensor.axes is None:
            return False
        behind = groups[len(groups) - tensor.rank :] if tensor.rank else ()
        return tensor.rank <= len(groups) and all(len(axes) == 1 for axes in behind)

    def apply(self) -> None:
        """Changes the nodes."""
        from onnx import helper

        for node, key, value in self._changes:
            if not key:
                node.op_type = "Identity"
                del node.input[1:]
                del node.attribute[:]
                continue
            kept = [a for a in node.attribute if a.name != key]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(key, value)])


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _joined(image: Sequence[int], pixels: Sequence[int]) -> Groups | None:
    """Which axes of an image each axis of a list of its pixels joins; None where axes are cut, too."""
    left, groups = list(range(len(image))), list[tuple[int, ...]]()
    for size in pixels:
        taken, product = list[int](), 1
        while left and (not taken or product < size):
            product *= image[left[0]]
            taken.append(left.pop(0))
        if product != size:
            return None
        groups.append(tuple(taken))
    if any(image[k] != 1 for k in left):
        return None
    groups[-1] = (*groups[-1], *left)
    return tuple(groups)


def _declare(value: onnx.ValueInfoProto, groups: Groups, shape: Sequence[int], fixed: bool) -> None:
    """Gives an output the axes of the image; sizes of those that were joined where there is only one of each."""
    dims = value.type.tensor_type.shape.dim
    known = [d.dim_value if d.HasField("dim_value") else None for d in dims]
    del dims[:]
    for axes, size in zip(groups, known, strict=True):
        for k in axes:
            dim = dims.add()
            if len(axes) == 1 and size:
                dim.dim_value = size
            elif len(axes) > 1 and fixed:
                dim.dim_value = shape[k]
            else:
                dim.dim_param = f"{value.name}_{k}"
