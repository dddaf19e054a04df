"""HDF5 and MRC, and Zarr in a zip archive: windows, axes and pixel sizes as their libraries wrote them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flat_image import open_image

import unet_rt as urt
from unet_rt.contract.contract import Contract
from unet_rt.drawing.microscopy import microscopy
from unet_rt.images.listing import list_images

ANY = Contract()
STACK = np.stack([microscopy((70, 90), seed=seed).image for seed in range(5)])


def whole(source: Any) -> np.ndarray:
    return source.read(0, (0,) * len(source.shape), source.shape)[0]


# --- HDF5 -----------------------------------------------------------------------------------------------------------

h5py = pytest.importorskip("h5py", reason="needs h5py")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """As ilastik, Fiji and a script write them, and a table beside."""
    with h5py.File(tmp_path / "vol.h5", "w") as file:
        main = file.create_dataset("exported/main", data=STACK[..., None], chunks=(2, 32, 32, 1), compression="gzip")
        main.attrs["axistags"] = json.dumps({"axes": [{"key": letter, "typeFlags": 2} for letter in "zyxc"]})
        fiji = file.create_dataset("t0/channel0", data=STACK)
        fiji.attrs["element_size_um"] = [2.0, 0.5, 0.25]
        labelled = file.create_dataset("labelled", data=STACK.transpose(2, 1, 0))
        for dimension, letter in zip(labelled.dims, "xyz", strict=True):
            dimension.label = letter
        file["names"] = ["a", "b"]
        file["row"] = np.arange(9)
    return tmp_path / "vol.h5"


@pytest.mark.parametrize(
    ("inside", "axes", "size"),
    [("/exported/main", "ZYXC", None), ("t0/channel0", "ZYX", (2.0, 0.5, 0.25)), ("/labelled", "XYZ", None)],
)
def test_an_array_of_an_hdf5_file(volume: Path, inside: str, axes: str, size: Any) -> None:
    given = f"{volume}:{inside}"
    assert list_images([given]) == [Path(given)]
    with open_image(given, ANY, spatial=3) as source:
        assert (source.axes, source.path, source.pixel_size_um) == (axes, volume, size)
        np.testing.assert_array_equal(source.read(0, (1, 20, 33), (4, 61, 90))[0], STACK[1:4, 20:61, 33:90])
        other = source.fingerprint()
    with open_image(f"{volume}:/labelled", ANY, spatial=3) as source:
        assert (source.fingerprint() == other) == (inside == "/labelled")


def test_arrays_that_are_not_named_are_listed(volume: Path, tmp_path: Path) -> None:
    with pytest.raises(
        urt.ImageError, match=r"holds 3 arrays: /exported/main \(5x70x90x1 uint16\).*e\.g\. .*vol\.h5:/exported"
    ):
        open_image(volume, ANY)
    with pytest.raises(urt.ImageError, match=r"holds no array /none; there are: /exported/main"):
        open_image(f"{volume}:/none", ANY)
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["a"] = STACK
    with open_image(tmp_path / "one.h5", ANY) as source:
        assert "array /a" in source.reading
    np.save(tmp_path / "a.npy", STACK)
    with pytest.raises(urt.ImageError, match="no such file"):
        list_images([f"{tmp_path / 'a.npy'}:/a"])
    (tmp_path / "cut.h5").write_bytes(volume.read_bytes()[:5000])
    with pytest.raises(urt.ImageError, match="not a readable HDF5 file"):
        open_image(tmp_path / "cut.h5", ANY)


@pytest.mark.onnxruntime
def test_an_hdf5_array_is_predicted(engine_folder: Path, volume: Path, tmp_path: Path) -> None:
    with urt.load(engine_folder) as engine:
        found = urt.predict(engine, f"{volume}:/exported/main")
        np.testing.assert_array_equal(found, urt.predict(engine, STACK, axes="ZYX"))
        with pytest.raises(urt.OutputError, match="is the image itself"):
            urt.predict(engine, f"{volume}:/exported/main", out=volume, overwrite=True)


# --- MRC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float32", "float16"])
@pytest.mark.parametrize("kind", ["volume", "stack", "picture"])
def test_mrc(dtype: str, kind: str, tmp_path: Path) -> None:
    mrcfile = pytest.importorskip("mrcfile")
    pixels = (STACK if kind != "picture" else STACK[0]).astype(dtype)
    with mrcfile.new(tmp_path / "a.mrc", pixels) as opened:
        opened.voxel_size = (4.0, 4.0, 8.0)
        if kind == "volume":
            opened.set_volume()
        elif kind == "stack":
            opened.set_image_stack()
    spatial = 3 if kind == "volume" else 2
    with open_image(tmp_path / "a.mrc", ANY, spatial=spatial) as source:
        assert source.axes == {"volume": "ZYX", "stack": "IYX", "picture": "YX"}[kind]
        assert source.pixel_size_um == pytest.approx((8e-4, 4e-4, 4e-4)[-spatial:])
        assert source.dtype == dtype
        np.testing.assert_array_equal(whole(source), pixels if kind == "volume" else pixels.reshape(-1, 70, 90)[0])
    with (tmp_path / "a.mrc").open("r+b") as file:
        file.truncate(7000)
    with pytest.raises(urt.ImageError, match="truncated"):
        open_image(tmp_path / "a.mrc", ANY, spatial=spatial)


# --- zipped Zarr ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("prefix", ["", "image.zarr/"])
def test_a_zipped_zarr(version: Any, prefix: str, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "image.zarr", mode="w", zarr_format=version)
    datasets = []
    for level, step in enumerate((1, 2)):
        group.create_array(str(level), data=STACK[:, ::step, ::step], chunks=(1, 32, 32))
        datasets.append(
            {
                "path": str(level),
                "coordinateTransformations": [{"type": "scale", "scale": [2.0, 0.5 * step, 0.5 * step]}],
            }
        )
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    multiscales = [{"axes": axes, "datasets": datasets, "version": "0.4"}]
    group.attrs.update(
        {"multiscales": multiscales} if version == 2 else {"ome": {"version": "0.5", "multiscales": multiscales}}
    )
    path = tmp_path / "image.ozx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted((tmp_path / "image.zarr").rglob("*")):
            if file.is_file():
                archive.write(file, prefix + str(file.relative_to(tmp_path / "image.zarr")))
    with open_image(path, ANY, spatial=3) as source:
        assert source.pixel_size_um == (2.0, 0.5, 0.5)
        np.testing.assert_array_equal(whole(source), STACK)
    with open_image(path, ANY, spatial=3, level=1) as source:
        np.testing.assert_array_equal(whole(source), STACK[:, ::2, ::2])


def test_other_archives_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", STACK)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.txt", "nothing")
    (tmp_path / "c.zip").write_bytes((tmp_path / "b.zip").read_bytes()[:40])
    for file, message in (
        ("a.npz", r"save the one wanted as \.npy"),
        ("b.zip", "without a Zarr"),
        ("c.zip", "not a readable zip"),
    ):
        with pytest.raises(urt.ImageError, match=message):
            open_image(tmp_path / file, ANY)
