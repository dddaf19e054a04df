"""Arrays in the memory of a GPU, page-locked memory of the host, and the copies between them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, size_text
from .stream import Context, Stream

Array = npt.NDArray[Any]


class MemoryContext(Context):
    """A GPU's context with its memory: what allocates there and copies from and to it."""

    def empty(self, shape: Sequence[int] | int, dtype: npt.DTypeLike) -> DeviceArray:
        """Uninitialised device memory, C-contiguous; freed with its last view, or by ``free()``."""
        shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        kind = np.dtype(dtype)
        memory = DeviceMemory(self, max(1, prod(shape) * kind.itemsize))
        return DeviceArray(self, memory.pointer, shape, kind, owner=memory)

    def pinned(self, shape: Sequence[int] | int, dtype: npt.DTypeLike) -> Array:
        """Uninitialised page-locked host memory, which copies run through at full speed and without waiting.

        Freed with the last view.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        kind = np.dtype(dtype)
        size = prod(shape) * kind.itemsize
        raw: Array = np.asarray(PinnedMemory(self, max(1, size)))
        return raw[:size].view(kind).reshape(shape)

    def copy_in(self, target: DeviceArray, source: Array, stream: Stream) -> None:
        """Enqueues a copy to the device. Contiguous, as many bytes; a pinned ``source`` must stay as it is until done.

        From memory that is not pinned the copy may wait for the host.
        """
        _require_copyable(target, source)
        if target.nbytes:
            with self.activate():
                self.driver.memcpy_htod_async(target.pointer, source, stream.raw)

    def copy_out(self, target: Array, source: DeviceArray, stream: Stream) -> None:
        """Enqueues a copy to the host. Contiguous, as many bytes; read ``target`` after waiting for the stream."""
        _require_copyable(source, target)
        if source.nbytes:
            with self.activate():
                self.driver.memcpy_dtoh_async(target, source.pointer, stream.raw)

    def copy(self, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        """Enqueues a copy on the device. Contiguous, as many bytes, not overlapping."""
        _require_copyable(target, source)
        if target.nbytes:
            with self.activate():
                self.driver.memcpy_dtod_async(target.pointer, source.pointer, target.nbytes, stream.raw)

    def zero(self, array: DeviceArray, stream: Stream) -> None:
        """Enqueues setting all bytes of a contiguous array to 0."""
        _require_contiguous(array)
        if array.nbytes:
            with self.activate():
                self.driver.memset_d8_async(array.pointer, 0, array.nbytes, stream.raw)


def memory_behind(stream: Stream) -> MemoryContext:
    """The GPU, with its memory, on which a stream works."""
    return cast(MemoryContext, stream.device)  # streams are made by devices


class DeviceMemory:
    """One allocation on the device."""

    def __init__(self, device: Context, size: int) -> None:
        self._device = device
        self._allocation: Any = None
        with device.activate():
            self._allocation = device.driver.mem_alloc(size)
        self.pointer = int(self._allocation)

    def free(self) -> None:
        allocation, self._allocation = self._allocation, None
        if allocation is not None and not self._device.closed:
            with self._device.activate():  # whichever thread this is: PyCUDA frees in the current context only
                allocation.free()

    def __del__(self) -> None:
        self.free()


class PinnedMemory:
    """One page-locked allocation on the host, the base of the arrays that view it."""

    def __init__(self, device: Context, size: int) -> None:
        self._device = device
        self._memory: Any = None
        with device.activate():
            self._memory = device.driver.pagelocked_empty(size, np.uint8)
        self.__array_interface__ = self._memory.__array_interface__

    def __del__(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None and not self._device.closed:
            with self._device.activate():
                memory.base.free()


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
        device: MemoryContext,
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
        _require_contiguous(self)
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
        if isinstance(self._owner, DeviceMemory):
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


def _require_contiguous(array: DeviceArray | Array) -> None:
    if not (array.flags.c_contiguous if isinstance(array, np.ndarray) else array.contiguous):
        raise BackendError(
            f"an array of shape {array.shape} with strides {array.strides} is not contiguous; copy it first"
        )


def _require_copyable(a: DeviceArray | Array, b: DeviceArray | Array) -> None:
    _require_contiguous(a)
    _require_contiguous(b)
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
