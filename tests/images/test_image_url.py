"""URLs: in memory, and over HTTP from a server that counts what is fetched."""

from __future__ import annotations

import http.server
import io
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from flat_image import open_image
from PIL import Image

from unet_rt.contract.contract import Contract
from unet_rt.errors import ImageError
from unet_rt.images.listing import list_images

fsspec = pytest.importorskip("fsspec", reason="needs fsspec")
from fsspec.implementations.memory import MemoryFileSystem

zarr = pytest.importorskip("zarr", reason="needs zarr")

ANY = Contract()
PIXELS = np.random.default_rng(3).integers(0, 2**16, (700, 900), np.uint16)


def bytes_of(write: Any) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


FILES = {
    "tiles.tif": bytes_of(lambda s: tifffile.imwrite(s, PIXELS, tile=(64, 64), compression="zlib")),
    "plain.tif": bytes_of(lambda s: tifffile.imwrite(s, PIXELS)),
    "pages.tif": bytes_of(
        lambda s: tifffile.imwrite(s, np.stack([PIXELS, ~PIXELS]), photometric="minisblack", metadata=None)
    ),
    "a.npy": bytes_of(lambda s: np.save(s, PIXELS)),
    "a.png": bytes_of(lambda s: Image.fromarray(PIXELS).save(s, "PNG")),
    "text.txt": b"no picture at all, but some text that is long enough",
    "empty.tif": b"",
}


@pytest.fixture(scope="module", autouse=True)
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    for name, data in FILES.items():
        system.pipe(f"/images/{name}", data)
    zarr.create_array("memory://images/a.zarr", data=PIXELS, chunks=(128, 128))
    yield system
    system.rm("/images", recursive=True)


@pytest.mark.parametrize("name", ["tiles.tif", "plain.tif", "pages.tif", "a.npy", "a.png", "a.zarr"])
def test_windows_of_urls_are_slices(name: str) -> None:
    with open_image(f"memory://images/{name}", ANY, network_channels=1) as source:
        assert source.reading.startswith(f"{name} ")
        assert source.path is None
        plane = source.planes - 1
        expected = ~PIXELS if plane else PIXELS
        np.testing.assert_array_equal(source.read(plane, (60, 100), (500, 899))[0], expected[60:500, 100:899])


