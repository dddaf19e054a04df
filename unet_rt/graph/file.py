"""An ONNX graph as plain values: nodes, constants, inputs and outputs, read once and without copying weights."""

from __future__ import annotations

import heapq
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

from ..errors import GraphError, first_line
from .constants import ELEMENT_BYTES, MAX_ELEMENTS, Array

# What people hand over by mistake, by its first bytes.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint or a package)"),
    (b"\x80\x02", "a Python pickle (an old PyTorch checkpoint)"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x89HDF", "an HDF5 file (Keras weights)"),
    (b"<?xml", "an OpenVINO IR"),
    (b"\x89PNG", "a PNG image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself (git lfs pull)"),
)
# Operators that ONNX Runtime puts in place of others for the processor that it runs on.
_OPTIMISED = ("com.microsoft.nchwc", "com.ms.internal.nhwc")
_NO_NUMBERS = (onnx.TensorProto.STRING, onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)
_TYPES = frozenset(onnx.TensorProto.DataType.values())
LARGEST = 2**31 - 1  # bytes of a protobuf message
# Nodes that functions may make: so many, and so many for each that is stored.
_FREE_NODES, _PER_NODE = 1024, 16
_EXPORT = "give the .onnx file of the network (unet-rt export or torch.onnx.export writes one)"


@dataclass(frozen=True)
class Constant:
    """An initialiser; its value is read only when something needs it."""

    shape: tuple[int, ...]
    dtype: int
    proto: onnx.TensorProto
    folder: str | None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def value(self) -> Array | None:
        """The array, or None where it is too large to matter or not stored with the graph."""
        if self.elements > MAX_ELEMENTS or self.dtype in _NO_NUMBERS:
            return None
        proto = self.proto
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            if self.folder is None:
                return None
            proto = onnx.TensorProto()
            proto.CopyFrom(self.proto)
            try:
                onnx.external_data_helper.load_external_data_for_tensor(proto, self.folder)
            except (OSError, ValueError, onnx.checker.ValidationError) as error:
                raise GraphError(
                    f"external data of initialiser {proto.name!r} cannot be read from {self.folder}: {error}; "
                    "keep the .data file beside the .onnx it was exported with"
                ) from error
        try:
            return np.asarray(onnx.numpy_helper.to_array(proto))
        except (ValueError, TypeError) as error:
            raise GraphError(
                f"initialiser {proto.name!r} of shape {list(self.shape)} is damaged: {error}; export the network again"
            ) from error


@dataclass(frozen=True)
class Node:
    """One node. ``name`` is never empty: unnamed nodes go by their first output."""

    index: int
    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    proto: onnx.NodeProto = field(repr=False, compare=False)

    def __str__(self) -> str:
        op, name = (text if text.isprintable() else repr(text)[1:-1] for text in (self.op, self.name))
        return f"{op} '{name}'"


@dataclass(frozen=True)
class Value:
    """A graph input or output as declared: ``shape`` holds None where a dimension is free."""

    name: str
    shape: tuple[int | None, ...] | None
    dtype: int


@dataclass(frozen=True)
class Graph:
    """A graph in topological order. ``constants`` are its initialisers."""

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: Mapping[str, Constant]
    opset: int
    opsets: Mapping[str, int]
    metadata: Mapping[str, str]
    folder: str | None

    def producers(self) -> dict[str, Node]:
        return {name: node for node in self.nodes for name in node.outputs if name}


