"""One suite for all backends: what a session promises, whatever library is behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import unet_rt
from unet_rt import backends
from unet_rt.backends import openvino as openvino_backend
from unet_rt.backends import session
from unet_rt.backends.onnxruntime import backend as onnxruntime_backend
from unet_rt.backends.onnxruntime import library as onnxruntime_library
from unet_rt.backends.session import Session
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import BackendError, GraphError
from unet_rt.graph import precision as onnx_file
from unet_rt.system import facts as machine
from unet_rt.system import limits

Array = np.ndarray[Any, np.dtype[Any]]
Load = Callable[..., Session]

GRAPHS = ("onnxruntime", "openvino")  # they run ONNX files
ENGINES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in GRAPHS]
ALL = [*ENGINES, pytest.param("eager", marks=pytest.mark.torch)]

TRAINED = Path(unet_rt.__file__).parent / "data" / "nuclei.onnx"  # 2-D, 3 poolings, bilinear, (N, 1, Y, X) -> 2 classes


# -------------------------------------------------------------------------------------------------- graphs and sessions


def torch_module(path: Path, *, double: bool = False) -> Any:
    """The graph as a PyTorch module: an interpreter of the few operators these tests need."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    graph = onnx.load(str(path)).graph

    class Interpreter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = {}
            for index, tensor in enumerate(graph.initializer):
                value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
                self.register_buffer(f"value{index}", value.double() if double else value)
                self.places[tensor.name] = f"value{index}"

        def forward(self, *inputs: Any) -> list[Any]:
            values: dict[str, Any] = {name: getattr(self, place) for name, place in self.places.items()}
            values |= {port.name: value for port, value in zip(graph.input, inputs, strict=True)}
            for node in graph.node:
                given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                args = [values.get(name) for name in node.input]
                values[node.output[0]] = self.apply(node.op_type, args, given)
            return [values[port.name] for port in graph.output]

        def apply(self, op: str, args: list[Any], given: dict[str, Any]) -> Any:  # type: ignore[override]
            if op == "Constant":
                return torch.from_numpy(numpy_helper.to_array(given["value"]).copy())
            if op == "Relu":
                return torch.relu(args[0])
            if op == "Concat":
                return torch.cat(args, given["axis"])
            if op == "Resize":
                scale = tuple(args[2].tolist()[2:])
                return F.interpolate(args[0], scale_factor=scale, mode="bilinear", align_corners=False)
            dims = args[0].ndim - 2
            if op == "MaxPool":
                pool = F.max_pool2d if dims == 2 else F.max_pool3d
                return pool(args[0], given["kernel_shape"], given["strides"])
            assert op == "Conv", op
            padding = given.get("pads", [0] * dims)[:dims]
            bias = args[2] if len(args) > 2 else None
            return (F.conv2d if dims == 2 else F.conv3d)(args[0], args[1], bias, padding=padding)

    return Interpreter().eval()


def load(name: str, path: Path, *, threads: int = 1) -> Session:
    """Session of a graph on any backend."""
    backend: Any = backends.get(name)
    graph = torch_module(path) if name == "eager" else path
    return backend.load(graph, precision="fp32", device="cpu", threads=threads)  # type: ignore[no-any-return]


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, Array],
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def whole_numbers(rng: np.random.Generator, *shape: int) -> Array:
    """Small integers as float32: sums of their products are exact in any order."""
    return rng.integers(-8, 9, shape).astype(np.float32)


@pytest.fixture(scope="module")
def pixels() -> Array:
    """(1, 1, 512, 512) float32: a drawn micrograph, zero mean and unit deviation."""
    image = microscopy((512, 512), seed=3).image.astype(np.float32)
    return ((image - image.mean()) / image.std())[None, None]


