"""Arrays of any library as pixels: NumPy, DLPack, CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BackendError, ImageError
from .pixels import Array, ArrayPixels, LazyPixels, Pixels, Window, check_pixels

if TYPE_CHECKING:
    from ..kernels.memory import DeviceArray
    from ..kernels.stream import Stream


class DevicePixels:
    """Pixels on a GPU. Windows are copied to the host; ``array`` are all of them where they are.

    Attributes:
        array: The pixels.
        stream: The stream (cudaStream_t) on which they were made.
    """

    def __init__(self, array: DeviceArray, stream: int) -> None:
        self.array, self.stream = array, stream
        self.shape, self.dtype = array.shape, array.dtype
        self._copies: Stream | None = None

    def read(self, window: tuple[slice, ...]) -> Array:
        if self._copies is None:
            self._copies = self.array.device.stream()
            self._copies.after(self.stream)
        return self.array[window].to_host(self._copies)

    def close(self) -> None:
        self._copies = None


def array_pixels(image: Any, name: str) -> Pixels:
    """Pixels of an array in memory, on a GPU, or read by windows (h5py, zarr, Dask, ...); ImageError for anything else."""
    if not isinstance(image, np.ndarray):
        from ..kernels import device

        if device.is_device_array(image):
            try:
                array, stream = device.from_array(image, name)
            except BackendError as error:
                raise ImageError(str(error)) from error
            return DevicePixels(array, stream)
        shared = ("__dlpack__", "__array_interface__")
        if all(hasattr(image, a) for a in ("shape", "dtype", "__getitem__")) and not any(
            hasattr(image, a) for a in shared
        ):
            check_pixels(tuple(image.shape), np.dtype(image.dtype).newbyteorder("="), name)
            return LazyPixels(image, name)
    return ArrayPixels(_as_array(image, name))


def unmasked(image: Any) -> Callable[[Window], Array] | None:
    """Where a masked array holds data, by windows; None for other arrays, and where nothing is masked."""
    if not isinstance(image, np.ma.MaskedArray) or not np.ma.is_masked(image):
        return None
    mask = np.ma.getmaskarray(image)
    return lambda window: ~mask[window]


def _as_array(image: Any, name: str) -> Array:
    """Any array on the CPU as a NumPy array, without copying where possible."""
    if isinstance(image, np.ma.MaskedArray):
        image = image.data  # the mask is :func:`unmasked`
    if isinstance(image, np.ndarray):
        array: Array = np.asarray(image)
    elif hasattr(image, "__dlpack__"):
        device = image.__dlpack_device__()[0]
        if int(device) != 1:  # kDLCPU
            raise ImageError(
                f"{name}: the array lives on another device (DLPack type {int(device)}); move it to the CPU"
            )
        try:
            array = np.from_dlpack(image)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ImageError(f"{name}: cannot be shared by DLPack ({error}); pass a plain NumPy array") from error
    elif (
        hasattr(image, "__array_interface__")
        or isinstance(image, (memoryview, bytearray))
        or hasattr(image, "__array__")
    ):
        array = np.asarray(image)
    else:
        raise ImageError(f"{name}: {type(image).__name__} is no image; pass a path or an array")
    check_pixels(array.shape, array.dtype.newbyteorder("="), name)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
