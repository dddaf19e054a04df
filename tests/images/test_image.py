"""Images: windows equal slices of the whole for every storage, and what cannot be read is refused with a reason."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from flat_image import open_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from unet_rt.contract.contract import Contract
from unet_rt.errors import ContractError, ImageError
from unet_rt.images import tiff as image_tiff
from unet_rt.images.listing import list_images
from unet_rt.images.source import Source

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ANY = Contract()
RNG = np.random.default_rng(20)
GREY = RNG.integers(0, 2**16, (75, 93), np.uint16)
COLOUR = RNG.integers(0, 256, (75, 93, 3), np.uint8)
STACK = RNG.integers(0, 2**16, (3, 2, 5, 40, 51), np.uint16)  # T C Z Y X


def planes_of(source: Source) -> np.ndarray:
    """(planes, C, *spatial)."""
    stop = source.shape
    return np.stack([source.read(p, (0,) * len(stop), stop) for p in range(source.planes)])


def tiff(array: np.ndarray, **options: Any) -> Callable[[Path], Any]:
    return lambda folder: tifffile.imwrite(folder / "image.tif", array, **options)


def grey_tiff(**options: Any) -> tuple[Callable[[Path], Any], np.ndarray, dict[str, Any]]:
    return tiff(GREY, photometric="minisblack", **options), GREY[None, None], {}


def colour_tiff(planar: bool = False, **options: Any) -> tuple[Callable[[Path], Any], np.ndarray, dict[str, Any]]:
    channels = np.moveaxis(COLOUR, -1, 0)
    stored = np.ascontiguousarray(channels) if planar else COLOUR
    config = "separate" if planar else "contig"
    return tiff(stored, photometric="rgb", planarconfig=config, **options), channels[None], {"network_channels": 3}


FLOAT = GREY.astype(np.float32) / 7 - 1000
SIGNED = (GREY.astype(np.int32) - 30000).astype(np.int16)
TCZYX, PLANES = {"axes": "TCZYX"}, np.swapaxes(STACK, 1, 2).reshape(-1, 2, 40, 51)

# name: (writes the file, all pixels as (planes, C, *spatial), arguments of open_image)
STORAGES: dict[str, tuple[Callable[[Path], Any], np.ndarray, dict[str, Any]]] = {
    "one strip": grey_tiff(),
    "strips": grey_tiff(rowsperstrip=8),
    "deflate strips": grey_tiff(rowsperstrip=7, compression="zlib"),
    "deflate strips, predictor": grey_tiff(rowsperstrip=7, compression="zlib", predictor=True),
    "deflate in one piece": grey_tiff(compression="zlib", rowsperstrip=75),
    "tiles": grey_tiff(tile=(16, 32)),
    "deflate tiles": grey_tiff(tile=(32, 16), compression="zlib"),
    "big-endian": grey_tiff(byteorder=">"),
    "big-endian tiles": grey_tiff(byteorder=">", tile=(16, 16)),
    "bigtiff": grey_tiff(bigtiff=True, tile=(32, 32), compression="zlib"),
    "float": (tiff(FLOAT, rowsperstrip=9, compression="zlib"), FLOAT[None, None], {}),
    "big-endian float": (tiff(FLOAT, byteorder=">"), FLOAT[None, None], {}),
    "signed": (tiff(SIGNED, tile=(16, 16)), SIGNED[None, None], {}),
    "colour": colour_tiff(),
    "colour tiles": colour_tiff(tile=(32, 16), compression="zlib"),
    "colour separate": colour_tiff(planar=True),
    "colour separate tiles": colour_tiff(planar=True, tile=(16, 32), compression="zlib"),
    "colour separate strips": colour_tiff(planar=True, rowsperstrip=11, compression="zlib"),
    "colour, reversed": (colour_tiff()[0], np.moveaxis(COLOUR, -1, 0)[None, ::-1], {"channels": "2,1,0"}),
    "colour, one": (colour_tiff()[0], np.moveaxis(COLOUR, -1, 0)[None, 1:2], {"channels": [1], "network_channels": 1}),
    "colour, odd choice": (colour_tiff()[0], np.moveaxis(COLOUR, -1, 0)[None, [2, 0, 2]], {"channels": (2, 0, 2)}),
    "grey, repeated": (grey_tiff()[0], np.repeat(GREY[None, None], 3, 1), {"channels": "0,0,0", "network_channels": 3}),
    "ome": (tiff(STACK, ome=True, metadata=TCZYX), PLANES, {"network_channels": 2}),
    "ome tiles": (
        tiff(STACK, ome=True, metadata=TCZYX, tile=(16, 32), compression="zlib"),
        PLANES[:, 1:],
        {"network_channels": 1, "channels": [1]},
    ),
    "ome volumes": (tiff(STACK, ome=True, metadata=TCZYX), STACK, {"network_channels": 2, "spatial": 3}),
    "imagej": (
        tiff(np.swapaxes(STACK, 1, 2), imagej=True, metadata={"axes": "TZCYX"}),
        PLANES,
        {"network_channels": 2},
    ),
    "imagej volumes": (
        tiff(np.swapaxes(STACK, 1, 2), imagej=True, metadata={"axes": "TZCYX"}),
        STACK,
        {"network_channels": 2, "spatial": 3},
    ),
    "pages": (
        tiff(STACK[0, 0], photometric="minisblack", metadata=None),
        STACK[0, 0][:, None],
        {"network_channels": 1},
    ),
    "pages as volume": (
        tiff(STACK[0, 0], photometric="minisblack", metadata=None, compression="zlib", rowsperstrip=9),
        STACK[0, 0][None, None],
        {"network_channels": 1, "spatial": 3},
    ),
    "pages as channels": (
        tiff(STACK[0, 0], photometric="minisblack", metadata=None),
        STACK[0, 0][None],
        {"network_channels": 5},
    ),
    "png": (lambda d: Image.fromarray(GREY).save(d / "image.png"), GREY[None, None], {}),
    "png colour": (
        lambda d: Image.fromarray(COLOUR).save(d / "image.png"),
        np.moveaxis(COLOUR, -1, 0)[None],
        {"network_channels": 3},
    ),
    "bmp": (lambda d: Image.fromarray(COLOUR[..., 0]).save(d / "image.bmp"), COLOUR[None, None, ..., 0], {}),
    "npy": (lambda d: np.save(d / "image.npy", STACK), PLANES, {"axes": "TCZYX", "network_channels": 2}),
    "npy fortran": (lambda d: np.save(d / "image.npy", np.asfortranarray(FLOAT)), FLOAT[None, None], {}),
    "npy big-endian": (lambda d: np.save(d / "image.npy", GREY.astype(">u2")), GREY[None, None], {}),
    "npy channels last": (
        lambda d: np.save(d / "image.npy", COLOUR),
        np.moveaxis(COLOUR, -1, 0)[None],
        {"network_channels": 3},
    ),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sources: dict[str, Source] = {}

    def get(storage: str) -> Source:
        if storage not in sources:
            folder = tmp_path_factory.mktemp("image")
            STORAGES[storage][0](folder)
            (path,) = folder.iterdir()
            sources[storage] = open_image(path, ANY, **STORAGES[storage][2])
        return sources[storage]

    yield get
    for source in sources.values():
        source.close()


@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_window_is_a_slice_of_the_whole(storage: str, opened: Callable[[str], Source], data: st.DataObject) -> None:
    source, whole = opened(storage), STORAGES[storage][1]
    assert (source.planes, source.channels, *source.shape) == whole.shape
    assert source.dtype == whole.dtype
    plane = data.draw(st.integers(0, source.planes - 1))
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in source.shape]
    window = source.read(plane, [a for a, _ in ends], [b for _, b in ends])
    assert window.dtype == source.dtype
    np.testing.assert_array_equal(window, whole[(plane, slice(None), *(slice(a, b) for a, b in ends))])


def test_only_the_segments_of_a_window_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RNG.integers(0, 99, (640, 640), np.uint8), tile=(64, 64), compression="zlib")
    decoded = []
    original = image_tiff.SegmentedSeries._decoded
    monkeypatch.setattr(
        image_tiff.SegmentedSeries, "_decoded", lambda self, *a: (decoded.append(a[1]), original(self, *a))[1]
    )
    with open_image(tmp_path / "a.tif", ANY) as source:
        source.read(0, (70, 130), (120, 190))
        assert decoded == [12]
        source.read(0, (64, 64), (192, 192))
        assert sorted(decoded) == [11, 12, 21, 22]  # tile 12 came from the cache


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_rt.images.tiff_pages.CACHE_BYTES", 20_000)
    pixels = RNG.integers(0, 99, (640, 320), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, rowsperstrip=16, compression="zlib")
    with open_image(tmp_path / "a.tif", ANY) as source:
        for row in range(0, 640, 40):
            np.testing.assert_array_equal(source.read(0, (row, 5), (row + 40, 300))[0], pixels[row : row + 40, 5:300])
        assert source._pixels._cached <= 20_000  # type: ignore[attr-defined]


MEMORY = """
import resource, sys
from unet_rt.contract.contract import Contract
from unet_rt.images.open import open_image
import tifffile
# ru_maxrss of a fork starts at its parent's; the current size is what this process itself adds to.
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
with open_image(sys.argv[1], Contract()) as source:
    before, most, total = resident(), 0.0, 0
    for plane, start, stop in source.bands():
        total += int(source.read_band(plane, start, stop)[0, 0, 0])
        most = max(most, resident())
