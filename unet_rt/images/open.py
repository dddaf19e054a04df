"""Windows of an image, whatever its storage: arrays, npy, TIFF, Zarr, whole slides, PNG, JPEG, here or behind a URL.

``open_image`` reads the header and decides how the axes and channels are meant (``axes``); pixels are read by windows,
as they are needed where the format allows it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..contract.contract import Contract
from ..errors import ContractError, ImageError, size_text
from .arrays import array_pixels
from .axes import ChannelChoice, Layout, choose_channels, parse_channels, read_axes
from .formats import NPY_MAGIC, SLIDES, SUFFIXES, TIFF_MAGIC, check_magic
from .levels import Sizes, fine_enough, level_of_size, level_sizes, parse_level
from .pixels import MappedFile, MappedPixels, Origin, Pixels, Stored, check_pixels, is_zarr, pick_level
from .reading import Reading
from .source import BAND_SAMPLES, Source, file_state
from .views import write_out_palette


def open_image(
    image: Any,
    contract: Contract,
    reading: Reading | None = None,
    *,
    spatial: int = 2,
    network_channels: int | None = None,
    name: str | None = None,
) -> Source:
    """An image with the channels that a network takes, to be read by windows.

    Args:
        image: A path, a URL (``s3://...``, ``https://...``), a NumPy array, anything with DLPack (on the CPU),
            ``__array_interface__`` or a buffer, or an array that is read by windows (h5py, zarr, Dask, ...).
        contract: Its channel names and their number are used.
        reading: What the user says of axes, channels, level and pixel size.
        spatial: Spatial axes of the network, 2 or 3.
        network_channels: Channels of the network; default: as many as the contract names, else whatever the image has.
        name: For messages, where ``image`` is an array.

    Raises:
        ImageError: It cannot be read, or has no such level.
        ContractError: It can be read in two ways, or in none that fits the network.
    """
    reading = reading or Reading()
    axes, channels, size_um = reading.axes, reading.channels, reading.pixel_size_um
    asked = parse_level(reading.level)
    name, path, stored = _open_any(image, name, asked if isinstance(asked, int) else None, reading.series)
    try:
        if reading.series is not None and not stored.series:
            raise ImageError(f"{name}: the format holds no series; leave --series {reading.series} away")
        if not reading.indices:
            stored = write_out_palette(stored)
        check_pixels(stored.pixels.shape, stored.pixels.dtype, name)
        wanted = network_channels if network_channels is not None else (len(contract.channels) or None)
        selection = parse_channels(channels) if isinstance(channels, str) else channels
        layout = _layout(name, stored, axes, selection, spatial, wanted)
        sizes = _sizes(name, stored, layout, size_um)
        picked = stored.level
        if isinstance(asked, float):
            picked = level_of_size(asked, sizes, name)
        elif asked is None and reading.wanted_um:
            picked = fine_enough(reading.wanted_um, sizes)
        if picked == stored.level:
            if size_um:
                stored = replace(stored, pixel_size_um=dict(zip("ZYX"[-spatial:], sizes[picked], strict=True)))
            return _arrange(name, path, stored, layout, contract, replace(reading, channels=selection), wanted)
    except BaseException:
        stored.pixels.close()
        raise
    stored.pixels.close()
    again = replace(reading, level=picked)
    return open_image(image, contract, again, spatial=spatial, network_channels=network_channels, name=name)


def _open_any(
    image: Any, name: str | None, level: int | None, series: int | str | None
) -> tuple[str, Path | None, Stored]:
    """(name for messages, path of a file or folder, the image before its axes are read)."""
    path: Path | None = None
    if isinstance(image, str) and is_url(image):
        from .url import open_url

        name = image.rstrip("/").rpartition("/")[2] or image
        stored = open_url(image, name, level, series)
    elif isinstance(image, (str, os.PathLike)):
        path = Path(image)
        name = path.name or str(path)
        stored = _open_path(path, name, level, series)
        if not stored.files:
            stored = replace(stored, files=(path,))
        if not stored.fingerprint:
            size, changed = file_state(path, name)
            state = {"path": str(path.resolve()), "size": size, "mtime_ns": changed, "level": level or 0}
            state |= {} if series is None else {"series": series}
            stored = replace(stored, fingerprint=state)
    else:
        name = name or "array"
        pick_level(level, 1, name)
        stored = Stored(array_pixels(image, name), None, Origin("array"))
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
    # A choice of channel 0 alone decides between two readings; repeats of it are grey for each, and say nothing of axes.
    alone = selection is not None and tuple(selection) == (0,)
    return read_axes(
        stored.pixels.shape,
        name=name,
        spatial=spatial,
        found=stored.axes,
        given=axes,
        wanted=wanted if least <= 1 and selection is None else (1 if least <= 1 else None),
        least=least if least > 1 or alone else 0,
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


def _arrange(
    name: str,
    path: Path | None,
    stored: Stored,
    layout: Layout,
    contract: Contract,
    reading: Reading,
    wanted: int | None,
) -> Source:
    choice = choose_channels(
        layout,
        name=name,
        wanted=wanted,
        selection=reading.channels,
        names=stored.names if len(stored.names) == layout.channels else (),
        wanted_names=contract.channels,
        alpha=stored.alpha if layout.channel is not None else None,
    )
    source = Source(name, path, stored, layout, choice)
    if choice.check:
        _check_dropped(source, choice, stored.alpha, glance=reading.glance)
    return source


def _check_dropped(source: Source, choice: ChannelChoice, alpha: int | None, *, glance: bool) -> None:
    """ContractError if a channel that is dropped by rule carries something; ``glance``: in the middle of the image."""
    stored = source._layout.channels
    integer = source.dtype.kind in "iu"
    opaque: float = float(np.iinfo(source.dtype).max) if integer else 1.0
    whole = Source(
        source.name,
        source.path,
        Stored(source._pixels, None, source.metadata),
        source._layout,
        ChannelChoice(tuple(range(stored)), ""),
    )
    for plane, start, stop in [whole.middle_band()] if glance else whole.bands():
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


def _open_path(path: Path, name: str, level: int | None, series: int | str | None) -> Stored:
    try:
        if path.is_dir():
            if is_zarr(path):
                from .zarr import open_zarr

                return open_zarr(path, name, level)
            raise ImageError(f"{path}: a folder, not an image; name the files, or let list_images find them")
        with path.open("rb") as stream:
            head = stream.read(32)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if not head:
        raise ImageError(f"{name}: the file is empty (0 bytes); copy it again from its source")
    if path.suffix.lower() in SLIDES:
        from .slide import open_slide

        return open_slide(path, name, level, series)
    if head[:4] in TIFF_MAGIC:
        from .tiff import open_tiff

        return open_tiff(path, name, level, series)
    pick_level(level, 1, name)
    if head[:6] == NPY_MAGIC:
        return _open_npy(path, name)
    check_magic(head, name)
    from .raster import open_raster

    return open_raster(path, name)


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


__all__ = ["BAND_SAMPLES", "SUFFIXES", "Pixels", "Reading", "Source", "is_url", "list_images", "open_image"]
