"""The shipped, trained networks in forms that other tools export: the same answers, told in another way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from unet_rt.cli.demo import shipped_model
from unet_rt.drawing.microscopy import microscopy

Array = np.ndarray[Any, np.dtype[Any]]


def trained() -> onnx.ModelProto:
    """The shipped network for nuclei: (N, 1, Y, X) to two channels of logits."""
    return onnx.load(shipped_model())


def images(count: int, side: int = 138) -> list[Array]:
    """Drawn microscopy, uint16, higher than wide."""
    return [microscopy((side + 20, side), seed=60 + k).image for k in range(count)]


def answers(model: onnx.ModelProto | Path, *inputs: Array) -> list[Array]:
    """What plain ONNX Runtime says."""
    import onnxruntime

    data = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return [np.asarray(y) for y in session.run(None, dict(zip(names, inputs, strict=True)))]


def declare(model: onnx.ModelProto, output_is: str) -> None:
    """Changes what the metadata say of the output."""
    for entry in model.metadata_props:
        if entry.key == "unet_rt.contract":
            entry.value = json.dumps({**json.loads(entry.value), "output_is": output_is})


def give(model: onnx.ModelProto, name: str, dtype: int, dims: Sequence[int | str]) -> onnx.ModelProto:
    """The model with this output alone."""
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(name, dtype, list(dims)))
    return model


def add(model: onnx.ModelProto, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
    """Appends a node."""
    model.graph.node.append(helper.make_node(op, list(inputs), [output], output, **attributes))


def constant(model: onnx.ModelProto, name: str, values: Any, dtype: Any) -> str:
    """Adds an initialiser."""
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
    return name


def channels_last(model: onnx.ModelProto) -> onnx.ModelProto:
    """(N, Y, X, C) at both ends, as tf2onnx exports."""
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = "first" if name == "input" else name
    model.graph.node.insert(0, helper.make_node("Transpose", ["input"], ["first"], "first", perm=[0, 3, 1, 2]))
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", "h", "w", 1]))
    add(model, "Transpose", ["output"], "last", perm=[0, 2, 3, 1])
    return give(model, "last", TensorProto.FLOAT, ["n", "oh", "ow", 2])


def argmax(model: onnx.ModelProto, axis: int, keep: bool, softmax: bool, to: int | None = None) -> onnx.ModelProto:
    """Labels in place of values."""
    name = model.graph.output[0].name
    if softmax:
        add(model, "Softmax", [name], "probabilities", axis=axis)
        declare(model, "probabilities")
        name = "probabilities"
    add(model, "ArgMax", [name], "labels", axis=axis, keepdims=int(keep))
    name, dims = "labels", ["n", "oh", "ow"]
    if keep:
        dims.insert(axis % 4, "one")
    if to is not None:
        add(model, "Cast", [name], "cast", to=to)
        name = "cast"
    return give(model, name, to or TensorProto.INT64, dims)


def in_half(model: onnx.ModelProto, ends: bool) -> onnx.ModelProto:
    """All tensors in FP16, as onnxconverter-common writes; ``ends``: the input and the output stay in FP32."""
    scales = {name for node in model.graph.node if node.op_type == "Resize" for name in node.input[1:]}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scales:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute if node.output[0] not in scales else ():
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float16)))
    del model.graph.value_info[:]
    if not ends:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
        return model
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = "input16" if name == "input" else name
        for k, name in enumerate(node.output):
            node.output[k] = "output16" if name == "output" else name
    model.graph.node.insert(0, helper.make_node("Cast", ["input"], ["input16"], "to16", to=TensorProto.FLOAT16))
    model.graph.node.append(helper.make_node("Cast", ["output16"], ["output"], "to32", to=TensorProto.FLOAT))
    return model


class _Pixels:
    """Tiles for a calibration, normalised as the network takes them."""

    def __init__(self) -> None:
        self._left: Iterator[Array] = iter([normalised(image)[:, :, :136, :136] for image in images(2)])

    def get_next(self) -> dict[str, Array] | None:
        tile = next(self._left, None)
        return None if tile is None else {"input": tile}


def normalised(image: Array) -> Array:
    """(1, 1, Y, X) float32 as the shipped network takes it: percentiles 1 and 99.8 become 0 and 1."""
    low, high = np.percentile(image, (1, 99.8))
    return ((image.astype(np.float64) - low) / (high - low + 1e-6)).astype(np.float32)[None, None]


def quantised(path: Path, kind: str) -> Path:
    """The network as ONNX Runtime's quantiser writes it: ``qdq``, ``qoperator`` or ``dynamic``."""
    from onnxruntime import quantization as q

    source = path.with_name("source.onnx")
    onnx.save(trained(), source)
    if kind == "dynamic":
        q.quantize_dynamic(source, path, weight_type=q.QuantType.QUInt8, op_types_to_quantize=["Conv"])
    else:
        form = q.QuantFormat.QDQ if kind == "qdq" else q.QuantFormat.QOperator
        q.quantize_static(
            source, path, _Pixels(), quant_format=form, activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8
        )  # fmt: skip
    return path


