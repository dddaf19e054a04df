"""Images behind fsspec URLs (s3://, https://, memory://, ...): Zarr and TIFF by windows, other formats whole."""

from __future__ import annotations

import errno
import io
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from ..errors import ImageError, first_line
from .formats import HEAD_BYTES, NPY_MAGIC, SLIDES, TIFF_MAGIC, kind_of, unknown_error
from .pixels import ZARR_METADATA, ArrayPixels, Origin, Stored, check_pixels, pick_level
from .raster import open_raster
from .tiff import TiffBytes, open_tiff_bytes
from .zarr import open_store

TIMEOUT = "UNET_RT_URL_TIMEOUT"  # environment variable: seconds without a byte
MAX_WHOLE_BYTES = 2**30  # of formats that are fetched whole
BLOCK_BYTES = 2**20  # fetched at a time from a TIFF: some tiles
_ANONYMOUS: dict[str, dict[str, Any]] = {  # options of the protocols' file systems
    "s3": {"anon": True},
    "s3a": {"anon": True},
    "gs": {"token": "anon"},
    "gcs": {"token": "anon"},
    "abfs": {"anon": True},
    "az": {"anon": True},
}
# Names of classes, as the libraries that raise them may be missing: aiohttp's, botocore's, requests' and Python's own.
_NETWORK = {"ClientConnectionError", "ConnectionError", "EndpointConnectionError", "TimeoutError", "gaierror"}
_NETWORK_ERRNO = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ETIMEDOUT}
_STATE = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created", "md5", "checksum")


def open_url(url: str, name: str, level: int | None = None, series: int | str | None = None) -> Stored:
    """ImageError for anything that cannot be read, with the extra or the protocol's library where one is missing."""
    try:
        import fsspec
    except ImportError as error:
        raise ImageError(f"{url}: URLs are read by fsspec, which is missing; pip install 'unet-rt[remote]'") from error
    system, path, found, options = _find(fsspec, url)
    if not found:
        return open_store(_store(url, options), name, level, url)
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
        raise ImageError(f"{url}: {_reason(error)}") from error
    return replace(stored, fingerprint=fingerprint)


_CALLED = {"hdf5": "HDF5", "jp2": "JPEG 2000", "nifti": "NIfTI", "dicom": "DICOM", "zip": "a zip archive", "mrc": "MRC"}


def _seconds() -> float:
    """How long a server may send nothing."""
    given = os.environ.get(TIMEOUT, "30")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ImageError(f"{TIMEOUT} is {given!r}; set it to seconds, e.g. 30")
    return seconds


def _options(url: str) -> dict[str, Any]:
    """What fsspec passes on to the library of the protocol, whose own time-outs are minutes."""
    seconds, protocol = _seconds(), url.partition("://")[0]
    if protocol in ("http", "https"):
        import aiohttp

        return {
            "client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)}
        }
    if protocol == "s3":
        return {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
    return {}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What an error was raised from, the nearest first."""
    while (cause := error.__cause__ or error.__context__) is not None:
        yield cause
        error = cause


def _status(error: BaseException) -> int | None:
    """What an HTTP server answered, where that is why."""
    found = (getattr(cause, "status", None) for cause in (error, *_causes(error)))
    return next((status for status in found if isinstance(status, int) and status >= 400), None)


def _reason(error: BaseException) -> str:
    """Why a server does not give what is asked for, and what to do; empty where it does, or is not what fails."""
    chain = [error, *_causes(error)]
    kinds = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    if "TooManyRedirects" in kinds:
        return "the server redirects in a loop; check the URL"
    if "NonHttpUrlRedirectClientError" in kinds or "NonHttpUrlClientError" in kinds:
        return "the server redirects to an address of another kind, which is not followed; check the URL"
    if "BadHttpMessage" in kinds:
        return "the server does not speak HTTP; check the URL"
    if "TimeoutError" in kinds:
        return f"cannot be reached (nothing came for {_seconds():g} s); try again, or allow more seconds by {TIMEOUT}"
    if "ConnectionRefusedError" in kinds:
        return "cannot be reached (the connection is refused); check the network and the address"
    status = _status(error)
    if status is not None and status != 404 and any(getattr(cause, "message", None) is not None for cause in chain):
        return f"the server answers {status}; check the URL and access, or try again"
    return ""


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


def _find(fsspec: Any, url: str) -> tuple[Any, str, dict[str, Any], dict[str, Any]]:
    """(file system, path in it, what it knows of a file, or nothing of a Zarr, options it was opened with).

    Public buckets are asked without a name where asking with one (or with none at hand) fails.

    Raises:
        ImageError: It is not there, cannot be reached, or may not be read.
    """
    anonymous = _ANONYMOUS.get(url.partition("://")[0])
    try:
        return _look(fsspec, url, {})
    except ImportError as error:  # fsspec names the library of the protocol
        raise ImageError(f"{url}: {error}") from error
    except Exception as error:  # each protocol has errors of its own: no address, no permission, no network
        if anonymous is None or _unreachable(error):
            raise _url_error(url, error) from error
    try:
        return _look(fsspec, url, anonymous)
    except Exception as error:  # as above
        raise _url_error(url, error, " (anonymous access was tried, too)") from error


def _look(fsspec: Any, url: str, options: dict[str, Any]) -> tuple[Any, str, dict[str, Any], dict[str, Any]]:
    options = _options(url) | options
    system, path = fsspec.core.url_to_fs(url, **options)
    if any(_exists(system, f"{path.rstrip('/')}/{file}") for file in ZARR_METADATA):
        return system, path, {}, options
    return system, path, system.info(path), options


def _exists(system: Any, path: str) -> bool:
    """Whether a file is there. Raises where nobody answers."""
    try:
        system.info(path)
    except FileNotFoundError as error:
        if _unreachable(error):
            raise
        return False
    return True


def _unreachable(error: BaseException) -> bool:
    """Whether the network is at fault, not the file: protocols that find nothing say so of both."""
    chain: BaseException | None = error
    while chain is not None:
        names = {kind.__name__ for kind in type(chain).__mro__}
        if names & _NETWORK or (isinstance(chain, OSError) and chain.errno in _NETWORK_ERRNO):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _url_error(url: str, error: Exception, tried: str = "") -> ImageError:
    if reason := _reason(error):
        return ImageError(f"{url}: {reason}")
    if _unreachable(error):
        return ImageError(f"{url}: cannot be reached ({first_line(error)}); check the network and the address")
    if isinstance(error, FileNotFoundError):
        return ImageError(f"{url}: no such file{tried}; check the URL")
    return ImageError(f"{url}: cannot be read ({type(error).__name__}: {error}){tried}; check the URL and access")


def _store(url: str, options: dict[str, Any]) -> Any:
    from zarr.storage import FsspecStore

    return FsspecStore.from_url(url, storage_options=options or None, read_only=True)


def _open_file(remote: _Remote, size: int, name: str, level: int | None, series: int | str | None) -> Stored:
    head = remote.read(min(size, HEAD_BYTES))
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
    kind = kind_of(head, Path(name))
    if kind is None:
        raise unknown_error(head, name)
    if kind != "raster":
        raise ImageError(f"{name}: {_CALLED.get(kind, kind)} is read from a disk; download it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(remote.read())
        return open_raster(path, name)
