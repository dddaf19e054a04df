"""The pixel work of the image line: tiles out of images, network outputs to their places.

Each function fills arrays that the caller owns, checks its arguments once, and runs compiled code without the
interpreter lock, on the device where the arrays live. Arrays are NumPy arrays, or anything that speaks DLPack or
``__cuda_array_interface__`` (PyTorch, CuPy, PyCUDA, ...), of any strides. The results are the same bits for every tile,
thread count, alignment and machine, on a GPU, too (but for the payload of NaN).

``threads=0`` means :func:`default_threads`; small calls use one thread.

Where one array lives on a CUDA device, all do, except tables of coordinates. Kernels are then enqueued on ``stream``, a
CUDA stream's number (0: the stream that the arrays name, else the legacy default stream), and may run after the call
has returned: nothing is allocated, copied or waited for. Tables of coordinates from the host are checked and travel in
the launch; int64 arrays (N, D) on the device are read when the kernel runs, so a captured graph can be launched with new
contents. Nobody can check those: a gathered pixel that the window does not hold becomes the nearest that it does, and a
part that leaves its tile or the output is left out.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import BackendError, ContractError, ImageError, OutputError, TileError, size_text

if TYPE_CHECKING:
    from types import ModuleType


Border = Literal["mirror", "edge", "constant"]
Op = Literal["copy", "softmax", "sigmoid", "argmax", "threshold"]
Size = Sequence[int]

_BORDERS = {"mirror": 0, "edge": 1, "constant": 2}  # as in csrc/geometry.h
_OPS = {"copy": 0, "softmax": 1, "sigmoid": 2, "argmax": 3, "threshold": 4}  # as in csrc/tile_stitch.h
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
_PIXELS = tuple(_DTYPES)
# As in csrc/array.h; the last two are those of tables and counters, which kernels know by their place.
_CODES = {"b1": 0, "u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f2": 6, "f4": 7, "f8": 8, "i8": 0, "u8": 0}
_FLOATS = ("f4", "f2")
_FARTHEST_PX = 1 << 48  # sums of coordinates stay far from overflow
_SMALLEST, _LARGEST = 2.0**-126, 3.4028234663852886e38  # normal float32 numbers
_DLPACK_ON_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


@functools.cache  # reading the cgroup's files takes longer than gathering a small tile
def default_threads() -> int:
    """Threads that this process may use: affinity and cgroup quota, as found at the first call."""
    from .system import limits as machine

    return machine.threads()


def cuda_status() -> str:
    """``"built"``, or the reason why this installation has no CUDA kernels."""
    return str(_cpu().build_info["cuda"])


def tile_gather(
    window: Any,
    starts: ArrayLike,
    out: Any,
    *,
    image_shape: Size | None = None,
    window_start: Size | None = None,
    border: Border = "mirror",
    constant: float = 0.0,
    offset: ArrayLike | None = None,
    divisor: ArrayLike | None = None,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    threads: int = 0,
    stream: int = 0,
    non_finite: Any = None,
) -> int:
    """Cut tiles out of a window of an image, with border rule and normalisation.

    A value is ``(min(max(x, clip[0]), clip[1]) - offset[c]) / divisor[c]``, computed in float32 (from int32, uint32 and
    float64 pixels in float64 and rounded to float32 once), with true division. NaN passes the clip.

    Args:
        window: (C, \\*spatial) pixels of integers up to 32 bits, floats or bools; one to three spatial axes.
        starts: (N, D) integer tile origins in image pixels; tiles may reach beyond the image, on any side.
        out: (N, C, \\*tile) float32 or float16, filled.
        image_shape: Pixels of the whole image; the border rule applies at its edges. Default: the window's.
        window_start: Image pixel of the window's first pixel. Default: 0.
        border: ``mirror`` (NumPy's ``reflect``, repeated as needed), ``edge`` or ``constant``.
        constant: Raw pixel value of the constant border; it is normalised like every pixel.
        offset: Number or (C,) numbers to subtract.
        divisor: Number or (C,) numbers to divide by; not 0.
        clip: Lowest and highest raw value, numbers or (C,).
        threads: Most threads to use.
        stream: CUDA stream, for arrays on a device.
        non_finite: (1,) uint64 or int64 on the arrays' device, to which the number of NaN and infinite pixels is added.

    Returns:
        How many NaN and infinite pixels were read. A pixel counts as often as the tiles hold it. For arrays on a device
        0: the number is in ``non_finite`` once the kernel has run.

    Raises:
        ImageError: The window's dtype cannot be gathered.
        TileError: Shapes do not fit, or a tile needs pixels that the window does not hold.
        ContractError: A normalisation that cannot be applied.
    """
    native, (window, out, counter) = _arrays(window=window, out=out, non_finite=non_finite)
    _check_dtype("window", window, _PIXELS)
    axes = window.ndim - 1
    _check_spatial("window", window, axes)
    channels = window.shape[0]
    begin = _table("starts", starts, axes, native)
    if isinstance(begin, np.ndarray) and begin.size and (begin.min() < -_FARTHEST_PX or begin.max() > _FARTHEST_PX):
        raise TileError(f"starts reach from {begin.min()} to {begin.max()} px; they must stay within 2^48")
    _check_output(out, _FLOATS)
    _check_counter("non_finite", counter)
    tiles = begin.shape[0]
    if out.ndim != axes + 2 or out.shape[:2] != (tiles, channels):
        raise TileError(
            f"out is {_shape(out)}, but {tiles} tiles of {channels} channels and {axes} spatial axes need "
            f"({tiles}, {channels}, ...); allocate it so"
        )
    held = list(window.shape[1:])
    image = held if image_shape is None else _sizes("image_shape", image_shape, axes)
    first = [0] * axes if window_start is None else _sizes("window_start", window_start, axes)
    if channels < 1 or min(held) < 1:
        raise TileError(f"window is {_shape(window)} and holds no pixel to gather from")
    if any(not 0 <= f <= size - h for f, h, size in zip(first, held, image, strict=True)):
        raise TileError(
            f"the window of {held} px at {first} is not inside the image of {image} px; "
            "windows hold pixels of the image only, the border rule adds the rest"
        )
    low, high = (-math.inf, math.inf) if clip is None else clip
    lows = _per_channel("clip[0]", low, channels)
    highs = _per_channel("clip[1]", high, channels)
    if not all(a <= b for a, b in zip(lows, highs, strict=True)):
        raise ContractError(f"clip {clip} has a lower bound above its upper bound, or NaN; give (lowest, highest)")
    offsets = _per_channel("offset", 0.0 if offset is None else offset, channels)
    divisors = _per_channel("divisor", 1.0 if divisor is None else divisor, channels)
    if not all(abs(value) <= _LARGEST for value in offsets):
        raise ContractError(f"offset {offsets} does not normalise; give finite float32 numbers")
    if not all(_SMALLEST <= abs(value) <= _LARGEST for value in divisors):
        raise ContractError(
            f"divisor {divisors} does not normalise; give float32 numbers that are neither 0 nor subnormal nor "
            "infinite (1 for a constant channel)"
        )
    rule = _choice("border", border, _BORDERS, TileError)
    affine = not (offset is None and divisor is None and clip is None)
    normalisation = (affine, offsets, divisors, lows, highs)
    if native is not None:
        native.tile_gather(
            *(window.description, _described(begin), out.description, image, first, rule, float(constant)),
            *normalisation,
            0 if counter is None else counter.pointer,
            _stream(stream, window, out),
        )
        return 0
    found: int = _cpu().tile_gather(
        *(window, begin, out, image, first, rule, float(constant)), *normalisation, _threads(threads)
    )
    if counter is not None:
        counter += found
    return found


def tile_stitch(
    tiles: Any,
    source_start: ArrayLike,
    target_start: ArrayLike,
    size: ArrayLike,
    out: Any,
    *,
    op: Op = "copy",
    threshold: ArrayLike | None = None,
    values: ArrayLike | None = None,
    threads: int = 0,
    stream: int = 0,
) -> None:
    """Put parts of tiles to their places: ``out[target + j] = op(tiles[n, source + j])`` for ``j < size``.

    Args:
        tiles: (N, K, \\*tile) float32 or float16 network outputs.
        source_start: (N, D) first sample of each tile that is kept.
        target_start: (N, D) its place in ``out``. Targets of one call must not overlap.
        size: (N, D) samples kept.
        out: ``copy``, ``softmax`` (over K), ``sigmoid``: (K, \\*spatial) float32. ``argmax``: (\\*spatial) uint8.
            ``threshold``: (K, \\*spatial) uint8.
        op: What is done to the K values of a sample, in float32. ``argmax`` takes the first maximum, or the first NaN.
        threshold: Number or (K,); met by raw values above it (0 for logits means probability 0.5), never by NaN.
        values: uint8 value of each class, (K,), default 0, 1, ...; for ``threshold`` (below, above), default (0, 1).
        threads: Most threads to use.
        stream: CUDA stream, for arrays on a device.

    Raises:
        TileError: Shapes do not fit, or a part lies outside its tile or the output.
        ContractError: An operation whose threshold, values or number of channels is missing or impossible.
    """
    native, (tiles, out) = _arrays(tiles=tiles, out=out)
    axes = _check_tiles(tiles)
    channels = tiles.shape[1]
    code = _choice("op", op, _OPS, ContractError)
    spatial = _check_target(out, op, channels, axes)
    tables = _parts(source_start, target_start, size, tiles, spatial, native)
    bounds, labels = _labels(op, channels, threshold, values)
    if native is not None:
        queue = _stream(stream, tiles, out)
        native.tile_stitch(tiles.description, *map(_described, tables), out.description, code, bounds, labels, queue)
    else:
        _cpu().tile_stitch(tiles, *tables, out, code, bounds, labels, _threads(threads))


def tile_blend(
    tiles: Any,
    source_start: ArrayLike,
    target_start: ArrayLike,
    size: ArrayLike,
    weight: Any,
    total: Any,
    weight_total: Any,
    *,
    threads: int = 0,
    stream: int = 0,
) -> None:
    """Add weighted tiles to a total: ``total += weight * tile``, ``weight_total += weight``, tile after tile.

    Targets may overlap; every sample adds its tiles in order, in float32, whatever the number of threads.

    Args:
        tiles: (N, K, \\*tile) float32 or float16 network outputs.
        source_start: (N, D) first sample of each tile that is used.
        target_start: (N, D) its place in ``total``.
        size: (N, D) samples used.
        weight: (\\*tile) float32.
        total: (K, \\*spatial) float32, added to.
        weight_total: (\\*spatial) float32, added to.
        threads: Most threads to use.
        stream: CUDA stream, for arrays on a device.

    Raises:
        TileError: Shapes do not fit, or a part lies outside its tile or the total.
    """
    native, (tiles, weight, total, weight_total) = _arrays(
        tiles=tiles, weight=weight, total=total, weight_total=weight_total
    )
    axes = _check_tiles(tiles)
    _check_dtype("weight", weight, ("f4",))
    if weight.shape != tiles.shape[2:]:
        raise TileError(f"weight is {_shape(weight)}, tiles are {_shape(tiles)}; a weight has the tile's spatial shape")
    _check_output(total, ("f4",), "total")
    _check_output(weight_total, ("f4",), "weight_total")
    if total.ndim != axes + 1 or total.shape != (tiles.shape[1], *weight_total.shape):
        raise TileError(
            f"total is {_shape(total)} and weight_total {_shape(weight_total)}; {tiles.shape[1]} channels need "
            f"(K, *spatial) and (*spatial)"
        )
    tables = _parts(source_start, target_start, size, tiles, weight_total.shape, native)
    if native is not None:
        queue = _stream(stream, tiles, weight, total, weight_total)
        sums = (weight.description, total.description, weight_total.description)
        native.tile_blend(tiles.description, *map(_described, tables), *sums, queue)
    else:
        _cpu().tile_blend(tiles, *tables, weight, total, weight_total, _threads(threads))


def blend_finish(
    total: Any,
    weight_total: Any,
    out: Any,
    *,
    op: Op = "copy",
    threshold: ArrayLike | None = None,
    values: ArrayLike | None = None,
    threads: int = 0,
    stream: int = 0,
    uncovered: Any = None,
) -> int:
    """Finish a blended total: ``out = op(total / weight_total)``.

    Args:
        total: (K, \\*spatial) float32 from :func:`tile_blend`.
        weight_total: (\\*spatial) float32 from :func:`tile_blend`.
        out: As for :func:`tile_stitch`.
        op: As for :func:`tile_stitch`.
        threshold: As for :func:`tile_stitch`, compared with the quotient.
        values: As for :func:`tile_stitch`.
        threads: Most threads to use.
        stream: CUDA stream, for arrays on a device.
        uncovered: (1,) uint64 or int64 on the arrays' device, to which the number of uncovered samples is added.

    Returns:
        The number of samples that no tile covered (weight 0). They are NaN in a float output, and the first class or
        the value below the threshold in a mask: a caller who did not expect them has to raise. For arrays on a device 0:
        the number is in ``uncovered`` once the kernel has run.

    Raises:
        TileError: Shapes do not fit.
        ContractError: As for :func:`tile_stitch`.
    """
    native, (total, weight_total, out, counter) = _arrays(
        total=total, weight_total=weight_total, out=out, uncovered=uncovered
    )
    _check_dtype("total", total, ("f4",))
    _check_dtype("weight_total", weight_total, ("f4",))
    axes = total.ndim - 1
    _check_spatial("total", total, axes)
    if total.shape[1:] != weight_total.shape:
        raise TileError(f"total is {_shape(total)} and weight_total {_shape(weight_total)}; spatial shapes must agree")
    channels = total.shape[0]
    code = _choice("op", op, _OPS, ContractError)
    spatial = _check_target(out, op, channels, axes)
    if spatial != weight_total.shape:
        raise TileError(f"out is {_shape(out)} for a total of {_shape(total)}; spatial shapes must agree")
    _check_counter("uncovered", counter)
    bounds, labels = _labels(op, channels, threshold, values)
    if native is not None:
        address = 0 if counter is None else counter.pointer
        queue = _stream(stream, total, weight_total, out)
        sums = (total.description, weight_total.description)
        native.blend_finish(*sums, out.description, code, bounds, labels, address, queue)
        return 0
    found: int = _cpu().blend_finish(total, weight_total, out, code, bounds, labels, _threads(threads))
    if counter is not None:
        counter += found
    return found


def crop_concat(skip: Any, up: Any, out: Any, *, offset: Size | None = None, threads: int = 0, stream: int = 0) -> None:
    """The skip connection of a U-Net: a window of ``skip`` and all of ``up``, one after the other along channels.

    Args:
        skip: (N, C1, \\*spatial) float32, float16, int8 or uint8, at least as large as ``up`` along every spatial axis.
        up: (N, C2, \\*spatial), same dtype.
        out: (N, C1 + C2, \\*spatial of up), same dtype, filled.
        offset: First sample of the window in ``skip``. Default: centred, odd differences rounded down.
        threads: Most threads to use.
        stream: CUDA stream, for arrays on a device.

    Raises:
        TileError: Shapes or dtypes do not fit.
    """
    native, (skip, up, out) = _arrays(skip=skip, up=up, out=out)
    axes = up.ndim - 2
    dtypes = ("f4", "f2", "i1", "u1")
    _check_dtype("skip", skip, dtypes)
    _check_spatial("up", up, axes)
    if up.dtype != skip.dtype or out.dtype != skip.dtype:
        raise TileError(f"skip is {skip.dtype}, up {up.dtype}, out {out.dtype}; give all three the same dtype")
    _check_output(out, dtypes)
    expected = (up.shape[0], skip.shape[1] + up.shape[1], *up.shape[2:]) if skip.ndim == up.ndim else None
    if expected is None or skip.shape[0] != up.shape[0] or out.shape != expected:
        raise TileError(
            f"skip {_shape(skip)} and up {_shape(up)} do not concatenate into out {_shape(out)}; "
            "needed are (N, C1, ...), (N, C2, ...) and (N, C1 + C2, ... of up)"
        )
    room = [s - u for s, u in zip(skip.shape[2:], up.shape[2:], strict=True)]
    if min(room) < 0:
        raise TileError(f"skip {_shape(skip)} is smaller than up {_shape(up)}; nothing can be cropped")
    start = [r // 2 for r in room] if offset is None else _sizes("offset", offset, axes)
    if any(not 0 <= s <= r for s, r in zip(start, room, strict=True)):
        raise TileError(f"offset {start} leaves skip {_shape(skip)}; it may be 0 to {room}")
    if native is not None:
        native.crop_concat(skip.description, up.description, out.description, start, _stream(stream, skip, up, out))
    else:
        _cpu().crop_concat(skip, up, out, start, _threads(threads))


def histogram(values: NDArray[Any], counts: NDArray[np.int64], *, threads: int = 0) -> None:
    """How often each value occurs: ``counts[v] += number of values equal to v``. On the host alone.

    Args:
        values: uint8 or uint16 of any shape; copied where it is not C-contiguous.
        counts: (256,) or (65536,) int64, added to.
        threads: Most threads to use.

    Raises:
        ImageError: Another dtype.
        OutputError: ``counts`` has another shape or dtype.
    """
    _check_dtype("values", values, ("u1", "u2"))
    kinds = 1 << (8 * values.dtype.itemsize)
    if counts.dtype != np.int64 or counts.shape != (kinds,) or not counts.flags.c_contiguous:
        raise OutputError(f"counts is {_shape(counts)} {counts.dtype}; allocate it as ({kinds},) int64")
    _cpu().histogram(np.ascontiguousarray(values), counts, _threads(threads))


def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot run here, with the way out; None if they are built and a device is there."""
    try:
        return str(_cuda().missing()) or None
    except BackendError as error:
        return str(error)


def graph_begin(stream: int) -> None:
    """From now on, what is enqueued on a CUDA stream (not the default one) is not run but recorded in a graph.

    Raises:
        BackendError: The stream cannot be captured, or there is no device.
    """
    _cuda().graph_begin(stream)


def graph_end(stream: int) -> int:
    """The handle of what was recorded since :func:`graph_begin`, ready to be launched.

    Raises:
        BackendError: Something was done that a graph cannot hold.
    """
    handle: int = _cuda().graph_end(stream)
    return handle


def graph_launch(graph: int, stream: int) -> None:
    """Enqueue all that a graph holds on a CUDA stream.

    Raises:
        BackendError: The launch failed.
    """
    _cuda().graph_launch(graph, stream)


def graph_destroy(graph: int) -> None:
    """Free a graph. Launches under way end as if it still existed."""
    _cuda().graph_destroy(graph)


@functools.cache
def _cpu() -> Any:
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
def _cuda() -> Any:
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


def _arrays(**named: Any) -> tuple[Any, tuple[Any, ...]]:
    """The CUDA kernels if the arrays live on a device, else None; and the arrays in the form that kernels take."""
    arrays = tuple(None if array is None else _array(name, array) for name, array in named.items())
    found = {
        isinstance(array, _DeviceArray): name for name, array in zip(named, arrays, strict=True) if array is not None
    }
    if len(found) == 2:
        raise BackendError(
            f"{found[True]} lives on a CUDA device and {found[False]} on the host; move all arrays to one of them"
        )
    return (_cuda() if True in found else None), arrays


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
    _cuda()  # without kernels that is what is missing, whatever the array holds
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
    pointer, kind, size, shape, strides, read_only = _cuda().dlpack_description(array.__dlpack__(stream=1))
    letter = {0: "i", 1: "u", 2: "f", 6: "b"}.get(kind)  # DLDataTypeCode
    if letter is None:
        raise ValueError(f"elements of DLPack type {kind}")
    return _DeviceArray(pointer, np.dtype(f"{letter}{size}"), shape, strides, not read_only, None, array)


def _described(table: _Array) -> Any:
    return table if isinstance(table, np.ndarray) else table.description


def _stream(stream: int, *arrays: _DeviceArray) -> int:
    """The stream to enqueue on: the one given, else the one on which the arrays are made."""
    if stream:
        return stream
    named = {array.stream for array in arrays if array.stream is not None}
    if len(named) > 1:
        raise BackendError(
            f"the arrays belong to different CUDA streams ({sorted(named)}); order them and pass stream="
        )
    return named.pop() if named else 0


def _shape(array: _Array) -> str:
    return size_text(array.shape) or "scalar"


def _check_dtype(name: str, array: _Array, allowed: tuple[str, ...]) -> None:
    dtype = array.dtype
    if not dtype.isnative:
        raise ImageError(
            f"{name} has dtype {dtype.str}, which is not this machine's byte order; "
            "convert it: array.astype(array.dtype.newbyteorder('='))"
        )
    if dtype.str[1:] not in allowed:
        raise ImageError(f"{name} has dtype {dtype}; convert it to one of {_names(allowed)}")


def _check_output(out: _Array, allowed: tuple[str, ...], name: str = "out") -> None:
    dtype = out.dtype
    if not dtype.isnative or dtype.str[1:] not in allowed:
        raise OutputError(f"{name} has dtype {dtype.str}; allocate it as {_names(allowed)}")
    if not (out.flags.writeable if isinstance(out, np.ndarray) else out.writeable):
        raise OutputError(f"{name} ({_shape(out)} {dtype}) is read-only; pass an array that can be written")


def _names(dtypes: tuple[str, ...]) -> str:
    return ", ".join(np.dtype(dtype).name for dtype in dtypes)


def _check_counter(name: str, counter: _Array | None) -> None:
    if counter is None:
        return
    _check_output(counter, ("u8", "i8"), name)
    if counter.shape not in ((), (1,)):
        raise OutputError(f"{name} is {_shape(counter)}; allocate it as (1,)")


def _check_spatial(name: str, array: _Array, axes: int) -> None:
    if not 1 <= axes <= 3:
        raise TileError(f"{name} is {_shape(array)}, with {axes} spatial axes; kernels take 1, 2 or 3")


def _check_tiles(tiles: _Array) -> int:
    _check_dtype("tiles", tiles, _FLOATS)
    axes = tiles.ndim - 2
    _check_spatial("tiles", tiles, axes)
    if tiles.shape[1] < 1:
        raise TileError(f"tiles are {_shape(tiles)}, without a channel; pass (N, K, *tile) with K of at least 1")
    return axes


def _check_target(out: _Array, op: str, channels: int, axes: int) -> tuple[int, ...]:
    """The output's spatial shape."""
    _check_output(out, ("u1",) if op in ("argmax", "threshold") else ("f4",))
    lead = () if op == "argmax" else (channels,)
    if out.ndim != len(lead) + axes or out.shape[: len(lead)] != lead:
        form = "(*spatial)" if op == "argmax" else f"({channels}, *spatial)"
        raise TileError(f"out is {_shape(out)}; {op} of {channels} channels and {axes} spatial axes needs {form}")
    return out.shape[len(lead) :]


def _table(name: str, value: Any, axes: int, native: Any) -> _Array:
    view = None if isinstance(value, np.ndarray | list | tuple) else _on_device(name, value)
    if view is not None:
        if native is None:
            raise BackendError(f"{name} lives on a CUDA device and the arrays on the host; pass a NumPy array")
        if view.shape[1:] != (axes,) or view.dtype != np.int64 or (view.strides != (8 * axes, 8) and view.shape[0] > 1):
            raise TileError(
                f"{name} is {_shape(view)} {view.dtype}; on a device it must be (N, {axes}) int64, C-contiguous"
            )
        return view
    table = np.asarray(value)
    if table.ndim != 2 or table.shape[1] != axes:
        raise TileError(f"{name} is {_shape(table)}; one row per tile and one column per spatial axis: (N, {axes})")
    if table.dtype.kind not in "iu" and table.size:
        raise TileError(f"{name} has dtype {table.dtype}; coordinates are whole numbers")
    return np.ascontiguousarray(table, np.int64)


def _sizes(name: str, value: Size, axes: int) -> list[int]:
    try:
        sizes = [operator.index(number) for number in value]
    except TypeError as error:
        raise TileError(f"{name} is {value!r}; {axes} spatial axes need {axes} whole numbers") from error
    if len(sizes) != axes or not all(abs(number) <= _FARTHEST_PX for number in sizes):
        raise TileError(f"{name} is {sizes}; {axes} spatial axes need {axes} whole numbers within 2^48")
    return sizes


def _parts(
    source_start: Any, target_start: Any, size: Any, tiles: _Array, spatial: tuple[int, ...], native: Any
) -> tuple[_Array, _Array, _Array]:
    axes = len(spatial)
    source = _table("source_start", source_start, axes, native)
    target = _table("target_start", target_start, axes, native)
    extent = _table("size", size, axes, native)
    count = tiles.shape[0]
    if not source.shape[0] == target.shape[0] == extent.shape[0] == count:
        raise TileError(
            f"{count} tiles, but {source.shape[0]} source_start, {target.shape[0]} target_start and {extent.shape[0]} "
            "size; one row per tile"
        )
    if isinstance(source, _DeviceArray) and isinstance(target, _DeviceArray) and isinstance(extent, _DeviceArray):
        return source, target, extent
    if isinstance(source, _DeviceArray) or isinstance(target, _DeviceArray) or isinstance(extent, _DeviceArray):
        raise BackendError("source_start, target_start and size live partly on a CUDA device; pass all three alike")
    for name, start, whole in (("tile", source, tiles.shape[2:]), ("output", target, spatial)):
        outside = (start < 0) | (extent < 0) | (start > np.subtract(whole, extent))  # no sum that could overflow
        if outside.any():
            n = int(outside.any(axis=1).argmax())
            raise TileError(
                f"tile {n}: {extent[n].tolist()} samples at {start[n].tolist()} leave the {name} of {list(whole)}; "
                "parts must lie inside"
            )
    return source, target, extent


def _labels(
    op: str, channels: int, threshold: ArrayLike | None, values: ArrayLike | None
) -> tuple[list[float], list[int]]:
    """Thresholds (K,) and label values as the kernels take them; empty where the operation has none."""
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
        bounds = _per_channel("threshold", threshold, channels)
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


def _per_channel(name: str, value: ArrayLike, channels: int) -> list[float]:
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iufb" or numbers.shape not in ((), (1,), (channels,)):
        raise ContractError(f"{name} is {value!r}; give one number, or one per channel ({channels})")
    listed = [float(number) for number in numbers.ravel().tolist()]
    return listed if len(listed) == channels else listed * channels


def _choice(name: str, value: str, table: dict[str, int], error: type[Exception]) -> int:
    if value not in table:
        raise error(f"{name} {value!r} is unknown; choose one of {', '.join(table)}")
    return table[value]


def _threads(threads: int) -> int:
    if threads < 0:
        raise BackendError(f"threads is {threads}; give 0 for this machine's default, or a positive number")
    return threads or default_threads()
