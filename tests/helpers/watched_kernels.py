"""The CUDA kernels on arrays of exactly their size, for a memory checker to watch.

Run as a script: their bodies on the host below valgrind, with the word ``device`` themselves below compute-sanitizer.
Sizes are ragged, tiles stand over every edge. The last kernel is told of a row that its window does not have, after a line
that says so: whoever watches must have seen it.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import flat_kernels as kernels
import numpy as np

from unet_rt.kernels import native
from unet_rt.kernels.device import Device

BEYOND = "what follows reads beyond its window"


def shared(array: Any, **told: Any) -> Any:
    """Host memory that poses as a device's."""
    return posing(array, array, array.ctypes.data, **told)


def copied(array: Any, **told: Any) -> Any:
    """A block of the device's memory with the bytes of an array."""
    raw = array.ravel(order="K").view(np.uint8)
    device = Device.open(0)
    block, stream = device.empty(raw.shape, np.uint8), device.stream()
    device.copy_in(block, raw, stream)
    stream.synchronize()
    return posing(block, array, block.pointer, **told)


def posing(memory: Any, array: Any, pointer: int, **told: Any) -> Any:
    interface = {
        "version": 3,
        "shape": array.shape,
        "typestr": array.dtype.str,
        "data": (pointer, False),
        "strides": array.strides,
        "stream": None,
    }
    return SimpleNamespace(memory=memory, __cuda_array_interface__=interface | told)


def main() -> None:
    on_device = sys.argv[1:] == ["device"]
    put = copied if on_device else shared
    if not on_device:
        module = importlib.import_module("unet_rt._cuda_host")
        native.cuda = lambda: module  # type: ignore[assignment]
    rng = np.random.default_rng(0)

    def some(shape: tuple[int, ...], dtype: str) -> Any:
        return put(rng.integers(0, 100, shape).astype(dtype))

    def none(shape: tuple[int, ...], dtype: str) -> Any:
        return put(np.zeros(shape, dtype))

    starts = [[-3, -5], [30, 40], [0, 3], [21, 27]]
    for dtype in ("u1", "u2", "f4"):
        for out in ("f4", "f2"):
            for tile in ((37, 41), (16, 64)):
                kernels.tile_gather(some((1, 61, 67), dtype), starts, none((4, 1, *tile), out), divisor=3.0)
    whole, size = (74, 82), (37, 41)
    corners = [[0, 0], [37, 0], [0, 41], [37, 41]]
    parts = (
        [[0, 0], [3, 5], [0, 7], [6, 0]],
        [[0, 0], [27, 31], [0, 33], [30, 0]],
        [[30, 33], [34, 36], [27, 34], [31, 31]],
    )
    ops: dict[Any, tuple[int, str]] = {"copy": (2, "f4"), "softmax": (3, "f4"), "sigmoid": (1, "f4")}
    ops |= {"argmax": (5, "u1"), "threshold": (1, "u1")}
    for dtype in ("f4", "f2"):
        for op, (channels, kind) in ops.items():
            lead = () if op == "argmax" else (channels,)
            bound = 0.5 if op == "threshold" else None
            target = none((*lead, 61, 67), kind)
            kernels.tile_stitch(some((4, channels, *size), dtype), *parts, target, op=op, threshold=bound)
        total, weights = none((2, *whole), "f4"), none(whole, "f4")
        weight = put(np.ones(size, np.float32))
        kernels.tile_blend(some((4, 2, *size), dtype), [[0, 0]] * 4, corners, [size] * 4, weight, total, weights)
        kernels.blend_finish(total, weights, none(whole, "u1"), op="argmax", uncovered=none((1,), "u8"))
        kernels.blend_finish(total, weights, none((2, *whole), "f4"), op="softmax", uncovered=none((1,), "u8"))
    for dtype in ("f4", "f2", "i1"):
        for last in (False, True):
            arrays = [np.ones(shape, dtype) for shape in ((2, 3, 39, 45), (2, 5, 31, 37), (2, 8, 31, 37))]
            if last:  # channels
                arrays = [np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for a in arrays]
            kernels.crop_concat(*map(put, arrays))
    if on_device:
        Device.open(0).synchronize()
    print(BEYOND, file=sys.stderr, flush=True)
    window = put(rng.integers(0, 100, (1, 61, 67)).astype("u1"), shape=(1, 62, 67))
    kernels.tile_gather(window, [[20, 20]], none((1, 1, 42, 40), "f4"))
    if on_device:
        Device.open(0).synchronize()


if __name__ == "__main__":
    main()
