"""Objects that touch are told apart: one by one, so that windows decide nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from skimage import draw, measure

from unet_rt import ContractError, ImageError, label_mask
from unet_rt.drawing.microscopy import Scene, microscopy
from unet_rt.outputs.objects import Objects, Sought, find_objects
from unet_rt.outputs.split import Split

Array = np.ndarray[Any, np.dtype[Any]]


def split(
    mask: Array, how: str, window: Sequence[int] | None = None, min_size: int = 1, **by: Any
) -> tuple[Array, Objects]:
    """(ids, objects) by windows of one size; what is kept of parts goes to the disk at once."""
    ids = np.full(mask.shape, 2**32 - 1, np.uint32)

    def read(start: Sequence[int], stop: Sequence[int]) -> Array:
        return mask[tuple(map(slice, start, stop))]

    with tempfile.SpooledTemporaryFile(100) as spool:
        found = find_objects(read, mask.shape, Sought(min_size, split=Split(how, spool, **by)), window=window)
        for start, block in found.windows():
            ids[tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block
    return ids, found.objects


def discs(shape: tuple[int, int], *places: tuple[int, int, int]) -> Array:
    mask = np.zeros(shape, np.uint8)
    for y, x, radius in places:
        mask[draw.disk((y, x), radius, shape=shape)] = 1
    return mask


def found_again(ids: Array, truth: Array) -> float:
    """F1 of objects whose overlap with one of the truth is more than half of their union."""
    counts = np.zeros((int(truth.max()) + 1, int(ids.max()) + 1))
    np.add.at(counts, (truth, ids), 1)
    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    hits = int((counts[1:, 1:] / union[1:, 1:] > 0.5).sum())
    return 2 * hits / (len(np.unique(truth[truth > 0])) + int(ids.max()))


def check(ids: Array, found: Objects, mask: Array) -> None:
    """What is numbered is the mask; figures are scikit-image's of the ids; ids go by first pixels; parts hang together."""
    np.testing.assert_array_equal(ids > 0, mask > 0)
    regions = measure.regionprops(ids)
    assert [r.label for r in regions] == found.ids.tolist()
    assert [r.area for r in regions] == found.area_px.tolist()
    assert [r.bbox for r in regions] == [
        (*a, *b) for a, b in zip(found.start.tolist(), found.stop.tolist(), strict=True)
    ]
    first = [np.flatnonzero(ids == number)[0] for number in found.ids]
    assert first == sorted(first)
    for number in found.ids:
        assert ndimage.label(ids == number, np.ones((3,) * ids.ndim))[1] == 1


def test_discs_that_touch_come_apart_and_bumps_do_not():
    mask = discs((60, 110), (30, 25, 20), (30, 60, 18), (30, 90, 15))
    mask[8:12, 24:27] = 1  # a bump on the first
    assert ndimage.label(mask)[1] == 1
    ids, found = label_mask(mask, split="watershed")
    check(ids, found, mask)
    assert len(found) == 3
    assert {int(ids[30, x]) for x in (25, 60, 90)} == {1, 2, 3}
    edge = np.flatnonzero(np.diff(ids[30, 25:90].astype(int))) + 25
    assert [abs(int(x) - middle) <= 2 for x, middle in zip(edge, (43, 76), strict=True)] == [True, True]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(5, 60), st.integers(5, 90)), st.integers(1, 40))
def test_windows_decide_nothing(seed, window, min_size):
    rng = np.random.default_rng(seed)
    places = [(*rng.integers(0, (60, 90)).tolist(), int(rng.integers(2, 12))) for _ in range(14)]
    mask = discs((60, 90), *places) * rng.integers(1, 3, (60, 1)).repeat(90, 1).astype(np.uint8)
    for how, by in (("watershed", {}), ("border", {"border": 2})):
        whole, found = split(mask, how, min_size=min_size, **by)
        ids, again = split(mask, how, window, min_size, **by)
        np.testing.assert_array_equal(ids, whole)
        for name in ("label", "area_px", "centroid", "start", "stop"):
            np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
        assert (found.area_px >= min_size).all()


