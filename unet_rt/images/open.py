"""Windows of an image, whatever its storage: arrays, npy, TIFF, Zarr, whole slides, PNG, JPEG, here or behind a URL.

``open_image`` reads the header and decides how the axes and channels are meant (``axes``); pixels are read by windows,
as they are needed where the format allows it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..contract.contract import Contract
from ..errors import ContractError, ImageError, size_text
from ..system.names import path_of
from .arrays import array_pixels, unmasked
from .axes import ChannelChoice, Layout, choose_channels, parse_channels, read_axes
from .files import open_path
from .hdf5 import split_inside
from .levels import Sizes, fine_enough, level_of_size, level_sizes, parse_level
from .listing import is_url
from .pixels import Origin, Stored, check_pixels, pick_level
from .reading import Reading
from .slices import ONE_CHANNEL, SLICES, Slices, read_stack
from .source import Source, file_state
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
    """An image with the channels that a network takes, to be read by windows. Errors name the path as it was given.

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
        if reading.nodata is not None:
            stored = replace(
                stored,
                nodata=float(reading.nodata),
                valid=None,
                notes=(*stored.notes, f"nodata {reading.nodata:g}, as asked"),
            )
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
        path, inside = split_inside(path_of(image, ImageError))
        name = str(image)
        stored = open_path(path, name, level, series, inside)
        if not stored.files:
            stored = replace(stored, files=(path,))
        if not stored.fingerprint:
            size, changed = file_state(path, name)
            state = {"path": str(path.resolve()), "size": size, "mtime_ns": changed, "level": level or 0}
            state |= {} if series is None else {"series": series}
            state |= {} if inside is None else {"inside": inside}
            stored = replace(stored, fingerprint=state)
    else:
        name = name or "array"
        pick_level(level, 1, name)
        stored = Stored(array_pixels(image, name), None, Origin("array"), valid=unmasked(image))
    return name, path, replace(stored, level=level or 0)


def _layout(
    name: str,
    stored: Stored,
    axes: str | None,
    selection: Sequence[int] | str | None,
    spatial: int,
    wanted: int | None,
) -> Layout:
    if selection == SLICES:
        shape = stored.pixels.shape
        return read_stack(shape, name=name, spatial=spatial, found=stored.axes, given=axes, wanted=wanted)
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
    if reading.channels == SLICES and wanted is not None:
        return Slices(Source(name, path, stored, layout, ONE_CHANNEL), wanted, contract.border or "mirror")
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
                layout = source._layout
                shape, one = f"{source.axes} {size_text(layout.shape)}", "--channels 0 (or 1, 2)"
                if layout.channel_letter == "S":
                    raise ContractError(
                        f"{source.name}: a colour image ({shape}) for a network of 1 channel; use {one} for one colour, or "
                        "--channels luma for their luminance"
                    )
                raise ContractError(
                    f"{source.name}: {len(colours)} channels ({shape}; {', '.join(source.channel_names)}) for a network of "
                    f"1; use {one} for one of them"
                )
