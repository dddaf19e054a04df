"""Rewrites: the same network to rounding, idempotent, and nothing else touched."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

import unet_rt as urt
from unet_rt.backends.onnxruntime import backend as onnxruntime
from unet_rt.building.calibration import calibrate
from unet_rt.drawing.microscopy import microscopy
from unet_rt.graph.passes import qdq
from unet_rt.graph.passes.crop_concat import crop_concat
from unet_rt.graph.passes.fold import fold
from unet_rt.graph.passes.free_crops import free_crops
from unet_rt.graph.passes.half import half
from unet_rt.graph.passes.outputs import keep_outputs
from unet_rt.graph.passes.up_conv import up_conv
from unet_rt.models.unet import UNet, UNetSpec

pytestmark = [pytest.mark.torch, pytest.mark.onnxruntime]


def exported(module: torch.nn.Module, x: np.ndarray, path: Path) -> onnx.ModelProto:
    free = {"x": {0: "n", 2: "h", 3: "w"}, "y": {0: "n", 2: "h", 3: "w"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the legacy exporter announces its successor
        torch.onnx.export(
            module.eval(),
            (torch.from_numpy(x),),
            path,
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=free,
        )
    return onnx.load(path)


def pixels(side: int, channels: int = 1) -> np.ndarray:
    picture = microscopy((side, side), seed=11).image.astype(np.float32)
    picture = (picture - picture.mean()) / picture.std()
    return np.repeat(picture[None, None], channels, axis=1)


def results(model: onnx.ModelProto, inputs: list[np.ndarray], path: Path, threads: int = 1) -> list[np.ndarray]:
    onnx.save(model, path)
    with onnxruntime.load(path, precision="fp32", device="cpu", threads=threads) as session:
        return [session.run([x])[0] for x in inputs]


def count(model: onnx.ModelProto, op: str) -> int:
    return sum(node.op_type == op for node in model.graph.node)


def test_an_up_convolution_is_the_same_sum(tmp_path):
    torch.manual_seed(0)
    x = pixels(96)
    model = exported(UNet(UNetSpec(width=8, depth=3, padding="same")), x, tmp_path / "a.onnx")
    (before,) = results(model, [x], tmp_path / "b.onnx")
    assert (up_conv(model), up_conv(model)) == (3, 0)
    onnx.checker.check_model(model)
    assert (count(model, "ConvTranspose"), count(model, "DepthToSpace")) == (0, 3)
    (after,) = results(model, [x], tmp_path / "c.onnx")
    # the largest sum has 64 products: 64 units in the last place, through three levels
    np.testing.assert_allclose(after, before, atol=3 * 64 * np.finfo(np.float32).eps * np.abs(before).max())


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),  # overlapping
        torch.nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
        torch.nn.ConvTranspose2d(4, 6, (2, 1), stride=(2, 1)),
        torch.nn.ConvTranspose2d(4, 6, 2, stride=2, dilation=2),
    ],
)
def test_everything_else_is_left_alone(module, tmp_path):
    model = exported(module, pixels(16, 4), tmp_path / "a.onnx")
    before = model.SerializeToString()
    assert up_conv(model) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_kernels_and_bias(kernel, bias, tmp_path):
    torch.manual_seed(kernel)
    module = torch.nn.ConvTranspose2d(5, 7, kernel, stride=kernel, bias=bias)
    x = pixels(12, 5)
    model = exported(module, x, tmp_path / "a.onnx")
    (before,) = results(model, [x], tmp_path / "b.onnx")
    assert up_conv(model) == 1
    (after,) = results(model, [x], tmp_path / "c.onnx")
    np.testing.assert_allclose(after, before, atol=5 * 2 * np.finfo(np.float32).eps * np.abs(before).max())


def test_why_a_wide_up_convolution_is_rewritten(tmp_path):
    """In ONNX Runtime a small map's bits differ from a large one's with ConvTranspose, and not without it."""
    torch.manual_seed(0)
    module = torch.nn.ConvTranspose2d(256, 8, 2, stride=2)
    x = np.repeat(pixels(64), 256, axis=1) * np.linspace(0.1, 1, 256, dtype=np.float32)[:, None, None]
    small = np.ascontiguousarray(x[..., :8, :8])
    model = exported(module, x, tmp_path / "a.onnx")
    large, corner = results(model, [x, small], tmp_path / "b.onnx")
    before = np.array_equal(large[..., :16, :16], corner)
    assert up_conv(model) == 1
    large, corner = results(model, [x, small], tmp_path / "c.onnx")
    np.testing.assert_array_equal(large[..., :16, :16], corner)
    if before:
        pytest.skip("this ONNX Runtime sums alike in maps of any size on this machine: the rewrite is not needed here")


# --- every pass ----------------------------------------------------------------------------------------------------------


def everything() -> onnx.ModelProto:
    """A graph of one size in which every pass finds something: crop, concatenation, up-convolution, normalisation."""
    rng = np.random.default_rng(5)
    weights = {
        "w0": rng.normal(size=(4, 1, 3, 3)),
        "w1": rng.normal(size=(4, 4, 3, 3)) / 6,
        "wt": rng.normal(size=(4, 4, 2, 2)) / 4,
        "wy": rng.normal(size=(3, 8, 1, 1)),
        **{name: rng.uniform(0.5, 2, 4) for name in ("gamma", "beta", "mean", "variance")},
    }
    bounds = {"starts": [2, 2], "ends": [28, 28], "axes": [2, 3]}
    tensors = [onnx.numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items()]
    tensors += [onnx.numpy_helper.from_array(np.array(v, np.int64), name) for name, v in bounds.items()]
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "w0"], ["c"], name="first", kernel_shape=[3, 3]),
        node("BatchNormalization", ["c", "gamma", "beta", "mean", "variance"], ["b"]),
        node("Relu", ["b"], ["r"]),
        node("Identity", ["r"], ["i"]),
        node("MaxPool", ["i"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "w1"], ["d"], name="second", kernel_shape=[3, 3]),
        node("ConvTranspose", ["d", "wt"], ["u"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Slice", ["i", *bounds], ["s"]),
        node("Concat", ["s", "u"], ["k"], axis=1),
        node("Conv", ["k", "wy"], ["y"], name="last", kernel_shape=[1, 1]),
        node("GlobalAveragePool", ["d"], ["pooled"]),
    ]
    values = [("x", [1, 1, 32, 32]), ("y", [1, 3, 26, 26]), ("pooled", [1, 4, 1, 1])]
    x, *outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in values]
    graph = onnx.helper.make_graph(nodes, "everything", [x], outputs, tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize(
    ("rewrite", "changed", "units"),
    [
        (fold, 2, 64),  # the identity, and the normalisation
        (up_conv, 1, 64),
        (free_crops, 1, 0),
        (crop_concat, 1, None),  # no library on a CPU knows the node
        (lambda m: keep_outputs(m, ["y"]), 1, 0),
        (lambda m: half(m, keep_io=True).nodes, 11, 2**13 * 64),  # float16 has 13 bits less
    ],
    ids=["fold", "up_conv", "free_crops", "crop_concat", "outputs", "half"],
)
def test_every_pass_is_the_same_network_and_idempotent(rewrite, changed, units, tmp_path):
    model, x = everything(), pixels(32)
    (before,) = results(model, [x], tmp_path / "a.onnx")
    assert rewrite(model) == changed
    if units is not None:
        onnx.checker.check_model(model, full_check=True)
        (after,) = results(model, [x], tmp_path / "b.onnx")
        atol = units * np.finfo(np.float32).eps * np.abs(before).max()
        np.testing.assert_allclose(after, before, atol=atol, rtol=0)
    once = model.SerializeToString(deterministic=True)
    assert rewrite(model) == 0
    assert model.SerializeToString(deterministic=True) == once


def test_preparing_twice_and_quantising_twice():
    """Preparation changes nothing that is prepared; a quantised graph is refused, since its FP32 values are gone."""
    prepared = qdq.prepare_graph(everything())
    again = qdq.prepare_graph(prepared)
    assert again.SerializeToString(deterministic=True) == prepared.SerializeToString(deterministic=True)
    found = calibrate(prepared, qdq.tensors_to_probe(prepared), [[pixels(32)]], threads=1)
    made = [qdq.quantise(prepared, found.ranges["minmax"], "openvino", means=found.means).model for _ in range(2)]
    assert made[0].SerializeToString(deterministic=True) == made[1].SerializeToString(deterministic=True)
    with pytest.raises(urt.GraphError, match="quantised already"):
        qdq.prepare_graph(made[0])
