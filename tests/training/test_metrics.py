"""Figures against their definitions, and against what a human would count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the figures live beside the training; pip install unet-rt[train]")
pytest.importorskip("skimage", reason="scores Rand errors; pip install unet-rt[train]")

from unet_rt.drawing.microscopy import microscopy
from unet_rt.drawing.scene import Scene
from unet_rt.training import components
from unet_rt.training.metrics import dice, object_iou, pixel_error, rand_error, warping_error


@pytest.fixture(scope="module")
def truth() -> Any:
    """Instance ids of nuclei."""
    return microscopy((160, 160), seed=4, scene=Scene(radius_px=9, cover=0.3)).truth


def cells() -> Any:
    """Nine square cells of 9 x 9 px with membranes of 3 px between them: True inside."""
    mask = np.zeros((39, 39), bool)
    for y in range(3):
        for x in range(3):
            mask[3 + 12 * y : 12 + 12 * y, 3 + 12 * x : 12 + 12 * x] = True
    return mask


def test_pixels_and_dice(truth: Any) -> None:
    mask = truth > 0
    assert pixel_error(mask, mask) == 0
    assert pixel_error(~mask, mask) == 1
    assert dice(mask, mask) == 1
    assert dice(mask & False, mask & False) == 1
    half = mask.copy()
    half[:, ::2] = False
    assert dice(half, mask) == pytest.approx(2 * half.sum() / (half.sum() + mask.sum()))


def pairs_rand_error(found: Any, reference: Any) -> float:
    """The definition: 1 - F score over all pairs of foreground pixels."""
    inside = reference > 0
    a, b = found[inside], reference[inside]
    same_a, same_b = a[:, None] == a, b[:, None] == b
    both = (same_a & same_b).sum() - len(a)
    return float(1 - 2 * both / (same_a.sum() + same_b.sum() - 2 * len(a)))


def test_the_rand_error_counts_pairs() -> None:
    mask = cells()
    assert rand_error(mask, mask) == pytest.approx(0, abs=1e-12)
    merged = mask.copy()
    merged[6:9, 12:15] = True  # a bridge between two cells
    found = components(merged)
    grown = np.where(found == 0, 0, found)
    assert rand_error(merged, mask) == pytest.approx(pairs_rand_error(grown, components(mask)), abs=2e-3)
    assert rand_error(merged, mask) > 0.05


def test_the_rand_error_does_not_mind_thick_borders() -> None:
    """Border thinning: cells that were drawn too small are the same cells."""
    small = np.zeros_like(cells())
    for y in range(3):
        for x in range(3):
            small[5 + 12 * y : 10 + 12 * y, 5 + 12 * x : 10 + 12 * x] = True
    assert rand_error(small, cells()) == pytest.approx(0, abs=1e-12)
    assert pixel_error(small, cells()) > 0.3


def test_the_warping_error_counts_topology_alone() -> None:
    mask = cells()
    assert warping_error(mask, mask) == 0
    moved = np.roll(mask, 1, axis=1)
    assert pixel_error(moved, mask) > 0.1
    assert warping_error(moved, mask) == 0  # borders may move
    bridged = mask.copy()
    bridged[7, 12:15] = True
    assert warping_error(bridged, mask) == pytest.approx(1 / mask.size)  # one pixel joins two cells
    lost = mask.copy()
    lost[3:12, 3:12] = False
    assert warping_error(lost, mask) == pytest.approx(1 / mask.size)  # a cell shrinks to a pixel, which stays
    hole = mask.copy()
    hole[7, 7] = False
    assert warping_error(hole, mask) == pytest.approx(1 / mask.size)


def test_simple_points_keep_the_number_of_parts() -> None:
    """Every one of the 512 windows: flipping a simple centre changes neither objects nor holes."""
    from scipy.ndimage import label

    from unet_rt.training.metrics import _simple_points

    eight = np.ones((3, 3))
    for code, simple in enumerate(_simple_points()):
        window = (code >> np.arange(9) & 1).reshape(3, 3).astype(bool)
        before, after = np.pad(window, 1), np.pad(window, 1)
        after[2, 2] ^= True
        if simple:
            assert label(before)[1] == label(after)[1]
            assert label(~before, eight)[1] == label(~after, eight)[1]


def test_object_iou_is_the_challenge_s(truth: Any) -> None:
    assert object_iou(truth, truth) == 1
    ids = np.unique(truth)[1:]
    assert object_iou(np.where(truth == ids[0], 0, truth), truth) == pytest.approx(1 - 1 / len(ids))
    merged = np.where(truth == ids[1], ids[0], truth)  # covers both wholly: the union counts against each
    a, b = ((truth == k).sum() for k in ids[:2])
    assert object_iou(merged, truth) == pytest.approx((len(ids) - 2 + a / (a + b) + b / (a + b)) / len(ids))
    square, half = np.zeros((8, 8), int), np.zeros((8, 8), int)
    square[:4, :4], half[:4, :2] = 1, 5
    assert object_iou(half, square) == 0  # not more than half of it is covered
    half[0, 2] = 5
    assert object_iou(half, square) == pytest.approx(9 / 16)
    assert np.isnan(object_iou(square, square & 0))
