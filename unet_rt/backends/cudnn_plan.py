"""A 2-D network for one input shape as a list of steps over one block of device memory, for the cuDNN backend.

What becomes of a graph:

- Maps lie channels-last in float16, channels filled up with zeros to a multiple of 8 (weights likewise), in buffers whose
  lifetimes share one block of memory.
- A convolution takes bias and ReLU along. The first one reads the planar input itself where it is 3 x 3 with few
  channels, else the input is first put into channels-last form.
- A concatenation is no step: it is a buffer, and what is concatenated is written into its channels. A transposed
  convolution whose stride is its kernel writes there too, as one 1 x 1 convolution per place of the kernel.
- A crop is no step either but a window of its buffer, unless a concatenation needs it: then the pooling of the same map,
  which reads it anyway, writes the copy.
- A 1 x 1 convolution to few classes at the end writes the planar output, with its sigmoid or softmax.

Everything else is refused by the name of its node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from unet_rt import shapes
from unet_rt.backends.cudnn_api import Convolution
from unet_rt.errors import BackendError
from unet_rt.field import size_text

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, np.dtype[Any]]
Size = tuple[int, int]

VECTOR: Final = 8  # channels of 16 bytes
_ALIGNMENT: Final = 1024  # bytes, of buffers
_FIRST_CHANNELS: Final = 4  # most channels for the kernel of the first layer
_HEAD_FILTERS, _HEAD_WEIGHTS = 8, 768  # as in csrc/cudnn_steps.h
_ACTIVATIONS: Final = {"none": 0, "Relu": 1, "Sigmoid": 2, "Softmax": 3}
_LARGEST: Final = 65504.0


class Refused(BackendError):
    """The graph has what this backend does not run."""


# ------------------------------------------------------------------------------------------------------------- values


@dataclass
class Buffer:
    """(N, Y, X, channels) in float16.

    Attributes:
        channels, size: Its shape, for any batch.
        first, last: Steps that write it first and read it last.
        offset: Bytes from the start of the block.
    """

    channels: int
    size: Size
    first: int = -1
    last: int = -1
    offset: int = 0


@dataclass(frozen=True)
class Region:
    """Part of a buffer: some channels of a window, or of every ``step``-th sample."""

    buffer: int
    offset: int
    channels: int
    size: Size
    start: Size = (0, 0)
    step: Size = (1, 1)


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: where it is, and which of the region's channels its own are."""

    region: Region
    places: tuple[int, ...]


# -------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Step:
    """One launch. ``name``: of the node, for messages and measurements."""

    name: str

    @property
    def reads(self) -> tuple[Region, ...]:
        return tuple(r for key in ("source", "other") if (r := getattr(self, key, None)) is not None)

    @property
    def writes(self) -> tuple[Region, ...]:
        return tuple(r for key in ("target", "crop") if (r := getattr(self, key, None)) is not None)


@dataclass(frozen=True)
class Enter(Step):
    """The planar input ``index`` of ``channels`` to channels-last."""

    index: int
    channels: int
    target: Region


@dataclass(frozen=True)
class First(Step):
    """3 x 3 convolution of the planar input ``index``. weights: key of (channels, 3, 3, filters) float32."""

    index: int
    channels: int
    size: Size
    before: Size
    weights: str
    bias: str
    relu: bool
    target: Region


@dataclass(frozen=True)
class Convolve(Step):
    """weights: key of (filters, kernel Y, kernel X, channels) float16; bias: key of (filters,) float16."""

    source: Region
    target: Region
    convolution: Convolution
    weights: str
    bias: str


@dataclass(frozen=True)
class Pool(Step):
    """2 x 2 maximum; with ``crop``, the window of ``source`` from ``start`` on is copied there, too."""

    source: Region
    target: Region
    crop: Region | None = None
    start: Size = (0, 0)


@dataclass(frozen=True)
class Combine(Step):
    """source + other, or a copy, negative results times ``slope``."""

    source: Region
    other: Region | None
    target: Region
    slope: float = 1.0


@dataclass(frozen=True)
class Resize(Step):
    source: Region
    target: Region
    factor: int
    linear: bool


