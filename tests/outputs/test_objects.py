"""Objects of a mask: the same as scikit-image's on the whole mask, whatever the windows."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import measure

from unet_rt import ContractError, ImageError, OutputError
from unet_rt.drawing.microscopy import microscopy
from unet_rt.outputs import windows
from unet_rt.outputs.objects import Objects, Sought, find_objects, label_mask
from unet_rt.outputs.split import Split
from unet_rt.outputs.tables import PlaneObjects, Summary, unite_tables, write_class_areas, write_summary, write_table

EPS = np.finfo(np.float64).eps


def windowed(mask: np.ndarray, window: Sequence[int], **options: Any) -> tuple[np.ndarray, Objects]:
    """(ids, objects) of a mask read and written by windows of one size, in raster order, without gaps."""
    ids = np.full(mask.shape, 2**32 - 1, np.uint32)
    starts = []

    def read(start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        return mask[tuple(map(slice, start, stop))]

    with tempfile.SpooledTemporaryFile(100) as spool:  # what is kept of parts goes to the disk at once
        how = options.pop("split", None)
        split = None if how is None else Split(how, spool, **options.pop("by", {}))
        found = find_objects(read, mask.shape, Sought(split=split, **options), window=window)
        for start, block in found.windows():
            starts.append(tuple(start))
            ids[tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block
    assert starts == sorted(set(starts))
    return ids, found.objects


def in_raster_order(ids: np.ndarray) -> np.ndarray:
    """The same objects, numbered by their first pixels (scikit-image does so but for axes of one pixel)."""
    values, first = np.unique(ids, return_index=True)
    first, values = first[values > 0], values[values > 0]
    table = np.zeros(ids.max() + 1, np.uint32)
    table[values[np.argsort(first)]] = np.arange(1, len(values) + 1)
    return table[ids]


def reference(mask: np.ndarray, connectivity: str = "full") -> np.ndarray:
    return in_raster_order(measure.label(mask, connectivity=mask.ndim if connectivity == "full" else 1))


def check_measures(found: Objects, ids: np.ndarray, mask: np.ndarray) -> None:
    """Areas, boxes and edges exactly as scikit-image's; centroids but for the rounding of its mean of positions."""
    regions = measure.regionprops(ids)
    assert len(found) == len(regions)
    for k, region in enumerate(regions):
        assert found.area_px[k] == region.area
        assert (*found.start[k], *found.stop[k]) == region.bbox
        bound = EPS * max(mask.shape) * (1 + np.log2(region.area))  # of a pairwise sum of positions, divided once
        assert np.abs(found.centroid[k] - region.centroid).max() <= bound
        assert (mask[ids == region.label] == found.label[k]).all()
        edge = any(0 in (a, b - n) for a, b, n in zip(found.start[k], found.stop[k], mask.shape, strict=True))
        assert found.touches_edge[k] == edge


