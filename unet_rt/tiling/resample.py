"""Resampling by windows: an image brought to the pixel size a network was trained at, and its results back.

Linear interpolation; where pixels become fewer, the triangle is widened by the ratio, so that no pixel is skipped (as
Pillow's ``BILINEAR`` filter). Sample ``o`` lies at input coordinate ``(o + 0.5) * n_in / n_out - 0.5``; beyond the image
the filter is cut off, and what is left of it weighs 1. The taps of a sample depend on its place alone, so windows agree
bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError

Array = npt.NDArray[Any]


def resampled_shape(
    shape: Sequence[int], pixel_size_um: Sequence[float], wanted_um: Sequence[float]
) -> tuple[int, ...]:
    """Shape of an image brought to another pixel size, at least 1 px.

    Raises:
        ContractError: Not one positive size per axis.
    """
    if not len(shape) == len(pixel_size_um) == len(wanted_um) or min((*pixel_size_um, *wanted_um)) <= 0:
        raise ContractError(
            f"pixel sizes {tuple(pixel_size_um)} and {tuple(wanted_um)} um do not fit an image of {len(shape)} axes; give "
            "one positive number per axis, e.g. --pixel-size 0.5,0.5"
        )
    return tuple(max(1, round(n * a / b)) for n, a, b in zip(shape, pixel_size_um, wanted_um, strict=True))


def input_span(start: int, stop: int, n_in: int, n_out: int) -> tuple[int, int]:
    """[first, last + 1) of the input samples that output samples [start, stop) of an axis depend on."""
    ratio, support = n_in / n_out, _support(n_in, n_out)
    low = floor((start + 0.5) * ratio - 0.5 - support)
    high = ceil((stop - 0.5) * ratio - 0.5 + support)
    return max(0, low), min(n_in, high + 1)


def _support(n_in: int, n_out: int) -> float:
    return max(1.0, n_in / n_out)


def resample(
    window: Array, first: Sequence[int], start: Sequence[int], stop: Sequence[int],
    shape_in: Sequence[int], shape_out: Sequence[int],
) -> npt.NDArray[np.float32]:  # fmt: skip
    """Output samples [start, stop) from a window of the input.

    Args:
        window: (C, *spatial) that holds at least what :func:`input_span` names.
        first: Place of its first sample in the input.
        start, stop: Of the wanted samples in the output.
        shape_in, shape_out: Whole shapes.

    Returns:
        (C, *(stop - start)), float32.
    """
    values = window.astype(np.float32, copy=False)
    for k in range(len(shape_in)):
        if shape_in[k] == shape_out[k]:
            part = slice(start[k] - first[k], stop[k] - first[k])
            values = values[(slice(None),) * (k + 1) + (part,)]
            continue
        values = _along(values, k + 1, first[k], start[k], stop[k], shape_in[k], shape_out[k])
    return np.ascontiguousarray(values)


def _along(values: Array, axis: int, first: int, start: int, stop: int, n_in: int, n_out: int) -> Array:
    ratio, support = n_in / n_out, _support(n_in, n_out)
    centre = (np.arange(start, stop) + 0.5) * ratio - 0.5
    taps = np.floor(centre - support).astype(np.int64)[:, None] + np.arange(ceil(2 * support) + 2)
    weight = np.maximum(0.0, 1.0 - np.abs(taps - centre[:, None]) / support)
    weight[(taps < 0) | (taps >= n_in)] = 0.0
    weight /= weight.sum(axis=1, keepdims=True)
    place = np.clip(taps, 0, n_in - 1) - first
    shape = [1] * values.ndim
    shape[axis] = stop - start
    total: Array | None = None
    for k in range(taps.shape[1]):  # one tap of all samples at a time: no copy of the window per tap and sample
        if not weight[:, k].any():
            continue
        index = np.clip(place[:, k], 0, values.shape[axis] - 1)  # taps of weight 0 may lie outside of the window
        part = np.take(values, index, axis=axis) * weight[:, k].astype(np.float32).reshape(shape)
        total = part if total is None else total + part
    assert total is not None  # noqa: S101 - weights sum to 1
    return total
