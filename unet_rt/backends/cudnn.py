"""cuDNN: 2-D U-Nets in FP16 on NVIDIA GPUs, planned here and convolved by cuDNN's fused kernels.

The graph becomes a list of steps over one block of memory (:mod:`cudnn_plan`); convolutions with bias and ReLU are
cuDNN's (:mod:`cudnn_api`), each by the fastest of its engines that is right when tried (:mod:`cudnn_proof`); what lies
between them are kernels of this package; the whole is recorded once as a CUDA graph (:mod:`cudnn_session`). Weights and
maps are float16, sums float32.

Any tile and batch can be run. Those given to ``build`` have their engines chosen there and put on record in the graph;
for others a few engines are timed when they first run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_rt import machine
from unet_rt.errors import BackendError

if TYPE_CHECKING:
    from unet_rt.backends.cudnn_session import CudnnSession


def missing(device: str = "cpu") -> str | None:
    """None if usable on ``device``; else what is missing and how to get it."""
    if device == "cpu":
        return "cuDNN computes on NVIDIA GPUs alone; use --device cuda:0, or another backend"
    from unet_rt import device as device_layer

    reason = device_layer.missing(machine.cuda_index(device))
    if reason is not None:
        return f"cuDNN cannot use {device}: {reason}"
    kernels = importlib.import_module("unet_rt._cuda")
    if not hasattr(kernels, "steps_fill"):
        return "the CUDA kernels of this installation are older than its Python files; build it again"
    if importlib.util.find_spec("onnx") is None:
        return "the cuDNN backend reads graphs with the onnx package, which is not installed; pip install onnx"
    from unet_rt.backends import cudnn_api

    try:
        version = cudnn_api.library().version
    except BackendError as error:
        return str(error)
    if version[0] != 9:
        return f"cuDNN {'.'.join(map(str, version))} is installed, 9 is needed; pip install nvidia-cudnn-cu13"
    return None


def precisions(device: str = "cpu") -> tuple[str, ...]:
    """Precisions this backend computes in on ``device``."""
    return ("fp16",)


def _require(precision: str, device: str) -> None:
    if precision not in precisions(device):
        raise BackendError(
            f"the cuDNN backend has no {precision}; use --precision fp16, or --backend onnxruntime for {precision}"
        )
    reason = missing(device)
    if reason is not None:
        raise BackendError(reason)


def build(
    model: Path,
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    blob: Path | None = None,
    tiles: Sequence[Sequence[int]] = (),
    batches: Sequence[int] = (),
) -> None:
    """Writes ``graph``: the FP32 network, and the engines that were fastest for ``tiles`` and ``batches`` on ``device``.

    Raises:
        BackendError: Another precision, a network that this backend does not run, or a convolution that no engine runs.
    """
    _require(precision, device)
    import onnx

    from unet_rt.backends.cudnn_plan import compile_plan, read
    from unet_rt.backends.cudnn_session import RECORD

    shapes = [[s] for s in _shapes(model, tiles, batches)]
    proto = onnx.load(str(model))
    if not shapes:
        compile_plan(read(proto), [_any_shape(model)])
    for shape in shapes:
        compile_plan(read(proto), shape)  # a refusal comes before anything is written
    _save(proto, graph)
    with _session(graph, device, most=0) as session:
        for shape in shapes:
            session.output_shapes(shape)
        choices = session.choices
        times = {True: session.milliseconds(shapes[0])} if shapes else {}
    if shapes:
        with _session(graph, device, most=0, direct=False, names=choices.names) as session:
            times[False] = session.milliseconds(shapes[0])
            choices.names |= session.choices.names
        choices.direct = times[True] <= times[False]
    record = json.dumps(choices.to_json(), sort_keys=True)
    entry = next((p for p in proto.metadata_props if p.key == RECORD), None) or proto.metadata_props.add(key=RECORD)
    entry.value = record
    _save(proto, graph)


def _save(proto: Any, graph: Path) -> None:
    import onnx

    try:
        onnx.save_model(proto, str(graph))
    except OSError as error:
        raise BackendError(f"{graph} cannot be written ({error.strerror}); choose another folder") from error


def _shapes(model: Path, tiles: Sequence[Sequence[int]], batches: Sequence[int]) -> list[tuple[int, ...]]:
    """Input shapes (N, C, Y, X) of tiles and batches, for a network of one input."""
    channels = _channels(model)
    for tile in tiles:
        if len(tile) != 2:
            raise BackendError(
                f"tiles of {len(tile)} axes were asked; the cuDNN backend runs 2-D networks, use another backend"
            )
    return [
        (batch, channels, *(int(n) for n in tile)) for tile in tiles for batch in sorted(batches or (1,), reverse=True)
    ]


def _any_shape(model: Path) -> tuple[int, ...]:
    from unet_rt.graph import inspect
    from unet_rt.model import square_tile

    report = inspect(str(model))
    tile = square_tile(report.sizes, report.outputs, 512**2)
    return 1, _channels(model), *tile


def _channels(model: Path) -> int:
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    known = {t.name for t in graph.initializer}
    ports = [value for value in graph.input if value.name not in known]
    sizes = [d.dim_value for d in ports[0].type.tensor_type.shape.dim] if len(ports) == 1 else []
    if len(sizes) != 4:
        raise BackendError(
            f"{model.name} has {len(ports)} input(s) of {len(sizes)} axes; the cuDNN backend runs networks of one input "
            "(N, C, Y, X), use another backend"
        )
    return sizes[1] or 1


def load(
    graph: Path, *, precision: str, device: str = "cpu", threads: int = 0, blob: Path | None = None
) -> CudnnSession:
    """Session on ``device``; ``threads`` are not used: the host computes nothing."""
    _require(precision, device)
    return _session(Path(graph), device, threads=threads)


def _session(graph: Path, device: str, **options: Any) -> CudnnSession:
    from unet_rt.backends.cudnn_session import CudnnSession

    return CudnnSession(graph, device, **options)
