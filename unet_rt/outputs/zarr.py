"""OME-Zarr 0.5 (zarr 3; labels in 0.4 and zarr 2 where their image is), written block by block in any order, by any
number of processes.

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
from ..images.pixels import ZARR_METADATA, Array, Origin
from ..system.durable import Disk
from .labels import LabelPlace, image_levels
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
        over: LabelPlace | None = None,
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
            over: Of a label image: the image that it is to lie over, whose version and levels it gets.
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
        ours: dict[str, Any] = {
            "plane_shape": shape.plane_shape,
            "plane_axes": shape.plane_axes,
            "channels": shape.channels,
            "spatial": len(shape.spatial),
        }
        stored = [letters[i] for i in order]
        sides = [shape.full[i] for i in order]
        levels = None if over is None else image_levels(over, stored, sides)
        version = "0.5" if over is None else over.version
        if levels is not None:
            ours["levels"] = [levels.shape(k, stored) for k in range(len(levels.shapes))]
            ours["datasets"] = levels.datasets(stored)
        about: dict[str, Any] = {}
        if shape.channels == 0 and shape.dtype.kind in "iu":
            about["image-label"] = label_metadata(names or {}, None if over is None else version)
        elif shape.channels and names and highest is not None:
            about["omero"] = {"channels": [channel_metadata(k, names[k], highest) for k in range(shape.channels)]}
        with _guard(folder):
            if folder.exists() and any(folder.iterdir()):
                raise OutputError(f"{folder}: is there already and is not empty; choose another name")
            ome = zarr_metadata(stored, sizes, [1], about, version=version)
            group = zarr.create_group(
                folder,
                zarr_format=3 if over is None else over.zarr_format,
                attributes={**({"ome": ome} if version == "0.5" else ome), OURS: ours},
            )
            _create_level(group, 0, sides, [chunks[i] for i in order], shape.dtype, stored)
            Disk().sync_tree(_metadata_files(folder), folder)
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
            group = zarr.open_group(folder, mode="r+", use_consolidated=False)
            array = group["0"]
            ours = group.attrs[OURS]
            stored = tuple(axis["name"] for axis in _ome(group)["multiscales"][0]["axes"])
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
            group = zarr.open_group(self.folder, mode="r+", use_consolidated=False)
            ours, ome = group.attrs[OURS], _ome(group)
            shapes = ours.get("levels") or _halved_shapes(self._array.shape, stored)
            below, written = self._array, list[Path]()
            for level, shape in enumerate(shapes[1:], start=1):
                chunks = [min(c, n) for c, n in zip(self._array.chunks, shape, strict=True)]
                array = _create_level(group, level, shape, chunks, self.shape.dtype, stored)
                written += _reduce(below, array, self.folder / str(level - 1), self.folder / str(level))
                below = array
            about = {key: value for key, value in ome.items() if key in ("image-label", "omero")}
            made = zarr_metadata(
                stored, sizes_in(ome, stored), [2**level for level in range(len(shapes))], about, self.shape.dtype.kind,
                version="0.5" if "ome" in group.attrs else "0.4",
            )  # fmt: skip
            if "datasets" in ours:
                made["multiscales"][0]["datasets"] = ours["datasets"]
            group.attrs.update({"ome": made} if "ome" in group.attrs else made)
            if "levels" not in ours:  # labels are found by way of their image
                with warnings.catch_warnings():
                    # zarr warns that consolidated metadata are not in the specification of zarr 3; readers may ignore them.
                    warnings.simplefilter("ignore")
                    zarr.consolidate_metadata(group.store)
            for path in self.folder.rglob("*.partial"):  # of writers that were killed
                path.unlink()
            Disk().sync_tree([*written, *_metadata_files(self.folder)], self.folder)

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


def _ome(group: Any) -> Any:
    """What OME-Zarr says of a group: 0.5 in a part of its attributes, 0.4 among them."""
    return group.attrs.get("ome", group.attrs)


def _metadata_files(folder: Path) -> list[Path]:
    return [file for name in ZARR_METADATA for file in (folder / name, *folder.glob(f"*/{name}")) if file.is_file()]


def _halved_shapes(shape: Sequence[int], names: Sequence[str]) -> list[Sequence[int]]:
    """The levels of a pyramid whose Y and X are halved down to a thumbnail."""
    shapes = [shape]
    while max(n for n, name in zip(shapes[-1], names, strict=True) if name in "yx") > MAX_TOP_PX:
        shapes.append([-(-n // 2) if name in "yx" else n for n, name in zip(shapes[-1], names, strict=True)])
    return shapes


def _create_level(
    group: Any, level: int, shape: Sequence[int], chunks: Sequence[int], dtype: np.dtype[Any], names: Sequence[str]
) -> Any:
    old = group.metadata.zarr_format == 2
    if old:
        from numcodecs import Blosc

        # What zarr 2 took by itself: every reader of that time knows it.
        form = {"chunk_key_encoding": {"name": "v2", "separator": "/"}, "compressors": Blosc()}
    else:
        form = {"dimension_names": list(names)}
    return group.create_array(
        str(level),
        shape=tuple(shape),
        chunks=tuple(chunks),
        dtype=dtype,
        fill_value=0,
        config={"write_empty_chunks": dtype.kind == "f"},
        overwrite=level > 0,  # a pyramid that was interrupted is built anew
        **form,
    )


def _chunks(level: Path, array: Any, window: Sequence[slice]) -> Iterator[Path]:
    """Files of the chunks that a window touches, whether they are there or not."""
    ranges = [range(part.start // c, -(-part.stop // c)) for part, c in zip(window, array.chunks, strict=True)]
    under = level if array.metadata.zarr_format == 2 else level / "c"
    for index in itertools.product(*ranges):
        yield under.joinpath(*map(str, index))


def _reduce(fine: Any, coarse: Any, below: Path, level: Path) -> list[Path]:
    """Fills ``coarse`` chunk by chunk from the windows of ``fine`` that it makes smaller; the files of its chunks."""
    factors = [max(1, round(n / m)) for n, m in zip(fine.shape, coarse.shape, strict=True)]
    written = []
    for index in itertools.product(*(range(0, n, c) for n, c in zip(coarse.shape, coarse.chunks, strict=True))):
        stop = [min(i + c, n) for i, c, n in zip(index, coarse.chunks, coarse.shape, strict=True)]
        # Where sizes are no multiples, the last samples are repeated.
        source = [
            slice(min(a * f, n - 1), min(b * f, n)) for a, b, f, n in zip(index, stop, factors, fine.shape, strict=True)
        ]
        target = tuple(slice(a, b) for a, b in zip(index, stop, strict=True))
        if not any(path.exists() for path in _chunks(below, fine, source)):
            continue  # zeros, as what is missing in `coarse`
        pixels = np.asarray(fine[tuple(source)])
        if pixels.dtype.kind == "f":
            for axis, factor in enumerate(factors):
                pixels = _means(pixels, axis) if factor == 2 else pixels
        else:
            pixels = pixels[tuple(slice(None, None, f) for f in factors)]
        missing = [(0, b - a - n) for a, b, n in zip(index, stop, pixels.shape, strict=True)]
        coarse[target] = np.pad(pixels, missing, "edge") if any(n for _, n in missing) else pixels
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
