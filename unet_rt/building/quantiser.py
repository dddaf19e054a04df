"""INT8 graphs of a model, with chosen layers in FP32, and what each layer costs in accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..engine import parity as parity_module
from ..engine.engine import Engine
from ..errors import GraphError, size_text
from ..graph.passes import qdq
from ..graph.passes.half import half
from ..system import facts
from ..system.json import Record
from ..tiling.decision import decide
from .activations import exceeds_half, find_islands
from .calibration import METHODS, RangeMethod, calibrate
from .job import Remarks

if TYPE_CHECKING:
    from ..contract.contract import Contract
    from ..engine.budget import Budget
    from ..engine.parity import Verdict


Array = npt.NDArray[Any]

CLOSE = 0.05  # share of samples that decide about labels
COMPARED_TILES = 6


NEXT_TO_NOTHING = 0.02  # share of the work of layers at the ends that are tried in FP32 whatever the budget says
LEAST_SAY = 1e-6  # of the budget: an output that plain INT8 leaves alone must not be forgotten altogether
VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


@dataclass(frozen=True)
class LayerCost(Record):
    """What returning one layer to FP32 won and cost.

    Attributes:
        name: The convolution.
        won: Share of the change near the decision that it takes away.
        cost: Its share of the network's multiplications.
        kept: Whether it was put back.
    """

    name: str
    won: float
    cost: float
    kept: bool


@dataclass(frozen=True)
class Mixture:
    """One way to quantise the model.

    Attributes:
        label: Empty for plain INT8, else what differs.
        keep: Layers in FP32.
        engine: Built and loaded.
        verdict: On the samples of parity.
    """

    label: str
    keep: frozenset[str]
    engine: Engine
    verdict: Verdict


class Quantiser:
    """A model prepared and calibrated, to be quantised as often as a search asks."""

    def __init__(
        self,
        graph: Path,
        baseline: Engine,
        tiles: Sequence[Array],
        *,
        budget: Budget,
        windows: tuple[tuple[str, str], ...] = (),
        threads: int = 0,
        remarks: Remarks,
    ):
        import onnx

        self.baseline, self.threads, self.say = baseline, threads, remarks.say
        self.budget = budget.of("int8")
        self.judged = parity_module.judged_outputs(baseline.spec)
        self.weights = [1.0] * len(self.judged)
        self.prepared = qdq.prepare_graph(onnx.load(str(graph)))
        self.layers = qdq.layers(self.prepared)
        if not self.layers:
            raise GraphError("the graph has no convolution with stored weights, so there is nothing for INT8")
        self.say(f"calibrating on {len(tiles)} tiles of {size_text(tiles[0].shape[2:])} px")
        inputs = [baseline.graph_inputs(x) for x in tiles]
        found = calibrate(self.prepared, qdq.tensors_to_probe(self.prepared), inputs, threads=threads)
        self.calibration = replace(found, windows=windows)
        self.compared = tiles[:COMPARED_TILES]
        self.wanted = [self._outputs(baseline, x) for x in self.compared]
        self.method: RangeMethod | None = None
        self.ranking: list[LayerCost] = []
        self.left_out = remarks.left_out  # what there was no time for, in sentences
        self.refused = remarks.notes  # mixtures that a backend could not be built with, in sentences

    def write(
        self, path: Path, backend: str, keep: frozenset[str] = frozenset(), method: RangeMethod | None = None
    ) -> qdq.Quantised:
        """Writes the quantised graph in the form of a backend."""
        import onnx

        ranges = self.calibration.ranges[method or self.method or METHODS[0]]
        quantised = qdq.quantise(self.prepared, ranges, form_of(backend), keep=keep, means=self.calibration.means)
        if backend == "tensorrt":  # what is not INT8 there is FP16, and FP32 where that would overflow
            half(quantised.model, islands=find_islands(quantised.model, self._too_large()))
        onnx.save_model(quantised.model, str(path))
        return quantised

    def _too_large(self) -> set[str]:
        """Tensors that would overflow in FP16, those that layers write in front of their activation among them."""
        seen = self.calibration.ranges["minmax"]
        large = {name for name, found in seen.items() if exceeds_half(found.low, found.high)}
        nodes = {node.name: node for node in self.prepared.graph.node}
        behind = qdq.results(self.prepared)
        return large | {nodes[name].output[0] for name in self.layers if behind[name] in large}

    def _outputs(self, engine: Engine, x: Array) -> list[Array]:
        """What an engine says of one tile: the outputs that are judged, (K, *tile_out) each."""
        outputs = engine.run(x)
        return [outputs[k][0] for k in self.judged]

    def changes(self, engine: Engine) -> list[float]:
        """What an engine changes near the decision of every output that is judged, on the calibration tiles."""
        got = [self._outputs(engine, x) for x in self.compared]
        columns = zip(self.judged, zip(*self.wanted, strict=True), zip(*got, strict=True), strict=True)
        return [change_near_decision(w, g, engine.spec.contract_of(k)) for k, w, g in columns]

    def worst_changes(self, engine: Engine) -> list[float]:
        """The same of the tile where it is largest: what a budget on the worst image is about."""
        contracts = [engine.spec.contract_of(k) for k in self.judged]
        changes = [
            [
                change_near_decision([w], [g], c)
                for w, g, c in zip(wanted, self._outputs(engine, x), contracts, strict=True)
            ]
            for x, wanted in zip(self.compared, self.wanted, strict=True)
        ]
        return [max(column) for column in zip(*changes, strict=True)]

    def change(self, engine: Engine) -> float:
        """The sum of :meth:`changes`, as :meth:`weigh` weighs them; the change itself where one output is judged."""
        return sum(weight * change for weight, change in zip(self.weights, self.changes(engine), strict=True))

    def weigh(self, plain: Mixture) -> None:
        """Weighs outputs by what a change of each costs of the budget, as plain INT8 shows: its change counts for what it
        uses of the output's budget."""
        if len(self.judged) == 1:
            return
        shares = parity_module.budget_shares(plain.verdict, self.budget).values()
        self.weights = [
            max(share, LEAST_SAY) / (change if 0 < change < float("inf") else 1.0)
            for share, change in zip(shares, self.changes(plain.engine), strict=True)
        ]

    def costs(self) -> dict[str, float]:
        """Each layer's share of the multiplications of all layers."""
        nodes = {node.name: node for node in self.prepared.graph.node}
        sizes = {t.name: prod(t.dims) for t in self.prepared.graph.initializer}
        results = qdq.results(self.prepared)
        work = {
            name: sizes[nodes[name].input[1]] * self.calibration.positions.get(results[name], 1) for name in self.layers
        }
        return {name: value / sum(work.values()) for name, value in work.items()}

    def ends(self) -> list[tuple[str, frozenset[str]]]:
        """Layers that read the graph's inputs, and those that return its outputs; where they are next to no work.

        Eight bits of a normalised image are fewer than its own, and the last layer's rounding is nobody's to mend.
        """
        costs = self.costs()
        given = {value.name for value in self.prepared.graph.input}
        asked = {value.name for value in self.prepared.graph.output}
        behind = qdq.results(self.prepared)
        first = {n.name for n in self.prepared.graph.node if n.name in self.layers and n.input[0] in given}
        last = {name for name in self.layers if behind[name] in asked and name not in first}
        ends = (("first", frozenset(first)), ("last", frozenset(last)))
        return [(label, names) for label, names in ends if sum(costs[name] for name in names) <= NEXT_TO_NOTHING]


