"""A TensorRT that doubles its input, on a GPU that is host memory: what sessions do with a library, seen without either.

Pointers are real addresses, so that a run on the wrong array, or the replay of a recording whose arrays are gone, shows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np

Shape = tuple[int, ...]


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class LayerInformationFormat(Enum):
    JSON = 1


class ILogger:
    ERROR = 1


class FakeArray:
    def __init__(self, shape: Shape, dtype: Any) -> None:
        self.host = np.empty(shape, dtype)
        self.shape, self.dtype, self.nbytes = self.host.shape, self.host.dtype, self.host.nbytes
        self.pointer = self.host.ctypes.data
        self.freed = False

    def free(self) -> None:
        self.freed = True


class FakeDevice:
    """The parts of :class:`unet_rt.kernels.device.Device` that sessions use; ``allocated`` counts the arrays ever made."""

    def __init__(self) -> None:
        self.name, self.compute_capability, self.driver_version = "Fake GPU", (9, 0), "13.0"
        self.free_bytes, self.allocated, self.active = 1 << 30, 0, 0
        self.arrays: list[FakeArray] = []

    @contextmanager
    def activate(self) -> Iterator[None]:
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def memory(self) -> tuple[int, int]:
        return self.free_bytes, 1 << 31

    def empty(self, shape: Shape, dtype: Any) -> FakeArray:
        self.allocated += 1
        self.arrays.append(FakeArray(shape, dtype))
        return self.arrays[-1]

    def pinned(self, shape: Shape, dtype: Any) -> np.ndarray[Any, Any]:
        return np.empty(shape, dtype)

    def stream(self) -> Any:
        return SimpleNamespace(handle=77, synchronize=lambda: None)

    def copy_in(self, target: FakeArray, source: np.ndarray[Any, Any], stream: Any) -> None:
        assert target.dtype == source.dtype
        target.host[...] = source

    def copy_out(self, target: np.ndarray[Any, Any], source: FakeArray, stream: Any) -> None:
        target[...] = source.host

    def zero(self, array: FakeArray, stream: Any) -> None:
        array.host[...] = 0


class FakeGraphs:
    """The CUDA graphs of ``_cuda``: what is launched between begin and end is kept, not run."""

    def __init__(self) -> None:
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launches = 0

    def graph_begin(self, stream: int) -> None:
        assert self.recording is None
        self.recording = []

    def graph_end(self, stream: int) -> int:
        assert self.recording is not None
        handle = 100 + len(self.graphs) + self.launches
        self.graphs[handle], self.recording = self.recording, None
        return handle

    def graph_launch(self, handle: int, stream: int) -> None:
        self.launches += 1
        for step in self.graphs[handle]:
            step()

    def graph_destroy(self, handle: int) -> None:
        del self.graphs[handle]


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.shape, self.addresses, self.scratch, self.profile = engine, (), {}, 0, 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return 0 <= index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self.shape = tuple(shape)
        return True

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert size >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        self.scratch = pointer

    def get_tensor_shape(self, name: str) -> Shape:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.scratch, "no scratch memory was set"
        if self.engine.library.fails:
            return False
        self.engine.library.runs += 1
        dtype, shape, addresses = self.engine.dtype, self.shape, dict(self.addresses)
        wrong = self.engine.library.wrong_rows

        def step() -> None:
            x, y = (_view(addresses[name], shape, dtype) for name in ("x", "y"))
            y[...] = 2 * x
            if wrong:
                y[len(y) // 2 :] += 1

        graphs = self.engine.library.graphs
        if graphs.recording is not None:
            graphs.recording.append(step)
        else:
            step()
        return True


def _view(address: int, shape: Shape, dtype: Any) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, library: FakeTensorRt) -> None:
        self.library, self.dtype = library, library.dtype
        self.num_optimization_profiles = library.profiles

    def get_tensor_name(self, index: int) -> str:
        return "yx"[index]  # an order of its own

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name={"float16": "HALF", "float32": "FLOAT"}[np.dtype(self.dtype).name])

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 4096 // (index + 1)  # the largest profile comes first

    def create_execution_context(self, strategy: Any) -> FakeContext:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.library.contexts += 1
        return FakeContext(self)

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: self.library.description)


class FakeTensorRt:
    """The module ``tensorrt``, as far as sessions use it."""

    __name__, __version__ = "tensorrt", "11.4.0"
    ILogger, LayerInformationFormat = ILogger, LayerInformationFormat
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def __init__(self, profiles: int = 1, dtype: Any = np.float32) -> None:
        self.profiles, self.dtype, self.graphs = profiles, dtype, FakeGraphs()
        self.runs = self.contexts = 0
        self.fails = self.wrong_rows = False
        self.description = '{"Layers": []}'

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: FakeEngine(self) if plan == b"plan" else None)
