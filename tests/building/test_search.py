"""The search for INT8 inside a budget: what is compared, which layers go back to FP32, and what a build keeps of it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import numpy_helper

import unet_rt as urt
from unet_rt.building import engines as build_engines
from unet_rt.building import tiling as build_tiling
from unet_rt.building.activations import (
    find_overflows,
    list_tensors,
    probe,
)
from unet_rt.building.calibration import Calibration
from unet_rt.building.choice import (
    _widen,
    pick_closest,
)
from unet_rt.building.int8 import return_layers
from unet_rt.building.job import (
    Deadline,
    Remarks,
)
from unet_rt.building.measure import Judge
from unet_rt.building.quantiser import LayerCost, Mixture, Quantiser, change_near_decision, form_of
from unet_rt.building.report import (
    BuildReport,
    Candidate,
)
from unet_rt.building.search import _best_method, _rank, _shortest, plain_and_ends, put_back
from unet_rt.cli.demo import shipped_model
from unet_rt.cli.texts import build_text
from unet_rt.contract.contract import (
    Contract,
    Head,
)
from unet_rt.drawing.microscopy import microscopy
from unet_rt.engine import parity
from unet_rt.graph.passes import qdq
from unet_rt.graph.passes.half import half

pytestmark = [pytest.mark.onnxruntime]
Array = np.ndarray[Any, Any]
SAMPLES = [microscopy((220, 220), seed=seed).image for seed in range(3)]


# --- what candidates are compared by -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_change_near_the_decision_orders_as_changed_labels_do(task: str) -> None:
    """More noise, more changed labels, more change; noise far from the decision counts for nothing."""
    contract = Contract(task=task, output_is="logits")  # type: ignore[arg-type]
    channels = 1 if task == "binary" else 3
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:80, :80] / 12
    wanted = np.stack([3 * np.sin(x + k) + 3 * np.cos(y - k) for k in range(channels)]).astype(np.float32)
    noise = rng.normal(size=wanted.shape).astype(np.float32)
    changes = [change_near_decision([wanted], [wanted + scale * noise], contract) for scale in (0, 0.01, 0.1, 1)]
    assert changes[0] == 0
    assert sorted(changes) == changes
    assert len(set(changes)) == 4
    # a common rise of all classes decides nothing
    if task == "multiclass":
        assert change_near_decision([wanted], [wanted + noise[:1]], contract) < 1e-6
    broken = wanted.copy()
    broken[0, 3, 3] = np.nan
    near = np.abs(wanted) == np.abs(wanted).min()
    broken[near] = np.nan
    assert change_near_decision([wanted], [broken], contract) in (np.inf, 0.0) or task == "multiclass"
    assert change_near_decision([wanted], [np.full_like(wanted, np.nan)], contract) == np.inf


def test_change_of_a_regression_is_its_error_over_the_range() -> None:
    wanted = np.linspace(0, 10, 10_000, dtype=np.float32).reshape(1, 100, 100)
    change = change_near_decision([wanted], [wanted + 0.049], Contract(task="regression", output_is=None))
    assert change == pytest.approx(0.049 / 9.8, rel=1e-3)


# --- the shortest list --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", range(1, 12))
def test_the_shortest_beginning_that_holds_the_budget(needed: int) -> None:
    """Found for every length, with few attempts; every engine but that of the answer is dropped."""
    names = [f"layer {k}" for k in range(10)]
    dropped: list[Any] = []
    tried: list[int] = []

    def attempt(keep: frozenset[str]) -> Mixture:
        tried.append(len(keep))
        assert keep == frozenset(["first", *names[: len(keep) - 1]])
        verdict = SimpleNamespace(accepted=len(keep) - 1 >= needed, label_change=0.1, error=0.1)
        return Mixture("", keep, object(), verdict)  # type: ignore[arg-type]

    found, complete = _shortest(names, frozenset({"first"}), attempt, dropped.append, lambda _: None)
    assert complete
    if needed > len(names):
        assert found is None
        assert len(dropped) == len(tried)
    else:
        assert found is not None
        assert len(found.keep) - 1 == needed
        assert len(dropped) == len(tried) - 1
        assert found.engine not in dropped
    assert len(tried) <= 8


def test_weights_have_seven_bits_where_products_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_rt.system.facts.cpu_features", lambda: frozenset({"avx2", "avx512f"}))
    assert form_of("onnxruntime").levels == form_of("openvino").levels == 63
    assert form_of("tensorrt").levels == 127
    monkeypatch.setattr("unet_rt.system.facts.cpu_features", lambda: frozenset({"avx2", "avx_vnni"}))
    assert form_of("onnxruntime").levels == form_of("openvino").levels == 127


class Clock:
    """The monotonic clock, which goes on by the seconds that attempts take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        for module in ("job", "search"):
            monkeypatch.setattr(f"unet_rt.building.{module}.time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.mark.parametrize("seconds", [0, 5, 39, 41, 55, 60, 1000])
def test_no_attempt_begins_that_would_end_behind_the_deadline(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts of ten seconds: the answer is the shortest list that was found in time, and whether it is known to be."""
    clock, names = Clock(monkeypatch), [f"layer {k}" for k in range(16)]
    needed, dropped = 5, list[Any]()

    def attempt(keep: frozenset[str]) -> Mixture:
        clock.now += 10
        verdict = SimpleNamespace(accepted=len(keep) >= needed, label_change=0.1, error=None)
        return Mixture("", keep, object(), verdict)  # type: ignore[arg-type]

    end = clock.now + seconds
    found, complete = _shortest(names, frozenset(), attempt, dropped.append, lambda _: None, end)
    assert clock.now <= end + 10  # the first attempt's time is not known before
    assert (found is not None) == (seconds >= 40)  # lists of 1, 2, 4 and 8 layers were tried
    assert complete == (seconds >= 60)  # and of 6 and 5
    if found is not None:
        assert len(found.keep) == {41: 8, 55: 6}.get(seconds, needed)
        assert found.engine not in dropped


def test_ranges_are_chosen_by_the_worst_tile() -> None:
    """A method that is best on most tiles and cuts a bright one off is not taken."""
    changes = {"minmax": [0.02, 0.02], "percentile": [0.001, 0.9], "tight": [0.001, 0.9], "mse": [0.01, 0.03]}
    changes["entropy"] = [0.04, 0.04]
    quantiser = SimpleNamespace(worst_changes=lambda found: [max(found)], say=lambda _: None, left_out=[])
    made = lambda keep, method: changes[method]  # noqa: E731
    deadline = Deadline(time.monotonic(), 1e6)
    assert _best_method(quantiser, made, lambda _: None, deadline, 1.0) == "minmax"  # type: ignore[arg-type]
    assert not quantiser.left_out


def test_ranges_serve_every_output() -> None:
    """What is best for one output and ruins another is not taken; outputs are compared with the best that is possible."""
    changes = {"minmax": [1.0, 0.02], "percentile": [0.9, 0.5], "tight": [2.0, 0.01], "mse": [np.inf, 0.3]}
    changes["entropy"] = [9.0, 0.4]
    quantiser = SimpleNamespace(worst_changes=list, say=lambda _: None, left_out=[])
    made = lambda keep, method: changes[method]  # noqa: E731
    deadline = Deadline(time.monotonic(), 1e6)
    assert _best_method(quantiser, made, lambda _: None, deadline, 1.0) == "minmax"  # type: ignore[arg-type]


def test_ranges_are_tried_as_long_as_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    quantiser = SimpleNamespace(worst_changes=lambda _: [1.0], say=lambda _: None, left_out=[])

    def made(keep: frozenset[str], method: str) -> None:
        clock.now += 10

    assert _best_method(quantiser, made, lambda _: None, Deadline(clock.now, 50), 0.5) == "minmax"  # type: ignore[arg-type]
    assert quantiser.left_out == ["ranges by tight, mse, entropy were not tried"]


@pytest.mark.parametrize(
    ("plain", "lowest", "change", "won"),
    [
        (0.2, 0.1, 0.05, (0.5, 0.25)),
        (0.0, 0.0, 0.0, (0.0, 0.0)),  # INT8 that changes nothing near the decision
        (float("inf"), float("inf"), 0.1, (0.0, 1.0)),  # INT8 that is not finite
        (float("inf"), 0.2, 0.1, (1.0, 1.0)),
    ],
)
def test_what_a_layer_wins_is_a_share_of_what_int8_changes(
    plain: float, lowest: float, change: float, won: tuple[float, float]
) -> None:
    quantiser = SimpleNamespace(
        layers=["a", "b"],
        costs=lambda: {"a": 0.1, "b": 0.9},
        change=lambda engine: engine if isinstance(engine, float) else change,
        say=lambda _: None,
        left_out=[],
    )
    found = [SimpleNamespace(keep=frozenset(), engine=plain), SimpleNamespace(keep=frozenset({"a"}), engine=lowest)]
    made = lambda keep, method: keep  # noqa: E731
    ranked = _rank(
        quantiser,
        made,
        lambda _: None,
        "minmax",
        found,  # type: ignore[arg-type]
        float("inf"),
    )
    assert [(layer.name, layer.kept) for layer in ranked] == [("a", True), ("b", False)]
    assert [layer.won for layer in ranked] == pytest.approx(list(won))


def three_layers(change: Any, *ends: tuple[str, frozenset[str]]) -> Any:
    """A quantiser of layers a, b and c; an engine is the layers that it keeps in FP32."""
    return SimpleNamespace(
        layers=["a", "b", "c"],
        costs=lambda: dict.fromkeys("abc", 0.3),
        change=change,
        ends=lambda: list(ends),
        weigh=lambda plain: None,
        say=lambda _: None,
        method="minmax",
        ranking=[],
        left_out=[],
        refused=[],
    )


def test_each_end_is_credited_with_what_it_won_itself() -> None:
    quantiser: Any = SimpleNamespace(
        layers=["first", "last"],
        costs=lambda: {"first": 0.1, "last": 0.1},
        change=lambda engine: engine,
        left_out=[],
    )
    found: Any = [
        SimpleNamespace(keep=frozenset(keep), engine=change)
        for keep, change in (((), 1.0), (("first",), 0.7), (("first", "last"), 0.5))
    ]
    nothing: Any = None
    ranked = _rank(quantiser, nothing, nothing, "minmax", found, float("inf"))
    assert [layer.name for layer in ranked] == ["first", "last"]
    assert [layer.won for layer in ranked] == pytest.approx([0.3, 0.2])


def test_a_mixture_that_cannot_be_judged_is_one_less() -> None:
    """A shape that runs out of memory, say: neither plain INT8 nor a mixture inside the budget is lost over it."""
    quantiser = three_layers(lambda keep: 0.5 - 0.1 * len(keep), ("first", frozenset({"c"})))

    def judge(keep: frozenset[str]) -> Any:
        if "c" in keep or keep == {"a"}:
            raise urt.BackendError("out of memory")
        return SimpleNamespace(accepted=len(keep) == 2, label_change=0.1, error=None)

    dropped: list[Any] = []
    made: Any = lambda keep, method: keep  # noqa: E731
    deadline = Deadline(time.monotonic(), 1e6)
    found = plain_and_ends(quantiser, made, dropped.append, judge, deadline, 1.0)  # type: ignore[arg-type]
    assert [mixture.keep for mixture in found] == [frozenset()]
    assert dropped == [{"c"}]
    mixture = put_back(quantiser, found, made, dropped.append, judge, deadline, 1.0)  # type: ignore[arg-type]
    assert mixture is not None
    assert mixture.keep == {"a", "b"}
    assert quantiser.refused == [
        "INT8 with first layer in FP32 is left out: out of memory",
        "INT8 with 1 layer in FP32 is left out: out of memory",
    ]


def test_a_mixture_that_a_backend_refuses_is_one_less() -> None:
    """Not the end of the build: other layers are ranked, other lists tried, and the refusal is said once."""

    def made(keep: frozenset[str], method: str) -> frozenset[str]:
        if "b" in keep:
            raise urt.BackendError("a layer fell back")
        return keep

    quantiser = three_layers(
        lambda keep: 0.2 - 0.1 * ("c" in keep), ("first", frozenset({"b"})), ("last", frozenset({"c"}))
    )
    judge = lambda keep: SimpleNamespace(accepted="a" in keep, label_change=0.1, error=None)  # noqa: E731
    dropped: list[Any] = []
    deadline = Deadline(time.monotonic(), 1e6)
    found = plain_and_ends(quantiser, made, dropped.append, judge, deadline, 1.0)  # type: ignore[arg-type]
    assert [mixture.keep for mixture in found] == [frozenset(), frozenset({"c"})]
    mixture = put_back(quantiser, found, made, dropped.append, judge, deadline, 1.0)  # type: ignore[arg-type]
    assert mixture is not None
    assert mixture.keep == {"a", "c"}
    assert quantiser.refused[0] == "INT8 with 1 layer in FP32 is left out: a layer fell back"
    assert len(quantiser.refused) == len(set(quantiser.refused))


# --- several outputs ----------------------------------------------------------------------------------------------------


def heads(*shares: float) -> parity.Verdict:
    """A verdict on outputs that use these shares of the INT8 budget: labels, then values."""
    first = parity.ImageParity("a", 100, 5e-3 * shares[0], {}, {}, 0.0, 0.0, 0.0, "mask")
    second = parity.ImageParity("a", 100, None, {}, {}, 0.0, 0.0, 1e-2 * shares[1], "distance")
    return parity.judge([first, second], urt.Budget().of("int8"))


@pytest.mark.parametrize(("labels", "values", "best"), [(0.1, 9.0, "b"), (9.0, 0.1, "a")])
def test_a_layer_counts_for_the_outputs_that_miss_the_budget(labels: float, values: float, best: str) -> None:
    changes = {
        frozenset(): [0.2, 0.001],
        frozenset("a"): [0.1, 0.001],  # halves what the labels lose
        frozenset("b"): [0.2, 0.0005],  # halves what the values lose
    }
    quantiser = object.__new__(Quantiser)
    quantiser.judged, quantiser.budget, quantiser.say = [0, 1], urt.Budget().of("int8"), lambda _: None
    quantiser.layers, quantiser.left_out, quantiser.refused = ["a", "b"], [], []
    quantiser.changes = lambda engine: changes[engine]  # type: ignore[method-assign, assignment]
    quantiser.costs = lambda: {"a": 0.5, "b": 0.5}  # type: ignore[method-assign]
    found = Mixture("", frozenset(), frozenset(), heads(labels, values))  # type: ignore[arg-type]
    quantiser.weigh(found)
    plain = quantiser.change(frozenset())  # type: ignore[arg-type]
    assert plain == pytest.approx(labels + values)
    made = lambda keep, method: keep  # noqa: E731
    ranked = _rank(quantiser, made, lambda _: None, "minmax", [found], float("inf"))  # type: ignore[arg-type]
    assert ranked[0].name == best
    assert ranked[0].won == pytest.approx(0.5 * max(labels, values) / (labels + values))


def test_an_output_that_is_not_finite_is_weighed_once_it_is() -> None:
    quantiser = object.__new__(Quantiser)
    quantiser.judged, quantiser.budget = [0, 1], urt.Budget().of("int8")
    changes = [[0.1, float("inf")], [0.1, 0.2], [0.0, 0.0]]
    quantiser.changes = lambda engine: changes[engine]  # type: ignore[method-assign, assignment, index, call-overload]
    quantiser.weigh(Mixture("", frozenset(), 0, heads(1.0, float("inf"))))  # type: ignore[arg-type]
    assert quantiser.change(0) == float("inf")  # type: ignore[arg-type]
    assert 0 == quantiser.change(2) < quantiser.change(1) < float("inf")  # type: ignore[arg-type]
    quantiser.judged, quantiser.weights = [0], [1.0]
    changes = [[0.3]]
    quantiser.weigh(Mixture("", frozenset(), 0, heads(1.0, 1.0)))  # type: ignore[arg-type]
    assert quantiser.change(0) == 0.3, "a single output is not weighed"  # type: ignore[arg-type]


# --- builds -------------------------------------------------------------------------------------------------------------


def pixels() -> Array:
    """A tile as the shipped network gets it."""
    x = SAMPLES[0].astype(np.float32)[None, None, :160, :160]
    low, high = np.percentile(SAMPLES[0], (1, 99.8))
    return ((x - low) / (high - low)).astype(np.float32)


def run(model: Any) -> Array:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    half_precision = session.get_inputs()[0].type == "tensor(float16)"
    result: Array = session.run(None, {"input": pixels().astype(np.float16 if half_precision else np.float32)})[0]
    return np.nan_to_num(result.astype(np.float32))


def widened(path: Path, factor: float = 4e4) -> Path:
    """The shipped network with one channel, read by one layer, made larger by ``factor`` and its readers smaller."""
    model = onnx.load(shipped_model())
    stored = {t.name: t for t in model.graph.initializer}
    nodes = {n.name: n for n in model.graph.node}
    first, second = nodes["/down.2/down.2.0/Conv"], nodes["/down.2/down.2.3/Conv"]
    seen = probe(model, [second.input[0]], [[pixels()]], threads=1)[second.input[0]]
    channel = int(seen.means.argmax())
    for name, axis, by in ((first.input[1], 0, factor), (first.input[2], 0, factor), (second.input[1], 1, 1 / factor)):
        array = numpy_helper.to_array(stored[name]).copy()
        array[(slice(None),) * axis + (channel,)] *= by
        stored[name].CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, str(path))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_engines, "CALIBRATION_PX", 160**2)
    monkeypatch.setattr(build_tiling, "TILE_AREAS", ())


def built(model: Path, out: Path, **options: Any) -> tuple[BuildReport, urt.Engine]:
    reports: list[BuildReport] = []
    options = {"samples": SAMPLES, "threads": 1, "tile": (160, 160), "halo": "exact"} | options
    engine = urt.build(model, out=out, report=reports.append, **options)
    return reports[0], engine


@pytest.mark.openvino
@pytest.mark.usefixtures("quick")
def test_one_wide_channel(tmp_path: Path) -> None:
    """FP16 would overflow, plain INT8 loses all other channels: both are seen. The mixture passes."""
    model = widened(tmp_path / "wide.onnx")
    prepared = qdq.prepare_graph(onnx.load(model))
    found = probe(prepared, list_tensors(prepared), [[pixels()]], threads=1)
    islands = find_overflows(prepared, found)
    assert "/down.2/down.2.3/Conv" in islands
    assert len(islands) <= 6, "and nothing else"
    wanted = run(prepared)
    assert max(d.high for d in found.values()) > 65504  # the largest FP16
    half(prepared, islands=islands, keep_io=True)  # (on a CPU, ONNX Runtime computes FP16 graphs in FP32 and rounds)
    assert np.mean(run(prepared).argmax(1) != wanted.argmax(1)) < 1e-3
    report, engine = built(model, tmp_path / "wide.urt", backend="openvino", precision="int8")
    with engine:
        plain, mixed = report.candidates
        assert plain.variant == ""
        assert plain.verdict is not None
        assert not plain.verdict.accepted
        assert (plain.verdict.label_change or 0) > 0.02
        assert mixed.verdict is not None
        assert mixed.verdict.accepted
        assert (mixed.verdict.label_change or 0) < 5e-3
        assert report.layers[0].name == "/down.2/down.2.3/Conv"
        assert report.layers[0].kept
        assert report.layers[0].won > 0.5
        assert engine.spec.options["int8"]["kept"] == ["/down.2/down.2.3/Conv"]
        text = build_text(report)
        assert "outside the budget" in text
        assert "/down.2/down.2.3/Conv" in text
        assert engine._session.layers == {"u8": 17, "f32": 1}  # type: ignore[attr-defined]
        # TensorRT gets FP16 for what is not INT8: the wide channel keeps its FP32 there
        quantiser = object.__new__(Quantiser)
        assert engine.folder is not None
        quantiser.calibration = Calibration.from_json(json.loads(engine.folder.file("calibration").read_text()))
        quantiser.method, kept = engine.spec.options["int8"]["method"], frozenset(engine.spec.options["int8"]["kept"])
    quantiser.prepared = qdq.prepare_graph(onnx.load(model))
    quantiser.layers = qdq.layers(quantiser.prepared)
    quantiser.write(tmp_path / "wide-tensorrt.onnx", "tensorrt", kept)
    written = onnx.load(tmp_path / "wide-tensorrt.onnx")
    assert np.mean(run(written).argmax(1) != wanted.argmax(1)) < 0.01
    # ONNX Runtime computes FP16 in FP32 on a CPU and may leave out rounding: types tell whether a GPU would overflow
    inferred = onnx.shape_inference.infer_shapes(written).graph
    values = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    results = {node.name: values[node.output[0]] for node in written.graph.node if node.op_type == "Conv"}
    assert results["/down.2/down.2.0/Conv"] == results["/down.2/down.2.3/Conv"] == onnx.TensorProto.FLOAT
    assert list(results.values()).count(onnx.TensorProto.FLOAT16) == len(results) - 2


def forked(path: Path, factor: float = 1e3) -> Path:
    """The shipped network with a second output: values by three layers, whose second reads one channel of a wide range."""
    model = onnx.load(shipped_model())
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    (head,) = (node for node in graph.node if "output" in node.output)
    channels = stored[head.input[1]].dims[1]
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(6, channels, 1, 1)), rng.normal(size=(6, 6, 1, 1))
    first[0] = np.abs(first[0]) * factor  # the others drown in its range
    second[:, 0] /= factor
    layers = {"wide/a": first, "wide/b": second, "wide/c": rng.normal(size=(1, 6, 1, 1))}
    read = head.input[0]
    for name, weight in layers.items():
        graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}/w"))
        last = name == "wide/c"
        result = "values" if last else f"{name}/y"
        graph.node.append(onnx.helper.make_node("Conv", [read, f"{name}/w"], [result], name=name, kernel_shape=[1, 1]))
        if not last:
            read = f"{name}/relu"
            graph.node.append(onnx.helper.make_node("Relu", [result], [read], name=read))
    shape = graph.output[0].type.tensor_type.shape.dim[0].dim_param
    graph.output.append(onnx.helper.make_tensor_value_info("values", onnx.TensorProto.FLOAT, [shape, 1, "h", "w"]))
    onnx.save(model, str(path))
    return path


@pytest.mark.openvino
@pytest.mark.usefixtures("quick")
def test_layers_are_put_back_for_a_second_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 is right in the first output and wrong in the second, for a layer that the first does not depend on."""
    every = qdq.layers
    some = ("wide", "/merge.2", "/up.2", "/down.2")  # quick: the others stay in FP32
    monkeypatch.setattr(qdq, "layers", lambda model: [name for name in every(model) if name.startswith(some)])
    contract = Contract(heads=(Head("values", "regression", "values"),))
    budget = urt.Budget(error=0.1)
    options = {"backend": "openvino", "precision": "int8", "contract": contract, "budget": budget}
    options["samples"] = [image[:160, :160] for image in SAMPLES]  # a tile each
    report, engine = built(forked(tmp_path / "forked.onnx"), tmp_path / "forked.urt", **options)
    with engine:
        verdicts = [c.verdict for c in report.candidates if c.verdict is not None]
        assert not verdicts[0].accepted
        assert all("output values" in reason for reason in verdicts[0].reasons)
        assert (verdicts[0].label_change or 0) < 5e-3
        assert verdicts[-1].accepted
        best = max(report.layers, key=lambda layer: layer.won)
        assert (best.name, best.kept) == ("wide/b", True)
        assert best.won > 0.5
        assert "wide/b" in engine.spec.options["int8"]["kept"]
        text = build_text(report)
        assert "labels changed and largest error" in text
        assert engine.folder is not None
        rows = engine.folder.parity["rows"]  # type: ignore[index]
        assert {(row["batch"], row["output"]) for row in rows} == {(n, o) for n in (1, 2) for o in ("output", "values")}


@pytest.mark.usefixtures("quick")
def test_the_engine_keeps_its_calibration(tmp_path: Path) -> None:
    """From model.onnx, the calibration and the options the same graph is made again; load reads the precision back."""
    report, engine = built(shipped_model(), tmp_path / "a.urt", backend="onnxruntime", precision="int8")
    engine.close()
    assert report.layers == (), "no ranking where plain INT8 is inside the budget"
    assert any("1 of 3 sample windows calibrate" in note for note in report.notes)
    folder = engine.folder
    assert folder is not None
    calibration = Calibration.from_json(json.loads(folder.file("calibration").read_text()))
    judged = {image["sha256"] for image in folder.parity["images"]}  # type: ignore[index]
    assert len(judged) == 2
    assert {digest for _, digest in calibration.windows}.isdisjoint(judged)
    options = engine.spec.options["int8"]
    again = qdq.quantise(
        qdq.prepare_graph(onnx.load(folder.file("model"))),
        calibration.ranges[options["method"]],
        form_of("onnxruntime"),
        keep=frozenset(options["kept"]),
        means=calibration.means,
    )
    before = onnx.load(folder.file("graph"))
    after = {t.name: t for t in again.model.graph.initializer}
    assert after.keys() == {t.name for t in before.graph.initializer}
    for t in before.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(t), numpy_helper.to_array(after[t.name]))
    assert folder.parity["budget"]["label_change"] == 5e-3  # type: ignore[index]
    with urt.load(tmp_path / "a.urt", threads=1) as loaded:
        assert loaded.spec.precision == "int8"


@pytest.mark.usefixtures("quick")
def test_int8_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(
        urt.ContractError, match="int8 needs samples to calibrate and to prove parity on; pass --samples"
    ):
        built(shipped_model(), tmp_path / "a.urt", samples=None, precision="int8")
    for minutes in (0, -1, float("nan"), float("inf")):
        with pytest.raises(urt.ContractError, match="search_minutes"):
            built(shipped_model(), tmp_path / "a.urt", search_minutes=minutes)
    budget = urt.Budget(label_change=0)
    options = {"backend": "onnxruntime", "precision": "int8", "budget": budget, "search_minutes": 0.01}
    with pytest.raises(urt.ParityError, match=r"no candidate is inside the budget: onnxruntime int8"):
        built(shipped_model(), tmp_path / "a.urt", **options)
    with pytest.raises(urt.ImageError, match="pass three or more images"):
        built(shipped_model(), tmp_path / "a.urt", samples=[SAMPLES[0][:96, :96]], precision="int8", tile=(64, 64))
    assert not (tmp_path / "a.urt").exists()


def test_a_mixture_that_a_backend_refuses_costs_no_other_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that runs a layer in FP32 against the graph is found when it is loaded: after minutes of search."""

    def refuse(*_: Any) -> None:
        raise urt.BackendError("ONNX Runtime runs 3 of 4 layers in INT8")

    monkeypatch.setattr("unet_rt.building.int8.put_back", refuse)
    seconds: dict[Any, float] = {"fp32": 2.0, "int8": 1.0}
    remarks = Remarks(lambda _: None)
    job: Any = SimpleNamespace(deadline=None, remarks=remarks)
    others: Any = {("onnxruntime", "fp32", ""): "fp32", ("openvino", "bf16", ""): "bf16"}

    def judge(engine: Any) -> Any:
        raise urt.BackendError(f"{engine} cannot be run")

    plain: Any = SimpleNamespace(engine="int8", verdict=SimpleNamespace(accepted=False))
    nothing: Any = None
    returned, verdicts = return_layers(
        job,
        nothing,
        {"onnxruntime": [plain]},
        others,
        make=lambda _: nothing,
        drop=nothing,
        judge=judge,
        seconds=lambda engine: seconds[engine],
    )
    assert verdicts == {}
    assert returned == {}
    assert remarks.notes == [
        "onnxruntime int8: layers were returned to FP32 until ONNX Runtime runs 3 of 4 layers in INT8"
    ]


def test_windows_that_calibrated_judge_the_other_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like any window. INT8 they disprove only, with the numbers that a wider budget would need."""
    changes: dict[tuple[str, str], float] = {}

    def compared(judge: Judge, engine: Any, wanted: Any, tile: Any, remark: str = "") -> list[parity.ImageParity]:
        change = changes[engine.spec.precision, wanted]
        return [parity.ImageParity(f"{wanted}{remark}", 100, change, {}, {}, 0.0, 0.0, 0.0)]

    monkeypatch.setattr(Judge, "_compared", compared)
    monkeypatch.setattr("unet_rt.building.measure.calibrating_results", lambda job, spec, windows: "calibrating")
    job: Any = SimpleNamespace(budget=urt.Budget())
    tiling: Any = SimpleNamespace(results="judging", spec=None)

    def verdict(precision: str, judging: float, calibrating: float, windows: Any = ("window",)) -> parity.Verdict:
        changes[precision, "judging"], changes[precision, "calibrating"] = judging, calibrating
        return Judge(job, tiling, windows).verdict(SimpleNamespace(spec=SimpleNamespace(precision=precision)))  # type: ignore[arg-type]

    found = verdict("bf16", 1e-4, 3e-3)
    assert not found.accepted
    assert found.label_change == 3e-3
    assert [image.name for image in verdict("bf16", 1e-4, 2e-4).images] == ["judging", "calibrating"]
    assert verdict("bf16", 1e-4, 3e-3, windows=()).accepted
    found = verdict("int8", 4e-3, 1e-4)
    assert (found.accepted, found.label_change, len(found.images)) == (True, 4e-3, 1)
    found = verdict("int8", 4e-3, 6e-3)
    assert (found.accepted, found.label_change) == (False, 6e-3)
    assert found.reasons[0].startswith("calibrating (it calibrated): 0.600% of labels change")
    assert _widen(found, urt.Budget().of("int8")) == "label_change=6.3e-03"


def test_of_mixtures_as_fast_as_the_fastest_the_closest_is_taken() -> None:
    verdicts = [
        parity.judge([parity.ImageParity("a", 100, c, {}, {}, 0, 0, 0)], urt.Budget()) for c in (0.002, 0.001, 0.0001)
    ]
    rows = [
        Candidate("openvino", "int8", (8, 8), kept_mpx_per_s=speed, verdict=verdict, variant=str(k))
        for k, (speed, verdict) in enumerate(zip((1.0, 0.98, 0.6), verdicts, strict=True))
    ]
    assert pick_closest(rows, rows[0], urt.Budget()) is rows[1]
    floats = [replace(row, precision="fp32") for row in rows]
    assert pick_closest(floats, floats[0], urt.Budget()) is floats[0]


def test_a_layer_cost_is_json() -> None:
    assert LayerCost("a", 0.5, 0.1, True).to_json() == {"name": "a", "won": 0.5, "cost": 0.1, "kept": True}
