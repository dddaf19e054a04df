"""The kernels as tests of NumPy arrays see them, run by the CUDA module: on a device, or their bodies on the host.

:class:`DeviceKernels` has the functions of :mod:`unet_rt.kernels`. Each argument is copied to the device with its
strides and its alignment, and what the call may write is copied back.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import flat_kernels as kernels
import numpy as np
import ptx
import pytest
from numpy.typing import NDArray

from unet_rt.kernels import native

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


class WatchedMemory(HostMemory):
    """Host memory whose accesses by compiled kernels are watched: the bytes that an array holds, and no other."""

    watch: ClassVar[ptx.Memory]

    def write(self, start: int, data: NDArray[np.uint8]) -> None:
        super().write(start, data)
        region = self.watch.add(self.pointer + start, data.size)
        weakref.finalize(self, self.watch.regions.remove, region)


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


CSRC = Path(__file__).resolve().parents[2] / "csrc"


@cache
def compiled(source: str) -> dict[str, ptx.Kernel]:
    """The kernels of ``csrc/SOURCE.cu`` as nvcc compiles them, by the types of their bodies; skipped without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc on the path")
    options = ["-ptx", "-arch=compute_90", "-std=c++17", "-fmad=false", "-I", str(CSRC), "-o", "-"]  # as CMakeLists.txt
    made = subprocess.run([nvcc, *options, str(CSRC / f"{source}.cu")], capture_output=True, text=True, check=True)
    found = ptx.kernels_of(made.stdout)
    return {
        name.split("run<", 1)[1].rsplit(">(", 1)[0].rstrip(): k
        for name, k in zip(plain(*found), found.values(), strict=True)
    }


def plain(*names: str) -> list[str]:
    """Mangled names of C++ as it is written."""
    made = subprocess.run(["c++filt", "-t", *names], capture_output=True, text=True, check=True)
    return made.stdout.splitlines()


class Interpreter:
    """Takes the launches of ``_cuda_host`` and runs what nvcc made of the bodies instead."""

    def __init__(self, *sources: str) -> None:
        self.memory = ptx.Memory()
        self._kernels = {name: kernel for source in sources for name, kernel in compiled(source).items()}
        self._names: dict[str, str] = {}

    def __call__(self, body: str, grid: tuple[int, int, int], parameter: bytes) -> None:
        if body not in self._names:
            self._names[body] = plain(body)[0]
        # Fewer blocks along y than there are rows, as for the bodies: kernels must loop.
        blocks = (grid[0], min(grid[1], 3), grid[2])
        if 0 not in blocks:
            ptx.run(self._kernels[self._names[body]], ptx.Launch(blocks, 256, parameter), self.memory)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, launches of ``_cuda_host`` come here."""
        module = host_module()
        module.set_launcher(self)
        try:
            yield
        finally:
            module.set_launcher(None)


@contextmanager
def device_kernels(place: str) -> Iterator[DeviceKernels]:
    """``bodies``: on the host, by ``_cuda_host``; ``compiled``: what nvcc makes of them, interpreted; ``device``: by
    ``_cuda``.
    """
    if place == "device":
        yield DeviceKernels(TorchMemory)
        return
    module = host_module()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "cuda", lambda: module)
        if place == "bodies":
            yield DeviceKernels(HostMemory)
            return
        interpreter = Interpreter("tile_gather", "tile_stitch", "crop_concat")
        memory = type("Watched", (WatchedMemory,), {"watch": interpreter.memory})
        with interpreter.listening():
            yield DeviceKernels(memory)
