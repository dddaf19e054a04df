"""Tiling here, the network elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import unet_rt as urt
from unet_rt.cli.demo import shipped_model
from unet_rt.drawing.microscopy import microscopy
from unet_rt.engine.folder import read_folder
from unet_rt.engine.remote import connect

pytestmark = pytest.mark.onnxruntime
Array = np.ndarray[Any, Any]


class Server:
    """What stands for a server: plain ONNX Runtime, and the shapes that it was asked for."""

    def __init__(self, graph: Path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, inputs: list[Array]) -> list[Array]:
        self.shapes.append(inputs[0].shape)
        name = self.session.get_inputs()[0].name
        found: list[Array] = self.session.run(None, {name: inputs[0]})
        return found


@pytest.fixture(scope="module")
def server(engine_folder: Path) -> Server:
    return Server(read_folder(engine_folder).file("graph"))


def test_tiles_go_out_and_the_result_is_whole(engine_folder: Path, server: Server, tmp_path: Path) -> None:
    """The same mask as the engine itself gives, from any size of image, written band by band."""
    image = microscopy((500, 430), seed=77).image
    with urt.load(engine_folder) as local:
        mask = urt.predict(local, image)
        wanted = urt.predict(local, image, output="raw")
    with connect(engine_folder, server, version="plain 1") as engine:
        server.shapes.clear()
        got = urt.predict(engine, image, output="raw", tile=(192, 192), batch=3)
        assert max(shape[0] for shape in server.shapes) == 3
        assert {shape[1:] for shape in server.shapes} == {(1, 192, 192)}
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
        assert np.mean(urt.predict(engine, image) != mask) < 1e-4
        urt.predict(engine, image, out=tmp_path / "mask.tif")
        assert (tmp_path / "mask.tif").exists()
        assert engine.session_version == "plain 1"


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda found: [found[0][:, ::-1]], urt.ParityError, "fails its exam at the server"),
        (lambda found: [found[0] * np.nan], urt.ParityError, "fails its exam at the server"),
        (lambda found: [], urt.BackendError, "returned 0 outputs, the graph has 1"),
        (lambda found: [np.concatenate([found[0]] * 2)], urt.BackendError, "one result per tile"),
        (lambda found: [found[0][0]], urt.BackendError, r"output output of shape \(2, .*axes are NCYX"),
    ],
)
def test_a_server_of_something_else(
    engine_folder: Path, server: Server, wrong: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        connect(engine_folder, lambda inputs: wrong(server(inputs)))


def test_a_server_that_dies_leaves_no_output(engine_folder: Path, server: Server, tmp_path: Path) -> None:
    calls = []

    def run(inputs: list[Array]) -> list[Array]:
        calls.append(1)
        if len(calls) > 5:
            raise ConnectionResetError("the server has gone")
        return server(inputs)

    image = microscopy((700, 700), seed=78).image
    with connect(engine_folder, run) as engine, pytest.raises(ConnectionResetError):
        urt.predict(engine, image, out=tmp_path / "mask.tif", tile=(192, 192), batch=1)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_without_a_batch_axis_of_other_pixels(tmp_path: Path) -> None:
    """It gets one tile at a time, of its own axes and dtype."""
    proto = onnx.load(str(shipped_model()))
    graph = proto.graph
    for node in graph.node:
        node.input[:] = ["batch" if name == graph.input[0].name else name for name in node.input]
    make = onnx.helper.make_node
    nodes = [
        make("Cast", ["pixels"], ["single"], to=onnx.TensorProto.FLOAT),
        make("Unsqueeze", ["single", "axes"], ["batch"]),
        *graph.node,
        make("Squeeze", [graph.output[0].name, "first"], ["classes"]),
    ]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 1]), "axes"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "first"))
    outputs = [onnx.helper.make_tensor_value_info("classes", onnx.TensorProto.FLOAT, [2, "y", "x"])]
    inputs = [onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.DOUBLE, ["y", "x"])]
    bare = onnx.helper.make_graph(nodes, "bare", inputs, outputs, graph.initializer)
    model = onnx.helper.make_model(bare, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    onnx.helper.set_model_props(model, {p.key: p.value for p in proto.metadata_props})
    onnx.save(model, tmp_path / "bare.onnx")
    folder, image = tmp_path / "bare.urt", microscopy((150, 170), seed=79).image
    options: dict[str, Any] = {"backend": "onnxruntime", "precision": "fp32", "tile": (96, 96), "halo": 16}
    with urt.build(tmp_path / "bare.onnx", samples=[image], out=folder, **options) as local:
        wanted = urt.predict(local, image)
        assert [(i.axes, i.dtype) for i in local.spec.inputs] == [("YX", "float64")]
    with connect(folder, Server(read_folder(folder).file("graph"))) as engine:
        np.testing.assert_array_equal(urt.predict(engine, image), wanted)


def test_without_an_exam(engine_folder: Path, server: Server, tmp_path: Path) -> None:
    from unet_rt.engine.write import write_folder

    opened = read_folder(engine_folder)
    files = {kind: opened.file(kind) for kind in opened.files if kind != "exam"}  # type: ignore[arg-type]
    write_folder(tmp_path / "x.urt", opened.spec, files)  # type: ignore[arg-type]
    with pytest.raises(urt.EngineError, match="carries no exam to prove the server by"):
        connect(tmp_path / "x.urt", server)
    connect(tmp_path / "x.urt", server, accept_unverified=True).close()
