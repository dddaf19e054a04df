"""Pictures for people: overlays of masks on images, and what differs between two results. NumPy and Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import OutputError
from ..system.durable import Disk

if TYPE_CHECKING:
    from ..images.source import Source


Array = npt.NDArray[Any]
RGB = npt.NDArray[np.uint8]

# Okabe & Ito (2008): told apart by colour-blind readers; label 0 stays uncoloured
COLOURS = np.array(
    [
        (0, 0, 0),
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
        (204, 121, 167),
    ],
    dtype=np.uint8,
)
LONGEST_PX = 2048  # longer pictures are drawn from every k-th pixel


def grey(pixels: Array) -> RGB:
    """(C, Y, X) raw pixels to (Y, X, 3), stretched between the 0.5th and 99.5th percentile."""
    planes = pixels if len(pixels) == 3 else np.repeat(pixels[:1], 3, axis=0)
    planes = planes.astype(np.float32)
    low, high = np.percentile(planes, (0.5, 99.5))
    scaled = (planes - low) * (255.0 / max(float(high - low), 1e-9))
    return np.moveaxis(np.clip(scaled, 0, 255).astype(np.uint8), 0, -1)


def overlay(image: RGB, labels: Array) -> RGB:
    """The image with every label's outline drawn and its area tinted. ``labels`` (Y, X): 0 is left alone."""
    colour = COLOURS[np.where(labels == 0, 0, (labels.astype(np.int64) - 1) % (len(COLOURS) - 1) + 1)]
    inside = labels > 0
    edge = np.zeros_like(inside)
    edge[:-1] |= labels[:-1] != labels[1:]
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    out = image.copy()
    out[inside] = (0.75 * image[inside] + 0.25 * colour[inside]).astype(np.uint8)
    out[edge] = np.where(inside[edge][:, None], colour[edge], COLOURS[1])
    return out


class OverlayCollector:
    """Collects every k-th row and column of a mask while it is written, and draws it over the image afterwards.

    Of a volume the middle slice is drawn, of a stack the first plane, of several channels the first.
    """

    def __init__(self, shape: Sequence[int], values: Sequence[int]):
        """``values``: what the mask holds for label 0, 1, ..."""
        self._label = np.zeros(256, dtype=np.uint8)
        for label, value in reversed(list(enumerate(values))):
            self._label[value] = label
        self._every = max(1, -(-max(shape[-2:]) // LONGEST_PX))
        self._depth = shape[0] // 2 if len(shape) == 3 else None
        self._labels = np.zeros(tuple(-(-n // self._every) for n in shape[-2:]), dtype=np.uint8)

    def __call__(self, plane: int, start: int, band: Array) -> None:
        """``band`` is ([K,] rows, ...) of a mask, its first row being row ``start`` of the result."""
        if plane:
            return
        spatial = 2 if self._depth is None else 3
        rows = band[0] if band.ndim > spatial else band
        every = self._every
        if self._depth is not None:
            if start <= self._depth < start + len(rows):
                self._labels[...] = rows[self._depth - start][::every, ::every]
            return
        first = -start % every
        picked = rows[first::every, ::every]
        at = (start + first) // every
        self._labels[at : at + len(picked)] = picked

    def draw(self, source: Source, path: Path) -> None:
        """Writes the overlay as PNG."""
        shape, every = source.shape, self._every
        lead = () if self._depth is None else (self._depth,)
        rows = []
        for top in range(0, shape[-2], every * 64):
            bottom = min(top + every * 64, shape[-2])
            window = source.read(0, (*lead, top, 0), (*(d + 1 for d in lead), bottom, shape[-1]))
            flat = window[:, 0] if lead else window
            rows.append(flat[:, ::every, ::every].copy())
        picture = grey(np.concatenate(rows, axis=1))
        labels = self._labels
        if labels.shape != picture.shape[:2]:  # outputs at another scale than the image
            y, x = (np.arange(n) * m // n for n, m in zip(picture.shape[:2], labels.shape, strict=True))
            labels = labels[y][:, x]
        save(overlay(picture, self._label[labels]), path)


def comparison(panels: Sequence[tuple[str, RGB]], path: Path) -> None:
    """Writes pictures of one size side by side, each with its title, as PNG."""
    from PIL import Image, ImageDraw

    height, width = panels[0][1].shape[:2]
    gap, title = 8, 18
    sheet = Image.new("RGB", (len(panels) * (width + gap) - gap, height + title), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (name, picture) in enumerate(panels):
        sheet.paste(Image.fromarray(picture), (k * (width + gap), title))
        pen.text((k * (width + gap) + 2, 3), name, fill="black")
    _save(sheet, path)


def difference(baseline: Array, candidate: Array) -> RGB:
    """Where labels (Y, X) differ: white on black, dilated by one pixel so that single pixels are seen."""
    changed = baseline != candidate
    seen = changed.copy()
    seen[1:] |= changed[:-1]
    seen[:-1] |= changed[1:]
    seen[:, 1:] |= changed[:, :-1]
    seen[:, :-1] |= changed[:, 1:]
    return np.repeat((seen * np.uint8(255))[..., None], 3, axis=2)


def save(picture: RGB, path: Path) -> None:
    """Writes a PNG; whole or not at all."""
    from PIL import Image

    _save(Image.fromarray(picture), path)


def _save(picture: Any, path: Path) -> None:
    try:
        with Disk().writing(path) as part:
            picture.save(part, format="PNG")
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); choose another place") from error
