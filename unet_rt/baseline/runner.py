"""What runs the FP32 baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError

FP32_BACKENDS = ("onnxruntime", "openvino")  # in order of preference; they agree to rounding


def baseline_runner(name: str | None = None) -> Any:
    """A function (model, inputs) -> outputs that runs a graph once: with this backend, or the first baseline installed."""
    import tempfile

    import onnx

    from .. import backends

    backend = backends.get(name or baseline_name())

    def run(model: onnx.ModelProto, inputs: Any) -> list[npt.NDArray[Any]]:
        arrays = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        with tempfile.TemporaryDirectory(prefix="unet-rt-") as folder:
            path = Path(folder) / "graph.onnx"
            onnx.save_model(model, str(path))
            session = backend.load(path, precision="fp32", device="cpu", threads=0)
            try:
                return [np.array(y) for y in session.run(arrays)]
            finally:
                session.close()

    return run


def baseline_name() -> str:
    """The name of the backend that computes FP32 baselines on this machine.

    Raises:
        BackendError: None is installed.
    """
    from .. import backends

    for name in FP32_BACKENDS:
        if backends.get(name).missing() is None:
            return name
    raise BackendError(backends.advice())