def load_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read an ONNX file; external data stays where it is.

    Raises:
        GraphError: The file is missing, empty, cut off or something else.
    """
    path = Path(path)
    if not path.exists():
        raise GraphError(f"{path} does not exist; {_EXPORT}")
    if path.is_dir():
        raise GraphError(f"{path} is a folder; {_EXPORT}")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise GraphError(f"{path} cannot be read: {error}; check its permissions") from error
    if not head:
        raise GraphError(f"{path} is empty (0 bytes); {_EXPORT}")
    if path.stat().st_size > LARGEST:
        raise GraphError(
            f"{path} has {path.stat().st_size:,} bytes, and one ONNX file holds {LARGEST:,}; it cannot be whole: export "
            "the network with its weights beside the graph (external data)"
        )
    if path.suffix == ".py":
        raise GraphError(f"{path} is Python code, not an ONNX graph; {_EXPORT}")
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise GraphError(f"{path} is {what}, not an ONNX graph; {_EXPORT}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        size = path.stat().st_size
        raise GraphError(
            f"{path} ({size} bytes) is no complete ONNX graph: {error}; it is cut off, damaged or something else: "
            + _EXPORT
        ) from error
    except OSError as error:
        raise GraphError(f"{path} cannot be read: {error}") from error
    if not model.HasField("graph") or not model.graph.output:
        raise GraphError(f"{path} holds no graph with outputs; it is damaged or another format: {_EXPORT}")
    return model


def stored_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the model in one file, with the weights that lie beside it."""
    beside = (t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    return int(model.ByteSize() + sum(math.prod(t.dims) * ELEMENT_BYTES.get(t.data_type, 1) for t in beside))


def read_graph(model: onnx.ModelProto, folder: str | os.PathLike[str] | None = None) -> Graph:
    """The graph of ``model`` with functions inlined. Weights are referred to, not copied.

    Args:
        model: The model.
        folder: Where its external data lies.

    Raises:
        GraphError: It has no inputs or outputs, or a node uses what nothing produces.
    """
    opsets = {o.domain or "": o.version for o in model.opset_import}
    graph = model.graph
    place = None if folder is None else str(folder)
    constants = {t.name: Constant(tuple(t.dims), t.data_type, t, place) for t in graph.initializer}
    for sparse in graph.sparse_initializer:
        t = sparse.values
        constants[t.name] = Constant(tuple(sparse.dims), t.data_type, t, None)
    for name, dtype, dims in (
        *((v.name, v.type.tensor_type.elem_type, ()) for v in (*graph.input, *graph.output)),
        *((c.proto.name, c.dtype, c.shape) for c in constants.values()),
    ):
        if dtype not in _TYPES or min(dims, default=0) < 0:
            raise GraphError(f"{name!r} has type {dtype} and shape {list(dims)}, which ONNX has not; export it again")
    nodes: Any = graph.node
    if model.functions:
        nodes = _inline(model).graph.node
    for node in nodes:
        if node.domain in _OPTIMISED:
            raise GraphError(
                f"{node.op_type} '{node.name}' is of the domain {node.domain}: ONNX Runtime saved this file after it had "
                "optimised it for one processor; give the original file, as it was exported"
            )
    inputs = tuple(declared(v) for v in graph.input if v.name not in constants)
    outputs = tuple(declared(v) for v in graph.output)
    if not inputs or not outputs:
        raise GraphError(f"the graph has {len(inputs)} inputs and {len(outputs)} outputs; {_EXPORT}")
    known = {v.name for v in inputs} | set(constants)
    ordered = tuple(_sort(nodes, known))
    produced = known | {name for node in ordered for name in node.outputs}
    for value in outputs:
        if value.name not in produced:
            raise GraphError(f"nothing in the graph produces its output {value.name!r}; it is damaged: export it again")
    metadata = {p.key: p.value for p in model.metadata_props}
    return Graph(ordered, inputs, outputs, constants, opsets.get("", opsets.get("ai.onnx", 1)), opsets, metadata, place)


def nodes_behind(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> set[int]:
    """Positions of the nodes that these outputs depend on."""
    producers = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    found: set[int] = set()
    waiting = list(outputs)
    while waiting:
        k = producers.get(waiting.pop())
        if k is not None and k not in found:
            found.add(k)
            waiting.extend(_uses(nodes[k]))
    return found


def restrict(graph: Graph, outputs: Sequence[Value]) -> Graph:
    """``graph`` with these outputs alone, and the nodes that they depend on."""
    kept = nodes_behind([node.proto for node in graph.nodes], (value.name for value in outputs))
    return replace(graph, nodes=tuple(graph.nodes[k] for k in sorted(kept)), outputs=tuple(outputs))


def subgraph_nodes(proto: onnx.GraphProto, known: set[str]) -> tuple[Node, ...]:
    """Nodes of the branch of an If."""
    return tuple(_sort(proto.node, known | {t.name for t in proto.initializer}))


def _inlined_nodes(model: onnx.ModelProto) -> int:
    """Nodes that the model has without functions. GraphError where a function calls itself."""
    functions = {(f.domain, f.name): f for f in model.functions}
    counts: dict[tuple[str, str], int | None] = {}  # None: being counted

    def count(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            total += 1 + sum(count(g.node) for a in node.attribute for g in [a.g, *a.graphs] if a.type in (5, 10))
            key = (node.domain, node.op_type)
            if key in functions:
                if key not in counts:
                    counts[key] = None
                    counts[key] = count(functions[key].node)
                inner = counts[key]
                if inner is None:
                    raise GraphError(f"function {node.op_type!r} calls itself; the graph is damaged: export it again")
                total += inner
        return total

    return count(model.graph.node)


def _inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions and without the bytes of its weights."""
    stored = len(model.graph.node) + sum(len(f.node) for f in model.functions)
    try:
        count = _inlined_nodes(model)
    except RecursionError:
        raise GraphError(f"its functions call each other more deeply than is followed; {_EXPORT}") from None
    if count > _FREE_NODES + _PER_NODE * stored:
        raise GraphError(f"its functions make {count} nodes of the {stored} in the file, beyond any network; {_EXPORT}")
    skeleton = onnx.ModelProto()
    skeleton.ir_version = model.ir_version
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    g = skeleton.graph
    g.name = model.graph.name or "graph"
    g.node.extend(model.graph.node)
    g.input.extend(model.graph.input)
    g.output.extend(model.graph.output)
    for t in model.graph.initializer:
        declared = onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        if all(v.name != t.name for v in g.input):
            g.input.append(declared)
    try:
        return onnx.inliner.inline_local_functions(skeleton)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise GraphError(
            f"its functions cannot be put into place: {first_line(error)}; export the network again"
        ) from error


def declared(proto: onnx.ValueInfoProto) -> Value:
    """A graph input or output as the file declares it."""
    tensor = proto.type.tensor_type
    if not tensor.HasField("shape"):
        return Value(proto.name, None, tensor.elem_type)
    shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim)
    return Value(proto.name, shape, tensor.elem_type)


def _uses(proto: onnx.NodeProto) -> Iterator[str]:
    yield from (name for name in proto.input if name)
    for attribute in proto.attribute:
        for g in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else []:
            inner = {n for node in g.node for n in node.output} | {t.name for t in g.initializer}
            inner |= {v.name for v in g.input}
            for node in g.node:
                yield from (name for name in _uses(node) if name not in inner)
            yield from (v.name for v in g.output if v.name not in inner)


def _sort(nodes: Any, known: set[str]) -> Iterator[Node]:
    """Nodes in an order in which each comes after those that it uses: the given one wherever that is possible."""
    known, protos = set(known), list(nodes)
    lacking = [set[str]() for _ in protos]
    users = defaultdict[str, list[int]](list)
    for index, proto in enumerate(protos):
        lacking[index].update(name for name in _uses(proto) if name not in known)
        for name in lacking[index]:
            users[name].append(index)
    ready = [index for index, names in enumerate(lacking) if not names]  # ascending: a heap
    done = set[int]()
    while ready:
        index = heapq.heappop(ready)
        done.add(index)
        yield _node(index, protos[index])
        for name in protos[index].output:
            for user in users.pop(name, ()):
                lacking[user].discard(name)
                if not lacking[user]:
                    heapq.heappush(ready, user)
    if len(done) < len(protos):
        index = next(k for k in range(len(protos)) if k not in done)
        raise GraphError(
            f"node {protos[index].op_type} '{protos[index].name or index}' uses {min(lacking[index])!r}, which nothing "
            "produces; the graph is damaged: export it again"
        )


def _node(index: int, proto: onnx.NodeProto) -> Node:
    attributes: dict[str, Any] = {}
    for a in proto.attribute:
        value = onnx.helper.get_attribute_value(a)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        attributes[a.name] = value
    if not all(
        isinstance(text, str) for text in (proto.op_type, proto.domain, proto.name, *proto.input, *proto.output)
    ):
        raise GraphError(f"node {index} has a name that is no text; the graph is damaged: export it again")
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    name = proto.name or (proto.output[0] if proto.output else str(index))
    return Node(index, proto.op_type, domain, name, tuple(proto.input), tuple(proto.output), attributes, proto)


def constant_attribute(node: Node) -> Array | None:
    """Value of a Constant node; None for strings and sparse tensors."""
    a = node.attributes
    if "value" in a:
        return np.asarray(onnx.numpy_helper.to_array(a["value"]))
    for key, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if key in a:
            return np.asarray(a[key], dtype=dtype)
    return None
