"""Kinds of image files, told by suffix and first bytes."""

from __future__ import annotations

from pathlib import Path

from ..errors import ImageError

# Whole slides, and microscopes' own files: the suffix decides, as many are of another kind inside.
SLIDES = (".svs", ".ndpi", ".scn", ".bif", ".mrxs", ".vms", ".vmu", ".svslide")
# Name of the format, and the extra that reads it; None: nothing here does.
MICROSCOPES: dict[str, tuple[str, str | None]] = {
    ".czi": ("CZI (Zeiss)", "czi"),
    ".lif": ("LIF (Leica)", "bioio"),
    ".nd2": ("ND2 (Nikon)", "bioio"),
    ".lei": ("LEI (Leica)", None),
    ".lof": ("LOF (Leica)", None),
    ".oib": ("OIB (Olympus)", None),
    ".oif": ("OIF (Olympus)", None),
    ".oir": ("OIR (Olympus)", None),
    ".vsi": ("VSI (Olympus)", None),
    ".zvi": ("ZVI (Zeiss)", None),
    ".dv": ("DeltaVision", None),
    ".sld": ("SlideBook", None),
    ".ims": ("Imaris", None),
}
# Those of folders that are read whatever is inside; in folders, other files are told by their first bytes.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".btf", ".tf8", ".npy", *SLIDES)

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_MAGIC = b"\x93NUMPY"
HEAD_BYTES = 512  # that tell a kind
READ = (
    "TIFF, PNG, JPEG, BMP, npy, Zarr (also zipped), GeoTIFF, JPEG 2000, VRT, whole slides, NIfTI, DICOM, MRC, HDF5, and "
    "microscopes' own files by bioio (CZI, LIF, ND2)"
)
_KINDS = (  # (kind, offset, bytes)
    *(("tiff", 0, magic) for magic in TIFF_MAGIC),
    ("npy", 0, NPY_MAGIC),
    ("raster", 0, b"\x89PNG\r\n\x1a\n"),
    ("raster", 0, b"\xff\xd8\xff"),
    ("hdf5", 0, b"\x89HDF"),
    ("zip", 0, b"PK\x03\x04"),
    ("jp2", 0, b"\x00\x00\x00\x0cjP"),
    ("jp2", 0, b"\xff\x4f\xff\x51"),
    ("vrt", 0, b"<VRTDataset"),
    ("nifti", 344, b"n+1\0"),
    ("nifti", 344, b"ni1\0"),
    ("nifti", 4, b"n+2\0"),
    ("nifti", 4, b"ni2\0"),
    ("mrc", 208, b"MAP "),
    ("raster", 0, b"BM"),  # two bytes, which others may begin with
)
_FOREIGN = (  # first bytes of what people try, what it is, and what to do about it
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"%PDF", "a PDF", "export the picture as PNG"),
    (b"GIF8", "a GIF", "convert it to PNG"),
    (b"RIFF", "WebP or AVI", "convert it to PNG"),
    (b"<", "text (HTML or XML)", "check what was downloaded"),
    (b"version https://git-lfs", "a git-lfs pointer, not the picture", "run `git lfs pull`"),
    (b"\xd0\xcf\x11\xe0", "an OLE2 file, as old microscopes and offices write", "export it as OME-TIFF"),
    (b"OLYMPUSRAWFORMAT", "OIR (Olympus)", "export it as OME-TIFF"),
    (b"NRRD", "NRRD", "convert it to NIfTI"),
    (b"8BPS", "a Photoshop file", "export it as TIFF or PNG"),
    (b"SIMPLE  =", "FITS", "open it with astropy and pass the array, or save it as .npy"),
    (b"MATLAB", "a MATLAB file", "open it with scipy.io.loadmat and pass the array, or save it as .npy"),
    (b"\x1aE\xdf\xa3", "a video (Matroska)", "save the frames as a TIFF stack"),
)


def kind_of(head: bytes, path: Path) -> str | None:
    """The kind of a file by its suffix and first ``HEAD_BYTES``, the name of what opens it; None where nothing here does."""
    suffix = path.suffix.lower()
    if suffix in SLIDES:
        return "slide"
    if suffix in MICROSCOPES:
        return "bioio"
    if head[:2] == b"\x1f\x8b" and path.name.lower().endswith(".nii.gz"):
        return "nifti"
    if head[128:132] == b"DICM" and suffix not in SUFFIXES:
        return "dicom"  # its first bytes are free, and some look like a TIFF
    return next((kind for kind, at, magic in _KINDS if head[at : at + len(magic)] == magic), None)


def unknown_error(head: bytes, name: str) -> ImageError:
    """What is raised for a file of no kind that is read."""
    for magic, what, way in _FOREIGN:
        if head.startswith(magic):
            return ImageError(f"{name}: {what}; {way}")
    text = bool(head) and all(9 <= byte < 127 for byte in head)
    return ImageError(f"{name}: not an image that is read here{' (text)' if text else ''}; read are {READ}")
