"""DICOM by pydicom: a file, or a folder of slices that are one series, in the units that rescaling gives."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError, size_text
from .pixels import Array, ArrayPixels, ChunkedPixels, Origin, Stored, Window, check_pixels

MAGIC_AT = 128
UNEVEN = 0.05  # of the distance of two slices; where others differ by more, one is missing
MM = 1e3  # micrometres


def is_dicom_folder(folder: Path) -> bool:
    """Whether the first file of a folder is a DICOM file, so that the folder is a series rather than images."""
    try:
        files = sorted(entry.path for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
        if not files or os.path.basename(files[0]).upper() == "DICOMDIR":
            files = files[1:]
        return bool(files) and _is_dicom(files[0])
    except OSError:
        return False


def _is_dicom(file: str | Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(MAGIC_AT + 4)[MAGIC_AT:] == b"DICM"


def open_dicom(path: Path, name: str, series: int | str | None = None) -> Stored:
    """A file, or the slices of a folder from one end of the volume to the other.

    Args:
        path: Of the file or folder.
        name: For messages.
        series: Of a folder that holds several: number, description or identifier.

    Raises:
        ImageError: pydicom is missing, a file cannot be decoded, or the files are no one volume.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ImageError(f"{name}: DICOM is read by pydicom, which is missing; pip install 'unet-rt[dicom]'") from error
    if not path.is_dir():
        slices = [_read_header(pydicom, path, name)]
        return _read_file(slices[0], name)
    found = [_read_header(pydicom, file, name) for file in sorted(path.iterdir()) if file.is_file() and _is_dicom(file)]
    found = [each for each in found if each.shape]
    slices, notes, count = _pick_series(found, series, name)
    slices, spacing, uneven = _in_order(slices)
    notes += uneven
    _check_alike(slices, name)
    dtype = np.result_type(*(each.dtype for each in slices))
    shape = (len(slices), *slices[0].shape)
    check_pixels(shape, dtype, name)

    def load(window: Window) -> Array:
        return _decode(slices[window[0].start], name).astype(dtype, copy=False)[None]

    sizes = slices[0].sizes()
    sizes = {**sizes, "Z": spacing * MM} if spacing else sizes
    pixels = ChunkedPixels(shape, dtype, (1, *slices[0].shape), name, load)
    fingerprint = {
        "path": str(path.resolve()),
        "files": [[each.path.name, each.path.stat().st_size, each.path.stat().st_mtime_ns] for each in slices],
    }
    return Stored(
        pixels,
        "ZYX" if len(slices[0].shape) == 2 else "ZYXS",
        Origin("nifti", tags=_affine(slices, spacing)),
        pixel_size_um=sizes,
        notes=(*notes, *_notes(slices[0])),
        series=count,
        files=tuple(each.path for each in slices),
        fingerprint=fingerprint,
    )


