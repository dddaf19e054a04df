"""A file or folder, opened by what reads its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import ImageError
from .dicom import is_dicom_folder, open_dicom
from .formats import HEAD_BYTES, MICROSCOPES, kind_of, unknown_error
from .hdf5 import open_hdf5
from .mrc import open_mrc
from .nifti import open_nifti
from .pixels import MappedFile, MappedPixels, Origin, Stored, check_pixels, is_zarr, pick_level


def open_path(path: Path, name: str, level: int | None, series: int | str | None, inside: str | None = None) -> Stored:
    """A local image before its axes are read.

    Args:
        path: A file, or a folder that is an image: Zarr, a DICOM series.
        name: For messages.
        level: Of a pyramid.
        series: Of a file that holds several images.
        inside: Path of the array in an HDF5 file.

    Raises:
        ImageError: It cannot be read.
    """
    try:
        if path.is_dir():
            return _open_folder(path, name, level, series)
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if not head:
        raise ImageError(f"{name}: the file is empty (0 bytes); copy it again from its source")
    kind = kind_of(head, path)
    if kind is None:
        raise unknown_error(head, name)
    if inside is not None and kind != "hdf5":
        raise ImageError(f"{name}: no HDF5 file, so that nothing is called {inside} in it; leave that away")
    if kind in _WITH_SERIES:
        return _WITH_SERIES[kind](path, name, level, series)
    if kind in ("jp2", "vrt"):
        from .geo import open_by_rasterio

        return open_by_rasterio(path, name, level, kind)
    if kind == "zip":
        from .zarr import open_zip

        return open_zip(path, name, level)
    pick_level(level, 1, name)
    if kind == "hdf5":
        return open_hdf5(path, name, inside)
    return _PLAIN[kind](path, name)


def _open_folder(path: Path, name: str, level: int | None, series: int | str | None) -> Stored:
    if is_zarr(path):
        from .zarr import open_zarr

        return open_zarr(path, name, level)
    if is_dicom_folder(path):
        pick_level(level, 1, name)
        return open_dicom(path, name, series)
    raise ImageError(f"{path}: a folder, not an image; name the files in it")


def open_npy(path: Path, name: str) -> Stored:
    """An array that NumPy saved, mapped."""
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            offset = stream.tell()
            if not all(type(n) is int for n in shape):
                raise ValueError(f"its shape is {shape}")
    except Exception as error:  # the header is Python text: a damaged one raises whatever the tokenizer does
        raise ImageError(f"{name}: not a readable npy file ({error}); save it again with numpy.save") from error
    if dtype.hasobject:
        raise ImageError(f"{name}: holds pickled objects, which are never loaded; save a numeric array with numpy.save")
    check_pixels(shape, dtype.newbyteorder("="), name)
    mapped = MappedPixels(MappedFile(path, name), offset, shape, dtype, name, "F" if fortran else "C")
    return Stored(mapped, None, Origin("array"))


def _open_tiff(path: Path, name: str, level: int | None, series: int | str | None) -> Stored:
    from .tiff import open_tiff

    return open_tiff(path, name, level, series)


def _open_slide(path: Path, name: str, level: int | None, series: int | str | None) -> Stored:
    from .slide import open_slide

    return open_slide(path, name, level, series)


def _open_bioio(path: Path, name: str, level: int | None, series: int | str | None) -> Stored:
    from .bioio import open_bioio

    return open_bioio(path, name, level, series, *MICROSCOPES[path.suffix.lower()])


def _open_raster(path: Path, name: str) -> Stored:
    from .raster import open_raster

    return open_raster(path, name)


_WITH_SERIES: dict[str, Callable[[Path, str, int | None, int | str | None], Stored]] = {
    "tiff": _open_tiff,
    "slide": _open_slide,
    "bioio": _open_bioio,
}
_PLAIN: dict[str, Callable[[Path, str], Stored]] = {
    "npy": open_npy,
    "raster": _open_raster,
    "nifti": open_nifti,
    "mrc": open_mrc,
    "dicom": open_dicom,
}
