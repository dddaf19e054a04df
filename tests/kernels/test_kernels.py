"""Every compiled kernel against its slow NumPy twin in ``reference.py``.

Bit equality wherever no transcendental function is involved; for softmax and sigmoid bounds derived from float32.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flat_kernels as kernels
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from unet_rt.errors import BackendError, ContractError, ImageError, OutputError, TileError, UnetRtError
from unet_rt.kernels import native

DTYPES = ["uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64", "bool"]
BORDERS = ["mirror", "edge", "constant", "zero"]
OPS = ["copy", "softmax", "sigmoid", "argmax", "threshold"]
EXACT_OPS = ["copy", "argmax", "threshold"]
EPS = 2.0**-24  # half the spacing of float32 relative to 1: the error of one rounded operation


def pixels(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> NDArray[Any]:
    """Values from the whole range of integers; floats of both signs over several magnitudes."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, shape)).astype(dtype)


def same(a: NDArray[Any], b: NDArray[Any]) -> None:
    """Equal shapes, dtypes and values; NaN equals NaN."""
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b, strict=True)


def gathered(window: NDArray[Any], starts: Any, tile: tuple[int, ...], dtype: Any = np.float32, **options: Any) -> Any:
    out = np.full((len(starts), len(window), *tile), 77, dtype)
    return out, kernels.tile_gather(window, starts, out, **options)


def check_gather(window: NDArray[Any], starts: Any, tile: tuple[int, ...], dtype: Any = np.float32, **kw: Any) -> None:
    threads = kw.pop("threads", 1)
    expected, bad = reference.tile_gather(window, starts, tile, dtype, **kw)
    out, found = gathered(window, starts, tile, dtype, threads=threads, **kw)
    same(out, expected)
    assert found == bad


NORMALISATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"divisor": 255.0},
    "channels": {"offset": [1.5, -3.25, 100.1], "divisor": [3.3, 0.07, 41.0]},
    "clip": {"offset": 17.3, "divisor": 91.7, "clip": (20.0, 180.0)},
    "clip channels": {"offset": [0, 1, 2], "divisor": [3, 7, 11], "clip": ([0, 5, 9.5], [100, 120, 99.9])},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_gather_dtypes(dtype: str, out_dtype: str, normalisation: str) -> None:
    window = pixels((3, 41, 53), dtype)
    check_gather(window, [[-7, -9], [3, 4], [30, 31]], (24, 37), out_dtype, **NORMALISATIONS[normalisation])


LAYOUTS = {
    "planar": lambda a: a,
    "channels last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0),
    "transposed": lambda a: np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2),
    "mirrored": lambda a: np.ascontiguousarray(a[..., ::-1, ::-1])[..., ::-1, ::-1],
    "every other pixel": lambda a: np.repeat(np.repeat(a, 2, -1), 3, -2)[..., ::3, ::2],
    "one of many channels": lambda a: np.repeat(a, 5, 0)[::5],
    "fortran": np.asfortranarray,
    "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_gather_layouts(layout: str, dtype: str, channels: int) -> None:
    window = LAYOUTS[layout](pixels((channels, 70, 150), dtype))
    assert (layout == "planar") == (window.flags.c_contiguous and window.strides[0] != 0) or channels == 1
    check_gather(window, [[-3, -5], [20, 41]], (66, 133), offset=3.1, divisor=1.7)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_gather_unaligned(shift: int) -> None:
    for dtype in ("uint16", "float32", "float64"):
        whole = pixels((2, 20, 33), dtype)
        buffer = np.empty(whole.nbytes + 8, np.uint8)
        window = np.ndarray(whole.shape, dtype, buffer, offset=shift)
        window[...] = whole
        check_gather(window, [[-2, -3]], (24, 38), divisor=3.0)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("shape", [(13,), (1,), (9, 14), (1, 5), (5, 1), (4, 6, 7), (1, 2, 1)])
def test_gather_borders(border: str, shape: tuple[int, ...]) -> None:
    """Tiles several times as large as the image, far outside it, and inside: the mirror is repeated."""
    window = pixels((2, *shape), "uint16")
    tile = tuple(3 * s + 4 for s in shape)
    starts = [[-s - 2 for s in shape], [0] * len(shape), [5 * s + 1 for s in shape], [-9 * s for s in shape]]
    for out_dtype in (np.float32, np.float16):
        check_gather(window, starts, tile, out_dtype, border=border, constant=41.5, offset=2.5, divisor=[9, 700])


@pytest.mark.parametrize(("border", "mode"), [("mirror", "reflect"), ("edge", "edge"), ("constant", "constant")])
def test_gather_equals_numpy_pad(border: str, mode: str) -> None:
    """The twin's own borders are right too."""
    window = pixels((1, 7, 11), "float32")
    padded = np.pad(window, ((0, 0), (30, 25), (40, 33)), mode=mode)  # type: ignore[call-overload]
    out, _ = gathered(window, [[-30, -40]], (62, 84), border=border)
    same(out[0], padded)


