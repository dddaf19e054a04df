"""Windows drawn for parity: what shows nothing is left out, and said."""

from __future__ import annotations

import numpy as np
import pytest

from unet_rt.contract import Contract, Normalization
from unet_rt.errors import ImageError
from unet_rt.samples import draw
from unet_rt.synthetic import microscopy

CONTRACT = Contract(normalization=Normalization("zscore"))


def test_empty_planes_of_a_stack_are_left_out():
    pictures = [microscopy((96, 80), seed=seed).image for seed in range(3)]
    empty = np.zeros_like(pictures[0])
    stack = np.stack([empty, *pictures, empty])
    notes: list[str] = []
    drawn = draw([stack], CONTRACT, spatial=2, network_channels=1, axes="ZYX", note=notes.append)
    assert [sample.plane for sample in drawn] == [1, 2, 3]
    (note,) = notes
    assert note.startswith("2 of 5 sample windows left out")
    assert "every pixel is 0" in note
    with pytest.raises(ImageError, match="every pixel is 0"):
        draw([np.stack([empty] * 3)], CONTRACT, spatial=2, network_channels=1, axes="ZYX", note=notes.append)
