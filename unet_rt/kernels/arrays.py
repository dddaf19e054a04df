"""Arrays as kernels take them: checked for dtype, shape and layout, on the host or a device."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BackendError, ContractError, ImageError, OutputError, TileError, size_text
from . import native
from .request import Operation, Placement, Size

# By their array-protocol names without byte order, which are quick to get: small calls matter.
_DTYPES = {
    "u1": "uint8",
    "u2": "uint16",
    "u4": "uint32",
    "i1": "int8",
    "i2": "int16",
    "i4": "int32",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "b1": "bool",
}
PIXELS = tuple(_DTYPES)
# As in csrc/array.h; the last two are those of tables and counters, which kernels know by their place.
_CODES = {"b1": 0, "u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f2": 6, "f4": 7, "f8": 8, "i8": 0, "u8": 0}
FLOATS = ("f4", "f2")
FARTHEST_PX = 1 << 48  # sums of coordinates stay far from overflow
SMALLEST, LARGEST = 2.0**-126, 3.4028234663852886e38  # normal float32 numbers
_DLPACK_ON_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


class _DeviceArray(NamedTuple):
    """What is known of an array on a CUDA device."""

    pointer: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    writeable: bool
    stream: int | None  # on which its contents are made
    owner: Any  # of the memory: the caller may have given the only reference to it away

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def description(self) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
        """As csrc/bind_cuda.h takes it."""
        return self.pointer, _CODES[self.dtype.str[1:]], self.shape, self.strides


_Array = NDArray[Any] | _DeviceArray


def kernel_arrays(**named: Any) -> tuple[Any, tuple[Any, ...]]:
    """The CUDA kernels if the arrays live on a device, else None; and the arrays in the form that kernels take."""
    arrays = tuple(None if array is None else _array(name, array) for name, array in named.items())
    found = {
        isinstance(array, _DeviceArray): name for name, array in zip(named, arrays, strict=True) if array is not None
    }
    if len(found) == 2:
        raise BackendError(
            f"{found[True]} lives on a CUDA device and {found[False]} on the host; move all arrays to one of them"
        )
    return (native.cuda() if True in found else None), arrays


def _array(name: str, array: Any) -> _Array:
    if isinstance(array, np.ndarray):
        return array
    view = _on_device(name, array)
    if view is not None:
        return view
    if not hasattr(array, "__dlpack__"):
        raise ImageError(f"{name} is {type(array).__name__}, not an array; pass a NumPy array or a DLPack tensor")
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise _not_shared(name, array, error) from error


def _not_shared(name: str, array: Any, error: Exception) -> ImageError:
    return ImageError(
        f"{name} ({type(array).__name__}) cannot be shared through DLPack or __cuda_array_interface__: {error}; pass a "
        "NumPy array, or a detached tensor of a type that NumPy knows"
    )


def _on_device(name: str, array: Any) -> _DeviceArray | None:
    """An array on a CUDA device; None if it lives elsewhere."""
    try:
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is not None:
            return _of_interface(name, array, interface)
        if hasattr(array, "__dlpack__") and array.__dlpack_device__()[0] in _DLPACK_ON_CUDA:
            return _of_dlpack(array)
    except (AttributeError, BufferError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _not_shared(name, array, error) from error
    return None


def _of_interface(name: str, array: Any, interface: dict[str, Any]) -> _DeviceArray:
    native.cuda()  # without kernels that is what is missing, whatever the array holds
    if interface.get("mask") is not None:
        raise ImageError(f"{name} ({type(array).__name__}) has a mask; pass an array without one")
    dtype = np.dtype(interface["typestr"])
    shape = tuple(operator.index(size) for size in interface["shape"])
    pointer, read_only = interface["data"]
    strides = interface.get("strides")
    if strides is None:
        strides = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return _DeviceArray(
        int(pointer or 0),
        dtype,
        shape,
        tuple(map(operator.index, strides)),
        not read_only,
        interface.get("stream"),
        array,
    )


def _of_dlpack(array: Any) -> _DeviceArray:
    # The capsule goes with this call; the memory is the array's.
    pointer, kind, size, shape, strides, read_only = native.cuda().dlpack_description(array.__dlpack__(stream=1))
    letter = {0: "i", 1: "u", 2: "f", 6: "b"}.get(kind)  # DLDataTypeCode
    if letter is None:
        raise ValueError(f"elements of DLPack type {kind}")
    return _DeviceArray(pointer, np.dtype(f"{letter}{size}"), shape, strides, not read_only, None, array)


def table_of(table: _Array) -> Any:
    """A table of coordinates as kernels take it: the array itself, or where it lies on a GPU."""
    return table if isinstance(table, np.ndarray) else table.description


def kernel_stream(stream: int, *arrays: _DeviceArray) -> int:
    """The stream to enqueue on: the one given, else the one on which the arrays are made."""
    if stream:
        return stream
    named = {array.stream for array in arrays if array.stream is not None}
    if len(named) > 1:
        raise BackendError(
            f"the arrays belong to different CUDA streams ({sorted(named)}); order them and pass stream="
        )
    return named.pop() if named else 0


def shape_text(array: _Array) -> str:
    """The shape of an array for people, e.g. ``3x512x512``."""
    return size_text(array.shape) or "scalar"


def check_dtype(name: str, array: _Array, allowed: tuple[str, ...]) -> None:
    """ImageError unless an array has one of the dtypes, in this machine's byte order."""
    dtype = array.dtype
    if not dtype.isnative:
        raise ImageError(
            f"{name} has dtype {dtype.str}, which is not this machine's byte order; "
            "convert it: array.astype(array.dtype.newbyteorder('='))"
        )
    if dtype.str[1:] not in allowed:
        raise ImageError(f"{name} has dtype {dtype}; convert it to one of {_names(allowed)}")


