"""Axes and channels: what is declared, what follows by rule, and what is ambiguous."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flat_image import open_image
from hypothesis import given
from hypothesis import strategies as st

from unet_rt.contract.contract import Contract
from unet_rt.errors import ContractError
from unet_rt.images.axes import choose_channels, parse_channels, read_axes

# shape, spatial axes and channels of the network, axes from metadata -> axes, planes
BY_RULE: list[tuple[tuple[int, ...], int, int, str | None, str, int]] = [
    ((64, 80), 2, 1, None, "YX", 1),
    ((3, 64, 80), 2, 3, None, "CYX", 1),
    ((64, 80, 3), 2, 3, None, "YXC", 1),
    ((64, 80, 4), 2, 3, None, "YXS", 1),  # colour with a fourth sample: for the channels to refuse
    ((1, 64, 80), 2, 1, None, "CYX", 1),
    ((64, 80, 1), 2, 1, None, "YXC", 1),
    ((24, 64, 80), 2, 1, None, "IYX", 24),
    ((24, 1, 64, 80), 2, 1, None, "ICYX", 24),
    ((24, 3, 64, 80), 2, 3, None, "ICYX", 24),
    ((24, 64, 80, 3), 2, 3, None, "IYXC", 24),
    ((12, 24, 64, 80), 2, 1, None, "TZYX", 288),
    ((2, 12, 3, 64, 80), 2, 3, None, "TZCYX", 24),
    ((2, 3, 12, 64, 80), 2, 3, None, "TCZYX", 24),
    ((24, 64, 80), 3, 1, None, "ZYX", 1),
    ((2, 24, 64, 80), 3, 2, None, "CZYX", 1),
    ((24, 64, 80, 2), 3, 2, None, "ZYXC", 1),
    ((5, 24, 64, 80), 3, 1, None, "TZYX", 5),
    ((5, 1, 24, 64, 80), 3, 1, None, "TCZYX", 5),
    ((12, 2, 31, 64, 80), 2, 2, "TCZYX", "TCZYX", 372),
    ((12, 2, 31, 64, 80), 3, 2, "TCZYX", "TCZYX", 12),
    ((64, 80, 3), 2, 3, "YXS", "YXS", 1),
    ((3, 64, 80), 2, 3, "SYX", "SYX", 1),
    ((5, 64, 80), 2, 1, "IYX", "IYX", 5),
    ((5, 64, 80), 2, 5, "IYX", "CYX", 1),
    ((5, 64, 80), 3, 1, "IYX", "ZYX", 1),
    ((3, 64, 80), 2, 3, "QYX", "CYX", 1),  # axes that the file leaves unknown
    ((1, 64, 80, 3), 2, 3, "CYXS", "CYXS", 1),
]


@pytest.mark.parametrize(("shape", "spatial", "wanted", "found", "axes", "planes"), BY_RULE)
def test_readings(shape: tuple[int, ...], spatial: int, wanted: int, found: str | None, axes: str, planes: int) -> None:
    layout = read_axes(shape, name="a", spatial=spatial, found=found, wanted=wanted)
    assert (layout.axes, layout.plane_count) == (axes, planes)
    assert layout.space == tuple(shape[axes.index(letter)] for letter in "ZYX"[-spatial:])


@pytest.mark.parametrize(
    ("shape", "spatial", "wanted", "message"),
    [
        ((3, 80, 3), 2, 3, "3x80x3 can be read as CYX or YXC; .* --axes CYX"),
        ((3, 64, 80), 2, 1, r"IYX \(3 planes\) or CYX \(3 channels\)"),
        ((3, 3, 64, 80), 3, 3, "CZYX or ZCYX"),
        ((180, 240, 2), 2, 1, r"IYX \(180 planes\) or YXC \(2 channels\).*--axes IYX"),
        ((180, 240, 5), 2, None, r"IYX \(180 planes\) or YXC \(5 channels\)"),
        ((180, 240, 16), 2, 1, r"YXC \(16 channels\)"),
        ((7, 180, 240, 2), 2, 1, r"TZYX \(1260 planes\) or IYXC \(2 channels\)"),
        ((20, 180, 240, 6), 3, 1, r"TZYX \(20 planes\) or ZYXC \(6 channels\)"),
        ((7, 64, 80), 2, 3, "no axis of 7x64x80 has the 3 channels"),
        ((64,), 2, 1, "not enough for a 2-D network"),
        ((64, 80), 3, 1, "not enough for a 3-D network"),
        ((1, 2, 3, 4, 5, 6), 2, 1, "say nothing about their meaning"),
        ((64, 80), 1, 1, "1 spatial axes is not supported"),
    ],
)
def test_ambiguous_shapes_name_their_readings(shape: tuple[int, ...], spatial: int, wanted: int, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        read_axes(shape, name="a", spatial=spatial, wanted=wanted)


@pytest.mark.parametrize("count", [2, 5, 16])
def test_a_tiny_last_axis_is_read_as_declared_or_picked(count: int) -> None:
    stored = np.arange(40 * 50 * count, dtype=np.float32).reshape(40, 50, count)
    for picked in (0, count - 1):
        with open_image(stored, Contract(), channels=(picked,), network_channels=1) as source:
            assert (source.planes, source.shape) == (1, (40, 50))
            np.testing.assert_array_equal(source.read(0, (0, 0), (40, 50))[0], stored[..., picked])
    with open_image(stored, Contract(), axes="IYX", network_channels=1) as source:
        assert (source.planes, source.shape) == (40, (50, count))
        np.testing.assert_array_equal(source.read(3, (0, 0), (50, count))[0], stored[3])


def test_a_stack_of_small_pictures_stays_a_stack() -> None:
    assert read_axes((40, 50, 17), name="a", spatial=2, wanted=1).axes == "IYX"
    assert read_axes((40, 8, 8), name="a", spatial=2, wanted=1).axes == "IYX"


@pytest.mark.parametrize(
    ("given_axes", "message"),
    [
        ("YXX", "must be different letters"),
        ("CYZ", "must be different letters"),
        ("Y-X", "must be different letters"),
        ("YX", "names 2 axes, the pixels have 3"),
    ],
)
def test_declared_axes_are_checked(given_axes: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        read_axes((3, 64, 80), name="a", spatial=2, given=given_axes, wanted=3)


def test_a_volume_needs_z() -> None:
    with pytest.raises(ContractError, match=r"TYX .* have no Z.*--axes ZYX"):
        read_axes((5, 64, 80), name="a", spatial=3, found="TYX", wanted=1)
    assert read_axes((5, 64, 80), name="a", spatial=3, found="TYX", given="zyx", wanted=1).axes == "ZYX"


def test_channels_and_colour_samples_together_are_refused() -> None:
    with pytest.raises(ContractError, match=r"channels \(C\) and colour samples \(S\).*--axes TYXS"):
        read_axes((2, 64, 80, 3), name="a", spatial=2, found="CYXS", wanted=3)


@given(st.permutations("TCZYX"), st.lists(st.integers(1, 5), min_size=5, max_size=5), st.sampled_from([2, 3]))
def test_any_declared_order_gives_the_same_pixels(order: list[str], sizes: list[int], spatial: int) -> None:
    standard = np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)
    stored = standard.transpose(["TCZYX".index(letter) for letter in order])
    with open_image(stored, Contract(), axes="".join(order), spatial=spatial) as source:
        assert source.channels == sizes[1]
        for plane in range(source.planes):
            where = dict(zip(source.plane_axes, np.unravel_index(plane, source.plane_shape), strict=True))
            expected = standard[where["T"]]
            if spatial == 2:
                expected = expected[:, where["Z"]]
            window = source.read(plane, (0,) * spatial, source.shape)
            np.testing.assert_array_equal(window, expected)


@pytest.mark.parametrize(
    ("stored", "options", "picked", "text"),
    [
        ("CYX", {"wanted": 2}, (0, 1), "2 channels"),
        ("CYX", {"wanted": 1, "selection": (1,)}, (1,), "channel 1 of 2"),
        ("CYX", {"wanted": 3, "selection": "1,0,1"}, (1, 0, 1), "channels 1,0,1 of 2"),
        ("CYX", {"wanted": 1, "selection": "gfp", "names": ("DAPI", "GFP")}, (1,), "channel 1 of 2"),
        ("CYX", {"wanted": 2, "names": ("DAPI", "GFP"), "wanted_names": ("gfp", "dapi")}, (1, 0), "by name"),
        ("CYX", {"wanted": 2, "names": ("DAPI", "GFP"), "wanted_names": ("a", "b")}, (0, 1), "2 channels"),
        ("CYX", {"wanted": None}, (0, 1), "2 channels"),
    ],
)
def test_channels_are_chosen(stored: str, options: dict[str, Any], picked: tuple[int, ...], text: str) -> None:
    layout = read_axes((2, 64, 80), name="a", spatial=2, found=stored)
    choice = choose_channels(layout, name="a", **options)
    assert choice.channels == picked
    assert text in choice.text


@pytest.mark.parametrize(
    ("shape", "found", "options", "message"),
    [
        ((64, 80), "YX", {"wanted": 3}, r"1 channel .*takes 3.*--channels 0,0,0"),
        ((64, 80, 3), "YXS", {"wanted": 2}, r"3 channels .*takes 2; choose with --channels"),
        ((64, 80, 4), "YXS", {"wanted": 3}, r"4 channels .*takes 3; choose with --channels, e.g. --channels 0,1,2"),
        ((2, 64, 80), "CYX", {"wanted": 1, "selection": (2,)}, r"channel 2 does not exist; the image has 2 \(0 to 1\)"),
        ((2, 64, 80), "CYX", {"wanted": 2, "selection": (1,)}, "names 1 channels, the network takes 2"),
        ((2, 64, 80), "CYX", {"wanted": 1, "selection": "luma"}, "luma makes one channel of red, green and blue"),
        ((2, 64, 80), "CYX", {"wanted": 1, "selection": "GFP"}, "names no channels"),
        ((2, 64, 80), "CYX", {"wanted": 1, "selection": "GFP", "names": ("GFP", "gfp")}, "no single channel"),
    ],
)
def test_channels_that_do_not_fit_say_how_they_could(
    shape: tuple[int, ...], found: str, options: dict[str, Any], message: str
) -> None:
    layout = read_axes(shape, name="a", spatial=2, found=found)
    with pytest.raises(ContractError, match=message):
        choose_channels(layout, name="a", **options)


def test_channel_options_are_parsed() -> None:
    assert parse_channels("2, 1,0") == (2, 1, 0)
    assert parse_channels("luma") == "luma"
    assert parse_channels("DAPI,GFP") == "DAPI,GFP"
    for wrong in ("", "1,,2", "-1", "0,-2"):
        with pytest.raises(ContractError, match="--channels"):
            parse_channels(wrong)


def test_a_choice_of_channels_helps_to_find_their_axis() -> None:
    with open_image(np.zeros((2, 64, 80)), Contract(), channels=(1,), network_channels=1) as source:
        assert (source.axes, source.shape) == ("CYX", (64, 80))
    with open_image(np.zeros((64, 80, 3)), Contract(), channels="2", network_channels=1) as source:
        assert source.shape == (64, 80)
    with open_image(np.zeros((24, 64, 80)), Contract(), channels="0,0,0", network_channels=3) as source:
        assert (source.planes, source.channels) == (24, 3)
