"""What any tiler should meet: the behavioural cases that other tilers' suites hold, in our own words, named by their ids.

The network is a function of the tile (x + 1, 2x, the tile's own number, ...) behind a real ``Engine``; pixels go through
``unet_rt.predict`` or ``prediction.run``, so that windows, gathering, stitching and blending are those of every prediction.

Fractions of overlap are written as whole pixels (``overlap`` is the pixels that neighbours share); "-1 = the whole axis"
is a tile as long as the axis. What does not apply:

- 1-D images (A1) have no network here: shown on geometry, kernels and stitcher. Of 4-D ones (A2) an axis is a plane axis.
- A17 holds for blended tiles; placed ones are a step apart and the last one is moved back (their overlap is discarded).
- A18 and A19 (clamped edge tiles, zero padding), the exact numbers of B8's Gaussian and B17 are choices that differ here.
- B16 (the result lies on the device that was asked, with the same values): ``test_predict_device.py``, on a double of a
  device and on a GPU.
- Steps are never given (they follow from tile and overlap, or from the halo), so "step > tile" cannot be said.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import prod
from typing import Any

import flat_kernels as kernels
import numpy as np
import pytest
from flat_image import open_image
from flat_output import open_output
from hypothesis import given, settings
from hypothesis import strategies as st

import unet_rt as urt
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.engine.engine import Engine
from unet_rt.engine.spec import EngineSpec, InputSpec
from unet_rt.images.normalize import affine
from unet_rt.prediction.run import run
from unet_rt.prediction.work import Computation, Work
from unet_rt.tiling.decision import Decision, decide
from unet_rt.tiling.field import AxisField, OutputField, TileSizes
from unet_rt.tiling.grid import TileGrid, tile_grid
from unet_rt.tiling.stitch import BandStitcher, blend_weight

Array = np.ndarray[Any, np.dtype[Any]]
EPS = float(np.finfo(np.float32).eps)
BLENDS = ["constant", "gaussian"]


class Network:
    """A session around functions of the batch (N, C, *tile), one per output; remembers the shapes it was given."""

    precision, device, version, threads = "fp32", "cpu", "none 0", 1

    def __init__(self, *functions: Callable[[Array], Array]) -> None:
        self.functions, self.shapes = functions, []

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.shapes.append(inputs[0].shape)
        return [function(inputs[0]) for function in self.functions]

    def close(self) -> None:
        pass


def plus_one(x: Array) -> Array:
    return x + 1


def twice(x: Array) -> Array:
    return 2 * x


def same(x: Array) -> Array:
    return x


def output(dims: int, channels: int, *, stride: int = 1, halo: int = 0, scale: Fraction = Fraction(1)) -> OutputField:
    field = AxisField(stride, (halo, halo), (halo, halo), (0, 0), scale)
    return OutputField(f"y{channels}", "NC" + "ZYX"[-dims:], channels, (field,) * dims, True)


def engine(
    *functions: Callable[[Array], Array],
    tile: Sequence[int],
    channels: int = 1,
    outputs: Sequence[OutputField] | None = None,
    overlap: Sequence[int] | None = None,
    blend: str = "constant",
    stride: int = 1,
    halo: int = 0,
    fixed: bool = False,
    batch: int | None = None,
    **contract: Any,
) -> Engine:
    """An engine whose network is ``functions``; with ``overlap`` tiles are blended, without they are placed."""
    dims = len(tile)
    contract = {"normalization": Normalization("none"), "task": "regression", "output_is": "values"} | contract
    axes = "NC" + "ZYX"[-dims:]
    spec = EngineSpec(
        contract=Contract(axes=axes, **contract),
        inputs=(InputSpec("x", axes, channels),),
        outputs=tuple(outputs or [output(dims, channels, stride=stride, halo=halo)] * len(functions)),
        sizes=tuple(TileSizes(stride, 0, stride, fixed=t if fixed else None) for t in tile),
        batch=batch,
        halo="exact",
        halo_limit=None,
        tile=tuple(tile),
        overlap=None if overlap is None else tuple(overlap),
        blend=blend,
        precision="fp32",
        backend="none",
        device="cpu",
    )
    return Engine(spec, Network(*functions))


def predicted(made: Engine, image: Array, **options: Any) -> Array:
    """Of an image (C, *spatial); tiles are those of the engine, not chosen for the image."""
    result = urt.predict(made, image, axes="C" + "ZYX"[1 - image.ndim :], tile=made.spec.tile, **options)
    assert isinstance(result, np.ndarray)
    return result


def whole_numbers(shape: Sequence[int], dtype: Any = np.float32, seed: int = 0) -> Array:
    """0 to 255: small enough for every sum of tiles to be exact in float32."""
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def px(tile: Sequence[int], share: float) -> tuple[int, ...]:
    return tuple(int(t * share) for t in tile)


def grid_of(image: Sequence[int], tile: Sequence[int], overlap: Sequence[int] | None = None, **more: Any) -> TileGrid:
    sizes = (TileSizes(more.get("stride", 1), 0, 1),) * len(tile)
    return tile_grid(image, tile, sizes, (output(len(tile), 1, **more),), overlap=overlap)


def raw(channels: int = 1) -> Decision:
    return Decision("copy", channels, np.dtype(np.float32))


# --- A: coverage and identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [None, 1])
def test_a1_one_dimension(overlap):
    for image in whole_numbers((2, 3, 16)):
        grid = tile_grid(
            (16,), (4,), (TileSizes(1, 0, 1),), (output(1, 3),), overlap=None if overlap is None else (overlap,)
        )
        stitcher, bands = BandStitcher(grid, 0, raw(3), "constant"), []
        for k in range(grid.count):
            tiles = np.empty((1, 3, 4), np.float32)
            kernels.tile_gather(image, grid.origins(grid.row(k)), tiles)
            stitcher.begin(k)
            stitcher.add(tiles + 1, grid.row(k))
            bands.append(stitcher.finish()[1])
        np.testing.assert_array_equal(np.concatenate(bands, axis=1), image + 1)
        assert grid.count == (4 if overlap is None else 5)


def test_a2_a_fourth_axis_is_a_plane_axis():
    made = engine(plus_one, tile=(4, 4, 4), channels=3, overlap=(1, 1, 1))
    for image in whole_numbers((2, 3, 16, 15, 7, 9)):
        result = urt.predict(made, image, axes="CTZYX")
        np.testing.assert_array_equal(result, np.moveaxis(image, 1, 0) + 1)
    with pytest.raises(urt.TileError, match="spatial axes"):
        kernels.tile_gather(image, np.zeros((1, 4), np.int64), np.empty((1, 3, 4, 4, 4, 4), np.float32))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("tile", [(4, 15, 7), (4, 10, 7), (4, 1, 7)])
@pytest.mark.parametrize("blended", [False, True])
def test_a3_tiles_as_long_as_an_axis_or_one_pixel(count, tile, blended):
    made = engine(plus_one, tile=tile, channels=3, overlap=px(tile, 0.25) if blended else None)
    for image in whole_numbers((count, 3, 16, 15, 7)):
        np.testing.assert_array_equal(predicted(made, image), image + 1)
    assert {shape[2:] for shape in made._session.shapes} == {tile}


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("blend", BLENDS)
def test_a4_a_tile_larger_than_the_volume(share, fixed, blend):
    tile = (20, 22, 23)
    made = engine(plus_one, tile=tile, channels=3, overlap=px(tile, share), blend=blend, fixed=fixed)
    image = whole_numbers((3, 16, 15, 7))
    result = predicted(made, image)
    assert result.shape == image.shape
    # one tile covers everything: w * v / w rounds twice
    np.testing.assert_allclose(result, image + 1, rtol=2 * EPS)
    assert made._session.shapes == [(1, 3, *(tile if fixed else (16, 15, 7)))]


@pytest.mark.parametrize(("share", "blend"), [(0.25, "constant"), (0.5, "gaussian")])
def test_a5_a_tile_larger_than_the_image(share, blend):
    tile = (80, 50)
    image = whole_numbers((3, 16, 7))
    for fixed in (False, True):
        made = engine(plus_one, tile=tile, channels=3, overlap=px(tile, share), blend=blend, fixed=fixed)
        np.testing.assert_allclose(predicted(made, image), image + 1, rtol=2 * EPS)
        assert len(made._session.shapes) == 1


@pytest.mark.parametrize("overlap", [None, (0, 1)])
def test_a6_more_tiles_in_a_batch_than_there_are(overlap):
    made = engine(plus_one, tile=(2, 6), channels=3, overlap=overlap)
    for image in whole_numbers((2, 3, 15, 7)):
        np.testing.assert_array_equal(predicted(made, image, batch=1000), image + 1)
    assert made._session.shapes == [(2, 3, 2, 6)] * 16  # two images of eight tile rows; a batch holds one row


@pytest.mark.parametrize("channels", [1, 3])
def test_a7_weights_are_a_partition_of_unity(channels):
    made = engine(plus_one, tile=(4, 10, 7), channels=channels, overlap=(1, 2, 1), blend="gaussian")
    result = predicted(made, np.ones((channels, 16, 15, 7), np.float32))
    np.testing.assert_array_equal(result, 2.0)  # every term is a doubled weight, and doubling is exact


@pytest.mark.parametrize(("tile", "share"), [((7, 10), 0.8), ((15, 12), 0.0), ((10, 11), 0.0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("blend", BLENDS)
def test_a8_twice(tile, share, dtype, blend):
    image = np.random.default_rng(3).normal(size=(1, 10, 11)).astype(dtype)
    result = predicted(engine(twice, tile=tile, overlap=px(tile, share), blend=blend), image)
    assert result.dtype == np.float32
    tiles = prod(-(-n // (t - int(t * share))) for n, t in zip(image.shape[1:], tile, strict=True))
    # float64 pixels are rounded once; a product, a sum per tile on either side, and a quotient
    np.testing.assert_allclose(result / 2, image, rtol=(2 * tiles + 4) * EPS)
    placed = predicted(engine(twice, tile=tile), image)
    np.testing.assert_array_equal(placed / 2, image.astype(np.float32))


def accumulated(grid: TileGrid, image: Array, network: Callable[[Array], Array], blend: str) -> Array:
    """One accumulator over the whole image, all tiles at once: no bands, no pipeline."""
    shape, channels = grid.out_shape(0), len(image)
    index = np.concatenate(list(grid.rows()))
    tiles = np.empty((len(index), channels, *grid.tile), np.float32)
    kernels.tile_gather(image, grid.origins(index), tiles)
    place = grid.placement(index, 0)
    total, weights = np.zeros((channels, *shape), np.float32), np.zeros(shape, np.float32)
    weight = blend_weight(grid.tile_out_shape(0), blend)
    kernels.tile_blend(network(tiles), place.source, place.target, place.size, weight, total, weights)
    out = np.empty_like(total)
    assert kernels.blend_finish(total, weights, out, op="copy") == 0
    return out


@pytest.mark.parametrize(
    ("shape", "tile", "share"),
    [((511, 237), (96, 80), 0.4), ((512, 245), (96, 80), 0.0), ((512, 245), (512, 80), 0.125)],
)
@pytest.mark.parametrize("blend", BLENDS)
def test_a9_bands_are_one_accumulator_whatever_the_batch(shape, tile, share, blend):
    image = np.random.default_rng(4).normal(size=(2, *shape)).astype(np.float32)
    made = engine(twice, tile=tile, channels=2, overlap=px(tile, share), blend=blend)
    grid = made.spec.grid(shape)
    expected = accumulated(grid, image, twice, blend)
    for batch in (1, 3, 4):
        np.testing.assert_array_equal(predicted(made, image, batch=batch), expected)
    np.testing.assert_allclose(expected / 2, image, rtol=22 * EPS, atol=EPS)  # at most nine tiles over a pixel
    turned = engine(twice, tile=tile[::-1], channels=2, overlap=px(tile, share)[::-1], blend=blend)
    other = predicted(turned, np.swapaxes(image, 1, 2))
    np.testing.assert_allclose(np.swapaxes(other, 1, 2) / 2, image, rtol=22 * EPS, atol=EPS)


def test_a10_overlap_per_axis_in_three_dimensions():
    """A quarter of the peer's volume along every axis but the tiles' odd sizes and the overlaps as they are."""
    image = whole_numbers((1, 125, 128, 100))
    tile, overlap = (96, 97, 98), (int(96 * 0.4), int(97 * 0.32), 0)
    made = engine(twice, tile=tile, overlap=overlap)
    np.testing.assert_array_equal(predicted(made, image), 2 * image)
    grid = made.spec.grid(image.shape[1:])
    assert [axis.starts for axis in grid.axes] == [(0, 29), (0, 31), (0, 2)]


@pytest.mark.parametrize(("shape", "tile", "overlap"), [((563, 512), 128, 0), ((500, 500), 51, 25)], ids=["a11", "a12"])
@pytest.mark.parametrize("blend", BLENDS)
def test_a11_a12_bytes_come_back(shape, tile, overlap, blend):
    image = whole_numbers((*shape, 3), np.uint8)
    made = engine(same, tile=(tile, tile), channels=3, overlap=(overlap, overlap), blend=blend)
    result = urt.predict(made, image, axes="YXC")
    if blend == "gaussian":  # weights are no whole numbers; at most nine tiles over a pixel
        assert np.abs(result - np.moveaxis(image, -1, 0)).max() <= 255 * 22 * EPS
        result = np.rint(result)
    np.testing.assert_array_equal(np.moveaxis(result, 0, -1).astype(np.uint8), image)
    placed = urt.predict(engine(same, tile=(tile, tile), channels=3), image, axes="YXC", tile=(tile, tile))
    np.testing.assert_array_equal(np.moveaxis(placed, 0, -1), image)


def test_a13_half_overlap_with_a_smooth_weight():
    """A quarter of the peer's size; our smooth weight is the Gaussian."""
    image = whole_numbers((3, 1250, 1250), np.uint8)
    made = engine(same, tile=(128, 128), channels=3, overlap=(64, 64), blend="gaussian")
    np.testing.assert_array_equal(np.rint(predicted(made, image)), image)
    weight = blend_weight((128, 128), "gaussian")
    for other in (weight.T, weight[::-1], weight[:, ::-1]):
        np.testing.assert_array_equal(weight, other)


