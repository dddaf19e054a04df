"""Read-only questions to an ONNX graph: stride, halo, reach, exactness, accepted sizes, cost.

The graph is walked at three sizes T, T + S and T + 2S (:mod:`unet_rt.graph.walk`). What all three agree on is the
answer; where they do not, or where a node depends on more than a neighbourhood, the answer is "not exact" and the
nodes at fault. Numbers that the graph computes from its size are followed as functions of it
(:mod:`unet_rt.graph.numbers`): three sizes prove nothing about them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from ..errors import GraphError
from ..system.json import Record
from ..tiling.field import OutputField, TileSizes
from .analysis import Analysis, analyse, analyse_model
from .constants import ELEMENT_BYTES
from .fields import kept_step
from .file import Graph, load_model
from .given import settle
from .layout import spatial_letters
from .precision import precision_of

COST_TILES = (512, 1024, 2048, 4096)


_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
           10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16"}  # fmt: skip


@dataclass(frozen=True)
class GraphInput(Record):
    """One input as declared. ``axes`` is e.g. ``"NCYX"``; ``shape`` holds None where a dimension is free."""

    name: str
    axes: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class GraphReport(Record):
    """What a graph says about itself.

    Attributes:
        inputs: Inputs as declared; the spatial axes of all of them are one pixel grid.
        outputs: One field per output.
        sizes: Tile sizes that the graph accepts for the outputs that are images, per spatial axis.
        batch: Fixed batch size, None where it is free.
        parameters: Number of trained weights.
        flops_per_pixel: Twice the multiply-accumulates per pixel of the first output, for a large tile without halo.
        cost: Square tile -> the accepted tile at most that large, per axis, and computed over kept pixels (None: keeps
            nothing).
        final_ops: Last operator before each output that computes something.
        metadata: The file's ``metadata_props``.
        freed: Fixed dimensions that the analysis shows to be free.
        reasons_fixed: Why the other fixed dimensions are not.
        limits: Why it is exact up to some size only, where it is.
        rewritten: What of the file was brought to another form, of the same answers, before anything was asked of it.
        precision: What the file computes in: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp64``.
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
    limits: tuple[str, ...]
    rewritten: tuple[str, ...]
    precision: str
    _analysis: Analysis = field(repr=False, compare=False)

    @property
    def images(self) -> tuple[OutputField, ...]:
        """The outputs that are images: they follow every spatial axis of the input."""
        return tuple(output for output in self.outputs if len(output.field) == len(self.sizes))

    @property
    def exact(self) -> bool:
        """Whether every output that is an image is exact; without such an output nothing is."""
        return bool(self.images) and all(output.exact for output in self.images)

    @property
    def exact_up_to(self) -> tuple[int | None, ...]:
        """Largest canvas per spatial axis, in pixels, up to which the outputs are exact; None: any."""
        return tuple(s.exact_up_to for s in self.sizes)

    def rounding(self, canvas: Sequence[int]) -> float:
        """Largest difference that float32 may make between tiles and a whole canvas, relative to the largest value."""
        return self._analysis.rounding.bound(canvas)

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
            str(tile): {
                **entry,
                "tile": list(entry["tile"]),
                **({"activation_bytes": self.activation_bytes(entry["tile"])} if len(self.sizes) < 3 else {}),
            }
            for tile, entry in self.cost.items()
        }
        return {**super().to_json(), "cost": cost, "exact": self.exact, "exact_up_to": list(self.exact_up_to)}


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
    proto, rewritten = settle(proto, folder)
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
        analysis.limits,
        rewritten,
        precision_of(proto),
        analysis,
    )


def check_images(report: GraphReport) -> None:
    """GraphError where a network is not one from images to images, as it is to be used.

    An input is no image, there are fewer axes than an image has, it was exported in training mode, or no output follows
    every spatial axis of the inputs.
    """
    for value in report.inputs:
        if not spatial_letters(value.axes):
            raise GraphError(
                f"input {value.name} {list(value.shape)} is not an image, and pixels are all that a network is given here; "
                "make it a constant of the graph and export again"
            )
    if len(report.sizes) < 2:
        raise GraphError(
            f"input {report.inputs[0].name} ({report.inputs[0].axes}) has one spatial axis; 2 (images) and 3 (volumes) are "
            "supported: give signals to ONNX Runtime as they are, or export the network with kernels of 1 x n"
        )
    analysis = report._analysis
    if trained := analysis.walk(analysis.exported, analysis.batch or 1).trained:
        raise GraphError(f"{trained[0]}; call model.eval() before exporting")
    if not report.images:
        output = report.outputs[0]
        more = [f"{len(output.reasons) - 3} more"] if len(output.reasons) > 3 else []
        why = "; ".join([*output.reasons[:3], *more]) or "it has other axes than the input"
        raise GraphError(f"output {output.name} is not an image ({why}); export a network from images to images")


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
    return {"tile": tuple(accepted), "ratio": ratio}


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
