"""Outputs: what is written is read back equal, with its metadata, and what fails leaves nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import tifffile
from flat_image import open_image
from flat_output import open_output
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unet_rt.contract.contract import Contract
from unet_rt.errors import OutputError
from unet_rt.images.source import Source
from unet_rt.outputs import output, tiff
from unet_rt.outputs import shape as outputs_shape
from unet_rt.outputs.output import check_output
from unet_rt.system.durable import remove_unfinished

RNG = np.random.default_rng(7)


def written(path: Path, pixels: np.ndarray, cuts: list[int], **options: Any) -> Path:
    """Writes (planes, K, *spatial) pixels in bands between ``cuts``."""
    planes, channels, *spatial = pixels.shape
    options = {"channels": 0 if channels == 1 else channels, "planes": planes, "dtype": pixels.dtype} | options
    with open_output(path, shape=spatial, overwrite=True, **options) as sink:
        for plane in range(planes):
            for low, high in zip([0, *cuts], [*cuts, spatial[0]], strict=True):
                if low < high:
                    sink.write(plane, (low, *[0] * (len(spatial) - 1)), pixels[plane, :, low:high])
        sink.commit()
    return path


def read_back(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return np.array(picture)
    return tifffile.imread(path)


def stored(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    suffix = data.draw(st.sampled_from([".npy", ".tif", ".ome.tif"]))
    dtype = data.draw(st.sampled_from(["uint8", "uint16", "float32"]))
    planes, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    spatial = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=3))
    cuts = sorted(data.draw(st.lists(st.integers(0, spatial[0]), max_size=3)))
    pixels = RNG.integers(0, 255, (planes, channels, *spatial)).astype(dtype)
    folder = tmp_path_factory.mktemp("out")
    path = written(folder / f"a{suffix}", pixels, cuts)
    found = read_back(path)
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found.reshape(pixels.shape), pixels)
    assert stored(folder) == [path.name]


def test_strips_do_not_depend_on_the_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff, "STRIP_SAMPLES", 100 * 32)
    mask = (RNG.random((1, 1, 301, 100)) > 0.9).astype(np.uint8)
    first = written(tmp_path / "a.tif", mask, [1, 2, 90, 200])
    second = written(tmp_path / "b.tif", mask, [160])
    with tifffile.TiffFile(first) as a, tifffile.TiffFile(second) as b:
        assert a.pages[0].databytecounts == b.pages[0].databytecounts
        assert len(a.pages[0].dataoffsets) == 10
        assert a.pages[0].compression.name == "ADOBE_DEFLATE"
    np.testing.assert_array_equal(tifffile.imread(first), mask[0, 0])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_large_masks_are_stored_in_tiles(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    planes, channels = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    spatial = [
        *data.draw(st.sampled_from([(), (1,), (3,)])),
        data.draw(st.integers(1, 50)),
        data.draw(st.integers(33, 70)),
    ]
    cuts = sorted(data.draw(st.lists(st.integers(0, spatial[0]), max_size=4)))
    mask = RNG.integers(0, 3, (planes, channels, *spatial)).astype(data.draw(st.sampled_from(["uint8", "uint16"])))
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:  # a mask as small as here is not large
        patch.setattr(tiff, "TILED_PX", 32)
        patch.setattr(tiff, "TILE_PX", data.draw(st.sampled_from([16, 32])))
        suffix = data.draw(st.sampled_from([".tif", ".ome.tif"]))
        path = written(folder / f"a{suffix}", mask, cuts)
    np.testing.assert_array_equal(tifffile.imread(path).reshape(mask.shape), mask)
    with tifffile.TiffFile(path) as tif:
        assert all(page.is_tiled and page.compression.name == "ADOBE_DEFLATE" for page in tif.pages)


def test_tiles_and_strips_by_size(tmp_path: Path) -> None:
    """From 4097 px on; rows of tiles that are held take 128 MiB at most."""
    for shape, tile in (((10, 4096), None), ((10, 4097), (16, 512)), ((600, 5000), (512, 512))):
        path = written(tmp_path / "a.tif", np.ones((1, 1, *shape), np.uint8), [])
        with tifffile.TiffFile(path) as tif:
            page = tif.pages[0]
            assert ((page.tilelength, page.tilewidth) if page.is_tiled else None) == tile
    huge = outputs_shape.Shape((100_000, 100_000), (), "", 8, np.dtype("uint8"))
    length, width = tiff._tile(huge) or (0, 0)
    assert (length % 16, width) == (0, 512)
    assert length * 100_000 * 8 <= tiff.TILE_ROW_BYTES


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_png(tmp_path: Path, channels: int, mode: str) -> None:
    pixels = RNG.integers(0, 255, (1, channels, 30, 40)).astype(np.uint8)
    path = written(tmp_path / "a.png", pixels, [13])
    with Image.open(path) as picture:
        assert picture.mode == mode
    found = read_back(path).reshape(30, 40, channels)
    np.testing.assert_array_equal(np.moveaxis(found, -1, 0), pixels[0])


def test_png_of_16_bits(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 2**16, (1, 1, 30, 40)).astype(np.uint16)
    np.testing.assert_array_equal(read_back(written(tmp_path / "a.png", pixels, [])), pixels[0, 0])


# Metadata ----------------------------------------------------------------------------------------------------------


STACK = RNG.integers(0, 2**16, (3, 5, 30, 40), np.uint16)  # T Z Y X


def image(path: Path, kind: str, spatial: int = 2) -> Source:
    if kind == "ome":
        size = {f"PhysicalSize{a}": v for a, v in zip("XYZ", (0.5, 0.25, 2.0), strict=True)}
        units = {f"PhysicalSize{a}Unit": "µm" for a in "XYZ"}
        time = {"TimeIncrement": 1.5, "TimeIncrementUnit": "s"}
        tifffile.imwrite(path, STACK, ome=True, metadata={"axes": "TZYX", **size, **units, **time})
    elif kind == "imagej":
        metadata = {"axes": "TZYX", "unit": "um", "spacing": 2.0, "finterval": 1.5}
        tifffile.imwrite(path, STACK, imagej=True, resolution=(2, 4), metadata=metadata)
    else:
        resolution = {"resolution": (20000, 40000), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(path, STACK[0, 0], photometric="minisblack", metadata=None, **resolution)
    return open_image(path, Contract(), network_channels=1, spatial=spatial)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("spatial", [2, 3])
def test_ome_metadata_is_carried_over(tmp_path: Path, dtype: str, spatial: int) -> None:
    with image(tmp_path / "in.ome.tif", "ome", spatial) as source:
        assert source.pixel_size_um == ((0.25, 0.5) if spatial == 2 else (2.0, 0.25, 0.5))
        pixels = RNG.integers(0, 9, (source.planes, 1, *source.shape)).astype(dtype)
        path = written(tmp_path / "out.tif", pixels, [2], source=source)
    with tifffile.TiffFile(path) as tif:
        assert (tif.series[0].kind, tif.series[0].axes, tif.series[0].shape) == ("ome", "TZYX", STACK.shape)
        found = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]
    assert [found[f"PhysicalSize{a}"] for a in "XYZ"] == [0.5, 0.25, 2.0]
    assert (found["PhysicalSizeXUnit"], found["TimeIncrement"]) == ("µm", 1.5)
    with open_image(path, Contract(), network_channels=1, spatial=spatial) as again:
        assert again.pixel_size_um == source.pixel_size_um
        assert (again.plane_axes, again.plane_shape) == (source.plane_axes, source.plane_shape)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("channels", [1, 3])
def test_imagej_metadata_is_carried_over(tmp_path: Path, dtype: str, channels: int) -> None:
    with image(tmp_path / "in.tif", "imagej") as source:
        assert source.pixel_size_um == (0.25, 0.5)
        pixels = RNG.integers(0, 9, (15, channels, 30, 40)).astype(dtype)
        path = written(tmp_path / "out.tif", pixels, [2], source=source)
    with tifffile.TiffFile(path) as tif:
        assert (tif.series[0].kind, tif.series[0].axes) == ("imagej", "TZYX" if channels == 1 else "TZCYX")
        found = tif.imagej_metadata
        assert (found["spacing"], found["finterval"], found["unit"]) == (2.0, 1.5, "micron")
        assert tif.pages[0].tags["XResolution"].value == (2, 1)
        assert tif.pages[0].tags["YResolution"].value == (4, 1)
    np.testing.assert_array_equal(tifffile.imread(path).reshape(pixels.shape), pixels)


def test_resolution_tags_are_carried_over_and_follow_the_scale(tmp_path: Path) -> None:
    with image(tmp_path / "in.tif", "tiff") as source:
        assert source.pixel_size_um == (0.25, 0.5)
        whole = written(tmp_path / "out.tif", np.zeros((1, 1, 30, 40), np.uint8), [], source=source)
        half = written(tmp_path / "half.tif", np.zeros((1, 1, 15, 20), np.float32), [], source=source)
    for path, size in ((whole, (0.25, 0.5)), (half, (0.5, 1.0))):
        with open_image(path, Contract()) as again:
            assert again.pixel_size_um == size
        with tifffile.TiffFile(path) as tif:
            assert (tif.series[0].axes, tif.pages[0].tags["ResolutionUnit"].value) == ("YX", 3)


def test_a_plain_stack_stays_a_plain_stack(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "in.tif", STACK[0], photometric="minisblack", metadata=None)
    with open_image(tmp_path / "in.tif", Contract(), network_channels=1) as source:
        path = written(tmp_path / "out.tif", np.ones((5, 1, 30, 40), np.uint8), [], source=source)
    with tifffile.TiffFile(path) as tif:
        assert (len(tif.pages), tif.series[0].axes) == (5, "IYX")


def test_large_outputs_become_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff, "CLASSIC_TIFF_BYTES", 1000)
    for dtype in ("uint8", "float32"):
        pixels = RNG.integers(0, 9, (1, 1, 30, 40)).astype(dtype)
        path = written(tmp_path / f"{dtype}.tif", pixels, [7])
        with tifffile.TiffFile(path) as tif:
            assert tif.is_bigtiff
        np.testing.assert_array_equal(read_back(path), pixels[0, 0])


# Refusals ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "there.tif").write_bytes(b"old")
    (tmp_path / "folder.tif").mkdir()
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("a.jpg", {}, r"'\.jpg' is not a format written here; use \.png, \.tif"),
        ("there.tif", {}, "exists already; use --overwrite"),
        ("folder.tif", {}, "a folder has this name"),
        ("no/a.tif", {}, "does not exist; create it"),
        ("a.png", {"planes": 3}, r"PNG holds one plane.*name it a\.tif"),
        ("a.png", {"dtype": "float32"}, r"PNG holds 8 bits, or 16 .*name it a\.tif"),
        ("a.png", {"dtype": "uint16", "channels": 3}, "PNG holds 8 bits, or 16"),
        ("a.png", {"channels": 5}, "up to 4 channels"),
        ("a.png", {"shape": (10, 30, 40)}, "PNG holds one plane"),
        ("a.npy", {"shape": (10**8, 10**8)}, "are free in"),
    ]
    for name, options, message in cases:
        with pytest.raises(OutputError, match=message):
            open_output(tmp_path / name, **({"shape": (30, 40)} | options))
    assert stored(tmp_path) == ["folder.tif", "there.tif"]
    assert (tmp_path / "there.tif").read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot be written to"):
            check_output(tmp_path / "a.tif")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_without_commit_nothing_is_left(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    sink = open_output(path, shape=(30, 40), overwrite=True)

    def interrupted() -> None:
        with sink:
            sink.write(0, (0, 0), np.zeros((10, 40), np.uint8))
            assert stored(tmp_path) != [path.name]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stored(tmp_path) == [path.name]
    assert path.read_bytes() == b"old"
    sink.abort()  # again: does nothing
    with pytest.raises(ValueError, match="after it was closed"):
        sink.write(0, (10, 0), np.zeros((10, 40), np.uint8))


@pytest.mark.parametrize("suffix", ["tif", "npy", "png"])
def test_an_interruption_before_the_block_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The file is there by then, and no ``with`` that would remove it."""
    there = list[int]()

    def interrupted(made: output.Output) -> None:
        there.append(len(list(tmp_path.iterdir())))
        raise KeyboardInterrupt

    monkeypatch.setattr(output.Output, "__enter__", interrupted)
    try:
        with open_output(tmp_path / f"mask.{suffix}", shape=(30, 40)):
            raise AssertionError
    except KeyboardInterrupt:
        pass
    assert there == [1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one comes while a file is given up
@pytest.mark.parametrize("suffix", ["tif", "npy", "png"])
def test_an_interruption_at_any_line_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    """A signal's exception comes between any two lines: what the command line removes then is all that was begun."""
    package = str(Path(output.__file__).parents[1])
    lines, left = 0, list[int]()

    def interrupted(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            lines += 1
            if lines == stop:
                sys.settrace(None)  # one signal
                raise KeyboardInterrupt
        return interrupted

    before = sys.gettrace()
    for stop in range(1, 1000):
        lines = 0
        sys.settrace(interrupted)
        try:
            with open_output(tmp_path / f"mask.{suffix}", shape=(3, 4)) as sink:
                sink.write(0, (0, 0), np.zeros((3, 4), np.uint8))
                sink.commit()
        except KeyboardInterrupt:
            left.append(len(stored(tmp_path)))
            remove_unfinished()
            assert stored(tmp_path) in ([], [f"mask.{suffix}"]), f"interrupted at line {stop}"
        else:
            break
        finally:
            sys.settrace(before)
        (tmp_path / f"mask.{suffix}").unlink(missing_ok=True)
    assert stop > 50
    assert any(left)  # files were there to be removed


@pytest.mark.parametrize(
    ("start", "shape", "dtype"),
    [((5, 0), (10, 40), "u1"), ((0, 1), (10, 39), "u1"), ((0, 0), (31, 40), "u1"), ((0, 0), (2, 10, 40), "u1")]
    + [((0, 0), (10, 40), "f4")],
)
def test_bands_that_do_not_continue_are_refused(tmp_path: Path, start: Any, shape: Any, dtype: str) -> None:
    with open_output(tmp_path / "a.tif", shape=(30, 40)) as sink:
        with pytest.raises(ValueError, match=r"does not continue|block for a uint8"):
            sink.write(0, start, np.zeros(shape, dtype))
        with pytest.raises(ValueError, match="planes are not complete"):
            sink.commit()
    assert stored(tmp_path) == []


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".png", "uint8"), (".tif", "uint8"), (".tif", "float32"), (".npy", "float32")]
)
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, dtype: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pixels = RNG.integers(0, 255, (30, 40)).astype(dtype)
    sink = open_output(tmp_path / f"a{suffix}", shape=(30, 40), dtype=dtype)
    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr("unet_rt.outputs.plain.write_all", full)
    monkeypatch.setattr("unet_rt.outputs.tiff.write_all", full)

    def write() -> None:
        with sink:
            sink.write(0, (0, 0), pixels)
            sink.commit()

    with pytest.raises(OutputError, match=r"No space left on device.*nothing was left behind"):
        write()
    assert stored(tmp_path) == []


LIMITED = """
import resource, signal, sys
import numpy as np
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from unet_rt.errors import OutputError
from unet_rt.outputs.output import open_output
from unet_rt.outputs.shape import Shape
import tifffile, PIL.Image
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
pixels = np.random.default_rng(1).integers(0, 255, (300, 400)).astype(sys.argv[2])
try:
    with open_output(sys.argv[1], Shape(pixels.shape, (), "", 0, pixels.dtype)) as sink:
        for row in range(0, 300, 50):
            sink.write(0, (row, 0), pixels[row:row + 50])
        sink.commit()
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".png", "uint8"), (".tif", "uint8"), (".tif", "float32"), (".npy", "uint8")]
)
def test_a_real_limit_of_file_size_leaves_nothing(tmp_path: Path, suffix: str, dtype: str) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path / f"a{suffix}"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout, done.stderr
    assert stored(tmp_path) == []


def test_an_existing_file_is_replaced_whole(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", np.ones((1, 1, 30, 40), np.uint8), [])
    with pytest.raises(OutputError, match="--overwrite"):
        check_output(path)
    written(path, np.full((1, 1, 8, 9), 2, np.uint8), [3])
    np.testing.assert_array_equal(read_back(path), np.full((8, 9), 2))