def initialisers_as_inputs(model: onnx.ModelProto, ir: int) -> onnx.ModelProto:
    """Weights listed among the inputs, as ``keep_initializers_as_inputs`` and IR 3 have it."""
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    model.ir_version = ir
    return model


def whole_numbers(model: onnx.ModelProto, dtype: int = TensorProto.UINT8, scale: float = 255.0) -> onnx.ModelProto:
    """Grey levels in, divided inside; nothing says anything else."""
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = "first" if name == "input" else name
    model.graph.node.insert(0, helper.make_node("Cast", ["input"], ["real"], "real", to=TensorProto.FLOAT))
    model.graph.node.insert(
        1, helper.make_node("Div", ["real", constant(model, "by", scale, np.float32)], ["first"], "by")
    )
    model.graph.input[0].type.tensor_type.elem_type = dtype
    del model.metadata_props[:]
    return model


def flattened(model: onnx.ModelProto, form: str, side: int | None = None) -> onnx.ModelProto:
    """The output as a list of pixels, with a softmax after it, as Keras ports have it.

    ``last``: (N, Y * X, C). ``permuted``: (N, C, Y * X), permuted to (N, Y * X, C). ``first``: (N, C, Y * X).
    ``side``: of a file for one size.
    """
    pixels = -1 if side is None else side * side
    if form == "last":
        add(model, "Transpose", ["output"], "nhwc", perm=[0, 2, 3, 1])
        add(model, "Reshape", ["nhwc", constant(model, "shape", [0, pixels, 2], np.int64)], "flat")
    else:
        add(model, "Reshape", ["output", constant(model, "shape", [0, 2, pixels], np.int64)], "flat")
    name = "flat"
    if form == "permuted":
        add(model, "Transpose", ["flat"], "permuted", perm=[0, 2, 1])
        name = "permuted"
    add(model, "Softmax", [name], "softmax", axis=1 if form == "first" else 2)
    declare(model, "probabilities")
    if side is not None:
        for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
            dim.dim_value = side
    many: int | str = "pixels" if side is None else pixels
    return give(model, "softmax", TensorProto.FLOAT, ["n", 2, many] if form == "first" else ["n", many, 2])


def of_slices(model: onnx.ModelProto, weights: Sequence[float]) -> onnx.ModelProto:
    """A network of neighbouring slices as channels: the trained one on their weighted mean."""
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    tensor = next(t for t in model.graph.initializer if t.name == conv.input[1])
    kernel = numpy_helper.to_array(tensor)
    spread = kernel * np.asarray(weights, np.float32).reshape(1, -1, 1, 1)
    tensor.CopyFrom(numpy_helper.from_array(spread.astype(np.float32), tensor.name))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = len(weights)
    return model


INT32 = TensorProto.INT32
FORMS: dict[str, Callable[[Path], Any]] = {
    "argmax": lambda _: argmax(trained(), 1, False, False),
    "argmax-kept": lambda _: argmax(trained(), 1, True, False),
    "argmax-int32": lambda _: argmax(trained(), 1, False, False, INT32),
    "softmax-argmax": lambda _: argmax(trained(), 1, False, True),
    "softmax-argmax-kept-int32": lambda _: argmax(trained(), 1, True, True, INT32),
    "argmax-nhwc": lambda _: argmax(channels_last(trained()), -1, False, True),
    "argmax-nhwc-kept-int32": lambda _: argmax(channels_last(trained()), -1, True, False, INT32),
    "fp16": lambda _: in_half(trained(), False),
    "fp16-ends": lambda _: in_half(trained(), True),
    "qdq": lambda p: quantised(p, "qdq"),
    "qoperator": lambda p: quantised(p, "qoperator"),
    "dynamic": lambda p: quantised(p, "dynamic"),
    "initialisers": lambda _: initialisers_as_inputs(trained(), 8),
    "initialisers-ir3": lambda _: initialisers_as_inputs(trained(), 3),
    "uint8": lambda _: whole_numbers(trained()),
    "uint16": lambda _: whole_numbers(trained(), TensorProto.UINT16, 65535.0),
    "flat-last": lambda _: flattened(trained(), "last"),
    "flat-permuted": lambda _: flattened(trained(), "permuted"),
    "flat-first": lambda _: flattened(trained(), "first"),
    "flat-last-256": lambda _: flattened(trained(), "last", 256),
    "slices": lambda _: of_slices(trained(), (0.25, 0.5, 0.25)),
}  # fmt: skip


def written(name: str, folder: Path) -> Path:
    """The file of one form."""
    path = folder / f"{name}.onnx"
    made = FORMS[name](path)
    if isinstance(made, onnx.ModelProto):
        onnx.save(made, path)
    return path