def test_drawn_nuclei_are_found_again():
    truth = microscopy((400, 500), seed=8, scene=Scene(radius_px=9, cover=0.5)).truth
    mask = (truth > 0).astype(np.uint8)
    ids, found = split(mask, "watershed", (130, 170))
    check(ids, found, mask)
    unsplit = found_again(label_mask(mask)[0], truth)
    assert found_again(ids, truth) > unsplit + 0.1, unsplit


def test_real_nuclei_are_found_again(shared: Path):
    scores, unsplit = [], []
    for file in sorted((shared / "data" / "dsb2018" / "label").glob("*.png"))[:12]:
        with Image.open(file) as opened:
            drawn = np.asarray(opened)
        truth = np.unique(drawn, return_inverse=True)[1].reshape(drawn.shape)
        mask = (truth > 0).astype(np.uint8)
        scores.append(found_again(split(mask, "watershed", (200, 100))[0], truth))
        unsplit.append(found_again(label_mask(mask)[0], truth))
    assert np.mean(scores) > np.mean(unsplit) + 0.03
    assert np.mean(scores) > 0.93


def test_spheres_of_flat_voxels_come_apart():
    z, y, x = np.mgrid[:12, :60, :60]
    mask = np.zeros(z.shape, np.uint8)
    for centre in ((6, 30, 18), (6, 30, 42)):
        mask[sum(((a - c) * s) ** 2 for a, c, s in zip((z, y, x), centre, (4, 1, 1), strict=True)) <= 14**2] = 1
    ids, found = split(mask, "watershed", (5, 20, 30), sampling=(4.0, 1.0, 1.0))
    check(ids, found, mask)
    assert len(found) == 2
    assert ids[6, 30, 18] != ids[6, 30, 42]


def test_a_border_class_is_shared_out_to_what_it_parts():
    mask = discs((50, 100), (25, 25, 18), (25, 60, 18))
    mask[:, 42:44] *= 2  # border between them: 2
    mask[5:9, 80:95] = 2  # border of nothing
    mask[40:44, 80:90] = 3  # another class, without a border
    ids, found = split(mask, "border", (20, 30), border=2)
    assert found.label.tolist() == [1, 1, 3]
    assert not ids[5:9, 80:95].any()
    own = (mask > 0) & ~((np.arange(100) >= 79) & (np.arange(50) < 20)[:, None])
    np.testing.assert_array_equal(ids > 0, own)
    assert set(np.unique(ids[:, 42][mask[:, 42] > 0])) == {ids[25, 25]}
    assert set(np.unique(ids[:, 43][mask[:, 43] > 0])) == {ids[25, 60]}


def test_a_border_one_pixel_wide_parts_askew():
    mask = np.ones((12, 12), np.uint8)
    mask[np.arange(12), np.arange(12)] = 2
    assert len(split(mask, "border", border=2)[1]) == 2


@pytest.mark.parametrize("unit", [1.0, 0.01, 250.0])
def test_a_distance_of_the_network_is_flooded(unit):
    mask = np.ones((20, 60), np.uint8)
    x = np.arange(60)
    away = np.broadcast_to(unit * np.maximum(8 - abs(x - 15), np.maximum(8 - abs(x - 42), 0)), mask.shape)
    ids, found = split(mask, "watershed", (7, 13), distance=lambda start, stop: away[tuple(map(slice, start, stop))])
    check(ids, found, mask)
    assert len(found) == 2
    assert ids[10, 15] != ids[10, 42]
    assert len(split(mask, "watershed")[1]) == 1


def test_an_object_too_large_to_be_split_is_an_error():
    mask = np.ones((400, 500), np.uint8)
    for window in ((400, 500), (90, 90)):
        with pytest.raises(ImageError, match=r"covers 400x500 px takes about 20 MB.*5 MB are there; use more --memory"):
            split(mask, "watershed", window, room_bytes=5_000_000)
    mask[::40] = 0
    assert len(split(mask, "watershed", (90, 90), room_bytes=5_000_000)[1]) == 10


def test_a_border_needs_its_class():
    with pytest.raises(ContractError, match=r"class called border.*cell, gap.*--split watershed"):
        label_mask(np.ones((4, 4), np.uint8), split="border", class_names={1: "cell", 2: "gap"})