@dataclass(frozen=True)
class Head(Step):
    """1 x 1 convolution to the planar output ``index``. weights: (filters, channels of source) float32."""

    source: Region
    weights: Array
    bias: Array
    activation: int
    index: int


@dataclass(frozen=True)
class Leave(Step):
    """``channels`` of source to the planar output ``index``."""

    source: Region
    channels: int
    activation: int
    index: int


@dataclass
class Plan:
    """What a run consists of, for inputs of fixed shapes.

    Attributes:
        inputs, outputs: Shapes (N, C, Y, X), planar.
        steps: In order.
        buffers: What steps read and write.
        constants: Weights and biases as the steps take them, by key.
        bytes: Of the block that holds all buffers.
    """

    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    steps: list[Step]
    buffers: list[Buffer]
    constants: dict[str, Array]
    bytes: int = 0

    @property
    def batch(self) -> int:
        return self.inputs[0][0]

    def place(self, region: Region) -> tuple[int, int, int, int]:
        """Bytes from the block's start to the region's first sample, and between images, rows and columns."""
        buffer = self.buffers[region.buffer]
        column = 2 * buffer.channels
        row = column * buffer.size[1]
        start = buffer.offset + region.start[0] * row + region.start[1] * column + 2 * region.offset
        return start, row * buffer.size[0], row * region.step[0], column * region.step[1]

    def traffic(self, step: Step) -> int:
        """Bytes that a step has to read and write at least."""
        if isinstance(step, Convolve):
            return step.convolution.bytes
        maps = [*step.reads, *step.writes]
        total = sum(2 * self.batch * r.size[0] * r.size[1] * r.channels for r in maps)
        if isinstance(step, Enter | First):
            total += 2 * int(np.prod(self.inputs[step.index]))
        if isinstance(step, Head | Leave):
            total += 2 * int(np.prod(self.outputs[step.index]))
        return total

    def flops(self, step: Step) -> int:
        """Multiplications and additions of a convolution; 0 for the rest."""
        if isinstance(step, Convolve):
            return step.convolution.flops
        if isinstance(step, First):
            y, x = step.target.size
            return 2 * 9 * step.channels * step.target.channels * y * x * self.batch
        if isinstance(step, Head):
            y, x = step.source.size
            return 2 * int(step.weights.size) * y * x * self.batch
        return 0


# ---------------------------------------------------------------------------------------------------------- compiling


def read(model: Path | str | onnx.ModelProto) -> onnx.ModelProto:
    """The graph with what can be folded folded (constants, batch normalisation); weights stay float32."""
    import onnx

    from unet_rt.passes.fold import fold

    loaded = onnx.load(str(model)) if isinstance(model, Path | str) else model
    proto = onnx.ModelProto()
    proto.CopyFrom(loaded)
    if any(a.type in (a.GRAPH, a.GRAPHS) for node in proto.graph.node for a in node.attribute):
        raise Refused("the graph has branches or loops, which the cuDNN backend does not run; use another backend")
    fold(proto)
    return proto


def compile_plan(proto: onnx.ModelProto, inputs: Sequence[Sequence[int]], *, direct: bool = True) -> Plan:
    """The steps for inputs of these shapes.

    Args:
        proto: As :func:`read` gives it.
        inputs: (N, C, Y, X) per input of the graph.
        direct: Whether the kernel for a first layer of few channels may be used.

    Raises:
        Refused: A node this backend does not run, or a shape that the graph does not take.
    """
    return _Compiler(proto, [tuple(int(n) for n in shape) for shape in inputs], direct).run()


def _padded(channels: int) -> int:
    return -(-channels // VECTOR) * VECTOR


@dataclass
class _Node:
    """A node, with the activation that follows it and is computed with it."""

    proto: Any
    op: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]
    after: str = "none"
    slope: float = 1.0
    merged: bool = False  # into the node before it

    @property
    def key(self) -> str:
        """A name that no other node has."""
        return str(self.proto.output[0])


