"""U-Nets drawn at random as ONNX graphs: what networks do with sizes, inner pads and crops, in all spellings.

Everything is composed of nodes, without a framework: a graph is a function of its seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Y, X = 2, 3


@dataclass
class Drawing:
    """A graph that is being drawn. ``traits`` says in words what was put into it."""

    rng: np.random.Generator
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    traits: list[str] = field(default_factory=list)
    count: int = 0

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def say(self, trait: str) -> None:
        self.traits.append(trait)

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        name = self.name("c")
        self.constants[name] = np.asarray(value, dtype)
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        out = self.name(op.lower())
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"n_{out}", **attributes))
        return out

    def model(self, y: str) -> onnx.ModelProto:
        """What was drawn, with ``y`` for its result."""
        self.nodes.append(helper.make_node("Identity", [y], ["y"]))
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, "h", "w"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(v, k) for k, v in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)

    # -- numbers

    def size(self, x: str, axis: int) -> str:
        """The size of an axis as a list of one number, in one of the ways that exporters write it."""
        shape = self.node("Shape", x)
        spelling = self.pick("gather", "slice", "attribute")
        if spelling == "gather":
            return self.node("Gather", shape, self.const([axis]), axis=0)
        if spelling == "slice":
            return self.node("Slice", shape, self.const([axis]), self.const([axis + 1]), self.const([0]))
        self.nodes[-1] = helper.make_node("Shape", [x], [shape], name=f"n_{shape}", start=axis, end=axis + 1)
        return self.node("Identity", shape)

    def missing(self, n: str, multiple: int) -> str:
        """What ``n`` lacks to the next multiple."""
        m = self.const([multiple])
        spelling = self.pick("mod", "div", "ceil", "where", "floats")
        self.say(f"multiple of {multiple} by {spelling}")
        if spelling == "mod":
            return self.node("Mod", self.node("Sub", m, self.node("Mod", n, m)), m)
        if spelling == "div":
            up = self.node("Div", self.node("Add", n, self.const([multiple - 1])), m)
            return self.node("Sub", self.node("Mul", up, m), n)
        if spelling == "where":
            rest = self.node("Mod", n, m)
            even = self.node("Equal", rest, self.const([0]))
            return self.node("Where", even, self.const([0]), self.node("Sub", m, rest))
        as_float = self.node("Cast", n, to=TensorProto.FLOAT)
        if spelling == "ceil":
            up = self.node("Ceil", self.node("Div", as_float, self.const([multiple], np.float32)))
        else:
            down = self.node("Floor", self.node("Div", self.node("Neg", as_float), self.const([multiple], np.float32)))
            up = self.node("Neg", down)
        whole = self.node("Cast", self.node("Mul", up, self.const([multiple], np.float32)), to=TensorProto.INT64)
        return self.node("Sub", whole, n)

    # -- layers

    def weights(self, *shape: int) -> np.ndarray:
        fan = int(np.prod(shape[1:]))
        return self.rng.normal(0, np.sqrt(2 / fan), shape).astype(np.float32)

    def conv(self, x: str, channels: int, out: int) -> str:
        kernel, dilation = self.pick(1, 3, 3, 3, 2, 5), self.pick(1, 1, 1, 2)
        span = (kernel - 1) * dilation
        style = self.pick("same", "same", "same", "same", "valid", "asymmetric", "auto")
        before, after = {"valid": (0, 0), "asymmetric": (span, 0)}.get(style, (span // 2, span - span // 2))
        more: dict[str, Any] = {"pads": [before, before, after, after]}
        if style == "auto":
            dilation = 1
            more = {"auto_pad": self.pick("SAME_UPPER", "SAME_LOWER")}
        if style != "same":
            self.say(f"conv {style}")
        bias = self.const(self.rng.normal(0, 0.3, out), np.float32)
        w = self.const(self.weights(out, channels, kernel, kernel), np.float32)
        y = self.node("Conv", x, w, bias, kernel_shape=[kernel] * 2, dilations=[dilation] * 2, **more)
        return self.node(self.pick("Relu", "Sigmoid", "LeakyRelu"), y)

    def down(self, x: str, channels: int, stride: int) -> str:
        how = self.pick("MaxPool", "AveragePool", "Conv", "padded", "ceil", "slices", "resize", "unshuffle")
        if how == "slices":
            self.say("every other sample")
            starts = self.const([self.pick(0, 0, 1), 0])
            return self.node("Slice", x, starts, self.const([2**31] * 2), self.const([Y, X]), self.const([stride] * 2))
        if how == "resize":
            self.say("resized down")
            scales = self.const([1, 1, 1 / stride, 1 / stride], np.float32)
            return self.node("Resize", x, "", scales, mode=self.pick("linear", "nearest"), nearest_mode="floor")
        if how == "unshuffle":
            w = self.const(self.weights(channels, channels * stride**2, 1, 1), np.float32)
            return self.node("Conv", self.node("SpaceToDepth", x, blocksize=stride), w, kernel_shape=[1, 1])
        if how == "Conv":
            k = self.pick(stride, stride + 1)
            w = self.const(self.weights(channels, channels, k, k), np.float32)
            p = self.pick(0, k // 2)
            return self.node(
                "Conv", x, w, kernel_shape=[k] * 2, strides=[stride] * 2, pads=[p, p, k - stride] + [k - stride]
            )
        more: dict[str, Any] = {"kernel_shape": [stride] * 2, "strides": [stride] * 2}
        if how == "padded":
            more = {"kernel_shape": [3, 3], "strides": [stride] * 2, "pads": [1, 1, 1, 1]}
        if how == "ceil":
            more["ceil_mode"] = 1
        return self.node("AveragePool" if how == "AveragePool" else "MaxPool", x, **more)

    def up(self, x: str, channels: int, stride: int, skip: str) -> str:
        how = self.pick("transposed", "nearest", "linear", "size", "size", "size linear", "shuffle", "transposed 3")
        if how == "shuffle":
            w = self.const(self.weights(channels * stride**2, channels, 1, 1), np.float32)
            deep = self.node("Conv", x, w, kernel_shape=[1, 1])
            if self.chance(0.5):
                return self.node("DepthToSpace", deep, blocksize=stride, mode=self.pick("DCR", "CRD"))
            self.say("shuffle by reshape")
            n, b = self.size(deep, 0), self.const([stride])
            h, width = self.size(deep, Y), self.size(deep, X)
            apart = self.node("Concat", n, self.const([channels]), b, b, h, width, axis=0)
            moved = self.node("Transpose", self.node("Reshape", deep, apart), perm=[0, 1, 4, 2, 5, 3])
            sizes = [self.node("Mul", size, b) for size in (h, width)]
            return self.node("Reshape", moved, self.node("Concat", n, self.const([channels]), *sizes, axis=0))
        if how == "transposed 3":
            w = self.const(self.weights(channels, channels, 3, 3), np.float32)
            more = {"kernel_shape": [3, 3], "strides": [stride] * 2, "pads": [1, 1, 1, 1]}
            return self.node("ConvTranspose", x, w, output_padding=[self.pick(stride - 1, 0)] * 2, **more)
        if how == "transposed":
            w = self.const(self.weights(channels, channels, stride, stride), np.float32)
            return self.node("ConvTranspose", x, w, kernel_shape=[stride] * 2, strides=[stride] * 2)
        more = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        if how.endswith("linear"):
            more = {"mode": "linear", "coordinate_transformation_mode": self.pick("half_pixel", "pytorch_half_pixel")}
        if not how.startswith("size"):
            return self.node("Resize", x, "", self.const([1, 1, stride, stride], np.float32), **more)
        self.say("resize to the size of the skip")
        head = self.node("Slice", self.node("Shape", x), self.const([0]), self.const([2]), self.const([0]))
        sizes = self.node("Concat", head, self.size(skip, Y), self.size(skip, X), axis=0)
        return self.node("Resize", x, "", "", sizes, **more)

    def join(self, a: str, b: str) -> str:
        """Both, where need be the skip ``b`` cut to the size of ``a``, or ``a`` padded to that of ``b``."""
        how = self.pick("plain", "plain", "plain", "cut", "centre", "pad", "sum")
        if how == "pad":
            self.say("padded to the skip")
            before, after = [], []
            for axis in (Y, X):
                lack = self.node("Sub", self.size(b, axis), self.size(a, axis))
                before.append(self.node("Div", lack, self.const([2])))
                after.append(self.node("Sub", lack, before[-1]))
            zeros = self.const([0, 0])
            a = self.node("Pad", a, self.node("Concat", zeros, *before, zeros, *after, axis=0))
        if how == "sum":
            self.say("skip added and kept")
            b = self.node(self.pick("Add", "Sub", "Mul", "Max"), a, b)
        if how == "cut":
            self.say("skip cut to size")
            ends = self.node("Concat", self.size(a, Y), self.size(a, X), axis=0)
            b = self.node("Slice", b, self.const([0, 0]), ends, self.const([Y, X]))
        if how == "centre":
            self.say("skip cut in the middle")
            starts, ends = [], []
            for axis in (Y, X):
                n, m = self.size(b, axis), self.size(a, axis)
                start = self.node("Div", self.node("Sub", n, m), self.const([2]))
                starts.append(start)
                ends.append(self.node("Add", start, m))
            b = self.node(
                "Slice", b, self.node("Concat", *starts, axis=0), self.node("Concat", *ends, axis=0), self.const([Y, X])
            )
        return self.node("Concat", a, b, axis=1)

    def unet(self, x: str, channels: int, out: int, depth: int) -> str:
        x = self.conv(x, channels, out)
        if depth:
            stride = self.pick(2, 2, 2, 2, 3)
            deep = self.unet(self.down(x, out, stride), out, out, depth - 1)
            x = self.conv(self.join(self.up(deep, out, stride, x), x), 2 * out, out)
        return x

    # -- around a network

    def padded(self, x: str, channels: int, out: int, depth: int) -> str:
        """The network within a pad to a multiple, its result cut back."""
        multiple = self.pick(2, 4, 8, 8, 12, 16, 32)
        mode = self.pick("reflect", "constant", "edge")
        place = self.pick("after", "after", "both", "before")
        self.say(f"inner pad {mode} {place}")
        zero = self.const([0])
        margins_before, afters, starts, ends = [], [], [], []
        for axis in (Y, X):
            n = self.size(x, axis)
            pad = self.missing(n, multiple)
            half = self.node("Div", pad, self.const([2]))
            before = {"after": zero, "before": pad, "both": half}[place]
            margins_before.append(before)
            afters.append({"after": pad, "before": zero, "both": self.node("Sub", pad, half)}[place])
            starts.append(before)
            ends.append(self.node("Add", before, n))
        pads = self.node("Concat", zero, zero, *margins_before, zero, zero, *afters, axis=0)
        y = self.unet(self.node("Pad", x, pads, mode=mode), channels, out, depth)
        return self.node(
            "Slice", y, self.node("Concat", *starts, axis=0), self.node("Concat", *ends, axis=0), self.const([Y, X])
        )

    def twisted(self, x: str, channels: int) -> str:
        """One thing more that networks do with sizes; some keep exactness, some bound it, some break it."""
        limit = self.pick(70, 100, 150, 1500)
        kind = self.pick(
            "pad and crop", "pad", "crop", "crop by size", "crop of parity", "factor above", "if above", "cut above",
            "resize up to", "pad above", "count of blocks", "zoom", "bias of size", "bias of image", "by size", "first row",
            "shuffle", "equal", "factor", "split", "mean of channels", "channels last", "small", "difference",
            "blocks of size", "flat", "normed", "gathered",
        )  # fmt: skip
        self.say(kind)
        h = self.size(x, Y)
        if kind in ("pad", "pad and crop"):
            p = [int(v) for v in self.rng.integers(0, 4, 4)]
            y = self.node("Pad", x, self.const([0, 0, p[0], p[1], 0, 0, p[2], p[3]]), mode=self.pick("reflect", "edge"))
            if kind == "pad":
                return y
            return self.node(
                "Slice", y, self.const(p[:2]), self.const([-p[2] or 2**31, -p[3] or 2**62]), self.const([Y, X])
            )
        if kind == "crop":
            return self.node("Slice", x, self.const([1, 2]), self.const([-3, -1]), self.const([Y, X]))
        if kind == "crop by size":
            return self.node("Slice", x, self.const([2]), self.node("Sub", h, self.const([1])), self.const([Y]))
        if kind == "crop of parity":
            return self.node(
                "Slice", x, self.const([0]), self.node("Sub", h, self.node("Mod", h, self.const([3]))), self.const([Y])
            )
        if kind in ("factor above", "equal"):
            op = "Equal" if kind == "equal" else self.pick("Greater", "Less", "GreaterOrEqual", "LessOrEqual")
            side = self.node(op, h, self.const([limit]))
            factor = self.node("Where", side, self.const([5], np.float32), self.const([1], np.float32))
            return self.node("Mul", x, factor)
        if kind == "if above":
            side = self.node("Squeeze", self.node("Greater", h, self.const([limit])), self.const([0]))
            then, other = (
                helper.make_graph(
                    [helper.make_node("Mul" if op == "Mul" else "Identity", [x, *more], [out])],
                    out, [], [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
                )
                for op, more, out in (
                    ("Mul", [self.const([5], np.float32)], self.name("t")),
                    ("Identity", [], self.name("e")),
                )
            )  # fmt: skip
            return self.node("If", side, then_branch=then, else_branch=other)
        if kind == "cut above":
            return self.node("Slice", x, self.const([0]), self.const([limit]), self.const([Y]))
        if kind == "resize up to":
            head = self.node("Slice", self.node("Shape", x), self.const([0]), self.const([2]), self.const([0]))
            sizes = self.node("Concat", head, self.node("Min", h, self.const([limit])), self.size(x, X), axis=0)
            return self.node("Resize", x, "", "", sizes, mode="nearest")
        if kind == "pad above":
            pad = self.node("Max", self.node("Sub", h, self.const([limit])), self.const([0]))
            zeros = self.const([0] * 6)
            return self.node("Pad", x, self.node("Concat", zeros, pad, self.const([0]), axis=0))
        if kind == "count of blocks":
            blocks = self.node("Div", h, self.const([self.pick(4, 6)]))
            return self.node("Mul", x, self.node("Cast", self.node("Sub", blocks, blocks), to=TensorProto.FLOAT))
        if kind == "zoom":
            doubled = [self.node("Mul", self.size(x, axis), self.const([2])) for axis in (Y, X)]
            head = self.node("Slice", self.node("Shape", x), self.const([0]), self.const([2]), self.const([0]))
            y = self.node("Resize", x, "", "", self.node("Concat", head, *doubled, axis=0), mode="linear")
            return self.node("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
        if kind == "bias of size":
            bias = self.node("Expand", self.node("Cast", h, to=TensorProto.FLOAT), self.const([channels]))
            w = self.const(self.weights(channels, channels, 1, 1), np.float32)
            return self.node("Conv", x, w, bias, kernel_shape=[1, 1])
        if kind == "bias of image":
            corner = self.node("Slice", x, self.const([0, 0]), self.const([1, 1]), self.const([Y, X]))
            w = self.const(self.weights(channels, channels, 1, 1), np.float32)
            return self.node("Conv", x, w, self.node("Reshape", corner, self.const([-1])), kernel_shape=[1, 1])
        if kind == "by size":
            return self.node("Div", x, self.node("Cast", h, to=TensorProto.FLOAT))
        if kind == "first row":
            row = self.node("Slice", x, self.const([0]), self.const([1]), self.const([Y]))
            flat = self.node("Squeeze", row, self.const([Y]))
            return self.node("Add", x, self.node("Unsqueeze", flat, self.const([Y])))
        if kind == "factor":
            factor = self.pick(1.5, 3, 1.3, 0.7, 2 / 3, 1.25, 0.5)
            self.say(f"by {factor}")
            more = {"coordinate_transformation_mode": self.pick("half_pixel", "asymmetric", "align_corners")}
            return self.node(
                "Resize",
                x,
                "",
                self.const([1, 1, factor, factor], np.float32),
                mode=self.pick("linear", "nearest"),
                **more,
            )
        if kind == "split":
            first = self.pick(
                self.const([3]), self.node("Div", h, self.const([2])), self.node("Sub", h, self.const([4]))
            )
            parts = self.node("Concat", first, self.node("Sub", h, first), axis=0)
            upper, lower = self.name("upper"), self.name("lower")
            self.nodes.append(helper.make_node("Split", [x, parts], [upper, lower], axis=Y, name=f"n_{upper}"))
            return self.pick(upper, lower)
        if kind == "mean of channels":
            mean = self.node("ReduceMean", x, self.const([self.pick(1, 1, 1, Y)]), keepdims=1)
            return self.node("Sub", x, mean)
        if kind == "channels last":
            last = self.node("Transpose", x, perm=[0, 2, 3, 1])
            w = self.const(self.weights(channels, channels), np.float32)
            return self.node(
                "Transpose", self.node("Softmax", self.node("MatMul", last, w), axis=-1), perm=[0, 3, 1, 2]
            )
        if kind == "small":
            return self.node("Mul", x, self.const([1e-5], np.float32))
        if kind == "difference":
            w = self.const(self.weights(channels, channels, 3, 3) * 1e-2, np.float32)
            return self.node("Sub", x, self.node("Add", x, self.node("Conv", x, w, pads=[1, 1, 1, 1])))
        if kind == "blocks of size":
            side = self.pick(4, 8)
            whole = self.node("Mul", self.node("Div", h, self.const([side])), self.const([side]))
            return self.node("Slice", x, self.const([0]), whole, self.const([Y]))
        if kind == "flat":
            shape = self.node("Shape", x)
            flat = self.node("Reshape", x, self.const([0, 0, -1]))
            w = self.const(self.weights(channels, channels), np.float32)
            return self.node("Reshape", self.node("MatMul", w, flat), shape)
        if kind == "normed":
            ones = self.const([1] * channels, np.float32)
            op = self.pick("InstanceNormalization", "BatchNormalization", "BatchNormalization")
            more = [] if op == "InstanceNormalization" else [ones, ones]
            return self.node(op, x, ones, ones, *more)
        if kind == "gathered":
            steps = self.node(
                "Range", self.const(0), self.node("Squeeze", h, self.const([0])), self.const(self.pick(1, 2))
            )
            return self.node("Gather", x, steps, axis=Y)
        assert kind == "shuffle"
        deep = self.node("SpaceToDepth", x, blocksize=2)
        return self.node("DepthToSpace", deep, blocksize=2)


def draw_network(seed: int) -> tuple[onnx.ModelProto, str]:
    """A network x -> y of free size with two channels, and what is in it."""
    d = Drawing(np.random.default_rng(seed))
    depth = d.pick(0, 1, 1, 1, 2)
    x, channels = "x", 2
    if d.chance(0.2):
        x = d.twisted(x, channels)
    x = d.padded(x, channels, 2, depth) if d.chance(0.45) else d.unet(x, channels, 2, depth)
    if d.chance(0.35):
        x = d.twisted(x, 2)
    return d.model(x), ", ".join(d.traits)
