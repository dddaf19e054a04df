"""unet-rt: runs trained U-Nets on images of any size, exactly, on whatever machine there is.

>>> import unet_rt as urt
>>> engine = urt.build("model.onnx", samples="images/", out="model.urt")   # doctest: +SKIP
>>> mask = urt.predict(engine, image)                                      # doctest: +SKIP

Nothing but NumPy is imported here; ONNX, PyTorch and the backends are when they are first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._version import __version__
from .build import BuildReport, build
from .contract import Contract, Normalization
from .engine import Engine, EngineSpec, load
from .errors import (
    BackendError,
    ContractError,
    EngineError,
    GraphError,
    ImageError,
    OutputError,
    ParityError,
    TileError,
    UnetRtError,
)
from .parity import Budget
from .predict import RunReport, predict
from .verify import VerifyReport, verify

if TYPE_CHECKING:
    import os

    import onnx

    from .graph import GraphReport


def inspect(model: str | os.PathLike[str] | onnx.ModelProto) -> GraphReport:
    """What an ONNX graph says about tiling it; see :func:`unet_rt.graph.inspect`."""
    from .graph import inspect as inspect_graph

    return inspect_graph(model)


__all__ = [
    "BackendError",
    "Budget",
    "BuildReport",
    "Contract",
    "ContractError",
    "Engine",
    "EngineError",
    "EngineSpec",
    "GraphError",
    "ImageError",
    "Normalization",
    "OutputError",
    "ParityError",
    "RunReport",
    "TileError",
    "UnetRtError",
    "VerifyReport",
    "__version__",
    "build",
    "inspect",
    "load",
    "predict",
    "verify",
]
