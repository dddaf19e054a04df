"""DICOM: files and series in the units that rescaling gives, with their spacing and place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flat_image import open_image

import unet_rt as urt
from unet_rt.contract.contract import Contract
from unet_rt.drawing.microscopy import microscopy
from unet_rt.images.listing import list_images

pydicom = pytest.importorskip("pydicom", reason="needs pydicom")
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

ANY = Contract()
SLICES = np.stack([microscopy((60, 80), seed=seed).image >> 2 for seed in range(6)])


def write(
    path: Path,
    pixels: np.ndarray,
    z: float,
    series: str = "1.2.3",
    number: int = 1,
    intercept: float = -1024,
    **tags: Any,
) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.InstanceNumber, data.Modality = series, number, "CT"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelSpacing, data.SliceThickness = [0.8, 0.5], 3
    data.ImagePositionPatient, data.ImageOrientationPatient = [-20, 30, z], [1, 0, 0, 0, 1, 0]
    data.RescaleSlope, data.RescaleIntercept = 1, intercept
    data.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Slices 2.5 mm apart, their files named in no order."""
    folder = tmp_path / "scan"
    folder.mkdir()
    for k, pixels in enumerate(SLICES):
        write(folder / f"IM{(k * 5 + 2) % 6:04d}", pixels, z=-100 + 2.5 * k, number=6 - k)
    return folder


def test_a_series_is_a_volume(series: Path) -> None:
    with open_image(series, ANY, spatial=3) as source:
        assert (source.axes, source.shape, source.dtype) == ("ZYX", (6, 60, 80), np.int16)
        assert source.pixel_size_um == pytest.approx((2500, 800, 500))
        assert "rescaled by 1, -1024" in source.reading
        expected = SLICES.astype(np.int16) - 1024
        np.testing.assert_array_equal(source.read(0, (1, 10, 20), (5, 50, 80))[0], expected[1:5, 10:50, 20:80])
    with open_image(series, ANY) as source:
        assert (source.planes, source.plane_axes) == (6, "Z")
        np.testing.assert_array_equal(source.read(4, (0, 0), (60, 80))[0], expected[4])
    assert list_images([series.parent]) == [series]


def test_what_is_no_one_volume_is_said(series: Path) -> None:
    files = sorted(series.iterdir())
    by_place = {float(pydicom.dcmread(file).ImagePositionPatient[2]): file for file in files}
    by_place[-95.0].unlink()
    with open_image(series, ANY, spatial=3) as source:
        assert "WARNING: slices are 2.5 mm apart, and 1 5: some are missing" in source.reading
    write(series / "IM0009", SLICES[0], z=0, series="1.2.4", SeriesDescription="scout")
    with pytest.raises(
        urt.ImageError, match=r"holds 2 DICOM series: 0 \(5 files\), 1 scout \(1 files\); choose one with --series"
    ):
        open_image(series, ANY, spatial=3)
    for asked in (1, "1", "scout", "1.2.4"):
        with open_image(series, ANY, spatial=3, series=asked) as source:
            assert source.shape == (1, 60, 80)
    with pytest.raises(urt.ImageError, match="no single series is called 'x'"):
        open_image(series, ANY, spatial=3, series="x")
    write(series / "IM0010", SLICES[0][:50], z=3)
    with pytest.raises(urt.ImageError, match=r"IM0010 has 50x80 pixels, IM\d+ 60x80: they are no one volume"):
        open_image(series, ANY, spatial=3, series=0)


def test_slopes_may_differ_from_slice_to_slice(tmp_path: Path) -> None:
    """As in PET."""
    for k, slope in enumerate((0.5, 2.25)):
        write(tmp_path / f"{k}.dcm", SLICES[k], z=k, intercept=0, RescaleSlope=slope)
    with open_image(tmp_path, ANY, spatial=3) as source:
        found = source.read(0, (0, 0, 0), source.shape)[0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.stack([SLICES[0] * 0.5, SLICES[1] * 2.25]).astype(np.float32))


@pytest.mark.parametrize(
    "file",
    [
        "CT_small.dcm",
        "MR_small.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_RLE.dcm",
        "examples_rgb_color.dcm",
        "rtdose.dcm",
    ],
)
def test_real_files(file: str) -> None:
    """Those that pydicom ships."""
    path = get_testdata_file(file)
    data = pydicom.dcmread(path)
    expected = data.pixel_array * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0))
    with open_image(path, ANY) as source:
        found = np.stack([source.read(plane, (0, 0), source.shape) for plane in range(source.planes)])
        if "PixelSpacing" in data:
            assert source.pixel_size_um == pytest.approx([1000 * float(mm) for mm in data.PixelSpacing])
    np.testing.assert_array_equal(
        np.squeeze(found), np.moveaxis(expected, -1, 0) if data.SamplesPerPixel == 3 else expected
    )


def test_damage_and_missing_decoders_are_named(tmp_path: Path, series: Path) -> None:
    path = next(iter(sorted(series.iterdir())))
    data = path.read_bytes()
    path.write_bytes(data[:-3000])
    with (
        open_image(series, ANY, spatial=3) as source,
        pytest.raises(urt.ImageError, match=f"pixels of {path.name} cannot"),
    ):
        source.read(0, (0, 0, 0), source.shape)
    with pytest.raises(urt.ImageError, match="holds no picture"):
        open_image(get_testdata_file("reportsi.dcm"), ANY)


@pytest.mark.onnxruntime
def test_a_mask_of_a_series_lies_in_the_same_place(engine_folder: Path, series: Path, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    for k, pixels in enumerate(SLICES):
        write(series / f"IM{(k * 5 + 2) % 6:04d}", pixels, z=-100 + 2.5 * k, intercept=0)
    with urt.load(engine_folder) as engine:
        urt.predict(engine, series, out=tmp_path / "mask.nii.gz")
        expected = urt.predict(engine, SLICES, axes="ZYX")
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj).T, expected)
    # Of the voxel in column 7, row 4, slice 2: millimetres to the right, the front and the top.
    np.testing.assert_allclose(
        mask.affine @ (7, 4, 2, 1), (-(-20 + 7 * 0.5), -(30 + 4 * 0.8), -100 + 2 * 2.5, 1), atol=1e-5
    )
