"""Bands: placed or blended, they are what one accumulator over the whole image gives."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_rt.contract.contract import Contract
from unet_rt.errors import ContractError, TileError
from unet_rt.tiling.axis import AxisTiles, Canvas
from unet_rt.tiling.decision import Decision, decide
from unet_rt.tiling.field import AxisField, OutputField, TileSizes
from unet_rt.tiling.grid import TileGrid, tile_grid
from unet_rt.tiling.stitch import BandStitcher, blend_weight

RAW = Decision("copy", 2, np.dtype(np.float32))


def field(stride: int = 4, halo: int = 5) -> AxisField:
    return AxisField(stride, (9, 9), (halo, halo), (0, 0), Fraction(1))


def grid_of(shape, tile, overlap=None, halo=5):
    output = OutputField("y", "NCYX", 2, (field(halo=halo),) * 2, True)
    return tile_grid(shape, tile, (TileSizes(4, 0, 4),) * 2, (output,), overlap=overlap)


def stitched(grid, value, decision=RAW, blend="gaussian", batch=3):
    """``value(origin, shape)`` is a tile's output (2, *shape); returns the stitched result and the rows of its bands."""
    stitcher = BandStitcher(grid, 0, decision, blend)
    bands, starts = [], []
    for k in range(grid.shape[0]):
        stitcher.begin(k)
        index = grid.row(k)
        for first in range(0, len(index), batch):
            part = index[first : first + batch]
            tiles = np.stack([value(origin, grid.tile_out_shape(0)) for origin in grid.origins(part)])
            stitcher.add(tiles.astype(np.float32), part)
        start, band = stitcher.finish()
        starts.append(start)
        bands.append(band)
    axis = 1 if decision.channels else 0
    return np.concatenate(bands, axis=axis), starts


def from_picture(picture):
    """Tiles cut from a picture that goes on beyond its edges; halos hold rubbish, so that a wrong halo is seen."""

    def value(origin, shape):
        rows, columns = (np.arange(o, o + n) % m for o, n, m in zip(origin, shape, picture.shape[1:], strict=True))
        return picture[:, rows][:, :, columns]

    return value


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(4, 12), st.integers(4, 12), st.integers(1, 9))
def test_placed_bands_are_the_picture(height, width, a, b, batch):
    picture = np.random.default_rng(height * 100 + width).normal(size=(2, height, width)).astype(np.float32)
    grid = grid_of((height, width), (a * 4, b * 4))
    result, _ = stitched(grid, from_picture(picture), batch=batch)
    np.testing.assert_array_equal(result, picture)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(["gaussian", "constant"]), st.data())
