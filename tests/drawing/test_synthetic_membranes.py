"""Drawn sections of neuropil: seeded, truthful, and grey-level statistics like those of electron microscopy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from unet_rt.drawing.membranes import CELL, MEMBRANE, Section, membranes
from unet_rt.drawing.tissue import Tissue, random_tissue
from unet_rt.errors import ImageError

SHAPE = (300, 420)


@pytest.fixture(scope="module")
def section() -> Section:
    return membranes(SHAPE, seed=3)


def test_the_seed_decides(section: Section) -> None:
    again, other = membranes(SHAPE, seed=3), membranes(SHAPE, seed=4)
    np.testing.assert_array_equal(again.image, section.image)
    np.testing.assert_array_equal(again.truth, section.truth)
    assert (other.truth != section.truth).mean() > 0.1
    assert section.image.shape == section.truth.shape == SHAPE
    assert section.image.dtype == section.truth.dtype == np.uint8
    assert set(np.unique(section.truth)) == {MEMBRANE, CELL}


def test_organelles_change_pixels_and_never_the_truth(section: Section) -> None:
    empty = membranes(SHAPE, seed=3, tissue=replace(Tissue(), mitochondria_per_mpx=0, vesicles_per_mpx=0))
    np.testing.assert_array_equal(empty.truth, section.truth)
    darker = empty.image.astype(int) - section.image > 40
    assert 0.005 < darker.mean() < 0.3
    assert darker[section.truth == CELL].sum() > 0.9 * darker.sum()


@pytest.mark.parametrize("seed", range(3))
def test_a_membrane_is_a_thin_dark_net_between_cells_of_all_sizes(seed: int) -> None:
    from scipy import ndimage

    drawn = membranes((512, 512), seed=seed, tissue=random_tissue(seed))
    inside = drawn.truth == CELL
    assert 0.08 < (~inside).mean() < 0.38  # 0.20 to 0.25 in slices of ISBI 2012
    labels, count = ndimage.label(inside)
    areas = np.bincount(labels.ravel())[1:]
    areas = areas[areas > 20]
    assert count > 20
    assert np.percentile(areas, 95) > 8 * np.percentile(areas, 25)
    # From the middle of a membrane to the inside of a cell the mean grey rises by most of what was asked for.
    depth = ndimage.distance_transform_edt(inside)
    middle = ndimage.distance_transform_edt(~inside) >= 2.5
    rise = drawn.image[depth > 6].mean() - drawn.image[middle].mean()
    assert 0.4 * drawn.tissue.membrane_depth < rise < 1.1 * drawn.tissue.membrane_depth
    # Noise and organelles cross: no threshold tells membranes from cells.
    levels = np.arange(0, 256, 4)
    best = min(float(((drawn.image >= level) != inside).mean()) for level in levels)
    assert best > 0.05


def test_oblique_membranes_are_wider_and_fainter() -> None:
    from scipy import ndimage

    sharp, blurred = (membranes(SHAPE, seed=1, tissue=replace(Tissue(), oblique=o, dense=0)) for o in (0.0, 0.5))
    outside = ndimage.distance_transform_edt(sharp.truth == CELL)
    near, on = (outside > 1) & (outside < 4), sharp.truth == MEMBRANE
    assert blurred.image[near].mean() < sharp.image[near].mean() - 2  # grey where a sharp one has ended
    assert blurred.image[on].mean() > sharp.image[on].mean() + 2


def test_what_cannot_be_drawn_is_refused() -> None:
    for shape in ((0, 5), (5,), (5000, 10), (3, 4, 5)):
        with pytest.raises(ImageError, match="cannot be drawn"):
            membranes(shape)
    with pytest.raises(ImageError, match="seed -1 is negative"):
        membranes((8, 8), seed=-1)
    with pytest.raises(ImageError, match="membrane_px is 0; use 2 to 16"):
        Tissue(membrane_px=0)
    assert membranes((1, 3)).image.shape == (1, 3)
