"""Graphs on a real builder, TensorRT-RTX, which needs no GPU; and every name of the library that is used exists."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import FakeDevice

import unet_rt
from unet_rt.backends import crop_concat_plugin, tensorrt
from unet_rt.backends.tensorrt_build import compile_plan, profiles_for
from unet_rt.backends.tensorrt_inspect import check_network
from unet_rt.backends.tensorrt_plan import PlanHeader, read_plan
from unet_rt.errors import BackendError, TileError

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

import networks  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

from unet_rt import kernels  # noqa: E402
from unet_rt.models import FCN8s, UNet, load_half  # noqa: E402
from unet_rt.passes.crop_concat import DOMAIN, OPERATOR, crop_concat  # noqa: E402

PACKAGE = Path(unet_rt.__file__).parent
DATA = PACKAGE / "data"
SOURCES = [*sorted((PACKAGE / "backends").glob("tensorrt*.py")), PACKAGE / "backends" / "crop_concat_plugin.py"]

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
    if name == "nuclei":
        return (DATA / "nuclei.onnx").read_bytes()
    made: dict[str, Any] = {
        "paper_w8": lambda: load_half(DATA / "paper_w8.npz"),
        "paper": lambda: UNet(width=64),
        "fcn8s": lambda: networks.initialise(FCN8s(width=8)),
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
    "paper_w8": [(284, 284)],
    "fcn8s": [(128, 128)],
    "3-D": [(16, 32, 32)],
    "bilinear": [(96, 64)],
    "instance norm": [(96, 96)],
    "shuffle": [(96, 96)],
}


def built(trt: Any, model: Path, folder: Path, precision: str, tiles: Any, batches: Any) -> dict[str, Counter[str]]:
    """Convolutions per precision for every form of the graph; raises what ``build`` would."""
    found = {}
    for name, file in tensorrt.graph_forms(model, folder / "graph.onnx", precision, plugins=False):
        proto = onnx.load(str(file))
        compiled = compile_plan(trt, file, profiles_for(proto, tiles, batches))
        assert len(compiled.plan) > 10_000
        check_network(compiled.convolutions, precision, tensorrt.islands(proto))
        heavy = sum(node.op_type in ("Conv", "ConvTranspose") for node in proto.graph.node)
        assert len(compiled.convolutions) == heavy
        found[name] = Counter(compiled.convolutions.values())
    return found


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_networks_build(rtx: Any, tmp_path: Path, name: str, precision: str) -> None:
    (tmp_path / "model.onnx").write_bytes(graph(name))
    found = built(rtx, tmp_path / "model.onnx", tmp_path, precision, CASES[name], [1, 4])
    assert ("up_conv" in found) == (name in ("paper_w8", "instance norm"))
    for counts in found.values():
        assert set(counts) == {precision}
    assert not list(tmp_path.glob("*.plan"))


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", ["nuclei", "paper_w8", "fcn8s"])
def test_int8_networks_build(rtx: Any, tmp_path: Path, name: str) -> None:
    from unet_rt.calibration import Range
    from unet_rt.passes.qdq import prepare, probed, quantise

    prepared = prepare(onnx.load_from_string(graph(name)))
    ranges = {tensor: Range(-3.0, 5.0) for tensor in probed(prepared)}  # building looks at no pixel
    quantised = quantise(prepared, ranges, "tensorrt").model
    onnx.save(quantised, str(tmp_path / "model.onnx"))
    found = built(rtx, tmp_path / "model.onnx", tmp_path, "int8", CASES[name][:1], [1, 4])
    (counts,) = found.values()
    assert counts["int8"] >= 0.7 * counts.total()
    assert not counts["fp32"], "what is not quantised is FP16"
    with pytest.raises(BackendError, match="computes in fp32, int8 was asked; calibrate it first"):
        tensorrt.graph_forms(DATA / "nuclei.onnx", tmp_path / "other.onnx", "int8", plugins=False)


@pytest.mark.tensorrt
def test_the_paper_in_full_width_builds(rtx: Any, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(graph("paper"))
    compiled = compile_plan(
        rtx, tmp_path / "model.onnx", profiles_for(onnx.load_from_string(graph("paper")), [(572, 572)], [16])
    )
    assert Counter(compiled.convolutions.values()) == {"fp32": 23}
    assert len(compiled.plan) > 120e6


@pytest.mark.tensorrt
@pytest.mark.parametrize(("name", "tile"), [("nuclei/weights.onnx", 512), ("strain/unet.onnx", 224)])
def test_networks_of_others_build(rtx: Any, tmp_path: Path, shared: Path, name: str, tile: int) -> None:
    for precision in ("fp32", "fp16"):
        found = built(rtx, shared / "models" / name, tmp_path, precision, [(tile, tile)], [1])
        assert all(set(counts) == {precision} for counts in found.values())


@pytest.mark.tensorrt
def test_half_precision_keeps_its_islands(rtx: Any, tmp_path: Path) -> None:
    from unet_rt.passes.half import half

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
def test_a_node_that_the_parser_refuses_is_named(rtx: Any, tmp_path: Path) -> None:
    proto = onnx.load_from_string(graph("nuclei"))
    node = next(node for node in proto.graph.node if node.op_type == "MaxPool")
    node.op_type, node.domain, node.name = "Unheard", "some.vendor", "/pool/the culprit"
    onnx.save(proto, str(tmp_path / "g.onnx"))
    with pytest.raises(
        BackendError, match=r"cannot parse g.onnx at node /pool/the culprit \(Unheard\): .*; use --backend"
    ):
        compile_plan(rtx, tmp_path / "g.onnx", profiles_for(proto, [(64, 64)], [1]))


@pytest.mark.tensorrt
def test_what_the_builder_refuses_is_said(rtx: Any, tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(graph("paper_w8"))
    # 100 px leave nothing of a valid network of depth 4.
    profiles = profiles_for(onnx.load_from_string(graph("paper_w8")), [(100, 100)], [1])
    with pytest.raises((BackendError, TileError), match=r"g\.onnx"):
        compile_plan(rtx, tmp_path / "g.onnx", profiles)


class Session:
    """What ``build`` asks of the sessions of its plans, without running them."""

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
    real = tensorrt.compile_plan

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
    "ParserError": "node_name node_operator desc",
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
    "EngineInvalidityDiagnostics": "UNSUPPORTED_CC VERSION_MISMATCH INSUFFICIENT_GPU_MEMORY",
    "IRuntimeConfig": "cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy create_runtime_cache "
    "set_runtime_cache",
    "CudaGraphStrategy": "DISABLED",
    "DynamicShapesKernelSpecializationStrategy": "EAGER",
    "IRuntimeCache": "serialize deserialize",
    "IExecutionContext": "is_stream_capturable",
}
TENSORRT_ALONE = {
    "QuickPluginCreationRequest": "PREFER_AOT",
    "NetworkDefinitionCreationFlag": "PREFER_AOT_PYTHON_PLUGINS",
}


def listed(table: dict[str, str]) -> list[str]:
    return [f"{kind}.{name}" for kind, names in table.items() for name in names.split()]


def spelled() -> list[str]:
    """Names of the library that the source spells as ``trt.Name``."""
    text = "\n".join(source.read_text() for source in SOURCES)
    found = set(re.findall(r"\btrt\.([A-Z]\w*(?:\.[A-Z_]\w*)*)", text))
    alone = set(RTX_ALONE) - set(USED)
    return sorted(name for name in found if name.split(".")[0] not in alone and name not in listed(RTX_ALONE))


def test_the_tables_name_what_the_source_uses() -> None:
    text = "\n".join(source.read_text() for source in SOURCES)
    names = {name.split(".")[1] for table in (USED, RTX_ALONE) for name in listed(table)}
    names -= {"SM75", "SM120", "UNSUPPORTED_CC", "VERSION_MISMATCH"}  # by a number, and from the library's own list
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]
    assert len(spelled()) > 10


@pytest.mark.tensorrt
def test_every_name_exists_in_tensorrt_rtx(rtx: Any) -> None:
    from tensorrt_stub import resolves

    wanted = [*spelled(), *listed(USED), *listed(RTX_ALONE)]
    assert not [name for name in wanted if not resolves(rtx, name)]
    # The way to tell the two libraries apart.
    assert not hasattr(rtx, "QuickPluginCreationRequest")
    config = rtx.IRuntimeConfig
    assert hasattr(config, "set_execution_context_allocation_strategy")
    assert hasattr(rtx.ICudaEngine, "create_runtime_config")


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the real bindings say, in a process of their own: their libraries hold nothing."""
    absent = pytest.fail if "tensorrt" in os.environ.get("UNET_RT_REQUIRE", "") else pytest.skip
    if importlib.util.find_spec("tensorrt_bindings") is None:
        absent("tensorrt-cu13-bindings is not installed")
    if shutil.which("cc") is None:
        absent("there is no C compiler for the libraries that the bindings need to load")

    def ask(names: list[str], dtype: str = "float16") -> Any:
        script = Path(__file__).with_name("tensorrt_stub.py")
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
