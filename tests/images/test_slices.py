"""Networks of neighbouring slices: slid over Z, continued by the border rule, normalised as one stack or slice by slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forms import Array, answers, images, written

import unet_rt as urt
from unet_rt.contract.contract import Border, Contract, Normalization
from unet_rt.errors import ContractError
from unet_rt.images.normalize import affine
from unet_rt.images.open import open_image
from unet_rt.images.reading import Reading

STACK = np.arange(5 * 6 * 7, dtype=np.uint16).reshape(5, 6, 7)
BEYOND: dict[Border, dict[int, int | None]] = {
    "mirror": {-2: 2, -1: 1, 5: 3, 6: 2},
    "edge": {-2: 0, -1: 0, 5: 4, 6: 4},
    "constant": {-2: None, -1: None, 5: None, 6: None},
}


def opened(image: Any, count: int | None, border: Border = "mirror", axes: str | None = None, spatial: int = 2) -> Any:
    contract, reading = Contract(border=border), Reading(axes, "slices")
    return open_image(image, contract, reading, spatial=spatial, network_channels=count)


@pytest.mark.parametrize("border", list(BEYOND))
@pytest.mark.parametrize("count", [3, 5])
def test_channels_are_the_slices_around(border: Border, count: int) -> None:
    with opened(STACK, count, border) as source:
        assert (source.channels, source.planes, source.plane_axes, source.dtype) == (count, 5, "Z", np.uint16)
        assert f"with {count // 2} slice" in source.reading
        for z in range(5):
            found = source.read(z, (1, 2), (5, 7))
            for channel, at in enumerate(range(z - count // 2, z + count // 2 + 1)):
                wanted = at if 0 <= at < 5 else BEYOND[border][at]
                right = np.zeros((4, 5)) if wanted is None else STACK[wanted, 1:5, 2:7]
                np.testing.assert_array_equal(found[channel], right)


def test_a_border_of_normalised_zeros_is_refused() -> None:
    with pytest.raises(ContractError, match=r"border zero is 0 after .*use --border mirror, edge or constant"):
        opened(STACK, 3, "zero")


def test_time_points_do_not_mix() -> None:
    image = np.stack([STACK, STACK + 1000])
    with opened(image, 3) as source:
        assert (source.planes, source.plane_axes) == (10, "TZ")
        np.testing.assert_array_equal(source.read(5, (0, 0), (6, 7)), STACK[[1, 0, 1]] + 1000)
    with opened(image.swapaxes(0, 1), 3, axes="ZTYX") as source:
        np.testing.assert_array_equal(source.read(1, (0, 0), (6, 7)), STACK[[1, 0, 1]] + 1000)


@pytest.mark.parametrize("scope", [None, "image", "channel", "slice"])
@pytest.mark.parametrize("method", ["zscore", "percentile", "minmax"])
def test_statistics_are_of_the_stack_or_of_each_slice(method: Any, scope: Any) -> None:
    """Not of the channels, in which slices at the ends would come twice."""
    with opened(STACK, 3) as source:
        found = affine(Normalization(method, scope=scope), source)
        with open_image(STACK, Contract(), Reading("ZYX"), network_channels=1) as stack:
            alone = affine(Normalization(method, scope="slice" if scope == "slice" else "channel"), stack)
            for z in range(5):
                around = [alone.plane(k) for k in (1 if z == 0 else z - 1, z, 3 if z == 4 else z + 1)]
                np.testing.assert_array_equal(found.plane(z).offset, [n.offset[0] for n in around])
                np.testing.assert_array_equal(found.plane(z).divisor, [n.divisor[0] for n in around])


@pytest.mark.parametrize(
    ("shape", "count", "axes", "spatial", "text"),
    [
        ((5, 6, 7), 4, None, 2, "as many neighbours before it as behind, and this network takes 4"),
        ((5, 6, 7), 1, None, 2, "network takes 1 channel"),
        ((5, 6, 7), 3, None, 3, "gives a 2-D network a slice"),
        ((5, 6, 7), 3, "TYX", 2, "axes TYX .* have no Z .* --axes ZYX"),
        ((6, 7), 3, "YX", 2, "no Z"),
        ((6, 7), 3, None, 2, "do not say which are the slices"),
        ((5, 2, 6, 7), 3, "ZCYX", 2, "hold 2 channels"),
    ],
)
def test_what_is_no_stack_of_slices(shape: Any, count: int, axes: str | None, spatial: int, text: str) -> None:
    with pytest.raises(ContractError, match=text):
        opened(np.zeros(shape, np.uint8), count, axes=axes, spatial=spatial)


@pytest.mark.parametrize(
    ("shape", "wanted", "text"),
    [
        ((9, 64, 80), 3, r"or --channels slices for a network of neighbouring slices$"),
        ((64, 80), 3, r"use --channels slices; --channels 0,0,0 gives the same grey .* never for slices"),
        ((64, 80), 2, r"; --channels 0,0 gives the same grey for each: right for colours, never for slices"),
    ],
)
def test_one_slice_repeated_is_never_advised_alone(shape: Any, wanted: int, text: str) -> None:
    with pytest.raises(ContractError, match=text):
        open_image(np.zeros(shape, np.uint8), Contract(), network_channels=wanted)
    with pytest.raises(ContractError) as error:
        open_image(np.zeros((9, 64, 80), np.uint8), Contract(), Reading("CYX", (0,)), network_channels=3)
    assert "0,0,0" not in str(error.value)


@pytest.mark.onnxruntime
@pytest.mark.parametrize("border", ["mirror", "constant"])
def test_a_network_of_slices_is_what_the_file_says(border: Border, tmp_path: Path) -> None:
    """Built, predicted in tiles and whole, and verified on a stack, against ONNX Runtime slice by slice."""
    path = written("slices", tmp_path)
    stack = np.stack([np.roll(images(1)[0], 3 * z, 1) // (1 + z // 3) for z in range(5)])
    options = {"precision": "fp32", "backend": "onnxruntime", "tile": (144, 136), "halo": "exact", "threads": 1}
    out, contract = tmp_path / "x.urt", Contract(border=border)
    urt.build(path, samples=[stack], out=out, channels="slices", contract=contract, **options).close()
    with urt.load(out) as engine:
        masks = [urt.predict(engine, stack, channels="slices", tile=tile) for tile in (None, (128, 120))]
    low, high = np.percentile(stack, (1, 99.8))
    kind = {"mirror": "reflect", "constant": "constant"}[border]
    ends = [(1, 1), *((0, -n % 8) for n in stack.shape[1:])]
    pixels = ((np.pad(stack, ends, mode=kind) - low) / (high - low + 1e-6)).astype(np.float32)
    for z in range(5):
        right: Array = answers(path, pixels[None, z : z + 3])[0][0].argmax(0)[: stack.shape[1], : stack.shape[2]]
        assert 0.02 < right.mean() < 0.5
        for mask in masks:
            assert (mask[z] != right).mean() <= 1e-4, "another order of the sums over three slices"
    assert urt.verify(out, [stack], channels="slices").accepted
