"""Graphs on a real builder, TensorRT-RTX, which needs no GPU; and every name of the library that is used exists."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, OrderedDict, deque
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import FakeDevice

import unet_rt
from unet_rt.backends.tensorrt import backend as tensorrt
from unet_rt.backends.tensorrt import build as tensorrt_build
from unet_rt.backends.tensorrt import plugin as crop_concat_plugin
from unet_rt.backends.tensorrt.build import CompiledPlan, compile_plan, profiles_for
from unet_rt.backends.tensorrt.inspect import check_network
from unet_rt.backends.tensorrt.plan import Origin, PlanHeader, read_plan, write_plan
from unet_rt.cli.demo import SHIPPED, shipped_model
from unet_rt.engine import exam
from unet_rt.engine.folder import read_folder, sha256
from unet_rt.engine.write import write_folder
from unet_rt.errors import BackendError, ParityError

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

import networks
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from unet_rt.graph.passes.crop_concat import (
    DOMAIN,
    OPERATOR,
    crop_concat,
)
from unet_rt.kernels import calls as kernels
from unet_rt.models.fcn import FCN8s, FCN8sSpec
from unet_rt.models.stored import load_half
from unet_rt.models.unet import UNet, UNetSpec

PACKAGE = Path(unet_rt.__file__).parent
DATA = PACKAGE / "data"
SOURCES = sorted((PACKAGE / "backends" / "tensorrt").glob("*.py"))

pytestmark = pytest.mark.torch


# --- real builds ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rtx() -> Any:
    """The library that builds without a GPU; importing and building need no driver, running would."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed, and tensorrt alone builds only where there is a GPU")
    return importlib.import_module("tensorrt_rtx")


@cache
def graph(name: str) -> bytes:
    """A graph of free tile and batch size, with trained weights where there are some."""
    if name in SHIPPED:
        return shipped_model(name).read_bytes()
    made: dict[str, Any] = {
        "paper_w8": lambda: load_half(DATA / "paper_w8.npz"),
        "paper": lambda: UNet(UNetSpec(width=64)),
        "fcn8s": lambda: networks.initialise(FCN8s(FCN8sSpec(width=8))),
        "3-D": lambda: networks.build(networks.UNetSpec(dims=3, channels=8, norm="batch")),
        "bilinear": lambda: networks.build(networks.UNetSpec(channels=8, up="bilinear", residual=True)),
        "instance norm": lambda: networks.build(networks.UNetSpec(channels=8, norm="instance", final="sigmoid")),
        "shuffle": lambda: networks.build(networks.UNetSpec(channels=8, up="shuffle", pad_mode="reflect")),
    }
    shape = {"3-D": (1, 1, 16, 32, 32), "paper_w8": (1, 1, 188, 188), "paper": (1, 1, 188, 188)}.get(
        name, (1, 1, 96, 96)
    )
    return bytes(networks.export(made[name]().eval(), [shape], free_batch=True).SerializeToString())


CASES = {
    "nuclei": [(256, 256), (128, 128)],
    "membranes": [(284, 284)],
    "fcn8s": [(128, 128)],
    "3-D": [(16, 32, 32)],
    "bilinear": [(96, 64)],
    "instance norm": [(96, 96)],
    "shuffle": [(96, 96)],
}
PRECISIONS = ("fp32", "fp16", "int8")


def quantised(model: Any) -> Any:
    """With quantise-dequantise pairs of ranges that nobody measured: building looks at no pixel."""
    from unet_rt.graph.passes.qdq import Range, prepare_graph, quantise, tensors_to_probe

    prepared = prepare_graph(model)
    return quantise(prepared, {tensor: Range(-3.0, 5.0) for tensor in tensors_to_probe(prepared)}, "tensorrt").model


def in_precision(model: Any, path: Path, precision: str) -> Path:
    """What the model line gives to ``build`` for ``precision``: the model itself, but for INT8."""
    onnx.save(quantised(model) if precision == "int8" else model, str(path))
    return path


def assert_precision(counts: Counter[str], precision: str) -> None:
    """Of convolutions: all are in ``precision``; INT8 keeps a few in FP16, the first and the last among them."""
    if precision == "int8":
        assert counts["int8"] >= 0.7 * counts.total()
        assert set(counts) <= {"int8", "fp16"}
    else:
        assert set(counts) == {precision}


