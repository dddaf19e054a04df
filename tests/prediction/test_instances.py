"""Objects from images to files: split by what the network says, in blocks, stacks and maps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage import measure
from test_cases import engine as fake_engine
from test_cases import output

import unet_rt as urt
from unet_rt.contract.contract import Head
from unet_rt.drawing.microscopy import Scene, microscopy
from unet_rt.outputs.objects import find_objects, label_mask
from unet_rt.prediction import distance, instances, stage, staged

pytestmark = pytest.mark.onnxruntime
Array = np.ndarray[Any, np.dtype[Any]]
TILE = (192, 192)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two tiles, and windows of a few rows, so that small images have many."""
    monkeypatch.setattr("unet_rt.prediction.blocks.TILES", 2)

    def by_rows(read: Any, shape: Any, sought: Any, *, window: Any, **options: Any) -> Any:
        rows = 37 if window[1:] == shape[1:] else window[0]  # an OME-Zarr is written by chunks
        return find_objects(read, shape, sought, window=(rows, *window[1:]), **options)

    monkeypatch.setattr(instances, "find_objects", by_rows)


@pytest.fixture(scope="module")
def engine(exact_folder: Path):
    with urt.load(exact_folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def crowded() -> Array:
    return microscopy((430, 530), seed=71, scene=Scene(radius_px=9, cover=0.5)).image


@pytest.mark.parametrize("name", ["ids.tif", "ids.zarr", "ids.npy", None])
def test_blocks_do_not_decide_where_objects_part(engine, crowded, small_blocks, tmp_path, name):
    tables = urt.Tables(split="watershed", min_size=20)
    mask = urt.predict(engine, crowded, tile=TILE)
    expected, _ = label_mask(mask, split="watershed", min_size=20)
    assert expected.max() > label_mask(mask, min_size=20)[0].max() + 5
    reports = []
    out = None if name is None else tmp_path / name
    made = urt.predict(
        engine,
        crowded,
        out=out,
        output="instances",
        tile=TILE,
        tables=tables,
        memory_bytes=10**10,
        report=reports.append,
    )
    if name == "ids.zarr":
        import zarr

        made = zarr.open_group(out, mode="r")["0"][:]
    elif name is not None:
        made = (np.load if name == "ids.npy" else tifffile.imread)(out)
    assert made.dtype == (np.uint32 if name is None else np.uint16)
    np.testing.assert_array_equal(made, expected)
    found = reports[0].found
    areas = [region.area for region in measure.regionprops(expected)]
    assert (found.objects, found.median_px) == (len(areas), np.median(areas))
    assert found.share == pytest.approx(sum(areas) / mask.size)


def test_ids_fit_a_png(engine, crowded, tmp_path, monkeypatch):
    urt.predict(engine, crowded, out=tmp_path / "ids.png", output="instances", tile=TILE)
    ids = urt.predict(engine, crowded, output="instances", tile=TILE)
    with Image.open(tmp_path / "ids.png") as opened:
        np.testing.assert_array_equal(np.asarray(opened), ids)
    with pytest.raises(urt.OutputError, match=r"PNG holds one plane.*name it stack\.tif"):
        urt.predict(engine, np.stack([crowded] * 2), axes="ZYX", out=tmp_path / "stack.png", output="instances")


def test_many_objects_have_ids_of_32_bits(tmp_path):
    image = np.zeros((600, 600), np.float32)
    image[::2, ::2] = 1  # 90,000 specks
    with fake_engine(
        lambda x: x, tile=(608, 608), outputs=[output(2, 1)], task="binary", output_is="probabilities"
    ) as many:
        urt.predict(many, image, out=tmp_path / "ids.tif", output="instances")
        with pytest.raises(urt.OutputError, match=r"up to 65,535, and there are 90,000; name it ids\.tif"):
            urt.predict(many, image, out=tmp_path / "ids.png", output="instances")
    ids = tifffile.imread(tmp_path / "ids.tif")
    assert (ids.dtype, ids.max()) == (np.uint32, 90_000)


def two_lobes(scale: float, *, head: str = "distance", **contract: Any) -> tuple[Any, Array]:
    """An engine with a mask and a distance, both of them the image's own channels; and such an image."""
    outputs = [output(2, 1), replace(output(2, 1), name=head)]
    network = fake_engine(
        lambda x: x[:, :1], lambda x: x[:, 1:] * np.float32(scale), tile=(32, 32), channels=2, outputs=outputs,
        task="binary", output_is="probabilities", heads=(Head(head, "regression", "values"),), **contract,
    )  # fmt: skip
    image = np.zeros((2, 70, 100), np.float32)
    image[0, 10:60, 10:90] = 1
    y, x = np.mgrid[:70, :100]
    for middle in (30, 70):
        image[1] = np.maximum(image[1], np.maximum(0, 20 - np.hypot(y - 35, x - middle)))
    return network, image


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_the_network_s_distance_decides(small_blocks, tmp_path, scale):
    network, image = two_lobes(scale)
    tables = urt.Tables(split="watershed")
    with network:
        whole = urt.predict(network, image, output="instances", tables=tables)
        urt.predict(network, image, out=tmp_path / "ids.zarr", output="instances", tables=tables)
        with pytest.raises(urt.ContractError, match="--tta averages one output"):
            urt.predict(network, image, output="instances", tables=tables, tta="flip")
    import zarr

    assert whole.max() == 2
    assert len(np.unique(whole[35, 11:49])) == 1
    assert whole[35, 30] != whole[35, 70]
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "ids.zarr", mode="r")["0"][:], whole)
    assert [path.name for path in tmp_path.iterdir()] == ["ids.zarr"]
    other, image = two_lobes(scale, head="depth")
    with other:
        assert urt.predict(other, image, output="instances", tables=tables).max() == 1


