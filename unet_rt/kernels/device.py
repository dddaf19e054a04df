"""Memory, streams and events of an NVIDIA GPU, on PyCUDA: the one module that imports it.

The primary context of the device is used, which PyTorch, CuPy and ONNX Runtime share, so that memory and streams can be
handed back and forth. It is made current for the length of each call only; any thread may call. Streams do not wait for
the legacy default stream: order is what events say, and :meth:`Stream.after` and :meth:`Stream.before` for streams of
other libraries.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, size_text
from ..system import facts

Array = npt.NDArray[Any]

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which PyCUDA does not name
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_LEGACY_STREAM = 1  # CU_STREAM_LEGACY

_HOW = (
    "PyCUDA has no wheels: conda install -c conda-forge pycuda brings a binary; pip install pycuda needs the CUDA "
    "headers and a C++ compiler, and cuRAND unless ~/.aksetup-defaults.py says CUDA_ENABLE_CURAND = False"
)


class DeviceMemoryError(BackendError):
    """The device has not enough free memory."""


class TileMemoryError(DeviceMemoryError):
    """The device's memory does not hold ``batch`` tiles, and fewer were not tried or do not exist; nothing was run yet."""

    def __init__(self, message: str, batch: int) -> None:
        super().__init__(message)
        self.batch = batch


def missing(index: int = 0) -> str | None:
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


