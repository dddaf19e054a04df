"""The libraries that run graphs, one each: ``onnxruntime``, ``openvino``, ``tensorrt``, ``ncnn``, ``eager``.

Every module has the functions of :class:`unet_rt.backends.session.Backend`; none of the libraries is imported before one
of them is called. Other packages may offer more (:mod:`unet_rt.backends.outside`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from ..errors import BackendError
from ..system import facts
from .session import Backend, Session

if TYPE_CHECKING:
    from .ncnn.library import VulkanDevice

__all__ = [
    "Backend",
    "Session",
    "advice",
    "device",
    "get",
    "install_line",
    "names",
    "require",
    "usable",
    "vulkan_devices",
]

_MODULES = {
    "onnxruntime": ".onnxruntime.backend",
    "openvino": ".openvino",
    "tensorrt": ".tensorrt.backend",
    "ncnn": ".ncnn.backend",
    "eager": ".eager",  # runs a module or a checkpoint, and no engine folder
}
# Engines, the baseline first; a tie in speed goes to the first.
_ENGINES = ("onnxruntime", "openvino", "tensorrt", "ncnn")


def names() -> tuple[str, ...]:
    """Backends that an engine can be built for, in order of preference; those of other packages last."""
    from .outside import outside_names

    return (*_ENGINES, *outside_names(frozenset(_MODULES)))


def get(name: str) -> Backend:
    """Module of a backend, or what another package offers as one.

    Raises:
        BackendError: No backend of this name.
    """
    if name not in _MODULES:
        from .outside import outside_backend

        if name not in names():
            raise BackendError(f"there is no backend {name!r}; choose one of {', '.join((*names(), 'eager'))}")
        return outside_backend(name)
    return cast(Backend, importlib.import_module(_MODULES[name], __name__))


def usable(device: str = "cpu") -> list[str]:
    """Names of the backends that are installed and run on ``device``.

    Raises:
        BackendError: An installation that is broken.
    """
    return [name for name in names() if get(name).missing(device) is None]


def require(device: str = "cpu") -> list[str]:
    """:func:`usable`, with an error where nothing is.

    Raises:
        BackendError: No backend; the message is :func:`advice`.
    """
    found = usable(device)
    if not found:
        raise BackendError(advice(device))
    return found


def advice(device: str = "cpu") -> str:
    """Why no backend runs on ``device``, and the one line that installs one on this machine."""
    driver = facts.cuda().missing
    if device.startswith("cuda") and driver is not None:
        return f"{device} was asked: {driver}; install the driver, or use --device cpu"
    reasons = "; ".join(f"{name}: {get(name).missing(device)}" for name in names())
    line = 'pip install "unet-rt[gpu]"' if device.startswith("cuda") else install_line()
    return f"no backend runs on {device} here ({reasons}). To install one: {line}"


def install_line() -> str:
    """The command that installs the backends for this machine."""
    return f'pip install "unet-rt[{"gpu" if facts.cuda().devices else "cpu"}]"'


def device(name: str = "auto") -> str:
    """``"cpu"``, ``"cuda:N"`` or ``"vulkan:N"`` for ``auto`` or one of these, N being 0 where it is left away.

    ``auto`` is the first NVIDIA GPU if a backend can use it, else the CPU. Anything else is what it says, or an error.

    Raises:
        BackendError: An unknown name, or a GPU that is not there.
    """
    if name == "cpu":
        return "cpu"
    if name == "auto":
        return "cuda:0" if facts.cuda().devices and usable("cuda:0") else "cpu"
    kind, colon, number = name.partition(":")
    if kind not in ("cuda", "vulkan") or (colon and not number.isdecimal()):
        raise BackendError(f"there is no device {name!r}; use auto, cpu, cuda[:N] or vulkan[:N]")
    if kind == "vulkan":
        return _vulkan(f"vulkan:{int(number or 0)}")
    index, cuda = int(number or 0), facts.cuda()
    if cuda.missing is not None:
        raise BackendError(f"{name} was asked: {cuda.missing}; install the driver, or use --device cpu")
    if index >= len(cuda.devices):
        raise BackendError(
            f"{name} was asked, the driver lists {len(cuda.devices)} GPU(s), the last is cuda:{len(cuda.devices) - 1}"
        )
    return f"cuda:{index}"


def vulkan_devices() -> tuple[VulkanDevice, ...]:
    """The devices that Vulkan lists, as far as a backend that reaches them is installed."""
    from .ncnn import library

    return library.vulkan_devices() if library.installed() else ()


def _vulkan(name: str) -> str:
    """The device, if a backend reaches it."""
    reason = get("ncnn").missing(name)
    if reason is not None:
        raise BackendError(reason)
    return name
