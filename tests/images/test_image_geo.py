"""GeoTIFF: windows, nodata and overviews as rasterio sees them, and outputs that lie where the image lies."""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from flat_image import open_image
from flat_output import open_output
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import unet_rt as urt
from unet_rt.contract.contract import Contract
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import ImageError
from unet_rt.outputs.shape import nodata_value

rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
from rasterio.control import GroundControlPoint
from rasterio.shutil import copy as copy_raster

# rasterio multiplies transforms in a way that the newest affine is about to deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")

ANY = Contract()
NORTH_UP = (0.5, 0.0, 500_000.0, 0.0, -0.5, 5_200_000.0)  # half a metre per pixel, UTM zone 32
TURNED = (0.4, 0.3, 500_000.0, 0.3, -0.4, 5_200_000.0)


@cache
def fields(bands: int = 1) -> np.ndarray:
    """Pixels from 1 to 255, with a corner and a hole of zeros: what was not photographed."""
    picture = np.maximum(microscopy((330, 470), seed=1, dtype=np.uint8).image, 1)
    pixels = np.stack([np.roll(picture, 17 * band, 1) for band in range(bands)])
    pixels[:, :90, :120] = 0
    pixels[:, 200:210, 300:330] = 0
    pixels.flags.writeable = False
    return pixels


def write(path: Path, pixels: np.ndarray, transform: tuple[float, ...] = NORTH_UP, **options: Any) -> Path:
    profile = {"crs": "EPSG:32632", "tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate"}
    profile |= {"count": len(pixels), "dtype": pixels.dtype, "transform": rasterio.Affine(*transform)}
    with rasterio.open(path, "w", driver="GTiff", height=330, width=470, **(profile | options)) as dataset:
        dataset.write(pixels)
    return path


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_windows_and_their_valid_pixels_are_slices(data: st.DataObject, tmp_path_factory: Any) -> None:
    bands = data.draw(st.sampled_from([1, 3, 5]))
    path = tmp_path_factory.getbasetemp() / f"bands{bands}.tif"
    pixels = fields(bands)
    if not path.exists():
        write(path, pixels, nodata=0)
    rows, columns = (sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in (330, 470))
    start, stop = (rows[0], columns[0]), (rows[1], columns[1])
    with open_image(path, ANY) as source:
        assert (source.channels, source.shape, source.nodata) == (bands, (330, 470), 0.0)
        expected = pixels[:, slice(*rows), slice(*columns)]
        np.testing.assert_array_equal(source.read(0, start, stop), expected)
        valid, holds = source.valid(0, start, stop), (expected != 0).any(0)
        assert (valid is None) == holds.all()
        if valid is not None:
            np.testing.assert_array_equal(valid, holds)


def test_what_the_tags_say_is_read(tmp_path: Path) -> None:
    with open_image(write(tmp_path / "a.tif", fields(3), nodata=0), ANY) as source:
        assert source.reading == "a.tif SYX 3x330x470 uint8: 3 channels, 2-D network over 1 plane (nodata 0)"
        assert source.pixel_size_um == (500_000.0, 500_000.0)
        assert source.metadata.tags["transform"] == NORTH_UP
        assert rasterio.CRS.from_wkt(source.metadata.tags["crs"]).to_epsg() == 32632
    with open_image(write(tmp_path / "b.tif", fields(1), TURNED), ANY) as source:
        assert source.pixel_size_um == pytest.approx((500_000.0, 500_000.0))
        assert source.nodata is None
        assert source.valid(0, (0, 0), source.shape) is None
    degrees = write(tmp_path / "c.tif", fields(1), (1e-5, 0.0, 11.0, 0.0, -1e-5, 47.0), crs="EPSG:4326")
    with open_image(degrees, ANY) as source:
        assert source.pixel_size_um is None  # degrees are no lengths


def test_a_pixel_is_invalid_where_all_bands_are(tmp_path: Path) -> None:
    """Zero in one band of three is a colour; in a float image, NaN may be what marks a pixel."""
    pixels = fields(3).copy()
    pixels[1, 250, 250] = 0
    with open_image(write(tmp_path / "a.tif", pixels, nodata=0), ANY) as source:
        assert source.valid(0, (249, 249), (252, 252)) is None
    real = fields(1).astype(np.float32)
    real[real == 0] = np.nan
    with open_image(write(tmp_path / "b.tif", real, nodata=math.nan), ANY) as source:
        assert math.isnan(source.nodata)
        valid = source.valid(0, (0, 0), source.shape)
        np.testing.assert_array_equal(valid, fields(1)[0] != 0)


