"""Training with the defaults' recipe where cells are not bright: phase contrast and DIC, five labelled frames each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch; pip install unet-rt[train]")
pytest.importorskip("skimage", reason="thresholds to compare with; pip install unet-rt[train]")

from scipy.ndimage import distance_transform_edt, gaussian_filter

from unet_rt.drawing.microscopy import microscopy
from unet_rt.drawing.scene import Scene
from unet_rt.models.checkpoint import load_checkpoint
from unet_rt.training.evaluate import evaluate
from unet_rt.training.fit import fit
from unet_rt.training.metrics import iou
from unet_rt.training.options import NORMALIZATION, Options
from unet_rt.training.samples import prepare
from unet_rt.training.weights import separate

pytestmark = pytest.mark.torch

CELLS = Scene(radius_px=20, radius_spread=0.25, elongation=1.7, cover=0.4, cluster=2.5)
FRAME_PX = 192
# The defaults' recipe at a size for a test; 1000 steps of width 16 and 256 px take minutes.
SMALL = Options(
    architecture={"width": 8, "depth": 3},
    recipe={"steps": 70, "tile_px": 128, "validate_every": 14},
    device="cpu",
    threads=1,
)

Drawing = Callable[[Any, np.random.Generator], Any]


def thickness(truth: Any, rng: np.random.Generator) -> Any:
    """Of cells with granules, about 1 in their middle and 0 outside."""
    grain = gaussian_filter(rng.standard_normal(truth.shape), 2)
    return (1 - np.exp(-distance_transform_edt(separate(truth)) / 5)) * (1 + 0.25 * grain / grain.std())


def phase_contrast(truth: Any, rng: np.random.Generator) -> Any:
    """Dark cells in a bright halo, on uneven light."""
    thick = thickness(truth, rng)
    sharp, halo = gaussian_filter(thick, 1.2), gaussian_filter(thick, 7)
    light = np.linspace(0.85, 1.15, truth.shape[1])
    return grey(light * (118 - 9 * sharp + 40 * np.maximum(halo - sharp, 0)), 3, rng)


def dic(truth: Any, rng: np.random.Generator) -> Any:
    """Differential interference contrast: a relief lit from one side, cells as grey as what is around them."""
    return grey(128 + 160 * sum(np.gradient(gaussian_filter(thickness(truth, rng), 1.2))), 5, rng)


def grey(levels: Any, noise: float, rng: np.random.Generator) -> Any:
    return np.clip(levels + rng.normal(0, noise, levels.shape), 0, 255).astype(np.uint8)


def frames(draw: Drawing, count: int) -> list[tuple[Any, Any]]:
    """(pixels, instance ids) of frames."""
    truths = [microscopy((FRAME_PX, FRAME_PX), seed=seed, scene=CELLS).truth for seed in range(count)]
    return [(draw(truth, np.random.default_rng(seed)), truth) for seed, truth in enumerate(truths)]


def threshold_iou(pixels: Any, truth: Any) -> float:
    """The best that a threshold gives, of either sign, without and with smoothing; and that of cells everywhere."""
    found = [float(truth.mean())]
    for image in (pixels.astype(float), gaussian_filter(pixels.astype(float), 3)):
        for level in np.percentile(image, range(5, 100, 5)):
            found += [iou(image > level, truth), iou(image < level, truth)]
    return max(found)


@pytest.mark.parametrize("draw", [phase_contrast, dic])
def test_the_defaults_serve_five_frames(tmp_path: Path, draw: Drawing) -> None:
    """Frames that were not trained on: far above what any threshold finds in them."""
    import tifffile

    drawn = frames(draw, 8)
    for k, (pixels, ids) in enumerate(drawn[:5]):
        for name, content in ((f"01/t{k:03}.tif", pixels), (f"01_GT/SEG/man_seg{k:03}.tif", ids.astype(np.uint16))):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(tmp_path / name, content)
    done = fit(tmp_path, tmp_path / "model.pt", SMALL)
    assert done.record["data"]["masks"] == "instances"
    network, _, _ = load_checkpoint(done.path)
    samples = [prepare(str(k), pixels, ids, NORMALIZATION) for k, (pixels, ids) in enumerate(drawn[5:])]
    found = float(np.mean(evaluate(network, samples, against="truth")))
    trivial = float(np.mean([threshold_iou(pixels, ids > 0) for pixels, ids in drawn[5:]]))
    assert trivial < 0.5
    assert found > trivial + 0.15