def test_blended_bands_equal_one_accumulator(height, width, blend, data):
    tile = (24, 16)
    overlap = (data.draw(st.integers(0, 20)), data.draw(st.integers(0, 12)))
    grid = grid_of((height, width), tile, overlap)
    rng = np.random.default_rng(height * 1000 + width)
    outputs = {}

    def value(origin, shape):
        return outputs.setdefault(tuple(origin), rng.normal(size=(2, *shape)).astype(np.float32))

    result, _ = stitched(grid, value, blend=blend)
    weight = blend_weight(grid.tile_out_shape(0), blend).astype(np.float64)
    total, weights = np.zeros((2, height + 60, width + 60)), np.zeros((height + 60, width + 60))
    for (y, x), out in outputs.items():
        window = (slice(y, y + out.shape[1]), slice(x, x + out.shape[2]))
        total[(slice(None), *window)] += weight * out
        weights[window] += weight
    expected = (total / np.maximum(weights, 1e-30))[:, :height, :width]
    # float32 sums of at most 36 tiles, each product rounded once: 40 units in the last place of the largest term
    bound = 40 * np.finfo(np.float32).eps * max(1.0, float(np.abs(expected).max()) * 4)
    np.testing.assert_allclose(result, expected, atol=bound)


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_constant_tiles_give_a_constant_picture_at_corners_too(blend):
    grid = grid_of((50, 41), (24, 16), (12, 8))
    result, _ = stitched(grid, lambda origin, shape: np.full((2, *shape), 0.7), blend=blend)
    np.testing.assert_allclose(result, np.float32(0.7), rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("shape", [(8, 8), (7, 33), (388, 388)])
def test_no_weight_is_zero(shape):
    weight = blend_weight(shape, "gaussian")
    assert weight.min() >= 0.99e-3 * weight.max()
    np.testing.assert_allclose(weight, weight[::-1, ::-1], rtol=1e-6)


def contract(**more):
    return Contract(task="multiclass", output_is="logits", **more)


def test_argmax_of_the_mean_is_not_the_mean_of_argmaxes():
    # two tiles over the same column: one is sure of class 1, the other leans to class 0
    grid = grid_of((4, 12), (4, 8), (0, 4))
    left, right = np.array([0.0, 3.0]), np.array([1.0, 0.0])
    decision = decide(contract(), 2, "mask")

    def value(origin, shape):
        chosen = left if origin[1] == 0 else right
        return np.broadcast_to(chosen[:, None, None], (2, *shape))

    result, _ = stitched(grid, value, decision, "constant")
    assert result[0].tolist() == [1] * 8 + [0] * 4


@pytest.mark.parametrize(
    ("task", "output_is", "channels", "kind", "op", "result"),
    [
        ("multiclass", "logits", 3, None, "argmax", 0),
        ("multiclass", "logits", 3, "probability", "softmax", 3),
        ("multiclass", "probabilities", 3, "probability", "copy", 3),
        ("multiclass", "logits", 3, "raw", "copy", 3),
        ("binary", "logits", 1, None, "threshold", 0),
        ("binary", "logits", 1, "probability", "sigmoid", 1),
        ("multilabel", "logits", 3, None, "threshold", 3),
        ("multilabel", "probabilities", 3, "probability", "copy", 3),
        ("regression", None, 1, None, "copy", 1),
    ],
)
def test_decisions_follow_the_task(task, output_is, channels, kind, op, result):
    decision = decide(Contract(task=task, output_is=output_is), channels, kind)
    assert (decision.op, decision.channels) == (op, result)


def test_thresholds_are_given_as_probabilities():
    raw = decide(Contract(task="binary", output_is="logits", threshold=(0.5,)), 1).threshold
    assert raw == (0.0,)
    assert decide(Contract(task="binary", output_is="probabilities", threshold=(0.3,)), 1).threshold == (0.3,)
    logits = decide(Contract(task="multilabel", output_is="logits", threshold=(0.5, 0.9)), 2).threshold
    assert logits == pytest.approx((0.0, np.log(9)))


@pytest.mark.parametrize(
    ("made", "arguments", "text"),
    [
        (Contract(), (2,), "--task"),
        (Contract(task="regression"), (1, "mask"), "--output raw"),
        (contract(), (300,), "300 classes"),
        (contract(), (2, "mask", (0, 1, 2)), "--mask-values"),
        (contract(), (2, "mask", (0, 256)), "--mask-values"),
        (Contract(task="multilabel", output_is="logits", threshold=(0.5, 0.5)), (3,), "2 thresholds"),
        (Contract(task="binary", output_is="logits", threshold=(1.0,)), (1,), "between 0 and 1"),
    ],
)
def test_decisions_that_cannot_be(made, arguments, text):
    with pytest.raises(ContractError, match=text):
        decide(made, *arguments)


def test_mask_values_are_whole_numbers():
    contract = Contract(task="multiclass", output_is="logits")
    assert decide(contract, 2, "mask", (0, np.uint8(255))).values == (0, 255)
    with pytest.raises(ContractError, match="must be 2 numbers of 0 to 255"):
        decide(contract, 2, "mask", (0, 1.5))


def test_gaps_between_blended_tiles_are_not_filled():
    output = OutputField("y", "NCYX", 2, (field(), field()), False)
    axes = (AxisTiles(Canvas(32, 0, 32), 32, (0,)), AxisTiles(Canvas(96, 0, 96), 32, (0, 40, 64)))
    stitcher = BandStitcher(TileGrid(axes, (output,), blended=True), 0, RAW)
    stitcher.begin(0)
    stitcher.add(np.ones((3, 2, 32, 32), np.float32), np.array([(0, 0), (0, 1), (0, 2)]))
    with pytest.raises(TileError, match=f"{32 * 8} samples"):
        stitcher.finish()
