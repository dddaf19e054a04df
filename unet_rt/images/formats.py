"""Kinds of image files, told by suffix and first bytes."""

from __future__ import annotations

from ..errors import ImageError

SLIDES = (".svs", ".ndpi", ".scn", ".bif", ".mrxs", ".vms", ".vmu", ".svslide")  # whole slides: the suffix decides
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".btf", ".tf8", ".npy", *SLIDES)

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_MAGIC = b"\x93NUMPY"
_FOREIGN = (  # first bytes of what people try, and what to do about it
    (b"\x89HDF", "an HDF5 file", "open it with h5py and pass the array, or save it as .npy"),
    (b"PK\x03\x04", "a zip archive (npz?)", "save the array as .npy"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"%PDF", "a PDF", "export the picture as PNG"),
    (b"\x00\x00\x00\x0cjP", "JPEG 2000", "convert it to TIFF or PNG"),
    (b"GIF8", "a GIF", "convert it to PNG"),
    (b"RIFF", "WebP or AVI", "convert it to PNG"),
    (b"<", "text (HTML or XML)", "check what was downloaded"),
    (b"version https://git-lfs", "a git-lfs pointer, not the picture", "run `git lfs pull`"),
)


def check_magic(head: bytes, name: str) -> None:
    """ImageError, with what to do, unless a file that begins so is a PNG, JPEG or BMP."""
    if head[:8] == b"\x89PNG\r\n\x1a\n" or head[:2] in (b"\xff\xd8", b"BM"):
        return
    for magic, what, way in _FOREIGN:
        if head.startswith(magic):
            raise ImageError(f"{name}: {what}; {way}")
    raise ImageError(
        f"{name}: not an image that is read here (first bytes {head[:8]!r}); PNG, JPEG, BMP, TIFF, npy, Zarr and whole "
        "slides are"
    )
