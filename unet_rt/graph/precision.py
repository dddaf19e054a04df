"""ONNX files as backends take them: what arithmetic a graph asks for, and copies that take external data along."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, GraphError

if TYPE_CHECKING:
    import onnx

# Layers where the arithmetic is; the type of their weights is the precision of a graph.
_HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
QUANTISED = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearMatMul",
        "QLinearConv", "QLinearConcat", "QLinearAdd", "QLinearMul", "QGemm", "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
    }
)  # fmt: skip


def _read(model: Path) -> Any:
    """ModelProto without its external data."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(str(model), load_external_data=False)
    except FileNotFoundError as error:
        raise GraphError(f"{model} does not exist; pass an ONNX file") from error
    except DecodeError as error:
        raise GraphError(f"{model} is not an ONNX file ({error}); export it again") from error


def precision_of(model: Path | onnx.ModelProto) -> str:
    """The lowest arithmetic among a graph's heavy layers: ``int8``, ``fp16``, ``bf16``, ``fp32`` or ``fp64``."""
    from onnx import TensorProto

    graph = _read(model).graph if isinstance(model, Path) else model.graph
    if any(node.op_type in QUANTISED for node in graph.node):
        return "int8"
    names = {
        TensorProto.FLOAT16: "fp16",
        TensorProto.BFLOAT16: "bf16",
        TensorProto.FLOAT: "fp32",
        TensorProto.DOUBLE: "fp64",
    }
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    constants = (node for node in graph.node if node.op_type == "Constant")
    types |= {node.output[0]: a.t.data_type for node in constants for a in node.attribute if a.name == "value"}
    found = {types[name] for node in graph.node if node.op_type in _HEAVY for name in node.input if name in types}
    return next((label for kind, label in names.items() if kind in found), "fp32")


def copy_graph(model: Path, graph: Path) -> None:
    """Copy an ONNX file, with the files that hold its external data."""
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    if model.parent.resolve() != graph.parent.resolve():
        proto = _read(model)
        stored = {
            entry.value
            for tensor in _get_all_tensors(proto)
            if uses_external_data(tensor)
            for entry in tensor.external_data
            if entry.key == "location"
        }
        for location in sorted(stored):
            if PurePosixPath(location).is_absolute() or ".." in PurePosixPath(location).parts:
                raise GraphError(f"{model} keeps weights at {location}, outside its folder; save it again as one file")
            source, target = model.parent / location, graph.parent / location
            if not source.is_file():
                raise GraphError(f"{model} keeps weights in {location}, which is not beside it; copy that file too")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    try:
        shutil.copyfile(model, graph)
    except shutil.SameFileError:
        return
    except OSError as error:
        raise BackendError(f"{graph} cannot be written ({error.strerror}); choose another folder") from error
