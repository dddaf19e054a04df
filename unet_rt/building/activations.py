"""What flows through a graph on real tiles: extremes, histograms and channel means of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx


Array = npt.NDArray[Any]

BINS = 8192  # a power of two, so that the range can double by merging pairs
COUNTED = 1 << 18  # values of a tensor and tile that enter its histogram; extremes see all of them


class Distribution:
    """Extremes, histogram and channel means of one tensor, gathered tile by tile; ``positions`` are samples per channel.

    The histogram covers ``[-span, span]`` in :data:`BINS` bins; the span is a power of two and grows with the values.
    """

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.span = 2.0**-20
        self.counts = np.zeros(BINS, np.int64)
        self.finite = True
        self._sum: Array | float = 0.0
        self.positions = 0

    def add(self, values: Array) -> None:
        """Takes the values (N, C, ...) of one run."""
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            self.finite = False
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        while max(abs(low), abs(high)) > self.span:
            quarter = BINS // 4
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(BINS, np.int64)
            self.counts[quarter : 3 * quarter] = merged
            self.span *= 2
        flat = values.reshape(-1)
        step = max(1, len(flat) // COUNTED) | 1  # odd: no even row length lets it visit some columns only
        self.counts += np.histogram(flat[::step], BINS, (-self.span, self.span))[0]
        if values.ndim > 2:
            axes = (0, *range(2, values.ndim))
            positions = values.size // values.shape[1]
            self._sum = self._sum + values.sum(axis=axes, dtype=np.float64)
            self.positions += positions

    @property
    def means(self) -> Array:
        """Mean of each channel."""
        return np.asarray(self._sum) / max(1, self.positions)

    @property
    def centres(self) -> Array:
        """Middle of each bin."""
        width = 2 * self.span / BINS
        centres: Array = -self.span + width * (np.arange(BINS) + 0.5)
        return centres


def probe(
    model: onnx.ModelProto, names: Sequence[str], tiles: Iterable[Sequence[Array]], *, threads: int = 0
) -> dict[str, Distribution]:
    """Distributions of the tensors ``names`` (graph inputs and outputs among them) over ``tiles``.

    Args:
        model: An FP32 graph (any graph that ONNX Runtime runs on the CPU).
        names: Tensors.
        tiles: For each run the graph's inputs, in its order.
        threads: Of ONNX Runtime; 0: as many as affinity and quota allow.
    """
    found = {name: Distribution() for name in names}
    with Probe(model, names, threads=threads) as session:
        for inputs in tiles:
            for name, values in session.run(inputs).items():
                found[name].add(values)
    return found


class Probe:
    """A graph whose inner tensors can be looked at; a resource like any session."""

    def __init__(self, model: onnx.ModelProto, names: Sequence[str], *, threads: int = 0):
        import tempfile
        from pathlib import Path

        import onnx

        from ..backends.onnxruntime import backend

        given = {value.name for value in model.graph.input}
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        del shown.graph.output[:]
        self._inputs = [value.name for value in model.graph.input if value.name not in _initialisers(model)]
        self._shown = [name for name in names if name not in given]
        self._given = [name for name in names if name in given]
        shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self._shown)
        with tempfile.TemporaryDirectory(prefix="unet-rt-") as folder:
            path = Path(folder) / "probe.onnx"
            onnx.save_model(shown, str(path))
            self._session = backend.load(path, precision="fp32", device="cpu", threads=threads)

    def run(self, inputs: Sequence[Array]) -> dict[str, Array]:
        """Values of the tensors."""
        found = dict(zip(self._shown, self._session.run(inputs) if self._shown else [], strict=True))
        places = dict(zip(self._inputs, inputs, strict=True))
        return found | {name: places[name] for name in self._given}

    def close(self) -> None:
        """Gives back what the session holds."""
        self._session.close()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _initialisers(model: onnx.ModelProto) -> set[str]:
    return {t.name for t in model.graph.initializer}


HALF_LARGEST = 65504.0
HALF_MARGIN = 2.0  # images may be brighter than samples


def find_overflows(model: onnx.ModelProto, found: dict[str, Distribution]) -> frozenset[str]:
    """Nodes that read or write a tensor too large for FP16, or close to it: islands for ``passes.half``."""
    return find_islands(model, {name for name, d in found.items() if not d.finite or exceeds_half(d.low, d.high)})


def exceeds_half(low: float, high: float) -> bool:
    """Whether values of a range leave FP16's, or come close to it."""
    return max(abs(low), abs(high)) > HALF_LARGEST / HALF_MARGIN


def find_islands(model: onnx.ModelProto, large: Collection[str]) -> frozenset[str]:
    """Nodes that read or write one of these tensors, themselves or through INT8; and what makes floats of INT8 for them.

    (A convolution between DequantizeLinear and QuantizeLinear runs in INT8 only if nothing casts in between.)
    """
    from ..graph.passes.half import node_name

    large, as_integers = set(large), set[str]()
    for node in model.graph.node:  # sorted, as ONNX wants them
        if node.op_type == "QuantizeLinear" and node.input[0] in large:
            as_integers.update(node.output)
        elif node.op_type == "DequantizeLinear" and node.input[0] in as_integers:
            large.update(node.output)
    chosen = [node for node in model.graph.node if large.intersection((*node.output, *node.input))]
    read = {name for node in chosen for name in node.input}
    before = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and read.intersection(n.output)]
    return frozenset(map(node_name, (*chosen, *before)))


def list_tensors(model: onnx.ModelProto) -> list[str]:
    """Names of all floating-point tensors that nodes write, and of the graph's inputs."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model)
    values = [*inferred.graph.value_info, *inferred.graph.output]
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    written = [name for node in model.graph.node for name in node.output if kinds.get(name) in floats]
    stored = _initialisers(model)
    return [v.name for v in model.graph.input if v.name not in stored] + written