def test_a_distance_goes_on_where_it_was_cut_off(small_blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "uuid4", lambda: SimpleNamespace(hex="the same network"))
    network, image = two_lobes(1.0)
    out, tables, run, asked = tmp_path / "ids.zarr", urt.Tables(split="watershed"), distance.run_blocks, []

    def some(plan: Any, numbers: Any, put: Any) -> None:
        asked.append(len(numbers))
        run(plan, list(numbers)[:2], put)
        raise KeyboardInterrupt

    with network:
        with monkeypatch.context() as patched:
            patched.setattr(distance, "run_blocks", some)
            with pytest.raises(KeyboardInterrupt):
                urt.predict(network, image, out=out, output="instances", tables=tables)
        assert stage.stage_folder(out).exists()
        with monkeypatch.context() as patched:
            patched.setattr(distance, "run_blocks", lambda p, n, put: asked.append(len(n)) or run(p, n, put))
            urt.predict(network, image, out=out, output="instances", tables=tables)
    assert asked[1] == asked[0] - 2 > 0
    assert [path.name for path in tmp_path.iterdir()] == ["ids.zarr"]


def test_a_border_class_decides(tmp_path):
    drawn = np.zeros((3, 60, 90), np.float32)  # background, cell, border
    drawn[1, 10:50, 10:80] = 1
    drawn[1, :, 44:46], drawn[2, 10:50, 44:46] = 0, 1
    drawn[0] = 1 - drawn[1:].max(0)
    names = ("background", "cell", "border")
    tables = urt.Tables(split="border", objects=tmp_path / "cells.csv")
    fields = {"task": "multiclass", "output_is": "probabilities"}
    with fake_engine(
        lambda x: x, tile=(32, 32), channels=3, outputs=[output(2, 3)], classes=names, **fields
    ) as network:
        ids = urt.predict(network, drawn, axes="CYX", output="instances", tables=tables)
    assert [int(n) for n in np.bincount(ids.reshape(-1))[1:]] == [40 * 35, 40 * 35]
    assert (tmp_path / "cells.csv").read_text().count(",cell,") == 2
    with (
        fake_engine(lambda x: x, tile=(32, 32), channels=3, outputs=[output(2, 3)], **fields) as nameless,
        pytest.raises(urt.ContractError, match="needs a class called border"),
    ):
        urt.predict(nameless, drawn, axes="CYX", output="instances", tables=urt.Tables(split="border"))


