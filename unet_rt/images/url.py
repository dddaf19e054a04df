"""Images behind fsspec URLs (s3://, https://, memory://, ...): Zarr and TIFF by windows, other formats whole."""

from __future__ import annotations

import io
import tempfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from ..errors import ImageError
from .formats import NPY_MAGIC, SLIDES, TIFF_MAGIC, check_magic
from .pixels import ZARR_METADATA, ArrayPixels, Origin, Stored, check_pixels, pick_level
from .raster import open_raster
from .tiff import TiffBytes, open_tiff_bytes
from .zarr import open_store

MAX_WHOLE_BYTES = 2**30  # of formats that are fetched whole
BLOCK_BYTES = 2**20  # fetched at a time from a TIFF: some tiles
_STATE = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created", "md5", "checksum")


def open_url(url: str, name: str, level: int | None = None, series: int | str | None = None) -> Stored:
    """ImageError for anything that cannot be read, with the extra or the protocol's library where one is missing."""
    try:
        import fsspec
    except ImportError as error:
        raise ImageError(f"{url}: URLs are read by fsspec, which is missing; pip install 'unet-rt[remote]'") from error
    try:
        system, path = fsspec.core.url_to_fs(url)
        is_zarr = any(system.exists(f"{path.rstrip('/')}/{file}") for file in ZARR_METADATA)
        found = {} if is_zarr else system.info(path)
    except ImportError as error:  # fsspec names the library of the protocol
        raise ImageError(f"{url}: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{url}: no such file; check the URL") from error
    except Exception as error:  # each protocol has errors of its own: no address, no permission, no network
        raise ImageError(
            f"{url}: cannot be read ({type(error).__name__}: {error}); check the URL and access"
        ) from error
    if is_zarr:
        return open_store(_store(url), name, level, url)
    size = found.get("size")
    if found.get("type") == "directory" or size is None:
        raise ImageError(f"{url}: neither a Zarr nor a file of known size; name one, or download it")
    state = {key: str(found[key]) for key in _STATE if key in found}
    fingerprint = {"url": url, "size": int(size), "level": level or 0, **state}
    fingerprint |= {} if series is None else {"series": series}
    try:
        stored = _open_file(_Remote(system, path), int(size), name, level, series)
    except ImageError:
        raise
    except Exception as error:  # as above, in the middle of reading
        raise ImageError(
            f"{url}: cannot be read ({type(error).__name__}: {error}); check the URL and access"
        ) from error
    return replace(stored, fingerprint=fingerprint)


class _Remote:
    """One file of a file system."""

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path

    @property
    def suffix(self) -> str:
        return PurePosixPath(self._path).suffix.lower()

    def open(self) -> IO[bytes]:
        stream: IO[bytes] = self._system.open(self._path, "rb", block_size=BLOCK_BYTES)
        return stream

    def read(self, stop: int | None = None) -> bytes:
        data: bytes = self._system.cat_file(self._path, start=0, end=stop)
        return data


def _store(url: str) -> Any:
    from zarr.storage import FsspecStore

    return FsspecStore.from_url(url, read_only=True)


def _open_file(remote: _Remote, size: int, name: str, level: int | None, series: int | str | None) -> Stored:
    head = remote.read(min(size, 32))
    if not head:
        raise ImageError(f"{name}: the file is empty (0 bytes); copy it again from its source")
    if head[:4] in TIFF_MAGIC:
        found = open_tiff_bytes(TiffBytes(size, remote.open), name, level, series)
        if remote.suffix in SLIDES:
            found = replace(found, notes=(*found.notes, "read as a plain TIFF, without its pixel size"))
        return found
    if remote.suffix in SLIDES:
        raise ImageError(f"{name}: {remote.suffix} slides are read from a disk; download it")
    pick_level(level, 1, name)
    if size > MAX_WHOLE_BYTES:
        raise ImageError(
            f"{name}: {size / 1e9:.1f} GB that can only be fetched whole; convert it to Zarr or a tiled TIFF, or "
            "download it"
        )
    if head[:6] == NPY_MAGIC:
        array = np.load(io.BytesIO(remote.read()), allow_pickle=False)
        native = array.dtype.newbyteorder("=")
        check_pixels(array.shape, native, name)
        return Stored(ArrayPixels(array.astype(native, copy=False)), None, Origin("array"))
    check_magic(head, name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(remote.read())
        return open_raster(path, name)
