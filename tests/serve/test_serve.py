"""The service as its users meet it: over HTTP, against what the command line writes."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import unet_rt as urt

httpx = pytest.importorskip("httpx2")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

pytestmark = pytest.mark.onnxruntime
TOKEN = "a-token-of-tests"


class Running:
    """``unet-rt serve`` in a process of its own, and a client of it."""

    def __init__(self, folder: Path, *options: str, before: Callable[[], None] | None = None) -> None:
        command = [sys.executable, "-m", "unet_rt", "serve", str(folder), "--port", "0", "--json", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before
        )
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if line.rstrip() == "}":
                break
        assert said, self.process.communicate()[1]
        self.url = json.loads(said)["url"]
        headers = {"Authorization": f"Bearer {TOKEN}"} if "--token" in options else {}
        self.client = httpx.Client(base_url=self.url, timeout=60, headers=headers)

    def predict(self, body: bytes, **query: str) -> Any:
        return self.client.post("/v1/predict/nuclei", content=body, params=query)

    def pids(self) -> list[int]:
        """Of the processes that compute."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(word) for word in text.split()]

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def service(engine_folder: Path, root: Path) -> Iterator[Running]:
    running = Running(engine_folder, "--allow-root", str(root), "--max-pixels", "4000000", "--threads", "1")
    yield running
    running.close()