def test_a_zero_border_is_zero_in_the_tile() -> None:
    """Whatever the normalisation does to it, clip included, per channel."""
    window = pixels((2, 5, 6), "uint16")
    options: dict[str, Any] = {"offset": [500.0, 9000.0], "divisor": [7.0, -3.0], "clip": (600.0, 40000.0)}
    out, _ = gathered(window, [[-2, -3]], (9, 12), border="zero", **options)
    inside, _ = gathered(window, [[0, 0]], (5, 6), **options)
    same(out, np.pad(inside, [(0, 0), (0, 0), (2, 2), (3, 3)]))


@given(data=st.data())
def test_gather_geometry(data: st.DataObject) -> None:
    """Any image, window, tile and starts, in one to three axes: the twin's result, or its refusal."""
    axes = data.draw(st.integers(1, 3))
    image = data.draw(st.tuples(*[st.integers(1, 12)] * axes))
    first = tuple(data.draw(st.integers(0, size - 1)) for size in image)
    held = tuple(data.draw(st.integers(1, size - f)) for size, f in zip(image, first, strict=True))
    tile = data.draw(st.tuples(*[st.integers(1, 15)] * axes))
    starts = data.draw(st.lists(st.tuples(*[st.integers(-30, 30)] * axes), min_size=1, max_size=3))
    border = data.draw(st.sampled_from(BORDERS))
    whole = pixels((2, *image), data.draw(st.sampled_from(["uint8", "float32"])))
    window = whole[(slice(None), *(slice(f, f + h) for f, h in zip(first, held, strict=True)))]
    covered = True
    for start in starts:
        for axis in range(axes):
            index = reference.border_index(start[axis], tile[axis], image[axis], border)
            index = index[index >= 0]
            covered &= bool(((index >= first[axis]) & (index < first[axis] + held[axis])).all())
    options: dict[str, Any] = {"border": border, "constant": 3.0, "image_shape": image, "window_start": first}
    if covered:
        check_gather(window, starts, tile, **options)
        expected, _ = reference.tile_gather(whole, starts, tile, border=border, constant=3.0)
        same(gathered(window, starts, tile, **options)[0], expected)
    else:
        with pytest.raises(TileError, match="the window holds"):
            gathered(window, starts, tile, **options)


def test_gather_does_not_depend_on_the_tile(shared: Path) -> None:
    """A real image, cut in different tiles at different alignments: every pixel has the same bits."""
    image = read_png(sorted((shared / "data/isbi2012/image").glob("*.png"))[0])[None]
    options = {"offset": [float(image.mean())], "divisor": [float(image.std())]}
    whole, _ = gathered(image, [[0, 0]], image.shape[1:], **options)
    same(whole, reference.tile_gather(image, [[0, 0]], image.shape[1:], **options)[0])
    for tile in ((64, 61), (37, 200), (1, 3), (129, 16)):
        starts = [[y, x] for y in (0, 5, 300) for x in (0, 7, 250)]
        out, _ = gathered(image, starts, tile, **options)
        for (y, x), cut in zip(starts, out, strict=True):
            same(cut, whole[0, :, y : y + tile[0], x : x + tile[1]])


def read_png(path: Path) -> NDArray[Any]:
    from PIL import Image

    with Image.open(path) as file:
        return np.asarray(file)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gather_counts_non_finite(dtype: str) -> None:
    window = pixels((2, 30, 40), dtype)
    window[0, 3, 5] = np.nan
    window[1, 0, 0] = np.inf
    window[1, 29, 39] = -np.inf
    for border in BORDERS:
        check_gather(window, [[0, 0], [-4, -4], [20, 25]], (14, 23), border=border)
        check_gather(window, [[0, 0]], (30, 40), border=border, offset=1.0, divisor=2.0, clip=(-1.0, 1.0))
    # Seen twice by the mirror, and the constant is not a pixel of the image.
    assert gathered(window[:1], [[-2, 0]], (28, 40))[1] == 1
    assert gathered(window[:1], [[-3, 0]], (27, 40))[1] == 2
    assert gathered(np.zeros((1, 4, 4), dtype), [[-3, 0]], (3, 4), border="constant", constant=np.nan)[1] == 0


