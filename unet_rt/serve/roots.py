"""References of strangers: what lies in a folder or behind a URL that the operator allowed, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import ServiceError
from ..images.listing import is_url

SUFFIXES = (".tif", ".tiff", ".png", ".npy", ".zarr")  # of what may be written


def find_reference(text: str, roots: Iterable[str]) -> str:
    """The path in full, or the URL, of an image that a request names.

    Relative paths are looked for in every root. Links are followed first, so that one that leads out is refused; what
    folders (OME-Zarr) hold is looked through for such links as well.

    Raises:
        ServiceError: 403 where it lies outside, 404 where there is nothing.
    """
    roots = list(roots)
    if "\0" in text or not text:
        raise ServiceError(400, "the reference is empty, or holds a zero byte; name a file below an allowed root")
    if is_url(text):
        return _url(text, roots)
    for root in _folders(roots):
        path = Path(os.path.realpath(root / text))
        if not path.is_relative_to(root):
            continue
        if not path.exists():
            continue
        if path.is_dir():
            _check_links(path, root, text)
        return str(path)
    inside = any(Path(os.path.realpath(root / text)).is_relative_to(root) for root in _folders(roots))
    if inside:
        raise ServiceError(404, f"{text}: no such file below the allowed roots; check the path")
    raise _outside(text)


def find_target(text: str, roots: Iterable[str]) -> Path:
    """The path in full of a file or OME-Zarr that a request wants written.

    Raises:
        ServiceError: 403 where it would lie outside, 400 for a name that says no format, 404 for a missing folder, 409
            where something is there already.
    """
    if "\0" in text or not text or is_url(text):
        raise ServiceError(400, f"out={text!r} names no file that can be written; name one below an allowed root")
    for root in _folders(roots):
        given = root / text
        path = Path(os.path.realpath(given.parent)) / given.name
        if not path.is_relative_to(root) or path == root or given.name in ("", ".", ".."):
            continue
        if path.suffix.lower() not in SUFFIXES:
            raise ServiceError(400, f"out={text} says no format; end it in {', '.join(SUFFIXES)}")
        if not path.parent.is_dir():
            raise ServiceError(404, f"out={text}: there is no such folder below the allowed roots; make it first")
        if path.exists() or path.is_symlink():
            raise ServiceError(409, f"out={text} exists; choose another name")
        return path
    raise _outside(text)


def _folders(roots: Iterable[str]) -> list[Path]:
    return [Path(os.path.realpath(root)) for root in roots if not is_url(root)]


def _outside(text: str) -> ServiceError:
    return ServiceError(403, f"{text} lies outside of what this service may use; ask its operator for --allow-root")


def _url(text: str, roots: Iterable[str]) -> str:
    plain = not any(part in text for part in ("..", "%", "\\", "?", "#", "@", "::"))
    prefixes = (root.rstrip("/") + "/" for root in roots if is_url(root))
    if plain and any(text.startswith(prefix) for prefix in prefixes):
        return text
    raise _outside(text)


def _check_links(folder: Path, root: Path, text: str) -> None:
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise _outside(text)
