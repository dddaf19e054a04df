"""MRC by mrcfile: pictures, stacks and volumes of electron microscopes, mapped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError
from .pixels import MappedFile, MappedPixels, Origin, Stored, check_pixels

UM_PER_ANGSTROM = 1e-4


def open_mrc(path: Path, name: str) -> Stored:
    """ImageError for anything that cannot be read exactly as stored."""
    try:
        import mrcfile
    except ImportError as error:
        raise ImageError(f"{name}: MRC is read by mrcfile, which is missing; pip install 'unet-rt[mrc]'") from error
    try:
        with warnings.catch_warnings(), mrcfile.open(path, permissive=True, header_only=True) as opened:
            warnings.simplefilter("ignore")
            header: Any = opened.header
            dtype = np.dtype(mrcfile.utils.data_dtype_from_header(header))
            shape = tuple(int(n) for n in mrcfile.utils.data_shape_from_header(header))
            order = [int(header[key]) for key in ("maps", "mapr", "mapc")]  # slowest axis first
            voxel, stack = opened.voxel_size, int(header.ispg) == 0
            sizes = {axis: float(voxel[axis.lower()]) * UM_PER_ANGSTROM for axis in "XYZ"}
            offset = 1024 + int(header.nsymbt)
    except Exception as error:  # headers hold any bytes; whatever the parser raises, the file is at fault
        raise ImageError(f"{name}: not a readable MRC file ({error}); copy it again from its source") from error
    check_pixels(shape, dtype.newbyteorder("="), name)
    letters = "".join(" XYZ"[n] for n in order) if sorted(order) == [1, 2, 3] else "ZYX"
    axes = ("T" if len(shape) == 4 else "") + letters
    if stack and letters == "ZYX":
        axes = "IYX"  # pictures of one thing after the other
    axes = axes[-len(shape) :]
    pixels = MappedPixels(MappedFile(path, name), offset, shape, dtype, name)
    known = {axis: um for axis, um in sizes.items() if um > 0 and axis in axes}
    return Stored(pixels, axes, Origin("array"), pixel_size_um=known)