class _Compiler:
    def __init__(self, proto: onnx.ModelProto, inputs: Sequence[tuple[int, ...]], direct: bool) -> None:
        from onnx import numpy_helper

        self.graph, self.direct = proto.graph, direct
        self.opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.known: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        ports = [value for value in proto.graph.input if value.name not in self.known]
        if len(ports) != len(inputs):
            raise Refused(f"the graph has {len(ports)} inputs, shapes of {len(inputs)} were given")
        self.input_names = [port.name for port in ports]
        self.output_names = [port.name for port in proto.graph.output]
        self.shapes: dict[str, tuple[int, ...]] = {}
        for port, shape in zip(ports, inputs, strict=True):
            self._check_input(port, shape)
            self.shapes[port.name] = shape
        self.inputs = tuple(inputs)
        self.batch = inputs[0][0]
        self.values: dict[str, Value] = {}
        self.placed: dict[str, Region] = {}  # tensors that a concatenation wants in its buffer
        self.weights: dict[str, tuple[Array, Array]] = {}  # of layers, by node
        self.pools: dict[Region, int] = {}  # step that pools a region
        self.plan = Plan(self.inputs, (), [], [], {})
        self.nodes = [self._node(node) for node in proto.graph.node]

    def _check_input(self, port: Any, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or min(shape) < 1:
            raise Refused(
                f"input {port.name} has shape {size_text(shape)}; the cuDNN backend runs 2-D networks "
                "(N, C, Y, X) alone, use another backend"
            )
        wanted = [d.dim_value for d in port.type.tensor_type.shape.dim]
        # A fixed batch does not bind: no step that is taken mixes images.
        if wanted and (len(wanted) != 4 or any(w > 0 and w != s for w, s in zip(wanted[1:], shape[1:], strict=True))):
            raise Refused(f"input {port.name} takes {wanted} (0: any), {list(shape)} was given; use those sizes")

    def _node(self, node: Any) -> _Node:
        from onnx import helper

        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        name = node.name or node.output[0]
        if node.domain not in ("", "ai.onnx") or any(node.output[1:]):
            raise Refused(f"the cuDNN backend does not run node {name!r} ({node.op_type}); use another backend")
        return _Node(node, node.op_type, name, tuple(node.input), node.output[0], attributes)

    def _refuse(self, node: _Node, why: str) -> NoReturn:
        raise Refused(f"the cuDNN backend does not run node {node.name!r} ({node.op} {why}); use another backend")

    def run(self) -> Plan:
        self._merge_activations()
        for node in self.nodes:
            self._infer(node)
        self._place_concatenations()
        for node in self.nodes:
            if not node.merged and node.output not in self.known:
                self._emit(node)
        self.plan.outputs = tuple(self.shapes[name] for name in self.output_names)
        for index, name in enumerate(self.output_names):
            if not any(isinstance(s, Head | Leave) and s.index == index for s in self.plan.steps):
                raise Refused(f"output {name} of the graph is no result of a layer; use another backend")
        self._allocate()
        return self.plan

    # ------------------------------------------------------------------------------------------- what follows what

    def _merge_activations(self) -> None:
        readers: dict[str, list[_Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node)
        for node in self.nodes:
            if node.op not in ("Conv", "ConvTranspose", "Add", "Relu", "LeakyRelu"):
                continue
            following = readers.get(node.output, [])
            if len(following) != 1 or node.output in self.output_names:
                continue
            act = following[0]
            final = act.op in ("Sigmoid", "Softmax") and act.output in self.output_names
            if act.op == "Softmax" and (self.opset < 13 or act.attributes.get("axis", -1) not in (1, -3)):
                continue
            if node.op in ("Relu", "LeakyRelu"):
                continue
            if act.op == "Relu" or (final and not readers.get(act.output)):
                node.after, node.slope = act.op, 0.0 if act.op == "Relu" else 1.0
            elif act.op == "LeakyRelu":
                node.after, node.slope = act.op, float(act.attributes.get("alpha", 0.01))
            else:
                continue
            act.merged = True
            node.output = act.output

    # ----------------------------------------------------------------------------------------------------- shapes

    def _infer(self, node: _Node) -> None:
        """Shape of a node's output, or its value where it depends on shapes and constants alone."""
        if node.merged:
            return
        images = [name for name in node.inputs if name in self.shapes]
        if node.op == "Shape" and images:
            whole = np.array(self.shapes[images[0]], np.int64)
            stop = node.attributes.get("end")
            self.known[node.output] = whole[node.attributes.get("start", 0) : stop]
            return
        if not images:
            arrays = [self.known.get(name) if name else None for name in node.inputs]
            found = shapes.evaluate(node.op, node.attributes, arrays)
            if found is None:
                self._refuse(node, "of constants")
            self.known[node.output] = found
            return
        rule = getattr(self, f"_shape_{node.op.lower()}", None)
        if rule is None:
            self._refuse(node, "is not among its operators")
        shape = rule(node, self.shapes[images[0]])
        if min(shape) < 1:
            self._refuse(node, f"would have {size_text(shape)} samples at this tile")
        self.shapes[node.output] = shape

    def _constant(self, node: _Node, index: int, what: str) -> Array:
        name = node.inputs[index] if len(node.inputs) > index else ""
        if name not in self.known:
            self._refuse(node, f"with {what} that are computed")
        return self.known[name]

    def _window(self, node: _Node, shape: tuple[int, ...], kernel: Size) -> tuple[Size, Size, Size, Size]:
        """Strides, dilations, padding before and after."""
        a = node.attributes
        strides, dilations = tuple(a.get("strides", (1, 1))), tuple(a.get("dilations", (1, 1)))
        pads = tuple(a.get("pads", (0, 0, 0, 0)))
        auto = a.get("auto_pad", b"NOTSET").decode() if "auto_pad" in a else "NOTSET"
        before, after = pads[:2], pads[2:]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            total = [
                max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
                for n, s, k, d in zip(shape[2:], strides, kernel, dilations, strict=True)
            ]
            small, large = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
            before, after = (small, large) if auto == "SAME_UPPER" else (large, small)
        elif auto not in ("NOTSET", "VALID"):
            self._refuse(node, f"with auto_pad {auto}")
        return strides, dilations, before, after

    def _weights(self, node: _Node) -> tuple[Array, Array]:
        """Weights and bias in float32."""
        if node.key not in self.weights:
            self.weights[node.key] = self._read_weights(node)
        return self.weights[node.key]

    def _read_weights(self, node: _Node) -> tuple[Array, Array]:
        w = self._constant(node, 1, "weights").astype(np.float32)
        filters = w.shape[0] if node.op == "Conv" else w.shape[1]
        has_bias = len(node.inputs) > 2 and node.inputs[2]
        b = self._constant(node, 2, "biases").astype(np.float32) if has_bias else np.zeros(filters, np.float32)
        if w.ndim != 4:
            self._refuse(node, f"of {w.ndim - 2} spatial axes")
        if node.attributes.get("group", 1) != 1:
            self._refuse(node, f"in {node.attributes['group']} groups")
        if not (np.abs(w).max(initial=0) <= _LARGEST and np.abs(b).max(initial=0) <= _LARGEST):
            self._refuse(node, "with weights beyond float16")
        return w, b

    def _convolution(self, node: _Node, shape: tuple[int, ...]) -> Convolution:
        w, _ = self._weights(node)
        if w.shape[1] != shape[1]:
            self._refuse(node, f"of {w.shape[1]} channels on {shape[1]}")
        kernel = (int(w.shape[2]), int(w.shape[3]))
        strides, dilations, before, after = self._window(node, shape, kernel)
        return Convolution(
            shape[0],
            (shape[2], shape[3]),
            _padded(shape[1]),
            _padded(w.shape[0]),
            kernel,
            strides,
            dilations,
            before,
            after,
            activation="relu" if node.after == "Relu" else "none",
        )

    def _shape_conv(self, node: _Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[0], self._weights(node)[0].shape[0], *self._convolution(node, shape).out_size

    def _shape_convtranspose(self, node: _Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        w, _ = self._weights(node)
        a = node.attributes
        strides = tuple(a.get("strides", (1, 1)))
        plain = (
            strides == w.shape[2:]
            and not any(a.get("pads", ()))
            and not any(a.get("output_padding", ()))
            and set(a.get("dilations", (1, 1))) == {1}
            and "output_shape" not in a
            and w.shape[0] == shape[1]
        )
        if not plain:
            self._refuse(node, "whose kernel overlaps or is padded")
        return shape[0], w.shape[1], shape[2] * strides[0], shape[3] * strides[1]

    def _shape_maxpool(self, node: _Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        a = node.attributes
        plain = (
            tuple(a["kernel_shape"]) == (2, 2)
            and tuple(a.get("strides", (1, 1))) == (2, 2)
            and not any(a.get("pads", ()))
            and set(a.get("dilations", (1, 1))) == {1}
            and (not a.get("ceil_mode", 0) or shape[2] % 2 + shape[3] % 2 == 0)
            and a.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        )
        if not plain:
            self._refuse(node, "other than 2 x 2 with stride 2")
        return shape[0], shape[1], shape[2] // 2, shape[3] // 2

    def _shape_relu(self, node: _Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    _shape_leakyrelu = _shape_relu

    def _shape_add(self, node: _Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        if any(self.shapes.get(name) != shape for name in node.inputs):
            self._refuse(node, "of different shapes")
        return shape

    def _shape_concat(self, node: _Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        all_shapes = [self.shapes.get(name) for name in node.inputs]
        if node.attributes["axis"] not in (1, -3) or any(
            s is None or (s[0], *s[2:]) != (shape[0], *shape[2:]) for s in all_shapes
        ):
            self._refuse(node, "other than of channels")
        return shape[0], sum(s[1] for s in all_shapes if s is not None), *shape[2:]

    def _crop(self, node: _Node, shape: tuple[int, ...]) -> tuple[Size, Size]:
        """Start and size of a Slice along the spatial axes."""
        arrays = [None, *(self.known.get(name) if name else None for name in node.inputs[1:])]
        bounds = shapes.slice_arguments(node.attributes, arrays, 4)
        if bounds is None:
            self._refuse(node, "with bounds that are computed")
        start, stop = [0, 0, 0, 0], list(shape)
        for axis, first, last, step in bounds:
            if step != 1:
                self._refuse(node, "with steps")
            start[axis], stop[axis] = slice(first, last).indices(shape[axis])[:2]
        if start[:2] != [0, 0] or stop[:2] != list(shape[:2]):
            self._refuse(node, "of images or channels")
        return (start[2], start[3]), (stop[2] - start[2], stop[3] - start[3])

    def _shape_slice(self, node: _Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[0], shape[1], *self._crop(node, shape)[1]

    def _resize(self, node: _Node, shape: tuple[int, ...]) -> tuple[int, bool]:
        """Factor, and whether it interpolates."""
        a = {k: v.decode() if isinstance(v, bytes) else v for k, v in node.attributes.items()}
        mode, place = a.get("mode", "nearest"), a.get("coordinate_transformation_mode", "half_pixel")
        arrays = [self.known.get(name) if name else None for name in node.inputs]
        scales = arrays[2] if len(arrays) > 2 else None
        sizes = arrays[3] if len(arrays) > 3 else None
        if a.get("axes") is not None or a.get("antialias", 0):
            self._refuse(node, "of some axes or with antialiasing")
        if sizes is not None and sizes.size == 4:
            ratios = [size / n for size, n in zip(sizes.tolist(), shape, strict=True)]
        elif scales is not None and scales.size == 4:
            ratios = scales.tolist()
        else:
            self._refuse(node, "whose sizes are computed")
        factor = int(ratios[2])
        if ratios[:2] != [1, 1] or ratios[2] != ratios[3] or ratios[2] != factor or factor < 1:
            self._refuse(node, f"by {ratios}")
        nearest = a.get("nearest_mode", "round_prefer_floor")
        if mode == "linear" and place in ("half_pixel", "pytorch_half_pixel"):
            if place == "pytorch_half_pixel" and factor * min(shape[2:]) == 1:
                self._refuse(node, "of one sample")
            return factor, True
        repeats = (place == "asymmetric" and nearest == "floor") or (
            place == "half_pixel" and nearest in ("round_prefer_floor", "round_prefer_ceil")
        )
        if mode != "nearest" or not repeats:
            self._refuse(node, f"{mode}, {place}, {nearest}")
        return factor, False

    def _shape_resize(self, node: _Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        factor, _ = self._resize(node, shape)
        return shape[0], shape[1], shape[2] * factor, shape[3] * factor

    # ---------------------------------------------------------------------------------------------------- buffers

    def _buffer(self, channels: int, size: Size) -> int:
        self.plan.buffers.append(Buffer(channels, size))
        return len(self.plan.buffers) - 1

    def _place_concatenations(self) -> None:
        """Gives every concatenation a buffer, and what is concatenated its place there."""
        made = {node.output: node for node in self.nodes if not node.merged}
        for node in self.nodes:
            if node.op != "Concat" or node.output not in self.shapes:
                continue
            counts = [self.shapes[name][1] for name in node.inputs]
            size = self.shapes[node.output][2:]
            buffer = self._buffer(sum(map(_padded, counts)), (size[0], size[1]))
            offset = 0
            places: list[int] = []
            for name, count in zip(node.inputs, counts, strict=True):
                region = Region(buffer, offset, _padded(count), (size[0], size[1]))
                maker = made.get(name)
                if name not in self.placed and maker is not None and maker.op != "Concat":
                    self.placed[name] = region
                places += range(offset, offset + count)
                offset += _padded(count)
            whole = Region(buffer, 0, offset, (size[0], size[1]))
            self.values[node.output] = Value(whole, tuple(places))

    def _target(self, name: str) -> Value:
        """Where a tensor is to be written."""
        shape = self.shapes[name]
        region = self.placed.get(name)
        if region is None:
            size = (shape[2], shape[3])
            region = Region(self._buffer(_padded(shape[1]), size), 0, _padded(shape[1]), size)
        value = Value(region, tuple(range(shape[1])))
        self.values[name] = value
        return value

    def _value(self, name: str) -> Value:
        """A tensor in channels-last form; the input is put into it when first asked for."""
        if name not in self.values and name in self.input_names:
            value = self._target(name)
            self.plan.steps.append(Enter(name, self.input_names.index(name), self.shapes[name][1], value.region))
        return self.values[name]

    # ------------------------------------------------------------------------------------------------------ steps

    def _emit(self, node: _Node) -> None:
        getattr(self, f"_emit_{node.op.lower()}")(node)
        if node.output in self.output_names:
            index = self.output_names.index(node.output)
            if not any(isinstance(s, Head) and s.index == index for s in self.plan.steps):
                value = self.values[node.output]
                if value.places != tuple(range(len(value.places))):
                    self._refuse(node, "as output")
                act = node.after if node.after in ("Sigmoid", "Softmax") else "none"
                self.plan.steps.append(Leave(node.output, value.region, len(value.places), _ACTIVATIONS[act], index))

    def _keep(self, key: str, array: Array) -> str:
        self.plan.constants[key] = np.ascontiguousarray(array)
        return key

    def _emit_conv(self, node: _Node) -> None:
        name = node.inputs[0]
        shape = self.shapes[name]
        w, b = self._weights(node)
        convolution = self._convolution(node, shape)
        filters, kernel = w.shape[0], convolution.kernel
        unmoved = convolution.strides == (1, 1) and convolution.dilations == (1, 1)
        first = (
            self.direct
            and name in self.input_names
            and name not in self.values
            and shape[1] <= _FIRST_CHANNELS
            and kernel == (3, 3)
            and unmoved
            and node.after in ("none", "Relu")
        )
        if first:
            value = self._target(node.output)
            taps = np.zeros((shape[1], 3, 3, value.region.channels), np.float32)
            taps[..., :filters] = _rounded(w).transpose(1, 2, 3, 0)
            self.plan.steps.append(
                First(
                    node.name,
                    self.input_names.index(name),
                    shape[1],
                    (shape[2], shape[3]),
                    convolution.before,
                    self._keep(f"{node.key}/first/weights", taps),
                    self._keep(f"{node.key}/first/bias", _filled(b, value.region.channels, np.float32)),
                    node.after == "Relu",
                    value.region,
                )
            )
            return
        source = self._value(name)
        head = (
            node.output in self.output_names
            and kernel == (1, 1)
            and unmoved
            and not any((*convolution.before, *convolution.after))
            and filters <= _HEAD_FILTERS
            and filters * source.region.channels <= _HEAD_WEIGHTS
            and node.after in _ACTIVATIONS
            and not any(node.output in other.inputs for other in self.nodes)
        )
        if head:
            spread = np.zeros((filters, source.region.channels), np.float32)
            spread[:, list(source.places)] = _rounded(w[:, :, 0, 0])
            index = self.output_names.index(node.output)
            self.plan.steps.append(Head(node.name, source.region, spread, b, _ACTIVATIONS[node.after], index))
            return
        target = self._target(node.output)
        self._convolve(node, "", source, target.region, w, b, convolution)
        self._activate(node, target.region)

    def _activate(self, node: _Node, region: Region) -> None:
        if node.after == "LeakyRelu":
            self.plan.steps.append(Combine(f"{node.name}/leaky", region, None, region, node.slope))

    def _convolve(
        self, node: _Node, part: str, source: Value, target: Region, w: Array, b: Array, what: Convolution
    ) -> None:
        """``part``: which one of several of a node; ``w``: (filters, channels, kernel Y, kernel X)."""
        weights = np.zeros((target.channels, *what.kernel, source.region.channels), np.float16)
        weights[: w.shape[0], :, :, list(source.places)] = w.transpose(0, 2, 3, 1)
        strides = []
        for region in (source.region, target):
            _, image, row, column = self.plan.place(region)
            strides.append((image // 2, row // 2, column // 2))
        what = replace(
            what,
            channels=source.region.channels,
            filters=target.channels,
            x_strides=strides[0],
            y_strides=strides[1],
        )
        self.plan.steps.append(
            Convolve(
                f"{node.name}{part}",
                source.region,
                target,
                what,
                self._keep(f"{node.key}/weights{part}", weights),
                self._keep(f"{node.key}/bias", _filled(b, target.channels, np.float16)),
            )
        )

    def _emit_convtranspose(self, node: _Node) -> None:
        w, b = self._weights(node)
        source, target = self._value(node.inputs[0]), self._target(node.output).region
        size, factors = source.region.size, (int(w.shape[2]), int(w.shape[3]))
        for i in range(factors[0]):
            for j in range(factors[1]):
                place = replace(target, size=size, start=(i, j), step=factors)
                what = Convolution(
                    self.batch,
                    size,
                    source.region.channels,
                    target.channels,
                    (1, 1),
                    activation="relu" if node.after == "Relu" else "none",
                )
                taps = w[:, :, i : i + 1, j : j + 1].transpose(1, 0, 2, 3)
                self._convolve(node, f"[{i},{j}]", source, place, taps, b, what)
        self._activate(node, target)

    def _emit_maxpool(self, node: _Node) -> None:
        source, target = self._value(node.inputs[0]), self._target(node.output)
        self.values[node.output] = Value(target.region, tuple(range(self.shapes[node.output][1])))
        self._same_places(node, source)
        self.pools.setdefault(source.region, len(self.plan.steps))
        self.plan.steps.append(Pool(node.name, source.region, target.region))

    def _same_places(self, node: _Node, source: Value) -> None:
        """Steps that keep channels where they are need them at the start: not so for a concatenation with gaps."""
        if source.places == tuple(range(len(source.places))):
            return
        if node.output in self.placed:
            self._refuse(node, "of a concatenation with other than multiples of 8 channels, concatenated again")
        # The buffer of the target is made as wide as the source.
        region = self.values[node.output].region
        self.plan.buffers[region.buffer].channels = source.region.channels
        self.values[node.output] = Value(replace(region, channels=source.region.channels), source.places)

    def _emit_relu(self, node: _Node) -> None:
        source = self._value(node.inputs[0])
        self._target(node.output)
        self._same_places(node, source)
        slope = 0.0 if node.op == "Relu" else float(node.attributes.get("alpha", 0.01))
        target = self.values[node.output].region
        self.plan.steps.append(Combine(node.name, source.region, None, target, slope))

    _emit_leakyrelu = _emit_relu

    def _emit_add(self, node: _Node) -> None:
        a, b = (self._value(name) for name in node.inputs)
        if a.places != b.places:
            self._refuse(node, "of differently concatenated tensors")
        self._target(node.output)
        self._same_places(node, a)
        target = self.values[node.output].region
        self.plan.steps.append(Combine(node.name, a.region, b.region, target, node.slope))

    def _emit_concat(self, node: _Node) -> None:
        """Copies what could not be written into the buffer in the first place."""
        value = self.values[node.output]
        offset = 0
        for name in node.inputs:
            count = self.shapes[name][1]
            region = replace(value.region, offset=offset, channels=_padded(count))
            if self.placed.get(name) != region:
                source = self._value(name)
                if source.places != tuple(range(count)):
                    self._refuse(node, "of a concatenation with other than multiples of 8 channels")
                self.plan.steps.append(Combine(f"{node.name}/copy", source.region, None, region))
            offset += _padded(count)

    def _emit_slice(self, node: _Node) -> None:
        source = self._value(node.inputs[0])
        start, size = self._crop(node, self.shapes[node.inputs[0]])
        region = source.region
        window = replace(region, start=(region.start[0] + start[0], region.start[1] + start[1]), size=size)
        target = self.placed.get(node.output)
        if target is None:
            self.values[node.output] = Value(window, source.places)
            return
        self._target(node.output)
        if source.places != tuple(range(len(source.places))):
            self._refuse(node, "of a concatenation, concatenated again")
        for pooled, index in self.pools.items():
            step = self.plan.steps[index]
            same = (pooled.buffer, pooled.offset, pooled.channels) == (region.buffer, region.offset, region.channels)
            inside = all(
                a <= b and b + n <= a + m
                for a, m, b, n in zip(pooled.start, pooled.size, window.start, size, strict=True)
            )
            if same and inside and isinstance(step, Pool) and step.crop is None:
                begin = (window.start[0] - pooled.start[0], window.start[1] - pooled.start[1])
                self.plan.steps[index] = replace(step, crop=target, start=begin)
                return
        self.plan.steps.append(Combine(node.name, window, None, target))

    def _emit_resize(self, node: _Node) -> None:
        source = self._value(node.inputs[0])
        factor, linear = self._resize(node, self.shapes[node.inputs[0]])
        self._target(node.output)
        self._same_places(node, source)
        target = self.values[node.output].region
        self.plan.steps.append(Resize(node.name, source.region, target, factor, linear))

    # ----------------------------------------------------------------------------------------------------- memory

    def _allocate(self) -> None:
        """Puts buffers that are never needed together at the same addresses: the largest first, each as low as it fits."""
        plan = self.plan
        for index, step in enumerate(plan.steps):
            for region in (*step.reads, *step.writes):
                buffer = plan.buffers[region.buffer]
                buffer.first = index if buffer.first < 0 else buffer.first
                buffer.last = index
        done: list[tuple[Buffer, int]] = []
        for buffer in sorted(plan.buffers, key=lambda b: -_bytes(b, self.batch)):
            if buffer.first < 0:
                continue
            size = _bytes(buffer, self.batch)
            place = 0
            for other, end in sorted(done, key=lambda entry: entry[0].offset):
                if other.last < buffer.first or buffer.last < other.first:
                    continue
                if place + size <= other.offset:
                    break
                place = max(place, end)
            buffer.offset = place
            done.append((buffer, place + size))
            plan.bytes = max(plan.bytes, place + size)


def _bytes(buffer: Buffer, batch: int) -> int:
    raw = 2 * batch * buffer.channels * buffer.size[0] * buffer.size[1]
    return -(-raw // _ALIGNMENT) * _ALIGNMENT


def _rounded(array: Array) -> Array:
    """What float16 makes of weights, as float32: the network's precision is one, whatever step computes."""
    return array.astype(np.float16).astype(np.float32)


def _filled(array: Array, size: int, dtype: Any) -> Array:
    out = np.zeros(size, dtype)
    out[: array.size] = array
    return out
