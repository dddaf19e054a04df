"""NIfTI by nibabel: windows of uncompressed files, axes and spacing as the header has them, and the affine to carry on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError, size_text
from .pixels import Array, ArrayPixels, Origin, Stored, Window, check_pixels

AXES = "XYZTC"  # as they are stored; the fifth holds vectors
MAX_WHOLE_BYTES = 2**33  # of a compressed file, which is unpacked whole
# Micrometres per unit of length. Files that name none mean millimetres.
_UM = {"mm": 1e3, "micron": 1.0, "meter": 1e6, "unknown": 1e3}


def import_nibabel(error: type[Exception], name: object) -> Any:
    """nibabel; ``error`` where it is missing."""
    try:
        import nibabel
    except ImportError as missing:
        raise error(
            f"{name}: NIfTI is read and written by nibabel, which is missing; pip install 'unet-rt[nifti]'"
        ) from missing
    return nibabel


def open_nifti(path: Path, name: str) -> Stored:
    """ImageError for anything that cannot be read exactly as stored, or as its scale says."""
    nibabel = import_nibabel(ImageError, name)
    try:
        image = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
        stored = np.dtype(image.dataobj.dtype)
        scaled = not (image.dataobj.slope == 1 and image.dataobj.inter == 0)
        header, affine = image.header, image.affine
        units = str(header.get_xyzt_units()[0])
        zooms = [float(zoom) for zoom in header.get_zooms()]
    except Exception as error:  # headers hold any bytes; whatever the parser raises, the file is at fault
        raise ImageError(f"{name}: not a readable NIfTI file ({error}); copy it again from its source") from error
    if stored.names is not None:
        raise ImageError(f"{name}: pixels of {len(stored.names)} colours, which are not read; save them as grey or PNG")
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]  # a picture, or one volume of a series
    if len(shape) > len(AXES):
        raise ImageError(
            f"{name}: {len(shape)} axes ({size_text(shape)}), up to 5 are read; save the volume wanted alone"
        )
    dtype = stored.newbyteorder("=")
    if scaled:
        dtype = np.dtype(np.float32 if stored.itemsize <= 2 else np.float64)
    check_pixels(shape, dtype, name)
    notes = [f"scaled by {image.dataobj.slope:g}, {image.dataobj.inter:+g}"] if scaled else []
    pixels: Any = NiftiPixels(image, shape, dtype, name)
    if path.name.lower().endswith(".gz"):
        need = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if need > MAX_WHOLE_BYTES:
            raise ImageError(f"{name}: {need / 1e9:.1f} GB that are unpacked whole; unpack the file first (gunzip)")
        pixels = ArrayPixels(pixels.read(tuple(slice(0, n) for n in shape)))
        notes.append("unpacked whole")
    um = _UM.get(units, 1e3)
    sizes = {axis: zoom * um for axis, zoom in zip("XYZ", zooms, strict=False) if zoom > 0}
    tags = {
        "affine": tuple(map(tuple, affine.tolist())),
        "unit": units,
        "codes": (int(header["qform_code"]), int(header["sform_code"])),
    }
    return Stored(pixels, AXES[: len(shape)], Origin("nifti", tags=tags), pixel_size_um=sizes, notes=tuple(notes))


class NiftiPixels:
    """Voxels of an opened file, in the order of its axes."""

    def __init__(self, image: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
        self._image: Any = image
        self._rest = (0,) * (len(image.shape) - len(shape))
        self._name = name
        self.shape, self.dtype = shape, dtype

    def read(self, window: Window) -> Array:
        try:
            pixels = np.asarray(self._image.dataobj[(*window, *self._rest)])
        except Exception as error:  # gzip, the disk and nibabel have errors of their own
            raise ImageError(f"{self._name}: truncated or corrupt ({error}); copy it again from its source") from error
        return pixels.astype(self.dtype, copy=False)

    def close(self) -> None:
        self._image = None
