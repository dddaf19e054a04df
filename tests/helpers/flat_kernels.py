"""The kernels with the arguments of :mod:`reference`: what is asked of them one by one, not in frozen values."""

from __future__ import annotations

from typing import Any

from unet_rt.kernels import calls
from unet_rt.kernels.calls import crop_concat, histogram
from unet_rt.kernels.request import Affine, Frame, Operation, Placement

__all__ = ["blend_finish", "crop_concat", "histogram", "tile_blend", "tile_gather", "tile_stitch"]


def tile_gather(
    window: Any, starts: Any, out: Any, *, offset: Any = None, divisor: Any = None, clip: Any = None, **options: Any
) -> int:
    place = {k: options.pop(k) for k in ("image_shape", "window_start", "border", "constant") if k in options}
    affine = None
    if any(value is not None for value in (offset, divisor, clip)):
        affine = Affine(0.0 if offset is None else offset, 1.0 if divisor is None else divisor, clip)  # type: ignore[arg-type]
    return calls.tile_gather(window, starts, out, frame=Frame(**place), affine=affine, **options)


def operation(options: dict[str, Any]) -> Operation:
    return Operation(**{k: options.pop(k) for k in ("op", "threshold", "values") if k in options})


def tile_stitch(tiles: Any, source_start: Any, target_start: Any, size: Any, out: Any, **options: Any) -> None:
    calls.tile_stitch(tiles, Placement(source_start, target_start, size), out, operation(options), **options)


def tile_blend(
    tiles: Any,
    source_start: Any,
    target_start: Any,
    size: Any,
    weight: Any,
    total: Any,
    weight_total: Any,
    **options: Any,
) -> None:
    calls.tile_blend(tiles, Placement(source_start, target_start, size), weight, total, weight_total, **options)


def blend_finish(total: Any, weight_total: Any, out: Any, **options: Any) -> int:
    return calls.blend_finish(total, weight_total, out, operation(options), **options)
