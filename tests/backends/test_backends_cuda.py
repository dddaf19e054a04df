"""ONNX Runtime on a GPU: the real one where there is one, and its bookkeeping over host memory everywhere.

Without a GPU the provider is ONNX Runtime's CPU provider behind a thin mask, "device" memory is the host's, and a stream
does everything at once: bindings, shapes, staging, settings and the trial are the real code.
"""

from __future__ import annotations

import contextlib
import json
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from unet_rt.backends.onnxruntime import backend as onnxruntime
from unet_rt.backends.onnxruntime import cuda as onnxruntime_cuda
from unet_rt.backends.onnxruntime import library as onnxruntime_library
from unet_rt.backends.onnxruntime import provider as onnxruntime_provider
from unet_rt.backends.onnxruntime import trial
from unet_rt.backends.onnxruntime.cuda import CudaSession
from unet_rt.backends.onnxruntime.settings import CudaOptions, GraphPort, Settings, read_settings
from unet_rt.backends.session import on_device
from unet_rt.cli.demo import shipped_model
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import BackendError, DeviceMemoryError
from unet_rt.graph.passes.half import half
from unet_rt.kernels import device as gpu
from unet_rt.kernels.memory import DeviceArray
from unet_rt.system import facts as machine

pytestmark = pytest.mark.onnxruntime

Array = np.ndarray
Built = tuple[str, Path, Any]  # precision, graph, settings
U = {"fp32": 2.0**-23, "fp16": 2.0**-11}
LAYERS = 18  # of the shipped network


def pixels(count: int, side: int) -> Array:
    """(count, 1, side, side) float32: drawn micrographs, zero mean, unit deviation, all different."""
    found = []
    for k in range(count):
        picture = microscopy((side, side), seed=40 + k).image.astype(np.float32)
        found.append((picture - picture.mean()) / picture.std())
    return np.stack(found)[:, None]


@pytest.fixture(scope="module")
def baseline() -> Iterator[Any]:
    with onnxruntime.load(shipped_model(), precision="fp32", threads=1) as session:
        yield session


def assert_close(found: Array, wanted: Array, precision: str) -> None:
    """Independent roundings of every layer; FP32 sums of 144 products, in another order, have a few more.

    TF32 in place of FP32 would be far outside: its unit is that of float16.
    """
    error = found.astype(np.float64) - wanted
    u = U[precision] * (np.sqrt(144) if precision == "fp32" else 1)
    assert np.isfinite(found).all()
    assert np.sqrt(np.mean(error**2)) <= 2 * u * np.sqrt(LAYERS) * np.sqrt(np.mean(wanted.astype(np.float64) ** 2))
    assert np.abs(error).max() <= 2 * u * LAYERS * np.abs(wanted).max()


# --------------------------------------------------------------------------------------------- a GPU of host memory


class HostStream:
    handle = 4711

    def synchronize(self) -> None:
        pass


class HostDevice:
    """What sessions need of :class:`unet_rt.kernels.device.Device`."""

    index = 0

    def __init__(self) -> None:
        self.held: list[Array] = []
        self.free_bytes = 2**34

    def memory(self) -> tuple[int, int]:
        return self.free_bytes, 2**34

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        yield

    def stream(self) -> HostStream:
        return HostStream()

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        memory = np.full(shape, 7, dtype)
        self.held.append(memory)
        return DeviceArray(self, memory.ctypes.data, shape, dtype, owner=memory)  # type: ignore[arg-type]

    def zero(self, array: Any, stream: Any) -> None:
        array._owner[...] = 0

    def copy_in(self, target: Any, source: Array, stream: Any) -> None:
        target._owner[...] = source

    def copy_out(self, target: Array, source: Any, stream: Any) -> None:
        target[...] = source._owner


class HostBinding:
    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_input(self, name: str, place: str, index: int, kind: Any, shape: Any, pointer: int) -> None:
        assert (place, index) == ("cuda", 0)
        self.real.bind_input(name, "cpu", 0, kind, shape, pointer)

    def bind_output(
        self, name: str, place: str, index: int, kind: Any = None, shape: Any = None, pointer: Any = None
    ) -> None:
        assert (place, index) == ("cuda", 0)
        self.real.bind_output(name, "cpu", 0, kind, shape, pointer)

    def get_outputs(self) -> Any:
        return self.real.get_outputs()


