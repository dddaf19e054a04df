"""NIfTI files: voxels in the place of their source, row by row, packed at the end where the name ends in .gz."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError, size_text
from ..images.nifti import import_nibabel
from ..images.pixels import Array, Origin
from .plain import write_all
from .shape import Shape

OFFSET = 352  # of the voxels behind the header
COMPRESSION_LEVEL = 3
MM = 1e3  # micrometres


def is_nifti(path: Path) -> bool:
    """Whether an output is named as NIfTI."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


class NiftiWriter:
    """One file. Its order of axes is X, Y, Z, T and then channels, X changing first."""

    def __init__(
        self, path: Path, part: Path, shape: Shape, origin: Origin, size: Sequence[float] | None, scale: Sequence[float]
    ) -> None:
        """``size``: micrometres per sample, ``scale``: pixels of the source per sample, along (Z,) Y, X."""
        nibabel = import_nibabel(OutputError, path)
        self._shape, self._part, self._packed = shape, part, path.name.lower().endswith(".gz")
        self._axes = _file_axes(shape, path)  # slowest first
        sizes = dict(zip(shape.axes, shape.full, strict=True))
        stored = [sizes[axis] for axis in self._axes]
        header = nibabel.Nifti1Header()
        header.set_data_dtype(shape.dtype)
        dims = stored[::-1]
        if shape.channels:  # vectors are the fifth axis
            dims = [*dims[:-1], *(1,) * (5 - len(dims)), dims[-1]]
        try:
            header.set_data_shape(dims)
        except nibabel.spatialimages.HeaderDataError as error:
            raise OutputError(f"{path}: NIfTI does not hold {size_text(dims)} samples ({error}); use .tif") from error
        self._place(header, origin, size, scale)
        header["vox_offset"] = OFFSET
        header["descrip"] = b"unet-rt"
        self._stream: Any = tempfile.TemporaryFile(dir=part.parent) if self._packed else part.open("wb")  # noqa: SIM115
        self._stream.write(header.binaryblock.ljust(OFFSET, b"\0"))
        self._stream.truncate(OFFSET + shape.nbytes)
        if self._packed:
            part.touch()
        self._strides = _strides(self._axes, sizes, shape.dtype.itemsize)

    def _place(self, header: Any, origin: Origin, size: Sequence[float] | None, scale: Sequence[float]) -> None:
        """Where voxels lie: as the source says, else their size alone."""
        if "affine" in origin.tags:
            affine = np.array(origin.tags["affine"], float)
            steps = np.ones(3)
            steps[: len(scale)] = scale[::-1]
            # The first sample lies in the middle of the pixels that it stands for.
            affine[:3, 3] += affine[:3, :3] @ ((steps - 1) / 2)
            affine[:3, :3] *= steps
            # Zooms and the quaternion follow the affine, as programs read one or the other.
            quaternion, matrix = origin.tags["codes"]
            header.set_qform(affine, code=quaternion, strip_shears=True)
            header.set_sform(affine, code=matrix)
            header.set_xyzt_units(origin.tags["unit"])
        elif size is not None:
            mm = [um / MM for um in size[::-1]]
            affine = np.diag([*mm, *(1.0,) * (3 - len(mm)), 1.0])
            header.set_sform(affine, code=0)
            header.set_qform(affine, code=0)
            header.set_xyzt_units("mm")

    def write(self, plane: int, row: int, block: Array) -> None:
        shape = self._shape
        index = dict(zip(shape.plane_axes, np.unravel_index(plane, shape.plane_shape or (1,)), strict=False))
        begin = OFFSET + sum(int(index[axis]) * self._strides[axis] for axis in shape.plane_axes)
        first = "ZYX"[-len(shape.spatial)]
        for channel, rows in enumerate(block):
            at = begin + (channel * self._strides["C"] if shape.channels else 0) + row * self._strides[first]
            self._stream.seek(at)
            write_all(self._stream, np.ascontiguousarray(rows, shape.dtype.newbyteorder("<")))

    def finish(self) -> None:
        self._stream.flush()
        if self._packed:
            self._stream.seek(0)
            with self._part.open("wb") as raw, gzip.GzipFile("", "wb", COMPRESSION_LEVEL, raw, mtime=0) as packed:
                shutil.copyfileobj(self._stream, packed, 2**20)

    def close(self) -> None:
        self._stream.close()


def _file_axes(shape: Shape, path: Path) -> str:
    """The result's axes as the file orders them, slowest first: channels, one sequence, Z, Y, X."""
    space = "ZYX"[-len(shape.spatial) :]
    others = [axis for axis in shape.plane_axes if axis != "Z"]
    if len(others) > 1:
        raise OutputError(f"{path}: NIfTI holds one axis beside space and channels, this is {shape.axes}; use .tif")
    depth = "Z" if "Z" in shape.plane_axes else ""
    return ("C" if shape.channels else "") + "".join(others) + depth + space


def _strides(axes: str, sizes: dict[str, int], itemsize: int) -> dict[str, int]:
    """Bytes from one sample to the next along each axis."""
    strides, step = {}, itemsize
    for axis in reversed(axes):
        strides[axis] = step
        step *= sizes[axis]
    return strides