def encode(image: NDArray[Any], kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "npy":
        np.save(stream, image)
    elif kind == "tif":
        import tifffile

        tifffile.imwrite(stream, image, photometric="minisblack")
    else:
        Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(("sent", "wanted"), [("png", "png"), ("tif", "tif"), ("npy", "npy"), ("png", "npy")])
def test_the_answer_is_the_file_that_the_command_line_writes(
    service: Running,
    engine_folder: Path,
    sample_images: list[NDArray[np.uint16]],
    tmp_path: Path,
    sent: str,
    wanted: str,
) -> None:
    image = tmp_path / f"image.{sent}"
    image.write_bytes(encode(sample_images[0], sent))
    out = tmp_path / f"mask.{wanted}"
    command = [sys.executable, "-m", "unet_rt", "predict", str(engine_folder), str(image), "--out", str(out)]
    subprocess.run([*command, "--threads", "1"], check=True, capture_output=True)
    reply = service.predict(image.read_bytes(), format=wanted)
    assert reply.status_code == 200, reply.text
    assert reply.content == out.read_bytes()
    report = json.loads(reply.headers["unet-rt-report"])
    assert report["mpx"] == pytest.approx(sample_images[0].size / 1e6)


def test_json_lists_the_objects_that_instances_hold(
    service: Running, engine_folder: Path, sample_images: list[NDArray[np.uint16]]
) -> None:
    reply = service.predict(encode(sample_images[1], "npy"), format="json").json()
    with urt.load(engine_folder) as engine:
        ids = urt.predict(engine, sample_images[1], output="instances")
    assert len(reply["objects"]) == ids.max() > 5
    assert [row["area_px"] for row in reply["objects"]] == np.bincount(ids.ravel())[1:].tolist()
    assert [f["properties"]["id"] for f in reply["geojson"]["features"]] == list(range(1, ids.max() + 1))


@pytest.mark.parametrize("suffix", ["tif", "zarr"])
def test_references_and_outputs_below_an_allowed_root(
    service: Running, engine_folder: Path, root: Path, sample_images: list[NDArray[np.uint16]], suffix: str
) -> None:
    (root / "in").mkdir(exist_ok=True)
    np.save(root / "in" / "image.npy", sample_images[0])
    reply = service.predict(b"", reference="in/image.npy", out=f"out.{suffix}")
    assert reply.status_code == 200, reply.text
    with urt.load(engine_folder) as engine:
        expected = urt.predict(engine, sample_images[0])
    if suffix == "zarr":
        import zarr

        found = np.asarray(zarr.open_group(root / "out.zarr", mode="r")["0"])
    else:
        import tifffile

        found = tifffile.imread(root / "out.tif")
    assert np.array_equal(np.squeeze(found), expected)
    again = service.predict(b"", reference="in/image.npy", out=f"out.{suffix}")
    assert again.status_code == 409
    assert "exists; choose another name" in again.json()["error"]["message"]


def bomb() -> bytes:
    """A PNG of a few bytes that declares 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], object), allow_pickle=True)
    return stream.getvalue()


def large_npy() -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (60000, 60000)})
    return stream.getvalue() + bytes(1000)


BAD: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "engine": ("/v1/predict/none", {"content": b"x"}, 404, "there is no engine 'none'; there are nuclei"),
    "type": ("/v1/predict/nuclei", {"content": b"GIF89a.."}, 415, "which is no PNG, TIFF or npy"),
    "empty": ("/v1/predict/nuclei", {"content": b""}, 400, "the body is empty"),
    "cut": ("/v1/predict/nuclei", {"content": encode(np.ones((64, 64), np.uint8), "png")[:60]}, 422, "truncated"),
    "bomb": ("/v1/predict/nuclei", {"content": bomb()}, 413, "declares 60000x60000 pixels"),
    "large": ("/v1/predict/nuclei", {"content": large_npy()}, 422, "npy"),
    "pickle": ("/v1/predict/nuclei", {"content": pickled()}, 422, "never loaded"),
    "option": ("/v1/predict/nuclei?colour=1", {"content": b"x"}, 400, "'colour' is unknown"),
    "format": ("/v1/predict/nuclei?format=gif", {"content": b"x"}, 400, "format=gif is unknown"),
    "size": ("/v1/predict/nuclei?min_size=0", {"content": b"x"}, 400, "must be 1 or more"),
    "outside": ("/v1/predict/nuclei?reference=/etc/passwd", {}, 403, "lies outside"),
    "above": ("/v1/predict/nuclei?reference=../../etc/passwd", {}, 403, "lies outside"),
    "link": ("/v1/predict/nuclei?reference=link.npy", {}, 403, "lies outside"),
    "linked folder": ("/v1/predict/nuclei?reference=links.zarr", {}, 403, "lies outside"),
    "missing": ("/v1/predict/nuclei?reference=none.png", {}, 404, "no such file"),
    "url": ("/v1/predict/nuclei?reference=http://127.0.0.1/x.tif", {}, 403, "lies outside"),
    "out": ("/v1/predict/nuclei?out=/etc/mask.png", {"content": b"x"}, 403, "lies outside"),
    "out above": ("/v1/predict/nuclei?out=../mask.png", {"content": b"x"}, 403, "lies outside"),
    "out format": ("/v1/predict/nuclei?out=mask.exe", {"content": b"x"}, 400, "says no format"),
    "route": ("/v1/nothing", {}, 404, "see /openapi.json"),
    "view": ("/v1/predict/nuclei?format=view&mask_values=0,255", {"content": b"x"}, 400, "leave mask_values away"),
    "origin": ("/v1/predict/nuclei", {"headers": {"Origin": "http://example.org"}}, 403, "may not use this service"),
    "host": ("/v1/predict/nuclei", {"headers": {"Host": "example.org"}}, 403, "is not called 'example.org'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_fact_value_and_way_out(service: Running, root: Path, tmp_path: Path, case: str) -> None:
    np.save(tmp_path / "secret.npy", np.ones((64, 64), np.uint8))
    if not (root / "link.npy").is_symlink():
        (root / "link.npy").symlink_to(tmp_path / "secret.npy")
        (root / "links.zarr").mkdir()
        (root / "links.zarr" / "0").symlink_to(tmp_path)
    path, options, status, text = BAD[case]
    reply = service.client.post(path, **options)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert text in error["message"]
    assert error["type"]
    good = service.predict(encode(np.full((64, 64), 100, np.uint16), "npy"))
    assert good.status_code == 200


def test_a_tiff_whose_header_names_files_elsewhere_reads_none_of_them(
    service: Running, root: Path, tmp_path: Path, sample_images: list[NDArray[np.uint16]]
) -> None:
    """OME-TIFF lets one file name others, also by ``..``."""
    import tifffile

    image = sample_images[0]
    mine, far = uuid.uuid4().urn, uuid.uuid4().urn
    planes = "".join(
        f'<TiffData FirstT="{t}" IFD="0" PlaneCount="1"><UUID FileName="{name}">{urn}</UUID></TiffData>'
        for t, (name, urn) in enumerate(
            [("evil.ome.tif", mine), (os.path.relpath(tmp_path / "far.ome.tif", root), far)]
        )
    )
    for path, urn in ((root / "evil.ome.tif", mine), (tmp_path / "far.ome.tif", far)):
        xml = (
            f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{urn}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeC="1" SizeT="2" SizeZ="1" '
            f'SizeX="{image.shape[1]}" SizeY="{image.shape[0]}"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}'
            "</Pixels></Image></OME>"
        )
        tifffile.imwrite(path, image, description=xml, metadata=None, photometric="minisblack")
    reply = service.predict(b"", reference="evil.ome.tif", format="npy")
    assert (reply.status_code, "split over 2 files" in reply.text) == (422, True), reply.text


def test_a_full_queue_says_when_to_come_back(engine_folder: Path) -> None:
    running = Running(engine_folder, "--queue", "1", "--threads", "1")
    try:
        with socket.create_connection((httpx.URL(running.url).host, httpx.URL(running.url).port)) as slow:
            slow.sendall(
                b"POST /v1/predict/nuclei HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n\x93NUMPY"
            )
            _wait_for(lambda: running.client.get("/health").json()["inside"] == 1)
            reply = running.predict(b"x")
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        _wait_for(lambda: running.client.get("/health").json()["inside"] == 0)  # who leaves makes room
    finally:
        running.close()


def test_a_token_is_asked_for(engine_folder: Path) -> None:
    running = Running(engine_folder, "--token", TOKEN, "--timeout", "2", "--threads", "1")
    try:
        body = encode(np.full((64, 64), 100, np.uint16), "npy")
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            reply = httpx.post(f"{running.url}/v1/predict/nuclei", content=body, headers=headers)
            assert reply.status_code == 401
            assert "Authorization: Bearer" in reply.json()["error"]["message"]
        assert httpx.get(f"{running.url}/v1/engines").status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert running.client.get("/v1/engines").json()[0]["parity"]
        (pid,) = running.pids()
        os.kill(pid, signal.SIGSTOP)  # slower than any image
        late = running.predict(body)
        os.kill(pid, signal.SIGCONT)
        assert late.status_code == 504
        assert "no result in 2 s" in late.json()["error"]["message"]
    finally:
        running.close()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux for the children of a process")
def test_a_process_that_dies_is_replaced_and_those_who_leave_free_theirs(service: Running) -> None:
    body = encode(np.full((64, 64), 100, np.uint16), "npy")
    replies: list[Any] = []
    (pid,) = service.pids()
    os.kill(pid, signal.SIGSTOP)
    asking = threading.Thread(target=lambda: replies.append(service.predict(body)))
    asking.start()
    _wait_for(lambda: service.client.get("/health").json()["inside"] == 1)
    os.kill(pid, signal.SIGKILL)
    asking.join()
    assert replies[0].status_code == 503
    assert "signal 9" in replies[0].json()["error"]["message"]
    assert service.predict(body).status_code == 200

    (pid,) = service.pids()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{service.url}/v1/predict/nuclei", content=body, timeout=0.3)
    _wait_for(lambda: service.client.get("/health").json()["inside"] == 0)
    os.kill(pid, signal.SIGCONT)
    assert service.predict(body).status_code == 200
    assert service.pids() == [pid]
    metrics = service.client.get("/metrics").text
    assert "unet_rt_worker_restarts 1.0" in metrics
    assert "unet_rt_cancelled 1.0" in metrics


@pytest.mark.parametrize("binary", [True, False])
def test_the_open_inference_protocol_gives_the_network_s_own_values(
    service: Running, engine_folder: Path, binary: bool
) -> None:
    about = service.client.get("/v2/models/nuclei").json()
    (port,), (out, *_) = about["inputs"], about["outputs"]
    tile = np.random.default_rng(1).normal(size=(1, 1, 192, 192)).astype(np.float32)
    assert port["datatype"] == "FP32"
    tensor: dict[str, Any] = {"name": port["name"], "shape": tile.shape, "datatype": "FP32"}
    asked: dict[str, Any] = {"id": "7", "inputs": [tensor]}
    if binary:
        tensor["parameters"] = {"binary_data_size": tile.nbytes}
        asked["parameters"] = {"binary_data_output": True}
        head = json.dumps(asked).encode()
        reply = service.client.post(
            "/v2/models/nuclei/infer",
            content=head + tile.tobytes(),
            headers={"Inference-Header-Content-Length": str(len(head))},
        )
        cut = int(reply.headers["inference-header-content-length"])
        said = json.loads(reply.content[:cut])
        values = np.frombuffer(reply.content[cut:], np.float32)
    else:
        tensor["data"] = tile.ravel().tolist()
        said = service.client.post("/v2/models/nuclei/infer", json=asked).json()
        values = np.array(said["outputs"][0]["data"], np.float32)
    with urt.load(engine_folder, threads=1) as engine:
        expected = engine.run(tile)[0]
    assert said["id"] == "7"
    assert said["outputs"][0]["name"] == out["name"]
    assert np.array_equal(values.reshape(said["outputs"][0]["shape"]), expected)
    assert service.client.get("/v2/models/nuclei/ready").status_code == 200
    assert service.client.get("/v2/models/none/ready").status_code == 404


def test_results_for_the_page_are_cut_into_tiles(
    service: Running, engine_folder: Path, sample_images: list[NDArray[np.uint16]]
) -> None:
    image = np.tile(sample_images[2], (4, 3))
    reply = service.predict(encode(image, "tif"), format="view").json()
    with urt.load(engine_folder) as engine:
        expected = urt.predict(engine, image)
    base = f"/v1/views/{reply['view']}"
    assert reply["shape"] == list(image.shape)
    assert reply["levels"] == 3  # 1028, 514, 257
    for level in range(3):
        tile = np.asarray(Image.open(io.BytesIO(service.client.get(f"{base}/mask/{level}/0_0.png").content)))
        assert np.array_equal(tile, expected[:: 2**level, :: 2**level][:256, :256])
    mask = service.client.get(f"{base}/mask.png").content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask))), expected)
    assert len(service.client.get(f"{base}/objects.geojson").json()["features"]) == len(reply["objects"])
    for path in (
        f"{base}/mask/9/0_0.png",
        f"{base}/spec.json",
        f"{base}/..%2f..%2fetc/0/0_0.png",
        "/v1/views/x/mask.png",
    ):
        assert service.client.get(path).status_code == 404


@pytest.mark.skipif(os.name == "nt", reason="bounds files as POSIX does")
def test_a_full_disk_costs_one_request(engine_folder: Path) -> None:
    import resource

    room = 2**20
    running = Running(engine_folder, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    try:
        large, wide, small = (np.full((side, side), 100, np.uint16) for side in (1000, 600, 64))
        full = running.predict(encode(large, "npy"))  # no room for the image
        also = running.predict(encode(wide, "npy"), format="npy", output="probability")  # nor for the result
        for reply in (full, also):
            assert reply.status_code == 507, reply.text
            assert reply.json()["error"]["message"]
        assert running.predict(encode(small, "npy")).status_code == 200
        assert running.client.get("/health").json()["inside"] == 0
    finally:
        running.close()


def test_beyond_this_machine_a_token_is_required(engine_folder: Path) -> None:
    command = [sys.executable, "-m", "unet_rt", "serve", str(engine_folder), "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "pass --token as well" in done.stderr


def _wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
