"""Zarr images: windows are slices of the whole, metadata are kept, and damage is an error that names the window."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from flat_image import open_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unet_rt.contract.contract import Contract
from unet_rt.errors import ContractError, ImageError
from unet_rt.images.listing import list_images
from unet_rt.images.source import Source

zarr = pytest.importorskip("zarr", reason="needs zarr")

ANY = Contract()
RNG = np.random.default_rng(5)
STACK = RNG.integers(0, 2**16, (3, 2, 5, 40, 51), np.uint16)  # T C Z Y X
PLANES = np.swapaxes(STACK, 1, 2).reshape(-1, 2, 40, 51)
UNITS = {"t": "second", "z": "micrometer", "y": "nanometer", "x": "nanometer"}
TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def axes_of(letters: str) -> list[dict[str, str]]:
    return [{"name": n, "type": TYPES[n]} | ({"unit": UNITS[n]} if n in UNITS else {}) for n in letters]


def write_ome(folder: Path, array: np.ndarray, letters: str, version: str = "0.5", levels: int = 1, **how: Any) -> Path:
    """An OME-Zarr with every second pixel per level; 250 nm pixels, 2 µm slices, every 30 seconds."""
    scale = {"t": 30.0, "c": 1.0, "z": 2.0, "y": 250.0, "x": 125.0}
    group = zarr.open_group(folder, mode="w", zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for level in range(levels):
        step = 2**level
        part = np.ascontiguousarray(array[..., ::step, ::step])
        group.create_array(f"s{level}", data=part, **how)
        steps = [scale[n] * (step if n in "yx" else 1) for n in letters]
        datasets.append({"path": f"s{level}", "coordinateTransformations": [{"type": "scale", "scale": steps}]})
    multiscales = [{"axes": axes_of(letters), "datasets": datasets, "version": version}]
    omero = {"channels": [{"label": "DAPI"}, {"label": "GFP"}]}
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales, "omero": omero}
    else:
        group.attrs.update({"multiscales": multiscales, "omero": omero})
    return folder


def plain(folder: Path, array: np.ndarray, **how: Any) -> Path:
    zarr.create_array(store=folder, data=array, **how)
    return folder


Write = Callable[[Path], Path]
STORAGES: dict[str, tuple[Write, np.ndarray, dict[str, Any]]] = {
    "ome 0.4": (
        lambda f: write_ome(f, STACK, "tczyx", "0.4", chunks=(1, 1, 2, 16, 20)),
        PLANES,
        {"network_channels": 2},
    ),
    "ome 0.5, volumes": (
        lambda f: write_ome(f, STACK, "tczyx", chunks=(1, 2, 2, 17, 13)),
        STACK,
        {"network_channels": 2, "spatial": 3},
    ),
    "ome 0.5, sharded": (
        lambda f: write_ome(f, STACK[0, 0], "zyx", chunks=(1, 8, 8), shards=(1, 32, 32)),
        STACK[0, 0][:, None],
        {"network_channels": 1},
    ),
    "plain": (lambda f: plain(f, STACK[0, 0, 0], chunks=(16, 16)), STACK[:1, :1, 0], {}),
    "plain, big-endian zarr 2": (
        lambda f: plain(f, STACK[0, 0, 0].astype(">u2"), chunks=(40, 7), zarr_format=2),
        STACK[:1, :1, 0],
        {},
    ),
    "plain, named": (
        lambda f: plain(f, STACK[0], chunks=(2, 2, 40, 51), dimension_names=["c", "z", "y", "x"]),
        np.swapaxes(STACK[0], 0, 1),
        {"network_channels": 2},
    ),
    "plain, channels last": (
        lambda f: plain(f, np.ascontiguousarray(np.moveaxis(STACK[0, :, 0], 0, -1)), chunks=(9, 9, 1)),
        STACK[0, ::-1, 0][None],
        {"network_channels": 2, "channels": "1,0"},
    ),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sources: dict[str, Source] = {}

    def get(storage: str) -> Source:
        if storage not in sources:
            path = STORAGES[storage][0](tmp_path_factory.mktemp("image") / "a.zarr")
            sources[storage] = open_image(path, ANY, **STORAGES[storage][2])
        return sources[storage]

    yield get
    for source in sources.values():
        source.close()


@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_window_is_a_slice_of_the_whole(storage: str, opened: Callable[[str], Source], data: st.DataObject) -> None:
    source, whole = opened(storage), STORAGES[storage][1]
    assert (source.planes, source.channels, *source.shape) == whole.shape
    assert source.dtype == whole.dtype == source.read(0, [0] * len(source.shape), source.shape).dtype
    plane = data.draw(st.integers(0, source.planes - 1))
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in source.shape]
    window = source.read(plane, [a for a, _ in ends], [b for _, b in ends])
    np.testing.assert_array_equal(window, whole[(plane, slice(None), *(slice(a, b) for a, b in ends))])


def test_chunks_that_windows_share_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = RNG.integers(0, 255, (128, 640), np.uint8)
    loads: list[int] = []
    original = zarr.Array.__getitem__

    def spied(self: Any, window: Any) -> Any:
        found = original(self, window)
        loads.append(found.size)
        return found

    monkeypatch.setattr(zarr.Array, "__getitem__", spied)
    with open_image(plain(tmp_path / "a.zarr", pixels, chunks=(64, 64)), ANY) as source:
        for start in range(0, 120, 8):  # bands that overlap by 8 rows, as tile rows with a halo do
            band = source.read(0, (start, 5), (start + 16, 635))
            np.testing.assert_array_equal(band[0], pixels[start : start + 16, 5:635])
    assert sum(loads) == pixels.size
    assert len(loads) == 2  # a row of chunks at a time, for zarr to decode side by side


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_metadata_and_levels_are_read(tmp_path: Path, version: str) -> None:
    path = write_ome(tmp_path / "cells.ome.zarr", STACK, "tczyx", version, levels=3)
    with open_image(path, ANY, network_channels=1, channels="GFP") as source:
        assert source.reading == (
            "cells.ome.zarr TCZYX 3x2x5x40x51 uint16: channel 1 of 2, 2-D network over 15 planes (level 0 of 3)"
        )
        assert (source.plane_axes, source.plane_shape) == ("TZ", (3, 5))
        assert source.pixel_size_um == (0.25, 0.125)
        assert source.levels == ((40, 51), (20, 26), (10, 13))
        assert source.metadata.tags["PhysicalSizeZ"] == 2.0
        assert source.metadata.tags["TimeIncrement"] == 30.0
    with open_image(path, ANY, network_channels=2, spatial=3, level=2) as source:
        assert source.pixel_size_um == (2.0, 1.0, 0.5)
        np.testing.assert_array_equal(source.read(1, (0, 0, 0), source.shape), STACK[1, ..., ::4, ::4])
    with pytest.raises(ImageError, match=r"level 3 does not exist; the image has levels 0 to 2"):
        open_image(path, ANY, network_channels=2, level=3)
    with open_image(path / "s1", ANY, axes="TCZYX", network_channels=2) as source:  # one level, by its own path
        assert source.shape == (20, 26)
    with pytest.raises(ImageError, match="level 1 does not exist; the image has one level"):
        open_image(path / "s1", ANY, axes="TCZYX", network_channels=2, level=1)
    with pytest.raises(ContractError, match="DAPI, GFP"):
        open_image(path, ANY, network_channels=1)


def test_a_real_stack_is_the_same_as_ome_tiff_and_ome_zarr(shared: Path, tmp_path: Path) -> None:
    slices = np.stack([np.asarray(Image.open(p)) for p in sorted((shared / "data/isbi2012/image").iterdir())[:6]])
    size = {f"PhysicalSize{a}": v for a, v in zip("ZYX", (2.0, 0.25, 0.125), strict=True)}
    tifffile.imwrite(tmp_path / "s.ome.tif", slices, tile=(128, 128), metadata={"axes": "ZYX", **size})
    stack = write_ome(tmp_path / "s.zarr", slices, "zyx", chunks=(1, 128, 128))
    for spatial in (2, 3):
        with (
            open_image(tmp_path / "s.ome.tif", ANY, network_channels=1, spatial=spatial) as tiff,
            open_image(stack, ANY, network_channels=1, spatial=spatial) as found,
        ):
            assert (found.axes, found.shape, found.planes) == (tiff.axes, tiff.shape, tiff.planes)
            assert found.pixel_size_um == pytest.approx(tiff.pixel_size_um)
            start, stop = [1] * spatial, [n - 1 for n in found.shape]
            np.testing.assert_array_equal(found.read(0, start, stop), tiff.read(0, start, stop))


def test_groups_of_several_images_are_errors_that_name_them(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    for name in ("raw", "label"):
        group.create_array(name, data=STACK[0, 0, 0])
    with pytest.raises(ImageError, match=r"several images; name one, e\.g\. .*g\.zarr/label, .*g\.zarr/raw"):
        open_image(tmp_path / "g.zarr", ANY)
    with open_image(tmp_path / "g.zarr" / "raw", ANY) as source:
        assert source.shape == (40, 51)
    alone = zarr.open_group(tmp_path / "alone.zarr", mode="w")
    alone.create_array("raw", data=STACK[0, 0, 0])
    with open_image(tmp_path / "alone.zarr", ANY) as source:
        assert "array raw" in source.reading
    zarr.open_group(tmp_path / "none.zarr", mode="w")
    with pytest.raises(ImageError, match="holds no array"):
        open_image(tmp_path / "none.zarr", ANY)
    plate = zarr.open_group(tmp_path / "plate.zarr", mode="w")
    plate.attrs["ome"] = {"version": "0.5", "plate": {"wells": [{"path": f"A/{i}"} for i in range(7)]}}
    with pytest.raises(ImageError, match=r"a plate of many images; .*plate\.zarr/A/0.*7 in all"):
        open_image(tmp_path / "plate.zarr", ANY)


def test_an_image_inside_a_group_is_found(tmp_path: Path) -> None:
    """What bioformats2raw writes: a group of numbered images."""
    folder = tmp_path / "b.zarr"
    zarr.open_group(folder, mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    write_ome(folder / "0", STACK[0, 0], "zyx", "0.4")
    with open_image(folder, ANY, network_channels=1) as source:
        assert source.shape == (40, 51)
        assert source.pixel_size_um == (0.25, 0.125)
    write_ome(folder / "1", STACK[0, 0], "zyx", "0.4")
    with pytest.raises(ImageError, match=r"several images; name one, e\.g\. .*b\.zarr/0, .*b\.zarr/1"):
        open_image(folder, ANY, network_channels=1)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_chunk_is_an_error_that_names_the_window(tmp_path: Path, damage: str) -> None:
    pixels = STACK[0, 0]
    path = write_ome(tmp_path / "a.zarr", pixels, "zyx", chunks=(1, 16, 16))
    chunk = path / "s0" / "c" / "3" / "1" / "2"
    data = chunk.read_bytes()
    chunk.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": RNG.bytes(len(data))}[damage])
    with open_image(path, ANY, network_channels=1) as source:
        with pytest.raises(ImageError, match=r"a\.zarr: .*\(plane 3, window \(10, 20\) to \(30, 50\)\)"):
            source.read(3, (10, 20), (30, 50))
        # What can be read is read.
        np.testing.assert_array_equal(source.read(3, (0, 0), (16, 51))[0], pixels[3, :16])


def test_missing_levels_and_bad_metadata_are_errors(tmp_path: Path) -> None:
    path = write_ome(tmp_path / "a.zarr", STACK[0, 0], "zyx", levels=2)
    (path / "s1" / "zarr.json").unlink()
    with pytest.raises(ImageError, match=r"announce level s1, which is missing"):
        open_image(path, ANY, network_channels=1)
    (path / "zarr.json").write_text("{")
    with pytest.raises(ImageError, match=r"a\.zarr: not a readable Zarr"):
        open_image(path, ANY, network_channels=1)
    complex_pixels = plain(tmp_path / "c.zarr", np.ones((8, 8), np.complex64))
    with pytest.raises(ImageError, match="complex64"):
        open_image(complex_pixels, ANY)


def test_changed_metadata_are_noticed_and_change_the_fingerprint(tmp_path: Path) -> None:
    path = write_ome(tmp_path / "a.zarr", STACK[0, 0], "zyx", levels=2)
    with open_image(path, ANY, network_channels=1) as source:
        before = source.fingerprint()
        json.dumps(before)
        source.read(0, (0, 0), (8, 8))
        meta = json.loads((path / "s0" / "zarr.json").read_text())
        (path / "s0" / "zarr.json").write_text(json.dumps(meta | {"shape": [5, 80, 51]}))
        with pytest.raises(ImageError, match="changed while it was being read"):
            source.read(0, (0, 0), (8, 8))
    with open_image(path, ANY, network_channels=1) as source:
        assert source.fingerprint() != before
        assert source.shape == (80, 51)
    with open_image(path, ANY, network_channels=1, level=1) as source:
        assert source.fingerprint() != before


def test_zarr_folders_are_images_in_lists(tmp_path: Path) -> None:
    first = write_ome(tmp_path / "b.zarr", STACK[0, 0], "zyx", "0.4")
    second = plain(tmp_path / "a.zarr", STACK[0, 0, 0])
    Image.fromarray(STACK[0, 0, 0]).save(tmp_path / "c.png")
    (tmp_path / "other").mkdir()
    assert list_images([tmp_path]) == [second, first, tmp_path / "c.png"]
    assert list_images([first, "s3://bucket/x.zarr"]) == [first, "s3://bucket/x.zarr"]


def test_arrays_of_other_libraries_are_read_by_windows() -> None:
    """An object with shape, dtype and slices is enough: h5py, zarr, Dask."""

    class Lazy:
        shape, dtype = (70_000, 90_000), np.dtype("uint16")

        def __getitem__(self, window: tuple[slice, ...]) -> Any:
            rows, columns = (np.arange(n)[part] for part, n in zip(window, self.shape, strict=True))
            return (rows[:, None] * 31 + columns).astype(np.uint16)

    with open_image(Lazy(), ANY) as source:
        window = source.read(0, (60_000, 80_000), (60_004, 80_003))
        assert window.tolist() == [
            [[(y * 31 + x) % 2**16 for x in range(80_000, 80_003)] for y in range(60_000, 60_004)]
        ]
        assert source.fingerprint() is None
    stored = zarr.create_array(store={}, data=STACK[0, 0, 0], chunks=(16, 16))
    with open_image(stored, ANY) as source:
        np.testing.assert_array_equal(source.read(0, (3, 5), (20, 30))[0], STACK[0, 0, 0, 3:20, 5:30])


def test_hdf5_datasets_are_read_by_windows(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    with h5py.File(shared / "data/em3d/sample1_input.h5") as file:
        whole = file["main"][:]
        monkeypatch.setattr(h5py.Dataset, "__array__", None)  # which would load all of it
        with open_image(file["main"], ANY, network_channels=1, spatial=3) as source:
            assert source.shape == (18, 192, 192)
            np.testing.assert_array_equal(source.read(0, (3, 5, 7), (9, 50, 60))[0], whole[3:9, 5:50, 7:60])
        with open_image(file["main"], ANY, network_channels=1) as source:
            np.testing.assert_array_equal(source.read(4, (5, 7), (50, 60))[0], whole[4, 5:50, 7:60])


def test_without_zarr_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plain(tmp_path / "a.zarr", STACK[0, 0, 0])
    with monkeypatch.context() as patch:
        patch.setattr(zarr, "__version__", "2.18.3")
        with pytest.raises(ImageError, match=r"zarr 2\.18\.3 is installed; pip install --upgrade 'unet-rt\[zarr\]'"):
            open_image(path, ANY)
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImageError, match=r"missing; pip install --upgrade 'unet-rt\[zarr\]'"):
        open_image(path, ANY)


def test_chunks_larger_than_memory_are_refused(tmp_path: Path) -> None:
    zarr.create_array(store=tmp_path / "a.zarr", shape=(70_000, 70_000), chunks=(70_000, 70_000), dtype="uint8")
    with pytest.raises(ImageError, match=r"stored in chunks of 4\.9 GB, which decode only whole"):
        open_image(tmp_path / "a.zarr", ANY)
