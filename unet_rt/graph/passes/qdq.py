"""QuantizeLinear and DequantizeLinear pairs: INT8 written into the graph, in the form each backend runs right and fast.

What is quantised: the input and the weights of convolutions. Weights are int8 and symmetric, one scale per output channel;
activations have one scale per tensor. The pair stands behind what produces a tensor (behind the ``Relu`` of a
convolution, never between them), and tensors that only move values share one scale: both branches of a ``Concat``, the
input and output of ``MaxPool``, ``Slice``, ``DepthToSpace``, so that all of these run on bytes.

Forms:

``onnxruntime``  uint8 activations, int32 biases, a pair behind every operator on the way (that is what its rules fuse). A
                 convolution runs in INT8 only where its output is quantised as well; one that returns floats (the head)
                 stays in FP32.
``openvino``     uint8 activations, float biases, one pair per tensor. Signed symmetric activations are never written for
                 it: see ``tests/test_qdq.py``.
``tensorrt``     int8 symmetric activations, zero points 0, float biases (its parser refuses int32 DequantizeLinear).

Cases:

- ``Conv`` with stored weights (and bias, if any), on anything but a constant: quantised, unless it is to be kept.
- A ``Relu`` or ``Clip`` that alone reads a convolution: the pair stands behind it.
- ``Concat``, ``MaxPool``, ``Slice``, ``DepthToSpace``, ``Transpose``, ``Reshape`` and their like, a ``Resize`` that repeats
  samples (interpolating ones by form): they share the scale of what they move.
- Tensors of which nothing but zeros was seen: a scale of 1/255.
- Everything else computes in floats, between a dequantised input and, where a convolution reads it, a quantised result.
- Graphs that are quantised, or whose weights are FP16 or BF16: refused, so that nothing is quantised twice.
  :func:`prepare_graph` changes nothing that is prepared, and :func:`quantise` makes the same graph of the same ranges.

Biases are corrected for what rounding the weights shifts the mean output by: sum over input channels of their mean times
the rounding error of their kernel (the calibration holds the means). It costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import GraphError
from ..precision import QUANTISED
from .fold import drop_unused, fold, sort_nodes
from .moves import Moves
from .up_conv import up_conv

if TYPE_CHECKING:
    import onnx


Array = npt.NDArray[Any]
FormName = Literal["onnxruntime", "openvino", "tensorrt"]


@dataclass(frozen=True)
class Form:
    """What a backend wants.

    Attributes:
        signed: int8 activations with zero point 0, else uint8.
        integer_bias: Biases as int32 with the scale of the products.
        float_outputs: Whether a convolution with quantised inputs may return floats.
        every_operator: A pair behind operators that only move values, too.
        resize: Whether an interpolating Resize computes on bytes; one that repeats samples does in all forms.
        one_concat: One scale for all that a Concat joins, and its result.
        levels: Largest weight in integers: 127, or 63 on processors whose byte products saturate.
    """

    signed: bool
    integer_bias: bool
    float_outputs: bool
    every_operator: bool
    one_concat: bool
    resize: bool
    levels: int = 127


FORMS: Mapping[str, Form] = {
    "onnxruntime": Form(
        signed=False, integer_bias=True, float_outputs=False, every_operator=True, one_concat=False, resize=True
    ),
    "openvino": Form(
        signed=False, integer_bias=False, float_outputs=True, every_operator=False, one_concat=True, resize=False
    ),
    "tensorrt": Form(
        signed=True, integer_bias=False, float_outputs=True, every_operator=False, one_concat=True, resize=False
    ),
}


def prepare_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an FP32 graph as calibration and quantisation take it: folded, up-convolutions as convolutions, named nodes.

    Raises:
        GraphError: The graph is quantised already, computes in FP16 or BF16, or is too old to be quantised.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = next((node for node in copy.graph.node if node.op_type in QUANTISED), None)
    if found is not None:
        raise GraphError(
            f"the graph is quantised already ({found.op_type} {found.name}); give the FP32 graph that it was made from, "
            "and build lowers its precision"
        )
    half = next((t for t in copy.graph.initializer if t.data_type in (t.FLOAT16, t.BFLOAT16) and len(t.dims) > 1), None)
    if half is not None:
        raise GraphError(f"the weights {half.name} are FP16 or BF16; give the FP32 graph to be quantised")
    opset = next((o.version for o in copy.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < 13:  # scales per channel
        try:
            copy = onnx.version_converter.convert_version(copy, 13)
        except Exception as error:  # it raises RuntimeError and others of its own
            raise GraphError(
                f"INT8 needs opset 13, the graph has {opset} and cannot be converted ({error}); export it again"
            ) from error
    fold(copy)
    up_conv(copy)
    used: set[str] = set()
    for k, node in enumerate(copy.graph.node):
        if not node.name or node.name in used:
            node.name = f"{node.op_type}_{k}"
        used.add(node.name)
    return copy


def layers(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions of a prepared graph that can be quantised, in graph order."""
    stored = {t.name for t in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv"
        and node.domain in ("", "ai.onnx")
        and all(name in stored for name in node.input[1:] if name)
        and node.input[0] not in stored
    ]