print(most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident size is read from /proc")
@pytest.mark.parametrize("options", [{}, {"tile": (512, 512), "compression": "zlib"}], ids=["plain", "deflate tiles"])
def test_a_large_tiff_is_read_in_little_memory(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = np.arange(10_000, dtype=np.uint16)
    if options:
        blank = (np.zeros((512, 512), np.uint16) for _ in range(400))
        tifffile.imwrite(
            tmp_path / "a.tif", blank, shape=(10_000, 10_000), dtype=np.uint16, **(options | {"maxworkers": 1})
        )
    else:
        tifffile.imwrite(tmp_path / "a.tif", np.broadcast_to(rows, (10_000, 10_000)))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "a.tif"], capture_output=True, text=True, check=True
    )
    # The image has 191 MiB. Of it: a band of 8 MiB, and 128 MiB of decoded tiles.
    assert float(done.stdout) < (160 if options else 60)


# Pyramids, nodata, damage -------------------------------------------------------------------------------------------


def pyramid(path: Path, **options: Any) -> Path:
    """Every second pixel per level, as SubIFDs; 0.5 µm pixels."""
    ome = path.name.endswith(".ome.tif")
    with tifffile.TiffWriter(path, bigtiff=True, ome=ome) as tif:
        how: dict[str, Any] = {"photometric": "minisblack", "tile": (16, 16), "compression": "zlib"}
        size = {"PhysicalSizeY": 0.5, "PhysicalSizeX": 0.25}
        meta = {"axes": "CYX", **size} if ome else None
        centimetres = {"resolution": (40_000, 20_000), "resolutionunit": "CENTIMETER"}
        tif.write(STACK[0, :, 0], subifds=2, metadata=meta, **centimetres, **(how | options))
        for step in (2, 4):
            tif.write(STACK[0, :, 0, ::step, ::step], subfiletype=1, metadata=None, **(how | options))
    return path


