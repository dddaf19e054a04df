"""Normalisation: statistics of the whole image equal NumPy's, whatever the bands, and nothing unfit passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_rt.contract.contract import Contract, Normalization, Scope
from unet_rt.errors import ContractError, ImageError
from unet_rt.images.normalize import affine, grey_levels, normalize_pixels
from unet_rt.images.open import open_image
from unet_rt.images.reading import Reading
from unet_rt.images.source import Source
from unet_rt.images.statistics import measure, percentiles
from unet_rt.kernels.request import Affine

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]


def pixels_of(dtype: str, shape: tuple[int, ...] = (2, 3, 41, 37), seed: int = 5) -> np.ndarray:
    """Two planes of three channels: a bright background with spots, as a microscope gives them."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype).kind
    values = rng.normal(60 if kind == "u" else -3, 12, shape) + (rng.random(shape) > 0.97) * 40
    return values.clip(0 if kind == "u" else -100, 120).astype(dtype)


def opened(array: np.ndarray, monkeypatch: pytest.MonkeyPatch | None = None, samples: int = 700) -> Source:
    source = open_image(array, Contract(), network_channels=array.shape[1])
    if monkeypatch is not None:  # many bands, the last of them ragged
        bands = type(source).bands
        monkeypatch.setattr(type(source), "bands", lambda self: bands(self, samples))
    return source


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scope", "over"), [("image", (1, 2, 3)), ("channel", (0, 2, 3)), ("slice", (2, 3))])
@pytest.mark.parametrize("clip", [None, (-8.0, 70.0)])
def test_statistics_are_those_of_numpy(
    dtype: str, scope: Scope, over: Any, clip: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = pixels_of(dtype)
    source = opened(array, monkeypatch)
    exact = array.astype(np.float64) if clip is None else array.astype(np.float64).clip(*clip)
    low, high = np.percentile(exact, (2, 99.8), axis=over)
    expected = {
        "minmax": (exact.min(over), exact.max(over) - exact.min(over)),
        "percentile": (low, high - low),
        "zscore": (exact.mean(over), exact.std(over)),
    }
    for method, (offset, divisor) in expected.items():
        numbers = affine(Normalization(method, scope=scope, percentiles=(2, 99.8), clip=clip), source)  # type: ignore[arg-type]
        for plane in range(2):
            found = numbers.plane(plane)
            wanted = [np.asarray(v) for v in (offset, divisor + 1e-6)]
            wanted = [v if scope == "channel" else v[plane] for v in wanted]  # a plane is an image
            wanted = [np.broadcast_to(v, (3,)) for v in wanted]
            # float64 until one rounding to float32: half a unit in the last place, and the order of the sums.
            np.testing.assert_allclose(found.offset, wanted[0], rtol=1.2e-7, atol=1e-12)
            np.testing.assert_allclose(found.divisor, wanted[1], rtol=1.2e-7)
            assert found.clip == clip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("few_px", [0, 2**14], ids=["counted", "sorted"])
def test_percentiles_are_exact(dtype: str, few_px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_rt.images.statistics.FEW_PX", few_px)
    array = pixels_of(dtype)
    wanted = (0, 0.3, 1, 25, 37.7, 50, 99.8, 100)
    found = percentiles(opened(array, monkeypatch), wanted)
    assert found == [float(v) for v in np.percentile(array.astype(np.float64), wanted)]


@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=30),
    percent=st.floats(0, 100),
    few_px=st.sampled_from([0, 2**14]),
)
@settings(deadline=None)
def test_percentiles_of_any_floats(values: list[float], percent: float, few_px: int) -> None:
    array = np.array(values, np.float32)[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unet_rt.images.statistics.FEW_PX", few_px)
        (found,) = percentiles(open_image(array, Contract()), [percent])
    with np.errstate(over="ignore"):
        assert found == pytest.approx(np.percentile(array.astype(np.float64), percent), rel=1e-15, abs=1e-300)


@pytest.mark.parametrize("method", ["minmax", "percentile", "zscore"])
def test_a_plane_of_a_stack_is_normalised_as_it_is_alone(method: Any) -> None:
    stack = np.stack([pixels_of("uint16")[0], 3 * pixels_of("uint16", seed=6)[1]])
    open_scope = affine(Normalization(method), opened(stack))
    declared = affine(Normalization(method, scope="image"), opened(stack))  # as train writes it
    for plane in range(2):
        for scope, found in ((None, open_scope), ("image", declared)):
            alone = affine(Normalization(method, scope=scope), opened(stack[plane : plane + 1])).plane(0)
            assert found.plane(plane).offset.tolist() == alone.offset.tolist()
            assert found.plane(plane).divisor.tolist() == alone.divisor.tolist()
    together = affine(Normalization(method, scope="channel"), opened(stack))
    assert together.plane(0).divisor.tolist() == together.plane(1).divisor.tolist() != alone.divisor.tolist()


def test_volumes_of_a_series_keep_their_common_statistics() -> None:
    series = np.stack([pixels_of("uint16")[0], 3 * pixels_of("uint16", seed=6)[1]])[:, None]  # T, C, Z, Y, X
    source = open_image(series, Contract(), Reading("TCZYX"), spatial=3)
    assert source.planes == 2
    for scope in (None, "image"):
        numbers = affine(Normalization("zscore", scope=scope), source)  # type: ignore[arg-type]
        for plane in range(2):
            assert numbers.plane(plane).offset[0] == pytest.approx(series.mean(), rel=1e-6)


def test_the_deviation_survives_a_large_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    array = pixels_of("float64") + 1e9
    found = measure(opened(array, monkeypatch))
    assert found.std == pytest.approx(float(array.std()), rel=1e-9)
    assert found.mean == pytest.approx(float(array.mean()), rel=1e-15)
    assert (found.low, found.high, found.count) == (array.min(), array.max(), array.size)


def test_declared_numbers() -> None:
    source = opened(pixels_of("uint16"))
    cases = [
        (Normalization("none"), [0.0] * 3, [1.0] * 3),
        (Normalization("scale", scale=4095), [0.0] * 3, [4095.0] * 3),
        (Normalization("dtype"), [0.0] * 3, [65535.0] * 3),
        (Normalization("fixed", mean=(0.5,), std=(0.25,), scale=200), [100.0] * 3, [50.0] * 3),
        (Normalization("fixed", mean=(1, 2, 3), std=(4,)), [1.0, 2.0, 3.0], [4.0] * 3),
    ]
    for normalization, offset, divisor in cases:
        numbers = affine(normalization, source).plane(1)
        assert (numbers.offset.tolist(), numbers.divisor.tolist()) == (offset, divisor)
        assert numbers.offset.dtype == numbers.divisor.dtype == np.float32


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ContractError, match="the pixels are float32; use scale=N"):
        affine(Normalization("dtype"), opened(pixels_of("float32")))
    with pytest.raises(ContractError, match="declares 2 numbers for mean, the network has 3 channels"):
        affine(Normalization("fixed", mean=(1, 2)), opened(pixels_of("uint8")))
    with pytest.raises(ContractError, match="divisor must not be 0"):
        affine(Normalization("minmax", eps=0), opened(np.full((1, 3, 8, 8), 7, np.uint8)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["minmax", "percentile", "zscore"])
@pytest.mark.parametrize("scope", [None, "channel"])
def test_pixels_that_are_not_finite_are_counted_and_placed(bad: float, method: Any, scope: Scope | None) -> None:
    array = pixels_of("float32")
    array[1, 2, 17, 5:9] = bad
    with pytest.raises(ImageError, match=r"4 NaN or infinite pixels .*plane 1, the first in channel 2 at \(17, 5\)"):
        affine(Normalization(method, scope=scope), opened(array)).plane(1)


def test_a_flat_image_does_not_divide_by_zero() -> None:
    for method in ("minmax", "percentile", "zscore"):
        source = opened(np.full((1, 3, 8, 8), 7, np.uint8))
        values = normalize_pixels(source.read(0, (0, 0), (8, 8)), affine(Normalization(method), source).plane(0))  # type: ignore[arg-type]
        assert (values == 0).all()


def test_statistics_per_slice_are_read_when_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(pixels_of("uint8"))
    read: list[int] = []
    original = Source.read_valid
    monkeypatch.setattr(Source, "read_valid", lambda self, p, a, b: (read.append(p), original(self, p, a, b))[1])
    numbers = affine(Normalization("zscore", scope="slice"), source)
    assert read == []
    first = numbers.plane(1)
    assert set(read) == {1}
    count = len(read)
    assert numbers.plane(1) is first
    assert len(read) == count


NUMBER = st.floats(-1e4, 1e4, width=32)


@given(
    pixels=st.lists(st.integers(0, 65535), min_size=2, max_size=50),
    offset=NUMBER,
    divisor=st.floats(2**-7, 1e4, width=32) | st.floats(-1e4, -(2**-7), width=32),
    clip=st.none() | st.tuples(st.integers(0, 30000), st.integers(30001, 65535)),
    ends=st.tuples(st.integers(0, 49), st.integers(0, 49)),
)
def test_grey_levels_are_those_that_come_out_in_a_range(pixels, offset, divisor, clip, ends):
    """Outside are the pixels whose normalised value is; those that gave the range are not, whatever is rounded."""
    numbers = Affine(np.array([offset], np.float32), np.array([divisor], np.float32), clip)
    grey = np.array([pixels], np.uint16)
    x = normalize_pixels(grey, numbers)[0].astype(np.float64)
    low, high = sorted(x[n % len(x)] for n in ends)
    levels = grey_levels([(low, high)], numbers)
    outside = (grey[0] < levels[0, 0]) | (grey[0] > levels[0, 1])
    rounding = 1e-6 * max(abs(low), abs(high), np.abs(x).max()) + 65535 * 3e-7 / abs(divisor)
    assert not (outside & (x >= low) & (x <= high)).any()
    assert outside[(x < low - rounding) | (x > high + rounding)].all()
    several = grey_levels([(low, high)], Affine(*(np.repeat(a, 3) for a in (numbers.offset, numbers.divisor)), clip))
    np.testing.assert_array_equal(several, np.repeat(levels, 3, axis=0))
