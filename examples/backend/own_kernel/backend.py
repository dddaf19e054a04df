"""A backend: the four functions that unet-rt asks for, and the session that they lead to."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unet_rt.backends.session import Array, BackendSettings, Session, SessionBase
from unet_rt.errors import BackendError

VERSION = "own-kernel 1.0"  # part of what parity was measured for: another one sits the exam again


def missing(device: str = "cpu") -> str | None:
    """None: it is usable. A backend for a card of yours says here what is not installed, and how to get it."""
    return None if device == "cpu" else f"own-kernel knows no {device}; use --device cpu"


def precisions(device: str = "cpu") -> tuple[str, ...]:
    """What it computes in, FP32 first."""
    return ("fp32",)


def build(
    model: Path,
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    blob: Path | None = None,
    tiles: Sequence[Sequence[int]] = (),
    batches: Sequence[int] = (),
) -> BackendSettings | None:
    """Writes ``graph``, what :func:`load` is given later. A compiler's output would go to ``blob``."""
    split(model)  # an error here is a candidate that could not be built; the build goes on with the others
    shutil.copyfile(model, graph)
    return None


def load(
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    threads: int = 0,
    blob: Path | None = None,
    settings: BackendSettings | None = None,
) -> Session:
    """A session of what :func:`build` wrote."""
    return HeadSession(graph, precision, device, threads)


def split(graph: Path) -> tuple[Any, Array, Array]:
    """The graph up to its last convolution, and that one's weights (K, C) and bias (K,)."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(graph))
    last = model.graph.node[-1]
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    if last.op_type != "Conv" or len(last.input) != 3 or weights[last.input[1]].shape[2:] != (1, 1):
        raise BackendError(f"{graph.name} ends with {last.op_type}, not with a 1 x 1 convolution with bias")
    del model.graph.node[-1]
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, None))
    return model, np.ascontiguousarray(weights[last.input[1]][:, :, 0, 0]), weights[last.input[2]]


class HeadSession(SessionBase):
    """ONNX Runtime up to the last convolution, which the kernel computes."""

    title = "own-kernel"

    def __init__(self, graph: Path, precision: str, device: str, threads: int) -> None:
        super().__init__(precision, device, threads)
        import onnxruntime

        body, self._weight, self._bias = split(graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self._body = onnxruntime.InferenceSession(body.SerializeToString(), options, ["CPUExecutionProvider"])
        spec = importlib.util.find_spec("own_kernel._head")
        if spec is None or spec.origin is None:
            raise BackendError("the kernel is not beside own_kernel; pip install the package anew")
        self._head = ctypes.CDLL(spec.origin).head
        floats = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
        self._head.argtypes = [floats] * 4 + [ctypes.c_int64] * 4
        self._head.restype = None

    @property
    def version(self) -> str:
        return VERSION

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        names = [port.name for port in self._body.get_inputs()]
        feeds = {name: np.asarray(array, np.float32) for name, array in zip(names, inputs, strict=True)}
        features = np.ascontiguousarray(self._body.run(None, feeds)[0])
        n, c, *spatial = features.shape
        out = np.empty((n, len(self._bias), *spatial), np.float32)
        self._head(features, self._weight, self._bias, out, n, c, len(self._bias), int(np.prod(spatial)))
        return [out]

    def _release(self) -> None:
        del self._body
