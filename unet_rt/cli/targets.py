"""Where the outputs of predict go: one per image, and the folders that they need."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError
from ..outputs.labels import is_zarr_output
from .folder import Item


def list_items(args: argparse.Namespace, images: Sequence[Path | str]) -> list[Item]:
    """The images, each with its outputs."""
    targets = _targets(args, images)
    outlines = _outlines(args, targets)
    return [
        Item(image, target, _overlay_name(target) if args.overlay else None, geojson)
        for image, target, geojson in zip(images, targets, outlines, strict=True)
    ]


def _outlines(args: argparse.Namespace, targets: Sequence[Path]) -> list[Path | None]:
    """One GeoJSON per image: the file that is named, or files in the folder that is."""
    if not args.geojson:
        return [None] * len(targets)
    place = Path(args.geojson)
    if place.suffix.lower() in (".json", ".geojson"):
        if len(targets) > 1:
            raise OutputError(
                f"{len(targets)} images do not go into one GeoJSON, {place}; name a folder with --geojson"
            )
        return [place]
    return [place / f"{_stem(target)}.geojson" for target in targets]


def _targets(args: argparse.Namespace, images: Sequence[Path | str]) -> list[Path]:
    """One output per image: --out itself for one image, files in the folder --out for several."""
    if not args.out:
        raise OutputError("--out is empty; name a file or a folder")
    from ..images.listing import output_name

    out = Path(args.out)
    if out.is_file() and len(images) > 1:
        raise OutputError(f"{out} is a file, and {len(images)} images need a folder; choose another --out")
    zarr = is_zarr_output(out)  # a folder that is one output
    if len(images) == 1 and (zarr or (not out.is_dir() and (out.suffix != "" or out.exists()))):
        _not_the_image(out, images)
        return [out]
    if zarr or (
        not out.is_dir() and out.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy", ".nii", ".gz")
    ):
        raise OutputError(f"{len(images)} images need a folder, and {out} is named like a file; choose another --out")
    targets = [out / output_name(image) for image in images]
    first: dict[Path, Path | str] = {}
    for image, target in zip(images, targets, strict=True):
        if target in first:
            raise OutputError(
                f"{first[target]} and {image} would both be written to {target}; predict them into different folders"
            )
        first[target] = image
        _not_the_image(target, images)
    return targets


def _not_the_image(target: Path, images: Sequence[Path | str]) -> None:
    """OutputError where an output would replace one of the images: --overwrite is not meant for them."""
    if target.exists() and any(isinstance(image, Path) and target.samefile(image) for image in images):
        raise OutputError(f"{target} is an image to be predicted, which an output never replaces; choose another --out")


def _stem(target: Path) -> str:
    name = target.name.removesuffix(".gz")
    return name.removesuffix(Path(name).suffix)


def _overlay_name(target: Path) -> Path:
    return target.with_name(f"{_stem(target)}.overlay.png")


@contextmanager
def folders_of(args: argparse.Namespace, items: Sequence[Item]) -> Iterator[None]:
    """Makes the folders that outputs go into, and removes them again where nothing came of it."""
    folders = {Path(args.out)} if items[0].target.parent == Path(args.out) else set()
    folders |= {
        item.geojson.parent for item in items if item.geojson is not None and item.geojson != Path(args.geojson)
    }
    made = [folder for folder in sorted(folders) if not folder.is_dir()]
    for folder in made:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{folder} cannot be created ({error.strerror}); choose another --out") from error
    try:
        yield
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # it holds outputs that are whole
                folder.rmdir()