def test_a14_fewer_channels_out_than_in():
    image = whole_numbers((3, 704, 640))
    largest = engine(
        lambda x: x.max(axis=1, keepdims=True), tile=(160, 160), channels=3, outputs=[output(2, 1)], overlap=(0, 0)
    )
    results = [predicted(largest, image, batch=batch) for batch in (1, 8)]
    for result in results:
        np.testing.assert_array_equal(result, image.max(axis=0, keepdims=True))


def test_a15_counts_and_shapes_of_tiles():
    assert grid_of((20,) * 3, (10,) * 3).count == 8
    assert grid_of((20,) * 3, (10,) * 3, (0,) * 3).count == 8
    grid = grid_of((20,) * 3, (12,) * 3, (4,) * 3)
    assert grid.count == 8
    made = engine(same, tile=(12,) * 3, overlap=(4,) * 3)
    image = whole_numbers((1, 20, 20, 20))
    np.testing.assert_array_equal(predicted(made, image), image)
    assert made._session.shapes == [(1, 1, 12, 12, 12)] * 8


@pytest.mark.parametrize("overlap", [None, (0, 0, 0)])
def test_a16_a_size_that_is_no_multiple_is_covered(overlap):
    grid = grid_of((15,) * 3, (10,) * 3, overlap)
    covered = coverage(grid)
    assert covered.min() == 1
    assert covered.max() == (1 if overlap is None else 8)