def built(trt: Any, model: Path, folder: Path, precision: str, tiles: Any, batches: Any) -> dict[str, Counter[str]]:
    """Convolutions per precision for every form of the graph; raises what ``build`` would."""
    found = {}
    for name, file in tensorrt.graph_forms(model, folder / "graph.onnx", precision, plugins=False).items():
        proto = onnx.load(str(file))
        compiled = compile_plan(trt, file, profiles_for(proto, tiles, batches))
        assert len(compiled.plan) > 10_000
        check_network(compiled.convolutions, precision, tensorrt.islands(proto))
        heavy = sum(node.op_type in ("Conv", "ConvTranspose") for node in proto.graph.node)
        assert len(compiled.convolutions) == heavy
        found[name] = Counter(compiled.convolutions.values())
    return found


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_networks_build(rtx: Any, tmp_path: Path, name: str, precision: str) -> None:
    model = in_precision(onnx.load_from_string(graph(name)), tmp_path / "model.onnx", precision)
    found = built(rtx, model, tmp_path, precision, CASES[name], [1, 4])
    # Quantised weights stay as they are.
    assert ("up_conv" in found) == (precision != "int8" and name in ("membranes", "instance norm"))
    for counts in found.values():
        assert_precision(counts, precision)
    assert not list(tmp_path.glob("*.plan"))


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_paper_in_full_width_builds(rtx: Any, tmp_path: Path, precision: str) -> None:
    from unet_rt.graph.passes.half import half

    model = onnx.load_from_string(graph("paper"))
    if precision == "int8":
        model = quantised(model)
    if precision != "fp32":
        half(model)
    onnx.save(model, str(tmp_path / "g.onnx"))
    compiled = compile_plan(rtx, tmp_path / "g.onnx", profiles_for(model, [(572, 572)], [16]))
    counts = Counter(compiled.convolutions.values())
    assert counts.total() == 23
    assert_precision(counts, precision)
    parameters = 31_030_658
    # Some kernels keep weights in two forms.
    assert parameters < len(compiled.plan) / {"fp32": 4, "fp16": 2, "int8": 1}[precision] < 2.5 * parameters


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "tile"), [("nuclei/weights.onnx", 512), ("strain/unet.onnx", 224)])
def test_networks_of_others_build(rtx: Any, tmp_path: Path, shared: Path, name: str, tile: int, precision: str) -> None:
    model = in_precision(onnx.load(str(shared / "models" / name)), tmp_path / "model.onnx", precision)
    found = built(rtx, model, tmp_path, precision, [(tile, tile)], [1])
    for counts in found.values():
        assert_precision(counts, precision)


def test_int8_is_not_made_of_a_graph_that_nobody_calibrated(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="computes in fp32, int8 was asked; calibrate it first"):
        tensorrt.graph_forms(shipped_model(), tmp_path / "other.onnx", "int8", plugins=False)


