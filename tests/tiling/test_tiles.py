"""Tile geometry: every sample of the image's output is written exactly once, from a place where the halo allows it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import ceil, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_rt.errors import TileError
from unet_rt.tiling.axis import border_window, canvas, exact_step, smaller_tile, smallest_tile
from unet_rt.tiling.field import AxisField, OutputField, TileSizes
from unet_rt.tiling.grid import choose_tile, cost_ratio, tile_grid, with_halo

ONE = Fraction(1)


def same_padded(stride: int = 16, halo: int = 94, scale: Fraction = ONE) -> AxisField:
    return AxisField(stride, (halo + 13, halo + 13), (halo, halo), (0, 0), scale)


PAPER = AxisField(16, (107, 107), (0, 0), (92, 92), ONE)
PAPER_SIZES = TileSizes(16, 12, 188)


def output(*fields: AxisField) -> OutputField:
    return OutputField("y", "NCYX" if len(fields) == 2 else "NCZYX", 2, fields, True)


def test_worked_example_of_a_same_padded_network():
    field = same_padded()
    grid = tile_grid((1000,), (512,), (TileSizes(16, 0, 16),), (output(field),))
    assert grid.axes[0].canvas.size == 1008
    assert grid.axes[0].starts == (0, 320, 496)
    assert grid.axes[0].owned(field) == [(0, 0, 418), (98, 418, 320), (242, 738, 262)]


def test_worked_example_of_the_papers_network():
    grid = tile_grid((1000,), (572,), (PAPER_SIZES,), (output(PAPER),))
    assert (grid.axes[0].canvas.before, grid.axes[0].canvas.size) == (92, 1196)
    assert grid.axes[0].starts == (0, 384, 624)
    assert exact_step(572, 16, [PAPER]) == 384
    assert PAPER.out_size(572) == 388


@st.composite
def networks(draw: st.DrawFn) -> tuple[AxisField, TileSizes]:
    stride = draw(st.sampled_from([1, 2, 4, 8, 16, 32]))
    scale = draw(st.sampled_from([Fraction(1, stride), Fraction(1, 2) if stride > 1 else ONE, ONE, Fraction(2)]))
    halo = (draw(st.integers(0, 40)), draw(st.integers(0, 40)))
    remainder = draw(st.integers(0, stride - 1))
    # out = scale * size - shrink has to be whole for sizes = remainder mod stride
    fraction = remainder * scale - int(remainder * scale)
    shrink = (Fraction(draw(st.integers(0, 30))), Fraction(draw(st.integers(0, 30))) + fraction)
    total = sum(shrink)
    minimum = ceil((total + 1) / scale)
    if shrink[1].denominator != 1:
        return AxisField(stride, (50, 50), halo, (0, 0), ONE), TileSizes(stride, remainder, 1)
    field = AxisField(stride, (50, 50), halo, (int(shrink[0]), int(shrink[1])), scale)
    return field, TileSizes(stride, remainder, minimum)


@settings(deadline=None, max_examples=300)
@given(networks(), st.integers(1, 700), st.integers(0, 12), st.booleans())
def test_every_sample_is_owned_once_and_away_from_inner_edges(network, image, larger, fixed):
    field, sizes = network
    tile = smallest_tile(sizes, [field]) + larger * sizes.stride
    if fixed:
        sizes = replace(sizes, fixed=tile)
    grid = tile_grid((image,), (tile,), (sizes,), (output(field),))
    axis = grid.axes[0]
    n, first = field.out_size(axis.tile), axis.canvas.before * field.scale - field.shrink[0]
    written = np.zeros(ceil(image * field.scale), int)
    assert (axis.canvas.size - axis.tile) % sizes.stride == 0
    assert axis.starts[-1] + axis.tile == axis.canvas.size
    for k, (start, (source, target, size)) in enumerate(zip(axis.starts, axis.owned(field), strict=True)):
        assert start % field.stride == 0
        written[target : target + size] += 1
        assert start * field.scale + source == target + first  # the same sample of the canvas
        if size:
            assert source >= (field.halo[0] if k else 0)
            assert source + size <= n - (field.halo[1] if k + 1 < len(axis.starts) else 0)
    assert (written == 1).all()


def test_worked_example_of_an_aligned_grid():
    field = same_padded()
    grid = tile_grid((1000,), (512,), (TileSizes(16, 0, 16),), (output(field),), aligned=True)
    assert grid.axes[0].starts == (0, 224, 496)
    assert grid.axes[0].owned(field) == [(0, 0, 320), (96, 320, 320), (144, 640, 360)]
    paper = tile_grid((1000,), (572,), (PAPER_SIZES,), (output(PAPER),), aligned=True)
    assert paper.axes[0].starts == (0, 384, 624)
    assert paper.axes[0].owned(PAPER) == [(0, 0, 384), (0, 384, 384), (144, 768, 232)]


@settings(deadline=None, max_examples=300)
@given(networks(), st.integers(1, 700), st.integers(0, 12), st.booleans(), st.data())
def test_parts_of_an_aligned_grid_share_no_tile_and_are_the_whole(network, image, larger, fixed, data):
    field, sizes = network
    tile = smallest_tile(sizes, [field], aligned=True) + larger * sizes.stride
    if fixed:
        sizes = replace(sizes, fixed=tile)
    grid = tile_grid((image,), (tile,), (sizes,), (output(field),), aligned=True)
    axis = grid.axes[0]
    assert {b - a for a, b in pairwise(axis.ends[:-1])} <= {axis.ends[0]}
    cuts = sorted({0, image, *data.draw(st.lists(st.sampled_from(axis.ends)))})
    written, tiles = np.zeros(ceil(image * field.scale), int), 0
    for low, high in pairwise(cuts):
        part = grid.part((low,), (high,))
        tiles += part.count
        (first,), size = part.out_start(0), part.out_shape(0)[0]
        assert first == ceil(low * field.scale)
        place = part.placement(np.arange(part.count)[:, None], 0)
        for (target,), (count,) in zip(place.target, place.size, strict=True):
            assert 0 <= target <= target + count <= size
            written[first + target : first + target + count] += 1
        for start, (source, target, count) in zip(part.axes[0].starts, part.axes[0].owned(field), strict=True):
            canvas_first = axis.canvas.before * field.scale - field.shrink[0]
            assert start % field.stride == 0
            assert start * field.scale + source == first + target + canvas_first  # the same sample of the canvas
            assert source >= (field.halo[0] if start else 0)
            at_end = start + axis.tile == axis.canvas.size
            assert source + count <= field.out_size(axis.tile) - (0 if at_end else field.halo[1])
    assert (written == 1).all()
    assert tiles == grid.count


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 300), st.integers(2, 8), st.booleans(), st.data())
def test_any_part_gets_all_tiles_that_its_samples_need(size, tile, blended, data):
    field = same_padded(4, 9)
    whole = tile_grid(
        (size,), (tile * 8 + 16,), (TileSizes(4, 0, 4),), (output(field),), overlap=(tile * 4,) if blended else None
    )
    low = data.draw(st.integers(0, size - 1))
    high = data.draw(st.integers(low + 1, size))
    part = whole.part((low,), (high,))
    table = whole.axes[0].covered(field) if blended else whole.axes[0].owned(field)
    holding = [
        s
        for s, (_, target, n) in zip(whole.axes[0].starts, table, strict=True)
        if target < high and target + n > low and n
    ]
    assert list(part.axes[0].starts) == holding
    assert sum(b - a for a, b in (part.band(k, 0) for k in range(part.shape[0]))) == high - low
    with pytest.raises(TileError, match="no part of an axis"):
        whole.part((low,), (size + 1,))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 8), st.integers(2, 8), st.data())
def test_blended_tiles_cover_everything(height, width, a, b, data):
    field = same_padded(4, 9)
    tile = (a * 8, b * 8)
    overlap = tuple(data.draw(st.integers(0, t - 1)) for t in tile)
    sizes = (TileSizes(4, 0, 4),) * 2
    grid = tile_grid((height, width), tile, sizes, (output(field, field),), overlap=overlap)
    covered = np.zeros((height, width), int)
    done = 0
    for k, row in enumerate(grid.rows()):
        place = grid.placement(row, 0)
        for target, size in zip(place.target, place.size, strict=True):
            covered[target[0] : target[0] + size[0], target[1] : target[1] + size[1]] += 1
        start, stop = grid.band(k, 0)
        assert start == done
        done = stop
        assert (covered[:stop] > 0).all(), "a band is final only when all tiles over it were added"
    assert done == height


def test_bands_follow_each_other():
    grid = tile_grid((1000, 700), (256, 320), (TileSizes(16, 0, 16),) * 2, (output(same_padded(), same_padded()),))
    bands = [grid.band(k, 0) for k in range(grid.shape[0])]
    assert bands[0][0] == 0
    assert bands[-1][1] == 1000
    assert all(a[1] == b[0] for a, b in pairwise(bands))


def test_a_tile_larger_than_the_image_is_taken_down_to_the_canvas():
    field = same_padded()
    grid = tile_grid((100, 37), (512, 512), (TileSizes(16, 0, 16),) * 2, (output(field, field),))
    assert grid.tile == (112, 48)
    assert grid.count == 1


def test_a_fixed_size_grows_the_canvas():
    field = same_padded()
    grid = tile_grid((100, 600), (512, 512), (TileSizes(16, 0, 16, fixed=512),) * 2, (output(field, field),))
    assert [a.canvas.size for a in grid.axes] == [512, 608]
    assert grid.tile == (512, 512)


@pytest.mark.parametrize(
    ("tile", "text"),
    [
        ((500, 512), "tile 500 px is not a multiple of stride 16; use 496 or 512"),
        ((176, 512), "keeps nothing"),
        ((8, 512), "below the smallest size"),
    ],
)
def test_tiles_that_cannot_be(tile, text):
    fields = output(same_padded(), same_padded())
    with pytest.raises(TileError, match=text):
        tile_grid((1000, 1000), tile, (TileSizes(16, 0, 16),) * 2, (fields,))


@pytest.mark.parametrize("overlap", [(-1, 8), (8, 64), (8, 100)])
def test_overlaps_that_cannot_be(overlap):
    fields = output(same_padded(4, 9), same_padded(4, 9))
    with pytest.raises(TileError, match="overlap"):
        tile_grid((200, 200), (64, 64), (TileSizes(4, 0, 4),) * 2, (fields,), overlap=overlap)


def test_wrong_number_of_axes():
    fields = output(same_padded(4, 9), same_padded(4, 9))
    with pytest.raises(TileError, match="spatial axes"):
        tile_grid((200, 200), (64, 64, 64), (TileSizes(4, 0, 4),) * 2, (fields,))


@settings(deadline=None, max_examples=60)
@given(st.integers(50, 6000), st.integers(50, 6000), st.sampled_from([512, 1024, 2048]))
def test_the_chosen_tile_fits_and_beats_the_square_one(height, width, side):
    fields = output(same_padded(16, 53), same_padded(16, 53))
    sizes = (TileSizes(16, 0, 16),) * 2
    tile = choose_tile((height, width), sizes, (fields,), side * side)
    chosen = tile_grid((height, width), tile, sizes, (fields,))
    square = tile_grid((height, width), (side, side), sizes, (fields,))
    assert prod(chosen.tile) <= side * side
    assert chosen.computed_px <= square.computed_px


def test_the_chosen_tile_of_a_wide_image_has_no_halo_at_its_sides():
    fields = output(same_padded(), same_padded())
    sizes = (TileSizes(16, 0, 16),) * 2
    grid = tile_grid((4096, 2048), choose_tile((4096, 2048), sizes, (fields,), 2048 * 1024), sizes, (fields,))
    assert grid.shape[1] == 1


def test_cost_follows_the_step():
    fields = output(same_padded(), same_padded())
    assert cost_ratio((512, 512), (TileSizes(16, 0, 16),) * 2, (fields,)) == pytest.approx((512 / 320) ** 2)
    assert cost_ratio((160, 160), (TileSizes(16, 0, 16),) * 2, (fields,)) is None


def test_a_halo_is_cut_never_grown():
    cut = with_halo(output(same_padded(16, 94), same_padded(16, 20)), 32)
    assert [f.halo for f in cut.field] == [(32, 32), (20, 20)]


@settings(deadline=None, max_examples=200)
@given(
    st.integers(-200, 200),
    st.integers(1, 300),
    st.integers(1, 60),
    st.sampled_from(["mirror", "edge", "constant", "zero"]),
)
def test_border_window_is_what_numpy_pad_reads(start, length, size, border):
    low, high = border_window(start, start + length, size, border)
    before, after = max(0, -start), max(0, start + length - size)
    mode = {"mirror": "reflect", "edge": "edge"}.get(border, "constant")
    padded = np.pad(
        np.arange(size), (before, after), mode=mode, **({"constant_values": -1} if mode == "constant" else {})
    )
    needed = padded[start + before : start + before + length]
    needed = needed[needed >= 0]
    if needed.size == 0:
        assert low == high
    else:
        assert (low, high) == (needed.min(), needed.max() + 1)


def test_canvas_never_depends_on_the_tile():
    field = same_padded()
    shapes = {
        tile_grid((700,), (t,), (TileSizes(16, 0, 16),), (output(field),)).axes[0].canvas for t in (256, 320, 512)
    }
    assert shapes == {canvas(700, TileSizes(16, 0, 16), [field])}


def test_blended_tiles_of_unpadded_networks_leave_no_gap():
    """Tiles of 300 px give 116 px: half a tile of overlap, 150, would leave 34 px between two of them without any."""
    outputs, sizes = (output(PAPER, PAPER),), (PAPER_SIZES,) * 2
    with pytest.raises(TileError, match="gaps between; use an overlap of 184 px or more"):
        tile_grid((100, 1000), (300, 300), sizes, outputs, overlap=(150, 150))
    grid = tile_grid((100, 1000), (300, 300), sizes, outputs, overlap=(184, 184))
    covered = np.zeros(1000, bool)
    for place in (grid.placement(row, 0) for row in grid.rows()):
        for start, size in zip(place.target[:, 1], place.size[:, 1], strict=True):
            covered[start : start + size] = True
    assert covered.all()


@pytest.mark.parametrize(
    ("field", "sizes", "tile", "smaller"),
    [
        (same_padded(16, 53), TileSizes(16, 0, 16), 512, 256),
        (same_padded(), TileSizes(16, 0, 16), 512, 256),  # owns 64 of its 256 px, just enough
        (same_padded(), TileSizes(16, 0, 16), 384, 256),
        (same_padded(), TileSizes(16, 0, 16), 336, None),  # 256 px saves less than a quarter of a side
        (PAPER, PAPER_SIZES, 572, 300),
        (same_padded(32, 540), TileSizes(32, 0, 32), 2048, 1472),
        (same_padded(32, 540), TileSizes(32, 0, 32), 1536, None),
        (same_padded(), TileSizes(16, 0, 16, fixed=512), 512, None),
    ],
)
def test_worked_examples_of_a_smaller_tile(field, sizes, tile, smaller):
    assert smaller_tile((tile,), (sizes,), (output(field),)) == (None if smaller is None else (smaller,))
    both = smaller_tile((tile, 576), (sizes, TileSizes(16, 0, 16)), (output(field, same_padded(16, 20)),))
    assert both == (smaller or tile, 288)  # an axis that leaves none keeps the side


@settings(deadline=None, max_examples=200)
@given(networks(), st.integers(1, 700), st.integers(0, 40), st.booleans())
def test_a_smaller_tile_owns_the_same_samples_of_the_same_canvas(network, image, larger, aligned):
    field, sizes = network
    tile = smallest_tile(sizes, [field], aligned=True) + larger * sizes.stride
    smaller = smaller_tile((tile,), (sizes,), (output(field),))
    if smaller is None:
        return
    assert sizes.accepts(smaller[0])
    assert tile / 2 <= smaller[0] <= 3 * tile / 4
    of_two = [replace(sizes, fixed=t) for t in (tile, smaller[0])]
    whole = tile_grid((image,), (tile,), of_two[:1], (output(field),), aligned=aligned)
    grid = tile_grid((image,), smaller, of_two[1:], (output(field),), aligned=aligned, least=(tile,))
    assert grid.axes[0].canvas == whole.axes[0].canvas
    axis, n = grid.axes[0], field.out_size(smaller[0])
    written = np.zeros(ceil(image * field.scale), int)
    for k, (source, target, size) in enumerate(axis.owned(field)):
        assert 0 <= target <= target + size <= len(written)
        written[target : target + size] += 1
        if size:
            assert source >= (field.halo[0] if axis.starts[k] else 0)
            assert source + size <= n - (field.halo[1] if axis.starts[k] + axis.tile < axis.canvas.size else 0)
    assert (written == 1).all()
