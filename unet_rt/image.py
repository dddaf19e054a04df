"""Windows of an image, whatever its storage: arrays, npy, TIFF, Zarr, whole slides, PNG, JPEG, here or behind a URL.

``open_image`` reads the header and decides how the axes and channels are meant (``axes``); pixels are read by windows,
as they are needed where the format allows it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .axes import Choice, Layout, choose_channels, parse_channels, read_axes
from .contract.contract import Contract
from .errors import BackendError, ContractError, ImageError, size_text
from .levels import Sizes, fine_enough, level_of_size, level_sizes, parse_level
from .pixels import (
    Array,
    ArrayPixels,
    LazyPixels,
    MappedFile,
    MappedPixels,
    Origin,
    Pixels,
    Stored,
    check_pixels,
    is_zarr,
    pick_level,
)

if TYPE_CHECKING:
    from .kernels.device import Device, DeviceArray, Stream


SLIDES = (".svs", ".ndpi", ".scn", ".bif", ".mrxs", ".vms", ".vmu", ".svslide")  # whole slides: the suffix decides
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".btf", ".tf8", ".npy", *SLIDES)
BAND_SAMPLES = 2**22  # samples read at a time where a whole image is gone through: 8 MiB of uint16

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_MAGIC = b"\x93NUMPY"
_FOREIGN = (  # first bytes of what people try, and what to do about it
    (b"\x89HDF", "an HDF5 file", "open it with h5py and pass the array, or save it as .npy"),
    (b"PK\x03\x04", "a zip archive (npz?)", "save the array as .npy"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"%PDF", "a PDF", "export the picture as PNG"),
    (b"\x00\x00\x00\x0cjP", "JPEG 2000", "convert it to TIFF or PNG"),
    (b"GIF8", "a GIF", "convert it to PNG"),
    (b"RIFF", "WebP or AVI", "convert it to PNG"),
    (b"<", "text (HTML or XML)", "check what was downloaded"),
    (b"version https://git-lfs", "a git-lfs pointer, not the picture", "run `git lfs pull`"),
)


class Source:
    """An opened image: ``planes`` pictures (or volumes) of ``channels`` channels and the same spatial shape.

    Attributes:
        name: For messages: the file's name, or ``"array"``.
        path: The file or Zarr folder, None for arrays and URLs.
        axes: Axes as stored, e.g. ``"TCZYX"``.
        shape: (Y, X) or (Z, Y, X).
        channels: Channels that the network gets.
        dtype: Of the pixels that ``read`` returns.
        planes: Pictures in the image.
        plane_shape, plane_axes: The plane axes that ``planes`` flattens (last one fastest), e.g. (12, 31) and "TZ".
        reading: One line: how axes and channels were read.
        pixel_size_um: Micrometres per pixel along the spatial axes; None where not known for all of them.
        metadata: Where the pixels come from, for the output.
        gaps: Whether pixels may hold no data; see :meth:`valid`.
        levels: Spatial shapes of all levels of a pyramid, finest first; empty where there is one level.
        level: The level that is read.
        nodata: The value of pixels that hold no data, None where none is declared; see :meth:`valid`.
        device, stream: The GPU on which the pixels lie, None if they do not, and the stream (cudaStream_t) on which they
            were made. ``read`` copies to the host.
        on_device: :meth:`device_plane` gives the pixels where they lie; luma and channels in no even order it does not.
    """

    def __init__(self, name: str, path: Path | None, stored: Stored, layout: Layout, choice: Choice) -> None:
        self.name = name
        self.path = path
        self.axes = layout.axes
        self.shape = layout.space
        self.channels = 1 if choice.luma else len(choice.channels)
        self.dtype = np.dtype("uint8") if stored.pixels.dtype == np.bool_ else stored.pixels.dtype
        self.planes = layout.plane_count
        self.plane_shape = layout.plane_shape
        self.plane_axes = layout.plane_axes
        self.metadata = stored.origin
        self.levels = tuple(tuple(shape[i] for i in layout.spatial) for shape in stored.levels)
        self.level = stored.level
        self.nodata = stored.nodata
        sizes = [stored.pixel_size_um.get("ZYX"[-len(self.shape) :][i]) for i in range(len(self.shape))]
        self.pixel_size_um = tuple(s for s in sizes if s is not None) if None not in sizes else None
        self._pixels = stored.pixels
        self._valid = stored.valid
        self.gaps = stored.valid is not None or stored.nodata is not None
        self._files = tuple((file, _state(file, name)) for file in stored.files)
        self._fingerprint = dict(stored.fingerprint)
        self._layout = layout
        self._choice = choice
        on_gpu = isinstance(stored.pixels, DevicePixels)
        self.on_device = on_gpu and not choice.luma and _step(choice.channels) is not None
        self.device: Device | None = stored.pixels.array.device if isinstance(stored.pixels, DevicePixels) else None
        self.stream = stored.pixels.stream if isinstance(stored.pixels, DevicePixels) else 0
        notes = "; ".join((*layout.notes, *stored.notes))
        self.reading = (
            f"{name} {layout.axes} {size_text(layout.shape)} {stored.pixels.dtype.name}: {choice.text}, "
            f"{len(self.shape)}-D network over {self.planes} plane{'s' if self.planes != 1 else ''}"
            f"{f' ({notes})' if notes else ''}"
        )

    def read(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        """Pixels [start, stop) of one plane: (C, *spatial), any strides; possibly a view, so do not write into it.

        Called from one thread at a time.
        """
        window = self._window(plane, start, stop)
        if any(low == high for low, high in zip(start, stop, strict=True)):
            return np.empty((self.channels, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
        with self._guarded(plane, start, stop):
            if self._choice.luma:
                return _luma(self._channels(window, (0, 1, 2)))[None]
            return self._channels(window, self._choice.channels)

    def valid(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> NDArray[np.bool_] | None:
        """Which pixels [start, stop) of one plane hold data: (*spatial); None where all of them do.

        By the mask that the file holds, else by its nodata value: a pixel without data has it in all stored channels.
        Called from the thread that reads.
        """
        window = self._window(plane, start, stop)
        if not self.gaps or any(low == high for low, high in zip(start, stop, strict=True)):
            return None
        if self._layout.channel is not None:
            window[self._layout.channel] = slice(0, self._layout.channels)
        with self._guarded(plane, start, stop):
            if self._valid is not None:
                mask = self._arrange(self._valid(tuple(window))).view(np.bool_)[0]
            else:
                mask = self._holds_data(self._arrange(self._pixels.read(tuple(window))))
        return None if bool(mask.all()) else mask

    def read_valid(
        self, plane: int, start: Sequence[int], stop: Sequence[int]
    ) -> tuple[Array, NDArray[np.bool_] | None]:
        """What :meth:`read` and :meth:`valid` give; where one value means "no data", from the same pixels, read once."""
        empty = any(low == high for low, high in zip(start, stop, strict=True))
        if empty or not self.gaps or self._valid is not None:
            return self.read(plane, start, stop), self.valid(plane, start, stop)
        window = self._window(plane, start, stop)
        if self._layout.channel is not None:
            window[self._layout.channel] = slice(0, self._layout.channels)
        with self._guarded(plane, start, stop):
            every = self._arrange(self._pixels.read(tuple(window)))
            mask = self._holds_data(every)
            if self._choice.luma:
                pixels = _luma(every[:3])[None]
            elif self._layout.channel is None:
                pixels = np.broadcast_to(every, (len(self._choice.channels), *every.shape[1:]))
            else:
                pixels = every if self._takes_all else every[list(self._choice.channels)]
        return pixels, None if bool(mask.all()) else mask

    @property
    def _takes_all(self) -> bool:
        """Whether the network gets all stored channels as they are."""
        return self._choice.channels == tuple(range(self._layout.channels))

    def _holds_data(self, pixels: Array) -> NDArray[np.bool_]:
        """(C, *spatial) of all stored channels -> (*spatial): where one of them is not the nodata value."""
        nodata = self.nodata
        return np.asarray((~np.isnan(pixels) if nodata != nodata else pixels != nodata).any(axis=0), np.bool_)

    def fingerprint(self) -> dict[str, Any] | None:
        """What tells this image from others and from itself after a change, as JSON; None for an array.

        A file: path, size, time of its last change, level; a Zarr: path or URL, level, and a hash of its metadata. No pixel
        is read, so that a chunk of a Zarr that was replaced goes unnoticed.
        """
        return dict(self._fingerprint) or None

    @contextlib.contextmanager
    def _guarded(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> Iterator[None]:
        """Names the window in errors of its pixels, and notices where the file is no longer the one opened."""
        for file, state in self._files:
            if _state(file, self.name) != state:
                raise ImageError(f"{file}: changed while it was being read; start again when nothing writes to it")
        try:
            yield
        except ImageError as error:
            place = f"plane {plane}, " if self.planes > 1 else ""
            raise ImageError(f"{error} ({place}window {_numbers(start)} to {_numbers(stop)})") from error

    def _window(self, plane: int, start: Sequence[int], stop: Sequence[int]) -> list[slice]:
        """Of the stored axes; the first channel."""
        if not 0 <= plane < self.planes:
            raise ImageError(f"{self.name}: plane {plane} does not exist; the image has {self.planes}")
        if any(not 0 <= a <= b <= n for a, b, n in zip(start, stop, self.shape, strict=True)):
            raise ImageError(
                f"{self.name}: window {tuple(start)} to {tuple(stop)} is not inside the image ({size_text(self.shape)})"
            )
        window = [slice(0, 1)] * len(self._layout.shape)
        for position, index in zip(
            self._layout.planes, np.unravel_index(plane, self.plane_shape or (1,)), strict=False
        ):
            window[position] = slice(int(index), int(index) + 1)
        for position, low, high in zip(self._layout.spatial, start, stop, strict=True):
            window[position] = slice(int(low), int(high))
        return window

    def device_plane(self, plane: int) -> DeviceArray:
        """All pixels of one plane of an image on a GPU, (C, *spatial), any strides; a view of the caller's memory."""
        layout, pixels = self._layout, self._pixels
        if not isinstance(pixels, DevicePixels) or not self.on_device:
            raise ImageError(f"{self.name} does not lie on a GPU; read() it")
        front = layout.planes if layout.channel is None else (*layout.planes, layout.channel)
        view = pixels.array.transpose(*front, *layout.spatial)
        for index in np.unravel_index(plane, self.plane_shape or (1,))[: len(layout.planes)]:
            view = view[int(index)]
        if view.dtype == np.bool_:
            view = view.view(np.uint8)
        wanted = self._choice.channels
        if layout.channel is None:
            return view[None].repeat_first(len(wanted))
        step = _step(wanted) or 0
        if step == 0:
            return view[wanted[0] : wanted[0] + 1].repeat_first(len(wanted))
        stop = wanted[-1] + (1 if step > 0 else -1)
        return view[wanted[0] : None if stop < 0 else stop : step]

    def _channels(self, window: list[slice], wanted: tuple[int, ...]) -> Array:
        """The wanted stored channels of a window, (C, *spatial)."""
        position = self._layout.channel
        if position is None:
            pixels = self._arrange(self._pixels.read(tuple(window)))
            return np.broadcast_to(pixels, (len(wanted), *pixels.shape[1:]))
        step = wanted[1] - wanted[0] if len(wanted) > 1 else 1
        if list(wanted) == [wanted[0] + i * step for i in range(len(wanted))] and abs(step) == 1:
            window[position] = slice(min(wanted), max(wanted) + 1)
            return self._arrange(self._pixels.read(tuple(window)))[::step]
        distinct = {}
        for channel in sorted(set(wanted)):
            window[position] = slice(channel, channel + 1)
            distinct[channel] = self._arrange(self._pixels.read(tuple(window)))[0]
        if len(distinct) == 1:
            only = distinct[wanted[0]]
            return np.broadcast_to(only, (len(wanted), *only.shape))
        return np.stack([distinct[channel] for channel in wanted])

    def _arrange(self, pixels: Array) -> Array:
        """All stored axes -> (C, *spatial), without copying."""
        layout = self._layout
        front = layout.planes if layout.channel is None else (*layout.planes, layout.channel)
        moved = pixels.transpose(*front, *layout.spatial)
        for _ in layout.planes:
            moved = moved[0]
        if layout.channel is None:
            moved = moved[None]
        return moved.view(np.uint8) if moved.dtype == np.bool_ else moved

    def bands(self, samples: int = BAND_SAMPLES) -> Iterator[tuple[int, int, int]]:
        """(plane, start, stop) of bands along the first spatial axis that together are the whole image."""
        rows = max(1, samples // max(1, math.prod(self.shape[1:]) * self.channels))
        for plane in range(self.planes):
            for start in range(0, self.shape[0], rows):
                yield plane, start, min(start + rows, self.shape[0])

    def read_band(self, plane: int, start: int, stop: int) -> Array:
        """Rows [start, stop) of the first spatial axis, all of the others: (C, rows, ...)."""
        rest = self.shape[1:]
        return self.read(plane, (start, *(0 for _ in rest)), (stop, *rest))

    def close(self) -> None:
        self._pixels.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Source {self.reading}>"


def open_image(
    image: Any,
    contract: Contract,
    *,
    axes: str | None = None,
    channels: Sequence[int] | str | None = None,
    spatial: int = 2,
    network_channels: int | None = None,
    name: str | None = None,
    level: int | str | None = None,
    pixel_size_um: Sequence[float] = (),
    wanted_um: Sequence[float] = (),
) -> Source:
    """Opens an image for a network.

    Args:
        image: A path, a URL (``s3://...``, ``https://...``), a NumPy array, anything with DLPack (on the CPU),
            ``__array_interface__`` or a buffer, or an array that is read by windows (h5py, zarr, Dask, ...).
        contract: Its channel names and their number are used.
        axes: The user's declaration, one letter per stored axis.
        channels: The user's choice: indices, names, or ``"luma"``; text is parsed.
        spatial: Spatial axes of the network, 2 or 3.
        network_channels: Channels of the network; default: as many as the contract names, else whatever the image has.
        name: For messages, where ``image`` is an array.
        level: Of a pyramid (Zarr, TIFF, whole slide): its number, 0 being the finest, or the size of its pixels as text,
            e.g. ``"0.5um"``; default 0.
        pixel_size_um: Of the finest level along the spatial axes, in place of what the file says; one number stands for
            all axes.
        wanted_um: Pixel size that the image is to be brought to: without ``level``, the coarsest level is read whose pixels
            are at least as fine.

    Raises:
        ImageError: It cannot be read, or has no such level.
        ContractError: It can be read in two ways, or in none that fits the network.
    """
    asked = parse_level(level)
    name, path, stored = _opened(image, name, asked if isinstance(asked, int) else None)
    try:
        check_pixels(stored.pixels.shape, stored.pixels.dtype, name)
        wanted = network_channels if network_channels is not None else (len(contract.channels) or None)
        selection = parse_channels(channels) if isinstance(channels, str) else channels
        layout = _layout(name, stored, axes, selection, spatial, wanted)
        sizes = _sizes(name, stored, layout, pixel_size_um)
        picked = stored.level
        if isinstance(asked, float):
            picked = level_of_size(asked, sizes, name)
        elif asked is None and wanted_um:
            picked = fine_enough(wanted_um, sizes)
        if picked == stored.level:
            if pixel_size_um:
                stored = replace(stored, pixel_size_um=dict(zip("ZYX"[-spatial:], sizes[picked], strict=True)))
            return _arranged(name, path, stored, layout, contract, selection, wanted)
    except BaseException:
        stored.pixels.close()
        raise
    stored.pixels.close()
    return open_image(
        image, contract, axes=axes, channels=channels, spatial=spatial, network_channels=network_channels, name=name,
        level=picked, pixel_size_um=pixel_size_um,
    )  # fmt: skip


def _opened(image: Any, name: str | None, level: int | None) -> tuple[str, Path | None, Stored]:
    """(name for messages, path of a file or folder, the image before its axes are read)."""
    path: Path | None = None
    if isinstance(image, str) and is_url(image):
        from .image_url import open_url

        name = image.rstrip("/").rpartition("/")[2] or image
        stored = open_url(image, name, level)
    elif isinstance(image, (str, os.PathLike)):
        path = Path(image)
        name = path.name or str(path)
        stored = _open_path(path, name, level)
        if not stored.files:
            stored = replace(stored, files=(path,))
        if not stored.fingerprint:
            size, changed = _state(path, name)
            state = {"path": str(path.resolve()), "size": size, "mtime_ns": changed, "level": level or 0}
            stored = replace(stored, fingerprint=state)
    else:
        name = name or "array"
        pick_level(level, 1, name)
        stored = Stored(_array_pixels(image, name), None, Origin("array"))
    return name, path, replace(stored, level=level or 0)


def _layout(
    name: str,
    stored: Stored,
    axes: str | None,
    selection: Sequence[int] | str | None,
    spatial: int,
    wanted: int | None,
) -> Layout:
    least = 0
    if selection is not None:
        least = (3 if selection == "luma" else 2) if isinstance(selection, str) else max(selection, default=0) + 1
    # A choice of channel 0 alone repeats grey; it does not say that there is a channel axis.
    return read_axes(
        stored.pixels.shape,
        name=name,
        spatial=spatial,
        found=stored.axes,
        given=axes,
        wanted=wanted if least <= 1 and selection is None else (1 if least <= 1 else None),
        least=least if least > 1 else 0,
    )


def _sizes(name: str, stored: Stored, layout: Layout, given_um: Sequence[float]) -> Sizes:
    """Pixel sizes of all levels along the spatial axes; ``given_um`` are those of the finest."""
    spatial = len(layout.space)
    if len(given_um) not in (0, 1, spatial) or not all(0 < um < math.inf for um in given_um):
        raise ContractError(
            f"{name}: a pixel size of {','.join(f'{um:g}' for um in given_um)} um does not fit an image of {spatial} axes; "
            "give one positive number per axis, e.g. --pixel-size 0.5,0.5"
        )

    def along(sizes: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(sizes[axis] for axis in "ZYX"[-spatial:] if axis in sizes)

    said = tuple(along(sizes) for sizes in stored.level_sizes_um)
    size = along(stored.pixel_size_um)
    return level_sizes(
        [tuple(shape[i] for i in layout.spatial) for shape in stored.levels] or [layout.space],
        stored.level if stored.levels else 0,
        size if len(size) == spatial else None,
        said=said if all(len(sizes) == spatial for sizes in said) else (),
        finest_um=tuple(given_um) * (spatial if len(given_um) == 1 else 1),
    )


def _arranged(
    name: str,
    path: Path | None,
    stored: Stored,
    layout: Layout,
    contract: Contract,
    selection: Sequence[int] | str | None,
    wanted: int | None,
) -> Source:
    choice = choose_channels(
        layout,
        name=name,
        wanted=wanted,
        selection=selection,
        names=stored.names if len(stored.names) == layout.channels else (),
        wanted_names=contract.channels,
        alpha=stored.alpha if layout.channel is not None else None,
    )
    source = Source(name, path, stored, layout, choice)
    if choice.check:
        _check_dropped(source, choice, stored.alpha)
    return source


def _check_dropped(source: Source, choice: Choice, alpha: int | None) -> None:
    """ContractError if a channel that is dropped by rule carries something."""
    stored = source._layout.channels
    integer = source.dtype.kind in "iu"
    opaque: float = float(np.iinfo(source.dtype).max) if integer else 1.0
    whole = Source(
        source.name,
        source.path,
        Stored(source._pixels, None, source.metadata),
        source._layout,
        Choice(tuple(range(stored)), ""),
    )
    for plane, start, stop in whole.bands():
        band = whole.read_band(plane, start, stop)
        if alpha is not None and not bool((band[alpha] == opaque).all()):
            raise ContractError(
                f"{source.name}: the alpha channel is not opaque everywhere (lowest {band[alpha].min()}), so that "
                f"dropping it would change the picture; use --channels {','.join(str(i) for i in choice.channels)} to do "
                "so anyway"
            )
        if "equal" in choice.check:
            colours = [i for i in range(stored) if i != alpha]
            if any(not np.array_equal(band[colours[0]], band[i]) for i in colours[1:]):
                raise ContractError(
                    f"{source.name}: a colour image ({source.axes} {size_text(source._layout.shape)}) for a network "
                    "of 1 channel; use --channels 0 (or 1, 2) for one colour, or --channels luma for their luminance"
                )


def _numbers(position: Sequence[int]) -> str:
    return f"({', '.join(str(int(n)) for n in position)})"


def _step(channels: Sequence[int]) -> int | None:
    """Distance between channels that are evenly spaced (0: the same again), else None."""
    steps = {b - a for a, b in pairwise(channels)} or {1}
    return steps.pop() if len(steps) == 1 else None


def _luma(colours: Array) -> Array:
    """(3, ...) -> (...): ITU-R 601 luminance in the pixels' dtype; integers by the usual 16-bit fixed-point weights."""
    red, green, blue = colours
    if colours.dtype in (np.uint8, np.uint16):
        mixed: Array = 19595 * red.astype(np.uint32) + 38470 * green.astype(np.uint32)
        mixed = mixed + 7471 * blue.astype(np.uint32) + np.uint32(1 << 15)
        return (mixed >> 16).astype(colours.dtype)
    if colours.dtype.kind != "f":
        raise ContractError(f"luma of {colours.dtype} colours is not defined; choose one with --channels 0, 1 or 2")
    real: Array = 0.299 * red.astype(np.float64) + 0.587 * green.astype(np.float64) + 0.114 * blue.astype(np.float64)
    return real.astype(colours.dtype)


def is_url(text: str) -> bool:
    """Whether a name is a URL (``s3://...``) rather than a path."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.replace("+", "").replace(":", "").isalnum()


def where_of(image: str | os.PathLike[str]) -> str:
    """A path in full, or a URL: what names an image in another process, too."""
    return image if isinstance(image, str) and is_url(image) else str(Path(image).resolve())


def list_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path | str]:
    """Files, Zarr folders, URLs (as text) and the images in folders (sorted by name, known suffixes), each once.

    Raises:
        ImageError: A path does not exist, or a folder holds no image.
    """
    found: list[Path | str] = []
    for given in paths:
        if isinstance(given, str) and is_url(given):
            found.append(given)
            continue
        path = Path(given)
        if path.is_dir() and not is_zarr(path):
            inside = sorted(
                p
                for p in path.iterdir()
                if not p.name.startswith(".")
                and (is_zarr(p) if p.is_dir() else p.suffix.lower() in SUFFIXES and p.is_file())
            )
            if not inside:
                raise ImageError(
                    f"{path}: the folder holds no image; Zarr and files ending in {', '.join(SUFFIXES)} are read"
                )
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ImageError(f"{path}: no such file or folder; check the path")
    if not found:
        raise ImageError("no image given; name files or folders")
    return list(dict.fromkeys(found))


def _state(file: Path, name: str) -> tuple[int, int]:
    """(bytes, time of the last change in nanoseconds)."""
    try:
        found = file.stat()
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error}); check {file}") from error
    return found.st_size, found.st_mtime_ns


def _open_path(path: Path, name: str, level: int | None) -> Stored:
    try:
        if path.is_dir():
            if is_zarr(path):
                from .image_zarr import open_zarr

                return open_zarr(path, name, level)
            raise ImageError(f"{path}: a folder, not an image; name the files, or let list_images find them")
        with path.open("rb") as stream:
            head = stream.read(32)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if not head:
        raise ImageError(f"{name}: the file is empty (0 bytes); copy it again from its source")
    if path.suffix.lower() in SLIDES:
        from .image_slide import open_slide

        return open_slide(path, name, level)
    if head[:4] in TIFF_MAGIC:
        from .image_tiff import open_tiff

        return open_tiff(path, name, level)
    pick_level(level, 1, name)
    if head[:6] == NPY_MAGIC:
        return _open_npy(path, name)
    check_magic(head, name)
    from .image_raster import open_raster

    return open_raster(path, name)


def check_magic(head: bytes, name: str) -> None:
    """ImageError, with what to do, unless a file that begins so is a PNG, JPEG or BMP."""
    if head[:8] == b"\x89PNG\r\n\x1a\n" or head[:2] in (b"\xff\xd8", b"BM"):
        return
    for magic, what, way in _FOREIGN:
        if head.startswith(magic):
            raise ImageError(f"{name}: {what}; {way}")
    raise ImageError(
        f"{name}: not an image that is read here (first bytes {head[:8]!r}); PNG, JPEG, BMP, TIFF, npy, Zarr and whole "
        "slides are"
    )


def _open_npy(path: Path, name: str) -> Stored:
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            offset = stream.tell()
    except Exception as error:  # the header is Python text: a damaged one raises whatever the tokenizer does
        raise ImageError(f"{name}: not a readable npy file ({error}); save it again with numpy.save") from error
    if dtype.hasobject:
        raise ImageError(f"{name}: holds pickled objects, which are never loaded; save a numeric array with numpy.save")
    check_pixels(shape, dtype.newbyteorder("="), name)
    mapped = MappedPixels(MappedFile(path, name), offset, shape, dtype, name, "F" if fortran else "C")
    return Stored(mapped, None, Origin("array"))


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


def _array_pixels(image: Any, name: str) -> Pixels:
    if not isinstance(image, np.ndarray):
        from .kernels import device

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


def _as_array(image: Any, name: str) -> Array:
    """Any array on the CPU as a NumPy array, without copying where possible."""
    if isinstance(image, np.ma.MaskedArray):
        if np.ma.is_masked(image):
            raise ImageError(
                f"{name}: {int(np.ma.getmaskarray(image).sum())} pixels are masked; say what they are worth, e.g. "
                "image.filled(0)"
            )
        image = image.data
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


__all__ = ["BAND_SAMPLES", "SUFFIXES", "Pixels", "Source", "is_url", "list_images", "open_image"]
