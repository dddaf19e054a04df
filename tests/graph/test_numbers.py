"""Numbers that a graph computes from its size: residues become strides, bounds are said, the rest is not exact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_graph import floats, one, single, weights

from unet_rt.errors import TileError
from unet_rt.graph.file import read_graph
from unet_rt.graph.layout import input_axes
from unet_rt.graph.report import GraphReport, inspect
from unet_rt.graph.walk import walk
from unet_rt.tiling.axis import canvas
from unet_rt.tiling.field import TileSizes

pytest.importorskip("onnxruntime")
tiles_and_whole = pytest.importorskip("tiles_and_whole")
largest_difference, session_of = tiles_and_whole.largest_difference, tiles_and_whole.session_of
node = helper.make_node


def whole_numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CONV = node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1])
HEIGHT = [CONV, node("Shape", ["a"], ["s"]), node("Gather", ["s", "two"], ["h"])]
CONSTANTS: dict[str, np.ndarray] = {
    "w": weights(2, 2, 3, 3), "two": np.array(2), "big": np.array(1500), "zero": np.array(0), "m32": np.array(32),
    "five": np.float32(5), "unit": np.float32(1), "ones": floats(1, 1), "z6": whole_numbers(*[0] * 6),
    "i0": whole_numbers(0), "i1": whole_numbers(1), "i2": whole_numbers(2), "i4": whole_numbers(4),
    "i1500": whole_numbers(1500), "m1": whole_numbers(-1), "o3": whole_numbers(0, 0, 0), "e3": whole_numbers(1, 1, 1),
    "a3": whole_numbers(0, 2, 3),
}  # fmt: skip


def network(nodes: Sequence[Any]) -> onnx.ModelProto:
    used = {name for n in nodes for name in n.input}
    return single(list(nodes), {k: v for k, v in CONSTANTS.items() if k in used})


def constant_graph(name: str, value: float) -> Any:
    proto = numpy_helper.from_array(np.float32(value))
    return helper.make_graph(
        [node("Constant", [], [name], value=proto)],
        name,
        [],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [])],
    )


BOUNDED = {
    "where": ([*HEIGHT, node("Greater", ["h", "big"], ["c"]), node("Where", ["c", "five", "unit"], ["k"]),
               node("Mul", ["a", "k"], ["y"])], (1500, None), "Greater 'c'"),
    "if": ([*HEIGHT, node("Greater", ["h", "big"], ["c"]),
            node("If", ["c"], ["k"], then_branch=constant_graph("p", 5), else_branch=constant_graph("q", 1)),
            node("Mul", ["a", "k"], ["y"])], (1500, None), "Greater 'c'"),
    "slice": ([CONV, node("Slice", ["a", "i0", "i1500", "i2"], ["y"])], (1500, None), "Slice 'y'"),
    "min": ([*HEIGHT, node("Slice", ["s", "i0", "i2"], ["nc"]), node("Slice", ["s", "i2", "i4"], ["hw"]),
             node("Min", ["hw", "big"], ["m"]), node("Concat", ["nc", "m"], ["z"], axis=0),
             node("Resize", ["a", "", "", "z"], ["y"], mode="nearest")], (1500, 1500), "Min 'm'"),
    "pad": ([*HEIGHT, node("Sub", ["h", "big"], ["d"]), node("Max", ["d", "zero"], ["e"]),
             node("Reshape", ["e", "m1"], ["e1"]), node("Concat", ["z6", "e1", "i0"], ["p"], axis=0),
             node("Pad", ["a", "p"], ["y"])], (1499, None), "Max 'e'"),
}  # fmt: skip


@pytest.mark.onnxruntime
@pytest.mark.parametrize("name", BOUNDED)
def test_a_bound_on_the_size_is_said_and_true(name: str) -> None:
    nodes, bounds, at = BOUNDED[name]
    model = network(nodes)
    report = inspect(model)
    assert one(report).exact
    assert report.exact_up_to == bounds
    assert len(report.limits) == sum(b is not None for b in bounds)
    assert all(at in limit for limit in report.limits)
    told = json.loads(json.dumps(report.to_json()))
    assert (told["exact_up_to"], told["sizes"][0]["exact_up_to"]) == (list(bounds), bounds[0])
    session = session_of(model)
    assert largest_difference(report, session, (64, 12), (bounds[0] or 0, 40)) < 1e-6
    if name in ("where", "if"):  # above, tiles are another network's
        assert largest_difference(report, session, (64, 12), (1501, 40)) > 0.1
    field = one(report).field[0]
    assert canvas(1499, report.sizes[0], [field]).size == 1499
    with pytest.raises(TileError, match=r"above .* px the network computes something else.*parts of at most"):
        canvas(1501, report.sizes[0], [field])


def test_sizes_above_the_bound_are_not_accepted() -> None:
    sizes = TileSizes(8, 4, 20, exact_up_to=100)
    assert [sizes.accepts(n) for n in (92, 100, 108)] == [True, True, False]
    assert (sizes.at_most(500), sizes.at_most(99)) == (100, 92)


def padded_by_mod(modulus: str) -> list[Any]:
    return [
        *HEIGHT,
        node("Mod", ["h", modulus], ["d"]),
        node("Sub", [modulus, "d"], ["e"]),
        node("Mod", ["e", modulus], ["f"]),
        node("Reshape", ["f", "m1"], ["e1"]),
        node("Concat", ["z6", "e1", "i0"], ["p"], axis=0),
        node("Pad", ["a", "p"], ["q"], mode="edge"),
        node("Conv", ["q", "w"], ["v"], pads=[1, 1, 1, 1]),
        node("Unsqueeze", ["h", "i0"], ["hh"]),
        node("Slice", ["v", "i0", "hh", "i2"], ["y"]),
    ]


@pytest.mark.onnxruntime
def test_a_remainder_of_the_size_becomes_the_stride() -> None:
    model = network(padded_by_mod("m32"))
    report = inspect(model)
    assert (one(report).exact, report.exact_up_to) == (True, (None, None))
    assert [s.stride for s in report.sizes] == [32, 1]
    for size in (160, 192):
        assert largest_difference(report, session_of(model), (64, 12), (size, 40)) < 1e-6


def test_a_remainder_by_too_much_is_not_exact() -> None:
    CONSTANTS["m5000"] = np.array(5000)
    output = one(inspect(network(padded_by_mod("m5000"))))
    assert not output.exact
    assert any("remainder" in reason for reason in output.reasons), output.reasons


CORNER = node("Slice", ["x", "o3", "e3", "a3"], ["t"])
SIZES = [
    node("Shape", ["x"], ["s"]),
    node("Cast", ["s"], ["sf"], to=TensorProto.FLOAT),
    node("Slice", ["sf", "i2", "i4"], ["b"]),
]
ROW = node("Slice", ["x", "i0", "i1", "i2"], ["t"])
SAID = {
    "bias from the image": [CORNER, node("Reshape", ["t", "m1"], ["b"]), node("Conv", ["x", "w", "b"], ["y"])],
    "bias from the size": [*SIZES, node("Conv", ["x", "w", "b"], ["y"])],
    "scale from the image": [
        CORNER, node("Reshape", ["t", "m1"], ["b"]),
        node("BatchNormalization", ["x", "b", "ones", "ones", "ones"], ["y"]),
    ],
    "scale from the size": [*SIZES, node("BatchNormalization", ["x", "b", "ones", "ones", "ones"], ["y"])],
    "bias of a norm from the size": [*SIZES, node("BatchNormalization", ["x", "ones", "b", "ones", "ones"], ["y"])],
    "squeezed row": [
        ROW, node("Squeeze", ["t", "i2"], ["q"]), node("Unsqueeze", ["q", "i2"], ["v"]), node("Add", ["x", "v"], ["y"]),
    ],
    "slope of PRelu from the size": [
        *SIZES, node("Reshape", ["b", "c3"], ["r"]), node("PRelu", ["x", "r"], ["y"]),
    ],
    "clip from the size": [*SIZES, node("Gather", ["sf", "two"], ["g"]), node("Clip", ["x", "", "g"], ["y"])],
}  # fmt: skip
CONSTANTS["c3"] = whole_numbers(2, 1, 1)


@pytest.mark.parametrize("name", SAID)
def test_any_input_of_a_node_has_a_say(name: str) -> None:
    output = one(inspect(network(SAID[name])))
    assert not output.exact
    assert output.reasons


# ---------------------------------------------------------------------------------------------------------- arithmetic


def drawn_arithmetic(seed: int) -> onnx.ModelProto:
    """x -> x, and numbers of the height in some ten nodes."""
    rng = np.random.default_rng(seed)
    nodes = [node("Shape", ["x"], ["s"], start=2, end=3), node("Cast", ["s"], ["f"], to=TensorProto.FLOAT)]
    ints, reals = ["s"], ["f"]
    constants: dict[str, np.ndarray] = {}

    def pick(options: Sequence[str]) -> str:
        return str(options[int(rng.integers(len(options)))])

    def number(real: bool) -> str:
        name = f"c{len(constants)}"
        value = int(rng.choice([1, 2, 3, 4, 5, 7, 8, 32, 60, 100, 200, -3]))
        constants[name] = np.array([value], np.float32 if real else np.int64)
        return name

    for k in range(10):
        real, out = bool(rng.random() < 0.35), f"n{k}"
        a = pick(reals if real else ints)
        b = number(real) if rng.random() < 0.7 else pick(reals if real else ints)
        op = pick(
            ["Add", "Sub", "Mul", "Div", "Min", "Max", "Neg", "Abs", *(["Floor", "Ceil"] if real else ["Mod"] * 2)]
        )
        if rng.random() < 0.15:
            nodes += [
                node(pick(["Less", "Greater", "Equal"]), [a, b], [f"t{k}"]),
                node("Where", [f"t{k}", a, b], [out]),
            ]
        elif rng.random() < 0.15:
            nodes.append(node("Cast", [a], [out], to=TensorProto.INT64 if real else TensorProto.FLOAT))
            real = not real
        else:
            nodes.append(node(op, [a] if op in ("Neg", "Abs", "Floor", "Ceil") else [a, b], [out]))
        (reals if real else ints).append(out)
    nodes.append(node("Identity", ["x"], ["y"]))
    return single(nodes, constants)


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_numbers_are_what_they_were_followed_to_be(first: int) -> None:
    """At every size that the bounds admit, arithmetic gives what the polynomial says."""
    followed = 0
    for seed in range(first, first + 100):
        graph = read_graph(drawn_arithmetic(seed))
        states = {
            height: walk(graph, input_axes(graph, {"x": "NCYX"}, {"x": 2}, (height, 8), 1), (height, 8))
            for height in (1, 5, 31, 32, 33, 63, 64, 65, 96, 101, 128, 200, 256, 257, 1000)
        }
        state = states[64]
        for name, tensor in state.tensors.items():
            if tensor.followed is None or tensor.followed.lost or not tensor.followed.numbers.size:
                continue
            for height, other in states.items():
                held = all(
                    b.low <= height and (b.high is None or height <= b.high) and (height - 64) % b.modulus == 0
                    for b in tensor.bounds
                )
                value = other.tensors[name].value
                if held and isinstance(value, np.ndarray):
                    said = float(tensor.followed.numbers.reshape(-1)[0].at((height, 8)))
                    assert said == pytest.approx(float(value.reshape(-1)[0]), rel=1e-6), (seed, name, height)
                    followed += 1
    assert followed > 4000


# ------------------------------------------------------------------------------------------------------------ exporters


@pytest.mark.torch
@pytest.mark.onnxruntime
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_pads_to_a_multiple_inside_a_network(mode: str, dynamo: bool) -> None:
    """Stride 8 within, 32 around: at multiples of 32 the inner pad is 0, and the canvas is what the network makes itself."""
    torch = pytest.importorskip("torch")
    networks = pytest.importorskip("networks")

    class Padded(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = networks.build(networks.UNetSpec(depth=3, channels=2))

        def forward(self, x: Any) -> Any:
            h, w = x.shape[-2:]
            pad = (0, (32 - w % 32) % 32, 0, (32 - h % 32) % 32)
            return self.network(torch.nn.functional.pad(x, pad, mode=mode))[..., :h, :w]

    network = networks.initialise(Padded())
    model = networks.export(network, [(1, 1, 64, 96)], dynamo=dynamo)
    report: GraphReport = inspect(model)
    assert (one(report).exact, [s.stride for s in report.sizes]) == (True, [32, 32]), one(report).reasons
    session, name = session_of(model), model.graph.input[0].name
    assert one(report).field[0].halo == (46, 46)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 1, 203, 317)).astype(np.float32)
    border = np.pad(image, [(0, 0), (0, 0), (0, 21), (0, 3)], mode="reflect" if mode == "reflect" else "constant")
    whole = session.run(None, {name: border})[0]
    assert np.abs(whole[..., :203, :317] - session.run(None, {name: image})[0]).max() < 1e-5
    part = session.run(None, {name: np.ascontiguousarray(border[..., 64:224, 128:320])})[0]
    error = np.abs(part[..., 46:, 46:] - whole[..., 64 + 46 : 224, 128 + 46 : 320]).max()
    assert error < 1e-5 * np.abs(whole).max()


# --------------------------------------------------------------------------------------- sizes and positions in float32


def scaled(factor: float, mode: str) -> onnx.ModelProto:
    more = {"mode": mode, "coordinate_transformation_mode": "half_pixel"}
    return single(
        [node("Resize", ["x", "", "s"], ["y"], **more), node("Identity", ["y"], ["z"])],
        {"s": floats(1, 1, factor, factor)},
    )


@pytest.mark.onnxruntime
def test_a_factor_that_float32_rounds_down_holds_up_to_the_first_size_it_shortens() -> None:
    model = scaled(1.3, "linear")
    report, session = inspect(model), session_of(model)
    assert (one(report).exact, one(report).field[0].scale) == (True, Fraction(13, 10))
    bound = report.exact_up_to[0]
    assert bound == 329
    made = {n: session.run(None, {"x": np.zeros((1, 2, n, 10), np.float32)})[0].shape[2] for n in (320, 330)}
    assert made == {320: 416, 330: 428}  # 429 would be due
    assert inspect(scaled(1.5, "linear")).exact_up_to == (None, None)
    assert inspect(scaled(0.7, "linear")).exact_up_to == (None, None)


def test_neighbours_are_picked_right_as_far_as_float32_tells_positions_apart() -> None:
    assert inspect(scaled(257 / 256, "nearest")).exact_up_to == (16320, 16320)
    assert inspect(scaled(3, "nearest")).exact_up_to == (None, None)
    assert inspect(scaled(257 / 256, "linear")).exact_up_to == (None, None)