def check_writable(out: _Array, allowed: tuple[str, ...], name: str = "out") -> None:
    """OutputError unless an array has one of the dtypes and can be written."""
    dtype = out.dtype
    if not dtype.isnative or dtype.str[1:] not in allowed:
        raise OutputError(f"{name} has dtype {dtype.str}; allocate it as {_names(allowed)}")
    if not (out.flags.writeable if isinstance(out, np.ndarray) else out.writeable):
        raise OutputError(f"{name} ({shape_text(out)} {dtype}) is read-only; pass an array that can be written")


def _names(dtypes: tuple[str, ...]) -> str:
    return ", ".join(np.dtype(dtype).name for dtype in dtypes)


def check_counter(name: str, counter: _Array | None) -> None:
    """OutputError unless a counter, where there is one, is a single 64-bit integer that can be written."""
    if counter is None:
        return
    check_writable(counter, ("u8", "i8"), name)
    if counter.shape not in ((), (1,)):
        raise OutputError(f"{name} is {shape_text(counter)}; allocate it as (1,)")


def check_spatial(name: str, array: _Array, axes: int) -> None:
    """TileError unless an array has 1 to 3 spatial axes."""
    if not 1 <= axes <= 3:
        raise TileError(f"{name} is {shape_text(array)}, with {axes} spatial axes; kernels take 1, 2 or 3")


def check_tiles(tiles: _Array) -> int:
    """Number of spatial axes of tiles (N, K, *tile); errors for a dtype or shape that kernels do not take."""
    check_dtype("tiles", tiles, FLOATS)
    axes = tiles.ndim - 2
    check_spatial("tiles", tiles, axes)
    if tiles.shape[1] < 1:
        raise TileError(f"tiles are {shape_text(tiles)}, without a channel; pass (N, K, *tile) with K of at least 1")
    return axes


def target_shape(out: _Array, op: str, channels: int, axes: int) -> tuple[int, ...]:
    """The output's spatial shape."""
    check_writable(out, ("u1",) if op in ("argmax", "threshold") else ("f4",))
    lead = () if op == "argmax" else (channels,)
    if out.ndim != len(lead) + axes or out.shape[: len(lead)] != lead:
        form = "(*spatial)" if op == "argmax" else f"({channels}, *spatial)"
        raise TileError(f"out is {shape_text(out)}; {op} of {channels} channels and {axes} spatial axes needs {form}")
    return out.shape[len(lead) :]


def coordinates(name: str, value: Any, axes: int, gpu: Any) -> _Array:
    """A table (N, axes) of whole numbers as int64, on the host or as it lies on a GPU; TileError for another shape."""
    view = None if isinstance(value, np.ndarray | list | tuple) else _on_device(name, value)
    if view is not None:
        if gpu is None:
            raise BackendError(f"{name} lives on a CUDA device and the arrays on the host; pass a NumPy array")
        if view.shape[1:] != (axes,) or view.dtype != np.int64 or (view.strides != (8 * axes, 8) and view.shape[0] > 1):
            raise TileError(
                f"{name} is {shape_text(view)} {view.dtype}; on a device it must be (N, {axes}) int64, C-contiguous"
            )
        return view
    table = np.asarray(value)
    if table.ndim != 2 or table.shape[1] != axes:
        raise TileError(f"{name} is {shape_text(table)}; one row per tile and one column per spatial axis: (N, {axes})")
    if table.dtype.kind not in "iu" and table.size:
        raise TileError(f"{name} has dtype {table.dtype}; coordinates are whole numbers")
    return np.ascontiguousarray(table, np.int64)


