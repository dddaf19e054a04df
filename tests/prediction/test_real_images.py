"""Every fluorescence image of the shared data, whatever its size: tiled equals whole, bit for bit, on both backends.

Slow (tiles of 128 px keep 16 of 128 px per axis, so that 64 times the image is computed): ``pytest -m slow``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import unet_rt as urt

pytestmark = pytest.mark.slow

SIDES = (128, 200, 256, 384, 512)


def fluorescence(shared: Path) -> list[Path]:
    """Grey images with a dark background (the 1024 x 1024 grey ones are bright field)."""
    folder = shared / "data" / "dsb2018"
    entries = json.loads((folder / "index.json").read_text())
    return [folder / "image" / e["file"] for e in entries if e["kind"] == "gray" and tuple(e["hw"]) != (1024, 1024)]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_fluorescence_image_tiled_equals_whole(shared, tmp_path, backend):
    images = fluorescence(shared)
    assert len(images) > 30
    contract = urt.Contract(normalization=urt.Normalization("zscore"), task="binary")
    model = shared / "models" / "nuclei" / "weights.onnx"
    unequal = []
    with urt.build(model, contract=contract, out=tmp_path / "nuclei.urt", backend=backend, tile=(512, 512)) as engine:
        for image in images:
            from PIL import Image

            with Image.open(image) as opened:
                whole_tile = tuple(-(-n // 8) * 8 for n in opened.size[::-1])
            whole = urt.predict(engine, image, output="raw", tile=whole_tile)
            for side in SIDES:
                tiled = urt.predict(engine, image, output="raw", tile=(side, side))
                if not np.array_equal(tiled, whole):
                    unequal.append((image.name, side, float(np.abs(tiled - whole).max())))
    assert not unequal
