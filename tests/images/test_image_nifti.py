"""NIfTI: windows, axes and spacing as nibabel has them, and masks that lie where their volume lies."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flat_image import open_image
from flat_output import open_output

import unet_rt as urt
from unet_rt.contract.contract import Contract
from unet_rt.drawing.microscopy import microscopy

nibabel = pytest.importorskip("nibabel", reason="needs nibabel")
DATA = Path(nibabel.__file__).parent / "tests" / "data"

ANY = Contract()
# Voxels of 0.7 x 0.9 x 3 mm of a head that is turned: X and Y are no axes of the scanner.
TURNED = np.array([[0.6, -0.4, 0.2, -80.5], [0.3, 0.8, -0.5, 12.25], [0.1, 0.2, 2.9, -7.0], [0, 0, 0, 1.0]])


@cache
def volume() -> np.ndarray:
    """(X, Y, Z), int16, some of it negative."""
    pixels = np.stack([microscopy((70, 90), seed=seed).image.T.astype(np.int16) - 1000 for seed in range(5)], -1)
    pixels.flags.writeable = False
    return pixels


def write(path: Path, pixels: np.ndarray, affine: np.ndarray = TURNED, kind: Any = nibabel.Nifti1Image) -> Path:
    image = kind(pixels, affine)
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("file", ["a.nii", "a.nii.gz", "a.hdr"])
@pytest.mark.parametrize("spatial", [2, 3])
def test_windows_axes_and_spacing_are_those_of_nibabel(file: str, spatial: int, tmp_path: Path) -> None:
    pixels = volume()
    kind = nibabel.Nifti1Pair if file.endswith(".hdr") else nibabel.Nifti1Image
    path = write(tmp_path / file, pixels, kind=kind)
    expected = np.asarray(nibabel.load(path).dataobj).T  # (Z, Y, X)
    with open_image(path, ANY, spatial=spatial) as source:
        assert (source.axes, source.dtype) == ("XYZ", np.int16)
        zooms = nibabel.load(path).header.get_zooms()
        size = [1000 * float(zoom) for zoom in zooms[::-1]]
        assert source.pixel_size_um == pytest.approx(size[-spatial:])
        if spatial == 3:
            np.testing.assert_array_equal(source.read(0, (1, 20, 33), (4, 61, 90))[0], expected[1:4, 20:61, 33:90])
        else:
            assert (source.planes, source.plane_axes) == (5, "Z")
            np.testing.assert_array_equal(source.read(3, (20, 33), (61, 90))[0], expected[3, 20:61, 33:90])


def test_scaled_values_series_and_vectors(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume(), TURNED)
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "scaled.nii")
    expected = nibabel.load(tmp_path / "scaled.nii").get_fdata().T
    with open_image(tmp_path / "scaled.nii", ANY, spatial=3) as source:
        assert "scaled by 0.5, -3" in source.reading
        np.testing.assert_array_equal(source.read(0, (0, 0, 0), source.shape)[0], expected.astype(np.float32))
    series = np.stack([volume(), volume() + 5], -1)  # X, Y, Z, T
    with open_image(write(tmp_path / "series.nii", series), ANY, spatial=3) as source:
        assert (source.planes, source.plane_axes) == (2, "T")
        np.testing.assert_array_equal(source.read(1, (0, 0, 0), source.shape)[0], series[..., 1].T)
    with open_image(
        write(tmp_path / "vectors.nii", series[:, :, :, None]), ANY, spatial=3, network_channels=2
    ) as source:
        np.testing.assert_array_equal(source.read(0, (0, 0, 0), source.shape), series.T)
    with open_image(write(tmp_path / "picture.nii", volume()[:, :, :1]), ANY) as source:
        np.testing.assert_array_equal(source.read(0, (0, 0), source.shape)[0], volume()[:, :, 0].T)


@pytest.mark.parametrize("file", ["example4d.nii.gz", "functional.nii", "example_nifti2.nii.gz", "anatomical.nii"])
def test_real_files(file: str) -> None:
    """Those that nibabel ships: MRI of heads, big-endian ones and NIfTI-2 among them."""
    expected = np.asarray(nibabel.load(DATA / file).dataobj).T
    with open_image(DATA / file, ANY, spatial=3) as source:
        last = source.planes - 1
        found = source.read(last, (0, 0, 0), source.shape)[0]
    # Scaled ones are float64 there, float32 here.
    np.testing.assert_allclose(found, expected[last] if expected.ndim == 4 else expected, rtol=2**-23)


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", volume())
    path.write_bytes(path.read_bytes()[:30_000])
    with (
        open_image(path, ANY, spatial=3) as source,
        pytest.raises(urt.ImageError, match=r"truncated or corrupt .*window"),
    ):
        source.read(0, (4, 0, 0), (5, 70, 90))
    packed = write(tmp_path / "b.nii.gz", volume())
    packed.write_bytes(packed.read_bytes()[:20_000])
    with pytest.raises(urt.ImageError, match=r"b\.nii\.gz: (truncated or corrupt|not a readable NIfTI)"):
        open_image(packed, ANY, spatial=3)
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(b"text" * 200))
    with pytest.raises(urt.ImageError, match="not a readable NIfTI file"):
        open_image(tmp_path / "c.nii.gz", ANY, spatial=3)


@pytest.mark.parametrize("out", ["mask.nii", "mask.nii.gz"])
@pytest.mark.parametrize("channels", [0, 3])
def test_outputs_lie_where_the_volume_lies(out: str, channels: int, tmp_path: Path) -> None:
    """Planes, rows and channels in any order of the file's axes; half the samples along Y and X."""
    series = np.stack([volume(), volume() + 5], -1)
    path = write(tmp_path / "a.nii.gz", series)
    with open_image(path, ANY) as source:
        assert source.plane_axes == "ZT"
        shape = (channels,) if channels else ()
        values = np.random.default_rng(0).integers(0, 255, (5, 2, *shape, 35, 45), np.uint8)
        with open_output(tmp_path / out, (35, 45), channels=channels, source=source, planes=10) as sink:
            for plane in range(10):
                for start in (0, 20):
                    z, t = divmod(plane, 2)
                    sink.write(plane, (start, 0), values[z, t][..., start : start + (20 if start == 0 else 15), :])
            sink.commit()
    found = nibabel.load(tmp_path / out)
    order = "ztcyx" if channels else "ztyx"
    expected = np.einsum(f"{order}->xyzt{'c' if channels else ''}", values)
    np.testing.assert_array_equal(np.asarray(found.dataobj), expected)
    original = nibabel.load(path)
    for corner in ((0, 0, 0), (44, 34, 4)):  # the middle of four voxels, in millimetres
        fine = original.affine @ (corner[0] * 2 + 0.5, corner[1] * 2 + 0.5, corner[2], 1)
        np.testing.assert_allclose(found.affine @ (*corner, 1), fine, atol=1e-4)
    np.testing.assert_allclose(
        found.header.get_zooms()[:3], np.array(original.header.get_zooms()[:3]) * (2, 2, 1), rtol=1e-6
    )
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.onnxruntime
def test_a_mask_has_the_affine_of_its_volume(engine_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "head.nii.gz", volume().clip(0).astype(np.uint16))
    with urt.load(engine_folder) as engine:
        urt.predict(engine, path, out=tmp_path / "mask.nii.gz")
        expected = urt.predict(engine, np.ascontiguousarray(np.asarray(nibabel.load(path).dataobj).T), axes="ZYX")
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj).T, expected)
    np.testing.assert_array_equal(mask.affine, nibabel.load(path).affine)
    assert mask.header.get_zooms() == pytest.approx(nibabel.load(path).header.get_zooms(), rel=2**-22)
    assert mask.header.get_xyzt_units()[0] == "mm"
    assert expected.any()


def test_an_output_without_a_place_keeps_its_pixel_size(tmp_path: Path) -> None:
    with open_image(volume()[..., 0].T, ANY) as source:
        options = {"source": source, "pixel_size_um": (250.0, 500.0), "dtype": "float32"}
        with open_output(tmp_path / "a.nii", (70, 90), **options) as sink:
            sink.write(0, (0, 0), np.ones((70, 90), np.float32))
            sink.commit()
    found = nibabel.load(tmp_path / "a.nii")
    assert found.shape == (90, 70)
    assert found.header.get_zooms() == (0.5, 0.25)
    with pytest.raises(urt.OutputError, match=r"NIfTI holds one axis beside space and channels"):
        open_output(tmp_path / "b.nii", (7, 9), planes=4, plane_shape=(2, 2), plane_axes="TI")