def coverage(grid: TileGrid) -> Array:
    """How often each sample of the result is written."""
    covered = np.zeros(grid.out_shape(0), int)
    for row in grid.rows():
        place = grid.placement(row, 0)
        for start, size in zip(place.target, place.size, strict=True):
            covered[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] += 1
    return covered


@pytest.mark.parametrize(
    ("image", "tile", "share", "evenly"),
    [
        (110, 64, 0.5, (0, 23, 46)),
        (565, 256, 0.5, (0, 103, 206, 309)),
        (584, 256, 0.5, (0, 109, 219, 328)),
        (1272, 512, 0.75, (0, 380, 760)),
        (65, 64, 0.5, (0, 1)),
        (64, 64, 0.5, (0,)),
    ],
)
def test_a17_blended_tiles_are_spread_evenly(image, tile, share, evenly):
    overlap = tile - int(tile * share)
    assert grid_of((image,), (tile,), (overlap,)).axes[0].starts == evenly
    assert evenly[-1] == image - tile


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 900), st.integers(1, 20), st.sampled_from([1, 2, 8]), st.data())
def test_a17_blended_tiles_share_at_least_the_overlap(image, strides, stride, data):
    tile = strides * stride
    overlap = data.draw(st.integers(0, tile - stride))
    axis = grid_of((image,), (tile,), (overlap,), stride=stride).axes[0]
    gaps = [b - a for a, b in itertools.pairwise(axis.starts)]
    assert (axis.starts[0], axis.starts[-1] + axis.tile) == (0, axis.canvas.size)
    assert all(start % stride == 0 for start in axis.starts)
    assert all(0 < gap <= tile - overlap for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= stride


def test_a20_tiles_are_in_row_major_order():
    grid = grid_of((4, 4), (2, 2), (1, 1))
    origins = [tuple(o) for row in grid.rows() for o in grid.origins(row)]
    assert origins == list(itertools.product((0, 1, 2), repeat=2))
    assert grid_of((4, 4), (3, 3), (2, 2)).axes[0].starts == (0, 1)
    assert grid_of((4, 4), (3, 3), (2, 2)).count == 4


def test_a21_rows_and_columns_are_not_exchanged():
    image = whole_numbers((1, 6, 10))
    with open_image(image, Contract(normalization=Normalization("none")), axes="CYX", spatial=2) as source:
        np.testing.assert_array_equal(source.read(0, (1, 2), (4, 5)), image[:, 1:4, 2:5])
    tile = np.empty((1, 1, 3, 3), np.float32)
    kernels.tile_gather(image, [[1, 2]], tile)
    np.testing.assert_array_equal(tile[0], image[:, 1:4, 2:5])
    made = engine(same, tile=(2, 5))
    np.testing.assert_array_equal(predicted(made, image), image)


# --- B: merging ---------------------------------------------------------------------------------------------------


def blended(
    blocks: Sequence[Array], starts: Sequence[Sequence[int]], shape: Sequence[int]
) -> tuple[Array, Array, Array]:
    """Blocks (K, *size) summed with weight 1: totals, weights, and the mean as ``blend_finish`` gives it."""
    total, weights = np.zeros((1, *shape), np.float32), np.zeros(shape, np.float32)
    if blocks:
        tiles = np.stack(blocks).astype(np.float32)
        size = np.array([tiles.shape[2:]] * len(tiles))
        weight = np.ones(tiles.shape[2:], np.float32)
        kernels.tile_blend(tiles, np.zeros_like(size), np.array(starts), size, weight, total, weights)
    out = np.empty_like(total)
    kernels.blend_finish(total, weights, out, op="copy")
    return total[0], weights, out[0]


def test_b1_two_blocks_share_a_column():
    total, weights, mean = blended([np.ones((1, 2, 2)), np.full((1, 2, 2), 3.0)], [(0, 0), (0, 1)], (2, 3))
    assert total.tolist() == [[1, 4, 3]] * 2
    assert weights.tolist() == [[1, 2, 1]] * 2
    assert mean.tolist() == [[1, 2, 3]] * 2


@pytest.mark.parametrize("second", [2.0, 0.0])
def test_b2_a_block_counts_although_it_is_zero(second):
    _, weights, mean = blended([np.ones((1, 2, 2)), np.full((1, 2, 2), second)], [(0, 0), (0, 2)], (2, 4))
    assert weights.tolist() == [[1, 1, 1, 1]] * 2
    assert mean.tolist() == [[1, 1, second, second]] * 2


def test_b3_no_block_at_all():
    total, weights, mean = blended([], [], (2, 3))
    assert not total.any()
    assert not weights.any()
    assert np.isnan(mean).all()


def test_b4_what_no_tile_covers_is_seen():
    _, _, mean = blended([np.ones((1, 2, 2))], [(0, 0)], (2, 3))
    assert np.isnan(mean[:, 2]).all()
    assert (mean[:, :2] == 1).all()
    labels = np.empty((1, 2, 3), np.uint8)
    total, weights = np.zeros((1, 2, 3), np.float32), np.zeros((2, 3), np.float32)
    weights[:, :2] = 1
    assert kernels.blend_finish(total, weights, labels, op="threshold", threshold=0.5) == 2


@pytest.mark.parametrize("overlap", [None, (1, 1)])
def test_b4_a_missing_tile_is_an_error(overlap):
    grid = grid_of((6, 9), (3, 3), overlap)
    stitcher = BandStitcher(grid, 0, raw())
    stitcher.begin(0)
    row = grid.row(0)
    stitcher.add(np.ones((len(row) - 1, 1, 3, 3), np.float32), row[1:])
    with pytest.raises(urt.TileError, match=f"{len(row) - 1} of {len(row)} tiles"):
        stitcher.finish()


@pytest.mark.parametrize("overlap", [None, (2, 2)])
def test_b5_nan_stays_where_its_tile_is(overlap):
    def network(x):
        made._session.seen = getattr(made._session, "seen", 0) + len(x)
        return x * np.nan if made._session.seen == 5 else x

    made = engine(network, tile=(6, 6), overlap=overlap)
    image = whole_numbers((1, 14, 14))
    result = predicted(made, image)
    expected = np.zeros(image.shape[1:], bool)
    grid = made.spec.grid(image.shape[1:], made.spec.tile)
    index = np.concatenate(list(grid.rows()))[4:5]
    place = grid.placement(index, 0)
    (y, x), (h, w) = place.target[0], place.size[0]
    expected[y : y + h, x : x + w] = True
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(np.isnan(result[0]), expected)
    np.testing.assert_array_equal(result[0][~expected], image[0][~expected])


def test_b6_half_precision_tiles():
    image = whole_numbers((1, 20, 17))
    for dtype in (np.float16, np.float32):
        grid = grid_of((20, 17), (6, 5), (2, 2))
        stitcher, bands = BandStitcher(grid, 0, raw(), "constant"), []
        for k, row in enumerate(grid.rows()):
            tiles = np.empty((len(row), 1, *grid.tile), dtype)
            kernels.tile_gather(image, grid.origins(row), tiles)
            stitcher.begin(k)
            stitcher.add(tiles, row)
            bands.append(stitcher.finish()[1])
        np.testing.assert_array_equal(np.concatenate(bands, axis=1), image)


@pytest.mark.parametrize("overlap", [None, (1, 1)])
def test_b7_nothing_is_added_to_a_finished_row(overlap, tmp_path):
    grid = grid_of((3, 9), (3, 3), overlap)
    stitcher = BandStitcher(grid, 0, raw())
    stitcher.begin(0)
    row = grid.row(0)
    tiles = np.ones((len(row), 1, 3, 3), np.float32)
    stitcher.add(tiles, row)
    stitcher.finish()
    with pytest.raises(urt.TileError):
        stitcher.add(tiles, row)
    with open_output(tmp_path / "a.npy", shape=(3, 9), planes=1, channels=0, dtype=np.dtype(np.uint8)) as sink:
        sink.write(0, (0, 0), np.zeros((3, 9), np.uint8))
        sink.commit()
        with pytest.raises(ValueError, match="closed"):
            sink.write(0, (0, 0), np.zeros((3, 9), np.uint8))
    assert np.load(tmp_path / "a.npy").shape == (3, 9)


def numbered(batch: int) -> Callable[[Array], Array]:
    """1, and 2 more for the first ``batch`` tiles, 3 more for the next, ...: in the order in which they come."""
    counter = itertools.count()

    def network(x: Array) -> Array:
        return np.ones_like(x) + np.array([2 + next(counter) // batch for _ in x], np.float32).reshape(-1, 1, 1, 1)

    return network


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_b8_every_tile_in_its_place_and_turn(batch):
    made = engine(numbered(10), tile=(3, 3), overlap=(2, 2))
    # No two tiles are alike, or the second would not be run.
    result = predicted(made, np.arange(49, dtype=np.float32).reshape(1, 7, 7), batch=batch)
    expected = np.array([3, 3, 10 / 3, 11 / 3, 13 / 3, 4.5, 5])
    np.testing.assert_allclose(result[0], np.repeat(expected[:, None], 7, axis=1), rtol=2 * EPS)


def test_b8_every_tile_weighs_as_it_should():
    made = engine(numbered(1), tile=(3, 3), overlap=(2, 2), blend="gaussian")
    result = predicted(made, np.arange(49, dtype=np.float32).reshape(1, 7, 7), batch=2)
    weight = blend_weight((3, 3), "gaussian").astype(np.float64)
    total, weights = np.zeros((7, 7)), np.zeros((7, 7))
    for k, (y, x) in enumerate(itertools.product(range(5), repeat=2)):
        total[y : y + 3, x : x + 3] += weight * (3 + k)
        weights[y : y + 3, x : x + 3] += weight
    np.testing.assert_allclose(result[0], total / weights, rtol=22 * EPS)  # nine tiles


def test_b9_the_border_reaches_the_network_and_is_cropped():
    def network(x: Array) -> Array:
        return x + x.sum(axis=(1, 2, 3), keepdims=True)

    # pixels 2 - 1 = 1; the constant border is the raw value 0: 0 - 1 = -1
    made = engine(
        network, tile=(5, 5), fixed=True, border="constant", normalization=Normalization("fixed", mean=(1.0,))
    )
    result = predicted(made, np.full((1, 3, 3), 2, np.uint8))
    assert result.tolist() == [[[-6.0] * 3] * 3]  # 1 + 9 - 16
    tile = np.empty((1, 1, 5, 5), np.float32)
    kernels.tile_gather(np.ones((1, 3, 3), np.float32), [[-1, -1]], tile, border="constant", constant=-1)
    assert network(tile)[0, 0, 1:4, 1:4].tolist() == [[-6.0] * 3] * 3


@pytest.mark.parametrize("blend", BLENDS)
def test_b10_one_tile_is_its_own_result(blend):
    image = np.random.default_rng(5).random((2, 100, 100), np.float32)
    softmax = engine(
        lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True),
        tile=(100, 100), channels=2, overlap=(50, 50), blend=blend,
    )  # fmt: skip
    tile = softmax._session.functions[0](image[None])[0]
    np.testing.assert_allclose(predicted(softmax, image), tile, rtol=2 * EPS)


def test_b11_two_tiles_over_the_same_columns():
    values = itertools.cycle([0.7, 0.3])
    made = engine(
        lambda x: np.full((1, 2, 50, 50), next(values), np.float32), tile=(50, 50), outputs=[output(2, 2)], overlap=(0, 25)
    )  # fmt: skip
    result = predicted(made, np.arange(3750, dtype=np.float32).reshape(1, 50, 75))  # no two tiles alike
    assert result.shape == (2, 50, 75)
    expected = np.repeat([0.7, 0.5, 0.3], 25).astype(np.float32)
    np.testing.assert_allclose(result, np.broadcast_to(expected, result.shape), rtol=3 * EPS)


def test_b12_the_label_of_the_mean():
    """Two tiles over columns 4 to 7: one sure of class 1, the other leaning to class 0. The spec stays what it was."""
    answers = itertools.cycle([(0.0, 3.0), (1.0, 0.0)])

    def network(x: Array) -> Array:
        return np.broadcast_to(np.array(next(answers), np.float32).reshape(1, 2, 1, 1), (1, 2, *x.shape[2:]))

    made = engine(network, tile=(4, 8), outputs=[output(2, 2)], overlap=(0, 4), task="multiclass", output_is="logits")
    before = made.spec
    mask = predicted(made, np.arange(48, dtype=np.float32).reshape(1, 4, 12))
    assert mask.tolist() == [[1] * 8 + [0] * 4] * 4
    assert made.spec is before
    soft = predicted(made, np.arange(48, dtype=np.float32).reshape(1, 4, 12), output="probability")
    middle = 1 / (1 + np.exp(0.5 - 1.5))  # the softmax of the mean logits, not the mean of softmaxes
    np.testing.assert_allclose(soft[1, :, 4:8], middle, rtol=8 * EPS)


@pytest.mark.parametrize("overlap", [None, (4, 4)])
def test_b13_outputs_of_several_scales(overlap):
    outputs = [
        output(2, 6, stride=4),
        output(2, 2, stride=4, scale=Fraction(1, 2)),
        output(2, 3, stride=4, scale=Fraction(1, 4)),
    ]
    network = (plus_one, lambda x: x[:, :2, ::2, ::2] + 2, lambda x: x[:, :3, ::4, ::4] + 3)
    made = engine(*network, tile=(8, 8), channels=6, outputs=outputs, overlap=overlap, stride=4)
    image = whole_numbers((6, 20, 20))
    expected = [image + 1, image[:2, ::2, ::2] + 2, image[:3, ::4, ::4] + 3]
    grid = made.spec.grid((20, 20), (8, 8))
    for k, wanted in enumerate(expected):
        result = np.full((wanted.shape[0], *grid.out_shape(k)), np.nan, np.float32)

        def keep(work, start, band, result=result):
            result[:, start : start + band.shape[1]] = band

        with open_image(image, made.spec.contract, axes="CYX", spatial=2, network_channels=6) as source:
            numbers = affine(made.spec.contract.normalization, source)
            run(Computation(made, source, raw(wanted.shape[0]), numbers, output=k, batch=2), [Work(0, grid)], keep)
        np.testing.assert_array_equal(result, wanted)


def test_b13_a_mean_over_blocks():
    half = engine(
        lambda x: x.reshape(len(x), 1, x.shape[2] // 2, 2, x.shape[3] // 2, 2).mean(axis=(3, 5)),
        tile=(2, 2), outputs=[output(2, 1, stride=2, scale=Fraction(1, 2))], stride=2,
    )  # fmt: skip
    image = whole_numbers((1, 10, 6))
    result = predicted(half, image)
    np.testing.assert_array_equal(result, image.reshape(1, 5, 2, 3, 2).mean(axis=(2, 4)))


def test_b14_places_at_half_the_scale():
    grid = grid_of((40, 40, 40), (8, 8, 8), (6, 6, 6), stride=2, scale=Fraction(1, 2))
    place = grid.placement([[5, 10, 15]], 0)
    assert grid.origins([[5, 10, 15]]).tolist() == [[10, 20, 30]]
    assert place.target.tolist() == [[5, 10, 15]]
    assert place.size.tolist() == [[4, 4, 4]]


def test_b15_cores_do_not_overlap_and_edges_keep_their_halo():
    grid = grid_of((50, 41), (16, 16), halo=3)
    assert (coverage(grid) == 1).all()
    first, last = grid.placement([[0, 0]], 0), grid.placement([np.array(grid.shape) - 1], 0)
    assert first.source.tolist() == [[0, 0]]  # nothing is discarded at the image's edge
    assert first.size.tolist() == [[13, 13]]
    assert (last.source + last.size).tolist() == [[16, 16]]


def test_b15_a_halo_of_rubbish_is_never_seen():
    """The network spoils the three samples at every edge of its tile, where that edge is not the image's."""
    image = whole_numbers((1, 50, 41))
    made = engine(same, tile=(16, 16), halo=3)
    grid = made.spec.grid((50, 41), (16, 16))
    origins = iter([tuple(o) for row in grid.rows() for o in grid.origins(row)])

    def network(x: Array) -> Array:
        y, (top, left) = x.copy(), next(origins)
        if top > 0:
            y[:, :, :3] = -1
        if top + 16 < 50:
            y[:, :, -3:] = -1
        if left > 0:
            y[..., :3] = -1
        if left + 16 < 41:
            y[..., -3:] = -1
        return y

    made._session.functions = (network,)
    np.testing.assert_array_equal(predicted(made, image), image)
    assert next(origins, None) is None


@pytest.mark.parametrize("shape", [(3, 3), (8, 30), (64, 64), (5, 6, 7)])
def test_b17_no_weight_is_zero(shape):
    weight = blend_weight(shape, "gaussian")
    assert 0 < weight.min() <= weight.max() <= 1


# --- what is refused ----------------------------------------------------------------------------------------------


def sample() -> Array:
    return np.zeros((1, 20, 20), np.float32)


@pytest.mark.parametrize(
    ("options", "tile", "text"),
    [
        ({"overlap": (8, 8)}, (8, 8), "overlap 8 px is outside 0 to 7"),
        ({"overlap": (-1, 0)}, (8, 8), "overlap -1 px"),
        ({"overlap": (-0.1, 0)}, (8, 8), "overlap -0.1 px"),
        ({"overlap": (0, 9)}, (8, 8), "overlap 9 px"),
        ({}, (0, 8), "tile 0 px"),
        ({}, (-4, 8), "tile -4 px"),
        ({"halo": 4}, (8, 8), "keeps nothing"),
        ({"stride": 4}, (10, 8), "tile 10 px is not a multiple of stride 4; use 8 or 12"),
    ],
)
def test_c_tiles_that_cannot_be(options, tile, text):
    with pytest.raises(urt.TileError, match=text):
        predicted(engine(same, tile=tile, **options), sample())


def test_c_a_tile_of_another_number_of_axes():
    with pytest.raises(urt.TileError, match="spatial axes"):
        urt.predict(engine(same, tile=(8, 8)), sample(), axes="CYX", tile=(8, 8, 8))


def test_c_another_tile_than_the_blended_one():
    with pytest.raises(urt.TileError, match="part of the model"):
        urt.predict(engine(same, tile=(8, 8), overlap=(2, 2)), sample(), axes="CYX", tile=(16, 16))


def test_c_a_grid_of_another_image():
    made = engine(same, tile=(8, 8))
    grid = made.spec.grid((20, 24), (8, 8))
    with open_image(sample(), made.spec.contract, axes="CYX", spatial=2) as source:
        numbers = affine(made.spec.contract.normalization, source)
        with pytest.raises(urt.TileError, match="20x24"):
            run(Computation(made, source, raw(), numbers), [Work(0, grid)], lambda *_: None)


def test_c_unknown_blend():
    with pytest.raises(urt.TileError, match="pyramid"):
        blend_weight((8, 8), "pyramid")


def test_c_as_many_tiles_as_places():
    ones = np.ones((3, 1, 2, 2), np.float32)
    places = np.zeros((2, 2), np.int64)
    with pytest.raises(urt.TileError):
        kernels.tile_stitch(ones, places, places, places + 2, np.zeros((1, 4, 4), np.float32))
    grid = grid_of((6, 9), (3, 3))
    stitcher = BandStitcher(grid, 0, raw())
    stitcher.begin(0)
    with pytest.raises(urt.TileError):
        stitcher.add(np.ones((2, 1, 3, 3), np.float32), grid.row(0))


@pytest.mark.parametrize("target", [(-1, 0), (0, 3)])
def test_c_places_beyond_the_image(target):
    out = np.zeros((1, 4, 4), np.float32)
    with pytest.raises(urt.TileError):
        kernels.tile_stitch(np.ones((1, 1, 2, 2), np.float32), [[0, 0]], [target], [[2, 2]], out)
    assert not out.any()


def test_c_windows_beyond_the_image():
    with (
        open_image(sample(), Contract(normalization=Normalization("none")), axes="CYX", spatial=2) as source,
        pytest.raises(urt.ImageError, match="not inside the image"),
    ):
        source.read(0, (15, 0), (21, 20))


def test_c_a_network_that_returns_another_number_of_outputs():
    made = engine(same, tile=(8, 8), outputs=[output(2, 1), output(2, 1)])
    with pytest.raises(urt.BackendError, match="1 outputs, and its spec names 2"):
        predicted(made, sample())


@pytest.mark.parametrize(
    "function", [lambda x: x[:, :, 1:], lambda x: np.concatenate([x, x], axis=1)], ids=["size", "channels"]
)
def test_c_a_network_that_returns_another_shape(function):
    with pytest.raises((urt.BackendError, urt.TileError)):
        predicted(engine(function, tile=(8, 8)), sample())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("overlap", [None, (2, 2)])
def test_c_pixels_that_are_no_numbers(value, overlap):
    image = sample().copy()
    image[0, 13, 7] = value
    with pytest.raises(urt.ImageError, match="NaN or infinite"):
        predicted(engine(same, tile=(8, 8), overlap=overlap), image)


@pytest.mark.parametrize("shape", [(2, 20, 20), (3, 20, 20)])
def test_c_another_number_of_channels(shape):
    with pytest.raises(urt.ContractError):
        predicted(engine(same, tile=(8, 8), channels=4), np.zeros(shape, np.float32))


def test_c_no_batch():
    with pytest.raises(urt.ContractError, match="batch of 0"):
        predicted(engine(same, tile=(8, 8)), sample(), batch=0)


def test_decisions_do_not_depend_on_tiles():
    """Masks of the identity network are thresholds of the image, at any tile, overlap and batch."""
    image = whole_numbers((1, 37, 41), np.uint8)
    expected = (image[0] > 127).astype(np.uint8) * 255
    contract = {"task": "binary", "output_is": "probabilities", "threshold": (0.5,)}
    contract["normalization"] = Normalization("scale", scale=255.0)
    for tile, overlap in [((37, 41), None), ((8, 41), None), ((5, 7), None), ((8, 8), (4, 4))]:
        made = engine(same, tile=tile, overlap=overlap, **contract)
        np.testing.assert_array_equal(predicted(made, image, batch=3, mask_values=(0, 255)), expected)
    assert decide(Contract(**contract), 1).threshold == (0.5,)