@pytest.mark.parametrize("name", ["p.tif", "p.ome.tif"])
def test_levels_of_a_tiff_pyramid(tmp_path: Path, name: str) -> None:
    path = pyramid(tmp_path / name)
    for level, step in enumerate((1, 2, 4)):
        with open_image(path, ANY, network_channels=2, level=level) as source:
            assert source.levels == ((40, 51), (20, 26), (10, 13))
            assert f"level {level} of 3" in source.reading
            np.testing.assert_array_equal(planes_of(source)[0], STACK[0, :, 0, ::step, ::step])
            assert source.pixel_size_um == pytest.approx((0.5 * 40 / source.shape[0], 0.25 * 51 / source.shape[1]))
            assert source.fingerprint()["level"] == level
    with pytest.raises(ImageError, match=r"level 3 does not exist; the image has levels 0 to 2"):
        open_image(path, ANY, network_channels=2, level=3)
    tifffile.imwrite(tmp_path / "one.tif", GREY)
    with pytest.raises(ImageError, match=r"level 1 does not exist; the image has one level, 0; choose with --level"):
        open_image(tmp_path / "one.tif", ANY, level=1)
    with pytest.raises(ImageError, match="level 1 does not exist"):
        open_image(GREY, ANY, level=1)


def test_lost_pages_are_an_error(tmp_path: Path) -> None:
    """A chain of pages that goes on beyond the file's end: pages, or levels of a pyramid, are lost."""
    path = tmp_path / "pages.tif"
    for page in range(3):
        tifffile.imwrite(path, GREY, append=page > 0, metadata=None, photometric="minisblack")
    with tifffile.TiffFile(path) as tif:
        start = tif.pages[2].offset
    data = path.read_bytes()
    path.write_bytes(data[:start])
    with pytest.raises(ImageError, match=r"pages\.tif: the file is truncated"):
        open_image(path, ANY, network_channels=1)


def test_nodata_of_a_plain_tiff(tmp_path: Path) -> None:
    pixels = FLOAT.copy()
    pixels[10:20, 30:40] = -9999
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, extratags=[(42113, "s", 0, "-9999", True)])
    with open_image(path, ANY) as source:
        assert source.nodata == -9999
        valid = source.valid(0, (5, 5), (30, 45))
        np.testing.assert_array_equal(valid, pixels[5:30, 5:45] != -9999)
        assert source.valid(0, (0, 0), (10, 51)) is None
    tifffile.imwrite(path, GREY, extratags=[(42113, "s", 0, "-9999", True)])  # which uint16 cannot hold
    with open_image(path, ANY) as source:
        assert source.valid(0, (0, 0), source.shape) is None


@pytest.mark.parametrize(
    ("channels", "wanted"),
    [(None, 3), ((0, 1, 2), 3), ((2, 1, 0), 3), ((1,), 1), ((2, 0), 2), ((1, 1), 2), ("luma", 1)],
    ids=str,
)
def test_pixels_and_where_they_hold_data_are_read_at_once(tmp_path: Path, channels: Any, wanted: int) -> None:
    """The nodata value is looked for in all stored channels, so those of the network are among what was decoded."""
    pixels = COLOUR[:40, :51].copy()
    pixels[10:20, 30:40] = 7
    pixels[25, 25] = (7, 7, 8)
    path = tmp_path / "a.tif"
    nodata = [(42113, "s", 0, "7", True)]
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(16, 16), compression="zlib", extratags=nodata)
    with open_image(path, ANY, channels=channels, network_channels=wanted) as source:
        for start, stop in [((0, 0), source.shape), ((5, 5), (30, 45)), ((0, 0), (9, 9)), ((3, 3), (3, 9))]:
            expected = source.read(0, start, stop), source.valid(0, start, stop)
            windows: list[Any] = []
            read = source._pixels.read
            source._pixels.read = lambda window, read=read, windows=windows: windows.append(window) or read(window)
            got = source.read_valid(0, start, stop)
            source._pixels.read = read
            np.testing.assert_array_equal(got[0], expected[0])
            assert got[0].dtype == expected[0].dtype
            assert (got[1] is None) == (expected[1] is None)
            np.testing.assert_array_equal(got[1], expected[1])
            assert len(windows) <= 1
        assert not source.valid(0, (10, 30), (11, 31)).any()
        assert source.valid(0, (25, 25), (26, 26)) is None
    grey = tmp_path / "grey.tif"
    tifffile.imwrite(grey, pixels[..., 0], photometric="minisblack", extratags=nodata)
    with open_image(grey, ANY, channels=(0, 0, 0), network_channels=3) as source:
        got = source.read_valid(0, (0, 0), source.shape)
        np.testing.assert_array_equal(got[0], np.stack([pixels[..., 0]] * 3))
        np.testing.assert_array_equal(got[1], pixels[..., 0] != 7)


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16), "compression": "zlib"}], ids=["mapped", "tiles"])
def test_a_file_that_changes_is_an_error(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GREY, **options)
    with open_image(path, ANY) as source:
        before = source.fingerprint()
        assert before == {
            "path": str(path),
            "size": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "level": 0,
        }
        source.read(0, (0, 0), (9, 9))
        with path.open("ab") as stream:
            stream.write(b"more")
        with pytest.raises(ImageError, match=r"a\.tif: changed while it was being read"):
            source.read(0, (0, 0), (9, 9))
    with open_image(path, ANY) as source:
        assert source.fingerprint() != before


def test_a_damaged_tile_is_an_error_that_names_the_window(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK[0, 0], tile=(16, 16), compression="zlib", metadata=None, photometric="minisblack")
    with tifffile.TiffFile(path) as tif:
        start, count = tif.pages[2].dataoffsets[5], tif.pages[2].databytecounts[5]
    data = bytearray(path.read_bytes())
    data[start : start + count] = bytes(count)
    path.write_bytes(data)
    with open_image(path, ANY, network_channels=1) as source:
        with pytest.raises(ImageError, match=r"row 16, column 16 .*\(plane 2, window \(10, 10\) to \(20, 30\)\)"):
            source.read(2, (10, 10), (20, 30))
        np.testing.assert_array_equal(source.read(1, (10, 10), (20, 30))[0], STACK[0, 0, 1, 10:20, 10:30])


# What formats mean --------------------------------------------------------------------------------------------------


