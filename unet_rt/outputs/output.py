"""Outputs, written band by band under a temporary name and renamed when they are whole: .png, .tif, .npy.

Whatever happens in between (an error, SIGTERM, a full disk), the name asked for holds the whole output or what it held
before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import OutputError
from ..images.pixels import Array, Origin
from ..images.source import Source
from ..system.durable import Disk, part_path, parts_of, remove_dead_parts, remove_part
from .nifti import NiftiWriter, is_nifti
from .plain import NpyWriter, PngWriter
from .shape import Shape, Writer, size_of
from .tiff import PackedTiffWriter, PlainTiffWriter, extra_tags, tiff_form

SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".nii", ".nii.gz")


@dataclass
class Output:
    """An output being written. Bands of a plane arrive in order along the first spatial axis, at full width.

    ``commit`` makes the whole file appear under its name; leaving the ``with`` block without it, or ``abort``, leaves
    nothing behind.
    """

    path: Path
    shape: Shape
    _part: Path
    _writer: Writer
    _rows: dict[int, int] = field(default_factory=dict)
    _open: bool = True

    def write(self, plane: int, start: Sequence[int], block: Array) -> None:
        """Writes a band.

        Args:
            plane: Index of the plane.
            start: Its first sample along each spatial axis; all but the first are 0.
            block: (K, rows, ...), or (rows, ...) without a channel axis (a leading axis of 1 is accepted).

        Raises:
            OutputError: The disk is full or the file cannot be written; everything written is removed.
            ValueError: The block does not continue the plane.
        """
        if not self._open:
            raise ValueError(f"{self.path.name}: written to after it was closed")
        channels = max(1, self.shape.channels)
        if block.ndim == len(self.shape.spatial):
            block = block[None]
        rows = block.shape[1]
        row, done = int(start[0]), self._rows.get(plane, 0)
        expected = (channels, rows, *self.shape.spatial[1:])
        if (
            block.shape != expected
            or any(start[1:])
            or row != done
            or row + rows > self.shape.spatial[0]
            or not 0 <= plane < self.shape.planes
        ):
            raise ValueError(
                f"{self.path.name}: block {block.shape} at plane {plane}, {tuple(start)} does not continue row {done} "
                f"of {self.shape.spatial} x {channels} channels, {self.shape.planes} planes"
            )
        if block.dtype != self.shape.dtype:
            if not np.can_cast(block.dtype, self.shape.dtype, "safe"):
                raise ValueError(f"{self.path.name}: {block.dtype} block for a {self.shape.dtype} output")
            block = block.astype(self.shape.dtype)
        with self._guarded():
            self._writer.write(plane, row, block)
        self._rows[plane] = row + rows

    def commit(self) -> None:
        """Completes the file, makes it durable and gives it its name."""
        if not self._open:
            raise ValueError(f"{self.path.name}: already closed")
        missing = [p for p in range(self.shape.planes) if self._rows.get(p, 0) != self.shape.spatial[0]]
        if missing:
            self.abort()
            raise ValueError(f"{self.path.name}: {len(missing)} planes are not complete, plane {missing[0]} first")
        with self._guarded():
            self._writer.finish()
            self._writer.close()
            disk = Disk()
            disk.sync_file(self._part)
            disk.replace(self._part, self.path)
        self._open = False
        with contextlib.suppress(OSError):  # some file systems sync no folders
            disk.sync_folder(self.path.parent)

    def abort(self) -> None:
        """Removes what was written. Does nothing after ``commit`` or a second time."""
        if not self._open:
            return
        self._open = False
        try:
            # A writer that still has something to flush to a full disk says so; the file goes away all the same.
            with contextlib.suppress(OSError, ValueError):
                self._writer.close()
        finally:
            remove_part(self._part)

    def __del__(self) -> None:
        # An interruption may come before the ``with`` block that would remove the file has begun.
        if "_open" in vars(self):
            self.abort()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror or error}); nothing was left behind; free some "
                "space or choose another folder with --out"
            ) from error
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """What can be said before any work: suffix, existing file, folder.

    Raises:
        OutputError: The output would fail.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES and not is_nifti(path):
        raise OutputError(f"{path}: suffix {path.suffix!r} is not a format written here; use {', '.join(SUFFIXES)}")
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path}: a folder has this name; choose another name")
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist; create it, or choose another with --out")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; use --overwrite to replace it, or choose another name")
    remove_dead_parts(path)
    remove_part(_new_part(path))
    return path


def _new_part(path: Path) -> Path:
    try:
        return part_path(path)
    except OSError as error:
        raise OutputError(
            f"{path}: the folder cannot be written to ({error.strerror or error}); choose another with --out"
        ) from error


def open_output(
    path: str | os.PathLike[str],
    shape: Shape,
    *,
    source: Source | None = None,
    overwrite: bool = False,
    pixel_size_um: Sequence[float] | None = None,
    nodata: float | None = None,
) -> Output:
    """A file that takes a result band by band, and has its name only when it is whole.

    Args:
        path: ``.png`` (uint8 or uint16, one plane), ``.tif``/``.tiff`` (``.ome.tif`` for OME), ``.npy`` or ``.nii.gz``.
        shape: What is written; bool becomes uint8.
        source: The image; its pixel size and metadata are carried over.
        overwrite: Whether a file of that name is replaced.
        pixel_size_um: Where the output has another pixel size than the source, e.g. at another scale.
        nodata: What the caller writes where the source holds no data (see ``nodata_value``); TIFF declares it.

    Raises:
        OutputError: Before any work: unknown suffix, existing file, folder, dtype or shape that the format cannot hold.
    """
    target = check_output(path, overwrite=overwrite)
    what = replace(shape, dtype=np.dtype("uint8")) if shape.dtype == np.bool_ else shape
    suffix = target.suffix.lower()
    packed = suffix in (".tif", ".tiff") and what.dtype.kind in "iu"
    free = shutil.disk_usage(target.parent).free
    if suffix != ".png" and not packed and what.nbytes > free:
        raise OutputError(
            f"{target}: needs {what.nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {target.parent}; free some "
            "space or choose another folder with --out"
        )
    size = tuple(pixel_size_um) if pixel_size_um is not None else size_of(source, shape.spatial)
    origin = source.metadata if source is not None else Origin("array")
    writer: Writer
    part = _new_part(target)
    try:
        extra = extra_tags(source, what, nodata) if suffix in (".tif", ".tiff") else ()
        if suffix == ".png":
            writer = PngWriter(target, part, what, origin)
        elif suffix == ".npy":
            writer = NpyWriter(part, what)
        elif is_nifti(target):
            scale = (1.0,) * len(what.spatial)
            if source is not None and len(source.shape) == len(what.spatial):
                scale = tuple(n / m for n, m in zip(source.shape, what.spatial, strict=True))
            writer = NiftiWriter(target, part, what, origin, size, scale)
        elif packed:
            writer = PackedTiffWriter(part, what, tiff_form(target, what, origin, size, extra))
        else:
            writer = PlainTiffWriter(target, part, what, tiff_form(target, what, origin, size, extra))
        return Output(target, what, part, writer)
    except OSError as error:
        remove_part(part)
        raise OutputError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
    except BaseException:
        remove_part(part)
        raise


def remove_parts(path: Path) -> None:
    """Deletes what killed processes have left of an output; none may be at it."""
    for part in parts_of(path):
        part.unlink(missing_ok=True)
