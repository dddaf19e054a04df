"""Sizes of the image that an export baked into its nodes, written so that they follow the image.

Exported at one size, ``interpolate(x, size=skip.shape[2:])`` is a Resize to constant sizes, and a pixel shuffle by views a
Reshape to a constant shape. At the size of the export both say the same, bit for bit; whether the network is the same at
other sizes is for the caller to prove.

Cases: Resize to sizes that do not follow the image, each a whole multiple of what it resizes, or a power of two less: by
scales. Reshape, Transpose, Reshape to constant shapes, where that is a pixel shuffle: DepthToSpace; the inverse:
SpaceToDepth; an order of channels (ShuffleNet): Gather. Channels in another order than the operator's: a Gather behind it.
Reshape to the shape that a tensor has: Identity. Everything else is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

    from ..tensor import Tensor

Shape = tuple[int, ...]


def free_sizes(model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> int:
    """Rewrites ``model`` in place; returns the number of nodes rewritten (0 when called again).

    Args:
        model: The model.
        tensors: Its tensors by name, at the size of its export.
    """
    return _Rewrite(model, tensors).apply()


class _Rewrite:
    def __init__(self, model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> None:
        self.graph = model.graph
        self.tensors = tensors
        self.readers: dict[str, list[onnx.NodeProto]] = {o.name: [] for o in model.graph.output}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def apply(self) -> int:
        result: list[onnx.NodeProto] = []
        gone: set[str] = set()
        count = 0
        for node in self.graph.node:
            new = [node]
            if node.op_type == "Resize" and not node.domain:
                count += self._by_scales(node)
            elif node.op_type == "Reshape" and not node.domain and (found := self._moves(node)):
                new, count = found, count + 1
                before = self._before(node)
                if before is not None and new[0].op_type != "Identity":
                    gone |= {before[0].output[0], before[1].output[0]}
            result += new
        result = [node for node in result if node.output[0] not in gone]
        del self.graph.node[:]
        self.graph.node.extend(result)
        return count

    # -- what is known

    def _shape(self, name: str) -> Shape | None:
        tensor = self.tensors.get(name)
        return None if tensor is None or tensor.axes is None else tensor.shape

    def _baked(self, name: str) -> bool:
        """Whether a list of numbers is constant and does not follow the image."""
        tensor = self.tensors.get(name)
        return tensor is not None and tensor.constant and not tensor.changes

    def _constant(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    # -- resizes

    def _by_scales(self, node: onnx.NodeProto) -> int:
        """1 where a Resize to baked sizes became one by scales."""
        from onnx import helper

        if len(node.input) < 4 or not node.input[3] or not self._baked(node.input[3]):
            return 0
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        old, new = self._shape(node.input[0]), self._shape(node.output[0])
        if old is None or new is None or attributes.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
            return 0
        ratios = [Fraction(n, o) for n, o in zip(new, old, strict=True)]
        if not all(_keeps_its_size(ratio) for ratio in ratios):
            return 0
        scales = np.array([float(ratios[k]) for k in attributes.get("axes", range(len(ratios)))], np.float32)
        name = self._constant(f"{node.output[0]}/scales", scales)
        inputs = [*node.input[:2], name]
        del node.input[:]
        node.input.extend(inputs)
        return 1

    # -- views

    def _before(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
        """The Reshape and the Transpose that feed a Reshape and nothing else."""
        turn = self.producers.get(node.input[0])
        first = None if turn is None or turn.op_type != "Transpose" else self.producers.get(turn.input[0])
        if turn is None or first is None or first.op_type != "Reshape":
            return None
        names = (turn.output[0], first.output[0])
        outputs = {o.name for o in self.graph.output}
        alone = all(len(self.readers.get(name, [])) == 1 and name not in outputs for name in names)
        return (first, turn) if alone else None

    def _moves(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that do what a Reshape, and the two nodes before it, do at the size of the export; [] for others."""
        from onnx import helper

        if not self._baked(node.input[1]):
            return []
        x, y = self._shape(node.input[0]), self._shape(node.output[0])
        if x is None or y is None:
            return []
        if x == y:
            return [helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name)]
        before = self._before(node)
        if before is None or not self._baked(before[0].input[1]):
            return []
        x, apart = self._shape(before[0].input[0]), self._shape(before[0].output[0])
        if x is None or apart is None or len(x) != 4 or len(y) != 4:
            return []
        attributes = {a.name: helper.get_attribute_value(a) for a in before[1].attribute}
        perm = list(attributes.get("perm", reversed(range(len(apart)))))
        for found in (_deepened(x, apart, perm, y), _spread(x, apart, perm, y), _reordered(x, apart, perm, y)):
            if found is not None:
                return self._nodes(node, before[0].input[0], *found)
        return []

    def _nodes(
        self, node: onnx.NodeProto, x: str, op: str, attributes: Mapping[str, Any], order: Sequence[int]
    ) -> list[onnx.NodeProto]:
        from onnx import helper

        y = node.output[0]
        ordered = list(order) == sorted(order)
        nodes = []
        if op:
            out = y if ordered else f"{y}/blocks"
            nodes.append(helper.make_node(op, [x], [out], name=node.name, **attributes))
            x = out
        if not op or not ordered:
            indices = self._constant(f"{y}/channels", np.array(order, np.int64))
            nodes.append(helper.make_node("Gather", [x, indices], [y], name=f"{node.name or y}/channels", axis=1))
        return nodes