def test_real_microscopy_reads_as_pillow_reads_it() -> None:
    folder = DATA / "dsb2018" / "image"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    for path in sorted(folder.iterdir())[:12]:
        pixels = np.asarray(Image.open(path))
        channels = pixels.shape[2] if pixels.ndim == 3 else 1
        with open_image(path, ANY, network_channels=channels) as source:
            expected = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
            np.testing.assert_array_equal(planes_of(source)[0], expected)


@pytest.mark.parametrize("form", ["imagej", "ome"])
def test_a_real_stack_reads_as_planes_and_as_a_volume(tmp_path: Path, form: str) -> None:
    folder = DATA / "isbi2012" / "image"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    slices = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.iterdir())])
    path = tmp_path / ("stack.ome.tif" if form == "ome" else "stack.tif")
    if form == "ome":
        size = {f"PhysicalSize{a}": v for a, v in zip("XYZ", (4.0, 4.0, 50.0), strict=True)}
        units = {f"PhysicalSize{a}Unit": "nm" for a in "XYZ"}
        tifffile.imwrite(path, slices, metadata={"axes": "ZYX", **size, **units})
    else:
        tifffile.imwrite(
            path, slices, imagej=True, resolution=(250, 250), metadata={"axes": "ZYX", "unit": "um", "spacing": 0.05}
        )
    with open_image(path, ANY, network_channels=1) as source:
        assert source.reading == f"{path.name} ZYX {len(slices)}x512x512 uint8: 1 channel, 2-D network over 24 planes"
        assert source.pixel_size_um == pytest.approx((0.004, 0.004))
        np.testing.assert_array_equal(planes_of(source)[:, 0], slices)
    with open_image(path, ANY, network_channels=1, spatial=3) as source:
        assert (source.planes, source.shape) == (1, slices.shape)
        assert source.pixel_size_um == pytest.approx((0.05, 0.004, 0.004))
        np.testing.assert_array_equal(source.read(0, (3, 100, 200), (9, 164, 264))[0], slices[3:9, 100:164, 200:264])


def test_the_reading_is_one_line_of_how_axes_and_channels_were_read(tmp_path: Path) -> None:
    path = tmp_path / "cells.ome.tif"
    tifffile.imwrite(path, STACK, metadata={"axes": "TCZYX", "Channel": {"Name": ["DAPI", "GFP"]}})
    with open_image(path, ANY, network_channels=1, channels=[0]) as source:
        assert source.reading == ("cells.ome.tif TCZYX 3x2x5x40x51 uint16: channel 0 of 2, 2-D network over 15 planes")
        assert (source.plane_axes, source.plane_shape) == ("TZ", (3, 5))
    with open_image(path, Contract(channels=("GFP",)), network_channels=1) as source:
        assert "channel 1 of 2 by name (GFP)" in source.reading
        np.testing.assert_array_equal(source.read(7, (0, 0), (40, 51))[0], STACK[1, 1, 2])
    with pytest.raises(ContractError, match=r"2 channels .*DAPI, GFP.*takes 1; choose with --channels"):
        open_image(path, ANY, network_channels=1)


def test_palettes_and_single_bits_are_written_out(tmp_path: Path) -> None:
    colours = Image.fromarray(COLOUR // 64 * 64).quantize(16)
    colours.save(tmp_path / "palette.png")
    with open_image(tmp_path / "palette.png", ANY, network_channels=3) as source:
        assert "palette written out" in source.reading
        np.testing.assert_array_equal(planes_of(source)[0], np.moveaxis(np.asarray(colours.convert("RGB")), -1, 0))
    bits = Image.fromarray(GREY > 30000)
    bits.save(tmp_path / "bits.png")
    with open_image(tmp_path / "bits.png", ANY, network_channels=1) as source:
        assert "1 bit" in source.reading
        np.testing.assert_array_equal(planes_of(source)[0, 0], (GREY > 30000) * np.uint8(255))


def palette_tiff(path: Path, colours: np.ndarray, **options: Any) -> np.ndarray:
    """A TIFF of indices into (256, 3) colours; the indices."""
    indices = GREY.astype(np.uint8)
    table = colours.T.astype(np.uint16) * 257
    tifffile.imwrite(path, indices, photometric="palette", colormap=table, **options)
    return indices


@pytest.mark.parametrize("options", [{}, {"tile": (16, 32), "compression": "zlib"}], ids=["mapped", "tiles"])
def test_a_palette_in_a_tiff_is_written_out(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.tif"
    palette_tiff(path, RNG.integers(0, 256, (256, 3)), **options)
    with Image.open(path) as picture:
        expected = np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0)
    with open_image(path, ANY, network_channels=3) as source:
        assert "palette written out" in source.reading
        np.testing.assert_array_equal(planes_of(source)[0], expected)
        np.testing.assert_array_equal(source.read(0, (3, 5), (40, 60)), expected[:, 3:40, 5:60])
    with open_image(path, ANY, network_channels=2, channels="2,0") as source:
        np.testing.assert_array_equal(planes_of(source)[0], expected[[2, 0]])
    with pytest.raises(ContractError, match="colour image"):
        open_image(path, ANY, network_channels=1)
    levels = RNG.permutation(256)
    indices = palette_tiff(path, np.stack([levels] * 3, 1), **options)
    with open_image(path, ANY, network_channels=1) as source:
        assert "grey palette written out" in source.reading
        np.testing.assert_array_equal(planes_of(source)[0, 0], levels[indices])


@pytest.mark.parametrize("channels", [(0, 1, 2), (1,)], ids=["grey", "green"])
@pytest.mark.parametrize("step", [1, -1])
def test_a_palette_that_shows_intensities_leaves_them(tmp_path: Path, channels: tuple[int, ...], step: int) -> None:
    colours = np.zeros((256, 3), np.uint8)
    colours[:, list(channels)] = np.arange(256)[::step, None]
    indices = palette_tiff(tmp_path / "a.tif", colours)
    with open_image(tmp_path / "a.tif", ANY, network_channels=1) as source:
        assert "colour map ignored" in source.reading
        np.testing.assert_array_equal(planes_of(source)[0, 0], indices)


def test_nodata_of_a_palette_is_an_index(tmp_path: Path) -> None:
    indices = palette_tiff(tmp_path / "a.tif", RNG.integers(0, 256, (256, 3)), extratags=[(42113, "s", 0, "7", True)])
    with open_image(tmp_path / "a.tif", ANY, network_channels=3) as source:
        np.testing.assert_array_equal(source.valid(0, (0, 0), source.shape), indices != 7)


def test_a_palette_of_a_mask_is_for_the_eye(tmp_path: Path) -> None:
    indices = palette_tiff(tmp_path / "a.tif", RNG.integers(0, 256, (256, 3)))
    with open_image(tmp_path / "a.tif", ANY, network_channels=1, indices=True) as source:
        np.testing.assert_array_equal(planes_of(source)[0, 0], indices)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"tile": (16, 32), "compression": "zlib"}], ids=["mapped", "tiles"])
