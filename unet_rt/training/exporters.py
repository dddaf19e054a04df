"""A module of PyTorch as the bytes of an ONNX graph, by either of PyTorch's exporters."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ..errors import GraphError

if TYPE_CHECKING:
    import onnx
    from torch import nn

Array = npt.NDArray[np.float32]

Exporter = Literal["auto", "trace", "dynamo"]


def _names(x: Array, outputs: int) -> tuple[list[str], dict[str, dict[int, str]]]:
    names = ["output"] if outputs == 1 else [f"output_{k}" for k in range(outputs)]
    spatial = {1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}[x.ndim - 2]
    axes = {"input": {0: "batch", **{2 + k: name for k, name in enumerate(spatial)}}}
    for name in names:
        axes[name] = {0: "batch", **{2 + k: f"{name}_{axis}" for k, axis in enumerate(spatial)}}
    return names, axes


def trace(module: nn.Module, x: Array, outputs: int, opset: int) -> bytes:
    """The ONNX graph of a module by tracing it once on ``x``, as bytes."""
    import torch

    names, axes = _names(x, outputs)
    buffer = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            module,
            (torch.from_numpy(x),),
            buffer,  # type: ignore[arg-type] # the tracer takes any file object
            input_names=["input"],
            output_names=names,
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
        )
    return buffer.getvalue()


def dynamo(module: nn.Module, x: Array, outputs: int, opset: int) -> bytes:
    """The ONNX graph of a module by torch.export on ``x``, as bytes."""
    import torch

    names, axes = _names(x, outputs)
    free = torch.export.Dim.DYNAMIC
    with _quiet():
        program = torch.onnx.export(
            module,
            (torch.from_numpy(x),),
            input_names=["input"],
            output_names=names,
            dynamic_shapes=({axis: free for axis in axes["input"]},),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise GraphError("torch.onnx.export returned nothing")
    serialized: bytes = program.model_proto.SerializeToString()
    return serialized


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Deprecations and progress inside torch's exporters are not the user's business; their errors are."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def tidy(model: onnx.ModelProto) -> None:
    """Drop the Identity nodes by which the tracer shares equal initialisers, and the names of source lines."""
    graph = model.graph
    initializers = {t.name for t in graph.initializer}
    results = {o.name for o in graph.output}
    same = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Identity" and node.input[0] in initializers and node.output[0] not in results
    }
    kept = [node for node in graph.node if not (node.op_type == "Identity" and node.output[0] in same)]
    for node in kept:
        node.doc_string = ""
        del node.metadata_props[:]
        for k, name in enumerate(node.input):
            node.input[k] = same.get(name, name)
    del graph.node[:]
    graph.node.extend(kept)
    del graph.value_info[:]
    graph.doc_string = model.doc_string = ""
    del graph.metadata_props[:]