class Device:
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
        reason = missing(index)
        if reason is not None:
            raise BackendError(f"cuda:{index} cannot be used: {reason}")
        self._driver: Any = importlib.import_module("pycuda.driver")
        try:
            self._driver.init()
            device = self._driver.Device(index)
            self._context: Any = device.retain_primary_context()
            self.multiprocessors = int(device.get_attribute(self._driver.device_attribute.MULTIPROCESSOR_COUNT))
        except self._driver.MemoryError as error:
            raise DeviceMemoryError(
                f"cuda:{index} has no memory left for a process more ({str(error).strip()}); free what others hold"
            ) from error
        except self._driver.Error as error:
            raise BackendError(f"cuda:{index} cannot be opened: {error}; see unet-rt doctor") from error
        self.index = index
        self.name = str(device.name())
        self.compute_capability: tuple[int, int] = tuple(device.compute_capability())
        self.driver_version = facts.cuda().driver
        self.closed = False
        atexit.register(self._leave)

    @classmethod
    def open(cls, index: int = 0) -> Device:
        """The device, opened once per process.

        Raises:
            BackendError: It cannot be used (:func:`missing` says why).
        """
        with cls._opening:
            if index not in cls._opened:
                cls._opened[index] = cls(index)
            return cls._opened[index]

    def _leave(self) -> None:
        """At the interpreter's end: what is destroyed later is left to the driver."""
        self.closed = True
        self._context.detach()

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Makes the context current for this thread. Every call of this module does so itself."""
        self._context.push()
        try:
            yield
        except self._driver.MemoryError as error:
            raise DeviceMemoryError(
                f"cuda:{self.index} is out of memory ({str(error).strip()}); use a smaller --tile or --batch, or free what "
                "others hold"
            ) from error
        except self._driver.Error as error:
            raise BackendError(
                f"cuda:{self.index}: {error}; the device may have to be opened by a new process"
            ) from error
        finally:
            self._driver.Context.pop()

    def bear_captures(self) -> None:
        """Lets this thread wait for events while another one records a CUDA graph.

        Libraries record in the mode that forbids this to all threads (ONNX Runtime, PyTorch), and a thread that does it
        all the same spoils the recording.
        """
        mode = ctypes.c_int(_RELAXED)
        with self.activate():
            _check(
                _library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode"
            )

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        with self.activate():
            free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def synchronize(self) -> None:
        """Waits for everything on the device, in all streams of this process."""
        with self.activate():
            self._driver.Context.synchronize()

    def empty(self, shape: Sequence[int] | int, dtype: npt.DTypeLike) -> DeviceArray:
        """Uninitialised device memory, C-contiguous; freed with its last view, or by ``free()``."""
        shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        kind = np.dtype(dtype)
        memory = _Memory(self, max(1, prod(shape) * kind.itemsize))
        return DeviceArray(self, memory.pointer, shape, kind, owner=memory)

    def pinned(self, shape: Sequence[int] | int, dtype: npt.DTypeLike) -> Array:
        """Uninitialised page-locked host memory, which copies run through at full speed and without waiting.

        Freed with the last view.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        kind = np.dtype(dtype)
        size = prod(shape) * kind.itemsize
        raw: Array = np.asarray(_Pinned(self, max(1, size)))
        return raw[:size].view(kind).reshape(shape)

    def stream(self) -> Stream:
        return Stream(self)

    def event(self, timing: bool = False) -> Event:
        return Event(self, timing)

    def copy_in(self, target: DeviceArray, source: Array, stream: Stream) -> None:
        """Enqueues a copy to the device. Contiguous, as many bytes; a pinned ``source`` must stay as it is until done.

        From memory that is not pinned the copy may wait for the host.
        """
        _check_copy(target, source)
        if target.nbytes:
            with self.activate():
                self._driver.memcpy_htod_async(target.pointer, source, stream.raw)

    def copy_out(self, target: Array, source: DeviceArray, stream: Stream) -> None:
        """Enqueues a copy to the host. Contiguous, as many bytes; read ``target`` after waiting for the stream."""
        _check_copy(source, target)
        if source.nbytes:
            with self.activate():
                self._driver.memcpy_dtoh_async(target, source.pointer, stream.raw)

    def copy(self, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        """Enqueues a copy on the device. Contiguous, as many bytes, not overlapping."""
        _check_copy(target, source)
        if target.nbytes:
            with self.activate():
                self._driver.memcpy_dtod_async(target.pointer, source.pointer, target.nbytes, stream.raw)

    def zero(self, array: DeviceArray, stream: Stream) -> None:
        """Enqueues setting all bytes of a contiguous array to 0."""
        _check_contiguous(array)
        if array.nbytes:
            with self.activate():
                self._driver.memset_d8_async(array.pointer, 0, array.nbytes, stream.raw)

    def __repr__(self) -> str:
        return f"<cuda:{self.index} {self.name}>"


class _Memory:
    """One allocation on the device."""

    def __init__(self, device: Device, size: int) -> None:
        self._device = device
        self._allocation: Any = None
        with device.activate():
            self._allocation = device._driver.mem_alloc(size)
        self.pointer = int(self._allocation)

    def free(self) -> None:
        allocation, self._allocation = self._allocation, None
        if allocation is not None and not self._device.closed:
            with self._device.activate():  # whichever thread this is: PyCUDA frees in the current context only
                allocation.free()

    def __del__(self) -> None:
        self.free()


class _Pinned:
    """One page-locked allocation on the host, the base of the arrays that view it."""

    def __init__(self, device: Device, size: int) -> None:
        self._device = device
        self._memory: Any = None
        with device.activate():
            self._memory = device._driver.pagelocked_empty(size, np.uint8)
        self.__array_interface__ = self._memory.__array_interface__

    def __del__(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None and not self._device.closed:
            with self._device.activate():
                memory.base.free()


class Stream:
    """Work on the device in the order in which it is enqueued."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.raw: Any = None  # PyCUDA's
        with device.activate():
            self.raw = device._driver.Stream(_NON_BLOCKING)
        self.handle = int(self.raw.handle)

    def synchronize(self) -> None:
        """Waits until all that was enqueued is done; errors of that work are raised here."""
        with self.device.activate():
            self.raw.synchronize()

    def record(self, event: Event) -> None:
        """Marks this place in the stream."""
        with self.device.activate():
            event.raw.record(self.raw)

    def wait(self, event: Event) -> None:
        """What is enqueued from now on runs after the place that ``event`` marks now (at once if it was never recorded)."""
        with self.device.activate():
            self.raw.wait_for_event(event.raw)

    def after(self, handle: int) -> None:
        """What is enqueued here from now on runs after all that another library's stream (cudaStream_t) holds now."""
        _order(self.device, handle, self.handle)

    def before(self, handle: int) -> None:
        """What another library's stream gets from now on runs after all that is enqueued here now."""
        _order(self.device, self.handle, handle)

    def __del__(self) -> None:
        if self.raw is not None and not self.device.closed:
            with self.device.activate():
                self.raw = None


class Event:
    """A place in a stream."""

    def __init__(self, device: Device, timing: bool = False) -> None:
        self.device = device
        self.raw: Any = None
        flags = device._driver.event_flags
        # Waiting threads sleep: several may wait at once, and they share the cores with those that copy.
        how = flags.BLOCKING_SYNC if timing else flags.BLOCKING_SYNC | flags.DISABLE_TIMING
        with device.activate():
            self.raw = device._driver.Event(int(how))

    def synchronize(self) -> None:
        """Waits until the place is reached; returns at once if it was never recorded."""
        with self.device.activate():
            self.raw.synchronize()

    def done(self) -> bool:
        """Whether the place was reached."""
        with self.device.activate():
            return bool(self.raw.query())

    def seconds_since(self, start: Event) -> float:
        """Device time between two places that were reached; both events were made with ``timing``."""
        with self.device.activate():
            return float(self.raw.time_since(start.raw)) / 1e3

    def __del__(self) -> None:
        if self.raw is not None and not self.device.closed:
            with self.device.activate():
                self.raw = None


class DeviceArray:
    """An array on a device: shape, dtype and strides over memory there. Indexing and reshaping give views.

    PyTorch (``torch.as_tensor``), CuPy (``cupy.asarray``) and others take it without a copy, by
    ``__cuda_array_interface__``.

    Attributes:
        device: Where it lives.
        pointer: Address of its first element.
        shape, dtype, strides: As for NumPy; strides in bytes.
    """

    def __init__(
        self,
        device: Device,
        pointer: int,
        shape: Sequence[int],
        dtype: npt.DTypeLike,
        strides: Sequence[int] | None = None,
        owner: Any = None,
    ) -> None:
        self.device = device
        self.pointer = int(pointer)
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)
        self.strides = _c_strides(self.shape, self.dtype) if strides is None else tuple(int(s) for s in strides)
        self._owner = owner

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether it is C-contiguous."""
        wanted = _c_strides(self.shape, self.dtype)
        return not self.size or all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, wanted, strict=True))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer if self.size else 0, False),
            "strides": None if self.contiguous else self.strides,
            "stream": None,
            "version": 3,
        }

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> DeviceArray:
        """Integers, slices, ``None`` and ``...``, as NumPy's basic indexing."""
        index = index if isinstance(index, tuple) else (index,)
        if not any(part is Ellipsis for part in index):
            index = (*index, ...)  # a view in any case: a single element would be read, where there is none to read
        return self._like(_layout(self)[index])

    def reshape(self, *shape: int) -> DeviceArray:
        """A view of another shape of a contiguous array."""
        _check_contiguous(self)
        return self._like(_layout(self).reshape(shape))

    def transpose(self, *axes: int) -> DeviceArray:
        return self._like(_layout(self).transpose(axes or None))

    def view(self, dtype: npt.DTypeLike) -> DeviceArray:
        """The same bytes as another dtype of the same size."""
        if np.dtype(dtype).itemsize != self.dtype.itemsize:
            raise BackendError(
                f"a view of {self.dtype} as {np.dtype(dtype)} changes the size of elements; use the same"
            )
        return DeviceArray(self.device, self.pointer, self.shape, dtype, self.strides, self._owner)

    def repeat_first(self, count: int) -> DeviceArray:
        """The only entry of the first axis, ``count`` times, without copying."""
        return self._like(np.broadcast_to(_layout(self), (count, *self.shape[1:])))

    def to_host(self, stream: Stream | None = None) -> Array:
        """A copy on the host, after all that ``stream`` holds. Axes keep their order; strides are NumPy's."""
        stream = stream or self.device.stream()
        out = _fetch(self, stream)
        stream.synchronize()
        return np.ascontiguousarray(out)

    def free(self) -> None:
        """Frees the memory now, of all views. Views of memory that others own have nothing to free."""
        if isinstance(self._owner, _Memory):
            self._owner.free()

    def _like(self, view: Array) -> DeviceArray:
        # The layout's pointer is made up: only its distance from the start of this array counts.
        shift = view.__array_interface__["data"][0] - _BASE if view.size else 0
        return DeviceArray(self.device, self.pointer + shift, view.shape, self.dtype, view.strides, self._owner)

    def __repr__(self) -> str:
        return f"<DeviceArray {size_text(self.shape)} {self.dtype} on cuda:{self.device.index}>"


_BASE = 1 << 46  # where layouts pretend to lie; never read


class _Layout:
    """Shape and strides in the form that NumPy takes: its indexing is reused, its memory never touched."""

    def __init__(self, array: DeviceArray) -> None:
        self.__array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (_BASE, False),
            "strides": array.strides,
            "version": 3,
        }


