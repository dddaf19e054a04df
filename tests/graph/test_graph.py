"""Stride, reach, halo, shrink and exactness, against eager PyTorch and ONNX Runtime."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from unet_rt.errors import GraphError
from unet_rt.graph.fields import kept_step
from unet_rt.graph.report import GraphReport, inspect
from unet_rt.system.json import from_json
from unet_rt.tiling.field import AxisField, FieldRecord, OutputField

torch = pytest.importorskip("torch")
F = torch.nn.functional
networks = pytest.importorskip("networks")
UNetSpec = networks.UNetSpec

SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"


def shared_model(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def one(report: GraphReport) -> OutputField:
    assert len(report.outputs) == 1
    return report.outputs[0]


def axis(report: GraphReport) -> AxisField:
    """The field of the only output, which is the same along all its axes."""
    fields = one(report).field
    assert len(set(fields)) == 1, fields
    return fields[0]


@functools.cache
def unet(spec: Any) -> tuple[Any, GraphReport]:
    network = networks.build(spec)
    size = 76 if spec.valid else 32
    if spec.dims == 3:
        size = 44 if spec.valid else 16
    model = networks.export(network, [(1, spec.inputs, *[size] * spec.dims)])
    return network, inspect(model)


# ------------------------------------------------------------------------------------------------------- known numbers


def test_paper_unet_takes_572_and_gives_388() -> None:
    network = networks.build(UNetSpec(depth=4, channels=1, valid=True))
    report = inspect(networks.export(network, [(1, 1, 572, 572)]))
    f = axis(report)
    assert (f.stride, f.shrink, f.halo, f.scale, f.reach) == (16, (92, 92), (0, 0), Fraction(1), (107, 107))
    assert f.out_size(572) == 388
    assert one(report).exact
    assert {(s.remainder, s.minimum, s.fixed) for s in report.sizes} == {(12, 188, None)}
    assert kept_step(f, 572, 16) == 384
    assert report.cost[512] == {"tile": (508, 508), "ratio": pytest.approx((508 / 320) ** 2)}


def test_same_padded_unet_has_a_halo_smaller_than_its_reach() -> None:
    network = networks.build(UNetSpec(depth=4, channels=1))
    f = axis(inspect(networks.export(network, [(1, 1, 32, 32)])))
    assert (f.stride, f.halo, f.reach, f.shrink) == (16, (94, 94), (107, 107), (0, 0))


def test_shared_nuclei_network() -> None:
    report = inspect(shared_model("nuclei/weights.onnx"))
    f = axis(report)
    assert (f.stride, f.halo, f.reach, f.shrink, f.scale) == (8, (53, 53), (58, 58), (0, 0), Fraction(1))
    assert one(report).exact
    assert report.parameters == 449_489
    assert (report.inputs[0].axes, report.inputs[0].shape, report.batch) == ("NCYX", (1, 1, 512, 512), 1)
    assert report.freed == ("Y (512 px)", "X (512 px)")
    assert report.final_ops == ("Conv",)
    assert report.cost[512]["ratio"] == pytest.approx((512 / 400) ** 2)


def test_shared_strain_network() -> None:
    report = inspect(shared_model("strain/unet.onnx"))
    f = axis(report)
    assert (f.stride, f.halo, f.shrink, one(report).exact, report.batch) == (4, (22, 22), (0, 0), True, None)
    assert report.parameters == 116_753


# ------------------------------------------------------------------------------------- reach and halo, by measurement


SPECS = [
    UNetSpec(),
    UNetSpec(valid=True, up="bilinear"),
    UNetSpec(up="bilinear", norm="batch"),
    UNetSpec(up="nearest", down="avg", norm="layer"),
    UNetSpec(up="transposed3", down="conv"),
    UNetSpec(up="shuffle", down="max3"),
    UNetSpec(down="avg3", pad_mode="reflect", depth=1),
    UNetSpec(down="ceil", pad_mode="replicate", depth=1, final="softmax"),
    UNetSpec(dilation=2, depth=1, residual=True, final="sigmoid"),
    UNetSpec(kernel=5, depth=1, convs=1),
    UNetSpec(valid=True, depth=1, down="conv"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_reach_is_what_a_nan_column_spoils(spec: Any) -> None:
    network, report = unet(spec)
    f = axis(report)
    assert one(report).exact
    width = sum(f.reach) + sum(f.shrink) + 3 * f.stride
    n = report.sizes[0].at_least(width)
    height = report.sizes[0].minimum
    before = after = 0
    for p in range(n // 2 // f.stride * f.stride, n // 2 // f.stride * f.stride + f.stride):
        x = torch.from_numpy(networks.texture((1, 1, height, n)))
        x[..., p] = torch.nan
        spoiled = torch.isnan(network(x)).flatten(0, 2).any(0).numpy().nonzero()[0] + f.shrink[0]
        before = max(before, int(spoiled.max()) - p)
        after = max(after, p - int(spoiled.min()))
    assert (before, after) == f.reach


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_halo_is_enough_and_one_less_is_not(spec: Any) -> None:
    report = unet(spec)[1]
    f, sizes = axis(report), report.sizes[0]
    double = networks.build(spec).double()
    tile = sizes.at_least(sum(f.halo) + sum(f.shrink) + 2 * f.stride)
    canvas, origin = tile + 2 * f.stride * 8, 8 * f.stride
    height = sizes.at_least(sizes.minimum + f.stride)
    image = torch.from_numpy(networks.texture((1, 1, height, canvas))).double()
    whole = double(image)[..., origin : origin + f.out_size(tile)]
    part = double(image[..., origin : origin + tile])
    error = (whole - part).abs().flatten(0, 2).amax(0).numpy()
    stop = len(error) - f.halo[1]
    # float64 sums of another order differ by 1e-15 or so; what an edge changes is far above that.
    assert error[f.halo[0] : stop].max() < 1e-11
    if f.halo[0]:
        assert error[f.halo[0] - 1] > 1e-9
    if f.halo[1]:
        assert error[stop] > 1e-9


def test_resnet_encoder_is_placed_on_its_pixels() -> None:
    network = networks.initialise(networks.ResNetUNet())
    report = inspect(networks.export(network, [(1, 1, 64, 64)]))
    f, n = axis(report), 256
    assert one(report).exact
    assert (f.stride, f.shrink) == (16, (0, 0))
    spoiled = []
    for p in range(112, 128):
        x = torch.from_numpy(networks.texture((1, 1, 32, n)))
        x[..., p] = torch.nan
        at = torch.isnan(network(x)).flatten(0, 2).any(0).numpy().nonzero()[0]
        spoiled.append((int(at.max()) - p, p - int(at.min())))
    assert f.reach == tuple(np.max(spoiled, axis=0))


# -------------------------------------------------------------------------------------------------- tiled equals whole


def tiles_equal_whole(
    report: GraphReport, run: Any, shape: Sequence[int], tile: Sequence[int], tolerance: float
) -> None:
    """Every tile position on the canvas: its core is the whole image's.

    Args:
        report: What the graph says.
        run: Image (N, C, spatial) to a list of outputs.
        shape: Shape of the canvas.
        tile: Tile per spatial axis.
        tolerance: Largest difference, relative to the output's largest value.
    """
    image = networks.texture(shape)
    whole = run(image)
    strides = [s.stride for s in report.sizes]
    canvas = shape[2:]
    for corner in ("low", "high", "inner"):
        origin = [
            {"low": 0, "high": c - t, "inner": min((c - t), s)}[corner]
            for c, t, s in zip(canvas, tile, strides, strict=True)
        ]
        window = tuple(slice(o, o + t) for o, t in zip(origin, tile, strict=True))
        part = run(np.ascontiguousarray(image[(..., *window)]))
        for output, small, large in zip(report.outputs, part, whole, strict=True):
            inner, outer = [slice(None)] * small.ndim, [slice(None)] * small.ndim
            first = small.ndim - len(output.field)
            for k, f in enumerate(output.field):
                assert small.shape[first + k] == f.out_size(tile[k])
                assert large.shape[first + k] == f.out_size(canvas[k])
                start = f.halo[0] if origin[k] > 0 else 0
                stop = small.shape[first + k] - (f.halo[1] if origin[k] + tile[k] < canvas[k] else 0)
                assert start < stop, "the tile keeps nothing: the test would prove nothing"
                shift = int(origin[k] * f.scale)
                inner[first + k], outer[first + k] = slice(start, stop), slice(start + shift, stop + shift)
            a, b = small[tuple(inner)], large[tuple(outer)]
            assert float(np.abs(a - b).max()) <= tolerance * max(1.0, float(np.abs(b).max()))


specs = st.builds(
    UNetSpec,
    depth=st.integers(1, 2),
    valid=st.booleans(),
    norm=st.sampled_from(["none", "none", "batch", "batch", "layer", "layer", "instance"]),
    up=st.sampled_from(["transposed", "nearest", "bilinear", "transposed3", "shuffle", "align_corners"]),
    down=st.sampled_from(["max", "avg", "conv", "max3", "ceil", "avg3"]),
    kernel=st.sampled_from([3, 5]),
    dilation=st.integers(1, 2),
    convs=st.integers(1, 2),
    pad_mode=st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]),
    residual=st.booleans(),
    squeeze=st.sampled_from([False] * 7 + [True]),
)


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(specs, st.integers(0, 3))
def test_tiled_equals_whole_wherever_exact_is_claimed(spec: Any, more: int) -> None:
    if spec.valid:  # wider kernels leave nothing of an image of this size
        spec = replace(spec, kernel=3, dilation=1)
    network = networks.build(spec)
    model = networks.export(network, [(1, 1, 108, 108)])
    report = inspect(model)
    faulty = spec.norm == "instance" or spec.up == "align_corners" or spec.squeeze
    faulty |= spec.pad_mode == "circular" and not spec.valid
    if faulty:
        assert not one(report).exact
        assert one(report).reasons
        return
    if not spec.valid:
        assert one(report).exact, one(report).reasons
    if not one(report).exact:
        return
    f, sizes = one(report).field, report.sizes
    tile = [s.at_least(sum(a.halo) + sum(a.shrink) + (2 + more) * s.stride) for a, s in zip(f, sizes, strict=True)]
    canvas = [t + 3 * s.stride for t, s in zip(tile, sizes, strict=True)]

    def run(x: np.ndarray) -> list[np.ndarray]:
        return [network(torch.from_numpy(x)).numpy()]

    tiles_equal_whole(report, run, (1, 1, *canvas), tile, 1e-5)


def test_volumes_go_through_the_same_code() -> None:
    spec = UNetSpec(dims=3, depth=1, channels=2, up="bilinear")
    network, report = unet(spec)
    f = axis(report)
    assert (one(report).axes, one(report).exact, len(report.sizes)) == ("NCZYX", True, 3)
    tile = report.sizes[0].at_least(sum(f.halo) + 2)
    tiles_equal_whole(
        report, lambda x: [network(torch.from_numpy(x)).numpy()], (1, 1, *[tile + 4] * 3), (tile,) * 3, 1e-5
    )


@pytest.mark.parametrize("dynamo", [False, True])
def test_two_inputs_and_three_scales(dynamo: bool) -> None:
    network = networks.initialise(networks.TwoScales())
    report = inspect(networks.export(network, [(1, 1, 32, 32), (1, 2, 32, 32)], dynamo=dynamo))
    assert [str(o.field[0].scale) for o in report.outputs] == ["1", "1/2", "2"]
    assert all(o.exact for o in report.outputs)
    assert [o.channels for o in report.outputs] == [1, 2, 2]

    def run(x: np.ndarray) -> list[np.ndarray]:
        a = torch.from_numpy(x)
        return [y.numpy() for y in network(a, torch.cat([a, a**2], 1))]

    tiles_equal_whole(report, run, (1, 1, 40, 48), (24, 28), 1e-6)


def test_channels_last() -> None:
    network = networks.initialise(networks.ChannelsLast(networks.UNet(UNetSpec(inputs=3))))
    report = inspect(networks.export(network, [(1, 32, 32, 3)], spatial=(1, 2)))
    assert (report.inputs[0].axes, one(report).axes, one(report).exact) == ("NYXC", "NYXC", True)
    assert axis(report).halo == (22, 22)
    assert one(report).channels == 2


# ---------------------------------------------------------------------------------------------------------- not exact

FAULTS = {
    "instance": (lambda: networks.UNet(UNetSpec(norm="instance")), "InstanceNormalization"),
    "group": (lambda: networks.UNet(UNetSpec(norm="group")), "Normalization"),
    "align": (lambda: networks.UNet(UNetSpec(up="align_corners")), "Resize"),
    "squeeze": (lambda: networks.UNet(UNetSpec(squeeze=True)), "ReduceMean"),
    "global": (lambda: networks.Layers(lambda x: x * F.adaptive_avg_pool2d(x, 1)), "over the whole image"),
    "circular": (lambda: networks.UNet(UNetSpec(pad_mode="circular")), "wraps"),
    "attention": (lambda: networks.Layers(networks.Attention()), "attention over space"),
    "by size": (lambda: networks.Layers(lambda x: x / float(1) / x.shape[2]), "computed from the size"),
    "flip": (lambda: networks.Layers(lambda x: x + torch.flip(x, [3])), "turns the image round"),
    "swap": (lambda: networks.Layers(lambda x: x + x.transpose(2, 3)), "mixes the spatial axes"),
    "softmax": (lambda: networks.Layers(lambda x: torch.softmax(x, 3)), "Softmax"),
    "coordinates": (
        lambda: networks.Layers(lambda x: x + torch.arange(x.shape[3], dtype=x.dtype)[None, None, None]),
        "spatial extent",
    ),
}


@pytest.mark.parametrize(("name", "dynamo"), [*((k, False) for k in FAULTS), ("group", True), ("global", True)])
def test_nodes_at_fault_are_named(name: str, dynamo: bool) -> None:
    make, words = FAULTS[name]
    network = networks.initialise(make())
    if name == "swap":
        model = networks.export(network, [(1, 1, 32, 32)], dynamo=dynamo, free=False)
    else:
        model = networks.export(network, [(1, 1, 32, 48)], dynamo=dynamo)
    output = one(inspect(model))
    assert not output.exact
    assert any(words in reason for reason in output.reasons), output.reasons


@pytest.mark.parametrize("dynamo", [False, True])
def test_attention_within_windows_is_exact(dynamo: bool) -> None:
    network = networks.initialise(networks.Layers(networks.WindowAttention()))
    report = inspect(networks.export(network, [(1, 1, 32, 32)], dynamo=dynamo))
    assert one(report).exact, one(report).reasons
    assert report.sizes[0].stride == 4
    tiles_equal_whole(report, lambda x: [network(torch.from_numpy(x)).numpy()], (1, 1, 32, 40), (16, 20), 1e-5)


def test_each_output_has_its_own_verdict() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: Any) -> Any:
            y = self.conv(x)
            return y, y - y.mean((2, 3), keepdim=True)

    report = inspect(networks.export(networks.initialise(Two()), [(1, 1, 16, 16)]))
    assert [o.exact for o in report.outputs] == [True, False]


# ------------------------------------------------------------------------------------------------ operators one by one


def single(
    nodes: list[Any], constants: dict[str, np.ndarray], *, opset: int = 19, channels: int = 2
) -> onnx.ModelProto:
    """A graph x -> y of free size."""
    shape = ["n", channels, "h", "w"]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 0.5, shape).astype(np.float32)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def resize(**attributes: Any) -> tuple[list[Any], dict[str, np.ndarray]]:
    factor = attributes.pop("factor")
    axes = {"scales": floats(1, 1, factor, factor)}
    return [helper.make_node("Resize", ["x", "", "scales"], ["y"], **attributes)], axes


def windowed(op: str, **attributes: Any) -> tuple[list[Any], dict[str, np.ndarray]]:
    return [helper.make_node(op, ["x"], ["y"], **attributes)], {}


def convolved(op: str, *shape: int, **attributes: Any) -> tuple[list[Any], dict[str, np.ndarray]]:
    constants = {
        "w": weights(*shape),
        "b": weights(shape[0] if op == "Conv" else shape[1] * attributes.get("group", 1)),
    }
    return [helper.make_node(op, ["x", "w", "b"], ["y"], **attributes)], constants


OPERATORS = {
    "conv": convolved("Conv", 3, 2, 3, 3, pads=[1, 1, 1, 1]),
    "conv asymmetric": convolved("Conv", 3, 2, 3, 4, pads=[0, 1, 2, 2]),
    "conv groups dilated": convolved("Conv", 4, 1, 3, 3, group=2, dilations=[2, 3], pads=[2, 3, 2, 3]),
    "conv strided": convolved("Conv", 3, 2, 5, 5, strides=[2, 2], pads=[2, 2, 2, 2]),
    "conv strided valid": convolved("Conv", 3, 2, 3, 3, strides=[2, 2]),
    "conv same upper": convolved("Conv", 3, 2, 4, 4, auto_pad="SAME_UPPER"),
    "conv same lower strided": convolved("Conv", 3, 2, 3, 3, auto_pad="SAME_LOWER", strides=[2, 2]),
    "conv valid auto": convolved("Conv", 3, 2, 3, 3, auto_pad="VALID"),
    "transposed": convolved("ConvTranspose", 2, 3, 2, 2, strides=[2, 2]),
    "transposed padded": convolved("ConvTranspose", 2, 3, 4, 4, strides=[2, 2], pads=[1, 1, 1, 1]),
    "transposed output padding": convolved(
        "ConvTranspose", 2, 3, 3, 3, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]
    ),
    "transposed gaps": convolved("ConvTranspose", 2, 3, 1, 1, strides=[2, 2], output_padding=[1, 1]),
    "transposed dilated": convolved("ConvTranspose", 2, 3, 3, 3, dilations=[2, 2], strides=[2, 2], pads=[2, 2, 1, 1]),
    "max": windowed("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "max dilated": windowed("MaxPool", kernel_shape=[2, 3], dilations=[2, 2], pads=[1, 2, 1, 2]),
    "max ceil": windowed("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "average excluded": windowed("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "average included": windowed(
        "AveragePool", kernel_shape=[4, 4], strides=[4, 4], pads=[0, 0, 0, 0], count_include_pad=1, ceil_mode=1
    ),
    "average included padded": windowed("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    "lp": windowed("LpPool", kernel_shape=[2, 2], strides=[2, 2], p=2),
    "depth to space": windowed("DepthToSpace", blocksize=2),
    "space to depth": windowed("SpaceToDepth", blocksize=2),
    "nearest half pixel": resize(factor=2, mode="nearest"),
    "nearest asymmetric": resize(
        factor=2, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    ),
    "nearest 3": resize(factor=3, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    "nearest 3/2": resize(factor=1.5, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    "nearest ceil": resize(factor=2, mode="nearest", nearest_mode="ceil"),
    "nearest down": resize(factor=0.5, mode="nearest", coordinate_transformation_mode="asymmetric"),
    "linear": resize(factor=2, mode="linear"),
    "linear 4": resize(factor=4, mode="linear"),
    "linear 3": resize(factor=3, mode="linear"),
    "linear pytorch": resize(factor=2, mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
    "linear asymmetric": resize(factor=2, mode="linear", coordinate_transformation_mode="asymmetric"),
    "linear down": resize(factor=0.5, mode="linear"),
    "linear down antialias": resize(factor=0.5, mode="linear", antialias=1),
    "cubic": resize(factor=2, mode="cubic"),
    "cubic excluding": resize(factor=2, mode="cubic", exclude_outside=1),
    "cubic down antialias": resize(factor=0.5, mode="cubic", antialias=1),
    "pad": ([helper.make_node("Pad", ["x", "p"], ["y"])], {"p": np.array([0, 0, 1, 2, 0, 0, 3, 1])}),
    "pad reflect": (
        [helper.make_node("Pad", ["x", "p"], ["y"], mode="reflect")],
        {"p": np.array([0, 0, 2, 2, 0, 0, 2, 2])},
    ),
    "pad edge axes": (
        [helper.make_node("Pad", ["x", "p", "", "a"], ["y"], mode="edge")],
        {"p": np.array([1, 2, 3, 0]), "a": np.array([3, 2])},
    ),
    "slice": (
        [helper.make_node("Slice", ["x", "s", "e", "a"], ["y"])],
        {"s": np.array([3, 1]), "e": np.array([-2, 2**31]), "a": np.array([2, 3])},
    ),
    "slice step": (
        [helper.make_node("Slice", ["x", "s", "e", "a", "t"], ["y"])],
        {"s": np.array([1, 0]), "e": np.array([2**31] * 2), "a": np.array([2, 3]), "t": np.array([2, 2])},
    ),
    "split channels": (
        [helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), helper.make_node("Sub", ["a", "b"], ["y"])],
        {},
    ),
    "prelu batch norm": (
        [
            helper.make_node("BatchNormalization", ["x", "g", "b", "m", "v"], ["n"]),
            helper.make_node("PRelu", ["n", "s"], ["y"]),
        ],
        {"g": floats(1, 2), "b": floats(0.5, -1), "m": floats(0.1, 0), "v": floats(1, 3), "s": weights(2, 1, 1)},
    ),
    "quantised": (
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        {"s": np.float32(0.05), "z": np.uint8(128)},
    ),
    "zeros around": (
        [helper.make_node("Concat", ["z", "c", "z"], ["y"], axis=2), ],
        {},
    ),
}  # fmt: skip
# Concat with constants needs an input of known width: the zeros are spread over it.
OPERATORS["zeros around"] = (
    [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Slice", ["s", "a", "b"], ["head"]),
        helper.make_node("Slice", ["s", "c", "d"], ["tail"]),
        helper.make_node("Concat", ["head", "one", "tail"], ["shape"], axis=0),
        helper.make_node("Expand", ["zero", "shape"], ["z"]),
        helper.make_node("Concat", ["z", "x", "z"], ["y"], axis=2),
    ],
    {
        "a": np.array([0]), "b": np.array([2]), "c": np.array([3]), "d": np.array([4]), "one": np.array([2]),
        "zero": np.zeros((1, 1, 1, 1), np.float32),
    },
)  # fmt: skip


@pytest.mark.onnxruntime
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_against_onnxruntime(name: str) -> None:
    ort = pytest.importorskip("onnxruntime")
    nodes, constants = OPERATORS[name]
    channels = 4 if name == "depth to space" else 2
    model = single(nodes, constants, channels=channels)
    report = inspect(model)
    output = one(report)
    assert output.exact, output.reasons
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    sizes, fields = report.sizes, output.field
    tile = [s.at_least(20 + 2 * s.stride) for s in sizes]
    canvas = [t + 8 * s.stride for t, s in zip(tile, sizes, strict=True)]
    image = networks.texture((1, channels, *canvas))
    whole = session.run(None, {"x": image})[0]
    for k in (0, 1):
        f, s = fields[k], sizes[k]
        origin = 4 * s.stride
        window = [slice(None)] * 4
        window[2 + k] = slice(origin, origin + tile[k])
        part = session.run(None, {"x": np.ascontiguousarray(image[tuple(window)])})[0]
        assert part.shape[2 + k] == f.out_size(tile[k])
        shift = int(origin * f.scale)
        cut = [slice(None)] * 4
        cut[2 + k] = slice(shift, shift + part.shape[2 + k])
        error = np.abs(part - whole[tuple(cut)]).max(axis=tuple(a for a in range(4) if a != 2 + k))
        stop = len(error) - f.halo[1]
        # Coordinates of another origin round otherwise where the factor is no power of two: see OutputField.note.
        bound = 1e-3 if output.note else 2e-6
        assert error[f.halo[0] : stop].max() <= bound
        if f.halo[0]:
            assert error[f.halo[0] - 1] > 1e-3
        if f.halo[1]:
            assert error[stop] > 1e-3


def test_resize_by_three_states_its_bound() -> None:
    nodes, constants = OPERATORS["linear 3"]
    assert "float32 coordinates" in one(inspect(single(nodes, constants))).note
    nodes, constants = OPERATORS["linear"]
    assert one(inspect(single(nodes, constants))).note == ""


UNKNOWN = {
    "other domain": helper.make_node("Mystery", ["x"], ["y"], domain="some.where"),
    "einsum": helper.make_node("Einsum", ["x"], ["y"], equation="nchw->nchw"),
    "wrap": helper.make_node("Pad", ["x", "p"], ["y"], mode="wrap"),
    "old softmax": helper.make_node("Softmax", ["x"], ["y"], axis=1),
    "global max": helper.make_node("GlobalMaxPool", ["x"], ["y"]),
    "crop": helper.make_node("Resize", ["x", "r", "s"], ["y"], coordinate_transformation_mode="tf_crop_and_resize"),
    "sizes": helper.make_node("Resize", ["x", "", "", "z"], ["y"], mode="nearest"),
    "plane": helper.make_node("Mul", ["x", "k"], ["y"]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_is_never_exact(name: str) -> None:
    constants = {
        "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "r": floats(0, 0, 0, 0, 1, 1, 0.5, 0.5), "s": floats(1, 1, 2, 2),
        "z": np.array([1, 2, 64, 64]), "k": weights(1, 1, 64, 64),
    }  # fmt: skip
    used = {k: v for k, v in constants.items() if k in UNKNOWN[name].input}
    model = single([UNKNOWN[name]], used, opset=11 if name == "old softmax" else 19)
    model.opset_import.append(helper.make_opsetid("some.where", 1))
    output = one(inspect(model))
    assert not output.exact
    assert output.reasons


def test_stride_goes_on_behind_a_node_at_fault() -> None:
    f = axis(inspect(networks.export(networks.build(UNetSpec(norm="instance")), [(1, 1, 32, 32)])))
    assert (f.stride, f.halo, f.reach) == (4, (22, 22), (23, 23))


# -------------------------------------------------------------------------------------------------------------- costs


def test_costs_of_one_convolution_are_the_textbook_ones() -> None:
    nodes, constants = convolved("Conv", 8, 2, 3, 3, pads=[1, 1, 1, 1])
    nodes[0].output[0] = "c"
    report = inspect(single([*nodes, helper.make_node("Sigmoid", ["c"], ["y"])], constants))
    assert report.parameters == 8 * 2 * 9 + 8
    assert report.flops_per_pixel == 2 * 8 * 2 * 9
    assert report.final_ops == ("Sigmoid",)
    # Input and result of the convolution, then its result and the sigmoid's: two and eight, eight and eight channels.
    assert report.activation_bytes((64, 32)) == 4 * 64 * 32 * 16
    assert report.activation_bytes((64, 32), batch=3) == 3 * 4 * 64 * 32 * 16
    with pytest.raises(GraphError, match="3 axes"):
        report.activation_bytes((8, 8, 8))


def test_flops_of_the_paper_network_do_not_depend_on_the_size_it_was_exported_with() -> None:
    spec = UNetSpec(depth=1, channels=4, convs=1)
    a = inspect(networks.export(networks.build(spec), [(1, 1, 32, 32)])).flops_per_pixel
    b = inspect(networks.export(networks.build(spec), [(1, 1, 64, 96)])).flops_per_pixel
    # Per pixel: 1->4 and 8->4 by 3x3 and the head 4->2; a quarter of 4->8 by 3x3; the transposed 8->4 (2x2 taps).
    by_hand = 2 * (9 * 4 + 9 * 32 + 8 + 9 * 32 / 4 + 32 * 4 / 4)
    assert a == b == pytest.approx(by_hand)


def test_json_has_the_documented_keys() -> None:
    _, report = unet(UNetSpec())
    data = report.to_json()
    assert {"inputs", "parameters", "flops_per_pixel", "cost", "outputs"} <= data.keys()
    output = data["outputs"][0]
    assert output["halo"] == {"before": [22, 22], "after": [22, 22]}
    assert output["scale"] == ["1/1", "1/1"]
    assert from_json(FieldRecord, output, where="report", error=GraphError, way_out="inspect again").output == one(
        report
    )
    assert list(data["cost"]) == ["512", "1024", "2048", "4096"]


# -------------------------------------------------------------------------------------------------------------- files


def test_weights_in_a_file_beside_are_not_read(tmp_path: Path) -> None:
    model = networks.export(networks.build(UNetSpec()), [(1, 1, 32, 32)])
    path = tmp_path / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=100)
    expected = inspect(model)
    (tmp_path / "net.data").write_bytes(b"")
    assert inspect(path).outputs == expected.outputs
    assert inspect(path).parameters == expected.parameters


def test_small_constants_beside_are_read_or_missed_with_a_reason(tmp_path: Path) -> None:
    nodes, constants = OPERATORS["linear"]
    path = tmp_path / "net.onnx"
    onnx.save(single(nodes, constants), path, save_as_external_data=True, location="net.data", size_threshold=0)
    assert one(inspect(path)).exact
    (tmp_path / "net.data").unlink()
    with pytest.raises(GraphError, match="external data"):
        inspect(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + b"\0" * 64, "PyTorch checkpoint"),
        (b"\x80\x02}q\0", "pickle"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"hello, this is no graph at all" * 10, "no complete ONNX graph|holds no graph"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError, match=words):
        inspect(path)


def test_missing_folder_and_truncated(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="does not exist"):
        inspect(tmp_path / "none.onnx")
    with pytest.raises(GraphError, match="folder"):
        inspect(tmp_path)
    whole = networks.export(networks.build(UNetSpec()), [(1, 1, 32, 32)]).SerializeToString()
    for share in (0.2, 0.5, 0.999):
        path = tmp_path / "cut.onnx"
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(GraphError):
            inspect(path)


def test_graph_that_uses_what_nothing_produces() -> None:
    model = single([helper.make_node("Relu", ["nowhere"], ["y"])], {})
    with pytest.raises(GraphError, match="'nowhere'"):
        inspect(model)


def test_graph_without_an_image() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    with pytest.raises(GraphError, match="spatial axes"):
        inspect(helper.make_model(graph))


def test_functions_are_looked_into() -> None:
    body = [helper.make_node("Conv", ["a", "w"], ["c"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["c"], ["b"])]
    function = helper.make_function("mine", "Block", ["a", "w"], ["b"], body, [helper.make_opsetid("", 19)])
    model = single([helper.make_node("Block", ["x", "w"], ["y"], domain="mine")], {"w": weights(2, 2, 3, 3)})
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    report = inspect(model)
    assert one(report).exact, one(report).reasons
    assert axis(report).halo == (1, 1)
