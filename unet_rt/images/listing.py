"""Images among files and folders, and what of a folder is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import ImageError
from ..system.names import path_of
from .dicom import is_dicom_folder
from .formats import HEAD_BYTES, READ, SUFFIXES, kind_of
from .hdf5 import split_inside
from .pixels import is_zarr

_WORDS = {  # of one, of several
    "file": ("file that is no image", "files that are no images"),
    "folder": ("folder", "folders"),
    "link": ("broken link", "broken links"),
}
NAMED = 5  # files that are named; the others are counted
_BESIDE = (".prj", ".xml", ".ovr", ".msk", ".tfw", ".tifw", ".jgw", ".jpgw", ".pgw", ".pngw", ".bpw", ".bmpw", ".wld")


def is_url(text: str) -> bool:
    """Whether a name is a URL (``s3://...``) rather than a path."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.replace("+", "").replace(":", "").isalnum()


def where_of(image: str | os.PathLike[str]) -> str:
    """A path in full, or a URL: what names an image in another process, too."""
    return image if isinstance(image, str) and is_url(image) else str(path_of(image, ImageError).resolve())


def output_name(image: Path | str) -> str:
    """The name of an image's output in a folder: NIfTI gives NIfTI, any other TIFF."""
    file, inside = (None, None) if isinstance(image, str) and is_url(image) else split_inside(Path(image))
    if file is not None and inside is not None:
        return f"{file.stem}-{inside.strip('/').replace('/', '-')}.tif"
    name = Path(image).name
    for suffix in (".nii.gz", ".nii"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)] + ".nii.gz"
    return Path(name).stem.removesuffix(".ome") + ".tif"


def list_images(paths: Iterable[str | os.PathLike[str]], note: Callable[[str], None] | None = None) -> list[Path | str]:
    """Files, Zarr folders, URLs (as text) and the images in folders (sorted by name), each once.

    Args:
        paths: What is given.
        note: Receives a sentence about each folder that holds something else, too.

    Raises:
        ImageError: A path does not exist, or a folder holds no image.
    """
    found: list[Path | str] = []
    for given in paths:
        if isinstance(given, str) and is_url(given):
            found.append(given)
            continue
        path = Path(given)
        if path.is_dir() and not _is_image_folder(path):
            inside, others = _images_in(path)
            if not inside:
                raise ImageError(f"{path}: the folder holds no image{_others_text(others)}; read are {READ}")
            if others and note is not None:
                note(f"{path}: left out{_others_text(others)}")
            found += inside
        elif path.exists() or split_inside(path)[1] is not None:
            found.append(path)
        elif path.is_symlink():
            raise ImageError(f"{path}: a link to {os.readlink(path)}, which does not exist; mend the link")
        else:
            raise ImageError(f"{path}: no such file or folder; check the path")
    if not found:
        raise ImageError("no image given; name files or folders")
    return list(dict.fromkeys(found))


def _is_image_folder(path: Path) -> bool:
    return is_zarr(path) or is_dicom_folder(path)


def _images_in(folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """(images, names of what is none by what it is) of a folder. Hidden files are nobody's, companions their image's."""
    images: list[Path] = []
    others: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if _is_image_folder(path):
                images.append(path)
            else:
                others.setdefault("folder", []).append(path.name)
        elif not path.exists():
            others.setdefault("link", []).append(path.name)
        elif path.suffix.lower() in SUFFIXES or kind_of(_head(path), path) is not None:
            images.append(path)
        elif path.suffix.lower() not in _BESIDE:
            others.setdefault("file", []).append(path.name)
    return images, others


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(HEAD_BYTES)
    except OSError:
        return b""  # told by its suffix, or counted among the others


def _others_text(others: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for what, names in others.items():
        more = f", ... {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts.append(f"{len(names)} {_WORDS[what][len(names) > 1]} ({', '.join(names[:NAMED])}{more})")
    return f": {'; '.join(parts)}" if parts else ""
