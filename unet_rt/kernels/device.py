"""The GPUs of this machine, opened on PyCUDA, and arrays that other libraries hold on them."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import sys
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, DeviceMemoryError
from ..system import facts
from .memory import DeviceArray, MemoryContext
from .stream import check_status, driver_library

_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_LEGACY_STREAM = 1  # CU_STREAM_LEGACY

_HOW = (
    "PyCUDA has no wheels: conda install -c conda-forge pycuda brings a binary; pip install pycuda needs the CUDA "
    "headers and a C++ compiler, and cuRAND unless ~/.aksetup-defaults.py says CUDA_ENABLE_CURAND = False"
)


def missing_reason(index: int = 0) -> str | None:
    """None if GPU ``index`` can be used; else one sentence: what is missing and how to get it."""
    found = facts.cuda()
    if found.missing is not None:
        return found.missing
    if not 0 <= index < len(found.devices):
        return f"there is no device cuda:{index}; the driver lists {len(found.devices)} (cuda:0 is the first)"
    if importlib.util.find_spec("unet_rt._cuda") is None:
        from . import native as kernels

        return (
            f"this installation has no CUDA kernels ({kernels.cuda_status()}); build it where nvcc is found: "
            "UNET_RT_CUDA=ON pip install --no-build-isolation ."
        )
    if importlib.util.find_spec("pycuda") is None:
        return f"PyCUDA is not installed; {_HOW}"
    try:
        importlib.import_module("pycuda.driver")
    except ImportError as error:
        return f"PyCUDA cannot be imported ({error}); {_HOW}"
    return None


class Device(MemoryContext):
    """A GPU and its primary context. Get it by :meth:`open`; it lives as long as the process.

    Attributes:
        index: As in ``cuda:<index>``.
        name: As the driver calls it.
        compute_capability: (major, minor).
        driver_version: CUDA version that the driver supports, e.g. ``"13.1"``.
        multiprocessors: How many it has.
    """

    _opened: ClassVar[dict[int, Device]] = {}
    _opening = threading.Lock()

    def __init__(self, index: int) -> None:
        reason = missing_reason(index)
        if reason is not None:
            raise BackendError(f"cuda:{index} cannot be used: {reason}")
        driver: Any = importlib.import_module("pycuda.driver")
        try:
            driver.init()
            device = driver.Device(index)
            primary: Any = device.retain_primary_context()
            self.multiprocessors = int(device.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT))
        except driver.MemoryError as error:
            raise DeviceMemoryError(
                f"cuda:{index} has no memory left for a process more ({str(error).strip()}); free what others hold"
            ) from error
        except driver.Error as error:
            raise BackendError(f"cuda:{index} cannot be opened: {error}; see unet-rt doctor") from error
        super().__init__(index, driver, primary)
        self.name = str(device.name())
        self.compute_capability: tuple[int, int] = tuple(device.compute_capability())
        self.driver_version = facts.cuda().driver
        atexit.register(self.detach)

    @classmethod
    def open(cls, index: int = 0) -> Device:
        """The device, opened once per process.

        Raises:
            BackendError: It cannot be used (:func:`missing_reason` says why).
        """
        with cls._opening:
            if index not in cls._opened:
                cls._opened[index] = cls(index)
            return cls._opened[index]

    def __repr__(self) -> str:
        return f"<cuda:{self.index} {self.name}>"


def is_device_array(array: Any) -> bool:
    """Whether ``array`` lives on an NVIDIA GPU, as far as it says so."""
    if isinstance(array, (np.ndarray, str, bytes)):
        return False
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[0]) in (2, 13)  # kDLCUDA, kDLCUDAManaged
    try:
        return hasattr(array, "__cuda_array_interface__")
    except Exception:  # noqa: BLE001 - PyTorch raises for tensors that its interface cannot describe
        return True


def from_array(array: Any, name: str = "array") -> tuple[DeviceArray, int]:
    """Another library's array, without copying, and the stream (cudaStream_t) on which it was filled.

    PyTorch's current stream; CuPy's and others' as their interface states it, else the legacy default stream.

    Raises:
        BackendError: It speaks no ``__cuda_array_interface__``, or the device cannot be used.
    """
    torch = sys.modules.get("torch")
    tensor = torch is not None and isinstance(array, torch.Tensor)
    if tensor:
        array = array.detach()
    try:
        stated = array.__cuda_array_interface__
    except Exception as error:  # of any type, by any library
        raise BackendError(
            f"{name} lives on another device, a GPU, and cannot be shared by __cuda_array_interface__ ({error}); convert "
            "its dtype, or hand it over by torch.from_dlpack(...)"
        ) from error
    pointer = int(stated["data"][0])
    dtype = np.dtype(stated["typestr"])
    if torch is not None and tensor:
        index, stream = int(array.device.index), int(torch.cuda.current_stream(array.device).cuda_stream)
    else:
        index, stream = device_index(pointer), int(stated.get("stream") or _LEGACY_STREAM)
    shaped = DeviceArray(Device.open(index), pointer, stated["shape"], dtype, stated.get("strides"), owner=array)
    return shaped, stream


def empty_like(
    array: Any, shape: Sequence[int], dtype: npt.DTypeLike, device: MemoryContext
) -> tuple[Any, DeviceArray]:
    """(array of the library of ``array``, the same as ours): PyTorch's for its tensors, else our own twice."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        made = torch.empty(tuple(shape), dtype=getattr(torch, np.dtype(dtype).name), device=array.device)
        return made, DeviceArray(device, made.data_ptr(), shape, dtype, owner=made)
    own = device.empty(shape, dtype)
    return own, own


def device_index(pointer: int) -> int:
    """Which GPU an address belongs to."""
    ordinal = ctypes.c_int(-1)
    status = driver_library().cuPointerGetAttribute(ctypes.byref(ordinal), _DEVICE_ORDINAL, ctypes.c_uint64(pointer))
    check_status(status, "cuPointerGetAttribute")
    return ordinal.value