@pytest.fixture
def two_ports(tmp_path: Path) -> tuple[Path, Array]:
    """Graph of two inputs (1 and 2 channels) and two outputs (full and half size), and its weights."""
    weights = whole_numbers(np.random.default_rng(0), 4, 3, 3, 3)
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["ab"], axis=1),
        helper.make_node("Conv", ["ab", "w"], ["full"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["full"], ["half"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    proto = model(
        nodes,
        {"a": ["N", 1, "Y", "X"], "b": ["N", 2, "Y", "X"]},
        {"half": ["N", 4, "Yh", "Xh"], "full": ["N", 4, "Y", "X"]},
        {"w": weights},
    )
    path = tmp_path / "two.onnx"
    onnx.save(proto, str(path))
    return path, weights


def convolved(x: Array, w: Array) -> Array:
    """Valid convolution of (N, C, *spatial) with (K, C, *kernel), by definition."""
    dims = x.ndim - 2
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], tuple(range(2, x.ndim)))
    axes = [1, *range(x.ndim, x.ndim + dims)]
    return np.moveaxis(np.tensordot(windows, w, (axes, [1, *range(2, w.ndim)])), -1, 1)


# ---------------------------------------------------------------------------------------------------------- conformance


@pytest.mark.torch
@pytest.mark.onnxruntime
@pytest.mark.parametrize("name", ALL)
def test_a_trained_network_is_near_the_baseline(name: str, pixels: Array) -> None:
    import torch

    tile = pixels[:, :, 40:200, 40:232]
    with torch.inference_mode():
        exact = torch_module(TRAINED, double=True)(torch.from_numpy(tile).double())[0].numpy()
    with load("onnxruntime", TRAINED) as baseline, load(name, TRAINED) as tested:
        rounding = np.abs(baseline.run([tile])[0] - exact).max()
        output = tested.run([tile])[0]
        assert tested.precision == "fp32"
        assert tested.device == "cpu"
        assert tested.version.split()[0] in ("onnxruntime", "openvino", "torch")
    assert output.dtype == np.float32
    assert 0 < rounding < 1e-3 * np.abs(exact).max()
    # Another order of summation rounds differently, by no more than a few times as much.
    assert np.abs(output - exact).max() <= 4 * rounding


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_identical_rows_give_identical_answers(name: str, batch: int, pixels: Array) -> None:
    tile = pixels[:, :, :96, :128]
    with load(name, TRAINED) as tested:
        rows = tested.run([np.repeat(tile, batch, axis=0)])[0]
        other = tested.run([np.concatenate([pixels[:, :, 96:192, :128]] * (batch - 1) + [tile])])[0]
    assert rows.shape == (batch, 2, 96, 128)
    assert all(np.array_equal(row, rows[0]) for row in rows)
    # What else is in the batch does not matter either.
    np.testing.assert_array_equal(other[-1], rows[0])


@pytest.mark.parametrize("name", ALL)
def test_several_inputs_and_outputs_in_graph_order(name: str, two_ports: tuple[Path, Array]) -> None:
    path, weights = two_ports
    rng = np.random.default_rng(1)
    with load(name, path) as tested:
        for shape in [(2, 6, 8), (1, 10, 4), (2, 6, 8)]:
            batch, *size = shape
            a, b = whole_numbers(rng, batch, 1, *size), whole_numbers(rng, batch, 2, *size)
            half, full = tested.run([a, b])
            padded = np.pad(np.concatenate([a, b], 1), [(0, 0), (0, 0), (1, 1), (1, 1)])
            wanted = convolved(padded, weights)
            np.testing.assert_array_equal(full, wanted)
            blocks = wanted.reshape(batch, 4, size[0] // 2, 2, size[1] // 2, 2)
            np.testing.assert_array_equal(half, blocks.max((3, 5)))


@pytest.mark.parametrize("name", ALL)
def test_three_dimensions(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = whole_numbers(rng, 3, 2, 2, 3, 3)
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[2, 3, 3])
    shape = ["N", 2, "Z", "Y", "X"]
    path = tmp_path / "volume.onnx"
    onnx.save(model([node], {"x": shape}, {"y": ["N", 3, "Zo", "Yo", "Xo"]}, {"w": weights}), str(path))
    x = whole_numbers(rng, 2, 2, 5, 7, 6)
    with load(name, path) as tested:
        np.testing.assert_array_equal(tested.run([x])[0], convolved(x, weights))


@pytest.mark.parametrize("name", ALL)
def test_threads_change_no_answer(name: str, pixels: Array) -> None:
    outputs = []
    for threads in (1, 2):
        with load(name, TRAINED, threads=threads) as tested:
            assert tested.threads == threads
            outputs.append(tested.run([pixels[:, :, :256, :256]])[0])
    if name == "eager":  # promises nothing about its order of summation
        np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5 * np.abs(outputs[0]).max())
    else:
        np.testing.assert_array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize("name", ALL)
def test_zero_threads_are_those_of_the_machine(name: str) -> None:
    with load(name, TRAINED, threads=0) as tested:
        assert tested.threads == limits.threads()
    with pytest.raises(BackendError, match="-1 threads"):
        load(name, TRAINED, threads=-1)


@pytest.mark.parametrize("name", ALL)
def test_outputs_belong_to_the_caller(name: str, pixels: Array) -> None:
    tiles = [pixels[:, :, k : k + 64, :64].copy() for k in range(0, 256, 64)]
    before = [tile.copy() for tile in tiles]
    with load(name, TRAINED) as tested:
        held = [tested.run([tile])[0] for tile in tiles]
        copies = [output.copy() for output in held]
        again = [tested.run([tile])[0] for tile in reversed(tiles)]
    for tile, untouched in zip(tiles, before, strict=True):
        np.testing.assert_array_equal(tile, untouched)
    for output, copy, second in zip(held, copies, reversed(again), strict=True):
        np.testing.assert_array_equal(output, copy)  # later runs and close() left it alone
        np.testing.assert_array_equal(output, second)
        assert output.flags.writeable
        assert output.flags.c_contiguous


@pytest.mark.parametrize("name", ALL)
def test_any_strides_and_read_only_inputs(name: str, pixels: Array) -> None:
    tile = pixels[:, :, :128, :96][:, :, ::-1, ::-2]
    frozen = np.ascontiguousarray(tile)
    frozen.flags.writeable = False
    with load(name, TRAINED) as tested:
        np.testing.assert_array_equal(tested.run([tile])[0], tested.run([frozen])[0])
        np.testing.assert_array_equal(tested.run([tile.astype(np.float64)])[0], tested.run([frozen])[0])


@pytest.mark.parametrize("name", ALL)
def test_an_output_that_is_an_input_is_a_copy(name: str, tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    path = tmp_path / "relu.onnx"
    onnx.save(model([node], {"x": ["N", 1, "Y", "X"]}, {"y": ["N", 1, "Y", "X"]}, {}), str(path))
    x = np.abs(whole_numbers(np.random.default_rng(0), 1, 1, 8, 8))
    with load(name, path) as tested:
        for _ in range(2):
            (y,) = tested.run([x])
            assert not np.shares_memory(x, y)
            np.testing.assert_array_equal(y, x)
        assert tested.precision == "fp32"


@pytest.mark.parametrize("name", ALL)
def test_runs_from_several_threads(name: str, pixels: Array) -> None:
    tiles = [pixels[:, :, 64 * k : 64 * k + 64, 0 : 64 + 16 * k] for k in range(4)]
    found: list[list[Array]] = [[] for _ in tiles]
    with load(name, TRAINED) as tested:
        wanted = [tested.run([tile])[0] for tile in tiles]

        def work(k: int) -> None:
            found[k] = [tested.run([tiles[k]])[0] for _ in range(5)]

        workers = [threading.Thread(target=work, args=(k,)) for k in range(len(tiles))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for outputs, want in zip(found, wanted, strict=True):
        assert len(outputs) == 5
        for output in outputs:
            np.testing.assert_array_equal(output, want)


@pytest.mark.parametrize("name", ALL)
def test_a_closed_session_says_so(name: str, pixels: Array) -> None:
    tested = load(name, TRAINED)
    tested.run([pixels[:, :, :64, :64]])
    tested.close()
    tested.close()
    with pytest.raises(BackendError, match="closed; load it again"):
        tested.run([pixels[:, :, :64, :64]])


@pytest.mark.parametrize("name", ALL)
def test_wrong_inputs_are_named(name: str, pixels: Array) -> None:
    tile = pixels[:, :, :64, :64]
    with load(name, TRAINED) as tested:
        for wrong in ([], [tile, tile], [np.concatenate([tile, tile], 1)], [tile[..., 0]]):
            with pytest.raises(BackendError):
                tested.run(wrong)
        if name == "eager":
            return
        with pytest.raises(BackendError, match=r"shape 1x2x64x64, the graph takes \?x1x\?x\?"):
            tested.run([np.concatenate([tile, tile], 1)])
        with pytest.raises(BackendError, match=r"0 input\(s\) given, the graph has 1 \(input\)"):
            tested.run([])
        assert tested.run([tile])[0].shape == (1, 2, 64, 64)  # and it still works


# --------------------------------------------------------------------------------- backends that run ONNX files


@pytest.mark.parametrize("name", ENGINES)
def test_build_writes_a_graph_that_loads(name: str, tmp_path: Path, pixels: Array) -> None:
    backend = backends.get(name)
    graph = tmp_path / "graph.onnx"
    backend.build(TRAINED, graph, precision="fp32", device="cpu")
    backend.build(TRAINED, graph, precision="fp32", device="cpu")  # again, over the first
    onnx.checker.check_model(str(graph), full_check=True)
    with backend.load(graph, precision="fp32", threads=1) as built, load(name, TRAINED) as given:
        np.testing.assert_array_equal(built.run([pixels])[0], given.run([pixels])[0])


@pytest.mark.parametrize("name", ENGINES)
def test_external_data_travels(name: str, tmp_path: Path, pixels: Array) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    proto = onnx.load(str(TRAINED))
    onnx.save(proto, str(source / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=100)
    backend = backends.get(name)
    backend.build(source / "m.onnx", target / "graph.onnx", precision="fp32")
    assert {path.name for path in target.iterdir()} == {"graph.onnx", "m.data"}
    (source / "m.data").unlink()
    tile = pixels[:, :, :64, :64]
    with backend.load(target / "graph.onnx", precision="fp32", threads=1) as moved, load(name, TRAINED) as given:
        np.testing.assert_array_equal(moved.run([tile])[0], given.run([tile])[0])
    with pytest.raises(GraphError, match=r"m\.data, which is not beside it"):
        onnx_file.copy_graph(source / "m.onnx", target / "graph.onnx")


@pytest.mark.parametrize("name", ENGINES)
def test_files_that_are_no_graphs(name: str, tmp_path: Path) -> None:
    backend = backends.get(name)
    with pytest.raises(BackendError, match=r"absent\.onnx"):
        backend.load(tmp_path / "absent.onnx", precision="fp32", threads=1)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(TRAINED.read_bytes()[:5000])
    with pytest.raises(BackendError, match=r"broken\.onnx"):
        backend.load(broken, precision="fp32", threads=1)
    with pytest.raises((BackendError, GraphError), match=r"absent\.onnx"):
        backend.build(tmp_path / "absent.onnx", tmp_path / "graph.onnx", precision="fp32")
    with pytest.raises((BackendError, GraphError), match=r"broken\.onnx"):
        backend.build(broken, tmp_path / "graph.onnx", precision="fp32")
    assert not (tmp_path / "graph.onnx").exists()


@pytest.mark.parametrize("name", ENGINES)
def test_precisions_that_are_not_there(name: str, tmp_path: Path) -> None:
    backend = backends.get(name)
    assert backend.precisions("cpu")[0] == "fp32"
    for precision in {"fp16", "int8", "fp33", "bf16"} - set(backend.precisions("cpu")):
        with pytest.raises(BackendError, match=r"use --precision fp32"):
            backend.build(TRAINED, tmp_path / "graph.onnx", precision=precision, device="cpu")
        with pytest.raises(BackendError, match=r"use --precision fp32"):
            backend.load(TRAINED, precision=precision, threads=1)
    assert not list(tmp_path.iterdir())


def half_precision(path: Path) -> None:
    weights = whole_numbers(np.random.default_rng(0), 2, 1, 3, 3).astype(np.float16)
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3])
    shape = ["N", 1, "Y", "X"]
    proto = model([node], {"x": shape}, {"y": ["N", 2, "Yo", "Xo"]}, {"w": weights}, TensorProto.FLOAT16)
    onnx.save(proto, str(path))


@pytest.mark.parametrize("name", ENGINES)
def test_a_float16_graph_takes_float32(name: str, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    half_precision(path)
    assert onnx_file.precision_of(path) == "fp16"
    with pytest.raises(BackendError, match="computes in fp16, fp32 was asked"):
        backends.get(name).build(path, tmp_path / "graph.onnx", precision="fp32")
    x = whole_numbers(np.random.default_rng(1), 1, 1, 9, 9)
    weights = numpy_helper.to_array(onnx.load(str(path)).graph.initializer[0]).astype(np.float32)
    with load(name, path) as tested:
        (y,) = tested.run([x])
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y.astype(np.float32), convolved(x, weights))  # below 2048: exact in float16


@pytest.mark.parametrize("name", ENGINES)
def test_fixed_sizes_are_kept(name: str, tmp_path: Path, pixels: Array) -> None:
    proto = onnx.load(str(TRAINED))
    for port, channels in ((proto.graph.input[0], 1), (proto.graph.output[0], 2)):
        for dim, size in zip(port.type.tensor_type.shape.dim, (1, channels, 96, 64), strict=True):
            dim.dim_value = size
    path = tmp_path / "fixed.onnx"
    onnx.save(proto, str(path))
    with load(name, path) as fixed, load(name, TRAINED) as free:
        tile = pixels[:, :, :96, :64]
        np.testing.assert_array_equal(fixed.run([tile])[0], free.run([tile])[0])
        with pytest.raises(BackendError, match="the graph takes 1x1x96x64"):
            fixed.run([pixels[:, :, :64, :96]])


def freed(path: Path, target: Path) -> Path:
    """The graph with its batch and spatial sizes made free; its operators must allow it."""
    proto = onnx.load(str(path))
    for port in (*proto.graph.input, *proto.graph.output):
        for axis, name in ((0, "N"), (2, "Y"), (3, "X")):
            port.type.tensor_type.shape.dim[axis].dim_param = name
    del proto.graph.value_info[:]
    onnx.save(proto, str(target))
    return target


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 4)])
def test_cores_of_tiles_equal_the_whole_image_bit_for_bit(
    name: str, threads: int, batch: int, shared: Path, tmp_path: Path
) -> None:
    folder = shared / "models" / "nuclei"
    raw = np.load(folder / "test_input.npy").astype(np.float32)
    image = (raw - raw.mean()) / (raw.std() + 1e-6)
    halo, stride, size = 53, 8, 512
    graph = freed(folder / "weights.onnx", tmp_path / "free.onnx")
    with backends.get(name).load(graph, precision="fp32", threads=threads) as tested:
        whole = tested.run([image])[0][0, 0]
        published = np.load(folder / "test_output.npy")[0, 0]
        assert np.abs(1 / (1 + np.exp(-whole)) - published).max() < 1e-5
        for tile in (128, 200, 256, 384):
            last = size - tile
            inner = last // 2 // stride * stride
            starts = [(0, 0), (inner, last), (inner, inner), (last, 0)]  # corners, an edge, the inside
            tiles = [image[0, :, y : y + tile, x : x + tile] for y, x in starts]
            rows = [row for k in range(0, len(tiles), batch) for row in tested.run([np.stack(tiles[k : k + batch])])[0]]
            for (y, x), row in zip(starts, rows, strict=True):
                y0, y1 = (halo if y else 0), (tile if y == last else tile - halo)
                x0, x1 = (halo if x else 0), (tile if x == last else tile - halo)
                assert y1 > y0
                assert x1 > x0
                want = whole[y + y0 : y + y1, x + x0 : x + x1]
                np.testing.assert_array_equal(row[0, y0:y1, x0:x1], want, err_msg=f"tile {tile} at {y}, {x}")