def test_a_tiff_is_turned_as_its_orientation_says(tmp_path: Path, orientation: int, options: dict[str, Any]) -> None:
    path, tag = tmp_path / "a.tif", (274, "H", 1, orientation, True)
    picture = Image.fromarray(COLOUR)
    picture.getexif()[274] = orientation
    expected = np.moveaxis(np.asarray(ImageOps.exif_transpose(picture)), -1, 0)
    across, down = (4000, 8000)  # pixels per centimetre, of the picture as stored
    tifffile.imwrite(
        path, COLOUR, photometric="rgb", resolution=(across, down), resolutionunit=3, extratags=[tag], **options
    )
    with open_image(path, ANY, network_channels=3) as source:
        assert (f"turned as TIFF orientation {orientation} says" in source.reading) == (orientation > 1)
        np.testing.assert_array_equal(planes_of(source)[0], expected)
        np.testing.assert_array_equal(source.read(0, (3, 5), (40, 60)), expected[:, 3:40, 5:60])
        sizes = (1e4 / down, 1e4 / across)  # y, x
        assert source.pixel_size_um == pytest.approx(sizes if orientation < 5 else sizes[::-1])


def test_all_pages_of_a_turned_tiff_are_turned(tmp_path: Path) -> None:
    tag = (274, "H", 1, 6, True)
    tifffile.imwrite(tmp_path / "a.tif", STACK[0, 0], photometric="minisblack", metadata=None, extratags=[tag])
    with open_image(tmp_path / "a.tif", ANY, network_channels=1) as source:
        np.testing.assert_array_equal(planes_of(source)[:, 0], np.rot90(STACK[0, 0], -1, (1, 2)))