def _keeps_its_size(ratio: Fraction) -> bool:
    """Whether float32 holds a factor exactly, and sizes follow it: whole, or a power of two below 1."""
    return ratio.denominator == 1 or (ratio.numerator == 1 and ratio.denominator & (ratio.denominator - 1) == 0)


Found = tuple[str, dict[str, Any], list[int]]


def _deepened(x: Shape, apart: Shape, perm: Sequence[int], y: Shape) -> Found | None:
    """(N, C, H, W) by (N, C, H/r, r, W/r, r) to (N, C r r, H/r, W/r), channels and blocks in any order."""
    if len(apart) != 6 or list(perm[:1]) + list(perm[4:]) != [0, 2, 4] or sorted(perm[1:4]) != [1, 3, 5]:
        return None
    r, (n, c, h, w) = apart[3], x
    if r < 2 or apart != (n, c, h // r, r, w // r, r) or y != (n, c * r * r, h // r, w // r):
        return None
    theirs = [(3, 5, 1).index(k) for k in perm[1:4]]  # SpaceToDepth counts rows, columns, channels
    order = np.arange(c * r * r).reshape(r, r, c).transpose(theirs).ravel()
    return "SpaceToDepth", {"blocksize": r}, [int(k) for k in order]


def _spread(x: Shape, apart: Shape, perm: Sequence[int], y: Shape) -> Found | None:
    """(N, C r r, H, W) by (N, C, r, r, H, W) to (N, C, H r, W r), or by (N, r, r, C, H, W)."""
    modes: dict[Shape, tuple[str, int, int, int]] = {
        (0, 1, 4, 2, 5, 3): ("CRD", 1, 2, 3),
        (0, 3, 4, 1, 5, 2): ("DCR", 3, 1, 2),
    }
    if len(apart) != 6 or tuple(perm) not in modes:
        return None
    mode, c, i, j = modes[tuple(perm)]
    r, (n, channels, h, w) = apart[i], x
    if r < 2 or apart[j] != r or (apart[0], *apart[4:]) != (n, h, w) or apart[c] * r * r != channels:
        return None
    return ("DepthToSpace", {"blocksize": r, "mode": mode}, [0]) if y == (n, apart[c], h * r, w * r) else None


def _reordered(x: Shape, apart: Shape, perm: Sequence[int], y: Shape) -> Found | None:
    """(N, C, H, W) by (N, a, b, ..., H, W) back to itself, with a, b, ... in another order."""
    rank = len(apart)
    inner = list(perm[1:-2])
    if rank < 5 or y != x or (apart[0], *apart[-2:]) != (x[0], *x[2:]) or sorted(inner) != list(range(1, rank - 2)):
        return None
    if list(perm) != [0, *inner, rank - 2, rank - 1]:
        return None
    order = np.arange(x[1]).reshape(apart[1:-2]).transpose([k - 1 for k in inner]).ravel()
    return "", {}, [int(k) for k in order]