def form_of(backend: str) -> qdq.Form:
    """The form of a quantised graph for a backend on this machine."""
    form = qdq.FORMS[backend]
    features = facts.cpu_features()
    if backend in ("onnxruntime", "openvino") and "avx2" in features and not features & VNNI:
        # their kernels add pairs of products in 16 bits there, and two of 255 x 127 do not fit
        return replace(form, levels=63)
    return form


def change_near_decision(wanted: Sequence[Array], got: Sequence[Array], contract: Contract) -> float:
    """Mean change of the distance to the decision where it is close, over the mean distance; infinite for NaN.

    For regression the root mean square error over the 1st to 99th percentile range, of the channel that it is largest in.
    """
    if contract.task == "regression":
        error = max(
            _root_mean_square(*(np.concatenate([y[k].ravel() for y in ys]).astype(np.float64) for ys in (wanted, got)))
            for k in range(len(wanted[0]))
        )
        return error if np.isfinite(error) else float("inf")
    before, after = [], []
    for w, g in zip(wanted, got, strict=True):
        decision = decide(contract, len(w), "mask")
        if decision.op == "argmax":
            order = np.argsort(w, axis=0)
            best, second = order[-1:], order[-2:-1]
            before.append(np.take_along_axis(w, best, 0) - np.take_along_axis(w, second, 0))
            after.append(np.take_along_axis(g, best, 0) - np.take_along_axis(g, second, 0))
        else:
            limits = np.array(decision.threshold, np.float32).reshape(-1, *[1] * (w.ndim - 1))
            before.append(w - limits)
            after.append(g - limits)
    b, a = (np.concatenate([y.ravel() for y in ys]).astype(np.float64) for ys in (before, after))
    distance = np.abs(b)
    near = distance <= np.quantile(distance, CLOSE)
    error = float(np.abs(a - b)[near].mean() / max(float(distance.mean()), 1e-30))
    return error if np.isfinite(error) else float("inf")


def _root_mean_square(wanted: Array, got: Array) -> float:
    """Of the error of one channel, over the range of its values; 0 where it has none and nothing changes."""
    error = float(np.sqrt(((got - wanted) ** 2).mean()))
    return error / max(parity_module.value_span(wanted), 1e-30)
