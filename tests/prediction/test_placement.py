"""Blended tiles lie where those of MONAI or nnU-Net do and weigh as much, on request."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the networks are exported with torch")

import placements

import unet_rt as urt
from unet_rt.baseline.tiles import blended_spec
from unet_rt.contract.contract import Contract
from unet_rt.engine.engine import Engine
from unet_rt.errors import TileError
from unet_rt.tiling.field import AxisField, TileSizes
from unet_rt.tiling.placement import PlacementRule, blend_weight, blended_tiles

pytestmark = [pytest.mark.torch, pytest.mark.onnxruntime]

RULES = {"monai": placements.monai_starts, "nnunet": placements.nnunet_starts}
WEIGHTS = {"monai": placements.monai_weight, "nnunet": placements.nnunet_weight}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Engine]:
    """By the number of axes."""
    folder = tmp_path_factory.mktemp("instance")
    return {dims: placements.engine_of(placements.export(dims, folder), folder / str(dims)) for dims in (2, 3)}


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=200)
@given(st.integers(1, 900), st.integers(2, 96), st.data())
def test_origins(rule: str, image: int, window: int, data: st.DataObject) -> None:
    """Whatever the sizes: steps of whole pixels, and half a window, also of an odd one."""
    half = window - window // 2
    step = data.draw(st.one_of(st.just(half), st.integers(1, window)))
    share = Fraction(1, 2) if rule == "nnunet" and step == half else Fraction(step, window)
    found = blended_tiles(image, window, window - step, TileSizes(1, 0, 1), [], rule)
    assert list(found.starts) == sorted(set(RULES[rule](image, window, 1 - share if rule == "monai" else share)))
    assert (found.canvas.before, found.canvas.size) == (max(0, window - image) // 2, max(window, image))


def test_the_origins_that_the_manual_shows() -> None:
    fields = [AxisField(16, (0, 0), (0, 0), (0, 0), Fraction(1))]
    rules = get_args(PlacementRule)
    starts = [blended_tiles(250, 96, 48, TileSizes(16, 0, 16), fields, rule).starts for rule in rules]
    assert starts == [(0, 48, 80, 128, 160), (0, 48, 96, 144, 154), (0, 38, 77, 116, 154)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("window", [(96, 64), (13, 7), (16, 32, 32), (1, 5, 8)])
def test_weights(rule: str, window: tuple[int, ...]) -> None:
    np.testing.assert_allclose(
        blend_weight(window, "gaussian", rule), WEIGHTS[rule](window), rtol=np.finfo(np.float32).eps
    )
    assert set(np.unique(blend_weight(window, "constant", rule))) == {1.0}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(1, 2), Fraction(5, 8)])
@pytest.mark.parametrize(("shape", "window"), placements.SHAPES)
def test_results_are_those_of_the_twin(
    engines: dict[int, Engine], rule: str, share: Fraction, shape: tuple[int, ...], window: tuple[int, ...]
) -> None:
    engine = placements.placed(engines[len(shape)], rule, window, [int(w * share) for w in window])
    pixels, x = placements.pictures(shape)
    got = urt.predict(engine, pixels, axes="C" + "ZYX"[-len(shape) :], output="raw")
    starts, weight = placements.windows_of(rule, shape, window, share)
    expected = placements.slide(lambda batch: engine.run(batch)[0], x, window, starts, weight)
    bound = placements.rounding(expected, window, starts)
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
    even = placements.placed(engines[len(shape)], "even", window, [int(w * share) for w in window])
    other = urt.predict(even, pixels, axes="C" + "ZYX"[-len(shape) :], output="raw")
    if shape != window:
        assert np.abs(other - expected).max() > 100 * bound  # the placement is part of the answer


@pytest.mark.parametrize(("rule", "overlap"), [("even", (48, 32)), ("monai", (24, 16)), ("nnunet", (48, 32))])
def test_overlaps_unless_told_otherwise(engines: dict[int, Engine], rule: str, overlap: tuple[int, ...]) -> None:
    assert placements.placed(engines[2], rule, (96, 64)).spec.overlap == overlap


def test_mirrored_as_nnunet_does(engines: dict[int, Engine]) -> None:
    """The mean of the values themselves over all flips of a window, before windows are blended."""
    engine = placements.placed(engines[2], "nnunet", (96, 64))
    pixels, x = placements.pictures((130, 101))

    def mirrored(batch: np.ndarray) -> np.ndarray:
        flips = [(), (2,), (3,), (2, 3)]
        return np.mean([np.flip(engine.run(np.ascontiguousarray(np.flip(batch, f)))[0], f) for f in flips], axis=0)

    starts, weight = placements.windows_of("nnunet", (130, 101), (96, 64), Fraction(1, 2))
    expected = placements.slide(mirrored, x, (96, 64), starts, weight)
    bound = placements.rounding(expected, (96, 64), starts) + 4 * np.finfo(np.float32).eps * np.abs(expected).max()
    labels = urt.predict(engine, pixels, axes="CYX", tta="flip")
    np.testing.assert_allclose(urt.predict(engine, pixels, axes="CYX", output="raw", tta="flip"), expected, atol=bound)
    runner_up, first = np.sort(expected, axis=0)[-2:]
    sure = first - runner_up > 2 * bound
    np.testing.assert_array_equal(labels[sure], expected.argmax(axis=0)[sure])
    share = urt.predict(engine, pixels, axes="CYX", output="probability", tta="flip")
    powers = np.exp(expected - expected.max(axis=0))
    np.testing.assert_allclose(share, powers / powers.sum(axis=0), atol=2 * bound)


def test_in_blocks_as_in_one_go(engines: dict[int, Engine], tmp_path: Path) -> None:
    engine = placements.placed(engines[2], "nnunet", (96, 64))
    pixels, _ = placements.pictures((430, 510))
    expected = urt.predict(engine, pixels, axes="CYX")
    reports = list[urt.RunReport]()
    urt.predict(engine, pixels, axes="CYX", out=tmp_path / "y.zarr", report=reports.append)
    zarr = pytest.importorskip("zarr")
    np.testing.assert_array_equal(np.squeeze(zarr.open(str(tmp_path / "y.zarr"), mode="r")["0"][:]), expected)
    assert reports[0].tiles > engine.spec.grid((430, 510)).count  # those across blocks are run for both


def test_built_with_a_placement(tmp_path: Path) -> None:
    """It stays with the engine, and a build with another one is another engine."""
    path = placements.export(2, tmp_path)
    pixels, _ = placements.pictures((130, 101))
    options = {
        "samples": [pixels], "axes": "CYX", "contract": placements.CONTRACT, "out": tmp_path / "x.urt",
        "backend": "onnxruntime", "precision": "fp32", "tile": (64, 64), "threads": 1,
    }  # fmt: skip
    reports = []
    with urt.build(path, placement="monai", report=reports.append, **options) as engine:
        spec = engine.spec
        assert (spec.placement, spec.overlap, spec.contract.border) == ("monai", (16, 16), "zero")
        assert any("as MONAI does" in note for note in reports[0].notes)
        starts, weight = placements.windows_of("monai", (130, 101), (64, 64), Fraction(1, 4))
        x = placements.pictures((130, 101))[1]
        expected = placements.slide(lambda batch: engine.run(batch)[0], x, (64, 64), starts, weight)
        got = urt.predict(engine, pixels, axes="CYX", output="raw")
        np.testing.assert_allclose(got, expected, atol=placements.rounding(expected, (64, 64), starts))
    with pytest.raises(urt.UnetRtError, match="another options"):
        urt.build(path, placement="nnunet", **options)


def test_an_exact_network_needs_none(tmp_path: Path, sample_images: list[np.ndarray]) -> None:
    from unet_rt.cli.demo import shipped_model

    with pytest.raises(TileError, match="equal its whole-image result"):
        urt.build(shipped_model(), samples=sample_images, out=tmp_path / "x.urt", placement="monai")
    assert not (tmp_path / "x.urt").exists()


def test_refusals(engines: dict[int, Engine]) -> None:
    from dataclasses import replace

    spec = engines[2].spec

    def blended(placement: str, spec: object = spec) -> None:
        blended_spec(spec, (64, 64), Path("m.onnx"), placement=placement)

    with pytest.raises(TileError, match="'odd' is unknown; use even, monai, nnunet"):
        blended("odd")
    mirrored = replace(spec, contract=replace(spec.contract, border="mirror"))
    with pytest.raises(TileError, match="--border zero"):
        blended("nnunet", mirrored)
    blended("monai", mirrored)  # its padding_mode, "reflect"
    [output] = spec.outputs
    half = replace(output, field=tuple(replace(f, scale=Fraction(1, 2)) for f in output.field))
    with pytest.raises(TileError, match="has not the size of the image"):
        blended("monai", replace(spec, outputs=(half,)))
    assert Contract(border="zero").to_json() == {"border": "zero"}
