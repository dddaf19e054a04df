"""Labels given to verify belong to the planes they are compared with."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

import unet_rt as urt
from unet_rt.drawing.microscopy import microscopy

pytestmark = pytest.mark.onnxruntime


def test_every_plane_needs_a_label_of_its_own(engine_folder, tmp_path):
    drawn = [microscopy((192, 192), seed=seed) for seed in range(520, 523)]
    truth = np.stack([(picture.truth > 0).astype(np.uint8) for picture in drawn])
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    images, labels = tmp_path / "images", tmp_path / "labels"
    tifffile.imwrite(images / "a.tif", np.stack([p.image for p in drawn]), imagej=True, metadata={"axes": "ZYX"})
    tifffile.imwrite(labels / "a.tif", truth, imagej=True, metadata={"axes": "ZYX"})
    found = urt.verify(engine_folder, images, labels=labels).truth
    assert found is not None
    assert found.engine_dice > 0.8
    tifffile.imwrite(labels / "a.tif", truth[2])
    with pytest.raises(urt.ImageError, match="has no plane 1"):
        urt.verify(engine_folder, images, labels=labels)
