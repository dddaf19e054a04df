"""Draws docs/images/demo.png: image, mask and overlay of the demo side by side.

``unet-rt demo --size 1024 --out demo-output``, then ``python docs/picture.py demo-output``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

SIDE, GAP = 320, 8
CORNER = (352, 64)  # of the part that is shown
COLOURS = 48
TARGET = Path(__file__).resolve().parent / "images" / "demo.png"


def main(folder: Path) -> None:
    import tifffile
    from PIL import Image

    part = tuple(slice(start, start + SIDE) for start in CORNER)
    image = tifffile.imread(folder / "image.tif").astype(np.float32)
    low, high = np.percentile(image, (1, 99.8))
    grey = (np.clip((image - low) / (high - low), 0, 1)[part] ** 0.6 * 255).astype(np.uint8)
    mask = tifffile.imread(folder / "mask.tif")[part]
    overlay = np.asarray(Image.open(folder / "overlay.png").convert("RGB"))[part]
    panels = [np.stack([grey] * 3, axis=-1), np.stack([mask] * 3, axis=-1), overlay]
    gap = np.full((SIDE, GAP, 3), 255, np.uint8)
    whole = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
    TARGET.parent.mkdir(exist_ok=True)
    small = Image.fromarray(whole).quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(TARGET, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
