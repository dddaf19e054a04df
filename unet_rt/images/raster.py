"""PNG, JPEG and BMP: decoded whole by Pillow."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ImageError
from .pixels import MAX_WHOLE_PX, Array, ArrayPixels, Origin, Stored
from .places import add_place

if TYPE_CHECKING:
    from PIL import Image


# Deflate cannot shrink more than 1032 : 1, so a PNG that promises more is cut off or a bomb.
MAX_DEFLATE = 1032
ORIENTATION = 0x0112

_OPENING = threading.Lock()


def open_raster(path: Path, name: str) -> Stored:
    """ImageError for anything that Pillow cannot decode without changing the pixels' meaning."""
    from PIL import Image, UnidentifiedImageError

    try:
        with _open(path) as image:
            _check_size(image, path, name)
            frames = int(getattr(image, "n_frames", 1))
            if frames > 1 and image.format != "MPO":
                raise ImageError(f"{name}: holds {frames} frames; save the frame wanted, or a multi-page TIFF")
            if image.format == "PNG" and _png_depth(path) == 16 and image.mode != "I;16" and image.mode != "I":
                # Pillow would cut these to 8 bits without a word.
                return add_place(_png_16_bit_colour(path, name), path, turned=False)
            turned = int(image.getexif().get(ORIENTATION, 1)) != 1
            return add_place(_decode(image, name), path, turned=turned)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: cannot be decoded; its header is damaged; copy it again from its source") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: declares more than {MAX_WHOLE_PX:,} pixels; convert it to a tiled TIFF") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow reports truncated data as OSError, broken chunks as SyntaxError.
        raise ImageError(f"{name}: truncated or corrupt ({error}); copy it again from its source") from error


def _open(path: Path) -> Image.Image:
    """Image.open with this module's own size limit (``_check_size``) in place of Pillow's 179 million pixels."""
    from PIL import Image

    with _OPENING, warnings.catch_warnings():
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(image: Image.Image, path: Path, name: str) -> None:
    width, height = image.size
    if width == 0 or height == 0:
        raise ImageError(f"{name}: the image is empty ({height}x{width}); give one with pixels")
    if width * height > MAX_WHOLE_PX:
        raise ImageError(
            f"{name}: declares {height:,} x {width:,} pixels; {image.format} decodes only whole, and more than "
            f"{MAX_WHOLE_PX:,} are refused; convert it to a tiled TIFF"
        )
    bits = 1 if image.mode in ("1", "P", "L") else 16 if image.mode.startswith("I") else 24
    size = path.stat().st_size
    if image.format == "PNG" and width * height * bits / 8 > size * MAX_DEFLATE + 2**16:
        raise ImageError(
            f"{name}: declares {height:,} x {width:,} pixels in a file of {size:,} bytes, which cannot hold them; "
            "the file is truncated or malicious"
        )


def _png_depth(path: Path) -> int:
    """Bits per sample, from the header chunk."""
    with path.open("rb") as stream:
        return stream.read(25)[-1]


def _png_16_bit_colour(path: Path, name: str) -> Stored:
    try:
        import imagecodecs
    except ImportError as error:
        raise ImageError(
            f"{name}: PNG with 16 bits per colour, which Pillow cuts to 8; "
            "pip install 'unet-rt[tiff]' to read it, or save it as TIFF"
        ) from error
    try:
        array = np.asarray(imagecodecs.png_decode(path.read_bytes()))
    except imagecodecs.PngError as error:
        raise ImageError(f"{name}: truncated or corrupt ({error}); copy it again from its source") from error
    alpha = array.shape[-1] - 1 if array.ndim == 3 and array.shape[-1] in (2, 4) else None
    return Stored(ArrayPixels(array), "YXS"[: array.ndim], Origin("raster"), alpha=alpha)


def _decode(image: Image.Image, name: str) -> Stored:
    notes = []
    if (frames := int(getattr(image, "n_frames", 1))) > 1:
        notes.append(f"frame 0 of {frames}")
    resolution, unit = _resolution(image)
    orientation = int(image.getexif().get(ORIENTATION, 1))
    if image.mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        raise ImageError(f"{name}: {image.mode} colours; convert them to RGB, e.g. with Pillow's convert('RGB')")
    image.load()
    decoded: Image.Image = image
    if orientation != 1:
        from PIL import ImageOps

        decoded = ImageOps.exif_transpose(image)
        notes.append(f"turned as EXIF orientation {orientation} says")
    if decoded.mode in ("P", "PA"):
        decoded, note = _without_palette(decoded)
        notes.append(note)
    elif decoded.mode == "1":
        decoded = decoded.convert("L")
        notes.append("1 bit read as 0 and 255")
    elif "transparency" in decoded.info:
        notes.append("transparent colour ignored")
    array: Array = np.array(decoded)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype == np.int32 and image.format == "PNG":
        array = array.astype(np.uint16)  # older Pillow opens 16-bit grey PNG in its 32-bit mode
    alpha = array.shape[-1] - 1 if decoded.mode in ("LA", "RGBA") else None
    return Stored(
        ArrayPixels(array),
        "YXS"[: array.ndim],
        Origin("raster", resolution, unit),
        alpha=alpha,
        notes=tuple(notes),
        pixel_size_um=MappingProxyType({}),
    )


def _without_palette(image: Image.Image) -> tuple[Image.Image, str]:
    """Palette colours written out: grey where all of the palette is grey."""
    mode = "RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB"
    colours = image.convert(mode)
    array = np.asarray(colours)
    if mode == "RGB" and bool((array == array[..., :1]).all()):
        return colours.getchannel(0), "grey palette written out"
    return colours, "palette written out"


def _resolution(image: Image.Image) -> tuple[tuple[float, float] | None, int]:
    dpi: Any = image.info.get("dpi")
    if isinstance(dpi, tuple) and len(dpi) == 2 and all(float(value) > 0 for value in dpi):
        return (float(dpi[0]), float(dpi[1])), 2
    return None, 1
