"""Crop-and-concat as a kernel of ours inside a plan of TensorRT: compiled ahead of time, without Python at inference.

TensorRT embeds the PTX (``crop_concat.ptx`` in the package, built from ``csrc/crop_concat_plugin.cu``) in the plan and
launches it with the sizes that the expressions below give; the plan needs nothing of this package.
"""

import importlib
import logging
import re
from pathlib import Path
from typing import Any

# Without `from __future__ import annotations`: TensorRT reads the annotations of what is registered as types.
from ...errors import BackendError
from ...graph.passes.crop_concat import DOMAIN, OPERATOR

log = logging.getLogger("unet_rt")

PTX = Path(__file__).parents[2] / "crop_concat.ptx"
NAME = f"{DOMAIN}::{OPERATOR}"
THREADS = 256
_KERNELS = {"FLOAT": ("unet_rt_crop_concat_f32", 4), "HALF": ("unet_rt_crop_concat_f16", 8)}  # samples per 16 bytes
_registered: set[str] = set()


def missing(trt: Any) -> str | None:
    """Why the kernel cannot be compiled into plans, None if it can."""
    if trt.__name__ != "tensorrt":
        return "TensorRT-RTX has no plugins"
    if not PTX.is_file():
        return f"{PTX.name} was not built; install with nvcc and UNET_RT_CUDA=ON"
    if not hasattr(trt, "QuickPluginCreationRequest"):
        return f"tensorrt {trt.__version__} has no plugins that are compiled ahead of time"
    return None


def register(trt: Any) -> bool:
    """Makes the operator known to the library, once per process; whether it is known."""
    if missing(trt) is not None:
        return False
    if NAME not in _registered:
        _register(trt, PTX.read_text())
        _registered.add(NAME)
    return True


def _register(trt: Any, ptx: str) -> None:
    plugin = importlib.import_module(f"{trt.__name__}.plugin")
    tensor: Any = plugin.TensorDesc
    combination: Any = plugin.AutoTuneCombination
    parameters: Any = plugin.KernelLaunchParams
    expressions: Any = plugin.SymIntExprs
    entries = set(re.findall(r"\.entry (\w+)", ptx))
    absent = {kernel for kernel, _ in _KERNELS.values()} - entries
    if absent:
        raise BackendError(f"{PTX.name} holds {sorted(entries)}, not {sorted(absent)}; install unet-rt again")

    def describe(skip: tensor, up: tensor) -> tensor:
        n, c1, _, _ = skip.shape_expr
        _, c2, h, w = up.shape_expr
        return plugin.from_shape_expr((n, c1 + c2, h, w), dtype=skip.dtype)

    def tune(skip: tensor, up: tensor, outputs: tuple[tensor]) -> list[combination]:
        return [combination("FP32|FP16, FP32|FP16, FP32|FP16", "LINEAR", [1])]

    def implement(
        skip: tensor, up: tensor, outputs: tuple[tensor], tactic: int
    ) -> tuple[str | bytes, str | bytes, parameters, expressions]:
        kernel, vector = _KERNELS[skip.dtype.name]
        n, c1, h1, w1 = skip.shape_expr
        _, c2, h, w = up.shape_expr
        launch = parameters()
        # A row begins anywhere within 16 bytes, so that it may touch one vector more than it fills.
        vectors = plugin.cdiv(w + (vector - 1), vector)
        launch.grid_x = plugin.cdiv(n * (c1 + c2) * h * vectors, THREADS)
        launch.block_x = THREADS
        sizes = expressions(7)
        for position, size in enumerate((n, c1, h1, w1, c2, h, w)):
            sizes[position] = plugin.SymInt32(size)
        return kernel, ptx, launch, sizes

    plugin.register(NAME)(describe)
    plugin.autotune(NAME)(tune)
    plugin.aot_impl(NAME)(implement)