def test_an_object_beyond_the_memory_is_an_error(monkeypatch):
    monkeypatch.setattr("unet_rt.outputs.split.SPLIT_BYTES", 10**9)
    with fake_engine(
        lambda x: x, tile=(64, 64), outputs=[output(2, 1)], task="binary", output_is="probabilities"
    ) as all_on:
        pixels = np.ones((400, 400), np.float32)
        with pytest.raises(urt.ImageError, match=r"covers 400x400 px takes about 160,000,000 MB.*; use more --memory"):
            urt.predict(all_on, pixels, output="instances", tables=urt.Tables(split="watershed"))
        assert urt.predict(all_on, pixels, output="instances").max() == 1


def test_a_map_has_outlines_in_its_system_and_square_metres(engine, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    from rasterio.features import rasterize
    from rasterio.transform import Affine

    transform = Affine(2.0, 0.0, 600_000.0, 0.0, -2.0, 5_200_000.0)
    image = microscopy((210, 180), seed=5).image
    form = {"driver": "GTiff", "width": 180, "height": 210, "count": 1, "dtype": "uint16"}
    for name, crs in (("utm.tif", "EPSG:32632"), ("degrees.tif", "EPSG:4326")):
        with rasterio.open(tmp_path / name, "w", crs=crs, transform=transform, **form) as opened:
            opened.write(image, 1)
    tables = urt.Tables(objects=tmp_path / "all.csv", geojson=tmp_path / "all.geojson")
    options = {"output": "instances", "tile": TILE, "overwrite": True, "tables": tables}
    urt.predict(engine, tmp_path / "utm.tif", out=tmp_path / "ids.tif", **options)
    with rasterio.open(tmp_path / "ids.tif") as opened:
        ids = opened.read(1)
        assert opened.crs.to_epsg() == 32632
    found = json.loads((tmp_path / "all.geojson").read_text())
    name = found["crs"]["properties"]["name"]
    assert name == "urn:ogc:def:crs:EPSG::32632"
    assert rasterio.crs.CRS.from_user_input(name).to_epsg() == 32632
    shapes = [(f["geometry"], f["properties"]["id"]) for f in found["features"]]
    np.testing.assert_array_equal(rasterize(shapes, ids.shape, transform=transform, dtype="uint32"), ids)
    for feature in found["features"]:
        sizes = feature["properties"]["measurements"]
        assert sizes["area m2"] == pytest.approx(4 * sizes["area px"])
    header = (tmp_path / "all.csv").read_text().splitlines()[0]
    assert "area_m2" in header
    assert "um2" not in header
    urt.predict(engine, tmp_path / "degrees.tif", out=tmp_path / "ids.tif", **options)
    found = json.loads((tmp_path / "all.geojson").read_text())
    assert found["crs"]["properties"]["name"] == "urn:ogc:def:crs:OGC:1.3:CRS84"
    assert "area_m2" not in (tmp_path / "all.csv").read_text()


def test_stacks_and_scanners(engine, crowded, tmp_path):
    stack = np.stack([crowded[:150, :160], crowded[150:300, :160], crowded[200:350, 160:320]])
    tables = urt.Tables(objects=tmp_path / "all.csv", geojson=tmp_path / "all.geojson")
    options = {"output": "instances", "tile": TILE, "tables": tables, "overwrite": True, "axes": "ZYX"}
    ids = urt.predict(engine, stack, pixel_size_um=(400.0,), **options)
    features = json.loads((tmp_path / "all.geojson").read_text())["features"]
    assert [f["geometry"]["plane"] for f in features] == [
        {"c": -1, "z": z, "t": 0} for z in range(3) for _ in range(int(ids[z].max()))
    ]
    areas = [f["properties"]["measurements"]["area mm2"] for f in features]
    sizes = [region.area for plane in ids for region in measure.regionprops(plane)]
    np.testing.assert_allclose(areas, np.multiply(sizes, 0.16))
    box = fake_engine(lambda x: x, tile=(8, 16, 16), outputs=[output(3, 1)], task="binary", output_is="probabilities")
    with box, pytest.raises(urt.ContractError, match="GeoJSON holds outlines of 2-D pictures"):
        urt.predict(box, np.ones((8, 20, 20), np.float32), output="instances", tables=tables, axes="ZYX")
