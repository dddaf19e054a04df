"""Label images inside the OME-Zarr of their image: ``IMAGE.zarr/labels/NAME``, in the image's version, over its levels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import OutputError, size_text
from ..images.pixels import ZARR_METADATA, is_zarr
from ..images.zarr import OLD_AXES, import_zarr
from ..system.durable import Disk, locked

LABELS = "labels"  # the group of an image's labels


@dataclass(frozen=True)
class LabelPlace:
    """Where labels lie inside an image.

    Attributes:
        image: Folder of the image.
        name: Of the labels.
    """

    image: Path
    name: str

    @property
    def zarr_format(self) -> Literal[2, 3]:
        return 3 if (self.image / "zarr.json").is_file() else 2

    @property
    def version(self) -> str:
        """Of OME-Zarr."""
        return "0.5" if self.zarr_format == 3 else "0.4"


def label_place(out: Path) -> LabelPlace | None:
    """The place that a path ``IMAGE.zarr/labels/NAME`` means; None for any other path."""
    image = out.parent.parent
    return LabelPlace(image, out.name) if out.parent.name == LABELS and is_zarr(image) else None


def is_zarr_output(out: Path) -> bool:
    """Whether an output is written as a Zarr."""
    return out.suffix.lower() == ".zarr" or label_place(out) is not None


def check_outside(out: Path) -> None:
    """OutputError where an output would lie inside a Zarr, which no reader would find there, or take for damage."""
    around = [folder for folder in out.absolute().parents if is_zarr(folder)]
    if around and label_place(out) is None:
        image = next(f for f in (*out.parents, *around) if is_zarr(f) and f.name != LABELS)
        raise OutputError(
            f"{out} would lie inside the Zarr {image}; choose a place beside it, or write labels into it with "
            f"--out {image / LABELS / out.stem}"
        )


def hidden_base(out: Path) -> Path:
    """The path beside which an output's own files lie while it is made: beside the Zarr that it goes into, or itself."""
    place = label_place(out)
    if place is None:
        return out
    top = place.image
    while is_zarr(top.parent):
        top = top.parent
    return top.with_name(".".join((top.name, *out.relative_to(top).parts)))


@dataclass(frozen=True)
class Levels:
    """The levels of an image, as labels over it have to have them.

    Attributes:
        shapes: Per level, sizes by axis letter.
        transforms: Per level, OME's coordinate transformations, numbers by axis letter.
    """

    shapes: list[dict[str, int]]
    transforms: list[list[dict[str, Any]]]

    def shape(self, level: int, letters: Sequence[str]) -> list[int]:
        return [self.shapes[level][letter] for letter in letters]

    def datasets(self, letters: Sequence[str]) -> list[dict[str, Any]]:
        """OME's ``datasets`` of labels with these axes."""

        def along(transform: Mapping[str, Any]) -> dict[str, Any]:
            kind = transform["type"]
            return {"type": kind, kind: [transform[kind][letter] for letter in letters]}

        return [
            {"path": str(level), "coordinateTransformations": [along(one) for one in transforms]}
            for level, transforms in enumerate(self.transforms)
        ]


def image_levels(place: LabelPlace, letters: Sequence[str], shape: Sequence[int]) -> Levels:
    """The levels of the image that labels of these axes and sizes lie over.

    Raises:
        OutputError: It is no image, or of another size.
    """
    zarr = import_zarr(OutputError, place.image)
    try:
        group = zarr.open_group(place.image, mode="r", zarr_format=place.zarr_format, use_consolidated=False)
        found = dict(group.attrs)
        multiscale = found.get("ome", found)["multiscales"][0]
        datasets = multiscale["datasets"]
        arrays = [group[entry["path"]] for entry in datasets]
        axes = multiscale.get("axes") or list(OLD_AXES.lower())
        names = [str(axis["name"] if isinstance(axis, dict) else axis).lower() for axis in axes]
        shapes = [dict(zip(names, map(int, array.shape), strict=True)) for array in arrays]
        outer = _place(multiscale, dict.fromkeys(names, 1.0))
        placed = [
            _place(entry, {a: shapes[0][a] / shape[a] for a in names})
            for entry, shape in zip(datasets, shapes, strict=True)
        ]
    except (KeyError, IndexError, TypeError, ValueError, FileNotFoundError) as error:
        raise OutputError(
            f"{place.image}: holds no image that labels could lie over ({error}); choose another --out"
        ) from error
    if [shapes[0].get(letter) for letter in letters] != list(shape):
        there = size_text([shapes[0].get(letter, 1) for letter in letters])
        raise OutputError(
            f"{place.image}: its image has {there} px, and the labels {size_text(shape)}; predict that image"
        )
    return Levels(shapes, [_inside(*outer, *one) for one in placed])


Numbers = dict[str, float]  # by axis letter


def _place(entry: Mapping[str, Any], default: Numbers) -> tuple[Numbers, Numbers]:
    """(scale, translation) of OME's coordinate transformations."""
    scale, shift = default, dict.fromkeys(default, 0.0)
    for transform in entry.get("coordinateTransformations", []):
        if isinstance(transform.get("scale"), list):
            scale = dict(zip(default, transform["scale"], strict=True))
        if isinstance(transform.get("translation"), list):
            shift = dict(zip(default, transform["translation"], strict=True))
    return scale, shift


def _inside(outer: Numbers, outer_shift: Numbers, scale: Numbers, shift: Numbers) -> list[dict[str, Any]]:
    """A level's transformations, those of all levels on top."""
    found: list[dict[str, Any]] = [{"type": "scale", "scale": {a: outer[a] * scale[a] for a in scale}}]
    moved = {a: outer[a] * shift[a] + outer_shift[a] for a in shift}
    return [*found, {"type": "translation", "translation": moved}] if any(moved.values()) else found


def register(place: LabelPlace) -> None:
    """Enters labels, which are there, in the list of their image's; readers that know only the list find them."""
    zarr = import_zarr(OutputError, place.image)
    base = hidden_base(place.image / LABELS / place.name)
    disk = Disk()
    with locked(base.with_name(f".{place.image.name}.{LABELS}.lock")):
        group = zarr.open_group(place.image / LABELS, mode="a", zarr_format=place.zarr_format, use_consolidated=False)
        found = dict(group.attrs)
        ome = dict(found.get("ome", {})) if place.zarr_format == 3 else found
        if place.name not in ome.get(LABELS, []):
            ome[LABELS] = [*ome.get(LABELS, []), place.name]
            group.attrs.update({"ome": {"version": place.version} | ome} if place.zarr_format == 3 else ome)
        folder = place.image
        while is_zarr(folder):  # who reads the metadata in one piece would not see the labels
            if _consolidated(folder):
                zarr.consolidate_metadata(str(folder))
                disk.sync_tree(_metadata(folder), folder)
            folder = folder.parent
        disk.sync_tree(_metadata(place.image / LABELS), place.image)


def _metadata(folder: Path) -> list[Path]:
    return [folder / name for name in (*ZARR_METADATA, ".zmetadata") if (folder / name).is_file()]


def _consolidated(folder: Path) -> bool:
    if (folder / ".zmetadata").is_file():
        return True
    file = folder / "zarr.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("consolidated_metadata"))
