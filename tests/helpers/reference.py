"""The slow, obvious NumPy twin of every kernel: what the compiled code must equal.

Same names and arguments as :mod:`unet_rt.kernels`, except that results are returned, or added to, in plain NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def border_index(start: int, count: int, size: int, border: str) -> NDArray[np.int64]:
    """The image pixels that stand for pixels start, start + 1, ... of an axis of ``size`` pixels; -1: the constant."""
    wanted = np.arange(start, start + count)
    if border in ("constant", "zero"):
        return np.where((wanted >= 0) & (wanted < size), wanted, -1)
    if border == "edge":
        return wanted.clip(0, size - 1)
    if size == 1:
        return np.zeros(count, np.int64)
    there_and_back = np.concatenate([np.arange(size), np.arange(size - 2, 0, -1)])
    return there_and_back[wanted % len(there_and_back)]


def column(values: ArrayLike, channels: int, axes: int, dtype: Any) -> NDArray[Any]:
    """A number or (C,) numbers in the shape that broadcasts over (C, *spatial)."""
    return np.broadcast_to(np.asarray(values, dtype), (channels,)).reshape((channels,) + (1,) * axes)


def tile_gather(
    window: NDArray[Any],
    starts: ArrayLike,
    tile: Sequence[int],
    dtype: Any = np.float32,
    *,
    image_shape: Sequence[int] | None = None,
    window_start: Sequence[int] | None = None,
    border: str = "mirror",
    constant: float = 0.0,
    offset: ArrayLike | None = None,
    divisor: ArrayLike | None = None,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
) -> tuple[NDArray[Any], int]:
    """The tiles, and the number of non-finite pixels read."""
    starts = np.asarray(starts)
    channels, axes = len(window), window.ndim - 1
    image_shape = window.shape[1:] if image_shape is None else image_shape
    window_start = (0,) * axes if window_start is None else window_start
    compute = np.float64 if window.dtype in (np.int32, np.uint32, np.float64) else np.float32
    out = np.empty((len(starts), channels, *tile), dtype)
    non_finite = 0
    for n, start in enumerate(starts):
        index = [border_index(s, t, size, border) for s, t, size in zip(start, tile, image_shape, strict=True)]
        outside = np.zeros(tile, bool)
        for axis, i in enumerate(index):
            outside |= (i < 0).reshape([-1 if a == axis else 1 for a in range(axes)])
        local = [np.where(i < 0, begin, i) - begin for i, begin in zip(index, window_start, strict=True)]
        pixels = window[(slice(None), *np.ix_(*local))]
        non_finite += int((~np.isfinite(pixels) & ~outside).sum())
        x = np.where(outside, compute(constant), pixels.astype(compute))
        if clip is not None:
            x = np.maximum(x, column(clip[0], channels, axes, compute))
            x = np.minimum(x, column(clip[1], channels, axes, compute))
        x = x - column(0 if offset is None else offset, channels, axes, compute)
        x = x / column(1 if divisor is None else divisor, channels, axes, compute)
        if border == "zero":
            x = np.where(outside, compute(0), x)
        with np.errstate(over="ignore"):
            out[n] = x.astype(np.float32)
    return out, non_finite


def apply(
    values: NDArray[np.float32], op: str, threshold: ArrayLike | None = None, labels: ArrayLike | None = None
) -> NDArray[Any]:
    """An operation on (K, *spatial) values."""
    channels, axes = len(values), values.ndim - 1
    if op == "softmax":
        e = np.exp(values - values.max(axis=0))
        return e / e.sum(axis=0, dtype=np.float32)
    if op == "sigmoid":
        with np.errstate(over="ignore"):
            return (np.float32(1) / (np.float32(1) + np.exp(-values))).astype(np.float32)
    if op == "argmax":
        table = np.arange(channels) if labels is None else np.asarray(labels)
        return table[values.argmax(axis=0)].astype(np.uint8)
    if op == "threshold":
        below, above = (0, 1) if labels is None else np.asarray(labels)
        return np.where(values > column(threshold, channels, axes, np.float32), above, below).astype(np.uint8)
    return values


def tile_stitch(
    tiles: NDArray[Any],
    source_start: ArrayLike,
    target_start: ArrayLike,
    size: ArrayLike,
    out: NDArray[Any],
    *,
    op: str = "copy",
    threshold: ArrayLike | None = None,
    values: ArrayLike | None = None,
) -> None:
    """Fill the targets in ``out``."""
    for tile, source, target, extent in zip(
        tiles, np.asarray(source_start), np.asarray(target_start), np.asarray(size), strict=True
    ):
        part = tile[(slice(None), *map(slice, source, source + extent))].astype(np.float32)
        place = tuple(map(slice, target, target + extent))
        if part.size:
            out[place if op == "argmax" else (slice(None), *place)] = apply(part, op, threshold, values)


def tile_blend(
    tiles: NDArray[Any],
    source_start: ArrayLike,
    target_start: ArrayLike,
    size: ArrayLike,
    weight: NDArray[np.float32],
    total: NDArray[np.float32],
    weight_total: NDArray[np.float32],
) -> None:
    """Add to ``total`` and ``weight_total``, tile after tile."""
    for tile, source, target, extent in zip(
        tiles, np.asarray(source_start), np.asarray(target_start), np.asarray(size), strict=True
    ):
        part = tuple(map(slice, source, source + extent))
        place = tuple(map(slice, target, target + extent))
        total[(slice(None), *place)] += weight[part] * tile[(slice(None), *part)].astype(np.float32)
        weight_total[place] += weight[part]


def blend_finish(
    total: NDArray[np.float32],
    weight_total: NDArray[np.float32],
    *,
    op: str = "copy",
    threshold: ArrayLike | None = None,
    values: ArrayLike | None = None,
) -> tuple[NDArray[Any], int]:
    """The finished output, and the number of samples without weight."""
    with np.errstate(invalid="ignore"):
        return apply(total / weight_total, op, threshold, values), int((weight_total == 0).sum())


def crop_concat(skip: NDArray[Any], up: NDArray[Any], *, offset: Sequence[int] | None = None) -> NDArray[Any]:
    """The skip's window and the up-sampled channels."""
    inner = up.shape[2:]
    start = [(s - u) // 2 for s, u in zip(skip.shape[2:], inner, strict=True)] if offset is None else offset
    window = tuple(slice(s, s + size) for s, size in zip(start, inner, strict=True))
    return np.concatenate([skip[(slice(None), slice(None), *window)], up], axis=1)
