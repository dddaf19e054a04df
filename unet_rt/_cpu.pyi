"""Compiled CPU kernels. Private: :mod:`unet_rt.kernels` checks arguments and documents them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

build_info: dict[str, str]

def tile_gather(
    window: NDArray[Any],
    starts: NDArray[np.int64],
    out: NDArray[Any],
    image_shape: Sequence[int],
    window_start: Sequence[int],
    border: int,
    constant: float,
    affine: bool,
    offset: Sequence[float],
    divisor: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    threads: int,
    /,
) -> int: ...
def tile_stitch(
    tiles: NDArray[Any],
    source_start: NDArray[np.int64],
    target_start: NDArray[np.int64],
    size: NDArray[np.int64],
    out: NDArray[Any],
    op: int,
    threshold: Sequence[float],
    values: Sequence[int],
    threads: int,
    /,
) -> None: ...
def tile_blend(
    tiles: NDArray[Any],
    source_start: NDArray[np.int64],
    target_start: NDArray[np.int64],
    size: NDArray[np.int64],
    weight: NDArray[np.float32],
    total: NDArray[np.float32],
    weight_total: NDArray[np.float32],
    threads: int,
    /,
) -> None: ...
def blend_finish(
    total: NDArray[np.float32],
    weight_total: NDArray[np.float32],
    out: NDArray[Any],
    op: int,
    threshold: Sequence[float],
    values: Sequence[int],
    threads: int,
    /,
) -> int: ...
def crop_concat(
    skip: NDArray[Any],
    up: NDArray[Any],
    out: NDArray[Any],
    offset: Sequence[int],
    threads: int,
    /,
) -> None: ...
def histogram(values: NDArray[Any], counts: NDArray[np.int64], threads: int, /) -> None: ...
