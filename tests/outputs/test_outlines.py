"""Outlines of objects: polygons that cover exactly the pixels of their objects, whatever the windows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import measure

from unet_rt import ContractError, ImageError, OutputError
from unet_rt.drawing.microscopy import microscopy
from unet_rt.outputs.objects import Objects, label_mask
from unet_rt.outputs.outlines import Outlined, outlines, write_geojson


def reader(ids: np.ndarray) -> Any:
    return lambda start, stop: ids[tuple(map(slice, start, stop))]


def covered(polygons: Sequence[Sequence[Sequence[Sequence[int]]]], shape: tuple[int, int]) -> np.ndarray:
    """How many times rings of (y, x) corners wind around every pixel: 1 inside of polygons, 0 elsewhere."""
    turns = np.zeros((shape[0], shape[1] + 1), int)
    for ring in (ring for rings in polygons for ring in rings):
        for (y, x), (v, u) in zip(ring, [*ring[1:], ring[0]], strict=True):
            assert (y == v) != (x == u), "corners are joined along rows and columns"
            turns[min(y, v) : max(y, v), x] += np.sign(y - v) if x == u else 0
    return turns.cumsum(axis=1)[:, :-1]


def area(ring: Sequence[Sequence[float]]) -> float:
    """Signed area of (x, y) corners: positive where x turns towards y."""
    x, y = np.array(ring).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y)) / 2


@st.composite
def labelled(draw: st.DrawFn) -> tuple[np.ndarray, Objects, tuple[int, int]]:
    shape = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    window = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = (rng.random(shape) < draw(st.floats(0, 1))).astype(np.uint8)
    connectivity = draw(st.sampled_from(["full", "face"]))
    return *label_mask(mask, connectivity=connectivity, min_size=draw(st.integers(1, 3))), window


@settings(max_examples=80, deadline=None)
@given(labelled())
def test_polygons_cover_their_objects_exactly(case):
    ids, found, window = case
    traced = dict(outlines(found, reader(ids), window=window))
    assert traced == dict(outlines(found, reader(ids)))
    assert sorted(traced) == found.ids.tolist()
    for number, polygons in traced.items():
        own = ids == number
        np.testing.assert_array_equal(covered(polygons, ids.shape), own)
        parts, count = measure.label(own, connectivity=1, return_num=True)
        assert len(polygons) == count
        for outer, *holes in polygons:
            for ring in (outer, *holes):
                assert len(set(ring)) == len(ring), "a ring touches itself"
            assert all(np.linalg.det([np.subtract(b, a), np.subtract(c, b)]) for a, b, c in corners(outer))
            covers = covered([[outer, *holes]], ids.shape) == 1
            assert len(np.unique(parts[covers])) == 1, "a polygon is one part of the object"
            assert (covered([[outer]], ids.shape) >= 0).all()
            assert all((covered([[hole]], ids.shape) <= 0).all() for hole in holes)


def corners(ring: list[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(ring, ring[1:] + ring[:1], ring[2:] + ring[:2], strict=True)) if len(ring) > 2 else []


@pytest.mark.parametrize("window", [(500, 500), (64, 37)])
def test_a_drawn_micrograph(tmp_path: Path, window: tuple[int, int]):
    truth = microscopy((333, 400), seed=21).truth
    ids, found = label_mask(
        (truth > 0).astype(np.uint8), min_size=20, pixel_size_um=(0.5, 0.5), class_names={1: "nucleus"}
    )
    path = tmp_path / "objects.geojson"
    write_geojson(path, [Outlined(found, reader(ids))], window=window)
    collection = json.loads(path.read_text(encoding="utf-8"))
    assert collection["type"] == "FeatureCollection"
    assert "crs" not in collection
    assert [f["properties"]["id"] for f in collection["features"]] == found.ids.tolist()
    for k, feature in enumerate(collection["features"]):
        properties, geometry = feature["properties"], feature["geometry"]
        polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
        assert all(ring[0] == ring[-1] for rings in polygons for ring in rings)
        assert sum(area(ring[:-1]) for rings in polygons for ring in rings) == found.area_px[k]
        assert all(area(rings[0][:-1]) > 0 for rings in polygons)
        assert properties["classification"]["name"] == "nucleus"
        assert properties["objectType"] == "detection"
        assert properties["measurements"]["area um2"] == found.area_px[k] / 4
        assert properties["touches_edge"] == found.touches_edge[k]


def test_the_file_does_not_depend_on_windows(tmp_path: Path, shared: Path):
    file = sorted((shared / "data" / "isbi2012" / "label").glob("*.png"))[0]
    mask = (np.asarray(Image.open(file)) == 0).astype(np.uint8)  # membranes: one net with hundreds of holes
    ids, found = label_mask(mask)
    for name, window in (("whole", None), ("cut", (100, 130))):
        write_geojson(tmp_path / name, [Outlined(found, reader(ids))], window=window)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()
    largest = int(np.argmax(found.area_px))
    geometry = json.loads((tmp_path / "cut").read_text())["features"][largest]["geometry"]
    polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    assert sum(len(rings) for rings in polygons) > 50
    rings = [[[(int(y), int(x)) for x, y in ring[:-1]] for ring in rings] for rings in polygons]
    np.testing.assert_array_equal(covered(rings, ids.shape), ids == largest + 1)


def test_maps_have_coordinates_of_their_own(tmp_path: Path):
    mask = np.ones((3, 4), np.uint8)
    mask[1, 1] = 0
    ids, found = label_mask(mask)
    north_up = (10.0, 0.0, 500_000.0, 0.0, -10.0, 4_000_000.0)
    write_geojson(
        tmp_path / "map", [Outlined(found, reader(ids))], transform=north_up, crs="urn:ogc:def:crs:EPSG::32633"
    )
    collection = json.loads((tmp_path / "map").read_text())
    assert collection["crs"] == {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
    outer, hole = collection["features"][0]["geometry"]["coordinates"]
    origin = np.array(north_up[2::3])
    assert (area(outer[:-1] - origin), area(hole[:-1] - origin)) == (1200.0, -100.0)
    assert sorted(map(tuple, hole[:-1])) == [
        (x, y) for x in (500_010.0, 500_020.0) for y in (3_999_980.0, 3_999_990.0)
    ]  # fmt: skip


def test_nothing_found_is_an_empty_collection(tmp_path: Path):
    ids, found = label_mask(np.zeros((5, 5), np.uint8))
    write_geojson(tmp_path / "none", [Outlined(found, reader(ids))])
    assert json.loads((tmp_path / "none").read_text()) == {"type": "FeatureCollection", "features": []}


def test_drafts_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are as large as the file, and the folder for temporary files may be small."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
    ids, found = label_mask(microscopy((64, 64), seed=2).truth > 0)
    write_geojson(tmp_path / "found.geojson", [Outlined(found, reader(ids))])
    assert [path.name for path in tmp_path.iterdir()] == ["found.geojson"]


def test_refusals(tmp_path: Path):
    ids, found = label_mask(np.eye(4, dtype=np.uint8), connectivity="face")
    path = tmp_path / "objects.geojson"
    with pytest.raises(ImageError, match=r"object 2.*another mask"):
        write_geojson(path, [Outlined(found, reader(np.where(ids == 2, 0, ids)))])
    with pytest.raises(ImageError, match=r"hold 9.*4 objects"):
        write_geojson(path, [Outlined(found, reader(ids + 5))])
    with pytest.raises(ContractError, match="maps the plane to a line"):
        write_geojson(path, [Outlined(found, reader(ids))], transform=(1, 0, 0, 2, 0, 0))
    with pytest.raises(ContractError, match="3 axes; use a table"):
        write_geojson(path, [Outlined(label_mask(np.ones((2, 2, 2), bool))[1], reader(ids))])
    assert not list(tmp_path.iterdir())
    write_geojson(path, [Outlined(found, reader(ids))])
    with pytest.raises(OutputError, match="exists already"):
        write_geojson(path, [Outlined(found, reader(ids))])