def test_fingerprints_follow_the_file(memory: Any) -> None:
    def fingerprint(name: str) -> Any:
        with open_image(f"memory://images/{name}", ANY, network_channels=1) as source:
            return source.fingerprint()

    first = fingerprint("a.npy")
    assert json.loads(json.dumps(first)) == fingerprint("a.npy")
    assert first["url"] == "memory://images/a.npy"
    memory.pipe("/images/a.npy", FILES["a.npy"])
    assert fingerprint("a.npy") != first  # written anew, later
    assert fingerprint("a.zarr") == fingerprint("a.zarr") != first


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://images/none.tif", "no such file; check the URL"),
        ("memory://images/text.txt", "not an image that is read here"),
        ("memory://images/empty.tif", "empty"),
        ("memory://images", "neither a Zarr nor a file"),
        ("nonsense://images/a.tif", "nonsense://images/a.tif: cannot be read"),
    ],
)
def test_bad_urls_are_clear_errors(url: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_image(url, ANY)


def test_levels_do_not_exist_where_there_are_none() -> None:
    for name in ("a.npy", "tiles.tif", "a.zarr"):
        with pytest.raises(ImageError, match="level 1 does not exist"):
            open_image(f"memory://images/{name}", ANY, level=1)


def test_a_damaged_chunk_is_an_error_that_names_the_window(memory: Any) -> None:
    memory.pipe("/images/torn.tif", FILES["tiles.tif"][:-4000])
    with pytest.raises(ImageError, match=r"torn\.tif: the file is truncated"):
        open_image("memory://images/torn.tif", ANY)
    zarr.create_array("memory://images/torn.zarr", data=PIXELS, chunks=(128, 128))
    memory.pipe("/images/torn.zarr/c/2/3", b"noise")
    with (
        open_image("memory://images/torn.zarr", ANY) as source,
        pytest.raises(ImageError, match=r"torn\.zarr: .*\(window \(250, 300\) to \(350, 500\)\)"),
    ):
        source.read(0, (250, 300), (350, 500))


def test_lists_keep_urls_as_they_are() -> None:
    urls = ["s3://bucket/a.zarr", "https://example.org/a.tif", "s3://bucket/a.zarr"]
    assert list_images(urls) == urls[:2]


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImageError, match=r"pip install 'unet-rt\[remote\]'"):
        open_image("memory://images/a.npy", ANY)


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves FILES, by ranges of bytes, and counts them."""

    sent = 0

    def do_HEAD(self) -> None:
        self.do_GET(False)

    def do_GET(self, body: bool = True) -> None:
        data = FILES.get(Path(self.path).name)
        if data is None:
            self.send_error(404)
            return
        low, high = 0, len(data) - 1
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            low, high = int(first), min(int(last or high), high)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(high + 1 - low))
        if asked:
            self.send_header("Content-Range", f"bytes {low}-{high}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[low : high + 1])
            Ranges.sent += high + 1 - low

    def log_message(self, *arguments: Any) -> None:
        pass


def test_a_tiff_over_http_is_read_by_ranges(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    large = np.random.default_rng(4).integers(0, 255, (4096, 4096), np.uint8)
    FILES["large.tif"] = bytes_of(lambda s: tifffile.imwrite(s, large, tile=(256, 256), compression="zlib"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with open_image(f"{address}/large.tif", ANY) as source:
            window = source.read(0, (2000, 3000), (2100, 3100))
            np.testing.assert_array_equal(window[0], large[2000:2100, 3000:3100])
        # The tags and four tiles of 64 KB, in blocks of 1 MiB: not the 16 MB of the file.
        assert Ranges.sent < len(FILES["large.tif"]) // 2
        with pytest.raises(ImageError, match=r"none\.tif"):
            open_image(f"{address}/none.tif", ANY)
        server.shutdown()


class Bucket(MemoryFileSystem):
    """A store that asks who is there: nobody may read with a name, everybody without one what is public."""

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012 - as the base class has it
    pseudo_dirs: list[str] = [""]  # noqa: RUF012

    def __init__(self, anon: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.anon = anon

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("s3://", "memory://"))

    def info(self, path: str, **options: Any) -> Any:
        if not self.anon or "secret" in path:
            raise PermissionError("Unable to locate credentials")
        return super().info(path, **options)

    def exists(self, path: str, **options: Any) -> bool:
        return self.anon and "secret" not in path and super().exists(path, **options)


@pytest.fixture
def buckets() -> Iterator[None]:
    """``s3://`` is the class above, whether or not its library is installed."""
    from fsspec.registry import _registry

    before = _registry.get("s3")
    fsspec.register_implementation("s3", Bucket, clobber=True)
    yield
    _registry.pop("s3")
    if before is not None:
        _registry["s3"] = before


@pytest.mark.usefixtures("buckets")
def test_public_buckets_are_read_without_a_name() -> None:
    system = Bucket(anon=True)
    for name in ("public/a.npy", "secret/a.npy"):
        system.pipe(f"/{name}", FILES["a.npy"])
    with open_image("s3://public/a.npy", ANY) as source:
        np.testing.assert_array_equal(source.read(0, (0, 0), (700, 900))[0], PIXELS)
    with pytest.raises(ImageError, match=r"PermissionError: .*\(anonymous access was tried, too\); check the URL"):
        open_image("s3://secret/a.npy", ANY)
    with pytest.raises(ImageError, match=r"no such file \(anonymous access was tried, too\); check the URL"):
        open_image("s3://public/none.npy", ANY)


def test_what_cannot_be_reached_is_not_missing() -> None:
    pytest.importorskip("aiohttp")
    with socket.socket() as taken:  # a port that nobody listens on
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ImageError, match=r"cannot be reached .*; check the network and the address"):
            open_image(f"http://127.0.0.1:{port}/a.tif", ANY)


def test_formats_that_are_read_from_a_disk_are_said(memory: Any) -> None:
    memory.pipe("/images/a.nii", b"\0" * 344 + b"n+1\0" + bytes(200))
    with pytest.raises(ImageError, match=r"a\.nii: NIfTI is read from a disk; download it"):
        open_image("memory://images/a.nii", ANY)
