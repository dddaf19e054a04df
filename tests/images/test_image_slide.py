"""Whole slides: levels as stored, pixel sizes as scanned."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from flat_image import open_image
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_rt.contract.contract import Contract
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import ImageError

pytest.importorskip("tiffslide", reason="needs tiffslide")

ANY = Contract()
HEIGHT, WIDTH = 1301, 1150  # no multiple of tiles or levels
FACTORS = (1, 4, 16)


@cache
def tissue() -> np.ndarray:
    drawn = microscopy((500, 600), seed=8, dtype=np.uint8).image
    grey = np.pad(drawn, ((0, HEIGHT - 500), (0, WIDTH - 600)), mode="reflect")
    return np.stack([255 - grey // 2, 255 - grey, 255 - grey // 3], -1).astype(np.uint8)


def write_svs(path: Path, pixels: np.ndarray, compression: str = "deflate") -> Path:
    """As Aperio's scanners: tiles, a thumbnail, coarser levels, and the pixel size in the description."""
    about = f"Aperio Image Library v12.0.15 \r\n{WIDTH}x{HEIGHT} [0,0 {WIDTH}x{HEIGHT}] (240x240)"
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        how: dict[str, Any] = {"photometric": "rgb", "compression": compression, "metadata": None, "software": False}
        tiff.write(pixels, tile=(240, 240), description=f"{about} JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990", **how)
        tiff.write(pixels[::16, ::16], rowsperstrip=16, description=f"{about} -> thumbnail", **how)
        for factor in FACTORS[1:]:
            tiff.write(pixels[::factor, ::factor], tile=(240, 240), description=f"{about} -> level", **how)
    return path


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("slides") / "scan.svs", tissue())


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_windows_of_any_level_are_slices(svs: Path, data: st.DataObject) -> None:
    level = data.draw(st.sampled_from([0, 1, 2]))
    whole = np.moveaxis(tissue()[:: FACTORS[level], :: FACTORS[level]], -1, 0)
    rows, columns = (sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in whole.shape[1:])
    with open_image(svs, ANY, network_channels=3, level=level) as source:
        assert source.shape == whole.shape[1:]
        window = source.read(0, (rows[0], columns[0]), (rows[1], columns[1]))
        np.testing.assert_array_equal(window, whole[:, slice(*rows), slice(*columns)])


def test_levels_and_pixel_sizes_are_read(svs: Path) -> None:
    with open_image(svs, ANY, network_channels=3) as source:
        assert source.reading == ("scan.svs YXS 1301x1150x3 uint8: 3 channels, 2-D network over 1 plane (level 0 of 3)")
        assert source.pixel_size_um == (0.499, 0.499)
        assert source.levels == ((1301, 1150), (326, 288), (82, 72))
        assert source.fingerprint()["level"] == 0
    with open_image(svs, ANY, network_channels=3, level=2) as source:
        assert source.pixel_size_um == pytest.approx((0.499 * 1301 / 82, 0.499 * 1150 / 72))
        assert source.fingerprint()["level"] == 2
    with pytest.raises(ImageError, match=r"scan\.svs: level 3 does not exist; the image has levels 0 to 2"):
        open_image(svs, ANY, network_channels=3, level=3)


def test_jpeg_tiles_decode_as_tifffile_decodes_them(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs", reason="needs imagecodecs")
    path = write_svs(tmp_path / "j.svs", tissue(), "jpeg")
    expected = np.moveaxis(tifffile.imread(path), -1, 0)
    with open_image(path, ANY, network_channels=3) as source:
        np.testing.assert_array_equal(source.read(0, (0, 0), source.shape), expected)


def test_damage_is_an_error(svs: Path, tmp_path: Path) -> None:
    data = bytearray(svs.read_bytes())
    cut = tmp_path / "cut.svs"
    for share in (0.2, 0.98):  # inside level 0, and inside the coarser ones
        cut.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError, match=r"cut\.svs: the file is truncated"):
            open_image(cut, ANY, network_channels=3)
    with tifffile.TiffFile(svs) as tiff:
        start, count = tiff.pages[0].dataoffsets[-1], tiff.pages[0].databytecounts[-1]
    data[start : start + count] = bytes(count)
    torn = tmp_path / "torn.svs"
    torn.write_bytes(data)
    with open_image(torn, ANY, network_channels=3) as source:
        with pytest.raises(ImageError, match=r"torn\.svs: .*\(window \(1200, 1000\) to \(1301, 1150\)\)"):
            source.read(0, (1200, 1000), (1301, 1150))
        np.testing.assert_array_equal(source.read(0, (0, 0), (9, 9)), np.moveaxis(tissue()[:9, :9], -1, 0))


def test_without_a_library_a_slide_is_a_plain_tiff_or_an_error(
    svs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unet_rt.images.slide.find_spec", lambda name: None)
    for name in ("tiffslide", "openslide"):
        monkeypatch.setitem(sys.modules, name, None)
    with open_image(svs, ANY, network_channels=3, level=1) as source:
        assert "read as a plain TIFF; pip install 'unet-rt[slides]' for its pixel size" in source.reading
        np.testing.assert_array_equal(source.read(0, (0, 0), source.shape), np.moveaxis(tissue()[::4, ::4], -1, 0))
    (tmp_path / "a.mrxs").write_bytes(b"\xff\xd8 a thumbnail")
    with pytest.raises(ImageError, match=r"\.mrxs slides are read by openslide, which is missing; pip install"):
        open_image(tmp_path / "a.mrxs", ANY)


def test_openslide_reads_the_same_pixels(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openslide", reason="needs openslide")
    from unet_rt.images import slide as image_slide

    monkeypatch.setattr(image_slide, "find_spec", lambda name: name == "openslide" or None)
    for level, factor in enumerate(FACTORS):
        whole = np.moveaxis(tissue()[::factor, ::factor], -1, 0)
        with open_image(svs, ANY, network_channels=3, level=level) as source:
            assert source.shape == whole.shape[1:]
            assert source.pixel_size_um[0] == pytest.approx(0.499 * HEIGHT / whole.shape[1])
            if level == 0:
                window = source.read(0, (100, 200), (1301, 1150))
                np.testing.assert_array_equal(window, whole[:, 100:, 200:])
