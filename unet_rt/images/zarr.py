"""Zarr 2 and 3: OME-Zarr 0.1 to 0.5 at one of its levels, or a plain array; windows by the chunks that they touch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError, UnetRtError
from .pixels import UM, ZARR_METADATA, ChunkedPixels, Origin, Stored, check_pixels, pick_level

OLD_AXES = "TCZYX"  # of OME-Zarr 0.1 and 0.2, which name none
_AXIS_TYPES = {"time": "T", "channel": "C"}


def open_zarr(folder: Path, name: str, level: int | None = None) -> Stored:
    """ImageError for anything that cannot be read exactly as stored, and for groups that are more than one image."""
    files = [folder / f for f in ZARR_METADATA if (folder / f).is_file()]
    found = read_node(folder, name, level)
    files += [f for n in ZARR_METADATA if (f := folder / found.path / n).is_file() and f not in files]
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(file.read_bytes())
    except OSError as error:
        raise ImageError(f"{file}: cannot be read ({error.strerror or error}); check the path") from error
    fingerprint = {"path": str(folder.resolve()), "level": found.path, "metadata": digest.hexdigest()}
    return found.stored(name, tuple(files), fingerprint)


def open_store(store: Any, name: str, level: int | None, address: str) -> Stored:
    """One behind a URL, as a zarr store."""
    found = read_node(store, name, level)
    meta = json.dumps(found.array.metadata.to_dict(), default=str, sort_keys=True)
    digest = hashlib.sha256((meta + json.dumps(found.attributes, default=str, sort_keys=True)).encode())
    fingerprint = {"url": address, "level": found.path, "metadata": digest.hexdigest()}
    return found.stored(name, (), fingerprint)


def open_zip(path: Path, name: str, level: int | None = None) -> Stored:
    """A zipped Zarr: at the root of the archive, or in the one folder that holds all of it."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise ImageError(f"{name}: not a readable zip archive ({error}); copy it again from its source") from error
    roots = [entry.rpartition("/")[0] for entry in entries if entry.rpartition("/")[2] in ZARR_METADATA]
    if not roots:
        npz = bool(entries) and all(entry.endswith(".npy") for entry in entries)
        what = (
            "an npz archive of arrays; save the one wanted as .npy"
            if npz
            else "a zip archive without a Zarr; unpack it"
        )
        raise ImageError(f"{name}: {what}")
    store: Any = import_zarr(ImageError, name).storage.ZipStore(path, mode="r")
    try:
        found = read_node(store, name, level, inside=min(roots, key=len))
        return found.stored(name, (path,), {}, close=store.close)
    except BaseException:
        store.close()
        raise


def import_zarr(error: type[UnetRtError], name: object) -> Any:
    """zarr 3; ``error`` where it is missing or older."""
    way = "pip install --upgrade 'unet-rt[zarr]'"
    try:
        import zarr
    except ImportError as missing:
        raise error(f"{name}: Zarr is read and written by zarr, which is missing; {way}") from missing
    if int(zarr.__version__.partition(".")[0]) < 3:
        raise error(f"{name}: Zarr is read and written by zarr 3, and zarr {zarr.__version__} is installed; {way}")
    return zarr


class ZarrNode:
    """The array to be read, and what its group says about it."""

    def __init__(self, array: Any, path: str, attributes: Mapping[str, Any]) -> None:
        self.array = array
        self.path = path  # from the place that was opened; empty for an array opened itself
        self.attributes = attributes
        self.axes = _named_axes(array)
        self.sizes: dict[str, float] = {}  # micrometres by axis
        self.tags: dict[str, Any] = {}
        self.names: tuple[str, ...] = ()
        self.notes: list[str] = []
        self.levels: list[tuple[int, ...]] = []
        self.level_sizes: list[dict[str, float]] = []  # as ``sizes``

    def stored(
        self,
        name: str,
        files: tuple[Path, ...],
        fingerprint: Mapping[str, Any],
        close: Callable[[], None] = lambda: None,
    ) -> Stored:
        array = self.array
        dtype = np.dtype(array.dtype).newbyteorder("=")
        check_pixels(tuple(array.shape), dtype, name)
        pixels = ChunkedPixels(array.shape, dtype, array.chunks, name, lambda window: array[window], close)
        return Stored(
            pixels,
            self.axes,
            Origin("ome", tags=self.tags),
            names=self.names,
            pixel_size_um=self.sizes,
            notes=tuple(self.notes),
            levels=tuple(self.levels),
            level_sizes_um=tuple(self.level_sizes),
            files=files,
            fingerprint=fingerprint,
        )


def read_node(place: Any, name: str, level: int | None, inside: str = "") -> ZarrNode:
    """The array that a folder or store means, or the group ``inside`` of it.

    Raises:
        ImageError: zarr is missing, nothing is there that it reads, or several images are.
    """
    zarr = import_zarr(ImageError, name)
    try:
        found: Any = zarr.open(place, mode="r", **({"path": inside} if inside else {}))
        if isinstance(found, zarr.Array):
            pick_level(level, 1, name)
            return ZarrNode(found, "", {})
        return _image_of(found, name, level)
    except ImageError:
        raise
    except Exception as error:  # metadata are JSON of any kind; whatever the parser raises, they are at fault
        raise ImageError(
            f"{name}: not a readable Zarr ({type(error).__name__}: {error}); check its metadata"
        ) from error


