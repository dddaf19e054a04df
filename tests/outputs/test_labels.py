"""Labels inside the OME-Zarr of their image, read back by other libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from ome_zarr_models import open_ome_zarr
from skimage import measure

import unet_rt as urt
from unet_rt.drawing.microscopy import microscopy

pytestmark = [
    pytest.mark.onnxruntime,
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning"),
]
Array = np.ndarray[Any, np.dtype[Any]]
SIZES = ((330, 290), (165, 145), (82, 72))  # the last one rounded down, as some writers do


@pytest.fixture(scope="module")
def engine(exact_folder: Path):
    with urt.load(exact_folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pixels() -> Array:
    """(T, C, Y, X) of two moments and two channels."""
    drawn = [microscopy(SIZES[0], seed=k).image for k in range(4)]
    return np.stack(drawn).reshape(2, 2, *SIZES[0])


def write_image(path: Path, pixels: Array, zarr_format: int, *, consolidated: bool = False) -> Path:
    """An OME-Zarr of three levels, in which the levels after the first lie half a pixel off."""
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": a, "type": "space", "unit": "micrometer"} for a in "yx"]
    datasets = []
    for level in range(3):
        shift = [0.0, 0.0, *([0.25 * (2**level - 1)] * 2)]
        moved = [{"type": "translation", "translation": shift}] if level else []
        scale = [1.0, 1.0, 0.5 * 2**level, 0.5 * 2**level]
        datasets.append({"path": f"s{level}", "coordinateTransformations": [{"type": "scale", "scale": scale}, *moved]})
    multiscale = {"axes": axes, "datasets": datasets}
    ome = {"version": "0.5", "multiscales": [multiscale]}
    old = {"multiscales": [{"version": "0.4", **multiscale}]}
    group = zarr.create_group(path, zarr_format=zarr_format, attributes=old if zarr_format == 2 else {"ome": ome})
    for level, (height, width) in enumerate(SIZES):
        step = 2**level
        form = {} if zarr_format == 2 else {"dimension_names": list("tcyx")}
        if zarr_format == 2:
            form = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
        data = pixels[..., ::step, ::step][..., :height, :width]
        group.create_array(f"s{level}", data=np.ascontiguousarray(data), chunks=(1, 1, 128, 128), **form)
    if consolidated:
        zarr.consolidate_metadata(str(path))
    return path


@pytest.mark.parametrize(("zarr_format", "consolidated"), [(2, True), (3, True), (3, False)])
def test_labels_are_those_of_their_image(engine, pixels, tmp_path, zarr_format: int, consolidated: bool):
    image = write_image(tmp_path / "image.zarr", pixels, zarr_format, consolidated=consolidated)
    mask = urt.predict(engine, image, channels=(1,))
    before = {path: path.read_bytes() for path in image.glob("s*/**/*") if path.is_file()}
    out = image / "labels" / "nuclei"
    assert urt.predict(engine, image, channels=(1,), out=out) == out
    tables = urt.Tables(split="watershed", objects=tmp_path / "all.csv")
    urt.predict(engine, image, channels=(1,), out=image / "labels" / "cells", output="instances", tables=tables)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.csv", "image.zarr"]
    assert {path: path.read_bytes() for path in image.glob("s*/**/*") if path.is_file()} == before

    group = zarr.open_group(image, mode="r")
    assert (group.metadata.consolidated_metadata is not None) == consolidated
    assert sorted(group["labels"].group_keys()) == ["cells", "nuclei"]
    np.testing.assert_array_equal(group["labels/nuclei/0"][:], mask)
    ids = group["labels/cells/0"][:]
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids > 0, mask > 0)
    assert [group[f"labels/cells/{k}"].shape for k in range(3)] == [(2, *size) for size in SIZES]
    np.testing.assert_array_equal(group["labels/cells/2"][:], ids[:, ::4, ::4][:, : SIZES[2][0], : SIZES[2][1]])

    version = {2: "0.4", 3: "0.5"}[zarr_format]
    labels = open_ome_zarr(zarr.open_group(image / "labels", mode="r", use_consolidated=False))
    assert (type(labels).__name__, labels.ome_zarr_version) == ("Labels", version)
    for name in ("nuclei", "cells"):
        found = open_ome_zarr(zarr.open_group(image / "labels" / name, mode="r", use_consolidated=False))
        assert (type(found).__name__, found.ome_zarr_version) == ("ImageLabel", version)
        attributes = dict(group[f"labels/{name}"].attrs)
        ome = attributes if zarr_format == 2 else attributes["ome"]
        assert ome["image-label"]["source"] == {"image": "../../"}
        placed = ome["multiscales"][0]["datasets"]
        own = dict(group.attrs) if zarr_format == 2 else group.attrs["ome"]
        for level, of_image in zip(placed, own["multiscales"][0]["datasets"], strict=True):
            for one, other in zip(
                level["coordinateTransformations"], of_image["coordinateTransformations"], strict=True
            ):
                (kind,) = set(one) - {"type"}
                assert one[kind] == [n for a, n in zip("tcyx", other[kind], strict=True) if a != "c"]
    with pytest.raises(urt.OutputError, match="exists already"):
        urt.predict(engine, image, channels=(1,), out=out)
    urt.predict(engine, image, channels=(0,), out=out, overwrite=True)
    listed = json.loads((image / "labels" / (".zattrs" if zarr_format == 2 else "zarr.json")).read_text())
    listed = listed if zarr_format == 2 else listed["attributes"]["ome"]
    assert listed["labels"] == ["nuclei", "cells"]


def test_outlines_of_a_coarser_level_are_in_pixels_of_the_finest(engine, pixels, tmp_path):
    image = write_image(tmp_path / "image.zarr", pixels[:1], 3)
    tables = urt.Tables(geojson=tmp_path / "coarse.geojson")
    ids = urt.predict(engine, image, channels=(1,), level=1, output="instances", tables=tables)
    assert ids.shape == (1, *SIZES[1])
    features = json.loads((tmp_path / "coarse.geojson").read_text())["features"]
    assert len(features) == ids.max()
    for feature, region in zip(features, measure.regionprops(ids[0]), strict=True):
        parts = feature["geometry"]["coordinates"]
        parts = [parts] if feature["geometry"]["type"] == "Polygon" else parts
        corners = np.concatenate([part[0] for part in parts])
        box = [*corners.min(axis=0)[::-1], *corners.max(axis=0)[::-1]]
        assert box == [2 * n for n in region.bbox]


def test_what_would_lie_inside_a_zarr_is_refused(engine, pixels, tmp_path):
    image = write_image(tmp_path / "image.zarr", pixels[:1], 3)
    before = sorted(tmp_path.rglob("*"))
    tables = urt.Tables(objects=image / "all.csv")
    for options, text in (
        ({"out": image / "mask.tif"}, r"inside the Zarr .*image\.zarr.*--out .*image\.zarr/labels/mask"),
        ({"out": image / "s0" / "mask.zarr"}, "inside the Zarr"),
        ({"out": tmp_path / "mask.tif", "overlay": image / "x.png"}, "inside the Zarr"),
        ({"out": tmp_path / "ids.tif", "output": "instances", "tables": tables}, "inside the Zarr"),
        ({"out": image / "labels" / "p", "output": "probability"}, "--output mask or instances"),
        ({"out": image / "labels" / "n", "level": 1}, "leave --level away"),
    ):
        with pytest.raises(urt.OutputError, match=text):
            urt.predict(engine, image, channels=(1,), **options)
    with pytest.raises(urt.OutputError, match=r"its image has .*330x290 px, and the labels .*100x120"):
        urt.predict(engine, pixels[0, 0, :100, :120], out=image / "labels" / "n")
    assert [path for path in sorted(tmp_path.rglob("*")) if ".stage" not in str(path)] == before
