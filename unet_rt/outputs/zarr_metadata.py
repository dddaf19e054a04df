"""What the metadata of a written OME-Zarr says: axes, sizes, channels and labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..images.pixels import UM, Origin
from .pictures import COLOURS

VERSION = "0.5"


NO_DATA = "no data"  # class of the value that marks samples without data


AXIS_TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def zarr_metadata(
    letters: Sequence[str],
    sizes: Mapping[str, tuple[float, str]],
    factors: Sequence[int],
    about: Mapping[str, Any],
    kind: str = "",
    *,
    version: str = VERSION,
) -> dict[str, Any]:
    """The ``ome`` attribute of 0.5; of 0.4, what stands in its place among the attributes.

    Args:
        letters: Stored axes.
        sizes: (step, unit) of the axes where they are known.
        factors: Down-sampling of Y and X per level.
        about: What else it holds: ``image-label`` or ``omero``.
        kind: Of the dtype.
        version: Of OME-Zarr.
    """
    axes = []
    for letter in letters:
        axes.append({"name": letter, "type": AXIS_TYPES[letter]})
        if letter in sizes:
            axes[-1]["unit"] = sizes[letter][1]
    datasets = []
    for level, factor in enumerate(factors):
        steps = [sizes.get(letter, (1.0, ""))[0] for letter in letters]
        scale = [s * factor if letter in "yx" else s for s, letter in zip(steps, letters, strict=True)]
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if kind == "f" and factor > 1:
            # The mean of 2^n samples belongs to their middle.
            shift = [s * (factor - 1) / 2 if letter in "yx" else 0.0 for s, letter in zip(steps, letters, strict=True)]
            transforms.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    multiscale: dict[str, Any] = {"axes": axes, "datasets": datasets}
    if len(factors) > 1:
        multiscale["type"] = "mean" if kind == "f" else "nearest"
    if version == VERSION:
        return {"version": version, "multiscales": [multiscale], **about}
    return {"multiscales": [{"version": version, **multiscale}], **about}


def label_metadata(names: Mapping[int, str], inside: str | None = None) -> dict[str, Any]:
    """``image-label``: a colour and a class per value. Value 0 and what holds no data are transparent.

    ``inside``: the version of OME-Zarr of the image in which the labels lie; None: they lie by themselves.
    """
    about: dict[str, Any] = {} if inside is None else {"source": {"image": "../../"}}
    if inside is not None and inside != VERSION:
        about["version"] = inside
    if not names:
        return about
    seen = [value for value in names if value and names[value] != NO_DATA]
    colours = {value: [*_colour(k), 255] for k, value in enumerate(seen)}
    return about | {
        "colors": [{"label-value": value, "rgba": colours.get(value, [0, 0, 0, 0])} for value in names],
        "properties": [{"label-value": value, "class": name} for value, name in names.items()],
    }


def channel_metadata(k: int, name: str, highest: float) -> dict[str, Any]:
    """``omero``: what viewers call a channel, and how they draw it."""
    window = {"min": 0, "max": highest, "start": 0, "end": highest}
    return {"label": name, "color": "".join(f"{part:02X}" for part in _colour(k)), "active": True, "window": window}


def _colour(k: int) -> list[int]:
    return [int(part) for part in COLOURS[1 + k % (len(COLOURS) - 1)]]


def sizes_in(ome: Mapping[str, Any], letters: Sequence[str]) -> dict[str, tuple[float, str]]:
    """What ``zarr_metadata`` was told."""
    multiscale = ome["multiscales"][0]
    scale = multiscale["datasets"][0]["coordinateTransformations"][0]["scale"]
    return {
        letter: (float(step), str(axis["unit"]))
        for letter, axis, step in zip(letters, multiscale["axes"], scale, strict=True)
        if "unit" in axis
    }


def spatial_sizes(pixel_size_um: tuple[float, ...] | None) -> dict[str, tuple[float, str]]:
    """(size, unit) by spatial axis, as OME-Zarr states them."""
    sizes = pixel_size_um or ()
    return {letter: (float(um), "micrometer") for letter, um in zip("zyx"[-len(sizes) :], sizes, strict=False)}


def plane_sizes(origin: Origin) -> dict[str, tuple[float, str]]:
    """Steps along Z and T of an image that is predicted plane by plane."""
    found: dict[str, tuple[float, str]] = {}
    tags = origin.tags
    if origin.kind == "ome":
        depth, interval = tags.get("PhysicalSizeZ"), tags.get("TimeIncrement")
        um = UM.get(str(tags.get("PhysicalSizeZUnit", "µm")).strip().lower())
        unit = str(tags.get("TimeIncrementUnit", "s"))
    elif origin.kind == "imagej":
        depth, interval = tags.get("spacing"), tags.get("finterval")
        um = UM.get(str(tags.get("unit", "")).strip().lower())
        unit = str(tags.get("tunit", "s"))
    else:
        return {}
    if depth is not None and um is not None and _positive(depth):
        found["Z"] = (float(depth) * um, "micrometer")
    if interval is not None and unit in ("s", "sec") and _positive(interval):
        found["T"] = (float(interval), "second")
    return found


def _positive(number: Any) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number) and number > 0
