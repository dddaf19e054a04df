"""Small ONNX files that took minutes, gigabytes or the process, each with what is answered now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SOME = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
Builder = Callable[[], onnx.ModelProto]
# Name -> (the model, what is said of it: in stderr with exit code 2, in stdout with 0).
GRAPHS: dict[str, tuple[Builder, int, str]] = {}


def graph(code: int, said: str = "") -> Callable[[Builder], Builder]:
    def enter(builder: Builder) -> Builder:
        GRAPHS[builder.__name__] = (builder, code, said)
        return builder

    return enter


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Any] | None = None,
    *,
    out: str = "y",
    size: object = None,
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 18,
) -> onnx.ModelProto:
    made = helper.make_graph(
        list(nodes),
        "hostile",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, size, size])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [1, None, None, None])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in ({"w": SOME} | (constants or {})).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_model(made, opset_imports=imports, functions=list(functions), ir_version=8)


def node(op: str, inputs: str = "x", out: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(" "), [out], **attributes)


@graph(0)
def a_pool_of_10001() -> onnx.ModelProto:
    k = 10_001
    return model_of([node("MaxPool", kernel_shape=[k, k], pads=[k // 2] * 4)])


@graph(2, "does not run")
def an_average_of_10001_dilated() -> onnx.ModelProto:
    k = 10_001
    return model_of([node("AveragePool", kernel_shape=[k, k], pads=[3 * k] * 4, dilations=[7, 7])], opset=19)


@graph(2, "beyond any image")
def a_pool_of_two_to_the_31() -> onnx.ModelProto:
    return model_of([node("MaxPool", kernel_shape=[2**31] * 2, pads=[2**30] * 4)])


@graph(0)
def strides_of_a_million() -> onnx.ModelProto:
    return model_of([node("MaxPool", kernel_shape=[2, 2], strides=[10**6] * 2)])


@graph(2, "beyond any image")
def transposed_strides_of_a_million() -> onnx.ModelProto:
    return model_of([node("ConvTranspose", "x w", strides=[10**6] * 2)])


@graph(2, "beyond any image")
def a_resize_by_100000() -> onnx.ModelProto:
    return model_of([node("Resize", "x  s")], {"s": np.float32([1, 1, 1e5, 1e5])})


@graph(2, "beyond any image")
def an_antialiased_resize_by_a_100000th() -> onnx.ModelProto:
    return model_of(
        [node("Resize", "x  s", mode="cubic", antialias=1)], {"s": np.float32([1, 1, 1e-5, 1e-5])}, size=10**6
    )


@graph(2, "does not run")
def a_resize_by_infinity() -> onnx.ModelProto:
    return model_of([node("Resize", "x  s")], {"s": np.float32([1, 1, np.inf, np.nan])})


@graph(2, "beyond any image")
def pads_of_a_billion() -> onnx.ModelProto:
    return model_of([node("Pad", "x p")], {"p": np.int64([0, 0, 10**9, 10**9, 0, 0, 10**9, 10**9])})


@graph(2, "beyond any image")
def a_hundred_upsamplings() -> onnx.ModelProto:
    names = ["x", *(f"t{k}" for k in range(99)), "y"]
    nodes = [node("Resize", f"{a}  s", b) for a, b in pairwise(names)]
    return model_of(nodes, {"s": np.float32([1, 1, 2, 2])})


@graph(2, "larger tensors than any network")
def many_wide_tensors() -> onnx.ModelProto:
    names = ["a", *(f"t{k}" for k in range(300)), "y"]
    nodes = [node("Resize", "x  s", "a")]
    nodes += [node("Conv", f"{a} w", b, pads=[1] * 4) for a, b in pairwise(names)]
    return model_of(nodes, {"s": np.float32([1, 1, 200, 200])})


@graph(0)
def a_range_of_a_billion() -> onnx.ModelProto:
    nodes = [node("Range", "zero many one", "r"), node("ReduceMax", "r", "m"), node("Add", "x m")]
    return model_of(nodes, {"zero": np.float32(0), "many": np.float32(1e9), "one": np.float32(1)})


@graph(0)
def a_product_of_a_million_by_a_million() -> onnx.ModelProto:
    nodes = [
        node("ConstantOfShape", "tall", "a"), node("ConstantOfShape", "wide", "b"), node("Add", "a b", "c"),
        node("ReduceMax", "c", "m"), node("Add", "x m"),
    ]  # fmt: skip
    return model_of(nodes, {"tall": np.int64([10**6, 1]), "wide": np.int64([1, 10**6])})


def _calls(count: int, targets: Callable[[int], Sequence[str]]) -> list[onnx.FunctionProto]:
    functions = []
    for k in range(count):
        names = ["x", *(f"t{i}" for i in range(len(targets(k)) - 1)), "y"]
        nodes = [
            helper.make_node(op, [a], [b], domain="" if op == "Relu" else "local")
            for op, a, b in zip(targets(k), names, names[1:], strict=False)
        ]
        imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
        functions.append(helper.make_function("local", f"f{k}", ["x"], ["y"], nodes, imports))
    return functions


@graph(2, "beyond any network")
def functions_that_double_forty_times() -> onnx.ModelProto:
    functions = _calls(40, lambda k: ["Relu", "Relu"] if k == 39 else [f"f{k + 1}"] * 2)
    return model_of([helper.make_node("f0", ["x"], ["y"], domain="local")], functions=functions)


@graph(2, "calls itself")
def a_function_that_calls_itself() -> onnx.ModelProto:
    functions = _calls(2, lambda k: [f"f{1 - k}"])
    return model_of([helper.make_node("f0", ["x"], ["y"], domain="local")], functions=functions)


@graph(2, "is not an operator whose dependence is known")
def a_function_of_an_unknown_domain() -> onnx.ModelProto:
    functions = _calls(1, lambda k: ["Relu"])
    functions[0].node[0].domain = "nowhere"
    return model_of([helper.make_node("f0", ["x"], ["y"], domain="local")], functions=functions)


@graph(0)
def nodes_in_reverse_order() -> onnx.ModelProto:
    names = ["x", *(f"t{k}" for k in range(400)), "y"]
    nodes = [node("Relu", a, b) for a, b in pairwise(names)]
    return model_of(nodes[::-1])


@graph(2, "398 more")
def four_hundred_unknown_nodes() -> onnx.ModelProto:
    names = ["x", *(f"t{k}" for k in range(400)), "y"]
    return model_of([node("Foo", a, b) for a, b in pairwise(names)])


@graph(0, "Unsqueeze")
def an_unsqueeze_without_axes() -> onnx.ModelProto:
    return model_of([node("Unsqueeze"), node("Unsqueeze", "w", "z")])


def _damaged(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = model_of([node("Conv", "x w", pads=[1] * 4)])
    change(model)
    return model


@graph(2)
def a_weight_of_type_99() -> onnx.ModelProto:
    return _damaged(lambda m: setattr(m.graph.initializer[0], "data_type", 99))


@graph(2)
def an_input_of_type_minus_1() -> onnx.ModelProto:
    return _damaged(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", -1))


@graph(2)
def a_weight_of_two_to_the_63() -> onnx.ModelProto:
    return _damaged(lambda m: m.graph.initializer[0].dims.__setitem__(slice(None), [2**63 - 1] * 4))


@graph(2)
def a_weight_of_negative_size() -> onnx.ModelProto:
    return _damaged(lambda m: m.graph.initializer[0].dims.__setitem__(slice(None), [1, 1, -3, -3]))


@graph(2)
def an_input_of_two_to_the_63() -> onnx.ModelProto:
    def change(m: onnx.ModelProto) -> None:
        for k in (2, 3):
            m.graph.input[0].type.tensor_type.shape.dim[k].dim_value = 2**63 - 1

    return _damaged(change)


@graph(0)
def weights_outside() -> onnx.ModelProto:
    def change(m: onnx.ModelProto) -> None:
        t = m.graph.initializer[0]
        t.ClearField("raw_data")
        t.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", "36")):
            t.external_data.add(key=key, value=value)

    return _damaged(change)