def sizes_of(name: str, value: Size, axes: int) -> list[int]:
    """``axes`` whole numbers within 2^48, or TileError."""
    try:
        sizes = [operator.index(number) for number in value]
    except TypeError as error:
        raise TileError(f"{name} is {value!r}; {axes} spatial axes need {axes} whole numbers") from error
    if len(sizes) != axes or not all(abs(number) <= FARTHEST_PX for number in sizes):
        raise TileError(f"{name} is {sizes}; {axes} spatial axes need {axes} whole numbers within 2^48")
    return sizes


def placement_tables(
    placement: Placement, tiles: _Array, spatial: tuple[int, ...], gpu: Any
) -> tuple[_Array, _Array, _Array]:
    """The tables (source, target, size) of a placement as kernels take them, checked against tiles and output."""
    axes = len(spatial)
    source = coordinates("source", placement.source, axes, gpu)
    target = coordinates("target", placement.target, axes, gpu)
    extent = coordinates("size", placement.size, axes, gpu)
    count = tiles.shape[0]
    if not source.shape[0] == target.shape[0] == extent.shape[0] == count:
        raise TileError(
            f"{count} tiles, but {source.shape[0]} source, {target.shape[0]} target and {extent.shape[0]} "
            "size; one row per tile"
        )
    if isinstance(source, _DeviceArray) and isinstance(target, _DeviceArray) and isinstance(extent, _DeviceArray):
        return source, target, extent
    if isinstance(source, _DeviceArray) or isinstance(target, _DeviceArray) or isinstance(extent, _DeviceArray):
        raise BackendError("source, target and size of a placement live partly on a CUDA device; pass all three alike")
    for name, start, whole in (("tile", source, tiles.shape[2:]), ("output", target, spatial)):
        outside = (start < 0) | (extent < 0) | (start > np.subtract(whole, extent))  # no sum that could overflow
        if outside.any():
            n = int(outside.any(axis=1).argmax())
            raise TileError(
                f"tile {n}: {extent[n].tolist()} samples at {start[n].tolist()} leave the {name} of {list(whole)}; "
                "parts must lie inside"
            )
    return source, target, extent


def label_arguments(operation: Operation, channels: int) -> tuple[list[float], list[int]]:
    """Thresholds (K,) and label values as the kernels take them; empty where the operation has none."""
    op, threshold, values = operation.op, operation.threshold, operation.values
    if op != "threshold" and threshold is not None:
        raise ContractError(f"threshold {threshold} given for op {op!r}, which has none; leave it out")
    if op not in ("argmax", "threshold"):
        if values is not None:
            raise ContractError(f"values given for op {op!r}, which writes no labels; leave them out")
        return [], []
    bounds: list[float] = []
    count = 2
    if op == "threshold":
        if threshold is None:
            raise ContractError("op 'threshold' without a threshold; give one number, or one per channel")
        bounds = per_channel("threshold", threshold, channels)
    else:
        count = channels
        if channels > 256:
            raise ContractError(f"argmax over {channels} channels does not fit uint8; at most 256 classes do")
    if values is None:
        return bounds, list(range(count))
    table = np.asarray(values)
    labels: list[int] = table.tolist() if table.ndim == 1 and table.dtype.kind in "iu" else []
    if len(labels) != count or not all(0 <= label <= 255 for label in labels):
        raise ContractError(f"values {values!r}: op {op!r} needs {count} whole numbers from 0 to 255")
    return bounds, labels


def per_channel(name: str, value: ArrayLike, channels: int) -> list[float]:
    """A number per channel: ``value`` itself, or the one number repeated; ContractError for another shape."""
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iufb" or numbers.shape not in ((), (1,), (channels,)):
        raise ContractError(f"{name} is {value!r}; give one number, or one per channel ({channels})")
    listed = [float(number) for number in numbers.ravel().tolist()]
    return listed if len(listed) == channels else listed * channels


def code_of(name: str, value: str, table: dict[str, int], error: type[Exception]) -> int:
    """The number by which kernels know a word; ``error`` for an unknown one."""
    if value not in table:
        raise error(f"{name} {value!r} is unknown; choose one of {', '.join(table)}")
    return table[value]


def kernel_threads(threads: int) -> int:
    """Threads for a call: what is asked, or for 0 the default of this machine."""
    if threads < 0:
        raise BackendError(f"threads is {threads}; give 0 for this machine's default, or a positive number")
    return threads or native.default_threads()