class HostSession:
    """The CPU provider that says it is CUDA's."""

    library: Any = None
    made: ClassVar[list[HostSession]] = []
    strays: tuple[str, ...] = ()
    took = "CUDAExecutionProvider"
    error = 0.0  # added to results where the bias is fused: a setting that computes something else
    strict_fails = False

    def __init__(self, path: str, options: Any, providers: Any, disabled_optimizers: Any, enable_fallback: int) -> None:
        ort = self.library
        self.options = dict(providers[0][1])
        self.runs: list[str | None] = []
        if self.strict_fails and options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1":
            raise RuntimeError("fallback to CPU EP has been explicitly disabled by the user")
        assert enable_fallback == 0
        assert "ConvActivationFusion" in disabled_optimizers
        plain = onnxruntime_library.session_options(ort, 1)
        self.real = ort.InferenceSession(path, plain, providers=["CPUExecutionProvider"])
        self.made.append(self)

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def get_providers(self) -> list[str]:
        return [self.took, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        class Node:
            name = ""

            def __init__(self, op: str) -> None:
                self.op_type = op

        class Part:
            ep_name = "CPUExecutionProvider"

            def get_nodes(self) -> list[Node]:
                return [Node(op) for op in HostSession.strays]

        return [Part()]

    def io_binding(self) -> HostBinding:
        return HostBinding(self.real.io_binding())

    def run_with_iobinding(self, binding: HostBinding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        graph = options.get_run_config_entry("gpu_graph_id") if self.options["enable_cuda_graph"] == "1" else None
        self.runs.append(graph)
        self.real.run_with_iobinding(binding.real, None)
        if self.error and self.options["fuse_conv_bias"] == "1":
            for value in binding.real._iobinding.get_outputs():
                np.asarray(value.numpy())[...] += self.error


@pytest.fixture
def host_gpu(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    device = HostDevice()
    library = onnxruntime_library.import_library()

    class Mask:
        InferenceSession = HostSession

        def __getattr__(self, name: str) -> Any:
            return getattr(library, name)

    monkeypatch.setattr(HostSession, "made", [])
    monkeypatch.setattr(HostSession, "library", library)
    for module in (onnxruntime, onnxruntime_library):
        monkeypatch.setattr(module, "missing", lambda device="cpu": None)
    monkeypatch.setattr(onnxruntime_library, "import_library", lambda: Mask())
    monkeypatch.setattr(onnxruntime_cuda, "preload", lambda library: None)
    monkeypatch.setattr(gpu.Device, "open", classmethod(lambda cls, index=0: device))
    return device


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "nuclei.onnx"
    model = onnx.load(str(shipped_model()))
    half(model)
    onnx.save(model, str(path))
    return path


def filled(device: Any, stream: Any, values: Array) -> DeviceArray:
    """Values in device memory."""
    pinned = device.pinned(values.shape, values.dtype)
    pinned[...] = values
    target: DeviceArray = device.empty(values.shape, values.dtype)
    device.copy_in(target, pinned, stream)
    stream.synchronize()
    return target


def fetched(device: Any, stream: Any, array: DeviceArray) -> Array:
    pinned: Array = device.pinned(array.shape, array.dtype)
    device.copy_out(pinned, array, stream)
    stream.synchronize()
    return pinned.copy()


def test_a_session_over_host_memory(host_gpu: HostDevice, halved: Path, baseline: Any) -> None:
    x = pixels(2, 64)
    with CudaSession(halved, "fp16", "cuda:0", 1) as session:
        assert on_device(session)
        assert not on_device(baseline)
        assert session.input_dtypes == session.output_dtypes == (np.dtype(np.float16),)
        assert session.output_shapes([(2, 1, 64, 64)]) == [(2, 2, 64, 64)]
        (found,) = session.run([x])
        assert_close(found, baseline.run([x])[0], "fp16")
        source = filled(host_gpu, session.stream, x.astype(np.float16))
        target = host_gpu.empty((2, 2, 64, 64), np.float16)
        session.run_device([source], [target])
        np.testing.assert_array_equal(fetched(host_gpu, session.stream, target), found)
        options = HostSession.made[0].options
        assert options["user_compute_stream"] == str(HostStream.handle)
        assert options["use_tf32"] == "1"  # 0 would keep float16 from the tensor cores
    assert len(HostSession.made) == 2  # one to see what the graph has, one for the shape
    with pytest.raises(BackendError, match="closed; load it again"):
        session.run_device([source], [target])
    with CudaSession(shipped_model(), "fp32", "cuda:0", 1):
        assert HostSession.made[-1].options["use_tf32"] == "0"


def test_one_provider_session_per_shape_and_no_more_than_a_few(host_gpu: HostDevice, baseline: Any) -> None:
    """A convolution plans anew whenever its shape changes; shapes of one use each must not pile up."""
    with CudaSession(shipped_model(), "fp32", "cuda:0", 1) as session:
        for side in (32, 40, 32, 48, 40, 32):
            x = pixels(1, side)
            np.testing.assert_array_equal(session.run([x])[0], baseline.run([x])[0])
        assert len(HostSession.made) == 1 + 3
        for side in range(56, 120, 8):
            session.run([pixels(1, side)])
        assert len(session._compiled) == 4
        assert len(session._staging) <= 16
        assert {key[0] for key in session._bindings} <= set(session._compiled)
        x = pixels(1, 32)
        np.testing.assert_array_equal(session.run([x])[0], baseline.run([x])[0])


def test_arrays_on_the_device_are_checked(host_gpu: HostDevice) -> None:
    with CudaSession(shipped_model(), "fp32", "cuda:0", 1) as session:
        x, y = host_gpu.empty((1, 1, 32, 32), np.float32), host_gpu.empty((1, 2, 32, 32), np.float32)
        session.run_device([x], [y])
        with pytest.raises(BackendError, match=r"input has shape 1x2x32x32, the graph takes \?x1x\?x\?"):
            session.run_device([y], [y])
        with pytest.raises(BackendError, match=r"0 input\(s\) given, the graph has 1"):
            session.run_device([], [y])
        with pytest.raises(BackendError, match=r"0 output\(s\) given, the graph has 1"):
            session.run_device([x], [])
        with pytest.raises(BackendError, match="float16 on the GPU, the graph has 1x1x32x32 float32"):
            session.run_device([host_gpu.empty((1, 1, 32, 32), np.float16)], [y])
        with pytest.raises(BackendError, match="is 1x2x32x40 float32 on the GPU, the graph has 1x2x32x32 float32"):
            session.run_device([x], [host_gpu.empty((1, 2, 32, 40), np.float32)])
        with pytest.raises(BackendError, match="not contiguous"):
            session.run_device([x], [host_gpu.empty((1, 2, 32, 40), np.float32)[..., :32]])


@pytest.mark.parametrize(
    ("kind", "text", "short"),
    [
        (
            "RuntimeException",
            "running Conv node. Name:'c' bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 93952",
            True,
        ),
        ("Fail", "cuda_call.cc:121 CudaCall CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc(&p, size);", True),
        ("RuntimeException", "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; expr=cublasCreate(&handle);", True),
        ("Fail", "CUDA failure 209: no kernel image is available for execution on the device ; GPU=0", False),
        ("RuntimeException", "Name:'out of memory' Status Message: the shapes do not fit", False),
    ],
)
def test_memory_that_is_short_is_told_from_other_failures(
    host_gpu: HostDevice, monkeypatch: pytest.MonkeyPatch, kind: str, text: str, short: bool
) -> None:
    error = getattr(onnxruntime_library.import_library().capi.onnxruntime_pybind11_state, kind)

    def fails(*_: Any) -> None:
        raise error(f"[ONNXRuntimeError] : {text}")

    monkeypatch.setattr(HostSession, "run_with_iobinding", fails)
    with CudaSession(shipped_model(), "fp32", "cuda:0", 1) as session:
        said = "use a smaller --tile or --batch" if short else "; use --device cpu"
        with pytest.raises(BackendError, match=said) as raised:
            session.run([pixels(1, 32)])
    assert isinstance(raised.value, DeviceMemoryError) is short


@pytest.mark.parametrize("first", [True, False], ids=["the first run", "a later run"])
def test_a_session_that_is_short_of_memory_is_given_back(
    host_gpu: HostDevice, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Its arena is full, and a smaller batch, which is tried next, has a session of its own."""

    def short(self: HostSession, *_: Any) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 93952")

    x, y = (host_gpu.empty((4, channels, 32, 32), np.float32) for channels in (1, 2))
    less = host_gpu.empty((1, 1, 32, 32), np.float32), host_gpu.empty((1, 2, 32, 32), np.float32)
    with CudaSession(shipped_model(), "fp32", "cuda:0", 1) as session:
        session.run_device([less[0]], [less[1]])
        if not first:
            session.run_device([x], [y])
        with monkeypatch.context() as patch:
            patch.setattr(HostSession, "run_with_iobinding", short)
            with pytest.raises(DeviceMemoryError) as raised:  # kept here, as whoever compares candidates does
                session.run_device([x], [y])
        gone = weakref.ref(HostSession.made.pop())
        assert gone() is None
        assert list(session._compiled) == [((1, 1, 32, 32),)]
        assert [key[0] for key in session._bindings] == list(session._compiled)
        made = len(HostSession.made)
        session.run_device([less[0]], [less[1]])
        assert len(HostSession.made) == made
        session.run_device([x], [y])  # others may have given memory back
        assert len(HostSession.made) == made + 1
    assert "use a smaller --tile or --batch" in str(raised.value)


def test_a_session_whose_arrays_find_no_memory_is_given_back(
    host_gpu: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> None:
        raise DeviceMemoryError("the device is out of memory")

    with CudaSession(shipped_model(), "fp32", "cuda:0", 1) as session:
        with monkeypatch.context() as patch:
            patch.setattr(host_gpu, "empty", short)
            with pytest.raises(DeviceMemoryError, match=r"^the device is out of memory$"):
                session.output_shapes([(4, 1, 32, 32)])
        assert not session._compiled
        assert session.output_shapes([(4, 1, 32, 32)]) == [(4, 2, 32, 32)]


def test_memory_of_shapes_is_given_back(host_gpu: HostDevice, monkeypatch: pytest.MonkeyPatch, baseline: Any) -> None:
    """``held_bytes``: what the first run of a shape took of the device, and the arrays that host arrays go through."""
    real = HostSession.run_with_iobinding

    def takes(self: HostSession, *arguments: Any) -> None:
        real(self, *arguments)
        if len(self.runs) == 1:
            host_gpu.free_bytes -= 1000

    monkeypatch.setattr(HostSession, "run_with_iobinding", takes)
    with CudaSession(shipped_model(), "fp32", "cuda:0", 1) as session:
        assert session.held_bytes == 0
        for side in (32, 40, 32):
            session.run([pixels(1, side)])
        assert session.held_bytes == 2 * 1000 + 4 * 3 * (32 * 32 + 40 * 40)
        held = [weakref.ref(one) for one in HostSession.made]
        HostSession.made.clear()
        session.give_back()
        assert session.held_bytes == 0
        assert not any(one() for one in held)
        np.testing.assert_array_equal(session.run([pixels(1, 32)])[0], baseline.run([pixels(1, 32)])[0])


def test_a_session_that_finds_no_memory_for_its_weights_says_so(
    host_gpu: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's error says it in words alone; that the file is larger than what is free needs none."""
    monkeypatch.setattr(onnxruntime_library, "session_options", lambda *_: pytest.fail("not reached"))

    def refused(*_: Any) -> None:
        raise RuntimeError("some error")

    monkeypatch.setattr(onnxruntime_provider.Provider, "_session_options", refused)
    with pytest.raises(BackendError, match="ONNX Runtime refuses") as raised:
        CudaSession(shipped_model(), "fp32", "cuda:0", 1)
    assert not isinstance(raised.value, DeviceMemoryError)
    host_gpu.free_bytes = shipped_model().stat().st_size - 1
    with pytest.raises(DeviceMemoryError, match=r"takes \d MB of device memory, \d MB are free on cuda:0; free"):
        CudaSession(shipped_model(), "fp32", "cuda:0", 1)


def test_launches_are_recorded_for_addresses_that_stay(host_gpu: HostDevice) -> None:
    with CudaSession(shipped_model(), "fp32", "cuda:0", 1, Settings(CudaOptions(cuda_graph=True))) as session:
        stay = host_gpu.empty((1, 1, 32, 32), np.float32), host_gpu.empty((1, 2, 32, 32), np.float32)
        for _ in range(4):
            session.run_device([stay[0]], [stay[1]])
        once = host_gpu.empty((1, 1, 32, 32), np.float32)
        session.run_device([once], [stay[1]])
        session.run_device([stay[0]], [stay[1]])
        # the first run finds the shapes; then two runs before these addresses are taken for ones that stay
        assert HostSession.made[1].runs == ["-1", "-1", "-1", "1", "1", "-1", "1"]


def test_recordings_make_room_when_their_session_goes(host_gpu: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are held by provider sessions: bindings that go free none, sessions that go free theirs."""
    monkeypatch.setattr(onnxruntime_cuda, "_GRAPHS", 1)
    monkeypatch.setattr(onnxruntime_cuda, "_BINDINGS", 1)
    with CudaSession(shipped_model(), "fp32", "cuda:0", 1, Settings(CudaOptions(cuda_graph=True))) as session:

        def ran(side: int) -> list[str | None]:
            x, y = host_gpu.empty((1, 1, side, side), np.float32), host_gpu.empty((1, 2, side, side), np.float32)
            for _ in range(4):
                session.run_device([x], [y])
            return HostSession.made[-1].runs[-2:]

        assert ran(32) == ["1", "1"]
        assert ran(32) == ["-1", "-1"]
        assert [ran(side) for side in (40, 48, 56)] == [["-1", "-1"]] * 3
        assert ran(64) == ["1", "1"]


def test_build_measures_and_load_obeys(host_gpu: HostDevice, tmp_path: Path, baseline: Any) -> None:
    graph = tmp_path / "graph.onnx"
    settings = onnxruntime.build(
        shipped_model(), graph, precision="fp16", device="cuda:0", tiles=[(64, 64)], batches=(1, 2)
    )
    assert settings is not None
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]
    record = json.loads(json.dumps(settings))
    assert record == settings
    assert record["input_shapes"] == [[2, 1, 64, 64]]
    tried = [t.options for t in read_settings(record, graph).trials]
    assert {(o.prefer_nhwc, o.fuse_conv_bias) for o in tried} == {(False, False), (True, False), (True, True)}
    assert not any(o.up_conv for o in tried)  # this network has none
    assert {o.search for o in tried} == {"HEURISTIC", "EXHAUSTIVE"}
    assert all(t["ms"] > 0 and not t["note"] for t in record["trials"])
    kept = {p.key: p.value for p in onnx.load(str(shipped_model())).metadata_props}
    assert kept.items() <= {p.key: p.value for p in onnx.load(str(graph)).metadata_props}.items()
    HostSession.made.clear()
    x = pixels(2, 64)
    with onnxruntime.load(graph, precision="fp16", device="cuda:0", threads=1, settings=record) as session:
        chosen = read_settings(record, graph).options
        wanted = chosen.provider(0, "fp16", HostStream.handle)
        assert HostSession.made[0].options == wanted
        assert_close(session.run([x])[0], baseline.run([x])[0], "fp16")
        assert len(HostSession.made) == 1  # the record says what the graph has, and which shape to begin with
        assert session.run([pixels(1, 48)])[0].shape == (1, 2, 48, 48)


@pytest.mark.torch
def test_crops_are_constants_in_a_session_for_a_shape(tmp_path: Path) -> None:
    """Exporters compute where to crop from shapes; those nodes would run on the CPU, between copies."""
    import networks

    model = networks.export(networks.build(networks.UNetSpec(valid=True)), [(1, 1, 92, 92)], free_batch=True)
    assert {"Shape", "Slice"} <= {node.op_type for node in model.graph.node}
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "s2"  # as if exported with one name for both
    inputs, outputs = trial.name_sizes(model)
    assert inputs[0].shape == ("x0:0", 1, "x0:2", "x0:3")
    assert outputs[0].port.shape[1] == 2
    x = np.repeat(pixels(1, 92), 3, axis=0)[..., :76]
    library = onnxruntime_library.import_library()
    options = onnxruntime_library.session_options(library, 1)
    options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    for name, size in onnxruntime_provider.sizes_by_name(inputs, [x.shape]).items():
        options.add_free_dimension_override_by_name(name, size)
    session = library.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x0": x})
    left = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert left == {"Conv", "ConvTranspose", "Relu", "MaxPool", "Slice", "Concat"}
    free = onnxruntime_library.session_options(library, 1)
    free.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_BASIC
    plain = library.InferenceSession(model.SerializeToString(), free, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(found, plain.run(None, {"x0": x})[0])
    same = (GraphPort("x", (1, "s", "s"), "float32"),)
    assert onnxruntime_provider.sizes_by_name(same, [(1, 8, 8)]) == {"s": 8}
    assert onnxruntime_provider.sizes_by_name(same, [(1, 8, 16)]) == {}


def test_a_setting_that_computes_something_else_is_left_out(
    host_gpu: HostDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostSession, "error", 50.0)
    graph = tmp_path / "graph.onnx"
    record = trial.tune(shipped_model(), graph, precision="fp16", device="cuda:0", tiles=[(64, 64)], batches=(1,))
    fused = [t for t in record.trials if t.options.fuse_conv_bias]
    assert [t.ms for t in fused] == [None]
    assert "its result differs by" in fused[0].note
    assert not record.options.fuse_conv_bias


def test_what_must_not_happen_in_silence(host_gpu: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> CudaSession:
        return CudaSession(shipped_model(), "fp32", "cuda:0", 1)

    monkeypatch.setattr(HostSession, "took", "CPUExecutionProvider")
    with pytest.raises(BackendError, match=r"CUDAExecutionProvider was asked .* took CPUExecutionProvider"):
        load()
    monkeypatch.setattr(HostSession, "took", "CUDAExecutionProvider")
    monkeypatch.setattr(HostSession, "strays", ("Shape", "Gather", "MaxPool"))
    with pytest.raises(BackendError, match=r"1 layer\(s\) of nuclei.onnx would run on the CPU.*first: MaxPool"):
        load()
    monkeypatch.setattr(HostSession, "strays", ("Shape", "Gather"))
    monkeypatch.setattr(HostSession, "strict_fails", True)  # the arithmetic of sizes may stay on the CPU
    load().close()
    with pytest.raises(BackendError, match="fuse_conv_bias without prefer_nhwc"):
        CudaOptions(fuse_conv_bias=True)


def test_settings_of_another_version_are_refused() -> None:
    path, settings = Path("graph.onnx"), Settings().to_json()
    assert read_settings(settings, path) == Settings()
    options = settings["options"]
    for other in (
        {**options, "more": 1},
        {"search": "HEURISTIC"},
        {**options, "search": "LUCK"},
        {**options, "prefer_nhwc": 1},
        {**options, "fuse_conv_bias": True},
    ):
        with pytest.raises(BackendError, match=r"graph\.onnx.*another version.*unet-rt build model\.onnx --overwrite"):
            read_settings({**settings, "options": other}, path)


def test_without_settings_the_defaults_of_the_provider_are_used(
    host_gpu: HostDevice, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As for engines whose settings travelled in their graph."""
    graph = tmp_path / "graph.onnx"
    onnxruntime.build(shipped_model(), graph, precision="fp16", device="cuda:0", tiles=[(64, 64)], batches=(1,))
    HostSession.made.clear()
    caplog.clear()
    with onnxruntime.load(graph, precision="fp16", device="cuda:0", threads=1) as session:
        assert session.run([pixels(1, 64)])[0].shape == (1, 2, 64, 64)
    assert HostSession.made[0].options == CudaOptions().provider(0, "fp16", HostStream.handle)
    (line,) = caplog.messages
    assert "build the engine again" in line


def test_precisions_and_graphs_that_build_takes(
    host_gpu: HostDevice, halved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert onnxruntime.precisions("cuda:0") == ("fp32", "fp16")
    with pytest.raises(BackendError, match="no bf16 on cuda:0; use --precision fp32 or --precision fp16"):
        onnxruntime.build(shipped_model(), tmp_path / "g.onnx", precision="bf16", device="cuda:0")
    with pytest.raises(BackendError, match="computes in fp16, fp32 was asked; give the FP32 graph"):
        onnxruntime.build(halved, tmp_path / "g.onnx", precision="fp32", device="cuda:0")
    seen = {}
    monkeypatch.setattr(trial, "tune", lambda model, graph, **how: seen.update(how) or Settings())
    onnxruntime.build(halved, tmp_path / "g.onnx", precision="fp16", device="cuda:0", tiles=[(64, 64)], batches=(4,))
    assert seen == {"precision": "fp16", "device": "cuda:0", "tiles": [(64, 64)], "batches": (4,)}


@pytest.mark.skipif(sys.platform != "linux", reason="asked of the loader on Linux alone")
def test_without_cudnn_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime convolves without it, many times slower, and says nothing."""

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    library = SimpleNamespace(preload_dlls=lambda: print("Failed to load libcudnn.so.9\nand more"))
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime_provider.ctypes, "CDLL", absent)
        with pytest.raises(
            BackendError, match=r"libcudnn\.so\.9: .*; Failed to load libcudnn\.so\.9; pip install nvidia-"
        ):
            onnxruntime_provider.preload(library)
        patch.setattr(onnxruntime_provider.ctypes, "CDLL", lambda name: None)
        onnxruntime_provider.preload(library)


def test_without_a_gpu_it_is_said() -> None:
    if machine.cuda().missing is None:
        pytest.skip("there is a GPU")
    for call in (
        lambda: onnxruntime.build(shipped_model(), Path("g.onnx"), precision="fp16", device="cuda:0"),
        lambda: onnxruntime.load(shipped_model(), precision="fp16", device="cuda:0"),
    ):
        with pytest.raises(BackendError, match=r"cannot use cuda:0: .* use --device cpu"):
            call()


# --------------------------------------------------------------------------------------------------- with a real GPU


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    graph = tmp_path_factory.mktemp("cuda") / "graph.onnx"
    settings = onnxruntime.build(
        shipped_model(), graph, precision=request.param, device="cuda:0", tiles=[(256, 256)], batches=(1, 4)
    )
    return request.param, graph, settings


# FP32 with channels last may be TF32, without a word: left to the trial, which finds out.
SETTINGS = [
    ("fp32", CudaOptions()),
    ("fp32", CudaOptions(search="EXHAUSTIVE")),
    ("fp32", CudaOptions(cuda_graph=True)),
    ("fp16", CudaOptions()),
    ("fp16", CudaOptions(prefer_nhwc=True)),
    ("fp16", CudaOptions(prefer_nhwc=True, fuse_conv_bias=True)),
    ("fp16", CudaOptions(prefer_nhwc=True, fuse_conv_bias=True, search="EXHAUSTIVE")),
    ("fp16", CudaOptions(prefer_nhwc=True, cuda_graph=True)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 4, 16])
def test_the_gpu_computes_what_the_baseline_does(built: Built, batch: int, baseline: Any) -> None:
    precision, graph, settings = built
    x = pixels(batch, 256)
    with onnxruntime.load(graph, precision=precision, device="cuda:0", settings=settings) as session:
        assert (session.precision, session.device) == (precision, "cuda:0")
        (found,) = session.run([x])
        for k in range(batch):
            assert_close(found[k : k + 1], baseline.run([x[k : k + 1]])[0], precision)
        same = session.run([np.repeat(x[:1], batch, axis=0)])[0]
        assert all(np.array_equal(row, same[0]) for row in same)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "options"), SETTINGS, ids=lambda v: v if isinstance(v, str) else v.text)
def test_every_setting_computes_the_same(options: CudaOptions, precision: str, halved: Path, baseline: Any) -> None:
    x = pixels(2, 192)
    wanted = baseline.run([x])[0]
    graph = halved if precision == "fp16" else shipped_model()
    with CudaSession(graph, precision, "cuda:0", settings=Settings(options)) as session:
        for _ in range(6):  # first run, later runs, and the recording
            assert_close(session.run([x])[0], wanted, precision)


@pytest.mark.gpu
def test_device_arrays_and_recorded_launches(built: Built) -> None:
    """run_device is run without the copies, and a recording reads what its addresses hold now."""
    precision, graph, settings = built
    device = gpu.Device.open(0)
    first, second = pixels(4, 256), pixels(4, 256)[::-1]
    for recorded in (False, True):
        found = read_settings(settings, graph)
        found = replace(found, options=replace(found.options, cuda_graph=recorded))
        with CudaSession(graph, precision, "cuda:0", settings=found) as session:
            wanted = [session.run([np.ascontiguousarray(x)])[0] for x in (first, second)]
            dtype = session.input_dtypes[0]
            source = device.empty(first.shape, dtype)
            target = device.empty(session.output_shapes([first.shape])[0], session.output_dtypes[0])
            for turn in range(8):
                x = np.ascontiguousarray((first, second)[turn % 2].astype(dtype))
                device.copy_in(source, x, session.stream)
                session.run_device([source], [target])
                np.testing.assert_array_equal(fetched(device, session.stream, target), wanted[turn % 2])


@pytest.mark.gpu
def test_a_thousand_runs_take_no_more_memory(built: Built) -> None:
    precision, graph, settings = built
    device = gpu.Device.open(0)
    x = pixels(4, 256)
    with onnxruntime.load(graph, precision=precision, device="cuda:0", settings=settings) as session:
        assert on_device(session)
        source = filled(device, session.stream, x.astype(session.input_dtypes[0]))
        target = device.empty(session.output_shapes([x.shape])[0], session.output_dtypes[0])
        for _ in range(20):
            session.run_device([source], [target])
        session.run([x])
        session.stream.synchronize()
        before = device.memory()[0]
        for turn in range(1000):
            session.run_device([source], [target])
            if turn % 100 == 0:
                session.run([x])
        session.stream.synchronize()
        assert before - device.memory()[0] <= 2 << 20


@pytest.mark.gpu
def test_tiles_and_batches_on_the_gpu_agree_to_rounding(built: Built) -> None:
    """Bit for bit is promised on CPUs; here plans differ by shape. The test says on failure by how much."""
    precision, graph, settings = built
    x = pixels(1, 384)
    halo = 56  # more than the network's
    with onnxruntime.load(graph, precision=precision, device="cuda:0", settings=settings) as session:
        (whole,) = session.run([x])
        (tile,) = session.run([np.ascontiguousarray(x[..., :256, :256])])
        (two,) = session.run([np.concatenate([x, x])])
    kept = (..., slice(0, 256 - halo), slice(0, 256 - halo))
    apart = {
        "tile": float(np.abs(whole[kept].astype(np.float64) - tile[kept]).max()),
        "batch": float(np.abs(whole[0].astype(np.float64) - two[0]).max()),
    }
    print(f"{precision}: bits equal by tile {apart['tile'] == 0}, by batch {apart['batch'] == 0}; {apart}")
    assert_close(tile[kept], whole[kept].astype(np.float32), precision)
    assert_close(two[:1], whole.astype(np.float32), precision)


@pytest.mark.gpu
def test_a_layer_that_cuda_does_not_have_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime would compute it on the CPU and say nothing."""
    graph = helper.make_graph(
        [helper.make_node("StringNormalizer", ["s"], ["t"]), helper.make_node("Relu", ["x"], ["y"])],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("s", TensorProto.STRING, [1]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("t", TensorProto.STRING, [1]),
        ],
        [numpy_helper.from_array(np.zeros(1, np.float32), "unused")],
    )
    path = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    with pytest.raises(BackendError, match="CPU"):
        CudaSession(path, "fp32", "cuda:0")
