"""Outputs opened with the parts of their shape one by one, not in a :class:`unet_rt.outputs.shape.Shape`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unet_rt.outputs import output
from unet_rt.outputs.shape import Shape


def open_output(
    path: str | Path,
    shape: Sequence[int],
    channels: int = 0,
    dtype: Any = "uint8",
    planes: int = 1,
    plane_shape: Sequence[int] | None = None,
    plane_axes: str | None = None,
    **options: Any,
) -> output.Output:
    """Planes: those of the source if their number is ``planes``, else one axis."""
    source = options.get("source")
    if plane_shape is None and source is not None and source.planes == planes:
        plane_shape, plane_axes = source.plane_shape, source.plane_axes
    if plane_shape is None:
        plane_shape, plane_axes = ((), "") if planes == 1 else ((planes,), "I")
    axes = "TINPRV"[: len(plane_shape)] if plane_axes is None else plane_axes
    whole = Shape(tuple(map(int, shape)), tuple(map(int, plane_shape)), axes, channels, np.dtype(dtype))
    return output.open_output(path, whole, **options)
