"""The network for membranes that ships: valid-padded, exact when tiled, and what its record says it is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import unet_rt as urt
from unet_rt.cli.demo import shipped_model
from unet_rt.drawing.membranes import membranes
from unet_rt.drawing.tissue import random_tissue
from unet_rt.errors import GraphError

MODEL = shipped_model("membranes")
RECORD: dict[str, Any] = json.loads(MODEL.with_suffix(".json").read_text(encoding="utf-8"))
LOST_PX = 92  # on each side, as in the paper: 572 -> 388
pytestmark = pytest.mark.onnxruntime


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    samples = [membranes((300, 300), seed=seed, tissue=random_tissue(seed)).image for seed in (5000, 5001)]
    out = tmp_path_factory.mktemp("membranes") / "membranes.urt"
    with urt.build(MODEL, samples=samples, out=out, backend="onnxruntime", precision="fp32", tile=(252, 252)) as made:
        yield made


def test_it_is_the_paper_s_network_narrower() -> None:
    (one,) = urt.inspect(MODEL).outputs
    assert one.exact
    assert [axis.shrink for axis in one.field] == [(LOST_PX, LOST_PX)] * 2
    assert [axis.halo for axis in one.field] == [(0, 0)] * 2  # nothing is padded, so that no edge touches a sample
    assert RECORD["architecture"]["padding"] == "valid"
    assert RECORD["architecture"]["width"] == 8
    assert MODEL.stat().st_size < 2.1e6


def test_tiled_equals_whole_bit_for_bit(engine: Any) -> None:
    """The whole: the image with 92 mirrored pixels around it, grown to a size that the network accepts, at once."""
    image = membranes((333, 411), seed=6000).image
    low, high = np.percentile(image, (1.0, 99.8))
    pixels = (image.astype(np.float32) - np.float32(low)) / np.float32(high - low + 1e-6)
    pads = [(LOST_PX, c - n - LOST_PX) for c, n in zip(engine.spec.canvas_shape(image.shape), image.shape, strict=True)]
    (whole, *_) = engine.run(np.pad(pixels, pads, mode="reflect")[None, None])
    tiled = urt.predict(engine, image, tile=(236, 268), output="raw")
    assert whole.shape[2:] > image.shape  # the canvas is cropped to the image
    np.testing.assert_array_equal(tiled, whole[0][:, : image.shape[0], : image.shape[1]])


def test_drawn_membranes_of_a_seed_held_back_are_found(engine: Any) -> None:
    from unet_rt.training.metrics import iou

    found = []
    for seed in range(7000, 7003):
        drawn = membranes((400, 400), seed=seed, tissue=random_tissue(seed))
        found.append(iou(urt.predict(engine, drawn.image) == 0, drawn.truth == 0))
    claimed = RECORD["figures"]["test_drawn"]
    each = list(claimed["iou_membranes_each"].values())
    # The mean of three sections lies within three of its standard deviations of the recorded mean.
    bound = claimed["iou_membranes"] - 3 * float(np.std(each, ddof=1)) / 3**0.5
    assert np.mean(found) > bound
    assert bound > 0.5


def test_the_record_is_honest_about_real_tissue() -> None:
    real = RECORD["figures"]["test_real"]
    assert real["images"] == 3
    assert real["iou_membranes"] < RECORD["figures"]["test_drawn"]["iou_membranes"]


def test_unknown_networks_are_refused() -> None:
    with pytest.raises(GraphError, match=r"no network called 'cells'.*nuclei or membranes"):
        shipped_model("cells")  # type: ignore[arg-type]