def test_gather_half_conversion_is_exact_everywhere() -> None:
    """All halves to float and back, and every float32 near a rounding boundary, whatever the position in a row."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for width in (1 << 16, 7):  # vectorised, and the remainder of a row
        rows = np.resize(halves, (1, -(-len(halves) // width), width))
        same(gathered(rows, [[0, 0]], rows.shape[1:])[0][0], rows.astype(np.float32))
        same(gathered(rows, [[0, 0]], rows.shape[1:], np.float16, divisor=1.0)[0][0], rows)
    finite = halves[np.isfinite(halves)].astype(np.float64)
    between = (np.sort(finite)[1:] + np.sort(finite)[:-1]) / 2  # ties, exact in float32
    floats = np.concatenate([between, np.nextafter(between.astype("f4"), np.inf), [65519.996, 65520, 1e-45, -1e-40]])
    floats = np.concatenate([floats, -floats]).astype(np.float32)[None]
    with np.errstate(over="ignore"):
        same(gathered(floats, [[0]], floats.shape[1:], np.float16)[0][0], floats.astype(np.float16))


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float64"])
def test_gather_wide_pixels_are_rounded_once(dtype: str) -> None:
    """2^24 + 1 is no float32: subtracting in float32 would lose it."""
    window = np.array([[[2**24 + 1, 2**24 + 3, 2**30 + 1]]], dtype)
    out, _ = gathered(window, [[0, 0]], (1, 3), offset=2.0**24, divisor=1.0)
    assert out[0, 0, 0, :2].tolist() == [1.0, 3.0]


def test_gather_into_views() -> None:
    """Strided outputs are filled and nothing else is touched."""
    window = pixels((2, 50, 60), "uint8")
    expected, _ = reference.tile_gather(window, [[-2, -3], [10, 11]], (20, 30), divisor=3.0)
    store = np.full((2, 25, 35, 2), 5, np.float32)
    out = store.transpose(0, 3, 1, 2)[:, :, 2:22, 3:33]
    kernels.tile_gather(window, [[-2, -3], [10, 11]], out, divisor=3.0)
    same(np.ascontiguousarray(out), expected)
    store[:, 2:22, 3:33] = 5
    assert (store == 5).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_threads_do_not_change_results(threads: int) -> None:
    """Large enough that threads really start (csrc/parallel.h: 131072 samples each)."""
    window = pixels((3, 700, 900), "uint16")
    window_f = window.astype(np.float32)
    window_f[1, 5, 7] = np.nan
    check_gather(window, [[-20, -30], [200, 301]], (512, 600), offset=3.3, divisor=7.7, threads=threads)
    check_gather(window_f, [[-20, -30]], (512, 600), "float16", offset=3.3, divisor=7.7, threads=threads)
    tiles = pixels((2, 3, 400, 500), "float32")
    parts = ([[0, 0], [10, 20]], [[0, 0], [400, 0]], [[400, 500], [300, 480]])
    for op in OPS:
        check_stitch(tiles, *parts, (700, 500), op, threads=threads)
    one, many = (target_of("softmax", 3, (700, 500)) for _ in range(2))
    kernels.tile_stitch(tiles, *parts, one, op="softmax", threads=1)
    kernels.tile_stitch(tiles, *parts, many, op="softmax", threads=threads)
    same(one, many)
    check_blend(tiles, [[0, 0], [0, 0]], [[0, 0], [150, 3]], [[400, 500], [400, 490]], (600, 500), threads=threads)
    skip, up = pixels((2, 3, 300, 400), "float32"), pixels((2, 2, 280, 371), "float32")
    out = np.empty((2, 5, 280, 371), np.float32)
    kernels.crop_concat(skip, up, out, threads=threads)
    same(out, reference.crop_concat(skip, up))


# ------------------------------------------------------------------------------------------------------------- stitch


def target_of(op: str, channels: int, spatial: tuple[int, ...]) -> NDArray[Any]:
    """An output with contents that show what was not written."""
    if op == "argmax":
        return np.full(spatial, 99, np.uint8)
    return np.full((channels, *spatial), 99, np.uint8 if op == "threshold" else np.float32)


def close(op: str, found: NDArray[np.float32], values: NDArray[Any]) -> None:
    """Softmax or sigmoid of (K, *spatial) ``values`` against float64, with the bound of the float32 formula.

    exp(d) has the relative error of the rounded argument, |d| EPS, and 2 ulp = 4 EPS of its own. A softmax's sum is the
    mean of these, weighted by the shares, and K - 1 additions; a sigmoid's is no worse. One EPS for the division, and a
    second-order margin. Below the normal numbers the spacing is 2^-149.
    """
    x = values.astype(np.float64)
    if op == "sigmoid":
        x = np.stack([x, np.zeros_like(x)])
    d = x - x.max(axis=0)
    e = np.exp(d)
    share = e / e.sum(axis=0)
    own = (np.abs(d) + 4) * EPS
    bound = own + (own * share).sum(axis=0) + len(x) * EPS + EPS
    expected, bound = (share[0], bound[0]) if op == "sigmoid" else (share, bound)
    assert (np.abs(found - expected) <= 1.01 * bound * expected + 2.0**-148).all()


def check_stitch(
    tiles: NDArray[Any], source: Any, target: Any, size: Any, spatial: tuple[int, ...], op: str, **options: Any
) -> None:
    threads = options.pop("threads", 1)
    if op == "threshold":
        options.setdefault("threshold", 0.25)
    out, expected = (target_of(op, tiles.shape[1], spatial) for _ in range(2))
    kernels.tile_stitch(tiles, source, target, size, out, op=op, threads=threads, **options)  # type: ignore[arg-type]
    reference.tile_stitch(tiles, source, target, size, expected, op=op, **options)
    if op in EXACT_OPS:
        same(out, expected)
        return
    written = np.zeros(spatial, bool)
    for tile, s, t, e in zip(tiles, *map(np.asarray, (source, target, size)), strict=True):
        place = (slice(None), *map(slice, t, t + e))
        close(op, out[place], tile[(slice(None), *map(slice, s, s + e))])
        written[place[1:]] = True
    assert (out[:, ~written] == 99).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 7])
@pytest.mark.parametrize("spatial", [(700,), (41, 53), (6, 11, 9)])
def test_stitch(op: str, dtype: str, channels: int, spatial: tuple[int, ...]) -> None:
    """Three ragged parts side by side along the first axis; the rest of the output is left alone."""
    rng = np.random.default_rng(1)
    tiles = (rng.standard_normal((3, channels, *spatial)) * 4).astype(dtype)
    rows = [spatial[0], 3, spatial[0] - 4]
    rest = spatial[1:]
    size = [[rows[n], *(max(s - n, 1) for s in rest)] for n in range(3)]
    source = [[0, *(0 for _ in rest)], [2, *(0 for _ in rest)], [4, *(min(1, s - 1) for s in rest)]]
    target = [[sum(rows[:n]), *(0 for _ in rest)] for n in range(3)]
    check_stitch(tiles, source, target, size, (sum(rows) + 2, *rest), op)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stitch_layouts(op: str, dtype: str) -> None:
    """Channels-last, reversed and unaligned tiles."""
    tiles = (np.random.default_rng(2).standard_normal((2, 3, 30, 40)) * 3).astype(dtype)
    part = ([[0, 1], [2, 0]], [[0, 0], [29, 0]], [[29, 39], [28, 40]])
    last = np.ascontiguousarray(tiles.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    mirrored = np.ascontiguousarray(tiles[..., ::-1])[..., ::-1]
    unaligned = np.ndarray(tiles.shape, dtype, np.empty(tiles.nbytes + 1, np.uint8), offset=1)
    unaligned[...] = tiles
    for view in (last, mirrored, unaligned):
        check_stitch(view, *part, (57, 40), op)


@pytest.mark.parametrize("op", OPS)
def test_stitch_into_views(op: str) -> None:
    tiles = np.random.default_rng(3).standard_normal((1, 2, 20, 30)).astype(np.float32)
    part = ([[1, 2]], [[3, 1]], [[15, 25]])
    threshold = 0.1 if op == "threshold" else None
    plain = target_of(op, 2, (22, 28))
    kernels.tile_stitch(tiles, *part, plain, op=op, threshold=threshold)  # type: ignore[arg-type]
    store = np.full((*plain.shape[:-1], 3 * plain.shape[-1]), 99, plain.dtype)
    kernels.tile_stitch(tiles, *part, store[..., 1::3], op=op, threshold=threshold)  # type: ignore[arg-type]
    same(np.ascontiguousarray(store[..., 1::3]), plain)
    store[..., 1::3] = 99
    assert (store == 99).all()


def test_labels_and_their_values() -> None:
    tiles = np.random.default_rng(4).standard_normal((1, 5, 33, 61)).astype(np.float32)
    whole = ([[0, 0]], [[0, 0]], [[33, 61]])
    check_stitch(tiles, *whole, (33, 61), "argmax", values=[0, 50, 100, 250, 255])
    check_stitch(tiles, *whole, (33, 61), "threshold", threshold=[0, 0.5, -1, 2, 9], values=[255, 3])
    check_stitch(tiles[:, :1], *whole, (33, 61), "argmax", values=[7])
    check_stitch(np.repeat(tiles, 52, 1)[:, :256], *whole, (33, 61), "argmax")


def test_labels_of_ties_infinities_and_nan() -> None:
    """First maximum, first NaN, and no NaN above a threshold: all combinations over three channels."""
    special = np.array([-np.inf, -1.0, -0.0, 0.0, 1.0, np.inf, np.nan], np.float32)
    for channels in (2, 3):
        grid = np.stack(np.meshgrid(*[special] * channels)).reshape(channels, -1)
        tiles = np.repeat(grid, 5, axis=1)[None]
        whole = ([[0]], [[0]], [[tiles.shape[2]]])
        check_stitch(tiles, *whole, tiles.shape[2:], "argmax")
        check_stitch(tiles, *whole, tiles.shape[2:], "threshold", threshold=0.0)
        out = target_of("softmax", channels, tiles.shape[2:])
        kernels.tile_stitch(tiles, *whole, out, op="softmax")
        with np.errstate(invalid="ignore"):
            expected = reference.apply(tiles[0], "softmax")
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
        np.testing.assert_allclose(out, expected, rtol=8 * EPS)


def test_exp_is_accurate_over_its_whole_range() -> None:
    """Below -18 a sigmoid is exp(x) to within EPS, and the argument reduction takes every x to the same interval."""
    x = np.linspace(-103.0, 20.0, 2_000_001, dtype=np.float32)[None, None]
    out = np.empty(x.shape[1:], np.float32)
    kernels.tile_stitch(x, [[0]], [[0]], [[x.size]], out, op="sigmoid")
    wide = x[0].astype(np.float64)
    expected = 1 / (1 + np.exp(-wide))
    normal = (wide < -18) & (wide > -87.3)
    error = np.abs(out - expected)[normal] / expected[normal]
    assert error.max() <= 4 * EPS + EPS  # 2 ulp of exp and the rounding of 1 + e and the quotient
    assert (np.abs(out - expected) <= np.maximum(6 * EPS * expected, 2.0**-149)).all()
    extremes = np.array([[[-np.inf, -1e30, 0, 1e30, np.inf, np.nan]]], np.float32)
    out = np.empty((1, 6), np.float32)
    kernels.tile_stitch(extremes, [[0]], [[0]], [[6]], out, op="sigmoid")
    np.testing.assert_array_equal(out, [[0, 0, 0.5, 1, 1, np.nan]])


@given(data=st.data())
def test_stitch_geometry(data: st.DataObject) -> None:
    """Any parts of tiles at any place, in one to three axes; those that are blended may lie over each other."""
    axes = data.draw(st.integers(1, 3))
    tile = data.draw(st.tuples(*[st.integers(1, 9)] * axes))
    spatial = data.draw(st.tuples(*[st.integers(1, 14)] * axes))
    count = data.draw(st.integers(0, 3))
    parts: list[list[list[int]]] = [[], [], []]
    for _ in range(count):
        size = [data.draw(st.integers(0, min(t, s))) for t, s in zip(tile, spatial, strict=True)]
        parts[0].append([data.draw(st.integers(0, t - e)) for t, e in zip(tile, size, strict=True)])
        parts[1].append([data.draw(st.integers(0, s - e)) for s, e in zip(spatial, size, strict=True)])
        parts[2].append(size)
    tables = [np.array(part, np.int64).reshape(count, axes) for part in parts]
    tiles = pixels((count, 3, *tile), "float32", seed=count)
    op = data.draw(st.sampled_from(EXACT_OPS))
    check_blend(tiles, *tables, spatial)
    tables[1][:, 0] += np.arange(count) * spatial[0]  # placed ones may not: each in a strip of its own
    check_stitch(tiles, *tables, (max(count, 1) * spatial[0], *spatial[1:]), op)


# -------------------------------------------------------------------------------------------------------------- blend


def check_blend(
    tiles: NDArray[Any], source: Any, target: Any, size: Any, spatial: tuple[int, ...], threads: int = 1
) -> None:
    """Total and weights bit for bit, then every way to finish them."""
    channels = tiles.shape[1]
    weight = np.random.default_rng(5).uniform(0.01, 1, tiles.shape[2:]).astype(np.float32)
    found, expected = ((np.zeros((channels, *spatial), "f4"), np.zeros(spatial, "f4")) for _ in range(2))
    kernels.tile_blend(tiles, source, target, size, weight, *found, threads=threads)
    reference.tile_blend(tiles, source, target, size, weight, *expected)
    same(found[0], expected[0])
    same(found[1], expected[1])
    for op in OPS:
        out = target_of(op, channels, spatial)
        threshold = 0.25 if op == "threshold" else None
        uncovered = kernels.blend_finish(*found, out, op=op, threshold=threshold, threads=threads)  # type: ignore[arg-type]
        finished, missing = reference.blend_finish(*found, op=op, threshold=threshold)
        assert uncovered == missing
        if op in EXACT_OPS:
            same(out, finished)
        else:
            covered = found[1] > 0
            close(op, out[:, covered], found[0][:, covered] / found[1][covered])
            assert np.isnan(out[:, ~covered]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spatial", [(60,), (50, 60), (12, 15, 14)])
def test_blend(dtype: str, spatial: tuple[int, ...]) -> None:
    """Four tiles over each other; a corner stays uncovered."""
    tile = tuple(s // 2 + 3 for s in spatial)
    tiles = (np.random.default_rng(6).standard_normal((4, 3, *tile)) * 3).astype(dtype)
    source = [[0] * len(tile), [1] * len(tile), [0] * len(tile), [2] * len(tile)]
    size = [[t - s for t, s in zip(tile, row, strict=True)] for row in source]
    target = [[0] * len(tile), [s // 3 for s in spatial], [2] * len(tile), [1] * len(tile)]
    check_blend(tiles, source, target, size, spatial)
    last = np.ascontiguousarray(np.moveaxis(tiles, 1, -1))
    check_blend(np.moveaxis(last, -1, 1), source, target, size, spatial)


@pytest.mark.parametrize("constant", [1.0, 0.7, -3.3e4])
def test_blended_constant_stays_constant(constant: float) -> None:
    """Weights form a partition of unity after division, at corners and edges too, where they are smallest."""
    height, width, tile, step = 77, 93, 32, 16
    axis = np.exp(-0.5 * ((np.arange(tile) - 15.5) / 4) ** 2)
    weight = np.outer(axis, axis).astype(np.float32)  # 3e-7 in the corners
    starts = [
        [y, x]
        for y in [*range(0, height - tile, step), height - tile]
        for x in [*range(0, width - tile, step), width - tile]
    ]
    tiles = np.full((len(starts), 2, tile, tile), constant, np.float32)
    total, weights = np.zeros((2, height, width), np.float32), np.zeros((height, width), np.float32)
    zero = np.zeros((len(starts), 2), int)
    kernels.tile_blend(tiles, zero, starts, zero + tile, weight, total, weights)
    out = np.empty_like(total)
    assert kernels.blend_finish(total, weights, out) == 0
    # Up to nine tiles: the products, the sums of total and of weights, and the quotient are rounded.
    np.testing.assert_allclose(out, np.float32(constant), rtol=(1 + 8 + 8 + 1) * EPS)


def test_blend_keeps_nan_where_it_is() -> None:
    tiles = np.ones((2, 1, 4, 4), np.float32)
    tiles[1, 0, 1, 1] = np.nan
    total, weights = np.zeros((1, 4, 6), np.float32), np.zeros((4, 6), np.float32)
    part = ([[0, 0], [0, 0]], [[0, 0], [0, 2]], [[4, 4], [4, 4]])
    kernels.tile_blend(tiles, *part, np.ones((4, 4), np.float32), total, weights)
    out = np.empty_like(total)
    assert kernels.blend_finish(total, weights, out) == 0
    assert np.argwhere(np.isnan(out)).tolist() == [[0, 1, 3]]


def test_blend_of_no_tiles_is_uncovered() -> None:
    total, weights = np.zeros((2, 4, 6), np.float32), np.zeros((4, 6), np.float32)
    none = np.empty((0, 2), int)
    kernels.tile_blend(np.empty((0, 2, 4, 4), np.float32), none, none, none, np.ones((4, 4), "f4"), total, weights)
    out = np.zeros_like(total)
    assert kernels.blend_finish(total, weights, out) == 24
    assert np.isnan(out).all()


# -------------------------------------------------------------------------------------------------------- crop_concat


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
@pytest.mark.parametrize(
    ("skip", "up"),
    [((64, 64), (56, 56)), ((9, 12), (9, 12)), ((13, 8), (4, 1)), ((7, 9, 8), (4, 4, 7)), ((50,), (31,))],
)
def test_crop_concat(dtype: str, skip: tuple[int, ...], up: tuple[int, ...]) -> None:
    a, b = pixels((2, 3, *skip), dtype), pixels((2, 4, *up), dtype, seed=1)
    corner = [s - u for s, u in zip(skip, up, strict=True)]
    for offset in (None, [0] * len(up), corner):
        for order in ("C", "F"):
            out = np.zeros((2, 7, *up), dtype)
            kernels.crop_concat(a.copy(order), b.copy(order), out, offset=offset)  # type: ignore[arg-type]
            same(out, reference.crop_concat(a, b, offset=offset))
    last = np.zeros((2, *up, 7), dtype)
    kernels.crop_concat(a, b, np.moveaxis(last, -1, 1))
    same(np.ascontiguousarray(np.moveaxis(last, -1, 1)), reference.crop_concat(a, b))


# -------------------------------------------------------------------------------------------------- arrays and errors


@pytest.mark.torch
def test_torch_tensors_are_used_where_they_lie() -> None:
    import torch

    image = torch.arange(2 * 20 * 30, dtype=torch.int32).reshape(2, 20, 30)
    out = torch.zeros(1, 2, 8, 9)
    kernels.tile_gather(image, [[-1, 4]], out)
    same(out.numpy(), reference.tile_gather(image.numpy(), [[-1, 4]], (8, 9))[0])
    with pytest.raises(ImageError, match="DLPack"):
        kernels.tile_gather(image.to(torch.bfloat16), [[0, 0]], out)
    with pytest.raises(ImageError, match="DLPack"):
        kernels.tile_gather(torch.zeros(2, 20, 30, requires_grad=True), [[0, 0]], out)


def test_cuda_arrays_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    status = native.cuda_status()
    monkeypatch.setattr(native, "cuda", native.cuda.__wrapped__)
    monkeypatch.setattr(native.importlib, "import_module", absent)
    tensor = SimpleNamespace(__cuda_array_interface__={})
    with pytest.raises(
        BackendError, match=re.escape(status if status != "built" else "they were built, but No module")
    ):
        kernels.tile_gather(tensor, [[0, 0]], np.empty((1, 1, 2, 2), np.float32))


def test_missing_module_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(native, "cpu", native.cpu.__wrapped__)
    for load, advice in ((absent, "pip install unet-rt"), (broken, "reinstall")):
        monkeypatch.setattr(native.importlib, "import_module", load)
        with pytest.raises(BackendError, match=advice):
            kernels.tile_gather(np.zeros((1, 2, 2)), [[0, 0]], np.empty((1, 1, 2, 2), np.float32))


def test_default_threads() -> None:
    assert native.default_threads() >= 1


WINDOW = np.zeros((2, 10, 12), np.uint8)
OUT = np.empty((1, 2, 4, 5), np.float32)
READ_ONLY = np.empty((1, 2, 4, 5), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ImageError, "byte order", {"window": WINDOW.astype(">u2")}),
        (ImageError, "complex64", {"window": WINDOW.astype("c8")}),
        (ImageError, "int64", {"window": WINDOW.astype("i8")}),
        (ImageError, "not an array", {"window": [[[1]]]}),
        (TileError, "spatial axes", {"window": np.zeros((2,), "u1")}),
        (TileError, "spatial axes", {"window": np.zeros((2, 3, 4, 5, 6), "u1")}),
        (TileError, "no pixel", {"window": WINDOW[:, :0]}),
        (TileError, "no pixel", {"window": WINDOW[:0], "out": OUT[:, :0]}),
        (TileError, r"\(N, 2\)", {"starts": [0, 0]}),
        (TileError, r"\(N, 2\)", {"starts": [[0, 0, 0]]}),
        (TileError, "whole numbers", {"starts": [[0.5, 0]]}),
        (TileError, "2\\^48", {"starts": [[2**60, 0]]}),
        (TileError, "out is 1x2x4x5", {"starts": [[0, 0], [1, 1]]}),
        (TileError, "out is 1x1x4x5", {"out": OUT[:, :1]}),
        (OutputError, "allocate", {"out": OUT.astype("f8")}),
        (OutputError, "allocate", {"out": OUT.astype(">f4")}),
        (OutputError, "read-only", {"out": READ_ONLY}),
        (TileError, "not inside the image", {"image_shape": (10, 11)}),
        (TileError, "not inside the image", {"window_start": (1, 0)}),
        (TileError, "not inside the image", {"window_start": (-1, 0), "image_shape": (20, 20)}),
        (TileError, "2 spatial axes need 2", {"image_shape": (10,)}),
        (TileError, "whole numbers", {"image_shape": (10.5, 12)}),
        (TileError, "axis 0, but the window holds 0 to 9", {"image_shape": (20, 12), "starts": [[8, 0]]}),
        (TileError, "pixels 17 to 21 along spatial axis 1", {"image_shape": (10, 30), "starts": [[0, 17]]}),
        (TileError, "mirror, edge, constant", {"border": "wrap"}),
        (ContractError, "neither 0", {"divisor": [1.0, 0.0]}),
        (ContractError, "neither 0", {"divisor": 1e-60}),
        (ContractError, "neither 0", {"divisor": np.nan}),
        (ContractError, "finite", {"offset": np.inf}),
        (ContractError, "one per channel", {"offset": [1, 2, 3]}),
        (ContractError, "lowest, highest", {"clip": (3, 2)}),
        (ContractError, "lowest, highest", {"clip": (np.nan, 2)}),
        (BackendError, "threads", {"threads": -1}),
    ],
)
def test_gather_errors(error: type[UnetRtError], message: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"window": WINDOW, "starts": [[0, 0]], "out": OUT, **change}
    with pytest.raises(error, match=message):
        kernels.tile_gather(**arguments)


TILES = np.zeros((1, 2, 6, 7), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ImageError, "float32, float16", {"tiles": TILES.astype("f8")}),
        (TileError, "spatial axes", {"tiles": TILES[:, :, 0, 0]}),
        (TileError, "without a channel", {"tiles": TILES[:, :0]}),
        (TileError, "leave the tile", {"source_start": [[1, 0]]}),
        (TileError, "leave the tile", {"source_start": [[-1, 0]]}),
        (TileError, "leave the output", {"target_start": [[3, 0]]}),
        (TileError, "leave the output", {"target_start": [[2**63 - 1, 0]]}),
        (TileError, "leave the tile", {"size": [[-1, 0]]}),
        (TileError, "one row per tile", {"size": [[1, 1], [1, 1]]}),
        (TileError, "argmax of 2 channels", {"op": "argmax", "out": np.zeros((2, 8, 9), "u1")}),
        (TileError, r"needs \(2, ", {"out": np.zeros((1, 8, 9), "f4")}),
        (OutputError, "uint8", {"op": "argmax"}),
        (ContractError, "softmax, sigmoid", {"op": "max"}),
        (ContractError, "without a threshold", {"op": "threshold", "out": np.zeros((2, 8, 9), "u1")}),
        (ContractError, "has none", {"threshold": 0.5}),
        (ContractError, "no labels", {"values": [0, 1]}),
        (ContractError, "2 whole numbers", {"op": "argmax", "out": np.zeros((8, 9), "u1"), "values": [0, 256]}),
        (ContractError, "2 whole numbers", {"op": "argmax", "out": np.zeros((8, 9), "u1"), "values": [0, 1, 2]}),
    ],
)
def test_stitch_errors(error: type[UnetRtError], message: str, change: dict[str, Any]) -> None:
    out = np.zeros((2, 8, 9), np.float32)
    parts = {"source_start": [[0, 0]], "target_start": [[0, 0]], "size": [[6, 7]]}
    arguments: dict[str, Any] = {"tiles": TILES, **parts, "out": out, **change}
    with pytest.raises(error, match=message):
        kernels.tile_stitch(**arguments)


def test_more_classes_than_a_byte_holds() -> None:
    with pytest.raises(ContractError, match="at most 256"):
        kernels.tile_stitch(np.zeros((1, 257, 1), "f4"), [[0]], [[0]], [[1]], np.zeros(1, "u1"), op="argmax")


def test_blend_errors() -> None:
    part = ([[0, 0]], [[0, 0]], [[6, 7]])
    weight, total, weights = np.ones((6, 7), "f4"), np.zeros((2, 8, 9), "f4"), np.zeros((8, 9), "f4")
    for change, error, message in [
        ({"weight": weight[1:]}, TileError, "spatial shape"),
        ({"weight": weight.astype("f8")}, ImageError, "float32"),
        ({"total": total[:1]}, TileError, "weight_total"),
        ({"total": total.astype("f2")}, OutputError, "float32"),
        ({"weight_total": weights[1:]}, TileError, "weight_total"),
    ]:
        arguments: dict[str, Any] = {"weight": weight, "total": total, "weight_total": weights, **change}
        with pytest.raises(error, match=message):
            kernels.tile_blend(TILES, *part, **arguments)
    with pytest.raises(TileError, match="must agree"):
        kernels.blend_finish(total, weights[1:], total.copy())
    with pytest.raises(TileError, match="must agree"):
        kernels.blend_finish(total, weights, np.zeros((2, 7, 9), "f4"))


def test_crop_concat_errors() -> None:
    skip, up, out = (np.zeros(shape, "f4") for shape in ((1, 2, 8, 8), (1, 3, 6, 6), (1, 5, 6, 6)))
    for arguments, message in [
        ((skip[:, :, :5], up, out), "smaller"),
        ((skip, up, out[:, :4]), "do not concatenate"),
        ((skip[:, :, 0], up, out), "do not concatenate"),
        ((skip, up.astype("f2"), out), "same dtype"),
    ]:
        with pytest.raises(TileError, match=message):
            kernels.crop_concat(*arguments)
    with pytest.raises(TileError, match="it may be 0 to"):
        kernels.crop_concat(skip, up, out, offset=(3, 0))
    with pytest.raises(ImageError, match="convert"):
        kernels.crop_concat(skip.astype("f8"), up, out)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@given(size=st.integers(0, 300_000), threads=st.integers(1, 5), seed=st.integers(0, 9))
def test_histogram_counts_every_value(dtype: str, size: int, threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    top = np.iinfo(dtype).max
    values = np.clip(rng.normal(top / 9, top / 40, size), 0, top).astype(dtype)  # crowded, as images are
    values[: size // 50] = rng.integers(0, top, size // 50, endpoint=True)
    counts = np.ones(top + 1, np.int64)
    kernels.histogram(values, counts, threads=threads)
    np.testing.assert_array_equal(counts, 1 + np.bincount(values, minlength=top + 1))


def test_histogram_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ImageError, match="float32"):
        kernels.histogram(np.zeros(3, np.float32), np.zeros(256, np.int64))
    with pytest.raises(OutputError, match="256"):
        kernels.histogram(np.zeros(3, np.uint8), np.zeros(255, np.int64))
