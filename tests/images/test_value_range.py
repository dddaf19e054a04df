"""Pixels from 0 to 1 for a network of grey levels, and the other way round: an error that names the factor."""

from __future__ import annotations

import numpy as np
import pytest

import unet_rt as urt
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.drawing.microscopy import microscopy
from unet_rt.images.open import open_image
from unet_rt.images.value_range import check_value_range

SCALE = Normalization("scale", scale=255.0)
GREY = microscopy((300, 280), seed=3).image  # uint16, to about 4,000


def check(image: np.ndarray, seen: tuple[float, float] | None, normalization: Normalization = SCALE) -> None:
    with open_image(image, Contract()) as source:
        check_value_range(source, seen, normalization)


@pytest.mark.parametrize(
    ("seen", "factor"), [((0, 255), 255), ((3, 201), 255), ((80, 4000), 65535), ((0, 65535), 65535)]
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pixels_divided_by_the_largest_value_are_refused_with_it(seen, factor, dtype) -> None:
    image = (np.minimum(GREY, factor) / factor).astype(dtype)
    with pytest.raises(
        urt.ContractError, match=f"were divided by {factor}, as ToTensor does; multiply them by {factor} "
    ):
        check(image, seen)


def test_grey_levels_for_a_network_of_fractions_are_refused() -> None:
    for image, factor in ((GREY, 65535), ((GREY >> 4).astype(np.uint8), 255)):
        with pytest.raises(urt.ContractError, match=f"network takes pixels from 0 to 0.97; divide them by {factor}"):
            check(image, (0.0, 0.97), Normalization("none"))


def test_what_no_factor_explains_passes() -> None:
    fractions = (GREY / 65535).astype(np.float32)
    grey = GREY.astype(np.float32)
    late = fractions.copy()
    late[-1, -1] = 7.0  # one pixel that no division by the largest value gives
    for image, seen, how in (
        (grey, (0, 4000), SCALE),
        (late, (0, 4000), SCALE),
        (np.zeros((64, 64), np.float32), (0, 255), SCALE),  # a field without anything
        (fractions, (0, 12.0), SCALE),  # lengths, say
        (fractions, (-3.1, 255), SCALE),
        (fractions, None, SCALE),
        (fractions, (0, 4000), Normalization("percentile")),  # makes up for any factor
        (GREY, (0.0, 1.0), Normalization("dtype")),
        ((GREY > 500).astype(np.uint8), (0.0, 1.0), Normalization("none")),
    ):
        check(image, seen, how)
    with pytest.raises(urt.ContractError, match="multiply them by 65535"):
        check(fractions, (0, 4000), Normalization("percentile", clip=(0, 3000)))


def test_pixels_without_data_say_nothing(tmp_path) -> None:
    tifffile = pytest.importorskip("tifffile")
    image = (GREY / 65535).astype(np.float32)
    image[:150] = -9999
    tifffile.imwrite(tmp_path / "a.tif", image, extratags=[(42113, "s", 0, "-9999", True)])
    with (
        open_image(tmp_path / "a.tif", Contract()) as source,
        pytest.raises(urt.ContractError, match="multiply them by 65535"),
    ):
        check_value_range(source, (0, 4000), SCALE)
