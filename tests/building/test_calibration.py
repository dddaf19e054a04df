"""Calibration: what is seen of activations, ranges by five methods, samples that are never in both heaps."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")

from unet_rt.baseline.samples import (
    ReadOptions,
    SampleWindow,
    constant_reason,
    draw,
)
from unet_rt.building.activations import (
    BINS,
    Distribution,
    find_overflows,
    list_tensors,
    probe,
)
from unet_rt.building.calibration import METHODS, Calibration, calibrate, input_ranges, range_of, split, tile_starts
from unet_rt.cli.demo import shipped_model
from unet_rt.contract.contract import (
    Contract,
    Normalization,
)
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import (
    EngineError,
    ImageError,
)
from unet_rt.graph.passes import qdq
from unet_rt.graph.passes.qdq import Range
from unet_rt.images.normalize import normalize_pixels
from unet_rt.kernels.request import Affine

pytestmark = pytest.mark.onnxruntime


def pixels(side: int, seed: int = 7) -> np.ndarray[Any, Any]:
    picture = microscopy((side, side), seed=seed).image.astype(np.float32)
    return ((picture - picture.mean()) / picture.std())[None, None]


@pytest.fixture(scope="module")
def prepared() -> Any:
    return qdq.prepare_graph(onnx.load(shipped_model()))


# --- what is seen -----------------------------------------------------------------------------------------------------


def test_a_distribution_is_that_of_all_its_tiles() -> None:
    rng = np.random.default_rng(0)
    tiles = [rng.gamma(1, scale, (1, 3, 20, 17)).astype(np.float32) for scale in (0.01, 5, 0.1)]  # the range grows
    seen = Distribution()
    for tile in tiles:
        seen.add(tile)
    every = np.concatenate([tile.reshape(3, -1) for tile in tiles], axis=1)
    assert (seen.low, seen.high) == (every.min(), every.max())
    np.testing.assert_allclose(seen.means, every.mean(axis=1, dtype=np.float64), rtol=1e-6)
    assert seen.positions == every.shape[1]
    assert seen.counts.sum() == every.size
    width = 2 * seen.span / BINS
    held = np.histogram(every, BINS, (-seen.span, seen.span))[0]
    # merged pairs lie where the values do: cumulative counts agree to what one bin holds
    assert np.abs(np.cumsum(held) - np.cumsum(seen.counts)).max() <= held.max()
    assert seen.high <= seen.span < 2 * seen.high + width


def test_values_that_are_not_finite_are_seen() -> None:
    seen = Distribution()
    seen.add(np.array([[[1.0, np.inf]]], np.float32))
    assert not seen.finite


def test_tensors_are_those_of_the_graph(prepared: Any) -> None:
    """The same numbers as running the graph and looking at its output; the input is a tensor, too."""
    x = pixels(64)
    output = prepared.graph.output[0].name
    assert output in list_tensors(prepared)
    found = probe(prepared, ["input", output], [[x]], threads=1)
    import onnxruntime

    y = onnxruntime.InferenceSession(prepared.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"input": x}
    )[0]
    assert (found[output].low, found[output].high) == pytest.approx((y.min(), y.max()), rel=1e-5)
    assert (found["input"].low, found["input"].high) == (x.min(), x.max())


def test_islands_for_half_precision(prepared: Any) -> None:
    """A tensor too large for FP16 makes islands of those that write and read it, and of nobody else."""
    names = list_tensors(prepared)
    x = pixels(64)
    found = probe(prepared, names, [[x]], threads=1)
    assert find_overflows(prepared, found) == frozenset()
    victim = prepared.graph.node[4].output[0]
    found[victim].high = 7e4
    islands = find_overflows(prepared, found)
    assert islands == {n.name for n in prepared.graph.node if victim in n.input or victim in n.output}
    assert 2 <= len(islands) <= 3


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_ranges_of_a_tensor_with_a_few_large_values() -> None:
    """One value in 100,000 that is twenty times larger than the rest must not cost the rest their bits, squares or not."""
    rng = np.random.default_rng(1)
    values = np.maximum(rng.normal(size=(1, 1, 400, 500)), 0).astype(np.float32)
    values.reshape(-1)[:2] = 90.0
    seen = Distribution()
    seen.add(values)
    ranges = {method: range_of(seen, method) for method in METHODS}
    assert ranges["minmax"] == Range(0.0, 90.0)
    for method in ("percentile", "entropy"):
        assert ranges[method].low == 0.0
        assert 2.5 < ranges[method].high < 30, method

    def error(chosen: Range) -> float:
        step = chosen.high / 255
        return float(np.square(np.clip(np.rint(values / step), 0, 255) * step - values)[values > 0].mean())

    assert error(ranges["mse"]) <= min(error(ranges[m]) for m in METHODS) * 1.05, "least squares is the least"


@given(low=st.floats(-50, 50), width=st.floats(0, 80), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_ranges_hold_zero_and_no_more_than_was_seen(low: float, width: float, seed: int) -> None:
    values = (low + width * np.random.default_rng(seed).random((1, 2, 9, 9))).astype(np.float32)
    seen = Distribution()
    seen.add(values)
    for method in METHODS:
        found = range_of(seen, method)
        assert min(seen.low, 0.0) <= found.low <= 0.0 <= found.high <= max(seen.high, 0.0)


def test_a_calibration_is_what_was_written(prepared: Any) -> None:
    names = qdq.tensors_to_probe(prepared)
    made = calibrate(prepared, names, [[pixels(96)]], threads=1)
    again = Calibration.from_json(json.loads(made.dumps()))
    assert again == made
    assert set(made.ranges["minmax"]) == set(names)
    with pytest.raises(EngineError, match="calibration is damaged"):
        Calibration.from_json({"tensors": {}})


@pytest.mark.parametrize(
    ("tile", "text"),
    [
        (np.zeros((1, 1, 64, 64), np.float32), "every pixel is 0"),
        (np.full((1, 1, 64, 64), 3, np.float32), "every pixel is 3"),
        (np.random.default_rng(0).normal(size=(1, 1, 64, 64)).astype(np.float32), "it is noise"),
    ],
)
def test_tiles_that_prove_nothing(prepared: Any, tile: np.ndarray[Any, Any], text: str) -> None:
    with pytest.raises(ImageError, match=text):
        calibrate(prepared, ["input"], [[tile]], threads=1)
    made = calibrate(prepared, ["input"], [[tile], [pixels(64)]], threads=1)
    assert made.tiles == 1, "it is left out where there are others"


# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, array: np.ndarray[Any, Any], start: tuple[int, ...] = (0, 0)) -> SampleWindow:
    unit = Affine(np.zeros(1, np.float32), np.ones(1, np.float32), None)
    return SampleWindow(name, None, array, unit, start, 0, array.shape[1:], name, name)


@given(count=st.integers(1, 9), sides=st.tuples(st.integers(150, 400), st.integers(150, 400)))
@settings(max_examples=25, deadline=None)
def test_no_pixel_calibrates_and_judges(count: int, sides: tuple[int, int]) -> None:
    given_ = [sample(str(k), np.arange(np.prod(sides)).reshape(1, *sides) + k * 10**6) for k in range(count)]
    calibrating, judging, sentence = split(given_)
    seen, judged = ({int(v) for s in part for v in s.pixels.ravel()[::97]} for part in (calibrating, judging))
    assert seen
    assert judged
    assert not {int(v) for s in calibrating for v in s.pixels.ravel()} & judged
    share = sum(s.pixels.size for s in calibrating) / sum(s.pixels.size for s in given_)
    assert 0.2 <= share <= 0.4
    assert ("more images" in sentence) == (count < 3)
    for part in (*calibrating, *judging):  # blocks know where they were
        origin = next(s for s in given_ if int(s.name) == int(part.name.split()[0]))
        y, x = part.start
        np.testing.assert_array_equal(part.pixels, origin.pixels[:, y:, x:][:, : part.shape[0], : part.shape[1]])


def test_the_window_of_the_farthest_values_calibrates() -> None:
    """By what the network gets: an image of few bright objects goes far beyond its standard deviation."""
    contract = Contract(normalization=Normalization("zscore"))
    images = [microscopy((96, 96), seed=seed).image for seed in range(6)]
    images[4][40:43, 50:53] = 65535
    samples = draw(images, contract, spatial=2, network_channels=1)
    ((low, high),) = input_ranges(samples[4])
    x = normalize_pixels(samples[4].pixels, samples[4].numbers)
    assert (low, high) == pytest.approx((x.min(), x.max()), rel=1e-5)
    calibrating, judging, _ = split(samples)
    assert calibrating[0] is samples[4]
    assert samples[0] in judging
    assert max(input_ranges(s).max() for s in judging) < high


def test_copies_of_a_window_do_not_calibrate_and_judge() -> None:
    """An image that is there twice, by whatever name, is one image."""
    arrays = [np.arange(200 * 160).reshape(1, 200, 160) + k for k in range(3)]
    windows = [sample(f"{k}", array) for k, array in enumerate(arrays)]
    copied = [windows[0], replace(windows[0], name="copy"), windows[1], windows[2], replace(windows[2], name="again")]
    calibrating, judging, sentence = split(copied)
    assert split(windows)[:2] == (calibrating, judging)
    assert sentence.endswith("2 of the samples are copies of others, and left out")
    calibrating, judging, sentence = split([windows[0]] * 4)
    assert len(calibrating) == len(judging) == 1
    assert "the one sample window is cut" in sentence


def test_ranges_of_the_input_are_those_of_each_channel() -> None:
    contract = Contract(normalization=Normalization("fixed", mean=(10.0, 0.0), std=(-2.0, 1.0), clip=(5.0, 100.0)))
    pixels = np.stack([np.linspace(0, 50, 10_000), np.linspace(7, 200, 10_000)]).reshape(2, 100, 100)
    (window,) = draw([pixels.astype(np.float32)], contract, spatial=2, network_channels=2, read=ReadOptions(axes="CYX"))
    np.testing.assert_allclose(input_ranges(window), [[-20, 2.5], [7, 100]])


def test_a_window_too_small_to_be_cut() -> None:
    with pytest.raises(ImageError, match="pass three or more images"):
        split([sample("a", np.zeros((1, 90, 120)))])


def test_a_window_is_cut_where_both_parts_prove_something() -> None:
    """An empty margin neither calibrates nor judges alone."""
    scene = microscopy((300, 360), seed=5).image
    for margin, axis in ((np.s_[:, :120], "X 240:360"), (np.s_[:, 120:], "Y 0:100")):
        image = scene.copy()
        image[margin] = 7
        (small,), (large,), _ = split([sample("a", image[None])])
        assert small.name == f"a {axis}"
        assert small.pixels.size * 2 == large.pixels.size
        assert all(constant_reason(part.pixels) is None for part in (small, large))
    image = np.full_like(scene, 7)
    image[100:200, 120:240] = scene[100:200, 120:240]
    with pytest.raises(
        ImageError, match=r"one proves nothing \(a X 0:120: every pixel is 7\); pass three or more images"
    ):
        split([sample("a", image[None])])


def test_tiles_for_calibration_cover_the_range_of_values() -> None:
    """The brightest spot, the darkest corner and the busiest place of a window are among the tiles."""
    picture = np.full((1, 640, 640), 100.0)
    picture[0, 500:510, 40:50] = 4000  # bright
    picture[0, 20:120, 500:600] += np.random.default_rng(0).normal(0, 300, (100, 100))  # busy
    picture[0, 300:460, 300:460] = 1  # dark
    starts = tile_starts(sample("a", picture), (160, 160), 6)
    assert len(starts) == len(set(starts)) == 6
    parts = [picture[0, y : y + 160, x : x + 160] for y, x in starts]
    assert max(p.max() for p in parts) == picture.max()
    assert min(p.mean() for p in parts) < 65
    assert sum(p.std() > 80 for p in parts) >= 2