def test_a_mask_in_the_file_is_respected(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", fields(3))
    inside = fields(1)[0] != 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(inside)
    with open_image(path, ANY) as source:
        assert "nodata by the mask in the file" in source.reading
        np.testing.assert_array_equal(source.valid(0, (50, 60), (220, 320)), inside[50:220, 60:320])


def test_an_alpha_channel_says_what_was_photographed(tmp_path: Path) -> None:
    pixels = fields(4).copy()
    pixels[3] = (fields(1)[0] != 0) * 255
    with open_image(
        write(tmp_path / "a.tif", pixels, photometric="rgb", alpha="yes"), ANY, channels=(0, 1, 2)
    ) as source:
        assert "nodata by the alpha channel" in source.reading
        np.testing.assert_array_equal(source.read(0, (0, 0), source.shape), pixels[:3])
        np.testing.assert_array_equal(source.valid(0, (0, 0), source.shape), pixels[3] != 0)


@pytest.mark.parametrize("by_rasterio", [True, False])
def test_a_palette_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_rasterio: bool) -> None:
    colours = np.random.default_rng(3).integers(0, 256, (256, 3), np.uint8)
    indices = fields()
    path = write(tmp_path / "cover.tif", indices, nodata=0, photometric="palette")
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, {index: tuple(map(int, colour)) for index, colour in enumerate(colours)})
        dataset.build_overviews([2], rasterio.enums.Resampling.nearest)
    if not by_rasterio:
        monkeypatch.setattr("unet_rt.images.tiff.find_spec", lambda name: None)
    with open_image(path, ANY, network_channels=3) as source:
        assert "palette written out" in source.reading
        np.testing.assert_array_equal(source.read(0, (0, 0), source.shape), np.moveaxis(colours[indices[0]], -1, 0))
        np.testing.assert_array_equal(source.valid(0, (0, 0), source.shape), indices[0] != 0)
    with rasterio.open(path, overview_level=0) as dataset:
        coarse = dataset.read(1)
    with open_image(path, ANY, network_channels=3, level=1) as source:
        np.testing.assert_array_equal(source.read(0, (0, 0), source.shape), np.moveaxis(colours[coarse], -1, 0))


