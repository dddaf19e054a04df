"""Sessions of ONNX Runtime's CUDA provider: its libraries loaded, a graph opened, and what left the GPU refused."""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BackendError, DeviceMemoryError
from . import library
from .settings import GraphPort

if TYPE_CHECKING:
    from ...kernels.device import Device


# Operators that may run on the CPU: the arithmetic of sizes. Anything else there is a network that left the GPU.
_ARITHMETIC = frozenset(
    "Shape Size Gather Concat Unsqueeze Squeeze Cast Slice Mul Add Sub Div Floor Ceil Min Max Constant ConstantOfShape "
    "Range Reshape Identity Equal Where Expand Not Mod Round Sqrt ReduceProd Neg".split()
)


def preload(library: Any) -> None:
    """Loads CUDA and cuDNN from NVIDIA's wheels, where they are installed, and refuses machines without cuDNN."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it cannot find
        if hasattr(library, "preload_dlls"):
            library.preload_dlls()
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL("libcudnn.so.9")
    except OSError as error:
        first = said.getvalue().strip().partition("\n")[0]
        raise BackendError(
            f"ONNX Runtime would convolve on the GPU without cuDNN, slowly: {error}{'; ' + first if first else ''}; "
            "pip install nvidia-cudnn-cu13, or put the folder of libcudnn.so.9 on LD_LIBRARY_PATH"
        ) from error


@dataclass(frozen=True)
class Provider:
    """What the sessions of one graph on one GPU are made with, whatever their shapes.

    Attributes:
        library: The module of ONNX Runtime.
        graph: The ONNX file.
        options: The provider's own.
        gpu: The device.
        device: Its name.
        threads: Of the host.
    """

    library: Any
    graph: Path
    options: Mapping[str, str]
    gpu: Device
    device: str
    threads: int

    def session(self, sizes: Mapping[str, int]) -> Any:
        """A session in which these named sizes are fixed; nothing but the arithmetic of sizes may run on the CPU.

        Raises:
            BackendError: ONNX Runtime refuses the graph, or would run a part of it on the CPU.
            DeviceMemoryError: The GPU does not hold its weights.
        """
        refused: Exception | None = None
        kinds = library.errors(self.library)
        for strict in (True, False):
            try:
                session = self.library.InferenceSession(
                    str(self.graph),
                    self._session_options(strict, sizes),
                    providers=[("CUDAExecutionProvider", dict(self.options))],
                    disabled_optimizers={"ConvActivationFusion", "ConvAddActivationFusion"},
                    enable_fallback=0,
                )
                break
            except kinds as error:
                refused = refused or error
        else:
            # Its errors have no kind of their own for short memory. The weights alone take as much as the file.
            weights, free = self.graph.stat().st_size, self.gpu.memory()[0]
            if weights > free:
                raise DeviceMemoryError(
                    f"{self.graph.name} takes {weights / 1e6:.0f} MB of device memory, {free / 1e6:.0f} MB are free on "
                    f"{self.device}; free what others hold, or use --device cpu"
                ) from refused
            raise BackendError(f"ONNX Runtime refuses {self.graph} on {self.device}: {refused}") from refused
        active = session.get_providers()
        if not active or active[0] != "CUDAExecutionProvider":
            raise BackendError(
                f"CUDAExecutionProvider was asked for {self.graph.name}, ONNX Runtime took "
                f"{', '.join(active) or 'nothing'}; CUDA or cuDNN libraries are missing (see unet-rt doctor), "
                "or use --device cpu"
            )
        strays = library.strays(session, "CUDAExecutionProvider", _ARITHMETIC)
        if strays:
            raise BackendError(
                f"{len(strays)} layer(s) of {self.graph.name} would run on the CPU, {self.device} was asked "
                f"(first: {strays[0]}); use --device cpu"
            )
        return session

    def _session_options(self, strict: bool, sizes: Mapping[str, int]) -> Any:
        options = library.session_options(self.library, self.threads)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # Strictly, the arithmetic of sizes is refused, too, which is none of the GPU's business.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(strict)))
        for name, size in sizes.items():
            options.add_free_dimension_override_by_name(name, size)
        return options


def sizes_by_name(inputs: Sequence[GraphPort], key: Sequence[Sequence[int]]) -> dict[str, int]:
    """Free sizes of the inputs at shapes ``key``; none at all where one name would mean two sizes."""
    found: dict[str, int] = {}
    for value, shape in zip(inputs, key, strict=False):
        for name, size in zip(value.shape, shape, strict=True):
            if isinstance(name, str) and found.setdefault(name, size) != size:
                return {}
    return found


def graph_port(value: Any) -> GraphPort:
    """An input or output as a provider session describes it."""
    port = library.port_of(value)
    return GraphPort(port.name, tuple(n if isinstance(n, int | str) else None for n in value.shape), port.dtype.name)
