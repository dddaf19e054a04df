"""A folder of images and masks becomes samples: who belongs to whom, and what the numbers of a mask mean.

A file is an image or a mask by the words in its folders' names (or, where those do not say, in its own name); image and
mask belong together if their paths agree without these words: ``images/a.png`` and ``masks/a.png``, ``a.png`` and
``a_mask.png``, ``train/image/0.png`` and ``train/label/0.png``, ``01/t012.tif`` and ``01_GT/SEG/man_seg012.tif`` (the
Cell Tracking Challenge), ``train-volume.tif`` and ``train-labels.tif``. Where an image lies alone in its folder, several
masks beside it are one object each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract.contract import Contract, Normalization
from ..errors import ContractError, ImageError, size_text
from ..images.normalize import affine, normalize_pixels
from ..images.open import open_image
from ..images.reading import Reading
from ..images.source import Source
from .pairs import Pair, find_pairs, words_of
from .samples import MaskKind, Sample, sample_of
from .weights import F32

TRAINING_FOLDERS = {"train", "training"}
VALIDATION_FOLDERS = {"val", "valid", "validation"}
TEST_FOLDERS = {"test", "testing", "holdout"}
LEAST_PX = 32
MOST_CLASSES = 64


@dataclass(frozen=True)
class DataSet:
    """What was found in a folder.

    Attributes:
        samples: In the order of the files' names.
        channels: Names of the channels.
        classes: Names of the classes.
        masks: How the masks were read.
        w0: Of the border weights.
        value_range: (lowest, highest) raw pixel.
        pixel_size_um: Where all files agree on it; else empty.
        validation: Numbers of the samples that lie in a folder of that name, where there is one.
        notes: Decisions worth knowing, one sentence each.
    """

    samples: tuple[Sample, ...]
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    masks: MaskKind
    w0: float
    value_range: tuple[float, float]
    pixel_size_um: tuple[float, ...] = ()
    validation: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def read_data(
    folder: Path,
    normalization: Normalization,
    *,
    images: str | None = None,
    masks: str | None = None,
    masks_are: MaskKind | None = None,
    reading: Reading | None = None,
    w0: float | None = None,
    sigma_px: float = 5.0,
) -> DataSet:
    """The images and masks of a folder as samples to train on, with what the masks' numbers mean.

    Args:
        folder: See :func:`find_pairs`.
        normalization: Of the images.
        images, masks: Sub-folders, where names do not say it.
        masks_are: What the numbers of the masks mean; None: told from the masks themselves.
        reading: How images are read, as in prediction: axes and channels.
        w0, sigma_px: Of the border weights. None: 10 between objects that the masks tell apart, else no such weights.

    Raises:
        ImageError: images and masks do not match, or cannot be read.
        ContractError: the images have different channels.
    """
    axes, channels = (None, None) if reading is None else (reading.axes, reading.channels)
    pairs, notes = find_pairs(folder, images, masks)
    pairs, note = _without_test(folder, pairs)
    notes += note
    channels, names, note = _channels([p.image for p in pairs], axes, channels)
    notes += note
    labels = [_labels(p) for p in pairs]
    kind, said = _kind([plane for stack in labels for plane in stack], masks_are)
    if any(len(p.masks) > 1 for p in pairs) and masks_are is None:
        kind, said = "instances", "several masks per image are one object each"
    notes.append(said)
    if w0 is None:
        w0 = 10.0 if kind == "instances" else 0.0
    labels = _from_zero(labels, kind)
    classes, number = _classes(labels, kind)
    if number is not None:
        notes.append(f"mask values {', '.join(map(str, number))} are classes {', '.join(map(str, range(len(number))))}")
        labels = [[np.searchsorted(number, plane) for plane in stack] for stack in labels]
    samples: list[Sample] = []
    ranges: list[tuple[float, float]] = []
    sizes = set()
    validation: list[int] = []
    for pair, stack in zip(pairs, labels, strict=True):
        with _open(pair.image, axes, channels, len(names)) as source:
            if source.planes != len(stack) or any(plane.shape != source.shape for plane in stack):
                raise ImageError(
                    f"{pair.image.name} is {_size(source.planes, source.shape)} and its mask {pair.masks[0].name} "
                    f"{_size(len(stack), stack[0].shape)}; give masks of the images' sizes"
                )
            if min(source.shape) < LEAST_PX:
                raise ImageError(
                    f"{pair.image.name} is {_size(1, source.shape)} px; training takes {LEAST_PX} px or more a side"
                )
            numbers = affine(normalization, source)
            sizes.add(source.pixel_size_um)
            if _folders(folder, pair) & VALIDATION_FOLDERS:
                validation += range(len(samples), len(samples) + len(stack))
            for plane, mask in enumerate(stack):
                raw = source.read(plane, (0, 0), source.shape)
                if raw.dtype.kind == "f" and not np.isfinite(raw).all():
                    raise ImageError(f"{pair.image.name} holds values that are not finite; repair it or leave it out")
                ranges.append((float(raw.min()), float(raw.max())))
                pixels: F32 = normalize_pixels(raw, numbers.plane(plane))
                name = pair.image.name + (f" plane {plane}" if source.planes > 1 else "")
                samples.append(sample_of(name, pixels, mask, masks=kind, w0=w0, sigma_px=sigma_px))
    found = np.unique([k for s in samples for k in np.unique(s.target)])
    if len(found) < len(classes):
        raise ImageError(
            f"{folder}: the masks hold {'background' if 0 in found else 'foreground'} alone, one class of "
            f"{len(classes)}; a network cannot learn it from these"
        )
    um = sizes.pop() if len(sizes) == 1 else None
    value_range = (min(low for low, _ in ranges), max(high for _, high in ranges))
    return DataSet(
        tuple(samples), names, classes, kind, w0, value_range, tuple(um or ()), tuple(validation), tuple(notes)
    )


def _folders(folder: Path, pair: Pair) -> set[str]:
    return {w for part in pair.image.relative_to(folder).parts[:-1] for w in words_of(part)}


def _without_test(folder: Path, pairs: list[Pair]) -> tuple[list[Pair], list[str]]:
    """Where there is a folder of training images, those of a test folder are not trained on."""
    if not any(_folders(folder, p) & TRAINING_FOLDERS for p in pairs):
        return pairs, []
    kept = [p for p in pairs if not _folders(folder, p) & TEST_FOLDERS]
    left = len(pairs) - len(kept)
    return kept, [f"{left} pairs in a test folder are left out: they are for you to report on"] if left else []


def _size(planes: int, shape: Sequence[int]) -> str:
    return size_text((planes, *shape) if planes > 1 else shape)


def _open(path: Path, axes: str | None, channels: Sequence[int] | str | None, count: int) -> Source:
    if channels is not None:
        return open_image(path, Contract(), Reading(axes, channels), spatial=2, network_channels=count)
    try:
        return open_image(path, Contract(), Reading(axes), spatial=2, network_channels=count)
    except ContractError:
        if count == 1:  # colour among grey
            return open_image(path, Contract(), Reading(axes, "luma"), spatial=2, network_channels=1)
        if count == 3:  # grey among colour
            return open_image(path, Contract(), Reading(axes, (0, 0, 0)), spatial=2, network_channels=3)
        raise


def _channels(
    images: Sequence[Path], axes: str | None, channels: Sequence[int] | str | None
) -> tuple[Sequence[int] | str | None, tuple[str, ...], list[str]]:
    """(choice for every image, channel names, notes): grey where grey serves all, colour where most are."""
    counts: dict[int, list[Path]] = defaultdict(list)
    for path in images:
        if channels is not None:
            with open_image(path, Contract(), Reading(axes, channels), spatial=2) as source:
                counts[source.channels].append(path)
            continue
        try:
            open_image(path, Contract(), Reading(axes), spatial=2, network_channels=1).close()
            counts[1].append(path)
        except ContractError:
            with open_image(path, Contract(), Reading(axes), spatial=2) as source:
                counts[source.channels].append(path)
    if len(counts) == 1:
        count = next(iter(counts))
        return channels, _channel_names(count), []
    if channels is None and set(counts) == {1, 3}:
        count = 3 if len(counts[3]) > len(counts[1]) else 1
        how = "grey ones are taken as colour" if count == 3 else "of colour ones the luminance is taken"
        way = "--channels 0,0,0" if count == 3 else "--channels luma"
        return None, _channel_names(count), [
            f"{len(counts[1])} images are grey and {len(counts[3])} colour: {how} (predict those with {way})"
        ]  # fmt: skip
    some = "; ".join(f"{paths[0].name} has {count}" for count, paths in sorted(counts.items()))
    raise ContractError(
        f"images have different numbers of channels ({some}); choose with --channels, e.g. --channels 0"
    )


def _channel_names(count: int) -> tuple[str, ...]:
    return {1: ("grey",), 3: ("red", "green", "blue")}.get(count) or tuple(f"channel {k}" for k in range(count))


Integers = npt.NDArray[Any]


def _labels(pair: Pair) -> list[Integers]:
    """Planes (Y, X) of a mask, whole numbers; of several masks one plane of ids."""
    if len(pair.masks) == 1:
        return _read_mask(pair.masks[0])
    ids: Integers | None = None
    for k, path in enumerate(pair.masks, start=1):
        planes = _read_mask(path)
        if ids is None:
            ids = np.zeros(planes[0].shape, np.int32)
        if len(planes) > 1 or planes[0].shape != ids.shape:
            raise ImageError(f"{path} is {_size(len(planes), planes[0].shape)}, another mask of its image {ids.shape}")
        ids[planes[0] > 0] = k
    assert ids is not None  # noqa: S101 - a pair has masks
    return [ids]


def _read_mask(path: Path) -> list[Integers]:
    palette = _palette_indices(path)
    if palette is not None:
        return [palette]
    try:
        try:
            source = open_image(path, Contract(), Reading(indices=True), spatial=2, network_channels=1)
        except ContractError:  # three planes or three channels: a mask has one channel
            if path.suffix.lower() not in (".tif", ".tiff", ".npy"):
                raise
            source = open_image(path, Contract(), Reading("IYX", indices=True), spatial=2, network_channels=1)
        with source:
            planes = [source.read(k, (0, 0), source.shape)[0] for k in range(source.planes)]
    except ContractError as error:
        raise ImageError(
            f"{path.name} as a mask: {error}. A mask holds one number per pixel: 0 for background and 255, class "
            "numbers or instance ids"
        ) from error
    whole = []
    for plane in planes:
        if plane.dtype.kind == "f":
            if not np.isfinite(plane).all() or np.any(plane != np.rint(plane)):
                raise ImageError(f"{path.name}: a mask holds whole numbers, this one fractions; round or threshold it")
        elif path.suffix.lower() in (".jpg", ".jpeg"):
            plane = (plane > 127).astype(np.uint8)  # JPEG smears 0 and 255 over their neighbours
        elif plane.dtype.kind == "i" and plane.min() < 0:
            raise ImageError(f"{path.name}: a mask holds numbers from 0, this one {plane.min()}; rewrite it")
        whole.append(plane.astype(np.int64))
    return whole


def _palette_indices(path: Path) -> Integers | None:
    """A palette's colours are for the eye: the indices are the labels."""
    if path.suffix.lower() not in (".png", ".bmp"):
        return None
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture).astype(np.int64) if picture.mode == "P" else None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path.name}: truncated or corrupt ({error}); copy it again from its source") from error