def test_an_overview_is_a_level(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", fields(1), nodata=0)
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    with open_image(path, ANY, level=1) as source, rasterio.open(path, overview_level=0) as level:
        assert source.levels == ((330, 470), (165, 235), (83, 118))
        assert source.pixel_size_um == (1_000_000.0, 1_000_000.0)
        assert source.metadata.tags["transform"] == tuple(level.transform)[:6]
        np.testing.assert_array_equal(source.read(0, (3, 4), (90, 200))[0], level.read(1)[3:90, 4:200])
        np.testing.assert_array_equal(source.valid(0, (0, 0), source.shape), level.read_masks(1) > 0)
    with pytest.raises(ImageError, match="level 3 does not exist"):
        open_image(path, ANY, level=3)


@pytest.mark.parametrize("transform", [NORTH_UP, TURNED], ids=["north up", "turned"])
@pytest.mark.parametrize(("channels", "dtype", "scale"), [(0, "uint8", 1), (3, "uint8", 1), (2, "float32", 2)], ids=str)
def test_outputs_lie_where_the_image_lies(
    tmp_path: Path, transform: tuple[float, ...], channels: int, dtype: str, scale: int
) -> None:
    image, out = write(tmp_path / "a.tif", fields(1), transform, nodata=0), tmp_path / "out.tif"
    shape = (330 // scale, 470 // scale)
    pixels = np.random.default_rng(1).integers(0, 3, (max(1, channels), *shape)).astype(dtype)
    nodata = nodata_value(dtype, (0, 1, 2))
    pixels[:, :40, :60] = nodata
    with (
        open_image(image, ANY) as source,
        open_output(out, shape=shape, channels=channels, dtype=dtype, source=source, nodata=nodata) as sink,
    ):
        for row in range(0, shape[0], 70):
            sink.write(0, (row, 0), pixels[:, row : row + 70])
        sink.commit()
    with rasterio.open(image) as before, rasterio.open(out) as after:
        np.testing.assert_array_equal(after.read(), pixels)
        assert after.crs == before.crs
        assert after.bounds == pytest.approx(before.bounds)
        assert (after.nodata == nodata) or (math.isnan(after.nodata) and math.isnan(nodata))
        assert not after.dataset_mask()[:40, :60].any()
        # The middle of the picture is the same place.
        assert after.xy(shape[0] / 2 - 0.5, shape[1] / 2 - 0.5) == pytest.approx(before.xy(164.5, 234.5))
    with open_image(out, ANY, network_channels=max(1, channels)) as source:  # and what was written is read again
        np.testing.assert_array_equal(source.read(0, (0, 0), shape), pixels)


@pytest.mark.parametrize(
    ("file", "beside"), [("a.tif", "a.tfw"), ("a.png", "a.pgw"), ("a.jpg", "a.JGW"), ("a.bmp", "a.wld")]
)
@pytest.mark.parametrize("projection", [True, False])
def test_a_world_file_places_a_picture_and_its_output(tmp_path: Path, file: str, beside: str, projection: bool) -> None:
    pixels = fields()[0]
    Image.fromarray(pixels).save(tmp_path / file)
    (tmp_path / beside).write_text("0.5\n0\n0\n-0.5\n500000.25\n5199999.75\n")  # the centre of the first pixel
    if projection:
        (tmp_path / "a.prj").write_text(rasterio.crs.CRS.from_epsg(32632).to_wkt(version="WKT1_ESRI"))
    with open_image(tmp_path / file, ANY) as source:
        assert f"placed by {beside}" in source.reading
        assert ("no coordinate system" in source.reading) != projection
        assert source.pixel_size_um == ((5e5, 5e5) if projection else None)
        with open_output(tmp_path / "out.tif", (165, 235), dtype="uint8", source=source) as out:
            out.write(0, (0, 0), pixels[::2, ::2])
            out.commit()
    if file == "a.png":  # tags come first
        (tmp_path / "out.tfw").write_text("9\n0\n0\n-9\n0\n0\n")
        with open_image(tmp_path / "out.tif", ANY) as source:
            assert "placed by" not in source.reading
    with rasterio.open(tmp_path / "out.tif") as found:
        assert tuple(found.transform)[:6] == pytest.approx((1.0, 0.0, 500_000.0, 0.0, -1.0, 5_200_000.0))
        assert (found.crs is None) != projection
        assert found.crs is None or found.crs.to_dict()["zone"] == 32


def test_a_world_file_that_cannot_be_used_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = fields()[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.pgw").write_text("nothing")
    with pytest.raises(ImageError, match=r"a\.pgw: does not hold the six numbers"):
        open_image(tmp_path / "a.png", ANY)
    (tmp_path / "a.pgw").write_text("0.5\n0\n0\n-0.5\n500000.25\n5199999.75\n")
    (tmp_path / "a.prj").write_text("nothing")
    with pytest.raises(ImageError, match=r"a\.prj: no coordinate system can be read"):
        open_image(tmp_path / "a.png", ANY)
    tifffile.imwrite(tmp_path / "s.tif", np.stack([pixels, pixels]), metadata={"axes": "ZYX"})
    (tmp_path / "s.tfw").write_text("0.5\n0\n0\n-0.5\n500000.25\n5199999.75\n")
    with open_image(tmp_path / "s.tif", ANY) as source:
        assert "s.tfw is not read: it is no single picture's" in source.reading
    for module in ("geo", "places", "tiff"):
        monkeypatch.setattr(f"unet_rt.images.{module}.find_spec", lambda name: None, raising=False)
    tifffile.imwrite(tmp_path / "b.tif", pixels)
    (tmp_path / "b.tfw").write_text("0.5\n0\n0\n-0.5\n500000.25\n5199999.75\n")
    for file in ("a.png", "b.tif"):
        with open_image(tmp_path / file, ANY) as source:
            assert "is not carried over; pip install 'unet-rt[geo]'" in source.reading


def test_ground_control_points_go_on_to_the_output(tmp_path: Path) -> None:
    pixels = fields()[0]
    points = [GroundControlPoint(r, c, 5e5 + c / 2 + r / 10, 5.2e6 - r / 2) for r in (0, 100, 330) for c in (0, 470)]
    with rasterio.open(
        tmp_path / "a.tif",
        "w",
        driver="GTiff",
        height=330,
        width=470,
        count=1,
        dtype="uint8",
        gcps=points,
        crs="EPSG:32632",
    ) as dataset:
        dataset.write(pixels, 1)
    with open_image(tmp_path / "a.tif", ANY) as source:
        assert "placed by 6 ground control points" in source.reading
        assert source.pixel_size_um is None
        with open_output(tmp_path / "out.tif", (165, 235), dtype="uint8", source=source) as out:
            out.write(0, (0, 0), pixels[::2, ::2])
            out.commit()
    with rasterio.open(tmp_path / "out.tif") as found:
        gcps, crs = found.gcps
    assert crs.to_epsg() == 32632
    assert [(p.row, p.col, p.x, p.y) for p in gcps] == [(p.row / 2, p.col / 2, p.x, p.y) for p in points]


def test_nodata_values_are_no_labels() -> None:
    assert nodata_value("uint8", (0, 1)) == 255
    assert nodata_value("uint8", (0, 255)) == 254
    assert nodata_value("int32") == 2**31 - 1
    assert math.isnan(nodata_value("float32"))


def test_a_truncated_file_is_an_error_that_names_the_window(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(1, 255, (1, 330, 470), np.uint8)
    path = write(tmp_path / "a.tif", noise, nodata=0)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with open_image(path, ANY) as source:
        with pytest.raises(ImageError, match=r"a\.tif: cannot be read .*\(window \(200, 0\) to \(330, 470\)\)"):
            source.read(0, (200, 0), (330, 470))
        np.testing.assert_array_equal(source.read(0, (0, 0), (100, 470)), noise[:, :100])


def test_without_rasterio_pixels_and_nodata_are_read_and_the_loss_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = fields(1)
    path = write(tmp_path / "a.tif", pixels, nodata=0)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.setattr("unet_rt.images.tiff.find_spec", lambda name: None)
    with open_image(path, ANY) as source:
        assert "its georeference is not carried over; pip install 'unet-rt[geo]'" in source.reading
        np.testing.assert_array_equal(source.read(0, (80, 100), (220, 340)), pixels[:, 80:220, 100:340])
        np.testing.assert_array_equal(source.valid(0, (80, 100), (220, 340)), pixels[0, 80:220, 100:340] != 0)


@pytest.mark.parametrize("kind", ["jp2", "vrt"])
def test_jpeg_2000_and_vrt_are_read_by_windows(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", fields(3))
    target = tmp_path / f"b.{kind}"
    options = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"} if kind == "jp2" else {"driver": "VRT"}
    copy_raster(path, target, **options)
    with open_image(target, ANY) as source:
        assert source.metadata.tags["transform"] == NORTH_UP
        np.testing.assert_array_equal(source.read(0, (100, 7), (333 - 33, 300)), fields(3)[:, 100:300, 7:300])
    target.write_bytes(target.read_bytes()[:40])
    with pytest.raises(ImageError, match=f"not a readable {'JPEG 2000' if kind == 'jp2' else 'VRT'}"):
        open_image(target, ANY)


@pytest.mark.parametrize("declared", [None, -9999.0])
def test_nan_is_no_data_in_floats_of_maps(declared: float | None, tmp_path: Path) -> None:
    pixels = fields(2).astype(np.float32)
    pixels[:, :90, :120] = np.nan if declared is None else declared
    pixels[0, 200:210, 300:330] = np.nan  # in one band: no network takes it
    with open_image(write(tmp_path / "a.tif", pixels, nodata=declared), ANY) as source:
        assert ("NaN is nodata" in source.reading) == (declared is None)
        valid = source.valid(0, (0, 0), source.shape)
        expected = np.ones((330, 470), bool)
        expected[:90, :120] = expected[200:210, 300:330] = False
        np.testing.assert_array_equal(valid, expected)
    with open_image(tmp_path / "a.tif", ANY, network_channels=1, channels=(1,)) as source:
        assert source.valid(0, (200, 300), (210, 330)) is None


@pytest.mark.onnxruntime
def test_what_holds_no_data_gets_no_label(engine_folder: Path, tmp_path: Path) -> None:
    picture = microscopy((300, 260), seed=1).image.astype(np.float32)
    expected_gap = np.zeros(picture.shape, bool)
    expected_gap[:80, :100] = True
    holed = np.where(expected_gap, np.nan, picture)
    path = tmp_path / "a.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=300, width=260, count=1, dtype="float32", crs="EPSG:32632",
        transform=rasterio.Affine(*NORTH_UP),
    ) as dataset:  # fmt: skip
        dataset.write(holed.astype(np.float32), 1)
    with urt.load(engine_folder) as engine:
        urt.predict(engine, path, out=tmp_path / "mask.tif")
        with rasterio.open(tmp_path / "mask.tif") as mask:
            found = mask.read(1)
            assert mask.nodata == 255
        np.testing.assert_array_equal(found == 255, expected_gap)
        with pytest.raises(ImageError, match=r"NaN or infinite pixels.*--nodata nan"):
            urt.predict(engine, holed)
        np.testing.assert_array_equal(urt.predict(engine, holed, nodata=math.nan), found)
        filled = np.where(expected_gap, -1, picture)
        np.testing.assert_array_equal(urt.predict(engine, filled, nodata=-1), found)