def _image_of(group: Any, name: str, level: int | None) -> ZarrNode:
    attributes = dict(group.attrs)
    ome = attributes.get("ome", attributes)
    if ome.get("multiscales"):
        return _multiscale(group, ome, name, level)
    if "plate" in ome or "well" in ome:
        what = "plate" if "plate" in ome else "well"
        inside = [str(entry["path"]) for entry in ome[what].get("wells" if what == "plate" else "images", [])]
        raise ImageError(f"{name}: a {what} of many images; name one, {_inside(name, inside)}")
    images = [path for path, inner in group.groups() if "multiscales" in dict(inner.attrs).get("ome", inner.attrs)]
    arrays = [path for path, _ in group.arrays()]
    if len(images) == 1 and not arrays:
        node = _image_of(group[images[0]], name, level)
        node.path = f"{images[0]}/{node.path}"
        return node
    if len(arrays) == 1 and not images:
        pick_level(level, 1, name)
        node = ZarrNode(group[arrays[0]], arrays[0], attributes)
        node.notes.append(f"array {arrays[0]}")
        return node
    if not images and not arrays:
        raise ImageError(f"{name}: the Zarr group holds no array; name the group or array inside that is meant")
    raise ImageError(f"{name}: a Zarr group of several images; name one, {_inside(name, sorted(images or arrays))}")


def _inside(name: str, paths: Sequence[str]) -> str:
    shown = ", ".join(f"{name}/{path}" for path in paths[:5])
    return f"e.g. {shown}{f', ... ({len(paths)} in all)' if len(paths) > 5 else ''}"


def _multiscale(group: Any, ome: Mapping[str, Any], name: str, level: int | None) -> ZarrNode:
    multiscales = ome["multiscales"]
    multiscale = multiscales[0]
    datasets = multiscale["datasets"]
    picked = pick_level(level, len(datasets), name)
    arrays = []
    for entry in datasets:
        if entry["path"] not in group:
            raise ImageError(
                f"{name}: its metadata announce level {entry['path']}, which is missing; copy it again from its source"
            )
        arrays.append(group[entry["path"]])
    array = arrays[picked]
    node = ZarrNode(array, str(datasets[picked]["path"]), dict(group.attrs))
    if len({len(a.shape) for a in arrays}) > 1 or len({a.dtype for a in arrays}) > 1:
        raise ImageError(f"{name}: its levels differ in axes or dtype; the file is corrupt; write it again")
    axes = multiscale.get("axes") or (list(OLD_AXES.lower()) if len(array.shape) == len(OLD_AXES) else [])
    axes = [{"name": axis} if isinstance(axis, str) else axis for axis in axes]
    if axes and len(axes) != len(array.shape):
        raise ImageError(
            f"{name}: its metadata name {len(axes)} axes, the pixels have {len(array.shape)}; declare them with --axes"
        )
    letters = [_letter(axis) for axis in axes]
    if letters and None not in letters and len(set(letters)) == len(letters):
        node.axes = "".join(str(letter) for letter in letters)
    scales = [_scale(entry, len(array.shape)) * _scale(multiscale, len(array.shape)) for entry in datasets]
    node.sizes = _sizes(letters, axes, scales[picked])
    for along, um in node.sizes.items():
        node.tags |= {f"PhysicalSize{along}": um, f"PhysicalSize{along}Unit": "µm"}
    for letter, axis, step in zip(letters, axes, scales[picked], strict=False):
        if letter == "T" and _unit(axis) == "second" and step > 0:
            node.tags |= {"TimeIncrement": float(step), "TimeIncrementUnit": "s"}
    channels = ome.get("omero", {}).get("channels", [])
    names = tuple(str(channel.get("label", "")) for channel in channels)
    node.names = names if all(names) else ()
    if len(multiscales) > 1:
        node.notes.append(f"image 0 of {len(multiscales)}")
    if len(datasets) > 1:
        node.levels = [tuple(int(n) for n in a.shape) for a in arrays]
        node.level_sizes = [_sizes(letters, axes, steps) for steps in scales]
        node.notes.append(f"level {picked} of {len(datasets)}")
    return node


def _scale(holder: Mapping[str, Any], ndim: int) -> Any:
    """Steps per axis of a dataset or of all of them."""
    for transform in holder.get("coordinateTransformations", []):
        if transform.get("type") == "scale" and len(transform.get("scale", ())) == ndim:
            return np.array(transform["scale"], np.float64)
    return np.ones(ndim)


def _sizes(letters: Sequence[str | None], axes: Sequence[Mapping[str, Any]], scale: Any) -> dict[str, float]:
    """Micrometres along the spatial axes that have a unit of length; none where no axes are named."""
    sizes = {}
    for letter, axis, step in zip(letters, axes, scale, strict=False):
        if letter in ("Z", "Y", "X") and _unit(axis) in UM and step > 0:
            sizes[letter] = float(step) * UM[_unit(axis)]
    return sizes


def _unit(axis: Mapping[str, Any]) -> str:
    return str(axis.get("unit", "")).strip().lower()


def _letter(axis: Mapping[str, Any]) -> str | None:
    kind, name = str(axis.get("type", "")), str(axis.get("name", "")).upper()
    if kind in _AXIS_TYPES:
        return _AXIS_TYPES[kind]
    return name if len(name) == 1 and name.isalpha() else None


def _named_axes(array: Any) -> str | None:
    """Axes of a plain array: zarr 3 may name its dimensions, xarray names those of zarr 2."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if not isinstance(names, (list, tuple)) or len(names) != len(array.shape):
        return None
    letters = [str(name).upper() for name in names]
    known = all(len(letter) == 1 and letter.isalpha() for letter in letters) and {"Y", "X"} <= set(letters)
    return "".join(letters) if known and len(set(letters)) == len(letters) else None