@st.composite
def masks(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    axes = draw(st.integers(2, 3))
    longest = 30 if axes == 2 else 10
    shape = tuple(draw(st.integers(1, longest)) for _ in range(axes))
    window = tuple(draw(st.integers(1, longest // 2)) for _ in range(axes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    classes = draw(st.integers(1, 3))
    on = rng.random(shape) < draw(st.floats(0, 1))
    return (on * rng.integers(1, classes + 1, shape)).astype(np.uint8), window


@settings(max_examples=70, deadline=None)
@given(masks(), st.sampled_from(["full", "face"]), st.integers(1, 4))
@example((np.ones((1, 1), np.uint8), (1, 1)), "full", 2)
def test_any_windows_give_the_objects_of_the_whole_mask(case, connectivity, min_size):
    mask, window = case
    expected = reference(mask, connectivity)
    ids, found = windowed(mask, window, connectivity=connectivity)
    np.testing.assert_array_equal(ids, expected)
    check_measures(found, expected, mask)

    large = np.bincount(expected.ravel()) >= min_size
    large[0] = False
    ids, found = windowed(mask, window, connectivity=connectivity, min_size=min_size)
    np.testing.assert_array_equal(ids, in_raster_order(np.where(large[expected], expected, 0)))
    assert (found.area_px >= min_size).all()


def spiral(side: int) -> np.ndarray:
    """One line, one pixel wide, that winds inwards with one pixel between its turns."""
    mask = np.zeros((side, side), np.uint8)
    y, x, dy, dx = 0, 0, 0, 1
    for length in [side - 1, *np.repeat(np.arange(side - 1, 1, -2), 2)]:
        for _ in range(length):
            mask[y, x] = 1
            y, x = y + dy, x + dx
        dy, dx = dx, -dy
    mask[y, x] = 1
    return mask


def comb(side: int) -> np.ndarray:
    """Teeth that are joined at the bottom alone: the last row makes one object of all that was found above."""
    mask = np.zeros((side, side), np.uint8)
    mask[:, ::2] = 1
    mask[-1] = 1
    return mask


@pytest.mark.parametrize("draw", [spiral, comb, lambda side: comb(side).T[::-1], lambda side: np.eye(side, dtype=bool)])
@pytest.mark.parametrize("window", [(2, 3), (64, 2), (2, 64)])
def test_objects_that_cross_many_windows_are_one(draw, window):
    mask = np.ascontiguousarray(draw(25))
    ids, found = windowed(mask, window)
    np.testing.assert_array_equal(ids, mask.astype(np.uint32))
    assert found.area_px.tolist() == [np.count_nonzero(mask)]


def test_classes_that_touch_stay_apart_and_can_be_chosen():
    mask = np.array([[1, 1, 2, 2], [0, 7, 2, 1]], np.uint8)
    ids, found = label_mask(mask)
    np.testing.assert_array_equal(ids, [[1, 1, 2, 2], [0, 3, 2, 4]])
    assert found.label.tolist() == [1, 2, 7, 1]
    ids, found = label_mask(mask, classes=[2])
    np.testing.assert_array_equal(ids, [[0, 0, 1, 1], [0, 0, 1, 0]])
    assert found.label.tolist() == [2]


def test_volumes_touch_through_corners_of_windows():
    mask = np.zeros((4, 4, 4), np.uint8)
    mask[1, 1, 2] = mask[2, 2, 1] = 1  # neighbours across a corner, against the order of windows
    assert len(windowed(mask, (2, 2, 2))[1]) == 1
    assert len(windowed(mask, (2, 2, 2), connectivity="face")[1]) == 2


def test_real_nuclei(shared: Path):
    path = sorted((shared / "data" / "dsb2018" / "label").glob("*.png"))
    for file in path[::8]:
        mask = (np.asarray(Image.open(file)) > 0).astype(np.uint8)
        ids, found = windowed(mask, (100, 77))
        np.testing.assert_array_equal(ids, reference(mask))
        check_measures(found, ids, mask)


def test_a_real_stack_of_membranes(shared: Path):
    files = sorted((shared / "data" / "isbi2012" / "label").glob("*.png"))[:3]
    labels = np.stack([np.asarray(Image.open(file)) for file in files])
    mask = np.where(labels > 0, 1, 2).astype(np.uint8)  # cells and membranes, both as classes
    ids, found = windowed(mask, (2, 200, 130))
    np.testing.assert_array_equal(ids, reference(mask))
    check_measures(found, ids, mask)


# Files --------------------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_table_is_read_back_as_it_was_measured(tmp_path: Path):
    mask = (microscopy((300, 400), seed=11).truth > 0).astype(np.uint8)
    _, found = label_mask(mask, min_size=30, pixel_size_um=(0.5, 0.25), class_names={1: "nucleus, stained"})
    write_table(tmp_path / "objects.csv", "a.tif", [PlaneObjects(found)])
    table = rows(tmp_path / "objects.csv")
    assert [int(row["id"]) for row in table] == found.ids.tolist()
    assert len(table) > 5
    for k, row in enumerate(table):
        assert row["class"] == "nucleus, stained"
        assert int(row["area_px"]) == found.area_px[k]
        assert float(row["area_um2"]) == found.area_px[k] * 0.125
        assert (float(row["centroid_y"]), float(row["centroid_x"])) == tuple(found.centroid[k])
        assert [int(row[f"{w}_{a}"]) for w in ("start", "stop") for a in "yx"] == [*found.start[k], *found.stop[k]]
        assert bool(int(row["touches_edge"])) == found.touches_edge[k]
    assert 0 < sum(int(row["touches_edge"]) for row in table) < len(table)


def test_planes_and_classes_are_summed_up(tmp_path: Path):
    first, second = np.array([[1, 0, 2], [1, 0, 2]], np.uint8), np.array([[0, 0, 1]], np.uint8)
    found = [label_mask(plane, class_names={1: "cell", 2: "vessel"})[1] for plane in (first, second)]
    planes = [PlaneObjects(one, plane=k, t=3 + k) for k, one in enumerate(found)]
    write_table(tmp_path / "objects.csv", "a.tif", planes)
    places = [tuple(row[name] for name in ("image", "t", "z", "plane", "id")) for row in rows(tmp_path / "objects.csv")]
    assert places == [("a.tif", "3", "", "0", "1"), ("a.tif", "3", "", "0", "2"), ("a.tif", "4", "", "1", "1")]
    write_class_areas(tmp_path / "classes.csv", "a.tif", planes)
    found = [tuple(row.values())[3:] for row in rows(tmp_path / "classes.csv")]
    third = str(1 / 3)
    assert found == [
        ("0", "1", "cell", "1", "2", third),
        ("0", "2", "vessel", "1", "2", third),
        ("1", "1", "cell", "1", "1", third),
        ("1", "2", "vessel", "0", "0", "0.0"),
    ]


def test_a_volume_has_volumes(tmp_path: Path):
    found = label_mask(np.ones((2, 3, 4), bool), pixel_size_um=(2, 1, 1))[1]
    write_table(tmp_path / "objects.csv", "a.tif", [PlaneObjects(found)])
    (row,) = rows(tmp_path / "objects.csv")
    assert (row["volume_px"], row["volume_um3"], row["centroid_z"], row["stop_x"]) == ("24", "48.0", "0.5", "4")


def test_areas_have_the_unit_of_their_kind(tmp_path: Path):
    field = np.zeros((4, 5), np.uint8)
    field[1:3, 1:4] = 1
    for unit, size, area in (("um", 0.5, 1.5), ("m", 2e6, 24.0), ("mm", 500.0, 1.5)):
        found = replace(label_mask(field, pixel_size_um=(size, size))[1], unit=unit)
        planes = [PlaneObjects(found)]
        write_table(tmp_path / "objects.csv", "a.tif", planes, overwrite=True)
        (row,) = rows(tmp_path / "objects.csv")
        assert float(row[f"area_{unit}2"]) == pytest.approx(area, rel=1e-12)
        assert Summary.of(planes).median_area == pytest.approx(area, rel=1e-12)
        assert Summary.of(planes).unit == f"{unit}2"


def test_images_of_a_folder_have_one_table(tmp_path: Path):
    field = np.zeros((5, 6), np.uint8)
    field[1:3, 1:4] = field[4, 5] = 1
    _, plain = label_mask(field)
    _, sized = label_mask(field, pixel_size_um=(1, 1), min_size=2)
    measured = replace(sized, channels=("DAPI",), means=np.array([[2.5]]))
    none = PlaneObjects(label_mask(field * 0)[1])
    images = {"a.tif": [PlaneObjects(plain)], "b.tif": [PlaneObjects(measured, z=2)], "c.tif": [none]}
    for name, planes in images.items():
        write_table(tmp_path / name, name, planes)
    unite_tables(tmp_path / "all.csv", [tmp_path / name for name in images])
    table = rows(tmp_path / "all.csv")
    found = [(row["image"], row["id"], row["z"], row["area_px"], row["area_um2"], row["mean_DAPI"]) for row in table]
    one, two, three = (
        ("a.tif", "1", "", "6", "", ""),
        ("a.tif", "2", "", "1", "", ""),
        ("b.tif", "1", "2", "6", "6.0", "2.5"),
    )
    assert found == [one, two, three]
    unite_tables(tmp_path / "all.csv", [tmp_path / "b.tif"], kept=["a.tif"], overwrite=True)
    assert rows(tmp_path / "all.csv") == table
    write_summary(tmp_path / "summary.csv", {name: Summary.of(planes) for name, planes in images.items()})
    assert [tuple(row.values()) for row in rows(tmp_path / "summary.csv")] == [
        ("a.tif", "2", str(7 / 30), "3.5", ""),
        ("b.tif", "1", str(6 / 30), "6.0", "6.0"),
        ("c.tif", "0", "0.0", "", ""),
    ]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    _, found = label_mask(np.eye(3, dtype=np.uint8))
    path = tmp_path / "objects.csv"
    write_table(path, "a.tif", [PlaneObjects(found)])
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        write_table(path, "a.tif", [PlaneObjects(found)])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_table(path, "a.tif", [PlaneObjects(found)], overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="missing"):
        write_table(tmp_path / "missing" / "objects.csv", "a.tif", [PlaneObjects(found)])


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "options", "error", "text"),
    [
        (np.zeros((4, 4), np.float32), {}, ImageError, "float32.*threshold it first"),
        (np.full((4, 4), -1, np.int16), {}, ImageError, "holds -1.*0 or more"),
        (np.zeros(4, np.uint8), {}, ImageError, "shape 4"),
        (np.zeros((0, 4), np.uint8), {}, ImageError, "shape 0x4"),
        (np.zeros((4, 4), np.uint8), {"min_size": 0}, ContractError, "min_size 0"),
        (np.zeros((4, 4), np.uint8), {"classes": [0, 1]}, ContractError, "background"),
        (np.zeros((4, 4), np.uint8), {"connectivity": "8"}, ContractError, "use full"),
        (np.zeros((4, 4), np.uint8), {"pixel_size_um": (0.5,)}, ContractError, "2 numbers"),
    ],
)
def test_what_makes_no_sense_is_refused(mask, options, error, text):
    with pytest.raises(error, match=text):
        label_mask(mask, **options)


def test_a_mask_that_changes_while_it_is_read_is_refused():
    mask = np.eye(8, dtype=np.uint8)

    found = find_objects(lambda start, stop: mask[tuple(map(slice, start, stop))], mask.shape, window=(4, 4))
    left = found.windows()
    next(left)
    mask[:] = 0
    with pytest.raises(ImageError, match=r"changed while it was read.*\[0:4, 4:8\]|\[4:8, 4:8\]"):
        list(left)


def test_a_reader_that_gives_other_pixels_than_asked_for_is_refused():
    with pytest.raises(ImageError, match=r"window \[0:2, 0:2\] gave \(3, 3\)"):
        find_objects(lambda start, stop: np.zeros((3, 3), np.uint8), (4, 4), window=(2, 2))


@pytest.mark.parametrize("shape", [(100_000, 100_000), (40, 3_000_000), (1000, 2000, 3000), (5, 5)])
def test_default_windows_are_bounded(shape):
    window = windows.window_for(shape)
    assert np.prod(window) <= windows.WINDOW_PX
    assert np.prod(window) >= min(np.prod(shape), windows.WINDOW_PX // 2)
