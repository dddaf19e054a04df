"""Who writes and who reads a tensor of a graph, and which tensors are rearrangements of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


# Operators that move values, pick among them or interpolate: the result has the scale of what they read.
_MOVES = frozenset(
    {
        "MaxPool",
        "Slice",
        "Concat",
        "DepthToSpace",
        "SpaceToDepth",
        "Transpose",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Split",
    }
    | {"Flatten", "Identity"}
)


class Moves:
    """Who writes and who reads a tensor; ``resize``: whether interpolation keeps the scale."""

    def __init__(self, model: onnx.ModelProto, resize: bool = True):
        self.model, self.resize = model, resize
        self.nodes = {node.name: node for node in model.graph.node}
        self.writer = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.stored = {t.name for t in model.graph.initializer}
        self.outputs = {v.name for v in model.graph.output}

    def moved_from(self, name: str) -> list[str]:
        """Tensors that ``name`` is a rearrangement of; none where it is computed."""
        node = self.writer.get(name)
        if node is None or (node.op_type not in _MOVES and not self._repeats(node)):
            return []
        count = len(node.input) if node.op_type == "Concat" else 1
        return [n for n in list(node.input)[:count] if n and n not in self.stored]

    def _repeats(self, node: Any) -> bool:
        if node.op_type != "Resize":
            return False
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"nearest")
        return mode == b"nearest" or (self.resize and mode == b"linear")  # cubic ones overshoot

    def result(self, node: Any) -> str:
        """The tensor that a convolution's result is quantised as: behind its Relu, where that is all that reads it."""
        name = str(node.output[0])
        readers = self.readers.get(name, [])
        if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") and name not in self.outputs:
            return str(readers[0].output[0])
        return name

    def read_by(self, name: str) -> set[str]:
        """Names of the nodes that compute with ``name`` or a rearrangement of it."""
        found: set[str] = set()
        for node in self.readers.get(name, []):
            moved = node.op_type in _MOVES or self._repeats(node)
            found |= {n for out in node.output for n in self.read_by(out)} if moved else {node.name}
        return found

    def component(self, name: str) -> dict[str, None]:
        """``name`` and all that it is rearranged from."""
        found: dict[str, None] = {}
        todo = [name]
        while todo:
            here = todo.pop()
            if here not in found:
                found[here] = None
                todo += self.moved_from(here)
        return found
