"""OME-Zarr 0.5 (zarr 3), written block by block in any order, by any number of processes.

The folder holds the image at full size in the array ``0`` and, once it is finished, a pyramid of halved copies in
``1``, ``2``, ... Every chunk is one file, replaced as a whole; chunks of zeros are left out, as zarr has it, unless the
pixels are floating-point (where 0 and -0 are two values).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError
from ..images.pixels import Array, Origin
from ..system.durable import Disk
from .shape import Shape, ome_axes
from .zarr_metadata import (
    NO_DATA,
    channel_metadata,
    label_metadata,
    plane_sizes,
    sizes_in,
    spatial_sizes,
    zarr_metadata,
)

MAX_TOP_PX = 512  # the coarsest level is no larger along Y and X: a thumbnail
OURS = "unet-rt"  # key of what `open` needs to know and OME has no word for


@dataclass(frozen=True)
class ZarrOutput:
    """An OME-Zarr 0.5 image (zarr 3) being written block by block, by any number of processes.

    Attributes:
        folder: Where it is.
        shape: What is written.
        chunk: Samples per chunk along the spatial axes. Planes and channels lie in chunks of their own.
    """

    folder: Path
    shape: Shape
    chunk: tuple[int, ...]
    _letters: str  # of shape.axes, as OME has them: one of t, c, z, y, x each, in the order of shape.full
    _array: Any

    @classmethod
    def create(
        cls,
        folder: Path,
        shape: Shape,
        chunk: tuple[int, ...],
        origin: Origin,
        pixel_size_um: tuple[float, ...] | None,
        *,
        names: Mapping[int, str] | None = None,
        highest: float | None = None,
    ) -> ZarrOutput:
        """Lays out the image, all of its samples 0.

        Args:
            folder: Must not exist, or be an empty folder.
            shape: Masks of no channels and an integer dtype are marked as label images.
            chunk: Samples per chunk along the spatial axes, at most those of the image.
            origin: Of the source: pixel sizes along axes that ``pixel_size_um`` leaves out.
            pixel_size_um: Micrometres per sample along the spatial axes, None if not known.
            names: Of a label image: what its values mean, by value. Of channels: what they are, by index; they are named
                where ``highest`` is given.
            highest: Largest value that a channel may have, the smallest being 0: OME-Zarr names no channel without.

        Raises:
            OutputError: zarr is missing, the axes are more than OME-Zarr holds, or the folder cannot be written.
        """
        from ..images.zarr import import_zarr

        zarr = import_zarr(OutputError, folder)
        letters = ome_axes(shape.axes).lower()
        order = _order(letters)
        chunk = tuple(min(c, n) for c, n in zip(chunk, shape.spatial, strict=True))
        chunks = (1,) * (len(shape.full) - len(chunk)) + chunk
        known = plane_sizes(origin)
        sizes = {letter.lower(): known[letter] for letter in shape.plane_axes if letter in known}
        sizes |= spatial_sizes(pixel_size_um)
        ours = {
            "plane_shape": shape.plane_shape,
            "plane_axes": shape.plane_axes,
            "channels": shape.channels,
            "spatial": len(shape.spatial),
        }
        about: dict[str, Any] = {}
        if shape.channels == 0 and shape.dtype.kind in "iu":
            about["image-label"] = label_metadata(names or {})
        elif shape.channels and names and highest is not None:
            about["omero"] = {"channels": [channel_metadata(k, names[k], highest) for k in range(shape.channels)]}
        with _guard(folder):
            if folder.exists() and any(folder.iterdir()):
                raise OutputError(f"{folder}: is there already and is not empty; choose another name")
            group = zarr.create_group(
                folder,
                zarr_format=3,
                attributes={"ome": zarr_metadata([letters[i] for i in order], sizes, [1], about), OURS: ours},
            )
            _create_level(
                group, 0, [shape.full[i] for i in order], [chunks[i] for i in order], shape.dtype,
                [letters[i] for i in order],
            )  # fmt: skip
            Disk().sync_tree(folder.rglob("zarr.json"), folder)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> ZarrOutput:
        """One that ``create`` laid out.

        Raises:
            OutputError: There is none in this folder.
        """
        from ..images.zarr import import_zarr

        zarr = import_zarr(OutputError, folder)
        try:
            group = zarr.open_group(folder, mode="r+", zarr_format=3, use_consolidated=False)
            array = group["0"]
            ours = group.attrs[OURS]
            stored = tuple(array.metadata.dimension_names)
            plane_axes, channels = str(ours["plane_axes"]), int(ours["channels"])
            axes = plane_axes + ("C" if channels else "") + "ZYX"[-int(ours["spatial"]) :]
            letters = ome_axes(axes).lower()
            at = [stored.index(letter) for letter in letters]
        except (FileNotFoundError, KeyError, ValueError, TypeError) as error:
            raise OutputError(f"{folder}: not an OME-Zarr that was begun here ({error}); write it anew") from error
        spatial = int(ours["spatial"])
        full = [int(array.shape[i]) for i in at]
        shape = Shape(
            tuple(full[-spatial:]),
            tuple(int(n) for n in ours["plane_shape"]),
            plane_axes,
            channels,
            np.dtype(array.dtype).newbyteorder("="),
        )
        return cls(folder, shape, tuple(int(array.chunks[i]) for i in at[-spatial:]), letters, array)

    def write(self, plane: int, start: Sequence[int], block: Array) -> list[Path]:
        """Writes one block; blocks of different processes must not share a chunk, and the checks here see to it.

        Args:
            plane: Index of the plane.
            start: Its first sample along each spatial axis, a multiple of ``chunk``.
            block: (K, *spatial), or (*spatial,) without a channel axis. Each size is a multiple of ``chunk`` or ends
                with the image.

        Returns:
            The chunk files that hold it, some already complete before; to be synced, and their folders, before anything
            says that the block is done. Chunks of zeros have none.

        Raises:
            OutputError: The disk is full or the folder cannot be written.
            ValueError: The block does not lie on chunks.
        """
        if block.ndim == len(self.shape.spatial):
            block = block[None]
        stop = tuple(int(a) + n for a, n in zip(start, block.shape[1:], strict=True))
        self._check(plane, start, stop)
        aligned = all(
            a % c == 0 and (b % c == 0 or b == n)
            for a, b, c, n in zip(start, stop, self.chunk, self.shape.spatial, strict=True)
        )
        if not aligned or len(block) != max(1, self.shape.channels) or block.dtype != self.shape.dtype:
            raise ValueError(
                f"{self.folder.name}: block {block.shape} {block.dtype} at {tuple(start)} does not lie on chunks of "
                f"{self.chunk} of {self.shape.full} {self.shape.dtype}"
            )
        window = self._window(plane, start, stop)
        with _guard(self.folder):
            self._array[tuple(window)] = self._stored(block)
            return [path for path in _chunks(self.folder / "0", self._array, window) if path.exists()]

    def read(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        """What has been written, 0 elsewhere: (K, *spatial), or (*spatial,) without a channel axis."""
        self._check(plane, start, stop)
        with _guard(self.folder):
            pixels = np.asarray(self._array[tuple(self._window(plane, start, stop))])
        order = _order(self._letters)
        moved = pixels.transpose([order.index(i) for i in range(len(order))])
        return moved.reshape(moved.shape[len(self.shape.plane_shape) :])

    def finish(self) -> None:
        """Adds the pyramid and its metadata. May be repeated, e.g. after it was interrupted.

        Each level halves Y and X of the one before: labels take every second sample, floating-point values the mean.
        Memory: four chunks at a time.

        Raises:
            OutputError: The disk is full or the folder cannot be written.
        """
        from ..images.zarr import import_zarr

        zarr = import_zarr(OutputError, self.folder)
        stored = [self._letters[i] for i in _order(self._letters)]
        with _guard(self.folder):
            group = zarr.open_group(self.folder, mode="r+", zarr_format=3, use_consolidated=False)
            level, factors, below = 0, [1], self._array
            written: list[Path] = []
            while max(n for n, letter in zip(below.shape, stored, strict=True) if letter in "yx") > MAX_TOP_PX:
                level += 1
                folders = self.folder / str(level - 1), self.folder / str(level)
                halved = [2 if letter in "yx" else 1 for letter in stored]
                shape = [-(-n // f) for n, f in zip(below.shape, halved, strict=True)]
                chunks = [min(c, n) for c, n in zip(self._array.chunks, shape, strict=True)]
                array = _create_level(group, level, shape, chunks, self.shape.dtype, stored)
                written += _halve(below, array, halved, *folders)
                factors.append(2**level)
                below = array
            sizes = sizes_in(group.attrs["ome"], stored)
            about = {key: value for key, value in group.attrs["ome"].items() if key in ("image-label", "omero")}
            ome = zarr_metadata(stored, sizes, factors, about, self.shape.dtype.kind)
            group.attrs["ome"] = ome
            with warnings.catch_warnings():
                # zarr warns that consolidated metadata are not in the specification of zarr 3; readers may ignore them.
                warnings.simplefilter("ignore")
                zarr.consolidate_metadata(group.store)
            for path in self.folder.rglob("*.partial"):  # of writers that were killed
                path.unlink()
            written += [self.folder / "zarr.json", *self.folder.glob("*/zarr.json")]
            Disk().sync_tree(written, self.folder)

    def _check(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> None:
        inside = all(0 <= a <= b <= n for a, b, n in zip(start, stop, self.shape.spatial, strict=True))
        if not inside or not 0 <= plane < self.shape.planes:
            raise ValueError(
                f"{self.folder.name}: {tuple(start)} to {tuple(stop)} of plane {plane} is not inside "
                f"{self.shape.planes} planes of {self.shape.spatial}"
            )

    def _window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> list[slice]:
        """Of the stored array."""
        index = np.unravel_index(plane, self.shape.plane_shape or (1,))[: len(self.shape.plane_shape)]
        window = [slice(int(i), int(i) + 1) for i in index]
        if self.shape.channels:
            window.append(slice(0, self.shape.channels))
        window += [slice(int(a), int(b)) for a, b in zip(start, stop, strict=True)]
        return [window[i] for i in _order(self._letters)]

    def _stored(self, block: Array) -> Array:
        """(K, *spatial) -> all axes of the stored array."""
        if not self.shape.channels:
            block = block[0]
        full = block.reshape((1,) * len(self.shape.plane_shape) + block.shape)
        return full.transpose(_order(self._letters))


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or error}); free some space or choose another folder"
        ) from error


def _order(letters: str) -> list[int]:
    """Positions of the axes in the order that OME wants: time, channel, space."""
    return sorted(range(len(letters)), key=lambda i: "tczyx".index(letters[i]))


def _create_level(
    group: Any, level: int, shape: Sequence[int], chunks: Sequence[int], dtype: np.dtype[Any], names: Sequence[str]
) -> Any:
    return group.create_array(
        str(level),
        shape=tuple(shape),
        chunks=tuple(chunks),
        dtype=dtype,
        fill_value=0,
        dimension_names=list(names),
        config={"write_empty_chunks": dtype.kind == "f"},
        overwrite=level > 0,  # a pyramid that was interrupted is built anew
    )


def _chunks(level: Path, array: Any, window: Sequence[slice]) -> Iterator[Path]:
    """Files of the chunks that a window touches, whether they are there or not."""
    ranges = [range(part.start // c, -(-part.stop // c)) for part, c in zip(window, array.chunks, strict=True)]
    for index in itertools.product(*ranges):
        yield level.joinpath("c", *map(str, index))


def _halve(fine: Any, coarse: Any, factors: Sequence[int], below: Path, level: Path) -> list[Path]:
    """Fills ``coarse`` chunk by chunk from the windows of ``fine`` that it halves; the files of its chunks."""
    written = []
    for index in itertools.product(*(range(0, n, c) for n, c in zip(coarse.shape, coarse.chunks, strict=True))):
        stop = [min(i + c, n) for i, c, n in zip(index, coarse.chunks, coarse.shape, strict=True)]
        source = [slice(a * f, min(b * f, n)) for a, b, f, n in zip(index, stop, factors, fine.shape, strict=True)]
        target = tuple(slice(a, b) for a, b in zip(index, stop, strict=True))
        if not any(path.exists() for path in _chunks(below, fine, source)):
            continue  # zeros, as what is missing in `coarse`
        pixels = np.asarray(fine[tuple(source)])
        if pixels.dtype.kind == "f":
            for axis, factor in enumerate(factors):
                pixels = _means(pixels, axis) if factor == 2 else pixels
        else:
            pixels = pixels[tuple(slice(None, None, f) for f in factors)]
        coarse[target] = pixels
        written += [path for path in _chunks(level, coarse, target) if path.exists()]
    return written


def _means(pixels: Array, axis: int) -> Array:
    """Means of neighbouring pairs along an axis; a last one without a neighbour stays."""
    n = pixels.shape[axis]
    even = np.take(pixels, range(0, n, 2), axis)
    odd = np.take(pixels, [min(i + 1, n - 1) for i in range(0, n, 2)], axis)
    return (even * 0.5 + odd * 0.5).astype(pixels.dtype)


# --- metadata -------------------------------------------------------------------------------------------------------


__all__ = ["NO_DATA", "ZarrOutput"]