def tensors_to_probe(model: onnx.ModelProto) -> list[str]:
    """Tensors of a prepared graph whose ranges quantisation needs, in any form."""
    view = Moves(model, resize=True)
    nodes = [view.nodes[layer] for layer in layers(model)]
    wanted = dict.fromkeys(name for node in nodes for name in (node.input[0], view.result(node)))
    return list(dict.fromkeys(source for name in wanted for source in view.component(name)))


def results(model: onnx.ModelProto) -> dict[str, str]:
    """Per layer of a prepared graph the tensor that its result is quantised as: behind its ``Relu``, if it has one."""
    view = Moves(model)
    return {name: view.result(view.nodes[name]) for name in layers(model)}


@dataclass(frozen=True)
class Quantised:
    """A quantised graph.

    Attributes:
        model: The graph.
        layers: Convolutions that run in INT8.
        kept: Convolutions that stay in FP32, with the reason.
    """

    model: onnx.ModelProto
    layers: tuple[str, ...]
    kept: Mapping[str, str]


def quantise(
    prepared: onnx.ModelProto,
    ranges: Mapping[str, Range],
    form: FormName | Form,
    *,
    keep: frozenset[str] = frozenset(),
    means: Mapping[str, tuple[float, ...]] | None = None,
) -> Quantised:
    """A quantised copy of a graph that :func:`prepare_graph` made.

    Args:
        prepared: The graph.
        ranges: Of the tensors that :func:`tensors_to_probe` names.
        form: For which backend.
        keep: Names of convolutions to be kept in FP32.
        means: Channel means of their inputs, for the correction of biases; None: no correction.

    Raises:
        GraphError: Nothing is left to be quantised, or a range is missing.
    """
    return _Pass(prepared, ranges, FORMS[form] if isinstance(form, str) else form, keep, means or {}).run()


