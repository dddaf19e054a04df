"""HDF5 by h5py: one array of a file, ``vol.h5:/main``, with the axes and pixel size that ilastik and others write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError, size_text
from .pixels import Array, ChunkedPixels, LazyPixels, Origin, Pixels, Stored, Window, check_pixels

NAMED = 8  # arrays that an error names
_WITH_INSIDE = re.compile(r"(?P<file>.+\.(?:h5|hdf5|hdf|he5|ilp|nc|mat)):/?(?P<inside>.+)", re.IGNORECASE)


def split_inside(path: Path) -> tuple[Path, str | None]:
    """(file, path of an array in it) of ``vol.h5:/main``; (path, None) for any other."""
    found = None if path.exists() else _WITH_INSIDE.fullmatch(str(path))
    if found is None:
        return path, None
    file = Path(found["file"])
    return (file, "/" + found["inside"].replace("\\", "/")) if file.is_file() else (path, None)


def open_hdf5(path: Path, name: str, inside: str | None = None) -> Stored:
    """ImageError where the file is no HDF5, holds no such array, or several and none was named."""
    try:
        import h5py
    except ImportError as error:
        raise ImageError(f"{name}: HDF5 is read by h5py, which is missing; pip install 'unet-rt[hdf5]'") from error
    with ExitStack() as opened:
        try:
            file = opened.enter_context(h5py.File(path, "r"))
            array = _array_of(file, h5py.Dataset, name, inside)
            shape, dtype = tuple(int(n) for n in array.shape), np.dtype(array.dtype).newbyteorder("=")
            check_pixels(shape, dtype, name)
            axes = _axes(array)
            size = _sizes(array)
            pixels = _pixels(array, name, file.close)
        except ImageError:
            raise
        except Exception as error:  # the format's library has errors of its own beside OSError
            raise ImageError(f"{name}: not a readable HDF5 file ({error}); copy it again from its source") from error
        opened.pop_all()
    notes = () if inside is not None else (f"array {array.name}",)
    return Stored(pixels, axes, Origin("array"), pixel_size_um=size, notes=notes)


def _array_of(file: Any, kind: Any, name: str, inside: str | None) -> Any:
    found: list[Any] = []
    file.visititems(lambda _, item: found.append(item) if isinstance(item, kind) and item.ndim >= 2 else None)
    if inside is None and len(found) == 1:
        return found[0]
    named = next((item for item in found if item.name == inside), None)
    if named is not None:
        return named
    if not found:
        raise ImageError(f"{name}: the HDF5 file holds no array of two axes or more; check the file")
    listed = ", ".join(f"{item.name} ({size_text(item.shape)} {item.dtype})" for item in found[:NAMED])
    more = f", ... {len(found) - NAMED} more" if len(found) > NAMED else ""
    fact = f"holds {len(found)} arrays" if inside is None else f"holds no array {inside}; there are"
    raise ImageError(f"{name}: {fact}: {listed}{more}; name one, e.g. {name}:{found[0].name}")


class _GuardedArray:
    """An array whose chunks may be packed by a filter that is not installed."""

    def __init__(self, array: Any) -> None:
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, window: Window) -> Array:
        try:
            return np.asarray(self._array[window])
        except OSError as error:
            if "filter" not in str(error).lower():
                raise
            raise ImageError(
                f"packed by a filter that is not installed ({error}); pip install hdf5plugin, import it"
            ) from error


def _pixels(array: Any, name: str, close: Any) -> Pixels:
    guarded = _GuardedArray(array)
    if array.chunks is None:
        return _Contiguous(guarded, name, close)
    dtype = np.dtype(array.dtype)
    return ChunkedPixels(array.shape, dtype, array.chunks, name, lambda window: guarded[window], close)


class _Contiguous(LazyPixels):
    def __init__(self, array: Any, name: str, close: Any) -> None:
        super().__init__(array, name)
        self._close = close

    def close(self) -> None:
        super().close()
        self._close()


def _axes(array: Any) -> str | None:
    """Letters of all axes: by ilastik's ``axistags``, else by the labels of its dimensions; None where they say nothing."""
    letters: list[str] = []
    with suppress(Exception):  # anything may be called so
        text = array.attrs["axistags"]
        tags = json.loads(text.decode() if isinstance(text, bytes) else text)
        letters = [str(axis["key"]).upper() for axis in tags["axes"]]
    if not letters:
        letters = [str(dimension.label).upper() for dimension in array.dims]
    known = all(len(letter) == 1 and letter.isalpha() for letter in letters) and {"Y", "X"} <= set(letters)
    return "".join(letters) if known and len(set(letters)) == len(letters) == array.ndim else None


def _sizes(array: Any) -> Mapping[str, float]:
    """Micrometres by axis, of the attribute ``element_size_um`` (Z, Y, X)."""
    with suppress(Exception):
        values = [float(um) for um in np.asarray(array.attrs["element_size_um"]).ravel()]
        if values and all(um > 0 for um in values):
            return dict(zip("ZYX"[-len(values) :], values, strict=True))
    return {}