@dataclass(frozen=True)
class _Slice:
    """What the header of a file says.

    Attributes:
        path: The file.
        header: Of pydicom, without the pixels.
        shape: (Y, X), with frames before and colours behind; empty where it holds no picture.
        slope, intercept: Value = stored * slope + intercept.
    """

    path: Path
    header: Any
    shape: tuple[int, ...]
    slope: float
    intercept: float

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rescaled values: integers where these are whole."""
        header = self.header
        bits, signed = int(header.BitsStored), int(header.get("PixelRepresentation", 0)) == 1
        if self.slope == 1 and self.intercept == 0:
            whole = 8 if bits <= 8 else 16 if bits <= 16 else 32
            return np.dtype(f"{'i' if signed else 'u'}{whole // 8}")
        if self.slope == 1 and self.intercept.is_integer():
            low = (-(2 ** (bits - 1)) if signed else 0) + self.intercept
            high = (2 ** (bits - 1) if signed else 2**bits) - 1 + self.intercept
            return np.dtype(np.int16 if low >= -(2**15) and high < 2**15 else np.int32)
        return np.dtype(np.float32)

    @property
    def position(self) -> float | None:
        """Millimetres along the normal of the slice; None where the file does not say."""
        place, turn = self.header.get("ImagePositionPatient"), self.header.get("ImageOrientationPatient")
        if not place or not turn:
            return None
        along = np.cross(np.asarray(turn[:3], float), np.asarray(turn[3:], float))
        return float(along @ np.asarray(place, float))

    def sizes(self) -> dict[str, float]:
        """Micrometres along Y and X, and along Z where there are frames."""
        spacing = self.header.get("PixelSpacing") or self.header.get("ImagerPixelSpacing") or ()
        groups = self.header.get("SharedFunctionalGroupsSequence")
        measures = groups[0].get("PixelMeasuresSequence") if groups else None
        if measures and not spacing:
            spacing = measures[0].get("PixelSpacing") or ()
        sizes = {axis: float(mm) * MM for axis, mm in zip("YX", spacing, strict=False)}
        apart = self.header.get("SpacingBetweenSlices") or (measures[0].get("SliceThickness") if measures else None)
        return sizes | ({"Z": float(apart) * MM} if apart else {})


def _read_header(pydicom: Any, path: Path, name: str) -> _Slice:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        if "Rows" not in header or "Columns" not in header:
            return _Slice(path, header, (), 1.0, 0.0)
        frames, samples = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
        shape = (int(header.Rows), int(header.Columns))
        shape = (*((frames,) if frames > 1 else ()), *shape, *((samples,) if samples > 1 else ()))
        slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
        return _Slice(path, header, shape, 1.0 if slope is None else float(slope), float(intercept or 0))
    except Exception as error:  # headers hold any bytes; whatever the parser raises, the file is at fault
        raise ImageError(f"{name}: {path.name} is no readable DICOM file ({error}); copy it again") from error


def _read_file(one: _Slice, name: str) -> Stored:
    if not one.shape:
        raise ImageError(f"{name}: the DICOM file holds no picture (a report or an index); name another")
    array = _decode(one, name)
    colours = int(one.header.get("SamplesPerPixel") or 1) > 1
    axes = ("Z" if int(one.header.get("NumberOfFrames") or 1) > 1 else "") + "YX" + ("S" if colours else "")
    return Stored(ArrayPixels(array), axes, Origin("array"), pixel_size_um=one.sizes(), notes=_notes(one))


def _decode(one: _Slice, name: str) -> Array:
    """The pixels of a file, rescaled."""
    import pydicom

    try:
        stored = np.asarray(pydicom.dcmread(one.path).pixel_array)
    except Exception as error:  # decoders raise what they like on bad bytes, or are missing
        raise ImageError(
            f"{name}: the pixels of {one.path.name} cannot be decoded ({str(error).splitlines()[0]}); where a decoder is "
            "missing: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        ) from error
    if one.slope == 1 and one.intercept == 0:
        return stored.astype(one.dtype, copy=False)
    return (stored.astype(np.float64) * one.slope + one.intercept).astype(one.dtype)


def _pick_series(found: Sequence[_Slice], asked: int | str | None, name: str) -> tuple[list[_Slice], list[str], int]:
    """(slices of one series, notes, number of series).

    Raises:
        ImageError: There are several and none was chosen, or there is no such one.
    """
    series: dict[str, list[_Slice]] = {}
    for each in found:
        series.setdefault(str(each.header.get("SeriesInstanceUID", "")), []).append(each)
    if not series:
        raise ImageError(f"{name}: the DICOM files hold no picture; name another folder")
    texts = [str(slices[0].header.get("SeriesDescription", "")) for slices in series.values()]
    listed = ", ".join(
        f"{number}{f' {text}' if text else ''} ({len(slices)} files)"
        for number, (text, slices) in enumerate(zip(texts, series.values(), strict=True))
    )
    if asked is None:
        if len(series) > 1:
            raise ImageError(
                f"{name}: holds {len(series)} DICOM series: {listed}; choose one with --series, or name the files"
            )
        return next(iter(series.values())), [], 1
    picked = [
        slices
        for number, ((uid, slices), text) in enumerate(zip(series.items(), texts, strict=True))
        if asked in (number, str(number), uid, text)
    ]
    if len(picked) != 1:
        raise ImageError(f"{name}: no single series is called {asked!r}; there are {listed}; choose with --series")
    return picked[0], [f"series {asked} of {len(series)}"], len(series)


def _in_order(slices: Sequence[_Slice]) -> tuple[list[_Slice], float, list[str]]:
    """(slices along the normal, millimetres from one to the next, what is to be said)."""
    placed = [(each.position, each) for each in slices]
    if any(position is None for position, _ in placed):
        by_number = sorted(slices, key=lambda each: (int(each.header.get("InstanceNumber") or 0), each.path.name))
        apart = by_number[0].header.get("SpacingBetweenSlices") or by_number[0].header.get("SliceThickness") or 0
        return by_number, float(apart), ["slices by number, as the files say no place"] if len(slices) > 1 else []
    ordered = sorted(placed, key=lambda item: (item[0] or 0.0, item[1].path.name))
    steps = [float(b or 0) - float(a or 0) for (a, _), (b, _) in pairwise(ordered)]
    if not steps:
        return [each for _, each in ordered], float(slices[0].header.get("SliceThickness") or 0), []
    step = float(np.median(steps))
    odd = [each for each in steps if not math.isclose(each, step, rel_tol=UNEVEN, abs_tol=1e-3)]
    notes = (
        [f"WARNING: slices are {step:g} mm apart, and {len(odd)} {max(odd, key=abs):g}: some are missing"]
        if odd
        else []
    )
    return [each for _, each in ordered], step, notes


def _check_alike(slices: Sequence[_Slice], name: str) -> None:
    odd = next((each for each in slices if each.shape != slices[0].shape), None)
    if odd is not None:
        raise ImageError(
            f"{name}: {odd.path.name} has {size_text(odd.shape)} pixels, {slices[0].path.name} "
            f"{size_text(slices[0].shape)}: they are no one volume; name the files"
        )
    if int(slices[0].header.get("NumberOfFrames") or 1) > 1:
        raise ImageError(f"{name}: files of several frames each; name the files")


def _notes(one: _Slice) -> tuple[str, ...]:
    notes = []
    if one.slope != 1 or one.intercept != 0:
        notes.append(f"rescaled by {one.slope:g}, {one.intercept:+g}")
    if str(one.header.get("PhotometricInterpretation", "")) == "MONOCHROME1":
        notes.append("white is zero: values as stored")
    return tuple(notes)


def _affine(slices: Sequence[_Slice], step: float) -> dict[str, Any]:
    """As NIfTI places voxels (X, Y, Z) in millimetres, to the right, the front and the top; empty where files do not say."""
    first = slices[0].header
    place, turn = first.get("ImagePositionPatient"), first.get("ImageOrientationPatient")
    spacing = first.get("PixelSpacing")
    if not place or not turn or not spacing or not step:
        return {}
    row, column = np.asarray(turn[:3], float), np.asarray(turn[3:], float)
    affine = np.eye(4)
    affine[:3, 0] = row * float(spacing[1])
    affine[:3, 1] = column * float(spacing[0])
    affine[:3, 2] = np.cross(row, column) * step
    affine[:3, 3] = np.asarray(place, float)
    affine[:2] *= -1  # DICOM counts to the left and the back
    return {"affine": tuple(map(tuple, affine.tolist())), "unit": "mm", "codes": (1, 1)}