@pytest.mark.tensorrt
def test_what_the_builder_is_told(rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only shows on a GPU: TF32 is a precision that nobody asked for, and without details none can be read back."""
    seen = []

    class Builder(rtx.Builder):  # type: ignore[misc]  # the library has no types
        def create_builder_config(self) -> Any:
            seen.append(super().create_builder_config())
            return seen[-1]

    monkeypatch.setattr(rtx, "Builder", Builder)
    file = in_precision(onnx.load_from_string(graph("nuclei")), tmp_path / "g.onnx", "fp32")
    compile_plan(rtx, file, profiles_for(onnx.load(str(file)), [(64, 64)], [1, 2]))
    (config,) = seen
    assert config.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED
    assert not config.get_flag(rtx.BuilderFlag.TF32)
    assert config.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.max_aux_streams == 0
    assert config.num_optimization_profiles == 2


@pytest.mark.tensorrt
def test_half_precision_keeps_its_islands(rtx: Any, tmp_path: Path) -> None:
    from unet_rt.graph.passes.half import half

    proto = onnx.load_from_string(graph("nuclei"))
    first = next(node.name for node in proto.graph.node if node.op_type == "Conv")
    half(proto, islands=[first])
    onnx.save(proto, str(tmp_path / "model.onnx"))
    found = built(rtx, tmp_path / "model.onnx", tmp_path, "fp16", [(128, 128)], [1])
    assert found["native"] == {"fp16": 17, "fp32": 1}
    # The same graph without its record: nobody asked for a layer in FP32.
    with pytest.raises(BackendError, match=f"first: {re.escape(first)} in fp32"):
        check_network({first: "fp32", "b": "fp16"}, "fp16", frozenset())


@pytest.mark.tensorrt
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops")
def test_timings_are_shared_by_the_builds_of_a_process(
    rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per GPU. TensorRT-RTX, taken for TensorRT, times nothing, and hands the cache out and takes it all the same."""
    taken = []

    class Timings(dict[tuple[str, str, str], bytes]):
        def get(self, key: tuple[str, str, str], default: Any = None) -> Any:
            taken.append((key[2], super().get(key, default)))
            return taken[-1][1]

    timings = Timings()
    monkeypatch.setattr(tensorrt_build, "_TIMINGS", timings)
    monkeypatch.delattr(rtx, "ComputeCapability")
    profiles = profiles_for(onnx.load(str(shipped_model())), [(64, 64)], [1])
    for gpu in ("A", "B", "A"):
        compile_plan(rtx, shipped_model(), profiles, gpu=gpu)
    kept = {key[2]: blob for key, blob in timings.items()}
    assert sorted(kept) == ["A", "B"]
    assert all(len(blob) > 100 for blob in kept.values())
    assert taken == [("A", b""), ("B", b""), ("A", kept["A"])]


def one_node(operator: str, name: str, **attributes: Any) -> Any:
    """A network of a ReLU without a name and one node more, with weights ``w`` for those that take them."""
    helper = onnx.helper
    weights = attributes.pop("weights", None)
    initializers = [] if weights is None else [onnx.numpy_helper.from_array(weights, "w")]
    inputs = ["r", *(tensor.name for tensor in initializers)]
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node(operator, inputs, ["y"], name=name, **attributes)]
    shapes = [helper.make_tensor_value_info("x", 1, ["n", 1, "h", "w"])], [helper.make_tensor_value_info("y", 1, None)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("some.vendor", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", *shapes, initializers), opset_imports=opsets, ir_version=8)


REFUSED = {
    "unknown": (
        one_node("Unheard", "/pool/the culprit", domain="some.vendor"),
        r"cannot parse g\.onnx at node /pool/the culprit \(Unheard\): invalid node, .*Plugin not found",
        "with another opset",
    ),
    "unsupported, without a name": (
        one_node("Det", ""),
        r"cannot parse g\.onnx at node number 1 \(Det\): unsupported node, ",
        "without this operator",
    ),
    "unsupported attribute": (
        one_node("MaxPool", "/pool", kernel_shape=[2, 2], dilations=[2, 2]),
        r"cannot parse g\.onnx at node /pool \(MaxPool\): unsupported node, .*dilations",
        "without this operator",
    ),
    "two types": (
        one_node("Conv", "/conv", weights=np.ones((1, 1, 3, 3), np.float16)),
        r"cannot parse g\.onnx at node /conv \(Conv\): invalid node, .*`input` type is Float but `kernel` is of type Half",
        "--backend onnxruntime",
    ),
    "channels": (
        one_node("Conv", "/conv", weights=np.ones((1, 2, 3, 3), np.float32)),
        r"cannot parse g\.onnx at node /conv \(Conv\): invalid node, .*Kernel weight dimension",
        "--backend onnxruntime",
    ),
    "four spatial axes": (
        one_node("Conv", "/conv", weights=np.ones((1, 1, 3, 3, 3, 3), np.float32)),
        r"cannot parse g\.onnx at node /conv \(Conv\): unsupported node, .*number of kernel dimensions = 6",
        "without this operator",
    ),
    "larger than the tile": (
        one_node("Conv", "/conv", weights=np.ones((1, 1, 99, 99), np.float32)),
        r"cannot build g\.onnx for 64x64 px at batch 1 at node /conv: .*image size is smaller than filter size",
        "; ",
    ),
}


@pytest.mark.tensorrt
@pytest.mark.parametrize("case", REFUSED)
def test_what_parser_and_builder_refuse_is_said_with_the_node(rtx: Any, tmp_path: Path, case: str) -> None:
    model, message, way_out = REFUSED[case]
    onnx.save(model, str(tmp_path / "g.onnx"))
    with pytest.raises(BackendError, match=message) as raised:
        compile_plan(rtx, tmp_path / "g.onnx", profiles_for(model, [(64, 64)], [1]))
    assert way_out in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.tensorrt
def test_a_file_that_is_no_graph_is_said(rtx: Any, tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"cannot parse g\.onnx: model deserialize failed, .*; use --backend"):
        compile_plan(rtx, tmp_path / "g.onnx", [])


@pytest.mark.tensorrt
def test_a_tile_that_leaves_nothing_is_said(rtx: Any, tmp_path: Path) -> None:
    model = onnx.load_from_string(graph("membranes"))
    onnx.save(model, str(tmp_path / "g.onnx"))
    # 100 px leave nothing of a valid network of depth 4.
    with pytest.raises(BackendError, match=r"cannot build g\.onnx for 100x100 px at batch 1"):
        compile_plan(rtx, tmp_path / "g.onnx", profiles_for(model, [(100, 100)], [1]))


class Session:
    """What ``build`` asks of the sessions of its plans, and an engine of its own, without running them."""

    precision, version = "int8", "tensorrt_rtx 1.7"

    def __init__(self, trt: Any, header: PlanHeader, plan: bytes, *rest: Any) -> None:
        self.header, self.plan = header, plan

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def inspect(self) -> str:
        return '{"Layers": []}'

    def kernels(self) -> bytes:
        return b"kernels"

    def close(self) -> None:
        return None

    def run(self, inputs: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return [2 * x for x in inputs]


@pytest.fixture
def opened(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """``build`` on a GPU that is not there: plans are real, and take these milliseconds per form of the graph."""
    times = {"native": 2.0, "up_conv": 1.0}
    device = FakeDevice()
    device.compute_capability = (9, 0)  # not listed by the library, so that it does not ask the driver for the GPU
    monkeypatch.setattr(tensorrt, "_open", lambda name: (rtx, device))
    monkeypatch.setattr(tensorrt, "TensorRtSession", Session)
    monkeypatch.setattr(tensorrt, "_measured_ms", lambda session: times[session.header.variant])
    return times


@pytest.mark.tensorrt
@pytest.mark.parametrize("fastest", ["native", "up_conv"])
def test_the_fastest_form_becomes_the_plan(opened: dict[str, float], tmp_path: Path, fastest: str) -> None:
    opened[fastest] = 0.5
    model, built = tmp_path / "model.onnx", tmp_path / "built"
    model.write_bytes(graph("paper_w8"))
    built.mkdir()
    tensorrt.build(
        model, built / "g.onnx", precision="fp16", device="cuda:0", blob=built / "p", tiles=[(188, 188)], batches=[1, 2]
    )
    header, plan, compiled = read_plan(built / "p")
    assert (header.variant, header.measured_ms) == (fastest, opened)
    assert [p.batch for p in header.profiles] == [2, 1]
    assert (header.precision, dict(header.layers), compiled) == ("fp16", {"unread": 23}, b"kernels")
    assert (header.inputs, len(header.outputs)) == (("x0",), 1)
    assert (header.origin.library, header.origin.gpu) == ("tensorrt_rtx", "Fake GPU")
    assert len(plan) > 1e6
    kinds = Counter(node.op_type for node in onnx.load(str(built / "g.onnx")).graph.node)
    assert (kinds["DepthToSpace"], kinds["ConvTranspose"]) == ((4, 0) if fastest == "up_conv" else (0, 4))
    assert sorted(path.name for path in built.iterdir()) == ["g.onnx", "p"]
    assert model.read_bytes() == graph("paper_w8")


@pytest.mark.tensorrt
def test_the_graph_of_a_plan_with_our_kernel_is_stored_without_it(
    opened: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that is stale elsewhere is made again there from this graph, by a library that may have no plugins."""
    real, seen = tensorrt_build.compile_plan, {}

    def compile_plan(trt: Any, file: Path, *rest: Any, **more: Any) -> Any:
        kinds = Counter(node.op_type for node in onnx.load(str(file)).graph.node)
        seen[file.name] = kinds[OPERATOR]
        if kinds[OPERATOR]:  # TensorRT-RTX ends the process where it meets a plugin's node
            return CompiledPlan(b"plan with our kernel", {"/conv": "fp16"}, ("x",), ("y",))
        return real(trt, file, *rest, **more)

    opened["crop_concat"] = 0.1
    monkeypatch.setattr(tensorrt, "compile_plan", compile_plan)
    monkeypatch.setattr(crop_concat_plugin, "register", lambda trt: True)
    tensorrt.build(
        shipped_model("membranes"), tmp_path / "g.onnx", precision="fp16", device="cuda:0", blob=tmp_path / "p",
        tiles=[(188, 188)], batches=[1],
    )  # fmt: skip
    header, plan, _ = read_plan(tmp_path / "p")
    assert (header.variant, plan) == ("crop_concat", b"plan with our kernel")
    assert seen == {"g.onnx": 0, "g.up_conv.onnx": 0, "g.crop_concat.onnx": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.onnx", "p"]
    forms = tensorrt.graph_forms(tmp_path / "g.onnx", tmp_path / "again.onnx", "fp16", plugins=False)
    for file in forms.values():
        assert {node.domain for node in onnx.load(str(file)).graph.node} <= {"", "ai.onnx"}


@pytest.mark.tensorrt
def test_a_plan_holds_two_tiles(opened: dict[str, float], tmp_path: Path) -> None:
    """As ``unet_rt.build`` asks for them; rows of every profile were run."""
    tensorrt.build(
        DATA / "nuclei.onnx", tmp_path / "g.onnx", precision="fp16", device="cuda:0", blob=tmp_path / "p",
        tiles=[(128, 128), (64, 64)], batches=[1, 4],
    )  # fmt: skip
    header, _, _ = read_plan(tmp_path / "p")
    assert [(p.tile, p.batch) for p in header.profiles] == [((n, n), batch) for n in (128, 64) for batch in (4, 1)]
    assert header.profile_of([(4, 1, 64, 64)]) == 2


@pytest.mark.tensorrt
def test_a_form_that_fails_is_left_out(
    opened: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tensorrt_build.compile_plan

    def compile_plan(trt: Any, file: Path, *rest: Any, **more: Any) -> Any:
        if broken in file.name:
            raise BackendError(f"no kernel for {file.name}")
        return real(trt, file, *rest, **more)

    monkeypatch.setattr(tensorrt, "compile_plan", compile_plan)
    (tmp_path / "model.onnx").write_bytes(graph("paper_w8"))

    def build() -> None:
        tensorrt.build(
            tmp_path / "model.onnx", tmp_path / "g.onnx", precision="fp32", device="cuda:0", blob=tmp_path / "p",
            tiles=[(188, 188)], batches=[1],
        )  # fmt: skip

    broken = "up_conv"
    build()
    assert read_plan(tmp_path / "p")[0].variant == "native"
    broken = "g."
    with pytest.raises(BackendError, match=r"no kernel for g\.onnx"):
        build()


@pytest.mark.tensorrt
def test_rows_that_disagree_are_no_engine(
    opened: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Session, "run", lambda self, inputs: [x + np.arange(len(x))[:, None, None, None] for x in inputs]
    )
    with pytest.raises(BackendError, match="128x128 px at batch 2: identical rows give answers that differ"):
        tensorrt.build(
            DATA / "nuclei.onnx", tmp_path / "g.onnx", precision="fp32", device="cuda:0", blob=tmp_path / "p",
            tiles=[(128, 128)], batches=[1, 2],
        )  # fmt: skip
    assert not (tmp_path / "p").exists()


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("network", "engine", "said"),
    [
        ("fp32", "Half", "fp16 was asked, and 1 of 1 convolutions would run in another precision"),
        ("fp16", "Float", "fp16 was asked, and the engine runs 1 of 1 convolutions in another precision"),
    ],
)
def test_another_precision_than_the_one_asked_is_no_engine(
    opened: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, engine: str, said: str
) -> None:
    """Read from the parsed network, and from what the built engine tells of itself."""
    compiled = CompiledPlan(b"plan", {"/conv": network}, ("x",), ("y",))
    tensor = {"Name": "t", "Format/Datatype": engine}
    told = {"Layers": [{"Name": "/conv", "Inputs": [tensor], "Outputs": [tensor]}]}
    monkeypatch.setattr(tensorrt, "compile_plan", lambda *given, **more: compiled)
    monkeypatch.setattr(Session, "inspect", lambda self: json.dumps(told))
    with pytest.raises(BackendError, match=said):
        tensorrt.build(
            shipped_model(), tmp_path / "g.onnx", precision="fp16", device="cuda:0", blob=tmp_path / "p",
            tiles=[(64, 64)], batches=[1],
        )  # fmt: skip
    assert not (tmp_path / "p").exists()


@pytest.mark.tensorrt
@pytest.mark.onnxruntime
def test_a_stale_int8_plan_is_made_again_from_its_quantised_graph(
    opened: dict[str, float],
    engine_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its ranges are in no other file. What comes of it sits the exam before it is used."""
    from unet_rt.building.calibration import calibrate
    from unet_rt.graph.passes.half import half
    from unet_rt.graph.passes.qdq import prepare_graph, quantise, tensors_to_probe

    folder, graph, plan, parity = read_folder(engine_folder), tmp_path / "g", tmp_path / "p", tmp_path / "parity"
    exam_tiles = (folder.exam() or {})["input"]
    prepared = prepare_graph(onnx.load(str(folder.file("model"))))
    found = calibrate(prepared, tensors_to_probe(prepared), [[tile[None]] for tile in exam_tiles])
    model = quantise(prepared, next(iter(found.ranges.values())), "tensorrt", means=found.means).model
    half(model)
    onnx.save(model, str(graph))
    origin = Origin("tensorrt_rtx", "1.0", "Another GPU", "8.9", "12.8")
    write_plan(plan, PlanHeader(origin, "int8", (), ("x",), ("y",)), b"plan")
    record: dict[str, Any] = {**(folder.parity or {}), "graph_sha256": sha256(graph)}
    record["budget"] = {**record["budget"], "label_change": 0.01, "dice": 0.95}
    parity.write_text(json.dumps(record))
    spec = replace(folder.spec, backend="tensorrt", precision="int8", device="cuda:0", batches=(1, 2))
    kept: dict[Any, Path] = {kind: folder.file(kind) for kind in ("model", "exam")}
    stale = write_folder(tmp_path / "stale.urt", spec, {**kept, "graph": graph, "engine": plan, "parity": parity})

    import onnxruntime

    cpu = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    def run(self: Session, inputs: list[np.ndarray[Any, Any]]) -> list[Any]:
        return list(cpu.run(None, {cpu.get_inputs()[0].name: inputs[0].astype(np.float16)}))

    real_compile, real_sit, layers, sat = tensorrt_build.compile_plan, exam.sit, list[Counter[str]](), list[int]()

    def compile_plan(*given: Any, **more: Any) -> Any:
        made = real_compile(*given, **more)
        layers.append(Counter(made.convolutions.values()))
        return made

    monkeypatch.setattr(Session, "run", run)
    monkeypatch.setattr(tensorrt, "compile_plan", compile_plan)
    monkeypatch.setattr(exam, "sit", lambda *given: sat.append(1) or real_sit(*given))
    with unet_rt.load(stale.path) as engine:
        assert engine.spec.precision == "int8"
    assert_precision(layers[-1], "int8")
    assert sat == [1]
    (line,) = (entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING")
    assert "belongs to tensorrt_rtx version 1.0, here" in line
    assert "GPU Another GPU, here Fake GPU" in line
    assert "it is made again from its graph" in line
    monkeypatch.setattr(Session, "run", lambda self, inputs: [np.roll(y, 40, axis=-1) for y in run(self, inputs)])
    with pytest.raises(ParityError, match="fails its exam on this machine"):
        unet_rt.load(stale.path)


# --- crop and concatenation -------------------------------------------------------------------------------------------


class CropConcat(OpRun):
    """The node of ours for ONNX's reference evaluator, on the kernel that engines on a CPU would use."""

    op_domain = DOMAIN

    def _run(self, skip: Any, up: Any, **attributes: Any) -> tuple[Any]:
        assert attributes == {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
        out = np.empty((len(up), skip.shape[1] + up.shape[1], *up.shape[2:]), up.dtype)
        kernels.crop_concat(skip, up, out)
        return (out,)


def test_crops_and_concatenations_become_one_node() -> None:
    given = onnx.load_from_string(graph("paper_w8"))
    model = onnx.load_from_string(graph("paper_w8"))
    assert (crop_concat(model), crop_concat(model)) == (4, 0)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert (kinds[OPERATOR], kinds["Slice"], kinds["Concat"]) == (4, 0, 0)
    x = networks.texture((1, 1, 204, 188))
    (wanted,) = ReferenceEvaluator(given).run(None, {"x0": x})
    (found,) = ReferenceEvaluator(model, new_ops=[CropConcat]).run(None, {"x0": x})
    assert np.array_equal(wanted, found)


def sliced(starts: list[int], ends: list[int], axes: list[int], steps: list[int], size: Any = "h") -> Any:
    helper = onnx.helper
    constants = {"s": starts, "e": ends, "a": axes, "t": steps}
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Relu", ["x"], ["skip"]),
                helper.make_node("Slice", ["skip", *constants], ["cut"]),
                helper.make_node("Relu", ["u"], ["up"]),
                helper.make_node("Concat", ["cut", "up"], ["y"], axis=1),
            ],
            "g",
            [
                helper.make_tensor_value_info("x", 1, [1, 2, size, size]),
                helper.make_tensor_value_info("u", 1, [1, 3, "a", "b"]),
            ],
            [helper.make_tensor_value_info("y", 1, [1, 5, None, None])],
            [onnx.numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items()],
        )
    )


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps", "size", "rewritten"),
    [
        ([4, 4], [-4, -4], [2, 3], [1, 1], "h", 1),
        ([4, 4], [-5, -4], [2, 3], [1, 1], "h", 1),  # an odd difference: the centre is rounded down
        ([4, 0], [-4, 2**63 - 1], [2, 3], [1, 1], "h", 1),
        ([4, 4], [-4, -4], [-2, -1], [1, 1], "h", 1),
        ([4, 4], [28, 27], [2, 3], [1, 1], 32, 1),
        ([4, 4], [28, 28], [2, 3], [1, 1], "h", 0),  # how much that leaves out depends on the tile
        ([5, 4], [-4, -4], [2, 3], [1, 1], "h", 0),
        ([4, 4], [-6, -4], [2, 3], [1, 1], "h", 0),
        ([4, 4], [-4, -4], [2, 3], [1, 2], "h", 0),
        ([1, 4], [-1, -4], [1, 3], [1, 1], "h", 0),
        ([0, 0], [2**63 - 1, 2**63 - 1], [2, 3], [1, 1], "h", 0),
    ],
)
def test_only_centre_crops_are_rewritten(
    starts: list[int], ends: list[int], axes: list[int], steps: list[int], size: Any, rewritten: int
) -> None:
    model = sliced(starts, ends, axes, steps, size)
    before = model.SerializeToString()
    assert crop_concat(model) == rewritten
    if not rewritten:
        assert model.SerializeToString() == before
    else:
        x = np.abs(networks.texture((1, 2, 32, 32)))
        window = [slice(None)] * 4
        for start, end, axis in zip(starts, ends, axes, strict=True):
            window[axis] = slice(start, end)
        cut = x[tuple(window)]
        u = np.abs(networks.texture((1, 3, *cut.shape[2:])))
        (found,) = ReferenceEvaluator(model, new_ops=[CropConcat]).run(None, {"x": x, "u": u})
        assert np.array_equal(found, np.concatenate([cut, u], axis=1))


# --- names ------------------------------------------------------------------------------------------------------------

# What is used of objects whose class the source does not spell.
USED = {
    "BuilderFlag": "TF32",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network max_threads",
    "INetworkDefinition": "num_layers get_layer num_inputs get_input num_outputs get_output",
    "ILayer": "type name metadata num_inputs get_input get_output",
    "ITensor": "name dtype shape",
    "IBuilderConfig": "profiling_verbosity clear_flag set_flag max_aux_streams add_optimization_profile create_timing_cache "
    "set_timing_cache",
    "IOptimizationProfile": "set_shape",
    "ITimingCache": "serialize",
    "OnnxParser": "parse_from_file num_errors get_error",
    "ParserError": "code node node_name node_operator desc",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_dtype "
    "get_device_memory_size_for_profile_v2 create_execution_context create_engine_inspector",
    "IExecutionContext": "set_optimization_profile_async set_input_shape set_device_memory get_tensor_shape "
    "set_tensor_address execute_async_v3",
    "EngineInspector": "get_engine_information",
}
RTX_ALONE = {
    "ComputeCapability": "CURRENT SM75 SM120",
    "BuilderFlag": "REQUIRE_USER_ALLOCATION",
    "IBuilderConfig": "num_compute_capabilities set_compute_capability",
    "Runtime": "get_engine_validity",
    "EngineValidity": "INVALID",
    "EngineInvalidityDiagnostics": "UNSUPPORTED_CC VERSION_MISMATCH OLD_CUDA_DRIVER OLD_CUDA_RUNTIME "
    "INSUFFICIENT_GPU_MEMORY MALFORMED_ENGINE CUDA_ERROR",
    "ICudaEngine": "create_runtime_config",
    "IRuntimeConfig": "cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy create_runtime_cache "
    "set_runtime_cache set_execution_context_allocation_strategy",
    "CudaGraphStrategy": "DISABLED",
    "DynamicShapesKernelSpecializationStrategy": "EAGER",
    "IRuntimeCache": "serialize deserialize",
    "IExecutionContext": "is_stream_capturable",
}
TENSORRT_ALONE = {
    "QuickPluginCreationRequest": "PREFER_AOT",
    "NetworkDefinitionCreationFlag": "PREFER_AOT_PYTHON_PLUGINS",
    "plugin": "register autotune aot_impl from_shape_expr cdiv TensorDesc AutoTuneCombination KernelLaunchParams "
    "SymIntExprs SymInt32",
    "plugin.TensorDesc": "shape_expr dtype",
}
TABLES = (USED, RTX_ALONE, TENSORRT_ALONE)
# Of objects that only exist when the plugin is compiled, which a test below does.
OF_INSTANCES = {"grid_x", "block_x"}


def listed(table: dict[str, str]) -> list[str]:
    return [f"{kind}.{name}" for kind, names in table.items() for name in names.split()]


def spelled() -> list[str]:
    """Names of the library that the source spells as ``trt.Name``."""
    text = "\n".join(source.read_text() for source in SOURCES)
    found = set(re.findall(r"\b_?trt\.([A-Z]\w*(?:\.[A-Z_]\w*)*)", text))
    alone = set(RTX_ALONE) - set(USED)
    return sorted(name for name in found if name.split(".")[0] not in alone and name not in listed(RTX_ALONE))


def test_the_tables_name_what_the_source_uses() -> None:
    text = "\n".join(source.read_text() for source in SOURCES)
    names = {name.rpartition(".")[2] for table in TABLES for name in listed(table)}
    names -= {"SM75", "SM120", "PREFER_AOT"}  # by a number; told apart by the class alone
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]
    assert len(spelled()) > 10


def attributes(tree: ast.AST) -> set[str]:
    """Names asked of objects, after a dot or in ``hasattr`` and ``getattr``; not those asked of imported modules."""
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name) if ast.unparse(value).partition(".")[0] not in imported:
                found.add(name)
            case ast.Call(func=ast.Name(id="hasattr" | "getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                found.add(name)
    return {name for name in found if not name.startswith("__")}


def definitions(tree: ast.AST) -> set[str]:
    """What the classes of a module have."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def test_whatever_the_source_asks_of_the_library_is_in_the_tables() -> None:
    """And so is looked up in the real libraries below: what nobody else's objects have is the library's."""
    ours = [
        *SOURCES,
        *(PACKAGE / "kernels").glob("*.py"),
        *(PACKAGE / "system").glob("*.py"),
        PACKAGE / "backends" / "session.py",
    ]
    known = {name for source in ours for name in definitions(ast.parse(source.read_text()))}
    plain = (str, bytes, list, dict, set, Counter, OrderedDict, deque, Path, OSError, io.BufferedRandom, logging.Logger)
    arrays = (np, np.ndarray, np.dtype, re.Pattern, re.Match, ModuleType, type)
    known |= {name for kind in (*plain, *arrays, onnx.ModelProto) for name in dir(kind)}
    protos = (kind for kind in onnx.onnx_ml_pb2.DESCRIPTOR.message_types_by_name.values())
    known |= {name for kind in protos for part in (kind, *kind.nested_types) for name in part.fields_by_name}
    known |= {"cuStreamIsCapturing"}  # of the driver
    asked = {name for source in SOURCES for name in attributes(ast.parse(source.read_text()))}
    told = {part for table in TABLES for name in (*listed(table), *spelled()) for part in name.split(".")}
    assert sorted(asked - known - told - OF_INSTANCES) == []
    assert {"set_tensor_address", "get_engine_validity", "aot_impl"} <= asked - known  # it sees them


@pytest.mark.tensorrt
def test_every_name_exists_in_tensorrt_rtx(rtx: Any) -> None:
    from tensorrt_stub import resolves

    wanted = [*spelled(), *listed(USED), *listed(RTX_ALONE)]
    assert not [name for name in wanted if not resolves(rtx, name)]
    # The way to tell the two libraries apart.
    assert not hasattr(rtx, "QuickPluginCreationRequest")


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the real bindings say, in a process of their own: their libraries hold nothing."""
    absent = pytest.fail if "tensorrt" in os.environ.get("UNET_RT_REQUIRE", "") else pytest.skip
    if importlib.util.find_spec("tensorrt_bindings") is None:
        absent("tensorrt-cu13-bindings is not installed")
    if shutil.which("cc") is None:
        absent("there is no C compiler for the libraries that the bindings need to load")

    def ask(names: list[str], dtype: str = "float16") -> Any:
        script = Path(__file__).parents[1] / "helpers" / "tensorrt_stub.py"
        command = [sys.executable, str(script), str(tmp_path_factory.mktemp("stub")), dtype, json.dumps(names)]
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return ask


def test_every_name_exists_in_tensorrt(bindings: Any) -> None:
    wanted = [*spelled(), *listed(USED), *listed(TENSORRT_ALONE)]
    told = bindings(
        [*wanted, "ComputeCapability", "DynamicShapesKernelSpecializationStrategy", "Runtime.get_engine_validity"]
    )
    # The last three are how TensorRT-RTX is told apart.
    assert told["unknown"] == [
        "ComputeCapability",
        "DynamicShapesKernelSpecializationStrategy",
        "Runtime.get_engine_validity",
    ]
    assert told["version"] == importlib.metadata.version("tensorrt-cu13-bindings")


@pytest.mark.parametrize(("dtype", "kernel", "vector"), [("float16", "f16", 8), ("float32", "f32", 4)])
def test_the_plugin_registers_and_launches_what_the_kernel_expects(
    bindings: Any, dtype: str, kernel: str, vector: int
) -> None:
    told = bindings([], dtype)
    assert told["creators"] == [["CropConcat", "1", "unet_rt"]]
    # skip 2 x 3 x 100 x 91 and up 2 x 5 x 61 x 52
    assert told["shape"] == [2, 8, 61, 52]
    assert told["dtype"] == {"float16": "HALF", "float32": "FLOAT"}[dtype]
    assert told["kernel"] == f"unet_rt_crop_concat_{kernel}"
    assert (told["sizes"], told["sizes_are"]) == ([2, 3, 100, 91, 5, 61, 52], ["SymInt32"])
    items = 2 * 8 * 61 * -(-(52 + vector - 1) // vector)
    assert told["grid"] == [-(-items // 256), 1, 256]
    assert told["outputs"] == 1
    assert told["types"] == [["FLOAT"] * 3, ["HALF"] * 3]


def test_the_ptx_takes_what_the_plugin_passes() -> None:
    if not crop_concat_plugin.PTX.is_file():
        pytest.skip("this installation was built without nvcc: it has no PTX")
    entries = re.findall(r"\.entry (\w+)\((.*?)\)", crop_concat_plugin.PTX.read_text(), re.DOTALL)
    found = {name: re.findall(r"\.param \.(\w+)", parameters) for name, parameters in entries}
    # Inputs, then the integers, then the output.
    assert found == {name: ["u64"] * 2 + ["u32"] * 7 + ["u64"] for name, _ in crop_concat_plugin._KERNELS.values()}


def test_tensorrt_rtx_gets_no_plugin() -> None:
    rtx: Any = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7")
    assert crop_concat_plugin.missing(rtx) == "TensorRT-RTX has no plugins"
    assert not crop_concat_plugin.register(rtx)
