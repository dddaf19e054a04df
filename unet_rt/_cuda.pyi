"""Compiled CUDA kernels. Private: :mod:`unet_rt.kernels` checks arguments and documents them.

Arrays are (pointer, dtype's place in csrc/array.h, shape, strides in bytes); tables NumPy arrays or such descriptions;
streams, graphs and counters numbers.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]
_Table: TypeAlias = NDArray[np.int64] | _Array

architectures: str

def tile_gather(
    window: _Array,
    starts: _Table,
    out: _Array,
    image_shape: Sequence[int],
    window_start: Sequence[int],
    border: int,
    constant: float,
    affine: bool,
    offset: Sequence[float],
    divisor: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    non_finite: int,
    stream: int,
    /,
) -> None: ...
def tile_stitch(
    tiles: _Array,
    source_start: _Table,
    target_start: _Table,
    size: _Table,
    out: _Array,
    op: int,
    threshold: Sequence[float],
    values: Sequence[int],
    stream: int,
    /,
) -> None: ...
def tile_blend(
    tiles: _Array,
    source_start: _Table,
    target_start: _Table,
    size: _Table,
    weight: _Array,
    total: _Array,
    weight_total: _Array,
    stream: int,
    /,
) -> None: ...
def blend_finish(
    total: _Array,
    weight_total: _Array,
    out: _Array,
    op: int,
    threshold: Sequence[float],
    values: Sequence[int],
    uncovered: int,
    stream: int,
    /,
) -> None: ...
def crop_concat(skip: _Array, up: _Array, out: _Array, offset: Sequence[int], stream: int, /) -> None: ...
def dlpack_description(capsule: Any, /) -> tuple[int, int, int, tuple[int, ...], tuple[int, ...], bool]: ...
def missing() -> str: ...
def graph_begin(stream: int, /) -> None: ...
def graph_end(stream: int, /) -> int: ...
def graph_launch(graph: int, stream: int, /) -> None: ...
def graph_destroy(graph: int, /) -> None: ...
