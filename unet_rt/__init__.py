"""unet-rt: runs trained U-Nets on images of any size, exactly, on whatever machine there is.

>>> import unet_rt as urt
>>> engine = urt.build("model.onnx", samples="images/", out="model.urt")   # doctest: +SKIP
>>> mask = urt.predict(engine, image)                                      # doctest: +SKIP

Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .building.build import build
    from .building.report import BuildReport
    from .cli.demo import shipped_model
    from .contract.contract import Contract, Normalization
    from .contract.smp import contract_from_smp
    from .engine.budget import Budget
    from .engine.engine import Engine
    from .engine.load import load
    from .engine.spec import EngineSpec
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
    from .graph.report import inspect
    from .judging.bench import bench
    from .judging.verify import VerifyReport, verify
    from .kernels.interface import get_cmake_dir, get_include
    from .outputs.objects import label_mask
    from .prediction.predict import predict
    from .prediction.report import RunReport
    from .prediction.request import Tables
    from .training.export import export

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
    "Tables",
    "TileError",
    "UnetRtError",
    "VerifyReport",
    "__version__",
    "bench",
    "build",
    "contract_from_smp",
    "export",
    "get_cmake_dir",
    "get_include",
    "inspect",
    "label_mask",
    "load",
    "predict",
    "shipped_model",
    "verify",
]

_MODULE = {
    "Budget": "engine.budget",
    "BuildReport": "building.report",
    "Contract": "contract.contract",
    "Engine": "engine.engine",
    "EngineSpec": "engine.spec",
    "Normalization": "contract.contract",
    "RunReport": "prediction.report",
    "Tables": "prediction.request",
    "VerifyReport": "judging.verify",
    "bench": "judging.bench",
    "build": "building.build",
    "contract_from_smp": "contract.smp",
    "export": "training.export",
    "get_cmake_dir": "kernels.interface",
    "get_include": "kernels.interface",
    "inspect": "graph.report",
    "label_mask": "outputs.objects",
    "load": "engine.load",
    "predict": "prediction.predict",
    "shipped_model": "cli.demo",
    "verify": "judging.verify",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE.get(name, 'errors')}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
