"""Test-time augmentation: means over positions of the image, tiled as at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import unet_rt as urt
from unet_rt.drawing.microscopy import microscopy
from unet_rt.engine.tta import Augmented

pytestmark = pytest.mark.onnxruntime


@pytest.fixture(scope="module")
def engine(engine_folder):
    with urt.load(engine_folder) as loaded:
        loaded.spec = replace(loaded.spec, halo="exact", halo_limit=None)
        yield loaded


@pytest.mark.parametrize("how", ["flip", "d4"])
def test_means_are_those_of_the_flipped_canvas(engine, how):
    """By hand: the canvas (here the image itself) is flipped and turned, run at once, and turned back."""
    image = microscopy((256, 256), seed=31).image
    normal = urt.predict(engine, image, tile=(256, 256), output="probability")

    def at_once(pixels):
        return urt.predict(engine, pixels, tile=(256, 256), output="probability").astype(np.float64)

    expected, count = np.zeros(normal.shape), 0
    for turn in (False, True)[: 1 + (how == "d4")]:
        for axes in ((), (0,), (1,), (0, 1)):
            pixels = np.flip(image.T if turn else image, axes)
            back = np.flip(at_once(np.ascontiguousarray(pixels)), tuple(a + 1 for a in axes))
            expected += back.swapaxes(1, 2) if turn else back
            count += 1
    assert count == Augmented(engine, how).positions
    got = urt.predict(engine, image, tile=(256, 256), output="probability", tta=how)
    # Float32 sums of up to 8 numbers of at most 1, and a softmax in another order of operations.
    np.testing.assert_allclose(got, expected / count, atol=16 * np.finfo(np.float32).eps)
    assert np.abs(got - normal).max() > 1e-3


@pytest.mark.parametrize("how", ["flip", "d4"])
def test_tiles_equal_the_whole(engine, how):
    image = microscopy((330, 410), seed=32).image
    masks = [urt.predict(engine, image, tile=tile, output="probability", tta=how) for tile in ((192, 192), (336, 416))]
    np.testing.assert_array_equal(*masks)
    np.testing.assert_array_equal(urt.predict(engine, image, tta=how), masks[0].argmax(axis=0))


def test_halos_serve_both_directions(engine):
    field = engine.spec.outputs[0].field[0]
    lopsided = replace(field, halo=(field.halo[0], field.halo[1] + 5))
    output = replace(engine.spec.outputs[0], field=(lopsided, field))
    spec = engine.spec
    try:
        engine.spec = replace(spec, outputs=(output,))
        for how in ("flip", "d4"):
            fields = Augmented(engine, how).spec.outputs[0].field
            assert fields[0].halo == (field.halo[1] + 5,) * 2
        assert fields[1].halo == fields[0].halo, "quarter turns: both axes need the larger one"
        engine.spec = replace(spec, outputs=(replace(output, field=(replace(field, shrink=(0, 1)), field)),))
        with pytest.raises(urt.ContractError, match="leave --tta away"):
            Augmented(engine, "flip")
    finally:
        engine.spec = spec


def test_what_cannot_be_turned_is_refused(engine):
    with pytest.raises(urt.ContractError, match="unknown"):
        Augmented(engine, "none")
    sizes = (engine.spec.sizes[0], replace(engine.spec.sizes[1], minimum=64))
    spec = engine.spec
    try:
        engine.spec = replace(spec, sizes=sizes)
        with pytest.raises(urt.ContractError, match="--tta flip"):
            Augmented(engine, "d4")
    finally:
        engine.spec = spec
