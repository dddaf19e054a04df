"""The kernels as tests of NumPy arrays see them, run by the CUDA module: on a device, or their bodies on the host.

:class:`DeviceKernels` has the functions of :mod:`unet_rt.kernels`. Each argument is copied to the device with its
strides and its alignment, and what the call may write is copied back.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from unet_rt import kernels

WRITTEN = {"out", "total", "weight_total"}


def host_module() -> ModuleType:
    """``unet_rt._cuda_host``; the test is skipped where it was not built."""
    try:
        return importlib.import_module("unet_rt._cuda_host")
    except ModuleNotFoundError:
        pytest.skip("unet_rt._cuda_host is not built (UNET_RT_TEST_MODULES=ON)")


class HostMemory:
    """Host memory that poses as a device's."""

    def __init__(self, size: int) -> None:
        self._bytes = np.zeros(size, np.uint8)
        self.pointer = self._bytes.ctypes.data

    def write(self, start: int, data: NDArray[np.uint8]) -> None:
        self._bytes[start : start + data.size] = data

    def read(self, start: int, size: int) -> NDArray[np.uint8]:
        return self._bytes[start : start + size].copy()


class TorchMemory:
    """Memory of the CUDA device, from PyTorch."""

    def __init__(self, size: int) -> None:
        import torch

        self._bytes = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.pointer = self._bytes.data_ptr()

    def write(self, start: int, data: NDArray[np.uint8]) -> None:
        import torch

        self._bytes[start : start + data.size] = torch.from_numpy(data)

    def read(self, start: int, size: int) -> NDArray[np.uint8]:
        return self._bytes[start : start + size].cpu().numpy()


class DeviceArray:
    """A copy of a NumPy array: the same strides, and the same place within 16 bytes."""

    def __init__(self, memory: type[HostMemory] | type[TorchMemory], array: NDArray[Any]) -> None:
        self._host = array
        reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
        first = array.ctypes.data + sum(min(r, 0) for r in reach)
        self._size = sum(abs(r) for r in reach) + array.itemsize if array.size else 0
        self._memory = memory(self._size + 32)
        self._start = (first - self._memory.pointer) % 16
        self._hull = np.ctypeslib.as_array((ctypes.c_uint8 * self._size).from_address(first))
        self._memory.write(self._start, self._hull.copy())
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (self._memory.pointer + self._start + array.ctypes.data - first, not array.flags.writeable),
            "strides": array.strides,
            "stream": None,
        }

    def read_back(self) -> None:
        """Into the array that was copied, and the memory between its elements."""
        self._hull[:] = self._memory.read(self._start, self._size)


class DeviceKernels:
    """``unet_rt.kernels`` with NumPy arrays taken to a device and back; counts are read back, too.

    ``tables``: whether tables of coordinates go to the device as well.
    """

    def __init__(self, memory: type[HostMemory] | type[TorchMemory], tables: bool = False) -> None:
        self.memory, self.tables = memory, tables

    def put(self, array: NDArray[Any]) -> DeviceArray:
        return DeviceArray(self.memory, array)

    def _run(self, name: str, names: tuple[str, ...], counter: str | None, args: Any, options: dict[str, Any]) -> int:
        tables = ("starts", "source_start", "target_start", "size")
        moved = []
        for key, value in zip(names, args, strict=True):
            if key not in tables:
                moved.append(self.put(value))
            elif self.tables:
                moved.append(self.put(np.ascontiguousarray(value, np.int64).reshape(len(value), -1)))
            else:
                moved.append(value)
        count = np.array([5], np.uint64)
        if counter is not None:
            options = {**options, counter: self.put(count)}
        assert not getattr(kernels, name)(*moved, **options)
        for key, value in zip(names, moved, strict=True):
            if key in WRITTEN:
                value.read_back()
        if counter is not None:
            options[counter].read_back()
        return int(count[0]) - 5

    def tile_gather(self, *args: Any, **options: Any) -> int:
        return self._run("tile_gather", ("window", "starts", "out"), "non_finite", args, options)

    def tile_stitch(self, *args: Any, **options: Any) -> None:
        self._run("tile_stitch", ("tiles", "source_start", "target_start", "size", "out"), None, args, options)

    def tile_blend(self, *args: Any, **options: Any) -> None:
        names = ("tiles", "source_start", "target_start", "size", "weight", "total", "weight_total")
        self._run("tile_blend", names, None, args, options)

    def blend_finish(self, *args: Any, **options: Any) -> int:
        return self._run("blend_finish", ("total", "weight_total", "out"), "uncovered", args, options)

    def crop_concat(self, *args: Any, **options: Any) -> None:
        self._run("crop_concat", ("skip", "up", "out"), None, args, options)


@contextmanager
def device_kernels(place: str) -> Iterator[DeviceKernels]:
    """``bodies``: on the host, by ``_cuda_host``; ``device``: by ``_cuda``."""
    if place == "device":
        yield DeviceKernels(TorchMemory)
        return
    module = host_module()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_cuda", lambda: module)
        yield DeviceKernels(HostMemory)
