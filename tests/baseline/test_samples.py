"""Windows drawn for parity: what shows nothing is left out, and said."""

from __future__ import annotations

import numpy as np
import pytest

from unet_rt.baseline.samples import ReadOptions, draw
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import ImageError

CONTRACT = Contract(normalization=Normalization("zscore"))


def test_empty_planes_of_a_stack_are_left_out():
    pictures = [microscopy((96, 80), seed=seed).image for seed in range(3)]
    empty = np.zeros_like(pictures[0])
    stack = np.stack([empty, *pictures, empty])
    notes: list[str] = []
    drawn = draw([stack], CONTRACT, spatial=2, network_channels=1, read=ReadOptions(axes="ZYX"), note=notes.append)
    assert [sample.plane for sample in drawn] == [1, 2, 3]
    (note,) = notes
    assert note.startswith("2 of 5 sample windows left out")
    assert "every pixel is 0" in note
    with pytest.raises(ImageError, match="every pixel is 0"):
        draw(
            [np.stack([empty] * 3)],
            CONTRACT,
            spatial=2,
            network_channels=1,
            read=ReadOptions(axes="ZYX"),
            note=notes.append,
        )


def test_images_that_are_not_drawn_from_are_said():
    images = [microscopy((96, 80), seed=seed).image for seed in range(5)]
    notes: list[str] = []
    drawn = draw(images, CONTRACT, spatial=2, network_channels=1, count=3, note=notes.append)
    np.testing.assert_array_equal([sample.pixels[0] for sample in drawn], images[::2])
    (note,) = notes
    assert note.startswith("windows are drawn from 3 of 5 images")
    assert len(draw(images, CONTRACT, spatial=2, network_channels=1, count=5, note=notes.append)) == 5
    assert len(notes) == 1


@pytest.mark.onnxruntime
def test_what_is_said_of_the_first_sample_holds_for_all_of_it(tmp_path):
    """Nuclei in one corner: the middle alone would read as a mask that is constant, and as a wrong normalisation."""
    import unet_rt as urt
    from unet_rt.cli.demo import shipped_model

    drawn = microscopy((120, 120), seed=1).image
    image = np.random.default_rng(0).poisson(np.percentile(drawn, 5), (560, 560)).astype(np.uint16)
    image[:120, :120] = drawn
    reports: list[urt.BuildReport] = []
    options = {"backend": "onnxruntime", "precision": "fp32", "tile": (320, 320), "halo": "exact"}
    with urt.build(
        shipped_model(), samples=[image], out=tmp_path / "x.urt", report=reports.append, **options
    ) as engine:
        share = (urt.predict(engine, image) == 1).mean()
    assert share > 0
    assert reports[0].first["class_share"]["nucleus"] == pytest.approx(share)
    assert reports[0].warnings == ()
