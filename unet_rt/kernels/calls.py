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

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ContractError, OutputError, TileError
from . import native
from .arrays import (
    FARTHEST_PX,
    FLOATS,
    LARGEST,
    PIXELS,
    SMALLEST,
    check_counter,
    check_dtype,
    check_spatial,
    check_tiles,
    check_writable,
    code_of,
    coordinates,
    kernel_arrays,
    kernel_stream,
    kernel_threads,
    label_arguments,
    per_channel,
    placement_tables,
    shape_text,
    sizes_of,
    table_of,
    target_shape,
)
from .request import COPY, Affine, Frame, Operation, Placement, Size

_BORDERS = {"mirror": 0, "edge": 1, "constant": 2, "zero": 2}  # as in csrc/geometry.h
_OPS = {"copy": 0, "softmax": 1, "sigmoid": 2, "argmax": 3, "threshold": 4}  # as in csrc/tile_stitch.h


def tile_gather(
    window: Any,
    starts: ArrayLike,
    out: Any,
    *,
    frame: Frame | None = None,
    affine: Affine | None = None,
    threads: int = 0,
    stream: int = 0,
    non_finite: Any = None,
) -> int:
    """Fills ``out`` with tiles cut out of a window of an image, continued beyond the image and normalised.

    Values are computed in float32 (from int32, uint32 and float64 pixels in float64 and rounded to float32 once), with
    true division. NaN passes the clip.

    Args:
        window: (C, \\*spatial) pixels of integers up to 32 bits, floats or bools; one to three spatial axes.
        starts: (N, D) integer tile origins in image pixels; tiles may reach beyond the image, on any side.
        out: (N, C, \\*tile) float32 or float16, filled.
        frame: Where the window lies in its image, and the border rule. None: the window is the image, mirrored.
        affine: Normalisation; None: values stay as they are. Offset, divisor and the ends of the clip may be numbers or
            (C,) numbers.
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
    gpu, (window, out, counter) = kernel_arrays(window=window, out=out, non_finite=non_finite)
    check_dtype("window", window, PIXELS)
    axes = window.ndim - 1
    check_spatial("window", window, axes)
    channels = window.shape[0]
    begin = coordinates("starts", starts, axes, gpu)
    if isinstance(begin, np.ndarray) and begin.size and (begin.min() < -FARTHEST_PX or begin.max() > FARTHEST_PX):
        raise TileError(f"starts reach from {begin.min()} to {begin.max()} px; they must stay within 2^48")
    check_writable(out, FLOATS)
    check_counter("non_finite", counter)
    tiles = begin.shape[0]
    if out.ndim != axes + 2 or out.shape[:2] != (tiles, channels):
        raise TileError(
            f"out is {shape_text(out)}, but {tiles} tiles of {channels} channels and {axes} spatial axes need "
            f"({tiles}, {channels}, ...); allocate it so"
        )
    place = _frame_arguments(frame or Frame(), window, axes)
    numbers = _affine_arguments(affine, channels)
    if gpu is not None:
        address = 0 if counter is None else counter.pointer
        queue = kernel_stream(stream, window, out)
        gpu.tile_gather(window.description, table_of(begin), out.description, *place, *numbers, address, queue)
        return 0
    bad: int = native.cpu().tile_gather(window, begin, out, *place, *numbers, kernel_threads(threads))
    if counter is not None:
        counter += bad
    return bad


def _frame_arguments(frame: Frame, window: Any, axes: int) -> tuple[list[int], list[int], int, float]:
    """A checked frame as the kernels take it: image shape, first pixel of the window, code of the border, constant."""
    held = list(window.shape[1:])
    image = held if frame.image_shape is None else sizes_of("image_shape", frame.image_shape, axes)
    first = [0] * axes if frame.window_start is None else sizes_of("window_start", frame.window_start, axes)
    if window.shape[0] < 1 or min(held) < 1:
        raise TileError(f"window is {shape_text(window)} and holds no pixel to gather from")
    if any(not 0 <= f <= size - h for f, h, size in zip(first, held, image, strict=True)):
        raise TileError(
            f"the window of {held} px at {first} is not inside the image of {image} px; "
            "windows hold pixels of the image only, the border rule adds the rest"
        )
    constant = math.nan if frame.border == "zero" else float(frame.constant)  # NaN: 0 in the tile
    return image, first, code_of("border", frame.border, _BORDERS, TileError), constant


def _affine_arguments(affine: Affine | None, channels: int) -> tuple[bool, *tuple[list[float], ...]]:
    """A checked normalisation as the kernels take it: whether there is one, offsets, divisors, lowest, highest."""
    if affine is None:
        zeros, ones = [0.0] * channels, [1.0] * channels
        return False, zeros, ones, [-math.inf] * channels, [math.inf] * channels
    clip: Any = affine.clip
    low, high = (-math.inf, math.inf) if clip is None else clip
    lows = per_channel("clip[0]", low, channels)
    highs = per_channel("clip[1]", high, channels)
    if not all(a <= b for a, b in zip(lows, highs, strict=True)):
        raise ContractError(f"clip {clip} has a lower bound above its upper bound, or NaN; give (lowest, highest)")
    offsets = per_channel("offset", affine.offset, channels)
    divisors = per_channel("divisor", affine.divisor, channels)
    if not all(abs(value) <= LARGEST for value in offsets):
        raise ContractError(f"offset {offsets} does not normalise; give finite float32 numbers")
    if not all(SMALLEST <= abs(value) <= LARGEST for value in divisors):
        raise ContractError(
            f"divisor {divisors} does not normalise; give float32 numbers that are neither 0 nor subnormal nor "
            "infinite (1 for a constant channel)"
        )
    return True, offsets, divisors, lows, highs


def tile_stitch(
    tiles: Any,
    placement: Placement,
    out: Any,
    operation: Operation = COPY,
    *,
    threads: int = 0,
    stream: int = 0,
) -> None:
    """Puts parts of tiles to their places: ``out[target + j] = op(tiles[n, source + j])`` for ``j < size``.

    Args:
        tiles: (N, K, \\*tile) float32 or float16 network outputs.
        placement: The part of each tile that is kept, and its place in ``out``. Targets of one call must not overlap.
        out: ``copy``, ``softmax`` (over K), ``sigmoid``: (K, \\*spatial) float32. ``argmax``: (\\*spatial) uint8.
            ``threshold``: (K, \\*spatial) uint8.
        operation: What is done to the K values of a sample.
        threads: Most threads to use.
        stream: CUDA stream, for arrays on a device.

    Raises:
        TileError: Shapes do not fit, or a part lies outside its tile or the output.
        ContractError: An operation whose threshold, values or number of channels is missing or impossible.
    """
    gpu, (tiles, out) = kernel_arrays(tiles=tiles, out=out)
    axes = check_tiles(tiles)
    channels = tiles.shape[1]
    code = code_of("op", operation.op, _OPS, ContractError)
    spatial = target_shape(out, operation.op, channels, axes)
    tables = placement_tables(placement, tiles, spatial, gpu)
    bounds, labels = label_arguments(operation, channels)
    if gpu is not None:
        queue = kernel_stream(stream, tiles, out)
        gpu.tile_stitch(tiles.description, *map(table_of, tables), out.description, code, bounds, labels, queue)
    else:
        native.cpu().tile_stitch(tiles, *tables, out, code, bounds, labels, kernel_threads(threads))


def tile_blend(
    tiles: Any,
    placement: Placement,
    weight: Any,
    total: Any,
    weight_total: Any,
    *,
    threads: int = 0,
    stream: int = 0,
) -> None:
    """Adds weighted tiles to a total: ``total += weight * tile``, ``weight_total += weight``, tile after tile.

    Targets may overlap; every sample adds its tiles in order, in float32, whatever the number of threads.

    Args:
        tiles: (N, K, \\*tile) float32 or float16 network outputs.
        placement: The part of each tile that is used, and its place in ``total``.
        weight: (\\*tile) float32.
        total: (K, \\*spatial) float32, added to.
        weight_total: (\\*spatial) float32, added to.
        threads: Most threads to use.
        stream: CUDA stream, for arrays on a device.

    Raises:
        TileError: Shapes do not fit, or a part lies outside its tile or the total.
    """
    gpu, (tiles, weight, total, weight_total) = kernel_arrays(
        tiles=tiles, weight=weight, total=total, weight_total=weight_total
    )
    axes = check_tiles(tiles)
    check_dtype("weight", weight, ("f4",))
    if weight.shape != tiles.shape[2:]:
        raise TileError(
            f"weight is {shape_text(weight)}, tiles are {shape_text(tiles)}; a weight has the tile's spatial shape"
        )
    check_writable(total, ("f4",), "total")
    check_writable(weight_total, ("f4",), "weight_total")
    if total.ndim != axes + 1 or total.shape != (tiles.shape[1], *weight_total.shape):
        raise TileError(
            f"total is {shape_text(total)} and weight_total {shape_text(weight_total)}; {tiles.shape[1]} channels need "
            f"(K, *spatial) and (*spatial)"
        )
    tables = placement_tables(placement, tiles, weight_total.shape, gpu)
    if gpu is not None:
        queue = kernel_stream(stream, tiles, weight, total, weight_total)
        sums = (weight.description, total.description, weight_total.description)
        gpu.tile_blend(tiles.description, *map(table_of, tables), *sums, queue)
    else:
        native.cpu().tile_blend(tiles, *tables, weight, total, weight_total, kernel_threads(threads))


def blend_finish(
    total: Any,
    weight_total: Any,
    out: Any,
    operation: Operation = COPY,
    *,
    threads: int = 0,
    stream: int = 0,
    uncovered: Any = None,
) -> int:
    """Finishes a blended total: ``out = op(total / weight_total)``.

    Args:
        total: (K, \\*spatial) float32 from :func:`tile_blend`.
        weight_total: (\\*spatial) float32 from :func:`tile_blend`.
        out: As for :func:`tile_stitch`.
        operation: As for :func:`tile_stitch`; a threshold is compared with the quotient.
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
    gpu, (total, weight_total, out, counter) = kernel_arrays(
        total=total, weight_total=weight_total, out=out, uncovered=uncovered
    )
    check_dtype("total", total, ("f4",))
    check_dtype("weight_total", weight_total, ("f4",))
    axes = total.ndim - 1
    check_spatial("total", total, axes)
    if total.shape[1:] != weight_total.shape:
        raise TileError(
            f"total is {shape_text(total)} and weight_total {shape_text(weight_total)}; spatial shapes must agree"
        )
    channels = total.shape[0]
    code = code_of("op", operation.op, _OPS, ContractError)
    spatial = target_shape(out, operation.op, channels, axes)
    if spatial != weight_total.shape:
        raise TileError(f"out is {shape_text(out)} for a total of {shape_text(total)}; spatial shapes must agree")
    check_counter("uncovered", counter)
    bounds, labels = label_arguments(operation, channels)
    if gpu is not None:
        address = 0 if counter is None else counter.pointer
        queue = kernel_stream(stream, total, weight_total, out)
        sums = (total.description, weight_total.description)
        gpu.blend_finish(*sums, out.description, code, bounds, labels, address, queue)
        return 0
    bare: int = native.cpu().blend_finish(total, weight_total, out, code, bounds, labels, kernel_threads(threads))
    if counter is not None:
        counter += bare
    return bare


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
    gpu, (skip, up, out) = kernel_arrays(skip=skip, up=up, out=out)
    axes = up.ndim - 2
    dtypes = ("f4", "f2", "i1", "u1")
    check_dtype("skip", skip, dtypes)
    check_spatial("up", up, axes)
    if up.dtype != skip.dtype or out.dtype != skip.dtype:
        raise TileError(f"skip is {skip.dtype}, up {up.dtype}, out {out.dtype}; give all three the same dtype")
    check_writable(out, dtypes)
    expected = (up.shape[0], skip.shape[1] + up.shape[1], *up.shape[2:]) if skip.ndim == up.ndim else None
    if expected is None or skip.shape[0] != up.shape[0] or out.shape != expected:
        raise TileError(
            f"skip {shape_text(skip)} and up {shape_text(up)} do not concatenate into out {shape_text(out)}; "
            "needed are (N, C1, ...), (N, C2, ...) and (N, C1 + C2, ... of up)"
        )
    room = [s - u for s, u in zip(skip.shape[2:], up.shape[2:], strict=True)]
    if min(room) < 0:
        raise TileError(f"skip {shape_text(skip)} is smaller than up {shape_text(up)}; nothing can be cropped")
    start = [r // 2 for r in room] if offset is None else sizes_of("offset", offset, axes)
    if any(not 0 <= s <= r for s, r in zip(start, room, strict=True)):
        raise TileError(f"offset {start} leaves skip {shape_text(skip)}; it may be 0 to {room}")
    if gpu is not None:
        gpu.crop_concat(skip.description, up.description, out.description, start, kernel_stream(stream, skip, up, out))
    else:
        native.cpu().crop_concat(skip, up, out, start, kernel_threads(threads))


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
    check_dtype("values", values, ("u1", "u2"))
    kinds = 1 << (8 * values.dtype.itemsize)
    if counts.dtype != np.int64 or counts.shape != (kinds,) or not counts.flags.c_contiguous:
        raise OutputError(f"counts is {shape_text(counts)} {counts.dtype}; allocate it as ({kinds},) int64")
    native.cpu().histogram(np.ascontiguousarray(values), counts, kernel_threads(threads))
