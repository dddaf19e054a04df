"""ncnn: FP32 by Winograd's convolutions on processors, and any GPU that has a Vulkan driver.

Nine tenths of a U-Net's products are 3 x 3 convolutions of stride 1, for which Winograd's transforms (Lavin and Gray
2016) need 2.25 to 5 times fewer; neither ONNX Runtime nor OpenVINO uses them on x86. The sums come in another order, so
that a sample's last bits depend on where in the tile it lies: engines of this backend are equal up to rounding.

Networks are converted at build, by pnnx; what runs them needs neither it nor onnx.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import BackendError
from ...graph.precision import copy_graph, precision_of
from ..session import BackendSettings, Port
from .library import import_library, installed, vulkan_index
from .session import NcnnPort, NcnnSession, Network, read_network

any_tile = True  # what build writes runs at every size that the graph accepts
variant = "winograd"


def missing(device: str = "cpu") -> str | None:
    """None if usable on ``device``; else what is missing and how to get it."""
    if device.startswith("cuda"):
        return f"ncnn does not run on {device} as such; use --device vulkan for any GPU with a Vulkan driver"
    if not installed():
        return "ncnn is not installed; pip install ncnn pnnx"
    import_library()
    if device != "cpu":
        try:
            vulkan_index(device)
        except BackendError as error:
            return str(error)
    return None


def precisions(device: str = "cpu") -> tuple[str, ...]:
    """Precisions this backend computes in on ``device``; FP16 is a storage that it chooses itself, the graph stays FP32."""
    return ("fp32",) if device == "cpu" else ("fp32", "fp16")


def build(
    model: Path,
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    blob: Path | None = None,
    tiles: Sequence[Sequence[int]] = (),
    batches: Sequence[int] = (),
) -> BackendSettings:
    """Converts the FP32 ``model``: weights to ``blob``, everything else into what is returned; ``graph`` is a copy of it.

    ``tiles``: the last two are what it is converted at; it runs at any size.

    Raises:
        BackendError: Another precision; no converter; a graph that ncnn cannot run, with the layer's name.
    """
    _require(precision, device)
    found = precision_of(model)
    if found != "fp32":
        raise BackendError(f"{model.name} computes in {found}, ncnn takes FP32 graphs; use another --backend")
    if blob is None or not tiles:
        raise BackendError("ncnn converts a network at a tile, into a file of weights; pass both")
    import onnx

    from .convert import convert, ports_of

    inputs, outputs = ports_of(onnx.load(str(model), load_external_data=False))
    _check_ports(inputs, model)
    with tempfile.TemporaryDirectory(prefix="unet-rt-ncnn-") as work:
        converted = convert(model, inputs, tiles[-2:], Path(work))
        network = Network(tuple(map(_described, inputs)), tuple(map(_described, outputs)), converted.param)
        NcnnSession(network, converted.weights, precision, "cpu", 1).close()  # which names a layer that ncnn lacks
        shutil.copyfile(converted.weights, blob)
    copy_graph(model, graph)
    return network.to_json()


def _described(port: Port) -> NcnnPort:
    return NcnnPort(port.name, port.shape, str(port.dtype))


def _check_ports(inputs: Sequence[Port], model: Path) -> None:
    """BackendError for inputs that ncnn's arrays cannot hold as the graph has them."""
    strange: Any = next((p for p in inputs if str(p.dtype) != "float32" or not 3 <= len(p.shape) <= 5), None)
    if strange is not None:
        raise BackendError(
            f"input {strange.name} of {model.name} is {strange.dtype} with {len(strange.shape)} axes, ncnn takes float32 "
            "with 3 to 5; use another --backend"
        )


def _require(precision: str, device: str) -> None:
    reason = missing(device)
    if reason is not None:
        raise BackendError(reason)
    if precision not in precisions(device):
        raise BackendError(
            f"ncnn has no {precision} on {device}; use --precision {' or '.join(precisions(device))}, or another --backend"
        )


def load(
    graph: Path,
    *,
    precision: str,
    device: str = "cpu",
    threads: int = 0,
    blob: Path | None = None,
    settings: BackendSettings | None = None,
) -> NcnnSession:
    """Session of what ``build`` wrote and returned; 0 threads: as many as affinity and quota allow."""
    _require(precision, device)
    if blob is None:
        raise BackendError(f"{graph} comes without the weights that ncnn runs; build the engine again")
    return NcnnSession(read_network(settings, blob), Path(blob), precision, device, threads)


def stale(blob: Path, device: str = "cpu") -> str | None:
    """None: weights are the same on every machine."""
    return None
