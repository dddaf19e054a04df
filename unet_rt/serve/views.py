"""Results that the page looks at: the last few, cut into tiles as they are asked for."""

from __future__ import annotations

import io
import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..errors import ServiceError
from .answers import PALETTE

SIDE = 256  # of a tile, pixels
FILES = ("mask.png", "objects.geojson", "answer.json")


class Views:
    """The last ``most`` results, in folders of their own."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._folders: dict[str, Path] = {}

    def keep(self, folder: Path) -> str:
        """Takes over what a job has left in its folder; returns the key to ask for it; the oldest goes."""
        key = secrets.token_urlsafe(16)
        kept = folder.with_name("view-" + folder.name)
        folder.rename(kept)
        for image in kept.glob("image.*"):
            image.unlink()
        self._folders[key] = kept
        while len(self._folders) > self._most:
            shutil.rmtree(self._folders.pop(next(iter(self._folders))), ignore_errors=True)
        return key

    def folder(self, key: str) -> Path:
        """Where a result lies.

        Raises:
            ServiceError: 404 where it has gone.
        """
        if key not in self._folders:
            raise ServiceError(404, f"there is no result {key[:40]!r} any more; predict the image again")
        return self._folders[key]

    def file(self, key: str, name: str) -> Path:
        """One of the files to download."""
        folder = self.folder(key)
        if name not in FILES:
            raise ServiceError(404, f"a result has no file {name[:40]!r}; there are {', '.join(FILES)}")
        return folder / name

    def tile(self, key: str, picture: str, level: int, place: tuple[int, int], shown: Collection[int] | None) -> bytes:
        """PNG of one tile.

        Args:
            key: Of the result.
            picture: ``image``, or ``mask``: labels, with a palette in which background is transparent.
            level: 0 is the full size, 1 half of it, ...
            place: (column, row).
            shown: Labels that are to be seen; None: all.

        Raises:
            ServiceError: 404 where there is no such tile.
        """
        from PIL import Image

        path = self.folder(key) / f"{picture}-{level}.npy"
        if re.fullmatch(r"image|mask", picture) is None or not path.is_file():
            raise ServiceError(404, f"a result has no picture {picture[:40]!r} at level {level}; see its levels")
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        column, row = place
        part = np.asarray(pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE])
        if not part.size:
            raise ServiceError(404, f"tile {column}, {row} lies outside of the picture; see its shape")
        stream, drawn, options = io.BytesIO(), Image.fromarray(part), dict[str, bytes]()
        if picture == "mask":
            drawn.putpalette(PALETTE.tobytes())
            options["transparency"] = bytes(255 * (k > 0 and (shown is None or k in shown)) for k in range(256))
        drawn.save(stream, "PNG", compress_level=1, **options)
        return stream.getvalue()