# Sums over more than 128 products are cut into blocks by ONNX Runtime's matrix kernels; with at most 64 positions per
# thread the blocks are longer, and small tiles round differently. (Its 2-D convolutions of usual channel counts go
# another way.) Above that, and on OpenVINO anywhere, a position's result does not depend on how many others there are.
POINTWISE = [("ConvTranspose", 256, 16, 2, 2), ("Conv", 64, 16, 3, 3), ("Conv", 250, 10, 2, 3), ("Conv", 192, 32, 2, 1)]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("op", "channels", "out", "dims", "kernel"), POINTWISE)
def test_a_layer_rounds_alike_in_small_and_large_maps(
    name: str, op: str, channels: int, out: int, dims: int, kernel: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(4)
    transposed = op == "ConvTranspose"
    weights = rng.standard_normal(((channels, out) if transposed else (out, channels)) + (kernel,) * dims)
    kwargs = {"kernel_shape": [kernel] * dims} | ({"strides": [kernel] * dims} if transposed else {})
    node = helper.make_node(op, ["x", "w"], ["y"], **kwargs)
    axes = [f"s{k}" for k in range(dims)]
    out_axes = [f"t{k}" for k in range(dims)]
    path = tmp_path / "layer.onnx"
    proto = model(
        [node], {"x": ["N", channels, *axes]}, {"y": ["N", out, *out_axes]}, {"w": weights.astype(np.float32)}
    )
    onnx.save(proto, str(path))
    edge = 0 if transposed else kernel - 1
    large = {2: 24, 3: 10}[dims]
    smallest = {"openvino": 3, "onnxruntime": {2: 9, 3: 5}[dims]}[name]  # 81 and 125 positions
    x = rng.standard_normal((1, channels, *(large + edge,) * dims)).astype(np.float32)
    with load(name, path, threads=1) as tested:
        whole = tested.run([x])[0]
        for size in range(smallest, large, 2):
            y = tested.run([x[(..., *(slice(size + edge),) * dims)]])[0]
            np.testing.assert_array_equal(y, whole[(..., *(slice(n) for n in y.shape[2:]))], err_msg=f"{size}")


@pytest.mark.parametrize("name", ENGINES)
def test_a_large_image_does_not_hold_its_memory(name: str) -> None:
    whole = np.zeros((1, 1, 1024, 1024), np.float32)
    tile = np.ascontiguousarray(whole[:, :, :128, :128])
    with load(name, TRAINED) as tested:
        tested.run([tile])
        small = limits.rss_bytes()
        tested.run([whole])
        tested.run([whole])
        large = limits.rss_bytes()
        for _ in range(2):
            tested.run([tile])
        after = limits.rss_bytes()
    assert large - small > 64 << 20
    assert after - small < 0.3 * (large - small)


# ------------------------------------------------------------------------------------------------------------- OpenVINO


@pytest.mark.openvino
def test_openvino_precision_is_read_back() -> None:
    with openvino_backend.load(TRAINED, precision="fp32", threads=1) as tested:
        assert tested.precision == "fp32"  # before the first run too
        convolutions = sum(node.op_type == "Conv" for node in onnx.load(str(TRAINED)).graph.node)
        assert tested.layers == {"f32": convolutions}


@pytest.fixture
def emulated_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let OpenVINO emulate BF16 where the CPU lacks it: the numbers are the same, only slow."""
    if not machine.cpu_features() & {"avx512f", "avx512_bf16", "bf16"}:
        pytest.skip("OpenVINO neither has nor emulates BF16 on this CPU")
    monkeypatch.setattr(openvino_backend, "_capabilities", lambda: frozenset({"FP32", "BF16"}))


@pytest.mark.openvino
@pytest.mark.usefixtures("emulated_bf16")
def test_openvino_bf16_rounds_as_bf16_does(pixels: Array) -> None:
    tile = pixels[:, :, :96, :96]
    with load("openvino", TRAINED) as exact, openvino_backend.load(TRAINED, precision="bf16", threads=1) as tested:
        wanted, output = exact.run([tile])[0], tested.run([tile])[0]
        assert tested.precision == "bf16"
        assert tested.layers["bf16"] >= sum(tested.layers.values()) / 2
    error, scale = np.abs(output - wanted), np.abs(wanted).max()
    assert output.dtype == np.float32
    # One rounding to 8 bits is 2^-9; 18 layers of it add up as a random walk does, and not to less than one.
    assert 2**-12 * scale < error.max() < 2**-3 * scale
    assert error.mean() < 2**-6 * scale


@pytest.mark.openvino
@pytest.mark.usefixtures("emulated_bf16")
def test_openvino_that_keeps_fp32_is_not_bf16(pixels: Array) -> None:
    with openvino_backend.load(TRAINED, precision="bf16", threads=1) as tested:
        tested._config["INFERENCE_PRECISION_HINT"] = "f32"  # as if the library had not followed
        with pytest.raises(BackendError, match=r"bf16 was asked, OpenVINO compiled 18 in f32 of 18 compute layers"):
            _ = tested.precision
        with pytest.raises(BackendError, match="bf16 was asked"):
            tested.run([pixels[:, :, :64, :64]])


@pytest.mark.openvino
def test_openvino_says_why_there_is_no_bf16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openvino_backend, "_capabilities", lambda: frozenset({"FP32", "INT8"}))
    assert openvino_backend.precisions() == ("fp32", "int8")
    with pytest.raises(BackendError, match=r"has no BF16 instructions .* would emulate them; use --precision fp32"):
        openvino_backend.build(TRAINED, tmp_path / "graph.onnx", precision="bf16")


@pytest.mark.openvino
def test_openvino_keeps_a_few_shapes(pixels: Array) -> None:
    with openvino_backend.load(TRAINED, precision="fp32", threads=1) as tested:
        first = tested.run([pixels[:, :, :64, :64]])[0]
        for width in range(64, 64 + 8 * 8, 8):
            tested.run([pixels[:, :, :64, :width]])
        assert len(tested._compiled) <= 4
        np.testing.assert_array_equal(tested.run([pixels[:, :, :64, :64]])[0], first)


QUIET = """
import numpy as np, sys
def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.__new__" or event == "subprocess.Popen":
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(refuse)
from pathlib import Path
from unet_rt import backends
cache = Path(sys.argv[2]) if len(sys.argv) > 2 else None
for name in ("onnxruntime", "openvino"):  # the others run what they have built
    more = {"cache": cache} if name == "openvino" else {}
    with backends.get(name).load(Path(sys.argv[1]), precision="fp32", device="cpu", threads=1, **more) as session:
        session.run([np.ones((1, 1, 64, 64), np.float32)])
"""


@pytest.mark.openvino
@pytest.mark.onnxruntime
def test_nothing_is_written_and_nothing_is_said(tmp_path: Path) -> None:
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    # Below the source tree on the path if there is no installed package.
    path = os.pathsep.join([str(Path(unet_rt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    # The libraries' own switches off: those of telemetry, and those by which a CI machine is known.
    switches = {"ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED", "CI", "TF_BUILD", "JENKINS_URL"}
    variables = {name: value for name, value in os.environ.items() if name not in switches}
    variables |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": path}
    for words in ([str(TRAINED)], [str(TRAINED), str(cache)]):
        done = subprocess.run(
            [sys.executable, "-B", "-c", QUIET, *words],
            env=variables,
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not list(home.rglob("*"))
        assert any(cache.rglob("*")) == (len(words) == 2)


# ------------------------------------------------------------------------------------------- what is there and what not


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any backend."""
    for name in ("onnxruntime", "openvino", "ncnn", "torch"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]  # import machinery: not to be found
    monkeypatch.setattr(machine, "package_version", lambda name: None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose driver lists two GPUs."""
    found = machine.Cuda(("NVIDIA A", "NVIDIA B"), "13.1", None)
    monkeypatch.setattr(machine, "cuda", lambda: found)
    return


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.Cuda((), "", "no NVIDIA driver is installed (libcuda.so.1 cannot be loaded)")
    monkeypatch.setattr(machine, "cuda", lambda: found)


@pytest.mark.usefixtures("no_library", "no_gpu")
def test_without_any_backend_there_is_one_line_to_install_one() -> None:
    assert backends.usable() == []
    for name, package in (("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("eager", "torch")):
        reason = backends.get(name).missing()
        assert reason is not None
        assert f"pip install {package}" in reason
    with pytest.raises(BackendError, match=r'To install one: pip install "unet-rt\[cpu\]"$'):
        backends.require()


@pytest.mark.usefixtures("no_library", "gpu")
def test_the_line_follows_the_machine() -> None:
    with pytest.raises(BackendError, match=r'pip install "unet-rt\[gpu\]"$'):
        backends.require()


@pytest.mark.usefixtures("no_gpu")
def test_devices_without_a_gpu() -> None:
    assert backends.device("auto") == backends.device("cpu") == "cpu"
    for asked in ("cuda", "cuda:0", "cuda:1"):
        with pytest.raises(BackendError, match=f"^{asked} was asked: no NVIDIA driver .* use --device cpu"):
            backends.device(asked)
    for unknown in ("gpu", "cuda:", "cuda:x", "CPU", ""):
        with pytest.raises(BackendError, match=r"use auto, cpu, cuda\[:N\] or vulkan\[:N\]"):
            backends.device(unknown)
    for name in ("onnxruntime", "openvino", "eager"):
        reason = backends.get(name).missing("cuda:0")
        assert reason is not None
        assert "use --device cpu" in reason or "not installed" in reason
    with pytest.raises(BackendError, match="install the driver, or use --device cpu"):
        backends.require("cuda:0")


@pytest.mark.usefixtures("gpu")
def test_devices_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.device("cuda") == "cuda:0"
    assert backends.device("cuda:1") == "cuda:1"
    with pytest.raises(BackendError, match=r"lists 2 GPU\(s\), the last is cuda:1"):
        backends.device("cuda:2")
    monkeypatch.setattr(backends, "usable", lambda device: ["onnxruntime"])
    assert backends.device("auto") == "cuda:0"
    monkeypatch.setattr(backends, "usable", lambda device: [])
    assert backends.device("auto") == "cpu"


@pytest.mark.onnxruntime
@pytest.mark.usefixtures("gpu")
def test_a_cpu_wheel_on_a_gpu_machine_is_said() -> None:
    onnxruntime = onnxruntime_library.import_library()
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    reason = onnxruntime_library.missing("cuda:0")
    assert reason is not None
    assert "this is the CPU wheel; pip uninstall -y onnxruntime, then pip install onnxruntime-gpu" in reason
    with pytest.raises(BackendError, match="this is the CPU wheel"):
        onnxruntime_backend.load(TRAINED, precision="fp32", device="cuda:0", threads=1)


@pytest.mark.onnxruntime
def test_a_provider_that_was_not_taken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_rt.backends.onnxruntime.cpu.cpu_provider", lambda: ("AzureExecutionProvider", {}))
    onnxruntime = onnxruntime_library.import_library()
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: real(path, options, ["CPUExecutionProvider"])
    )
    with pytest.raises(BackendError, match=r"AzureExecutionProvider was asked .* took CPUExecutionProvider"):
        onnxruntime_backend.load(TRAINED, precision="fp32", threads=1)


@pytest.mark.onnxruntime
def test_two_onnxruntime_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime": Path("site-packages"), "onnxruntime-gpu": Path("site-packages")}
    monkeypatch.setattr(machine, "package_folder", installed.get)
    reason = onnxruntime_library.missing()
    assert reason is not None
    assert reason.startswith("onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime" in reason
    with pytest.raises(BackendError, match="overwrite each other"):
        onnxruntime_backend.load(TRAINED, precision="fp32", threads=1)
    installed["onnxruntime-gpu"] = Path("another")
    assert onnxruntime_library.conflict() is None


@pytest.mark.parametrize(("name", "library"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_a_broken_installation_raises(name: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"{library}.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for loaded in [key for key in sys.modules if key.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, loaded)
    openvino_backend._core.cache_clear()
    with pytest.raises(BackendError, match=rf"libgomp.*pip install --force-reinstall {library}"):
        backends.get(name).missing()
    openvino_backend._core.cache_clear()


def test_what_a_removed_wheel_leaves_behind_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = types.ModuleType("onnxruntime")
    rest.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "onnxruntime", rest)
    with pytest.raises(BackendError, match="incompletely"):
        onnxruntime_library.missing()


def test_names() -> None:
    assert backends.names() == ("onnxruntime", "openvino", "tensorrt", "ncnn")
    with pytest.raises(
        BackendError, match="no backend 'tensorflow'; choose one of onnxruntime, openvino, tensorrt, ncnn, eager"
    ):
        backends.get("tensorflow")


def test_values_that_a_dtype_cannot_hold() -> None:
    port = session.Port("x", (None, 3), np.dtype(np.uint8))
    whole = np.array([[0.0, 7.0, 255.0]], np.float32)
    (cast,) = session.arrays_for([port], [whole])
    assert cast.dtype == np.uint8
    np.testing.assert_array_equal(cast, whole)
    for wrong in (0.5, -1.0, 256.0, np.nan):
        with pytest.raises(BackendError, match="input x is float32 with values that the graph's uint8 cannot hold"):
            session.arrays_for([port], [np.array([[0.0, wrong, 1.0]], np.float32)])
    port = session.Port("x", (None, 3), np.dtype(np.float16))
    (cast,) = session.arrays_for([port], [np.array([[0.1, np.inf, np.nan]], np.float32)])
    np.testing.assert_array_equal(cast, np.array([[0.1, np.inf, np.nan]], np.float16))
    with pytest.raises(BackendError, match="values that the graph's float16 cannot hold"):
        session.arrays_for([port], [np.array([[0.1, 70000.0, 0.0]], np.float32)])


# ---------------------------------------------------------------------------------------------------------------- eager


@pytest.mark.torch
def test_eager_refuses_what_is_no_fp32_baseline(tmp_path: Path) -> None:
    import torch

    from unet_rt.backends import eager

    with pytest.raises(BackendError, match=r"pass the module itself"):
        eager.load(tmp_path / "weights.pt")
    with pytest.raises(BackendError, match=r"runs modules, not graphs"):
        eager.build(TRAINED, tmp_path / "graph.onnx", precision="fp32")
    layer = torch.nn.Conv2d(1, 1, 3)
    with pytest.raises(BackendError, match=r"training mode; call its eval\(\)"):
        eager.load(layer)
    with pytest.raises(BackendError, match=r"torch.float16 weights"):
        eager.load(layer.eval().half())
    with pytest.raises(BackendError, match=r"int8 was asked"):
        eager.load(layer.float(), precision="int8")


@pytest.mark.torch
def test_eager_flattens_outputs_and_restores_threads() -> None:
    import torch

    from unet_rt.backends import eager

    class Heads(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return {"first": x + 1, "rest": (x * 2, [x - 1])}

    before = torch.get_num_threads()
    x = whole_numbers(np.random.default_rng(0), 1, 1, 4, 4)
    with eager.load(Heads().eval(), threads=before + 1) as tested:
        for output, want in zip(tested.run([x]), (x + 1, x * 2, x - 1), strict=True):
            np.testing.assert_array_equal(output, want)
    assert torch.get_num_threads() == before