def _kind(planes: Sequence[Integers], given: MaskKind | None) -> tuple[MaskKind, str]:
    """(kind, sentence): two values are binary; numbers that are mostly one connected part each are instance ids."""
    if given is not None:
        return given, f"masks are read as {given}, as told"
    values = [np.unique(p) for p in planes]
    every = np.unique(np.concatenate(values))
    shown = f"{len(every)} values from {every[0]} to {every[-1]}"
    if len(every) <= 2:
        return "binary", f"masks hold {' and '.join(map(str, every))}: background and foreground"
    many = len(every) > MOST_CLASSES or every[-1] > 255
    single = [_one_part(p == k) for p, v in zip(planes[:8], values[:8], strict=True) for k in v[v > 0][:50]]
    if many or float(np.mean(single)) > 0.9:
        why = "too many for classes" if many else "each one connected part"
        return "instances", f"masks hold {shown}, {why}: instance ids (--masks-are classes reads them otherwise)"
    return "classes", f"masks hold {shown}: a class each (--masks-are instances reads them otherwise)"


def _from_zero(labels: list[list[Integers]], kind: MaskKind) -> list[list[Integers]]:
    """Binary masks of two values neither of which is 0: the lower one is background."""
    if kind != "binary":
        return labels
    lowest = min(int(p.min()) for stack in labels for p in stack)
    highest = max(int(p.max()) for stack in labels for p in stack)
    return [[p - lowest for p in stack] for stack in labels] if 0 < lowest < highest else labels


def _one_part(mask: npt.NDArray[np.bool_]) -> bool:
    """Whether nine tenths of the pixels hang together."""
    from .components import components

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    parts = np.bincount(components(box).ravel())[1:]
    return bool(parts.max() >= 0.9 * parts.sum())


def _classes(labels: Sequence[Sequence[Integers]], kind: MaskKind) -> tuple[tuple[str, ...], Integers | None]:
    """(class names, mask values in order where they are not 0, 1, 2, ..)."""
    if kind != "classes":
        return ("background", "foreground"), None
    every = np.unique(np.concatenate([np.unique(p) for stack in labels for p in stack]))
    if len(every) > MOST_CLASSES:
        raise ImageError(
            f"masks hold {len(every)} values, {MOST_CLASSES} classes are the most; are they instance ids "
            "(--masks-are instances)?"
        )
    names = ("background", *(f"class {value}" for value in every[1:]))
    same = np.array_equal(every, np.arange(len(every)))
    return names, None if same else every
