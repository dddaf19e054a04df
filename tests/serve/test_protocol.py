"""The Open Inference Protocol against the client that its makers ship (``make test-browser`` installs it)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import unet_rt as urt
from unet_rt.remote import connect

triton = pytest.importorskip("tritonclient.http", reason="make test-browser runs this", exc_type=ImportError)
pytestmark = pytest.mark.onnxruntime


@pytest.fixture(scope="module")
def url(engine_folder: Path) -> Iterator[str]:
    from test_serve import Running

    running = Running(engine_folder)
    yield running.url.removeprefix("http://")
    running.close()


@pytest.mark.parametrize("binary", [True, False])
def test_the_official_client_runs_the_network(url: str, engine_folder: Path, binary: bool) -> None:
    client = triton.InferenceServerClient(url)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("nuclei")
    assert not client.is_model_ready("none")
    about = client.get_model_metadata("nuclei")
    (port,), (out, *_) = about["inputs"], about["outputs"]
    tile = np.random.default_rng(2).normal(size=(2, 1, 192, 192)).astype(np.float32)
    given = triton.InferInput(port["name"], tile.shape, port["datatype"])
    given.set_data_from_numpy(tile, binary_data=binary)
    wanted = triton.InferRequestedOutput(out["name"], binary_data=binary)
    found = client.infer("nuclei", [given], outputs=[wanted], request_id="a").as_numpy(out["name"])
    with urt.load(engine_folder) as engine:
        assert np.array_equal(found, engine.run(tile)[0])
    client.close()


def test_images_are_tiled_here_and_run_there(
    url: str, engine_folder: Path, sample_images: list[NDArray[np.uint16]]
) -> None:
    client = triton.InferenceServerClient(url)
    about = client.get_model_metadata("nuclei")

    def run(inputs: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        given = []
        for port, array in zip(about["inputs"], inputs, strict=True):
            given.append(triton.InferInput(port["name"], array.shape, port["datatype"]))
            given[-1].set_data_from_numpy(array)
        reply = client.infer("nuclei", given)
        return [reply.as_numpy(port["name"]) for port in about["outputs"]]

    with connect(engine_folder, run) as there, urt.load(engine_folder) as here:
        for image in sample_images:
            assert np.array_equal(urt.predict(there, image), urt.predict(here, image))
    client.close()