def test_exif_orientation_is_respected_and_said(tmp_path: Path) -> None:
    picture = Image.fromarray(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    with open_image(tmp_path / "a.jpg", ANY, network_channels=3) as source:
        assert source.shape == (93, 75)
        assert "EXIF orientation 6" in source.reading


def test_alpha_is_dropped_only_where_it_says_nothing(tmp_path: Path) -> None:
    opaque = np.dstack([COLOUR, np.full(COLOUR.shape[:2], 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png", ANY, network_channels=3) as source:
        assert "opaque alpha dropped" in source.reading
        np.testing.assert_array_equal(planes_of(source)[0], np.moveaxis(COLOUR, -1, 0))
    opaque[70, 3, 3] = 254
    Image.fromarray(opaque).save(tmp_path / "a.png")
    with pytest.raises(ContractError, match=r"not opaque.*254.*--channels 0,1,2"):
        open_image(tmp_path / "a.png", ANY, network_channels=3)
    with open_image(tmp_path / "a.png", ANY, network_channels=3, channels="0,1,2") as source:
        np.testing.assert_array_equal(planes_of(source)[0], np.moveaxis(COLOUR, -1, 0))
    tifffile.imwrite(tmp_path / "a.tif", opaque, photometric="rgb", extrasamples=["unassalpha"], compression="zlib")
    with pytest.raises(ContractError, match="not opaque"):
        open_image(tmp_path / "a.tif", ANY, network_channels=3)
    tifffile.imwrite(tmp_path / "a.tif", opaque, photometric="rgb", extrasamples=["unspecified"])
    with pytest.raises(ContractError, match=r"4 channels.*takes 3"):  # a fourth channel is not an alpha channel
        open_image(tmp_path / "a.tif", ANY, network_channels=3)


def test_grey_saved_as_colour_is_one_channel_and_real_colour_is_not(tmp_path: Path) -> None:
    grey = np.repeat(COLOUR[..., :1], 3, axis=2)
    Image.fromarray(grey).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png", ANY, network_channels=1) as source:
        assert "equal colours taken as one channel" in source.reading
        np.testing.assert_array_equal(planes_of(source)[0, 0], grey[..., 0])
    grey[74, 92, 1] ^= 1
    Image.fromarray(grey).save(tmp_path / "a.png")
    with pytest.raises(ContractError, match=r"colour image.*--channels 0.*--channels luma"):
        open_image(tmp_path / "a.png", ANY, network_channels=1)
    with open_image(tmp_path / "a.png", ANY, network_channels=1, channels="luma") as source:
        np.testing.assert_array_equal(planes_of(source)[0, 0], np.asarray(Image.fromarray(grey).convert("L")))


def test_channels_come_in_the_order_of_the_contract() -> None:
    bgr = Contract(channels=("blue", "green", "red"))
    with open_image(COLOUR, bgr, axes="YXS") as source:
        assert "2,1,0 of 3 by name" in source.reading
        np.testing.assert_array_equal(planes_of(source)[0], np.moveaxis(COLOUR, -1, 0)[::-1])


def test_sixteen_bit_colour_png_keeps_its_bits(tmp_path: Path) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    deep = RNG.integers(0, 2**16, (20, 30, 3), np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(deep))
    with open_image(tmp_path / "a.png", ANY, network_channels=3) as source:
        np.testing.assert_array_equal(planes_of(source)[0], np.moveaxis(deep, -1, 0))


def test_compression_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imagecodecs")
    tifffile.imwrite(tmp_path / "a.tif", GREY, compression="lzw")
    with open_image(tmp_path / "a.tif", ANY) as source:
        np.testing.assert_array_equal(planes_of(source)[0, 0], GREY)
    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", {}, raising=False)
    with pytest.raises(ImageError, match=r"LZW.*pip install 'unet-rt\[tiff\]'"):
        open_image(tmp_path / "a.tif", ANY)


def test_further_series_and_levels_are_said(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(GREY, subifds=1, tile=(16, 16), photometric="minisblack")
        writer.write(GREY[::2, ::2], subfiletype=1, tile=(16, 16), photometric="minisblack")
    with open_image(tmp_path / "a.tif", ANY) as source:
        assert "level 0 of 2" in source.reading
        np.testing.assert_array_equal(planes_of(source)[0, 0], GREY)


def test_one_of_several_series_is_read_by_number_or_name(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for k in range(3):
            about = {"axes": "YX", "Name": f"well {k}", "PhysicalSizeX": k + 1.0, "PhysicalSizeY": k + 1.0}
            writer.write(GREY[k:], metadata=about)
    with pytest.raises(ImageError, match=r"holds 3 images: 0 well 0 \(YX 75x93\), 1 well 1 \(YX 74x93\).*--series N"):
        open_image(path, ANY)
    for series in (1, "1", "well 1"):
        with open_image(path, ANY, series=series) as source:
            assert "series 1 of 3 (well 1)" in source.reading
            assert source.pixel_size_um == (2, 2)
            np.testing.assert_array_equal(planes_of(source)[0, 0], GREY[1:])
    for wrong in (3, -1, "well 7"):
        with pytest.raises(ImageError, match=r"no single series is called .*2 well 2"):
            open_image(path, ANY, series=wrong)
    with pytest.raises(ImageError, match="holds no series"):
        open_image(GREY, ANY, series=0)


@pytest.mark.parametrize("subfile", [1, 4], ids=["preview", "mask"])
@pytest.mark.parametrize("first", [True, False])
def test_previews_and_masks_are_no_planes(tmp_path: Path, subfile: int, first: bool) -> None:
    small = {"subfiletype": subfile, "photometric": "minisblack"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for preview in (first, not first):
            little = GREY[::4, ::4] > 9 if subfile == 4 else GREY[::4, ::4]
            pixels, options = (little, small) if preview else (GREY, {"photometric": "minisblack"})
            writer.write(pixels, metadata=None, **options)
    with open_image(tmp_path / "a.tif", ANY, network_channels=1) as source:
        np.testing.assert_array_equal(planes_of(source)[:, 0], GREY[None])


def test_colours_compressed_as_jpeg_read_as_rgb(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs")
    smooth = Image.fromarray(COLOUR[:9, :11]).resize((93, 75))
    for layout in ({"tile": (32, 32)}, {"rowsperstrip": 16}):
        stored = np.asarray(smooth.convert("YCbCr"))
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric="ycbcr", compression="jpeg", **layout)
        with open_image(tmp_path / "a.tif", ANY, network_channels=3) as source:
            found = np.moveaxis(planes_of(source)[0], 0, -1)
            with Image.open(tmp_path / "a.tif") as picture:
                np.testing.assert_array_equal(found, np.asarray(picture))
            assert np.abs(found - np.asarray(smooth, float)).mean() < 8  # colour at half the resolution


def test_unusual_tiffs(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    grey = GREY.astype(np.uint8)
    tifffile.imwrite(path, grey > 9, rowsperstrip=8, compression="packbits")
    with open_image(path, ANY) as source:
        np.testing.assert_array_equal(planes_of(source)[0, 0], grey > 9)
    tifffile.imwrite(path, grey, photometric="miniswhite")
    with open_image(path, ANY) as source:
        assert "white is zero: values as stored" in source.reading
        np.testing.assert_array_equal(planes_of(source)[0, 0], grey)
    tifffile.imwrite(path, grey, photometric="palette", colormap=np.zeros((3, 256), np.uint16))
    with open_image(path, ANY) as source:
        assert "colour map ignored" in source.reading
    tiles = iter([grey[:64, :64].copy(), None, None, None])  # tiles left out read as zero
    tifffile.imwrite(path, tiles, shape=(100, 100), dtype=np.uint8, tile=(64, 64), compression="zlib")
    with open_image(path, ANY) as source:
        np.testing.assert_array_equal(planes_of(source)[0, 0], np.pad(grey[:64, :64], (0, 36)))
    volume = RNG.integers(0, 99, (20, 64, 48), np.uint8)
    tifffile.imwrite(path, volume, volumetric=True, tile=(16, 16, 16), photometric="minisblack")
    with open_image(path, ANY, network_channels=1, spatial=3) as source:
        np.testing.assert_array_equal(source.read(0, (3, 5, 7), (18, 60, 40))[0], volume[3:18, 5:60, 7:40])


def test_an_ome_tiff_over_several_files_is_refused(tmp_path: Path) -> None:
    ids = [f"urn:uuid:00000000-0000-0000-0000-00000000000{i}" for i in range(2)]
    parts = "".join(
        f'<TiffData FirstZ="{i}" IFD="0" PlaneCount="1"><UUID FileName="{i}.ome.tif">{ids[i]}</UUID></TiffData>'
        for i in range(2)
    )
    for i in range(2):
        xml = (
            f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{ids[i]}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="93" SizeY="75" SizeC="1" '
            f'SizeZ="2" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{parts}</Pixels></Image></OME>'
        )
        tifffile.imwrite(tmp_path / f"{i}.ome.tif", GREY, description=xml, metadata=None)
    with pytest.raises(ImageError, match="split over 2 files, which is not read; merge it"):
        open_image(tmp_path / "0.ome.tif", ANY, network_channels=1)
    (tmp_path / "1.ome.tif").unlink()
    with pytest.raises(ImageError, match="1 of the 2 pages"):
        open_image(tmp_path / "0.ome.tif", ANY, network_channels=1)


# Arrays ------------------------------------------------------------------------------------------------------------


class Interface:
    """An array of another library."""

    def __init__(self, array: np.ndarray) -> None:
        self.__array_interface__ = array.__array_interface__
        self.kept = array


class Dlpack:
    def __init__(self, array: np.ndarray, device: int = 1) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


@pytest.mark.parametrize(
    "kind", [lambda a: a, memoryview, Interface, Dlpack], ids=["numpy", "buffer", "interface", "dlpack"]
)
def test_arrays_of_any_library_are_read_without_a_copy(kind: Callable[[np.ndarray], Any]) -> None:
    with open_image(kind(FLOAT), ANY) as source:
        window = source.read(0, (3, 4), (10, 20))
        np.testing.assert_array_equal(window[0], FLOAT[3:10, 4:20])
        assert np.shares_memory(window, FLOAT)


def test_arrays_that_are_no_images_are_refused() -> None:
    cases = {
        "dtype complex64": FLOAT.astype(np.complex64),
        "dtype int64.*astype": GREY.astype(np.int64),
        "dtype object": np.array([[None, 1], [2, 3]], object),
        r"empty \(0x5\)": np.zeros((0, 5)),
        "another device": Dlpack(FLOAT, 2),
        "list is no image": [[1, 2], [3, 4]],
    }
    for message, array in cases.items():
        with pytest.raises(ImageError, match=message):
            open_image(array, ANY)
    with open_image(np.ma.array(FLOAT), ANY) as source:  # nothing masked
        assert source.shape == FLOAT.shape
    with open_image(GREY > 9, ANY) as source:
        assert source.dtype == np.uint8


def test_masked_pixels_hold_no_data() -> None:
    masked = np.ma.masked_less(FLOAT, FLOAT.mean())
    with open_image(masked, ANY) as source:
        assert source.gaps
        valid = source.valid(0, (3, 4), (10, 20))
        assert valid is not None
        np.testing.assert_array_equal(valid, ~masked.mask[3:10, 4:20])
        np.testing.assert_array_equal(source.read(0, (3, 4), (10, 20))[0], FLOAT[3:10, 4:20])
    colours = np.ma.array(np.stack([GREY] * 3, -1))
    colours[2, 3, 1] = np.ma.masked  # in one channel: what it is worth there nobody knows
    with open_image(colours, ANY, axes="YXC") as source:
        found = source.valid(0, (0, 0), GREY.shape)
        assert found is not None
        assert np.argwhere(~found).tolist() == [[2, 3]]


@pytest.mark.parametrize("name", ["a\0.tif", Path("a\0.npy")])
def test_names_that_no_file_has_are_refused(name: str | Path) -> None:
    with pytest.raises(ImageError, match="a character that no file name has"):
        open_image(name, ANY)


def test_windows_outside_the_image_are_refused() -> None:
    with open_image(GREY, ANY) as source:
        for plane, start, stop in [
            (1, (0, 0), (2, 2)),
            (0, (-1, 0), (2, 2)),
            (0, (0, 0), (76, 2)),
            (0, (5, 0), (4, 2)),
        ]:
            with pytest.raises(ImageError, match=r"does not exist|not inside"):
                source.read(plane, start, stop)


# Refusals ----------------------------------------------------------------------------------------------------------


def png_header(width: int, height: int, tail: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + tail


def tiff_header(width: int, height: int, compression: int = 1) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 700)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + b"\0" * 4).ljust(1024, b"\0")


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    Image.fromarray(COLOUR).save(tmp_path / "cut.png")
    Image.fromarray(COLOUR).save(tmp_path / "cut.jpg")
    tifffile.imwrite(tmp_path / "cut.tif", GREY)
    tifffile.imwrite(tmp_path / "cut-tiles.tif", GREY, tile=(16, 16), compression="zlib")
    np.save(tmp_path / "cut.npy", GREY)
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.save(tmp_path / "empty.npy", np.zeros((0, 4), np.uint8))
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "cmyk.jpg")
    tifffile.imwrite(tmp_path / "lab.tif", COLOUR, photometric="cielab")
    Image.fromarray(COLOUR).save(tmp_path / "frames.png", save_all=True, append_images=[Image.fromarray(COLOUR[::-1])])
    with tifffile.TiffWriter(tmp_path / "pages.tif") as writer:
        writer.write(GREY, metadata=None)
        writer.write(GREY[:40], metadata=None)
    np.savez(tmp_path / "a.npz", GREY)
    cases = [
        (tmp_path / "missing.png", "check the path"),
        (tmp_path, "a folder, not an image"),
        (file("empty.png", b""), "file is empty"),
        (file("text.png", b"<html>404</html>"), r"text \(HTML"),
        (file("a.h5", b"\x89HDF\r\n\x1a\n"), "not a readable HDF5"),
        (file("noise.tif", b"II*\0" + bytes(range(200))), "TIFF"),
        (file("noise.dat", b"abcdefghijkl"), r"not an image that is read here \(text\); read are TIFF, .*NIfTI, DICOM"),
        (file("a.webp", b"RIFF1234WEBP"), "WebP"),
        (tmp_path / "a.npz", r"save the one wanted as \.npy"),
        (cut(tmp_path / "cut.png", 0.5), "truncated or corrupt"),
        (cut(tmp_path / "cut.jpg", 0.5), "truncated or corrupt"),
        (cut(tmp_path / "cut.tif", 0.5), "TIFF|truncated"),
        (cut(tmp_path / "cut-tiles.tif", 0.5), "TIFF|truncated"),
        (cut(tmp_path / "cut.npy", 0.5), r"truncated: its header announces"),
        (tmp_path / "object.npy", "pickled"),
        (tmp_path / "empty.npy", "empty"),
        (tmp_path / "cmyk.jpg", "CMYK.*RGB"),
        (tmp_path / "lab.tif", "CIELAB.*RGB"),
        (tmp_path / "frames.png", "2 frames"),
        (tmp_path / "pages.tif", r"holds 2 images: 0 \(.*\), 1 \(.*\); choose one with .*--series"),
        (file("huge.png", png_header(100_000, 100_000)), "more than 1,073,741,824"),
        (file("bomb.png", png_header(30_000, 30_000)), "cannot hold them"),
        (file("huge.tif", tiff_header(1_000_000, 1_000_000, 8)), "cannot hold them"),
        (file("huge-plain.tif", tiff_header(1_000_000, 1_000_000)), "cannot hold them|truncated"),
    ]
    for path, message in cases:
        with pytest.raises(ImageError, match=message) as caught:
            open_image(path, ANY, network_channels=1)
        assert path.name in str(caught.value)


def test_a_corrupt_strip_is_named_when_it_is_met(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY, rowsperstrip=25, compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        offset = tif.pages[0].dataoffsets[1]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[offset : offset + 40] = b"\xff" * 40
    (tmp_path / "a.tif").write_bytes(data)
    with open_image(tmp_path / "a.tif", ANY) as source:
        np.testing.assert_array_equal(source.read(0, (0, 0), (25, 93))[0], GREY[:25])
        with pytest.raises(ImageError, match=r"a\.tif: the strip or tile at row 25, column 0 of page 0 is corrupt"):
            source.read(0, (0, 0), (26, 93))


@pytest.mark.parametrize("storage", ["strips", "deflate tiles", "ome", "imagej", "png", "npy"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_end_in_an_image_error(
    storage: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    write, _, options = STORAGES[storage]
    write(folder)
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    # Most of a file is pixels; damage in its first and last kilobyte is what a parser trips over.
    end = len(content) - 1
    places = st.integers(0, 600) | st.integers(end - 900, end) | st.integers(0, end)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        content[place] = value
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    path.write_bytes(content)
    try:
        with open_image(path, ANY, **options) as source:
            stop = tuple(min(n, 50) for n in source.shape)
            source.read(source.planes - 1, (0,) * len(stop), stop)
    except (ImageError, ContractError):
        pass


def test_a_picture_beyond_pillows_limit_is_read(tmp_path: Path) -> None:
    Image.new("1", (14_000, 13_000)).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png", ANY) as source:
        assert source.shape == (13_000, 14_000)  # Pillow refuses 179 million
    assert Image.MAX_IMAGE_PIXELS is not None  # the limit of other users of Pillow is as it was


def test_folders_are_listed_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.TIF", "c.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in list_images([tmp_path, tmp_path / "c.txt", tmp_path / "b.png"])] == [
        "a.TIF",
        "b.png",
        "c.txt",
    ]
    (tmp_path / "raw").mkdir()
    (tmp_path / "gone.tif").symlink_to(tmp_path / "nowhere.tif")
    (tmp_path / "a.TIF").with_suffix(".tfw").write_text("1")  # the image's
    Image.fromarray(GREY).save(tmp_path / "scan.001", "PNG")  # told by its first bytes
    tifffile.imwrite(tmp_path / "slide.qptiff", GREY)
    said: list[str] = []
    assert [Path(p).name for p in list_images([tmp_path], said.append)] == [
        "a.TIF",
        "b.png",
        "scan.001",
        "slide.qptiff",
    ]
    others = "1 file that is no image (c.txt); 1 broken link (gone.tif); 1 folder (raw)"
    assert said == [f"{tmp_path}: left out: {others}"]
    with pytest.raises(ImageError, match=r"a link to .*nowhere\.tif, which does not exist"):
        list_images([tmp_path / "gone.tif"])
    for k in range(7):
        (tmp_path / "raw" / f"{k}.txt").write_text("x")
    with pytest.raises(
        ImageError, match=r"holds no image: 7 files that are no images \(0\.txt, .*, \.\.\. 2 more\); read are TIFF"
    ):
        list_images([tmp_path / "raw"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no image"):
        list_images([tmp_path / "empty"])
    with pytest.raises(ImageError, match="no such file"):
        list_images([tmp_path / "nothing.png"])


def test_a_camera_s_second_picture_is_left_out_and_said(tmp_path: Path) -> None:
    """MPO: a JPEG with a preview, or the other eye's picture, behind the first."""
    first, second = Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1])
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=95)
    with open_image(tmp_path / "a.jpg", ANY) as source:
        assert "frame 0 of 2" in source.reading
        found = np.moveaxis(source.read(0, (0, 0), source.shape), 0, -1)
    with Image.open(tmp_path / "a.jpg") as opened:
        np.testing.assert_array_equal(found, np.asarray(opened))


@pytest.mark.parametrize(
    ("file", "format_name", "extra"),
    [
        ("a.czi", r"CZI \(Zeiss\)", "czi"),
        ("a.lif", r"LIF \(Leica\)", "bioio"),
        ("a.nii", "NIfTI", "nifti"),
        ("a.nii.gz", "NIfTI", "nifti"),
        ("a.mrc", "MRC", "mrc"),
        ("a.dcm", "DICOM", "dicom"),
        ("a.h5", "HDF5", "hdf5"),
        ("a.jp2", "JPEG 2000", "geo"),
    ],
)
def test_a_format_whose_library_is_missing_is_named(
    file: str, format_name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bioio", "nibabel", "mrcfile", "pydicom", "h5py"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("unet_rt.images.geo.find_spec", lambda name: None)
    heads = {
        "a.nii": b"\0" * 344 + b"n+1\0",
        "a.nii.gz": b"\x1f\x8b" + bytes(600),
        "a.mrc": b"\0" * 208 + b"MAP " + bytes(900),
        "a.dcm": b"\0" * 128 + b"DICM",
        "a.h5": b"\x89HDF\r\n\x1a\n",
        "a.jp2": b"\x00\x00\x00\x0cjP  \r\n",
    }
    (tmp_path / file).write_bytes(heads.get(file, b"ZISRAWFILE"))
    with pytest.raises(ImageError, match=rf"{file}: {format_name} is read.*missing; pip install 'unet-rt\[{extra}\]'"):
        open_image(tmp_path / file, ANY)