def _layout(array: DeviceArray) -> Array:
    return np.asarray(_Layout(array))


def _c_strides(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    strides, step = [], dtype.itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _check_contiguous(array: DeviceArray | Array) -> None:
    if not (array.flags.c_contiguous if isinstance(array, np.ndarray) else array.contiguous):
        raise BackendError(
            f"an array of shape {array.shape} with strides {array.strides} is not contiguous; copy it first"
        )


def _check_copy(a: DeviceArray | Array, b: DeviceArray | Array) -> None:
    _check_contiguous(a)
    _check_contiguous(b)
    if a.nbytes != b.nbytes:
        raise BackendError(
            f"arrays of {a.nbytes} and {b.nbytes} bytes cannot be copied onto each other; sizes must agree"
        )


def _fetch(array: DeviceArray, stream: Stream) -> Array:
    """Enqueues copies of an array of any strides to the host; what comes back is filled when the stream is done.

    Memory is copied in whole stretches, gaps included where they are small.
    """
    if not array.size:
        return np.empty(array.shape, array.dtype)
    low = sum(min(0, (n - 1) * s) for n, s in zip(array.shape, array.strides, strict=True))
    high = sum(max(0, (n - 1) * s) for n, s in zip(array.shape, array.strides, strict=True)) + array.dtype.itemsize
    distinct = prod(n for n, s in zip(array.shape, array.strides, strict=True) if s) * array.dtype.itemsize
    if high - low <= 4 * distinct + 4096:
        hull = np.empty(high - low, np.uint8)
        source = DeviceArray(array.device, array.pointer + low, hull.shape, hull.dtype, owner=array._owner)
        array.device.copy_out(hull, source, stream)
        return np.ndarray(array.shape, array.dtype, hull.data, -low, array.strides)
    axis = max((k for k, n in enumerate(array.shape) if n > 1), key=lambda k: abs(array.strides[k]))
    parts = [array[(slice(None),) * axis + (k,)] for k in range(array.shape[axis])]
    out = np.empty(array.shape, array.dtype)
    fetched = [_fetch(part, stream) for part in parts]
    stream.synchronize()  # the parts are put together on the host
    for k, part in enumerate(fetched):
        out[(slice(None),) * axis + (k,)] = part
    return out


# --- arrays and streams of other libraries --------------------------------------------------------------------------


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


def empty_like(array: Any, shape: Sequence[int], dtype: npt.DTypeLike, device: Device) -> tuple[Any, DeviceArray]:
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
    status = _library().cuPointerGetAttribute(ctypes.byref(ordinal), _DEVICE_ORDINAL, ctypes.c_uint64(pointer))
    _check(status, "cuPointerGetAttribute")
    return ordinal.value


def _order(device: Device, first: int, then: int) -> None:
    """What stream ``then`` gets from now on runs after all that stream ``first`` holds now.

    The driver is called directly: PyCUDA has no streams that it has not made itself.
    """
    library, event = _library(), ctypes.c_void_p()
    with device.activate():
        _check(library.cuEventCreate(ctypes.byref(event), ctypes.c_uint(2)), "cuEventCreate")  # without timing
        try:
            _check(library.cuEventRecord(event, ctypes.c_void_p(first)), "cuEventRecord")
            _check(library.cuStreamWaitEvent(ctypes.c_void_p(then), event, ctypes.c_uint(0)), "cuStreamWaitEvent")
        finally:
            library.cuEventDestroy_v2(event)  # it lives until it is reached


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    _check(library.cuInit(ctypes.c_uint(0)), "cuInit")
    return library


def _check(status: int, call: str) -> None:
    if status:
        raise BackendError(f"the NVIDIA driver answers error {status} to {call}; see unet-rt doctor")
