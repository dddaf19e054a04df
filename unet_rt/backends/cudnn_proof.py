"""Whether a convolution of cuDNN does what it should: run once on known numbers, and what it left behind is counted.

All of the block of memory that holds a plan's maps is filled with numbers that depend on their place. After the run two
kernels of this package compare, on the device: the outputs with a convolution of their own, and everything else in the
block, such as samples between those of a strided output, with what the block was filled with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from unet_rt.backends.cudnn_api import Convolution
    from unet_rt.device import Device, DeviceArray, Stream


class Arrays(NamedTuple):
    """Addresses of a convolution's arrays on the device."""

    x: int
    w: int
    bias: int
    y: int


@dataclass(frozen=True)
class Faults:
    """What a convolution got wrong.

    Attributes:
        outputs: Values further from the right ones than sums in float32 and one rounding to float16 bring them.
        compared: Outputs that were compared.
        beside: Values of the block that are no outputs and were changed.
    """

    outputs: int
    compared: int
    beside: int

    def __bool__(self) -> bool:
        return self.outputs > 0 or self.beside > 0

    def __str__(self) -> str:
        if not self:
            return f"right in {self.compared} outputs"
        return f"wrong: {self.outputs} of {self.compared} outputs, {self.beside} values beside them"


class Proof:
    """Proves convolutions whose maps are in ``block``, and overwrites all of it. Close it to free its counters.

    Args:
        gpu, stream: Where; everything is enqueued on the stream.
        kernels: The module with the step kernels, ``unet_rt._cuda``.
        block: Bytes, a multiple of 16.
    """

    def __init__(self, gpu: Device, stream: Stream, kernels: Any, block: DeviceArray) -> None:
        self._gpu, self._stream, self._kernels, self._block = gpu, stream, kernels, block
        self._counts = gpu.empty((2,), np.uint64)

    def close(self) -> None:
        self._stream.synchronize()
        self._counts.free()

    def fill(self, array: DeviceArray | None = None) -> None:
        """Fills the block, or an array of bytes, with numbers in [-1, 1] (float16)."""
        array = self._block if array is None else array
        self._kernels.steps_fill(array.pointer, array.nbytes // 16 * 16, self._stream.handle)

    def faults(self, what: Convolution, arrays: Arrays, launch: Callable[[], object]) -> Faults:
        """Runs ``launch`` once on a filled block. Waits.

        Of more than two images the first and the last are compared: a direct convolution is slow. Values beside the
        outputs are compared for all.
        """
        x = _map(arrays.x, what.size, what.channels, what.x_strides)
        y = _map(arrays.y, what.out_size, what.filters, what.y_strides)
        images = min(what.batch, 2)
        apart = max(what.batch - 1, 1)  # of the images that are compared
        window = (*what.kernel, *what.strides, *what.dilations, *what.before)
        bias, relu = arrays.bias if what.bias else 0, what.activation == "relu"
        block, stream = self._block, self._stream.handle
        wrong, beside = self._counts.pointer, self._counts.pointer + 8
        self._gpu.zero(self._counts, self._stream)
        self.fill()
        launch()
        self._kernels.steps_count_wrong(
            (x[0], x[1] * apart, *x[2:]),
            (images, *what.size, what.channels),
            window,
            arrays.w,
            bias,
            relu,
            (y[0], y[1] * apart, *y[2:]),
            (*what.out_size, what.filters),
            wrong,
            stream,
        )
        self._kernels.steps_count_beside(
            block.pointer, block.nbytes, y, (what.batch, *what.out_size, what.filters), beside, stream
        )
        compared = images * what.out_size[0] * what.out_size[1] * what.filters
        outputs, changed = self._counts.to_host(self._stream).tolist()
        return Faults(outputs, compared, changed)


def _map(
    address: int, size: tuple[int, int], channels: int, strides: tuple[int, int, int] | None
) -> tuple[int, int, int, int]:
    """Address and bytes between images, rows and columns, as the step kernels take them."""
    image, row, column = strides or (size[0] * size[1] * channels, size[1] * channels, channels)
    return address, 2 * image, 2 * row, 2 * column
