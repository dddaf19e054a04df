"""A float32 graph in float16 or bfloat16: every tensor that depends on pixels, except around the nodes kept in float32.

Cases, node by node:
- What depends on pixels computes in the half type: constants are rounded once, here; a Cast to float becomes a Cast to
  the half type; inputs and outputs of the graph become half, too (``keep_io=True``: they stay, casts follow and precede).
- What depends on shapes and constants alone (the exporters' size arithmetic, ConstantOfShape, the scales and the region
  of Resize) stays as it is: 2049 is no float16. Where a half node reads such a tensor, a Cast stands between.
- Islands compute in float32, casts around them: the nodes asked for; nodes that sum over a whole axis (:data:`SUMMING`);
  nodes that ONNX does not define for the half type (the graph is lifted to a newer opset first, if that helps); nodes whose
  constants the half type cannot hold: values beyond its largest, or an error of more than :data:`LOSS` of the constant's
  norm, far above rounding (weights of 1e-6 have two or three bits left in float16). The bounds of Clip are cut to the
  largest value instead, which changes nothing.
- QuantizeLinear and DequantizeLinear compute in the type of their scale: half, and float32 before islands. Quantise first,
  then halve.
- Graphs with If, Loop or Scan on pixels are refused.

Called again it changes nothing: what was done is on record in the model's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...errors import GraphError
from .fold import refill
from .half_types import (
    FLOAT_INPUTS,
    OTHER_DOMAINS,
    QDQ,
    SUMMING,
    TYPE_NAMES,
    HalfType,
    lift_opset,
    opset_of,
    schema_of,
    types_of,
)

if TYPE_CHECKING:
    import onnx


RECORD = "unet_rt.half"  # key of the metadata entry: {"to": "fp16", "islands": {node: reason}}


LOSS = (
    2.0**-8
)  # error of a constant, relative to its norm, above which it stays float32. Rounding: 2^-12 fp16, 2^-9 bf16


@dataclass(frozen=True)
class Halved:
    """What was done: the number of nodes that compute in the half type now, and why which nodes do not."""

    nodes: int
    islands: Mapping[str, str] = field(default_factory=dict)


def node_name(node: onnx.NodeProto) -> str:
    """How islands name a node: its name, or its first output where it has none."""
    return node.name or node.output[0]


def half_type_of(model: onnx.ModelProto) -> HalfType | None:
    """The type that :func:`half` has put a graph into, None for any other graph."""
    record = next((p.value for p in model.metadata_props if p.key == RECORD), None)
    return None if record is None else json.loads(record)["to"]


def half(
    model: onnx.ModelProto, *, to: HalfType = "fp16", islands: Collection[str] = (), keep_io: bool = False
) -> Halved:
    """Rewrites ``model`` in place.

    Args:
        model: A float32 graph with its weights, quantised or not.
        to: The half type.
        islands: Nodes that stay float32, by :func:`node_name`.
        keep_io: Whether inputs and outputs of the graph stay float32.

    Returns:
        What was done; no nodes when called again.

    Raises:
        GraphError: Islands that the graph does not have, or control flow on pixels.
    """
    if half_type_of(model) is not None:
        return Halved(0)
    if model.functions:
        from onnx import inliner

        model.CopyFrom(inliner.inline_local_functions(model))
    known = {node_name(node) for node in model.graph.node}
    unknown = sorted(set(islands) - known)
    if unknown:
        raise GraphError(f"the graph has no node {unknown[0]!r} to keep in float32; it has e.g. {sorted(known)[:3]}")
    lift_opset(model, to)
    return _Rewrite(model, to, islands, keep_io).run()


class _Rewrite:
    """One pass over a graph; nodes are in topological order, so that a tensor's type is known before it is read."""

    def __init__(self, model: onnx.ModelProto, to: HalfType, islands: Collection[str], keep_io: bool) -> None:
        from onnx import TensorProto

        self.model, self.graph, self.to, self.keep_io = model, model.graph, to, keep_io
        self.opset = opset_of(model)
        self.half = TensorProto.FLOAT16 if to == "fp16" else TensorProto.BFLOAT16
        self.float = TensorProto.FLOAT
        self.islands: dict[str, str] = {name: "asked" for name in islands}
        self.constants = self._constants()
        self.types = self._element_types()
        self.data = self._on_pixels()
        self.native: dict[str, int] = {}  # element type of float tensors on pixels, as they are now produced
        self.nodes: list[onnx.NodeProto] = []
        self.made: dict[str, onnx.TensorProto] = {}
        self.casts: dict[tuple[str, int], str] = {}

    # What the graph is ------------------------------------------------------------------------------------------------

    def _constants(self) -> dict[str, npt.NDArray[Any]]:
        """Float constants by name: initialisers, Constant nodes and what Identity makes of them."""
        from onnx import numpy_helper

        found = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer if t.data_type == self.float_type()}
        for node in self.graph.node:
            if node.op_type == "Constant":
                value = {a.name: a for a in node.attribute}
                if "value" in value and value["value"].t.data_type == self.float_type():
                    found[node.output[0]] = numpy_helper.to_array(value["value"].t)
                elif "value_float" in value:
                    found[node.output[0]] = np.asarray(value["value_float"].f, np.float32)
                elif "value_floats" in value:
                    found[node.output[0]] = np.asarray(value["value_floats"].floats, np.float32)
            elif node.op_type == "Identity" and node.input[0] in found:
                found[node.output[0]] = found[node.input[0]]
        return found

    @staticmethod
    def float_type() -> int:
        from onnx import TensorProto

        return int(TensorProto.FLOAT)

    def _element_types(self) -> dict[str, int]:
        from onnx import shape_inference

        graph = shape_inference.infer_shapes(self.model).graph
        known = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
        known |= {t.name: t.data_type for t in self.graph.initializer}
        for node in self.graph.node:  # operators that inference does not know keep the type of their first input
            for name in node.output:
                if name and not known.get(name):
                    known[name] = known.get(node.input[0], 0) if node.input else 0
        return known

    def _on_pixels(self) -> set[str]:
        """Tensors that depend on the values of an input, not on its shape alone; and all that is quantised."""
        stored = {t.name for t in self.graph.initializer}
        data = {value.name for value in self.graph.input} - stored
        for node in self.graph.node:
            nested = [a for a in node.attribute if a.type in (a.GRAPH, a.GRAPHS)]
            if nested:
                captured = {name for a in nested for g in (a.g, *a.graphs) for n in g.node for name in n.input}
                if data & (captured | set(node.input)):
                    raise GraphError(
                        f"node {node_name(node)!r} is {node.op_type} on pixels, which cannot be put into {self.to}; "
                        "export the network without it, or use --precision fp32"
                    )
            elif node.op_type in QDQ or (node.op_type not in ("Shape", "Size") and data & set(node.input)):
                data.update(name for name in node.output if name)
        return data

    # Islands ----------------------------------------------------------------------------------------------------------

    def _reason(self, node: onnx.NodeProto) -> str | None:
        """Why a node on pixels must stay float32, None if it need not."""
        wanted = f"tensor({TYPE_NAMES[self.to]})"
        if node.op_type in SUMMING:
            return "sums over a whole axis"
        schema = schema_of(node, self.opset)
        if schema is None and node.op_type not in OTHER_DOMAINS:
            return f"{node.op_type} is not an operator of ONNX"
        for index, name in enumerate(node.input):
            if not self._is_float(name) or index in FLOAT_INPUTS.get(node.op_type, ()):
                continue
            if (
                schema is not None
                and "tensor(float)" in (allowed := types_of(schema, index)[1])
                and wanted not in allowed
            ):
                if len(allowed) == 1:
                    continue  # always float32, whatever the others are
                return f"{node.op_type} is not defined for {TYPE_NAMES[self.to]} in opset {self.opset}"
            value = self.constants.get(name)
            if value is None or node.op_type == "Clip" or name in self.data:
                continue
            loss = self._loss(value)
            if loss > LOSS:
                most = float(np.abs(value).max())
                return f"{name} of up to {most:.3g} loses {loss:.2g} of its norm in {TYPE_NAMES[self.to]}"
        return None

    def _loss(self, value: npt.NDArray[Any]) -> float:
        """Error of a constant in the half type relative to its norm; infinite where a finite value overflows."""
        exact = np.asarray(value, np.float32).ravel()
        if not np.isfinite(exact).all():
            exact = exact[np.isfinite(exact)]
        most = np.abs(exact).max(initial=0)
        if most == 0:
            return 0.0
        error = (self._rounded(exact).astype(np.float32) - exact) / most
        exact = exact / most
        return float(np.sqrt(np.vdot(error, error) / np.vdot(exact, exact)))

    def _rounded(self, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A float32 array in the half type."""
        if self.to == "fp16":
            with np.errstate(over="ignore"):
                return value.astype(np.float16)
        import ml_dtypes  # comes with onnx

        return value.astype(ml_dtypes.bfloat16)

    def _find_islands(self) -> None:
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        for node in self.graph.node:
            if node_name(node) not in self.islands and self._computes(node):
                reason = self._reason(node)
                if reason is not None:
                    self.islands[node_name(node)] = reason
        for node in self.graph.node:  # a scale that must stay float32 keeps its pattern: what it feeds stays, too
            if node.op_type == "DequantizeLinear" and node_name(node) in self.islands:
                for reader in readers.get(node.output[0], ()):
                    self.islands.setdefault(node_name(reader), f"reads {node.output[0]}")
        for node in self.graph.node:  # no cast between a DequantizeLinear and the islands that it feeds
            fed = readers.get(node.output[0], ()) if node.output else ()
            if node.op_type == "DequantizeLinear" and fed and all(node_name(r) in self.islands for r in fed):
                self.islands.setdefault(node_name(node), "feeds float32 nodes only")

    # Rewriting --------------------------------------------------------------------------------------------------------

    def _is_float(self, name: str) -> bool:
        return bool(name) and self.types.get(name) == self.float

    def _computes(self, node: onnx.NodeProto) -> bool:
        """Whether a node on pixels reads or writes float tensors on pixels."""
        return any(name in self.data for name in node.output) and any(
            self._is_float(name) and (name in self.data or node.op_type in QDQ) for name in (*node.input, *node.output)
        )

    def run(self) -> Halved:
        self._find_islands()
        for value in self.graph.input:
            if self._is_float(value.name) and value.name in self.data:
                self.native[value.name] = self.float if self.keep_io else self.half
                value.type.tensor_type.elem_type = self.native[value.name]
        count = 0
        for node in self.graph.node:
            if not self._computes(node):
                self.nodes.append(node)
                continue
            inside = node_name(node) not in self.islands
            count += self._rewrite(node, inside)
        self._finish_outputs()
        self._write()
        done = Halved(count, {name: why for name, why in self.islands.items()})
        record = {"to": self.to, "islands": dict(done.islands)}
        self.model.metadata_props.add(key=RECORD, value=json.dumps(record, sort_keys=True))
        return done

    def _rewrite(self, node: onnx.NodeProto, inside: bool) -> bool:
        """Puts one node on pixels into its type; returns whether it computes in the half type."""
        kind = self.half if inside else self.float
        schema = schema_of(node, self.opset)
        variables: set[str] = set()
        for index, name in enumerate(node.input):
            if not self._is_float(name):
                continue
            formal, allowed = ("T", frozenset()) if schema is None else types_of(schema, index)
            kept = index in FLOAT_INPUTS.get(node.op_type, ()) or (len(allowed) == 1 and "tensor(float)" in allowed)
            node.input[index] = self._typed(name, self.float if kept else kind, saturate=node.op_type == "Clip")
            if not kept:
                variables.add(formal)
        if node.op_type == "Cast" and inside:
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == self.float:
                    attribute.i = self.half
        if inside:
            for attribute in node.attribute:  # DequantizeLinear may say its type
                if attribute.name == "output_dtype" and attribute.i == self.float:
                    attribute.i = self.half
        for index, name in enumerate(node.output):
            if not self._is_float(name):
                continue
            if schema is None or node.op_type in ("Cast", *QDQ):
                self.native[name] = kind
            else:
                formal, _ = types_of(schema, index, output=True)
                self.native[name] = kind if formal in variables else self.float
        self.nodes.append(node)
        return inside

    def _typed(self, name: str, kind: int, *, saturate: bool = False) -> str:
        """Name under which a float tensor is to be had in a type: its own, a rounded constant's, or a Cast's."""
        from onnx import helper, numpy_helper

        now = self.native.get(name, self.float)
        if now == kind:
            return name
        label = "fp32" if kind == self.float else self.to
        made = f"{name}/{label}"
        if name in self.constants and name not in self.data and kind == self.half:
            made += "/cut" if saturate else ""
            if made not in self.made:
                value = self.constants[name]
                if saturate and self.to == "fp16":
                    value = np.clip(value, -65504.0, 65504.0).astype(np.float32)
                self.made[made] = numpy_helper.from_array(np.asarray(self._rounded(value)), made)
            return made
        if (name, kind) not in self.casts:
            self.casts[name, kind] = made
            self.nodes.append(helper.make_node("Cast", [name], [made], name=made, to=kind))
        return self.casts[name, kind]

    def _finish_outputs(self) -> None:
        """Outputs of the graph keep their names; where their type differs from what is computed, a Cast writes them."""
        from onnx import helper

        wanted = self.float if self.keep_io else self.half
        inputs = {value.name for value in self.graph.input}
        for value in self.graph.output:
            name = value.name
            if not self._is_float(name) or name not in self.data:
                continue
            value.type.tensor_type.elem_type = wanted
            if self.native[name] == wanted or name in inputs:
                continue
            inner = f"{name}/computed"
            for node in self.nodes:
                for index, other in enumerate(node.input):
                    if other == name:
                        node.input[index] = inner
                for index, other in enumerate(node.output):
                    if other == name:
                        node.output[index] = inner
            self.native[inner] = self.native[name]
            self.nodes.append(helper.make_node("Cast", [inner], [name], name=f"{name}/{self.to}/output", to=wanted))

    def _write(self) -> None:
        graph = self.graph
        for value in graph.value_info:
            if value.name in self.native:
                value.type.tensor_type.elem_type = self.native[value.name]
        kept = [value for value in graph.value_info if value.name not in self._renamed()]
        nodes = list(self.nodes)
        read = {name for node in nodes for name in _reads(node)} | {value.name for value in graph.output}
        changed = True
        while changed:  # Constants and Identities of what was rounded
            live = [n for n in nodes if n.op_type not in ("Constant", "Identity") or read & set(n.output)]
            changed = len(live) < len(nodes)
            nodes = live
            read = {name for node in nodes for name in _reads(node)} | {value.name for value in graph.output}
        stored = [t for t in graph.initializer if t.name in read or t.name not in self.constants]
        gone = {t.name for t in graph.initializer} - {t.name for t in stored}
        inputs = [value for value in graph.input if value.name not in gone]  # old graphs list their weights as inputs
        for target, values in ((graph.node, nodes), (graph.value_info, kept), (graph.input, inputs)):
            refill(target, values)
        refill(graph.initializer, (*stored, *self.made.values()))

    def _renamed(self) -> set[str]:
        return {value.name for value in self.graph.output}


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    """Names that a node reads, those that its subgraphs take from outside included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)
            for value in graph.output:
                yield value.name
