"""ONNX Runtime: the baseline everywhere, and an engine on CPUs and NVIDIA GPUs (those in :mod:`.cuda`).

When a position's result does not depend on the tile (seen with 1.32 on x86-64): the blocked 2-D convolutions
(ungrouped, input channels a multiple of 4) and whatever sums at most 128 products per output give the same bits at any
size, batch and thread count. The matrix kernels (ConvTranspose, 3-D and odd-channel convolutions) cut longer sums into
blocks of 128 products, and into longer ones where a thread has at most 64 positions: a transposed convolution of 256
channels rounds differently in a map of 8 x 8 than in one of 9 x 9, and with 32 threads in one of 48 x 48. No setting
changes that; written as a 1 x 1 convolution and DepthToSpace it goes the blocked way and is free of it. OpenVINO showed
none of this.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ...errors import BackendError
from ...graph.passes.up_conv import up_conv
from ...graph.precision import copy_graph, precision_of
from ..session import BackendSettings, Session
from .cpu import OnnxRuntimeSession
from .library import missing

log = logging.getLogger("unet_rt")

any_tile = True
variant = ""


def precisions(device: str = "cpu") -> tuple[str, ...]:
    """Precisions this backend computes in on ``device``: that of the graph."""
    # The CPU provider has no bfloat16 convolution, and no setting that would make FP32 graphs run in it; float16 graphs
    # run in float32 between casts. On CUDA bfloat16 lacks MaxPool and ConvTranspose.
    return ("fp32", "int8") if device == "cpu" else ("fp32", "fp16")


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
    """Writes ``graph``: FP32 or INT8 for the CPU, ``precision`` for a GPU, for which settings are measured and returned.

    For INT8 ``model`` is quantised already, in the form of :mod:`unet_rt.graph.passes.qdq` for this backend.

    On the CPU up-convolutions are rewritten so that a tile's bits are the whole image's. On a GPU ``tiles`` and
    ``batches`` name the shape that settings are measured at. ONNX Runtime computes in the types of the graph.

    Raises:
        BackendError: A precision this backend does not have on ``device``, or a graph of another precision.
    """
    _require_precision(precision, device)
    import onnx

    from ...graph.passes.half import half_type_of

    found = precision_of(model)
    if precision == "int8":
        if found != "int8":
            raise BackendError(
                f"{model.name} computes in {found}, int8 was asked; "
                "quantise it first (unet-rt build with --samples does)"
            )
        copy_graph(model, graph)
        return None
    if found != "fp32" and (
        found != precision or half_type_of(onnx.load(str(model), load_external_data=False)) != precision
    ):
        raise BackendError(f"{model.name} computes in {found}, {precision} was asked; give the FP32 graph")
    if device != "cpu":
        reason = missing(device)
        if reason is not None:
            raise BackendError(reason)
        from . import trial

        return trial.tune(model, graph, precision=precision, device=device, tiles=tiles, batches=batches).to_json()
    copy_graph(model, graph)
    proto = onnx.load(str(graph))
    if up_conv(proto):
        onnx.save(proto, str(graph))
    return None


def _require_precision(precision: str, device: str) -> None:
    if precision not in precisions(device):
        others = "--backend openvino" if device == "cpu" else "--backend tensorrt"
        has = " or ".join(f"--precision {name}" for name in precisions(device))
        raise BackendError(f"ONNX Runtime has no {precision} on {device}; use {has}, or {others}")


def load(
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    threads: int = 0,
    blob: Path | None = None,
    settings: BackendSettings | None = None,
) -> Session:
    """Session on ``device`` with ``threads`` threads; 0: as many as affinity and quota allow.

    On a GPU it is a :class:`~unet_rt.backends.session.DeviceSession` with the ``settings`` that build measured.
    """
    _require_precision(precision, device)
    if device == "cpu":
        return OnnxRuntimeSession(Path(graph), precision, threads)
    from .cuda import CudaSession
    from .settings import read_settings

    if settings is None:
        log.warning(
            "%s comes without settings measured for a GPU, and runs with the provider's own; build the engine again",
            graph,
        )
        return CudaSession(Path(graph), precision, device, threads)
    return CudaSession(Path(graph), precision, device, threads, read_settings(settings, Path(graph)))
