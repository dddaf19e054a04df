"""Read-only questions to an ONNX graph: stride, halo, reach, exactness, accepted sizes, cost.

The graph is walked at three sizes T, T + S and T + 2S (:mod:`unet_rt.propagate`). What all three agree on is the
answer; where they do not, or where a node depends on more than a neighbourhood, the answer is "not exact" and the
nodes at fault.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .errors import GraphError, size_text
from .line import Line, input_line
from .onnx_file import Graph, Node, Value, load_model, read_graph, restricted
from .passes.free_crops import free_crops
from .propagate import Axis, Tensor, Walk, plain, sole_line, tracked, value_of, walk
from .shapes import ELEMENT_BYTES
from .tiling.field import AxisField, OutputField, Pair, TileSizes

COST_TILES = (512, 1024, 2048, 4096)
SPATIAL = {1: "X", 2: "YX", 3: "ZYX"}
# Down-sampling beyond this is no network for images but a size baked into the graph.
_MAX_STRIDE = 2048
_MAX_SIZE = 8192
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
           10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16"}  # fmt: skip


@dataclass(frozen=True)
class GraphInput:
    """One input as declared. ``axes`` is e.g. ``"NCYX"``; ``shape`` holds None where a dimension is free."""

    name: str
    axes: str
    shape: tuple[int | None, ...]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "axes": self.axes, "shape": list(self.shape), "dtype": self.dtype}


@dataclass(frozen=True)
class GraphReport:
    """What a graph says about itself.

    Attributes:
        inputs: Inputs as declared; the spatial axes of all of them are one pixel grid.
        outputs: One field per output.
        sizes: Tile sizes that the graph accepts for the outputs that are images, per spatial axis.
        batch: Fixed batch size, None where it is free.
        parameters: Number of trained weights.
        flops_per_pixel: Twice the multiply-accumulates per pixel of the first output, for a large tile without halo.
        cost: Square tile -> the accepted tile at most that large, and computed over kept pixels (None: keeps nothing).
        final_ops: Last operator before each output that computes something.
        metadata: The file's ``metadata_props``.
        freed: Fixed dimensions that the analysis shows to be free.
        reasons_fixed: Why the other fixed dimensions are not.
    """

    inputs: tuple[GraphInput, ...]
    outputs: tuple[OutputField, ...]
    sizes: tuple[TileSizes, ...]
    batch: int | None
    parameters: int
    flops_per_pixel: float
    cost: Mapping[int, Mapping[str, Any]]
    final_ops: tuple[str, ...]
    metadata: Mapping[str, str]
    freed: tuple[str, ...]
    reasons_fixed: tuple[str, ...]
    _analysis: Analysis = field(repr=False, compare=False)

    @property
    def images(self) -> tuple[OutputField, ...]:
        """The outputs that are images: they follow every spatial axis of the input."""
        return tuple(output for output in self.outputs if len(output.field) == len(self.sizes))

    @property
    def exact(self) -> bool:
        """Whether every output that is an image is exact; without such an output nothing is."""
        return bool(self.images) and all(output.exact for output in self.images)

    def activation_bytes(self, tile: Sequence[int], batch: int = 1) -> int:
        """Most bytes of tensors alive at once (dtypes as in the graph; weights not counted).

        Args:
            tile: Input size per spatial axis in pixels.
            batch: Tiles at once; a graph of a fixed batch size has that.

        Raises:
            GraphError: ``tile`` has another number of axes than the graph, or the graph does not run at it.
        """
        tile = tuple(int(n) for n in tile)
        if len(tile) != len(self.sizes):
            raise GraphError(
                f"tile {list(tile)} has {len(tile)} axes and the graph {len(self.sizes)}; give one size each"
            )
        return _peak_bytes(self._analysis, tile, self.batch or batch)

    def to_json(self) -> dict[str, Any]:
        cost = {
            str(tile): {**entry, "activation_bytes": self.activation_bytes([entry["tile"]] * len(self.sizes))}
            if self._squares(entry["tile"])
            else dict(entry)
            for tile, entry in self.cost.items()
        }
        return {
            "inputs": [i.to_json() for i in self.inputs],
            "parameters": self.parameters,
            "flops_per_pixel": self.flops_per_pixel,
            "cost": cost,
            "outputs": [o.to_json() for o in self.outputs],
            "exact": self.exact,
            "sizes": [
                {"stride": s.stride, "remainder": s.remainder, "minimum": s.minimum, "fixed": s.fixed}
                for s in self.sizes
            ],
            "batch": self.batch,
            "final_ops": list(self.final_ops),
            "metadata": dict(self.metadata),
            "freed": list(self.freed),
            "reasons_fixed": list(self.reasons_fixed),
        }

    def _squares(self, tile: int | None) -> bool:
        return tile is not None and len(self.sizes) < 3


def inspect(model: str | os.PathLike[str] | onnx.ModelProto) -> GraphReport:
    """Analyse an ONNX graph. Nothing is run and no weights are copied.

    Args:
        model: Path of an .onnx file, or the model.

    Raises:
        GraphError: It cannot be read, or has no input with spatial axes.
    """
    if isinstance(model, onnx.ModelProto):
        proto, folder = model, None
    else:
        proto, folder = load_model(model), Path(model).resolve().parent
    analysis, _ = analyse_model(proto, folder)
    graph = analysis.given
    outputs = analysis.outputs
    fields = {output.name: output for output in (*outputs, *analysis.others)}
    sizes = analysis.sizes
    first = next((o for o in outputs if o.field), None)
    scale = math.prod((float(a.scale) for a in first.field), start=1.0) if first else 1.0
    inputs = tuple(
        GraphInput(v.name, analysis.letters[v.name], v.shape or (), _DTYPES.get(v.dtype, str(v.dtype)))
        for v in graph.inputs
    )
    return GraphReport(
        inputs,
        tuple(fields[value.name] for value in graph.outputs),
        sizes,
        analysis.batch,
        count_parameters(graph),
        2 * analysis.density / scale,
        {tile: _cost(outputs, sizes, tile) for tile in COST_TILES},
        tuple(_final_op(graph, o.name) for o in graph.outputs),
        graph.metadata,
        analysis.freed,
        analysis.reasons_fixed,
        analysis,
    )


def check_images(report: GraphReport) -> None:
    """GraphError where an input is no image, or no output follows every spatial axis of the inputs."""
    for value in report.inputs:
        if not _spatial(value.axes):
            raise GraphError(
                f"input {value.name} {list(value.shape)} is not an image, and pixels are all that a network is given here; "
                "make it a constant of the graph and export again"
            )
    if not report.images:
        output = report.outputs[0]
        why = "; ".join(output.reasons) or "it has other axes than the input"
        raise GraphError(f"output {output.name} is not an image ({why}); export a network from images to images")


# ------------------------------------------------------------------------------------------------------------ analysis


@dataclass(frozen=True)
class Analysis:
    """Everything that the walks tell.

    ``given`` is the whole graph, ``graph`` that of ``outputs``: those that are images, where any are; ``others`` are not.
    ``letters`` are the axes of each input, ``channels`` its channel count, ``declared`` the spatial sizes in the file.
    """

    given: Graph
    graph: Graph
    letters: Mapping[str, str]
    channels: Mapping[str, int]
    declared: tuple[int | None, ...]
    outputs: tuple[OutputField, ...]
    sizes: tuple[TileSizes, ...]
    batch: int | None
    density: float
    freed: tuple[str, ...]
    reasons_fixed: tuple[str, ...]
    global_pools: frozenset[str]
    others: tuple[OutputField, ...] = ()

    def walk(self, sizes: Sequence[int], batch: int = 1) -> Walk:
        given = _input_axes(self.graph, self.letters, self.channels, tuple(sizes), batch)
        return walk(self.graph, given, tuple(sizes), self.global_pools)


def analyse_model(
    model: onnx.ModelProto, folder: str | os.PathLike[str] | None = None
) -> tuple[Analysis, onnx.ModelProto]:
    """The analysis of a model, and the model it is of: that given, or a copy whose crops were counted from the far edge.

    The copy is taken where it is exact and the model, whose crops hold the size of its export, is not.
    """
    analysis = analyse(read_graph(model, folder))
    if all(size is None for size in analysis.declared) or all(output.exact for output in analysis.outputs):
        return analysis, model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if not free_crops(copy):
        return analysis, model
    candidate = analyse(read_graph(copy, folder))
    return (candidate, copy) if all(output.exact for output in candidate.outputs) else (analysis, model)


def analyse(graph: Graph) -> Analysis:
    """Find stride, accepted sizes and fields of a graph.

    Outputs that are no images (a class, a few numbers) have no say in which sizes the others accept.
    """
    found = _analyse(graph)
    spatial = len(found.declared)
    images = [value for value, o in zip(graph.outputs, found.outputs, strict=True) if len(o.field) == spatial]
    if not images or len(images) == len(graph.outputs):
        return found
    others = tuple(o for o in found.outputs if len(o.field) != spatial)
    return replace(_analyse(restricted(graph, images)), given=graph, others=others)


def _analyse(graph: Graph) -> Analysis:
    letters, channels = {}, {}
    for value in graph.inputs:
        letters[value.name], channels[value.name] = _layout(graph, value)
    image = next((v for v in graph.inputs if _spatial(letters[v.name])), None)
    if image is None:
        shapes = ", ".join(f"{v.name} {list(v.shape or ())}" for v in graph.inputs)
        raise GraphError(f"no input of the graph has spatial axes ({shapes}); a network for images takes e.g. NCYX")
    axes = _spatial(letters[image.name])
    dims = dict(zip(letters[image.name], image.shape or (None,) * len(letters[image.name]), strict=True))
    declared = tuple(dims[a] for a in axes)
    batch = dims.get("N")
    search = _Search(graph, letters, channels, declared, batch or 1)
    search.find_sizes()
    search.find_fields()
    sizes = tuple(
        TileSizes(s, r, m) for s, r, m in zip(search.strides, search.remainders, search.minimum(), strict=True)
    )
    outputs = tuple(search.outputs)
    freed, reasons = [], []
    at_fault = list(dict.fromkeys(r for o in outputs for r in o.reasons))
    for k, (axis, size) in enumerate(zip(axes, declared, strict=True)):
        if size is None:
            continue
        if all(o.exact for o in outputs) and sizes[k].accepts(size):
            freed.append(f"{axis} ({size} px)")
            continue
        why = at_fault[0] if at_fault else f"{size} px is not among the sizes that the graph runs at"
        reasons.append(f"{axis} is fixed to {size} px: {why}")
        one = sizes[k]
        sizes = (*sizes[:k], TileSizes(one.stride, size % one.stride, size, size), *sizes[k + 1 :])
    return Analysis(
        graph,
        graph,
        letters,
        channels,
        declared,
        outputs,
        sizes,
        batch,
        search.density,
        tuple(freed),
        tuple(reasons),
        search.global_pools,
    )


def _spatial(letters: str) -> str:
    return "".join(a for a in letters if a in "ZYX")


_LAYOUT_FREE = {
    "Cast", "Identity", "Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Clip", "BatchNormalization", "LeakyRelu",
    "Tanh",
    "InstanceNormalization", "QuantizeLinear", "DequantizeLinear", "Pad", "Dropout", "Neg", "Abs", "Sqrt", "Pow", "Log",
    "Exp",
}  # fmt: skip
_LAYOUT_KNOWN = {
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "DepthToSpace",
    "SpaceToDepth", "ConvInteger", "QLinearConv", "InstanceNormalization", "BatchNormalization", "FusedConv", "LRN",
}  # fmt: skip


def _layout(graph: Graph, value: Value) -> tuple[str, int]:
    """Axes of an input as letters, and its number of channels, from the first layer that says which is which."""
    rank = len(value.shape or ())
    shape = value.shape or ()
    labels: dict[str, list[int | None]] = {value.name: list(range(rank))}
    for node in graph.nodes:
        here = labels.get(node.inputs[0]) if node.inputs and not node.domain else None
        if here is None:
            here = next((labels[i] for i in node.inputs if i in labels), None)
            if here is None or node.op not in ("Add", "Mul", "Concat"):
                continue
        if node.op in _LAYOUT_KNOWN and 3 <= len(here) <= 5:
            return _letters_of(graph, node, here, shape)
        if node.op in _LAYOUT_FREE or node.op == "Concat":
            result = here
        elif node.op == "Transpose":
            order = node.attributes.get("perm", list(reversed(range(len(here)))))
            result = [here[k] for k in order]
        elif node.op == "Unsqueeze":
            axes = node.attributes.get("axes")
            if axes is None and len(node.inputs) > 1:
                axes = _axes_constant(graph, node.inputs[1])
            if axes is None:
                continue
            n, rest = len(here) + len(axes), list(here)
            new = {int(a) % n for a in axes}
            result = [None if k in new else rest.pop(0) for k in range(n)]
        else:
            continue
        for name in node.outputs:
            labels.setdefault(name, result)
    return _guess_letters(shape)


def _axes_constant(graph: Graph, name: str) -> list[int] | None:
    if name in graph.constants:
        array = graph.constants[name].value()
        return None if array is None else [int(a) for a in array.ravel()]
    node = graph.producers().get(name)
    if node is None or node.op != "Constant":
        return None
    given = walk(replace_nodes(graph, (node,)), {v.name: () for v in graph.inputs}, ()).tensors.get(name)
    array = value_of(given)
    return None if array is None else [int(a) for a in array.ravel()]


def replace_nodes(graph: Graph, nodes: tuple[Node, ...]) -> Graph:
    """``graph`` with other nodes."""
    return Graph(
        nodes, graph.inputs, graph.outputs, graph.constants, graph.opset, graph.opsets, graph.metadata, graph.folder
    )


def _letters_of(graph: Graph, node: Node, labels: list[int | None], shape: Sequence[int | None]) -> tuple[str, int]:
    letters = ["?"] * len(shape)
    for k, label in enumerate(labels):
        if label is not None:
            letters[label] = "N" if k == 0 else "C" if k == 1 else SPATIAL[len(labels) - 2][k - 2]
    channel = labels[1]
    channels = shape[channel] if channel is not None else 1
    if channels is None:
        weight = (
            graph.constants.get(node.inputs[3 if node.op == "QLinearConv" else 1]) if len(node.inputs) > 1 else None
        )
        channels = 1
        if (
            weight is not None
            and node.op in ("Conv", "ConvInteger", "QLinearConv", "FusedConv")
            and len(weight.shape) > 1
        ):
            channels = weight.shape[1] * int(node.attributes.get("group", 1))
        elif weight is not None and weight.shape:
            channels = weight.shape[0]
    return "".join(letters), channels


def _guess_letters(shape: Sequence[int | None]) -> tuple[str, int]:
    rank = len(shape)
    few = [n is not None and n <= 4 for n in shape]
    if rank in (4, 5):
        spatial = SPATIAL[rank - 2]
        if few[-1] and not few[1]:
            return f"N{spatial}C", shape[-1] or 1
        return f"NC{spatial}", shape[1] or 1
    if rank == 3:
        if few[-1] and not few[0]:
            return "YXC", shape[-1] or 1
        return ("CYX", shape[0] or 1) if few[0] else ("NYX", 1)
    return ("YX", 1) if rank == 2 and not any(few) else ("?" * rank, 1)


def _input_axes(
    graph: Graph, letters: Mapping[str, str], channels: Mapping[str, int], sizes: tuple[int, ...], batch: int
) -> dict[str, tuple[Axis, ...]]:
    """Concrete axes of every input."""
    result = {}
    for value in graph.inputs:
        own = letters[value.name]
        spatial = _spatial(own)
        axes: list[Axis] = []
        for letter, n in zip(own, value.shape or (), strict=True):
            if letter in spatial and len(spatial) == len(sizes):
                k = spatial.index(letter)
                axes.append((input_line(k, sizes[k]),))
            elif letter == "N":
                axes.append(plain(batch))
            elif letter == "C":
                axes.append(plain(channels[value.name]))
            else:
                axes.append(plain(n or 1))
        result[value.name] = tuple(axes)
    return result


@dataclass
class _Search:
    """Walks at ever larger sizes until the accepted sizes and the fields are known."""

    graph: Graph
    letters: Mapping[str, str]
    channels: Mapping[str, int]
    declared: tuple[int | None, ...]
    batch: int
    global_pools: frozenset[str] = frozenset()
    strides: tuple[int, ...] = ()
    remainders: tuple[int, ...] = ()
    base: int = 64
    lawful: bool = False
    density: float = 0.0
    outputs: list[OutputField] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def at(self, sizes: Sequence[int], strict: bool = False) -> Walk:
        given = _input_axes(self.graph, self.letters, self.channels, tuple(sizes), self.batch)
        return walk(self.graph, given, tuple(sizes), self.global_pools, strict)

    def tensors(self, state: Walk) -> list[Tensor]:
        return [state.tensors[o.name] for o in self.graph.outputs]

    def congruent(self, at_least: int, extra: int = 0) -> tuple[int, ...]:
        """The smallest size per axis from ``at_least`` on with the right remainder, plus ``extra`` strides.

        Axes differ by a stride each, so that a graph cannot mix them up unnoticed.
        """
        return tuple(
            at_least + (r - at_least) % s + (extra + k) * s
            for k, (s, r) in enumerate(zip(self.strides, self.remainders, strict=True))
        )

    # -- sizes

    def find_sizes(self) -> None:
        """Stride and remainder of the sizes that the graph accepts."""
        if any(n is not None for n in self.declared):
            first = self.at([n or 64 for n in self.declared])
            self.global_pools = frozenset(first.whole_pools)
        for base in (64, 256, 1024):
            self.base = base
            if self._find_remainder(base):
                self.lawful = True
                return
        self.strides = self.strides or (1,) * len(self.declared)
        self.remainders = tuple((n or 0) % s for n, s in zip(self.declared, self.strides, strict=True))

    def _stride(self, base: int) -> tuple[int, ...]:
        """Least common multiple of the down-samplings on the way to the outputs, per axis."""
        start = self.at([n or base for n in self.declared])
        found = [1] * len(self.declared)
        pool = [line for t in self.tensors(start) for line in t.lines()]
        if start.broken or not pool:
            pool = [line for t in start.tensors.values() for line in t.lines()]
        for line in pool:
            found[line.source] = math.lcm(found[line.source], line.stride)
        return tuple(s if s <= _MAX_STRIDE else 1 for s in found)

    def _find_remainder(self, base: int) -> bool:
        self.strides = self._stride(base)
        fallback: tuple[int, ...] | None = None
        candidates = range(max(self.strides)) if None in self.declared else range(1)
        for r in candidates:
            self.remainders = tuple(
                (r if n is None else n) % s for n, s in zip(self.declared, self.strides, strict=True)
            )
            small = self.at(self.congruent(base), strict=True)
            if small.broken:
                continue
            large = self.at(self.congruent(base, 1), strict=True)
            if large.broken or not self._law(small, large):
                continue
            if not small.dropped:
                return True
            fallback = fallback or self.remainders
        if fallback is None:
            return False
        self.remainders = fallback
        return True

    def _law(self, small: Walk, large: Walk) -> bool:
        """Whether output sizes follow the scale between two walks that lie one stride apart."""
        for a, b in zip(self.tensors(small), self.tensors(large), strict=True):
            if a.axes is None or b.axes is None:
                return False
            for p, q in zip(a.lines(), b.lines(), strict=True):
                lost = small.sizes[p.source] * p.scale - p.size
                if p.scale != q.scale or q.size - p.size != self.strides[p.source] * p.scale or lost.denominator != 1:
                    return False
        return True

    def minimum(self) -> list[int]:
        """Smallest accepted size per axis."""
        if not self.lawful:
            return [n or max(s, r) for n, s, r in zip(self.declared, self.strides, self.remainders, strict=True)]
        top = [(n - r) // s for n, s, r in zip(self.congruent(self.base), self.strides, self.remainders, strict=True)]
        steps = _smallest(max(top), lambda k: self._runs([min(k, t) for t in top]))
        best = [min(steps, t) for t in top]
        for axis in range(len(best)):

            def runs(k: int, axis: int = axis) -> bool:
                return self._runs([k if a == axis else b for a, b in enumerate(best)])

            best[axis] = _smallest(best[axis], runs)
        return [r + k * s for k, s, r in zip(best, self.strides, self.remainders, strict=True)]

    def _runs(self, steps: Sequence[int]) -> bool:
        sizes = [r + k * s for k, s, r in zip(steps, self.strides, self.remainders, strict=True)]
        if min(sizes) < 1:
            return False
        state = self.at(sizes, strict=True)
        if state.broken:
            return False
        for tensor, output in zip(self.tensors(state), self.outputs, strict=True):
            found = _field_lines(tensor)
            if len(found) != len(output.field):
                return False
            for line, f in zip(found, output.field, strict=True):
                if line.size < 1 or line.size != sizes[line.source] * f.scale - sum(f.shrink):
                    return False
        return True

    # -- fields

    def find_fields(self) -> None:
        """Walk at three sizes, large enough that an untouched core exists, and compare."""
        if not self.lawful and None not in self.declared:
            self._fields_of_fixed()
            return
        size, extra = self.base, 2
        while True:
            states = [self.at(self.congruent(size, k)) for k in range(3)]
            ready = all(self._has_core(line) for t in self.tensors(states[0]) for line in t.lines())
            disagreements = [self._disagreement(states, k) for k in range(len(self.graph.outputs))]
            settled = ready and (not any(disagreements) or extra == 0)
            if settled or size >= _MAX_SIZE or any(s.broken for s in states):
                break
            extra -= ready
            size *= 2
        self.density = states[0].density
        numbers = _changing_numbers(states)
        for k, value in enumerate(self.graph.outputs):
            self.outputs.append(self._output(value, states, k, disagreements[k], numbers, ready))

    def _fields_of_fixed(self) -> None:
        """Fields at the one size that the graph runs at, and what keeps it from others."""
        declared = tuple(n for n in self.declared if n is not None)
        only = self.at(declared)
        larger = self.at([n + s for n, s in zip(declared, self.strides, strict=True)])
        self.density = only.density
        for k, value in enumerate(self.graph.outputs):
            why = larger.broken[0] if larger.broken else self._disagreement([only, larger], k)
            why = f"runs at {size_text(declared)} px only: {why}" if why else ""
            self.outputs.append(self._output(value, [only], k, why, [], True))

    def _has_core(self, line: Line) -> bool:
        before, after = _halo(line)
        return line.size - before - after >= 2 * self.strides[line.source] * line.scale + 2

    def _disagreement(self, states: list[Walk], k: int) -> str:
        """A sentence if the three walks do not tell the same about output ``k``."""
        lines = [_field_lines(self.tensors(s)[k]) for s in states]
        if all(self._agree(states, here) for here in zip(*lines, strict=False)) and len({len(x) for x in lines}) == 1:
            return ""
        for node in states[0].order:
            for name in node.outputs:
                tensors = [s.tensors.get(name) for s in states]
                if any(t is None or t.axes is None for t in tensors):
                    continue
                found = [t.lines() for t in tensors if t is not None]
                if len({len(x) for x in found}) > 1 or not all(
                    self._agree(states, x) for x in zip(*found, strict=True)
                ):
                    sizes = ", ".join(f"{s.sizes[-1]} px" for s in states)
                    return f"{node} does not follow the size: inputs of {sizes} give fields that do not agree"
        return "inputs of three sizes give fields that do not agree"

    def _agree(self, states: list[Walk], trio: Sequence[Line]) -> bool:
        """Whether one line tells the same at all three sizes, and shifts by a stride within its core."""
        first, source = trio[0], trio[0].source
        stride = self.strides[source]
        if any(line.scale != first.scale or line.source != source for line in trio):
            return False
        shift = stride * first.scale
        if shift.denominator != 1:
            return False
        step = int(shift)
        sizes = [s.sizes[source] for s in states]
        for line, size in zip(trio, sizes, strict=True):
            if _halo(line) != _halo(first) or _shrink(line, size) != _shrink(first, sizes[0]):
                return False
            grown = size - sizes[0]
            half = first.size // 2
            for name in ("low", "high"):
                a, b = getattr(first, name), getattr(line, name)
                if not np.array_equal(a[:half], b[:half]) or not np.array_equal(a[-half:] + grown, b[-half:]):
                    return False
        before, after = _halo(first)
        for array in (first.low, first.high):
            core = array[before : first.size - after]
            # A tap of weight zero beyond the edge changes no value; there the dependence is cut off.
            cut = (first.high[before : first.size - after] == sizes[0] - 1) | (
                first.low[before : first.size - after] == 0
            )
            if len(core) > step:
                equal = core[step:] - core[:-step] == stride
                if not (equal | cut[step:] | cut[:-step]).all():
                    return False
        return True

    def _output(
        self, value: Value, states: list[Walk], k: int, disagreement: str, numbers: list[str], ready: bool
    ) -> OutputField:
        tensor = self.tensors(states[0])[k]
        remarks = sorted(tensor.faults)
        reasons = list(dict.fromkeys(text for _, text in remarks)) + numbers
        broken = next((s.broken[0] for s in states if s.broken), "")
        if broken and not reasons:
            reasons.append(broken)
        if disagreement and not reasons:
            reasons.append(disagreement)
        letters = self._output_letters(tensor, value)
        found = _field_lines(tensor)
        if not found or len(found) != len(tensor.lines()):
            reasons = reasons or [f"output '{value.name}' has no spatial axes of its own"]
        elif not reasons and not ready:
            sizes = states[0].sizes[-1]
            reasons.append(f"no sample of output '{value.name}' is untouched by the edges of a tile of {sizes} px")
        elif not reasons and len(found) != len(self.declared):
            reasons.append(f"output '{value.name}' follows {len(found)} of {len(self.declared)} spatial axes")
        fields = tuple(_axis_field(line, states[0].sizes[line.source]) for line in found)
        channels = 1
        if tensor.axes is not None and "C" in letters:
            channels = tensor.shape[letters.index("C")]
        notes = "; ".join(text for _, text in sorted(tensor.notes))
        return OutputField(value.name, letters, channels, fields, not reasons, tuple(reasons), "" if reasons else notes)

    def _output_letters(self, tensor: Tensor, value: Value) -> str:
        spatial = SPATIAL[len(self.declared)]
        if tensor.axes is None:
            return "?" * len(value.shape or ())
        rest = ["N", "C"] if any("N" in own for own in self.letters.values()) else ["C"]
        if tensor.rank == len(spatial) and all(tracked(a) for a in tensor.axes):
            rest = []
        letters = ""
        for k, axis in enumerate(tensor.axes):
            line = sole_line(axis)
            if line is not None:
                letters += spatial[line.source]
            elif "N" in rest and k == 0:
                letters += "N"
                rest.remove("N")
            elif "C" in rest:
                letters += "C"
                rest = []
            else:
                letters += "?"
        return letters


def _smallest(top: int, holds: Any) -> int:
    """Smallest k in 0..top with ``holds(k)``, taking for granted that it holds from there on, and at ``top``."""
    low, high = 0, top
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _field_lines(tensor: Tensor) -> list[Line]:
    return [line for axis in tensor.axes or () if (line := sole_line(axis)) is not None]


def _changing_numbers(states: list[Walk]) -> list[str]:
    first = states[0].numbers
    return [
        f"{node} uses a number computed from the size of the image"
        for node, number in first.items()
        if any(s.numbers.get(node) != number for s in states[1:])
    ]


def _halo(line: Line) -> Pair:
    low, high = np.flatnonzero(line.touched_low), np.flatnonzero(line.touched_high)
    return (int(low[-1]) + 1 if len(low) else 0), (line.size - int(high[0]) if len(high) else 0)


def _shrink(line: Line, size: int) -> Pair:
    """Samples missing before and after, against ``scale`` samples per pixel.

    Where none are missing, sample j belongs to pixel j / scale: strided convolutions read half a stride to the left of
    it, and no shift is made of that. Otherwise the place decides, halves go to the middle.
    """
    total = math.floor(size * line.scale - line.size)
    at = line.place * line.scale - Fraction(1, 2)
    before = min(range(min(0, total), max(0, total) + 1), key=lambda n: (abs(n - at), abs(2 * n - total)))
    return before, total - before


def _axis_field(line: Line, size: int) -> AxisField:
    halo, shrink = _halo(line), _shrink(line, size)
    core = np.arange(line.size)[halo[0] : line.size - halo[1]]
    if not len(core):
        core = np.arange(line.size)
    place = (core + shrink[0]) * line.scale.denominator // line.scale.numerator
    reach = (
        max(0, int((place - line.low[core]).max(initial=0))),
        max(0, int((line.high[core] - place).max(initial=0))),
    )
    return AxisField(line.stride, reach, halo, shrink, line.scale)


# ---------------------------------------------------------------------------------------------------------------- cost


def _cost(outputs: Sequence[OutputField], sizes: Sequence[TileSizes], tile: int) -> dict[str, Any]:
    """Computed over kept pixels of an inner square tile."""
    accepted = [s.at_most(tile) for s in sizes]
    ratio: float | None = 1.0
    for output in outputs:
        here = 1.0
        for f, size, s in zip(output.field, accepted, sizes, strict=False):
            step = kept_step(f, size, s.stride)
            here = math.inf if step <= 0 else here * size / step
        ratio = max(ratio or 1.0, here)
    too_small = any(n > tile and s.fixed is None for n, s in zip(accepted, sizes, strict=True))
    if ratio == math.inf or too_small or not any(o.field for o in outputs):
        ratio = None
    return {"tile": max(accepted), "ratio": ratio}


def kept_step(field: AxisField, size: int, stride: int) -> int:
    """Input pixels by which tiles of ``size`` px may advance: what an inner tile keeps, rounded down to the stride."""
    try:
        kept = field.out_size(size) - sum(field.halo)
    except ValueError:
        return 0
    return math.floor(Fraction(kept) / field.scale) // stride * stride


def _peak_bytes(analysis: Analysis, tile: Sequence[int], batch: int) -> int:
    state = analysis.walk(tile, batch)
    if state.broken:
        raise GraphError(
            f"the graph does not run at a tile of {list(tile)} px: {state.broken[0]}; give an accepted size"
        )
    last: dict[str, int] = {}
    for k, node in enumerate(state.order):
        for name in node.inputs:
            last[name] = k
    end = len(state.order)
    for value in analysis.graph.outputs:
        last[value.name] = end
    alive = {v.name: state.tensors[v.name].bytes for v in analysis.graph.inputs}
    peak = sum(alive.values())
    for k, node in enumerate(state.order):
        for name in node.outputs:
            tensor = state.tensors.get(name)
            if name and tensor is not None and not tensor.constant:
                alive[name] = tensor.bytes
        peak = max(peak, sum(alive.values()))
        for name in [*node.inputs, *node.outputs]:
            if name in alive and last.get(name, k) <= k:
                del alive[name]
    return peak


# Inputs that hold no trained weights, by operator: statistics, factors, bounds, shapes.
_NO_WEIGHTS: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (3, 4), "Resize": (1, 2, 3), "Upsample": (1,), "Clip": (1, 2), "Pad": (1, 2, 3),
    "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2), "Reshape": (1,), "Expand": (1,),
}  # fmt: skip
_WEIGHTS = (1, 2, 3, 10, 11, 16)


def count_parameters(graph: Graph) -> int:
    """Elements of the trained weights."""
    shapes = {name: (c.elements, c.dtype, len(c.shape)) for name, c in graph.constants.items()}
    for node in graph.nodes:
        tensor = node.attributes.get("value") if node.op == "Constant" else None
        if tensor is not None and hasattr(tensor, "dims"):
            dims = tuple(tensor.dims)
            shapes[node.outputs[0]] = (math.prod(dims), tensor.data_type, len(dims))
    used = set()
    for node in graph.nodes:
        skip = _NO_WEIGHTS.get(node.op, ())
        used |= {name for k, name in enumerate(node.inputs) if k not in skip and name in shapes}
    return sum(n for name, (n, dtype, rank) in shapes.items() if name in used and dtype in _WEIGHTS and rank > 0)


_TRANSPARENT = {
    "Cast", "Identity", "Transpose", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Dropout", "QuantizeLinear",
    "DequantizeLinear", "Slice", "Pad",
}  # fmt: skip


def _final_op(graph: Graph, name: str) -> str:
    producers = graph.producers()
    node = producers.get(name)
    while node is not None and node.op in _TRANSPARENT and node.inputs:
        before = producers.get(node.inputs[0])
        if before is None:
            break
        node = before
    return node.op if node is not None else ""


__all__ = ["ELEMENT_BYTES", "Analysis", "GraphInput", "GraphReport", "analyse", "inspect", "load_model"]
