"""A device made of host memory, for tests of what runs on a GPU: nothing is done before something demands it.

Work of a stream is kept until that stream is waited for, or until another stream's work, once demanded, waits for an
event in it. Streams named in ``eager`` do their work at once instead. So a missing wait shows as a wrong result: with
lazy producers consumers find old contents, with eager producers contents are overwritten before they are used.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from unet_rt.engine.engine import Engine
from unet_rt.errors import DeviceMemoryError
from unet_rt.kernels import calls as kernels
from unet_rt.kernels import native
from unet_rt.kernels.memory import DeviceArray, DeviceMemory
from unet_rt.kernels.request import Operation, Placement

Array = np.ndarray[Any, np.dtype[Any]]
LOCK = threading.RLock()


class HostMemory(DeviceMemory):
    """Host memory that poses as the device's; filled with 0xA5, so that nothing relies on zeros."""

    def __init__(self, device: HostDevice, size: int) -> None:
        self._host = device
        self._bytes: Array | None = np.full(size + 64, 0xA5, np.uint8)
        address = self._bytes.__array_interface__["data"][0]
        self.pointer = -(-address // 64) * 64
        device.held += size
        device.most = max(device.most, device.held)
        self._size = size

    def free(self) -> None:
        if self._bytes is not None:
            self._host.held -= self._size
            self._bytes[:] = 0x5A
            self._bytes = None


class HostDevice:
    """As :class:`unet_rt.kernels.device.Device`. ``eager``: which of its streams, by ordinal, work at once."""

    def __init__(self, index: int = 0, eager: Sequence[int] = ()) -> None:
        self.index, self.name, self.closed = index, "host", False
        self.held = self.most = 0  # bytes now, and at most
        self.limit = 2**34
        self.eager = set(eager)
        self.streams: dict[int, HostStream] = {}

    @contextmanager
    def activate(self) -> Iterator[None]:
        yield

    def bear_captures(self) -> None:
        pass

    def memory(self) -> tuple[int, int]:
        return max(0, self.limit - self.held), self.limit

    def empty(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        if self.held + prod(shape) * np.dtype(dtype).itemsize > self.limit:
            raise DeviceMemoryError("the device is out of memory")
        memory = HostMemory(self, max(1, prod(shape) * np.dtype(dtype).itemsize))
        return DeviceArray(self, memory.pointer, shape, dtype, owner=memory)  # type: ignore[arg-type]

    def pinned(self, shape: Sequence[int], dtype: Any) -> Array:
        return np.full(prod(shape) * np.dtype(dtype).itemsize, 0xC3, np.uint8).view(dtype).reshape(shape)

    def stream(self) -> HostStream:
        return HostStream(self)

    def event(self, timing: bool = False) -> HostEvent:
        return HostEvent()

    def copy_in(self, target: DeviceArray, source: Array, stream: HostStream) -> None:
        assert target.contiguous
        assert source.flags.c_contiguous
        assert target.nbytes == source.nbytes
        stream.enqueue(lambda: np.copyto(raw(target), source.reshape(-1).view(np.uint8)))

    def copy_out(self, target: Array, source: DeviceArray, stream: HostStream) -> None:
        assert source.contiguous
        assert target.flags.c_contiguous
        assert target.nbytes == source.nbytes
        stream.enqueue(lambda: np.copyto(target.reshape(-1).view(np.uint8), raw(source)))

    def copy(self, target: DeviceArray, source: DeviceArray, stream: HostStream) -> None:
        assert target.contiguous
        assert source.contiguous
        stream.enqueue(lambda: np.copyto(raw(target), raw(source)))

    def zero(self, array: DeviceArray, stream: HostStream) -> None:
        assert array.contiguous
        stream.enqueue(lambda: raw(array).fill(0))


class HostStream:
    handles = itertools.count(1000)

    def __init__(self, device: HostDevice) -> None:
        self.device, self.handle = device, next(HostStream.handles)
        self.eager = len(device.streams) in device.eager
        device.streams[self.handle] = self
        self._work: list[Callable[[], None] | None] = []
        self._next = 0

    def enqueue(self, work: Callable[[], None]) -> None:
        with LOCK:
            self._work.append(work)
            if self.eager:
                self.run_to(len(self._work))

    def run_to(self, place: int) -> None:
        with LOCK:
            while self._next < place:
                work, self._work[self._next] = self._work[self._next], None
                self._next += 1
                assert work is not None
                work()

    def synchronize(self) -> None:
        with LOCK:
            self.run_to(len(self._work))

    def record(self, event: HostEvent) -> None:
        with LOCK:
            event.place = (self, len(self._work))

    def wait(self, event: HostEvent) -> None:
        with LOCK:
            if event.place is not None:
                stream, place = event.place
                self.enqueue(lambda: stream.run_to(place))

    def after(self, handle: int) -> None:
        with LOCK:
            other = self.device.streams[handle]
            place = len(other._work)
            self.enqueue(lambda: other.run_to(place))

    def before(self, handle: int) -> None:
        self.device.streams[handle].after(self.handle)


class HostEvent:
    def __init__(self) -> None:
        self.place: tuple[HostStream, int] | None = None

    def synchronize(self) -> None:
        if self.place is not None:
            self.place[0].run_to(self.place[1])

    def done(self) -> bool:
        return self.place is None or self.place[0]._next >= self.place[1]

    def seconds_since(self, start: HostEvent) -> float:
        assert self.done()
        assert start.done()
        return 1e-6


def host(array: DeviceArray) -> Array:
    """The memory of a device array as NumPy sees it."""

    class View:
        __array_interface__ = {  # noqa: RUF012
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.pointer, False),
            "strides": array.strides,
            "version": 3,
        }

    return np.asarray(View())


def raw(array: DeviceArray) -> Array:
    return host(array.reshape(array.size)).view(np.uint8)


def by_value(argument: Any) -> Any:
    """An argument of a kernel as it is when the kernel is enqueued: tables travel by value."""
    if isinstance(argument, Placement):
        return Placement(argument.source.copy(), argument.target.copy(), argument.size.copy())
    return argument if isinstance(argument, (DeviceArray, Operation)) else np.array(argument)


def use_host_kernels(monkeypatch: pytest.MonkeyPatch, device: HostDevice) -> None:
    """Lets the pipeline on a GPU enqueue kernels that run on the host: the CUDA kernels' bodies where the test module that
    runs them was built, else the CPU's.
    """
    try:
        cuda_host = importlib.import_module("unet_rt._cuda_host")
    except ImportError:
        cuda_host = None
    else:
        monkeypatch.setattr(native, "cuda", lambda: cuda_host)

    def enqueued(name: str, counter: str) -> Callable[..., int]:
        function = getattr(kernels, name)

        def call(*arrays: Any, stream: int, **options: Any) -> int:
            arrays = tuple(by_value(a) for a in arrays)

            def cuda() -> None:
                assert function(*arrays, stream=stream, **options) == 0 or name in ("tile_stitch", "tile_blend")

            def cpu() -> None:
                count = options.pop(counter, None)
                found = function(*(host(a) if isinstance(a, DeviceArray) else a for a in arrays), threads=1, **options)
                if count is not None:
                    host(count)[...] += np.uint64(found)

            device.streams[stream].enqueue(cpu if cuda_host is None else cuda)
            return 0

        return call

    counters = {"tile_gather": "non_finite", "tile_stitch": "", "tile_blend": "", "blend_finish": "uncovered"}
    enqueuing = SimpleNamespace(**{name: enqueued(name, counter) for name, counter in counters.items()})
    for module in ("device", "totals"):
        monkeypatch.setattr(f"unet_rt.prediction.{module}.calls", enqueuing)


class HostSession:
    """A session on the CPU that poses as one on a :class:`HostDevice`.

    ``dtype`` is that of its tiles there; ``bytes_per_px`` the device's memory that a shape takes, until given back.
    """

    version = "host 0"

    def __init__(self, engine: Engine, device: HostDevice, dtype: Any = np.float32, bytes_per_px: int = 0) -> None:
        self._session: Any = engine._session
        self._device, self._bytes_per_px = device, bytes_per_px
        self._arenas = dict[Any, DeviceArray]()
        self.stream = device.stream()
        self._ports = len(engine.spec.inputs), len(engine.spec.outputs)
        self._dtype, self._shapes = np.dtype(dtype), dict[Any, list[tuple[int, ...]]]()
        self._at_close: list[Callable[[], None]] = []
        self.runs: list[tuple[tuple[int, ...], ...]] = []  # input shapes
        self.fail_at = -1  # which run raises
        self.failure: Exception = RuntimeError("the device is lost")

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        return (self._dtype,) * self._ports[0]

    @property
    def output_dtypes(self) -> tuple[np.dtype[Any], ...]:
        return (self._dtype,) * self._ports[1]

    def output_shapes(self, input_shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        key = tuple(map(tuple, input_shapes))
        self._take(key)
        if key not in self._shapes:
            self._shapes[key] = [y.shape for y in self._session.run([np.zeros(s, np.float32) for s in key])]
        return self._shapes[key]

    def _take(self, key: tuple[tuple[int, ...], ...]) -> None:
        if self._bytes_per_px and key not in self._arenas:
            self._arenas[key] = self._device.empty((self._bytes_per_px * sum(map(prod, key)),), np.uint8)

    @property
    def held_bytes(self) -> int:
        return sum(array.nbytes for array in self._arenas.values())

    def give_back(self) -> None:
        while self._arenas:
            self._arenas.popitem()[1].free()

    def run_device(self, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> None:
        if len(self.runs) == self.fail_at:
            raise self.failure
        self.runs.append(tuple(x.shape for x in inputs))
        assert all(a.contiguous for a in (*inputs, *outputs))

        def work() -> None:
            results = self._session.run([host(x).astype(np.float32) for x in inputs])
            for target, result in zip(outputs, results, strict=True):
                host(target)[...] = result

        self.stream.enqueue(work)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """As the device computes: tiles and results rounded to its dtype."""
        self._take(tuple(np.shape(x) for x in inputs))
        rounded = [np.asarray(x).astype(self._dtype).astype(np.float32) for x in inputs]
        return [y.astype(self._dtype).astype(np.float32) for y in self._session.run(rounded)]

    def at_close(self, release: Callable[[], None]) -> None:
        self._at_close.append(release)

    def close(self) -> None:
        while self._at_close:
            self._at_close.pop()()
        self.give_back()