class _Pass:
    def __init__(
        self,
        prepared: onnx.ModelProto,
        ranges: Mapping[str, Range],
        form: Form,
        keep: frozenset[str],
        means: Mapping[str, tuple[float, ...]],
    ):
        import onnx

        self.model = onnx.ModelProto()
        self.model.CopyFrom(prepared)
        self.ranges, self.form, self.means = ranges, form, means
        self.view = Moves(self.model, form.resize)
        self.names = layers(self.model)
        unknown = sorted(keep - set(self.names))
        if unknown:
            raise GraphError(f"there is no convolution {unknown[0]!r} to be kept; names are {', '.join(self.names)}")
        self.kept = {name: "kept" for name in self.names if name in keep}
        self.chosen = [name for name in self.names if name not in keep]

    def run(self) -> Quantised:
        self._choose()
        if not self.chosen:
            raise GraphError("no convolution is left to be quantised; use --precision fp32")
        self._scales()
        self._weights()
        self._activations()
        drop_unused(self.model)
        sort_nodes(self.model)
        entry = self.model.metadata_props.add()
        entry.key, entry.value = QUANTISED_KEY, str(len(self.chosen))
        return Quantised(self.model, tuple(self.chosen), self.kept)

    # which ------------------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Which convolutions run in INT8, and which tensors are quantised for them."""
        if not self.form.float_outputs:
            explicit = frozenset(self.kept)
            for name in self.chosen:
                result = self.view.result(self.view.nodes[name])
                if result in self.view.outputs:
                    self.kept[name] = "it returns floats"
                elif self.view.read_by(result) <= explicit:
                    # a layer is kept together with its input, which only a layer in FP32 returns unrounded
                    self.kept[name] = "what it returns is read in FP32 only"
            self.chosen = [name for name in self.chosen if name not in self.kept]
        self.quantised: dict[str, None] = {}
        for name in self.chosen:
            node = self.view.nodes[name]
            wanted = [node.input[0]] if self.form.float_outputs else [node.input[0], self.view.result(node)]
            for tensor in wanted:
                self.quantised |= self.view.component(tensor)

    # scales -----------------------------------------------------------------------------------------------------------

    def _scales(self) -> None:
        """One scale and zero point per component of tensors that are rearrangements of each other."""
        parent = {name: name for name in self.quantised}

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        for name in self.quantised:
            if self._joined(name) and not self.form.one_concat:
                continue
            for source in self.view.moved_from(name):
                if source in parent:
                    parent[root(source)] = root(name)
        spans: dict[str, tuple[float, float]] = {}
        for name in self.quantised:
            if self.view.moved_from(name) and not (self._joined(name) and not self.form.one_concat):
                continue
            found = self.ranges.get(name)
            if found is None:
                raise GraphError(f"the calibration has no range of {name}; calibrate this graph again")
            low, high = spans.get(root(name), (0.0, 0.0))
            spans[root(name)] = (min(low, found.low), max(high, found.high))
        self.scale: dict[str, tuple[float, int]] = {}
        for name in self.quantised:
            low, high = spans.get(root(name), (0.0, 0.0))
            if (high - low) / 255 < np.finfo(np.float32).tiny:  # nothing was seen there; a scale of 0 divides by zero
                low, high = 0.0, 1.0
            if self.form.signed:
                self.scale[name] = (max(-low, high) / 127, 0)
            else:
                step = (high - low) / 255
                self.scale[name] = (step, int(np.clip(round(-low / step), 0, 255)))

    def _joined(self, name: str) -> bool:
        node = self.view.writer.get(name)
        return node is not None and node.op_type == "Concat"

    # weights ----------------------------------------------------------------------------------------------------------

    def _add(self, array: Array, name: str) -> str:
        from onnx import numpy_helper

        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        from onnx import helper

        self.model.graph.node.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes))

    def _weights(self) -> None:
        from onnx import numpy_helper

        tensors = {t.name: t for t in self.model.graph.initializer}
        for name in self.chosen:
            node = self.view.nodes[name]
            weight = numpy_helper.to_array(tensors[node.input[1]]).astype(np.float64)
            has_bias = len(node.input) > 2 and bool(node.input[2])
            bias = numpy_helper.to_array(tensors[node.input[2]]).astype(np.float64) if has_bias else None
            step_x = float(np.float32(self.scale[node.input[0]][0]))
            shape = (-1, *[1] * (weight.ndim - 1))
            largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
            step = largest / self.form.levels
            if bias is not None:  # a channel with next to no weights: its bias must fit into 31 bits of their products
                step = np.maximum(step, np.abs(bias) / step_x / 2**30)
            step = step.astype(np.float32)
            step = np.where(step > 0, step, np.float32(1.0))
            rounded = np.clip(np.rint(weight / step.reshape(shape)), -self.form.levels, self.form.levels)
            correction = self._correction(node, rounded * step.reshape(shape) - weight)
            if correction is not None:
                bias = (np.zeros(len(weight)) if bias is None else bias) - correction
            self._add(rounded.astype(np.int8), f"{name}/weight_int8")
            self._add(step, f"{name}/weight_scale")
            self._add(np.zeros(len(step), np.int8), f"{name}/weight_zero")
            pair = [f"{name}/weight_int8", f"{name}/weight_scale", f"{name}/weight_zero"]
            self._node("DequantizeLinear", pair, f"{name}/weight", axis=0)
            inputs = [node.input[0], f"{name}/weight"]
            if bias is not None and self.form.integer_bias:
                products = (step.astype(np.float64) * step_x).astype(np.float32)
                whole = np.clip(np.rint(bias / products.astype(np.float64)), -(2**31) + 1, 2**31 - 1)
                self._add(whole.astype(np.int32), f"{name}/bias_int32")
                self._add(products, f"{name}/bias_scale")
                self._add(np.zeros(len(products), np.int32), f"{name}/bias_zero")
                pair = [f"{name}/bias_int32", f"{name}/bias_scale", f"{name}/bias_zero"]
                self._node("DequantizeLinear", pair, f"{name}/bias", axis=0)
                inputs.append(f"{name}/bias")
            elif bias is not None:
                inputs.append(self._add(bias.astype(np.float32), f"{name}/bias"))
            del node.input[:]
            node.input.extend(inputs)

    def _correction(self, node: Any, error: Array) -> Array | None:
        """What the rounding error of the weights adds to the mean of each output channel."""
        means = self.means.get(node.input[0])
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        if means is None or len(means) != error.shape[1] * groups:
            return None
        per_group = np.asarray(means).reshape(groups, -1)
        group = np.arange(len(error)) * groups // len(error)
        summed = error.reshape(*error.shape[:2], -1).sum(axis=2)
        shift: Array = (summed * per_group[group]).sum(axis=1)
        return shift

    # activations ------------------------------------------------------------------------------------------------------

    def _activations(self) -> None:
        """Q and DQ behind each quantised tensor; everything that read it reads the result."""
        kind = np.int8 if self.form.signed else np.uint8
        for name, (step, zero) in self.scale.items():
            if not self.form.every_operator and self.view.moved_from(name):
                continue
            scale = self._add(np.array(step, np.float32), f"{name}/scale")
            zero_point = self._add(np.array(zero, kind), f"{name}/zero")
            self._node("QuantizeLinear", [name, scale, zero_point], f"{name}/quantised")
            self._node("DequantizeLinear", [f"{name}/quantised", scale, zero_point], f"{name}/dequantised")
            for reader in self.view.readers.get(name, []):
                for k, read in enumerate(reader.input):
                    if read == name:
                        reader.input[k] = f"{name}/dequantised"


# Metadata of a quantised graph: how many convolutions it means to run in INT8.
QUANTISED_KEY = "quantised_layers"


@dataclass(frozen=True)
class Range:
    """Values of one tensor from ``low`` to ``high``."""

    low: float
    high: float
