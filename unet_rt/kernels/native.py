"""The compiled modules, loaded when they are first used."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from ..errors import BackendError

if TYPE_CHECKING:
    from types import ModuleType


@functools.cache  # reading the cgroup's files takes longer than gathering a small tile
def default_threads() -> int:
    """Threads that this process may use: affinity and cgroup quota, as found at the first call."""
    from ..system import limits as machine

    return machine.threads()


def cuda_status() -> str:
    """``"built"``, or the reason why this installation has no CUDA kernels."""
    return str(cpu().build_info["cuda"])


def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot run here, with the way out; None if they are built and a device is there."""
    try:
        return str(cuda().missing()) or None
    except BackendError as error:
        return str(error)


def graph_begin(stream: int) -> None:
    """From now on, what is enqueued on a CUDA stream (not the default one) is not run but recorded in a graph.

    Raises:
        BackendError: The stream cannot be captured, or there is no device.
    """
    cuda().graph_begin(stream)


def graph_end(stream: int) -> int:
    """The handle of what was recorded since :func:`graph_begin`, ready to be launched.

    Raises:
        BackendError: Something was done that a graph cannot hold.
    """
    handle: int = cuda().graph_end(stream)
    return handle


def graph_launch(graph: int, stream: int) -> None:
    """Enqueue all that a graph holds on a CUDA stream.

    Raises:
        BackendError: The launch failed.
    """
    cuda().graph_launch(graph, stream)


def graph_destroy(graph: int) -> None:
    """Free a graph. Launches under way end as if it still existed."""
    cuda().graph_destroy(graph)


@functools.cache
def cpu() -> Any:
    """The compiled kernels for the CPU; BackendError where they cannot be loaded."""
    try:
        module: ModuleType = importlib.import_module("unet_rt._cpu")
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the compiled kernels are missing ({error}); install the package (pip install unet-rt), or build them in "
            "a source tree with a C++ compiler: pip install --no-build-isolation -e ."
        ) from error
    except ImportError as error:
        raise BackendError(
            f"the compiled kernels cannot be loaded ({error}); reinstall the package for this Python and machine: "
            "pip install --force-reinstall unet-rt"
        ) from error
    return module


@functools.cache
def cuda() -> Any:
    """The compiled kernels for NVIDIA GPUs; BackendError where they cannot be loaded."""
    status = cuda_status()
    try:
        module: ModuleType = importlib.import_module("unet_rt._cuda")
    except ModuleNotFoundError as error:
        reason = status if status != "built" else f"they were built, but {error}"
        raise BackendError(
            f"this installation has no CUDA kernels: {reason}; install a CUDA compiler (nvcc) and then the package from "
            "source with UNET_RT_CUDA=ON"
        ) from error
    except ImportError as error:
        raise BackendError(
            f"the compiled CUDA kernels cannot be loaded ({error}); reinstall the package for this Python and machine"
        ) from error
    return module
