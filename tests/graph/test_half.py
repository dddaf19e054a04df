"""Float16 and bfloat16 graphs: the types are what was asked, and the numbers those of float32 to the rounding of the type.

Tolerance: rounding to u = 2^-11 (float16) relative happens at every convolution a few times (weights, input, sum), with
errors that are as good as independent: in the mean they grow with the root of the number of layers, at worst with the
number itself. Measured on these networks: 0.2 to 1.4 of u sqrt(layers) in the mean.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper, shape_inference

from unet_rt.backends.onnxruntime import backend as onnxruntime
from unet_rt.cli.demo import shipped_model
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import GraphError
from unet_rt.graph.passes.half import (
    RECORD,
    half,
    half_type_of,
    node_name,
)
from unet_rt.graph.passes.up_conv import up_conv

pytestmark = pytest.mark.onnxruntime

U = 2.0**-11
Array = np.ndarray


def pixels(*shape: int) -> Array:
    """(1, C, *shape) float32, zero mean, unit deviation."""
    picture = microscopy(shape[-2:], seed=7).image.astype(np.float32)
    picture = (picture - picture.mean()) / picture.std()
    return np.ascontiguousarray(np.broadcast_to(picture, (1, *shape)))


def run(model: Any, x: Array, tmp_path: Path) -> Array:
    path = tmp_path / "graph.onnx"
    onnx.save(model, str(path))
    with onnxruntime.load(path, precision="fp32", threads=1) as session:
        return session.run([x])[0]


def copy(model: Any) -> Any:
    return onnx.ModelProto.FromString(model.SerializeToString())


def layers(model: Any) -> int:
    return sum(node.op_type in ("Conv", "ConvTranspose") for node in model.graph.node)


def types(model: Any) -> dict[str, int]:
    """Element type of every tensor that shape inference knows."""
    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return known | {t.name: t.data_type for t in graph.initializer}


def assert_close(found: Array, wanted: Array, count: int, u: float = U) -> None:
    error = found.astype(np.float64) - wanted
    assert np.isfinite(found).all()
    assert np.sqrt(np.mean(error**2)) <= 2 * u * np.sqrt(count) * np.sqrt(np.mean(wanted.astype(np.float64) ** 2))
    assert np.abs(error).max() <= u * count * np.abs(wanted).max()


def assert_halved(model: Any, kind: int = TensorProto.FLOAT16) -> None:
    """Heavy layers compute in ``kind``, weights and activations."""
    onnx.checker.check_model(model, full_check=True)
    known = types(model)
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Relu", "MaxPool"):
            assert {known[name] for name in (*node.input, *node.output) if name} == {kind}, node.name


@pytest.mark.parametrize("keep_io", [False, True])
def test_the_shipped_network(keep_io: bool, tmp_path: Path) -> None:
    model, x = onnx.load(str(shipped_model())), pixels(1, 160, 192)
    wanted = run(model, x, tmp_path)
    small = copy(model)
    done = half(small, keep_io=keep_io)
    assert (done.nodes, done.islands, half_type_of(small), half_type_of(model)) == (41, {}, "fp16", None)
    assert_halved(small)
    ports = [v.type.tensor_type.elem_type for v in (*small.graph.input, *small.graph.output)]
    assert set(ports) == {TensorProto.FLOAT if keep_io else TensorProto.FLOAT16}
    assert Counter(n.op_type for n in small.graph.node)["Cast"] == (2 if keep_io else 0)
    found = run(small, x, tmp_path)
    assert found.dtype == (np.float32 if keep_io else np.float16)
    assert_close(found, wanted, layers(model))
    assert len(small.SerializeToString()) < 0.6 * len(model.SerializeToString())  # the float32 weights are gone
    before = small.SerializeToString(deterministic=True)
    assert half(small).nodes == 0
    assert small.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", ["nuclei/weights.onnx", "strain/unet.onnx"])
def test_networks_of_others(name: str, shared: Path, tmp_path: Path) -> None:
    model = onnx.load(str(shared / "models" / name))
    x = pixels(1, 512, 512) if "nuclei" in name else np.clip(pixels(1, 224, 224) * 0.2 + 0.5, 0, 1)
    small = copy(model)
    assert not half(small).islands
    assert_halved(small)
    assert_close(run(small, x, tmp_path), run(model, x, tmp_path), layers(model))


@pytest.mark.torch
def test_the_papers_network(tmp_path: Path) -> None:
    import networks

    from unet_rt.models.stored import load_half

    module = load_half(shipped_model().with_name("paper_w8.npz"))
    model, x = networks.export(module, [(1, 1, 188, 188)]), pixels(1, 188, 204)
    small = copy(model)
    assert not half(small).islands
    assert_halved(small)
    wanted = run(model, x, tmp_path)
    assert_close(run(small, x, tmp_path), wanted, layers(model))
    assert up_conv(small) == 4  # the passes commute
    assert_halved(small)
    assert_close(run(small, x, tmp_path), wanted, layers(model))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("how", "dynamo"),
    [
        ({"norm": "instance", "up": "align_corners"}, False),
        ({"norm": "group", "up": "bilinear"}, False),
        ({"valid": True, "final": "softmax"}, False),  # sizes are computed, in float32 among others
        ({"dims": 3, "norm": "batch"}, True),
        ({"pad_mode": "reflect", "squeeze": True}, False),
    ],
)
def test_networks_of_many_kinds(how: dict[str, object], dynamo: bool, tmp_path: Path) -> None:
    import networks

    spec = networks.UNetSpec(**how)  # type: ignore[arg-type]
    shape = (1, 24, 32, 28) if spec.dims == 3 else (1, 92, 84)
    model = networks.export(networks.build(spec), [(1, *shape)], dynamo=dynamo)
    small, x = copy(model), pixels(*shape)
    assert not half(small).islands
    assert_halved(small)
    assert_close(run(small, x, tmp_path), run(model, x, tmp_path), layers(model))
    sizes = [n for n in model.graph.node if n.op_type in ("Shape", "Gather", "Floor", "Unsqueeze", "ConstantOfShape")]
    kept = {node_name(n): n.SerializeToString(deterministic=True) for n in small.graph.node}
    assert all(kept[node_name(n)] == n.SerializeToString(deterministic=True) for n in sizes)


def wide(factor: float) -> tuple[Any, tuple[str, str, str]]:
    """The shipped network with its strongest first channel scaled up, and down again where it is read."""
    model = onnx.load(str(shipped_model()))
    stored = {t.name: t for t in model.graph.initializer}
    first, relu, second = model.graph.node[0], model.graph.node[1], model.graph.node[2]
    assert [n.op_type for n in (first, relu, second)] == ["Conv", "Relu", "Conv"]
    assert second.input[0] == relu.output[0]
    channel = int(np.argmax(np.abs(numpy_helper.to_array(stored[first.input[1]])).sum((1, 2, 3))))
    for name, index, scale in (
        (first.input[1], channel, factor),
        (first.input[2], channel, factor),
        (second.input[1], (slice(None), channel), 1 / factor),
    ):
        value = numpy_helper.to_array(stored[name]).copy()
        value[index] *= scale
        stored[name].CopyFrom(numpy_helper.from_array(value, name))
    return model, (node_name(first), node_name(relu), node_name(second))


def test_a_wide_channel_overflows_and_an_island_holds_it(tmp_path: Path) -> None:
    x = 4 * pixels(1, 96, 96)
    model, names = wide(1e4)
    wanted = run(model, x, tmp_path)
    small = copy(model)
    half(small)
    assert not np.isfinite(run(small, x, tmp_path)).all()
    small = copy(model)
    done = half(small, islands=names)
    assert done.islands == dict.fromkeys(names, "asked")
    onnx.checker.check_model(small, full_check=True)
    known = types(small)
    inside = {node_name(n): {known[i] for i in n.input} for n in small.graph.node if node_name(n) in names}
    assert inside == {key: {TensorProto.FLOAT} for key in names}
    assert_close(run(small, x, tmp_path), wanted, layers(model))
    before = small.SerializeToString(deterministic=True)
    assert half(small, islands=names).nodes == 0
    assert small.SerializeToString(deterministic=True) == before
    assert json.loads({p.key: p.value for p in small.metadata_props}[RECORD])["islands"] == done.islands


@pytest.mark.parametrize(("factor", "why"), [(1e6, "loses inf"), (1e-7, "loses")])
def test_weights_that_float16_cannot_hold_stay(factor: float, why: str, tmp_path: Path) -> None:
    """Too large, or so small that few bits are left: all weights of a layer, and the inverse behind it."""
    model = onnx.load(str(shipped_model()))
    first = model.graph.node[0]
    stored = {t.name: t for t in model.graph.initializer}
    stored[first.input[1]].CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(stored[first.input[1]]) * np.float32(factor), first.input[1])
    )
    done = half(model)
    assert list(done.islands) == [node_name(first)]
    assert why in done.islands[node_name(first)]
    assert types(model)[first.input[1]] == TensorProto.FLOAT


def test_bfloat16(tmp_path: Path) -> None:
    """BF16 convolution is defined from opset 22; no CPU runs it here, so the reference implementation does."""
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(shipped_model()))
    x = pixels(1, 16, 16)
    small = copy(model)
    assert not half(small, to="bf16", keep_io=True).islands
    assert_halved(small, TensorProto.BFLOAT16)
    assert {o.version for o in small.opset_import if o.domain == ""} == {22}
    try:
        (found,) = ReferenceEvaluator(small).run(None, {small.graph.input[0].name: x})
    except (TypeError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this reference implementation has no bfloat16 here: {error}")
    assert_close(np.asarray(found), run(model, x, tmp_path), layers(model), 2.0**-8)


def test_quantised_graphs_compute_around_their_scales(tmp_path: Path) -> None:
    """Q and DQ take half scales from opset 19 on; a DequantizeLinear before an island writes float32."""
    rng = np.random.default_rng(0)
    w = rng.integers(-127, 128, (4, 1, 3, 3)).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["qx"], name="q"),
        helper.make_node("DequantizeLinear", ["qx", "sx", "zx"], ["dx"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["dw"], name="dqw", axis=0),
        helper.make_node("Conv", ["dx", "dw"], ["y"], name="conv", kernel_shape=[3, 3]),
    ]
    weights = {
        "sx": np.float32(2.0**-5), "zx": np.int8(0), "w": w,
        "sw": np.full(4, 2.0**-7, np.float32), "zw": np.zeros(4, np.int8),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, "a", "b"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    x = pixels(1, 24, 24).astype(np.float16).astype(np.float32)  # else a few samples quantise to the next level
    wanted = run(model, x, tmp_path)
    small = copy(model)
    assert half(small).nodes == 4
    assert {o.version for o in small.opset_import if o.domain == ""} == {19}
    assert_halved(small)
    assert_close(run(small, x, tmp_path), wanted, 1)
    small = copy(model)
    done = half(small, islands=["conv"])
    assert sorted(done.islands) == ["conv", "dq", "dqw"]
    known = types(small)
    assert (known["dx"], known["dw"], known["qx"]) == (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT8)


def test_what_is_refused() -> None:
    model = onnx.load(str(shipped_model()))
    with pytest.raises(GraphError, match="has no node 'nowhere' to keep in float32"):
        half(model, islands=["nowhere"])
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])], "b", [], [helper.make_tensor_value_info("r", 1, [1, 1, 4, 4])]
    )
    choice = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    graph = helper.make_graph(
        [choice],
        "graph",
        [helper.make_tensor_value_info("x", 1, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("y", 1, [1, 1, 4, 4])],
        [numpy_helper.from_array(np.asarray(True), "c")],
    )
    with pytest.raises(GraphError, match="'choice' is If on pixels"):
        half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
