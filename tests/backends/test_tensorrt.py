"""TensorRT: plans, what is read back from them, and sessions; with a GPU the real thing, without one all but running.

TensorRT-RTX parses and builds without a GPU, so that graphs are tried on a real builder here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import FakeDevice, FakeTensorRt

import unet_rt
from unet_rt.backends.tensorrt import backend as tensorrt
from unet_rt.backends.tensorrt import recording
from unet_rt.backends.tensorrt import runtime as tensorrt_runtime
from unet_rt.backends.tensorrt.build import failure, logger, profiles_for, refusal, remedy
from unet_rt.backends.tensorrt.inspect import check_engine, check_network, engine_convolutions
from unet_rt.backends.tensorrt.plan import Origin, PlanHeader, Profile, read_header, read_plan, write_plan
from unet_rt.backends.tensorrt.session import TensorRtSession
from unet_rt.errors import BackendError, DeviceMemoryError, EngineError, TileError
from unet_rt.kernels import native as kernels
from unet_rt.system import facts as machine

onnx = pytest.importorskip("onnx")

PACKAGE = Path(unet_rt.__file__).parent
NUCLEI = PACKAGE / "data" / "nuclei.onnx"
MODULES = [
    importlib.import_module(f"unet_rt.backends.tensorrt.{part}") for part in ("backend", "build", "inspect", "session")
]
HERE = Origin("tensorrt", "11.4.0", "NVIDIA H200", "9.0", "13.1")


def profile(batch: int, size: int = 8) -> Profile:
    return Profile((size, size), batch, ((batch, 1, size, size),))


# --- what is missing --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda((), "", "no NVIDIA driver is installed"))
    # Some versions crash where there is no driver: the library may not even be imported.
    monkeypatch.setattr(tensorrt, "_import", lambda: pytest.fail("the library was imported without a driver"))


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_error_says_what_is_missing(tmp_path: Path) -> None:
    assert "on NVIDIA GPUs alone" in str(tensorrt.missing("cpu"))
    assert "no NVIDIA driver is installed; use --device cpu" in str(tensorrt.missing("cuda:0"))
    calls: list[Callable[[], object]] = [
        lambda: tensorrt.build(NUCLEI, tmp_path / "g.onnx", precision="fp32", device="cuda:0", blob=tmp_path / "p"),
        lambda: tensorrt.load(tmp_path / "g.onnx", precision="fp32", device="cuda:0", blob=tmp_path / "p"),
        lambda: tensorrt.stale(tmp_path / "p"),
    ]
    for call in calls:
        with pytest.raises(BackendError, match="no NVIDIA driver is installed"):
            call()
    assert not list(tmp_path.iterdir())


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda(("NVIDIA H200",), "13.1", None))
    monkeypatch.setattr(tensorrt, "_found", lambda: None)
    assert re.search(r"not installed; pip install tensorrt-cu13 .*tensorrt-rtx-cu13", str(tensorrt.missing("cuda:0")))
    with pytest.raises(BackendError, match="not installed"):
        tensorrt._import()


def test_a_broken_or_old_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt, "_found", lambda: "tensorrt")
    for text, message in (
        ("raise ImportError('libnvinfer.so.11 cannot be found')", "cannot be imported .libnvinfer.so.11"),
        ("", "installed incompletely"),
        ("__version__ = '10.3.0'\nBuilder = 1", "tensorrt 10.3.0 is older than 10.12"),
    ):
        (tmp_path / "tensorrt.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        with pytest.raises(BackendError, match=message):
            tensorrt._import()
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


# --- plans on disk ----------------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    header = PlanHeader(
        HERE, "fp16", (profile(4), profile(1)), ("x",), ("y",), "up_conv", {"fp16": 18}, {"native": 1.5}
    )
    write_plan(tmp_path / "p", header, b"\n\x00plan\n", b"kernels")
    assert read_header(tmp_path / "p") == header
    assert read_plan(tmp_path / "p") == (header, b"\n\x00plan\n", b"kernels")


def test_a_plan_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    with pytest.raises(EngineError, match=r"cannot be read .* build the engine again"):
        read_plan(path)
    write_plan(path, PlanHeader(HERE, "fp16", (profile(1),), ("x",), ("y",)), b"x" * 100)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(EngineError, match="ends after 99 of 100 bytes"):
        read_plan(path)
    path.write_bytes(whole.replace(b'"profiles"', b'"profile"'))
    with pytest.raises(EngineError, match="header of the plan is damaged"):
        read_header(path)
    path.write_bytes(b"vtrt" + whole)
    with pytest.raises(EngineError, match="not a plan of this version"):
        read_header(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"gpu": "NVIDIA L4"}, "GPU NVIDIA L4, here NVIDIA H200"),
        ({"compute_capability": "8.9"}, "compute capability 8.9, here 9.0"),
        ({"driver": "12.8"}, "driver 12.8, here 13.1"),
        ({"version": "10.12.0"}, "tensorrt version 10.12.0, here 11.4.0"),
        ({"library": "tensorrt_rtx"}, "library tensorrt_rtx, here tensorrt"),
    ],
)
def test_a_plan_of_elsewhere_is_stale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, str], said: str | None
) -> None:
    monkeypatch.setattr(tensorrt, "_open", lambda device: (None, None))
    monkeypatch.setattr(tensorrt, "_origin", lambda trt, device: HERE)
    there = Origin(**{**vars(HERE), **change})
    write_plan(tmp_path / "p", PlanHeader(there, "fp32", (profile(1),), ("x",), ("y",)), b"plan")
    reason = tensorrt.stale(tmp_path / "p")
    if said is None:
        assert reason is None
        with pytest.raises(EngineError, match="a plan in fp32, fp16 was asked"):
            tensorrt.load(tmp_path / "g", precision="fp16", device="cuda:0", blob=tmp_path / "p")
    else:
        assert reason == f"p belongs to {said}"
        with pytest.raises(EngineError, match=re.escape(f"{said}; build the engine again on this machine")):
            tensorrt.load(tmp_path / "g", precision="fp32", device="cuda:0", blob=tmp_path / "p")
    (tmp_path / "p").write_bytes(b"")
    assert "not a plan" in str(tensorrt.stale(tmp_path / "p"))


# --- shapes -----------------------------------------------------------------------------------------------------------


def graph_with_inputs(*shapes: list[int | str]) -> Any:
    values = [onnx.helper.make_tensor_value_info(f"x{k}", 1, shape) for k, shape in enumerate(shapes)]
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", values, []))


@pytest.mark.parametrize(
    ("dims", "tile", "batch", "wanted"),
    [
        (["n", 3, "h", "w"], (64, 32), 2, (2, 3, 64, 32)),
        ([1, 1, "h", "w"], (64, 32), 1, (1, 1, 64, 32)),
        (["n", 1, 64, "w"], (64, 32), 4, (4, 1, 64, 32)),
        (["n", "h", "w", 3], (64, 32), 2, (2, 64, 32, 3)),
        ([1, 64, 32, 3], (64, 32), 1, (1, 64, 32, 3)),
        ([2, 1, 64, 32], (64, 32), 2, (2, 1, 64, 32)),
        ([1, "h", "w"], (64, 32), 1, (1, 64, 32)),
        (["h", "w"], (64, 32), 1, (64, 32)),
        (["n", 1, "z", "y", "x"], (16, 32, 32), 1, (1, 1, 16, 32, 32)),
    ],
)
def test_shapes_of_a_tile(dims: list[int | str], tile: tuple[int, ...], batch: int, wanted: tuple[int, ...]) -> None:
    (found,) = profiles_for(graph_with_inputs(dims), [tile], [batch])
    assert found == Profile(tile, batch, (wanted,))


def test_every_tile_at_every_batch_the_largest_first() -> None:
    model = graph_with_inputs(["n", 1, "h", "w"], ["n", 2, "h", "w"])
    found = profiles_for(model, [(32, 32), (64, 64), (32, 32)], [1, 4])
    assert [(p.tile[0], p.batch) for p in found] == [(64, 4), (64, 1), (32, 4), (32, 1)]
    assert found[0].inputs == ((4, 1, 64, 64), (4, 2, 64, 64))


@pytest.mark.parametrize(
    ("dims", "tile", "batches", "said"),
    [
        (["n", 1, 64, 64], (32, 32), [1], r"input x0 is \?x1x64x64, and tile and batch make it 1x1x32x32"),
        ([1, 1, "h", "w"], (32, 32), [2], r"input x0 is 1x1x\?x\?, and tile and batch make it 2x1x32x32"),
        (["n", "c", "h", "w"], (32, 32), [1], r"1x\?x32x32"),
        (["n", 1, "h", "w"], (8, 32, 32), [1], "input x0"),
        (["n", 1, "h", "w"], (32, 32), [], "a plan takes fixed shapes"),
    ],
)
def test_shapes_that_the_graph_does_not_take(
    dims: list[int | str], tile: tuple[int, ...], batches: list[int], said: str
) -> None:
    with pytest.raises(TileError, match=said):
        profiles_for(graph_with_inputs(dims), [tile], batches)


# --- precision read back ----------------------------------------------------------------------------------------------

ASKED = {"/down/Conv": "fp16", "/up/ConvTranspose": "fp16", "/head/Conv": "fp16"}


def layer(name: str, reads: str, writes: str, **more: Any) -> dict[str, Any]:
    return {
        "Name": name,
        "Inputs": [{"Name": "a", "Format/Datatype": reads}],
        "Outputs": [{"Name": "b", "Format/Datatype": writes}],
        **more,
    }


def described(*layers: dict[str, Any]) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["x", "y"]})


def test_layers_tell_their_types_whatever_they_are_called() -> None:
    text = described(
        layer("Reformatting CopyNode for Input Tensor 0 to /down/Conv + /down/Relu", "Float", "Half", Metadata=""),
        layer(
            "__myl_fused",
            "Half",
            "Half",
            Metadata="[ONNX Layer: /down/Conv]\x1f[ONNX Layer: /down/Relu]",
            LayerType="kgen",
        ),
        layer(
            "/up/ConvTranspose + /up/Relu", "Channel major FP16 format where channel % 8 == 0", "Row major linear FP32"
        ),
        layer("/head/Conv [profile 1]", "Thirty-two wide channel vectorized row major Int8 format.", "Half"),
    )
    assert engine_convolutions(text, ASKED) == {
        "/down/Conv": {"fp16"},
        "/up/ConvTranspose": {"fp16", "fp32"},
        "/head/Conv": {"int8", "fp16"},
    }
    assert check_engine(engine_convolutions(text, ASKED), ASKED, "fp16") == {"fp16": 3}


def test_a_layer_in_another_precision_is_refused_by_name() -> None:
    text = described(
        layer("/down/Conv", "Half", "Half"),
        layer("/up/ConvTranspose", "Row major linear FP32", "Float", Weights={"Type": "Float", "Count": 4}),
    )
    found = engine_convolutions(text, ASKED)
    with pytest.raises(BackendError, match=r"runs 1 of 3 .*first: /up/ConvTranspose, asked fp16, runs in fp32"):
        check_engine(found, ASKED, "fp16")
    # A layer that tells nothing is counted, not guessed.
    assert check_engine({**found, "/up/ConvTranspose": frozenset()}, ASKED, "fp16") == {"fp16": 1, "unread": 2}
    weights = described(layer("/down/Conv", "Float", "Float", Weights={"Type": "Half", "Count": 4}))
    assert engine_convolutions(weights, ASKED)["/down/Conv"] == {"fp16", "fp32"}


def test_an_int8_engine_needs_int8() -> None:
    asked = dict.fromkeys(ASKED, "int8") | {"/head/Conv": "fp16"}
    mixed = {
        "/down/Conv": frozenset({"int8"}),
        "/up/ConvTranspose": frozenset({"fp16"}),
        "/head/Conv": frozenset({"fp16"}),
    }
    assert check_engine(mixed, asked, "int8") == {"int8": 1, "fp16": 2}
    with pytest.raises(BackendError, match="runs none of 3 convolutions in it"):
        check_engine({**mixed, "/down/Conv": frozenset({"fp16"})}, asked, "int8")
    with pytest.raises(BackendError, match="/down/Conv, asked int8, runs in fp32"):
        check_engine({**mixed, "/down/Conv": frozenset({"fp32"})}, asked, "int8")


def test_a_description_without_details_is_no_proof() -> None:
    assert engine_convolutions('{"Layers": ["/down/Conv + /down/Relu"]}', ASKED) == dict.fromkeys(ASKED, frozenset())
    with pytest.raises(BackendError, match="not JSON"):
        engine_convolutions("Layers:", ASKED)


def test_a_network_in_another_precision_is_refused() -> None:
    check_network(ASKED, "fp16")
    check_network({**ASKED, "/head/Conv": "fp32"}, "fp16", frozenset({"/head/Conv"}))
    with pytest.raises(BackendError, match=r"1 of 3 .*first: /head/Conv in fp32"):
        check_network({**ASKED, "/head/Conv": "fp32"}, "fp16")
    with pytest.raises(BackendError, match="fp32 was asked, and 3 of 3"):
        check_network(ASKED, "fp32")
    with pytest.raises(BackendError, match="none of 3 convolutions would run in it"):
        check_network(ASKED, "int8")


def test_short_memory_is_an_error_of_its_own(fake: FakeTensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Error Code 2: OutOfMemory (Requested size was 9 bytes.)"
    assert isinstance(failure(text, text), DeviceMemoryError)
    assert type(failure("it failed", "for another reason")) is BackendError
    messages = logger(fake)[1]
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: messages.errors.append(text))
    monkeypatch.setattr(fake, "Runtime", lambda sink: runtime)
    with pytest.raises(DeviceMemoryError, match=r"cannot load the plan: .* use a smaller --tile or --batch"):
        tensorrt_runtime.deserialize(fake, b"plan")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 9 bytes.)", "use a smaller --tile or --batch"),
        (
            "Error Code 10: Could not find any implementation for node {ForeignNode[/up/Conv.../head]}.",
            "another --precision",
        ),
        ("CUDA driver version is insufficient for CUDA runtime version", "newer NVIDIA driver"),
        ("unsupported SM 9.0", "--backend onnxruntime, or pip install tensorrt-cu13"),
        ("anything else", "--backend onnxruntime, or --precision fp32"),
    ],
)
def test_every_refusal_has_a_way_out(text: str, said: str) -> None:
    assert said in remedy(text)
    message = refusal(FakeTensorRt(), "graph.onnx", profile(4), text)
    assert message.startswith("TensorRT cannot build graph.onnx for 8x8 px at batch 4")
    assert ("at node /up/Conv.../head" in message) == ("node" in text)


# --- sessions, on a library that doubles ------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    library = FakeTensorRt(profiles=2)
    for name in ("graph_begin", "graph_end", "graph_launch", "graph_destroy"):
        monkeypatch.setattr(kernels, name, getattr(library.graphs, name))
    # No run of a session is a part of someone else's recording, but its own.
    monkeypatch.setattr(recording, "capturing", lambda stream: library.fails and library.graphs.recording is not None)
    return library


def session_of(library: FakeTensorRt, device: FakeDevice | None = None, precision: str = "fp32") -> TensorRtSession:
    header = PlanHeader(HERE, precision, (profile(4), profile(1)), ("x",), ("y",))
    opened: Any = device or FakeDevice()
    return TensorRtSession(library, header, b"plan", b"", opened, "cuda:0", 1)


def tiles(batch: int, size: int = 8, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).random((batch, 1, size, size), np.float32)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 9])
def test_any_batch_of_the_host_runs_by_the_batches_of_the_plan(fake: FakeTensorRt, batch: int) -> None:
    with session_of(fake) as session:
        for seed in range(3):
            x = tiles(batch, seed=seed)
            (y,) = session.run([x])
            assert np.array_equal(y, 2 * x)
            y += 1  # the caller's own: later runs are not touched by it


def test_half_engines_take_float32_from_the_host(fake: FakeTensorRt) -> None:
    fake.dtype = np.float16
    with session_of(fake, precision="fp16") as session:
        assert session.input_dtypes == session.output_dtypes == (np.dtype(np.float16),)
        (y,) = session.run([tiles(4)])
        assert y.dtype == np.float16
        assert np.array_equal(y, 2 * tiles(4).astype(np.float16))


def test_runs_are_recorded_per_arrays_and_nothing_is_allocated(fake: FakeTensorRt) -> None:
    device = FakeDevice()
    with session_of(fake, device) as session:
        pairs = [(device.empty((4, 1, 8, 8), "f4"), device.empty((4, 1, 8, 8), "f4")) for _ in range(2)]
        session.output_shapes([(4, 1, 8, 8)])
        made = device.allocated
        for seed in range(5):
            for x, y in pairs:
                x.host[...] = tiles(4, seed=seed)
                session.run_device([x], [y])  # type: ignore[list-item]
                assert np.array_equal(y.host, 2 * x.host)
                x.host[...] = y.host[...] = -1
        # Once plainly, once recorded, then replayed: per pair of arrays.
        assert (fake.runs, len(fake.graphs.graphs), fake.graphs.launches) == (4, 2, 8)
        assert device.allocated == made
        session.forget([pairs[0][0]])  # type: ignore[list-item]
        assert len(fake.graphs.graphs) == 1
    assert not fake.graphs.graphs
    assert device.active == 0


def test_no_more_than_some_recordings_are_kept(fake: FakeTensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_MOST_GRAPHS", 3)
    device = FakeDevice()
    with session_of(fake, device) as session:
        y = device.empty((1, 1, 8, 8), "f4")
        for x in [device.empty((1, 1, 8, 8), "f4") for _ in range(10)]:
            for _ in range(3):
                x.host[...] = tiles(1)
                session.run_device([x], [y])  # type: ignore[list-item]
                assert np.array_equal(y.host, 2 * x.host)
        assert len(fake.graphs.graphs) == 3


def test_a_run_inside_another_recording_is_a_part_of_it(fake: FakeTensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "capturing", lambda stream: fake.graphs.recording is not None)
    device = FakeDevice()
    with session_of(fake, device) as session:
        x, y = device.empty((1, 1, 8, 8), "f4"), device.empty((1, 1, 8, 8), "f4")
        fake.graphs.graph_begin(77)
        for _ in range(3):
            session.run_device([x], [y])  # type: ignore[list-item]
        handle = fake.graphs.graph_end(77)
        assert len(fake.graphs.graphs[handle]) == 3
        x.host[...] = tiles(1)
        fake.graphs.graph_launch(handle, 77)
        assert np.array_equal(y.host, 2 * x.host)
        fake.graphs.graph_destroy(handle)


def test_what_cannot_be_recorded_runs_all_the_same(fake: FakeTensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = 0

    def invalid(stream: int) -> int:
        nonlocal ended
        ended, fake.graphs.recording = ended + 1, None
        raise BackendError("ending a CUDA graph failed")

    monkeypatch.setattr(kernels, "graph_end", invalid)
    with session_of(fake) as session:
        for seed in range(4):
            assert np.array_equal(session.run([tiles(4, seed=seed)])[0], 2 * tiles(4, seed=seed))
    assert (ended, fake.graphs.launches) == (1, 0)


def test_scratch_memory_is_one_block_and_given_back(fake: FakeTensorRt) -> None:
    device = FakeDevice()
    session = session_of(fake, device)
    assert session.scratch_bytes == 0
    session.run([tiles(4)])
    assert session.scratch_bytes == 4096
    session.run([tiles(1)])
    session.run([tiles(4)])
    assert fake.contexts == 2
    session.close()
    session.close()
    assert all(array.freed for array in device.arrays)
    with pytest.raises(BackendError, match="this TensorRT session is closed"):
        session.run([tiles(1)])


def test_scratch_memory_is_what_the_shapes_in_use_take(fake: FakeTensorRt) -> None:
    """So that memory which does not hold a large batch, or tile, holds a smaller one."""
    device = FakeDevice()
    device.free_bytes = 3000
    with session_of(fake, device) as session:
        short = r"8x8 px at batch 4 needs 0 MB of device memory .* use a smaller --tile or --batch"
        with pytest.raises(DeviceMemoryError, match=short):
            session.output_shapes([(4, 1, 8, 8)])
        for seed in range(4):
            assert np.array_equal(session.run([tiles(1, seed=seed)])[0], 2 * tiles(1, seed=seed))
        assert (session.scratch_bytes, len(fake.graphs.graphs)) == (2048, 1)
        assert session.held_bytes == 2048 + 2 * 4 * 64
        device.free_bytes = 2500  # and the 2048 bytes that it holds: enough for the larger batch
        (block,) = [array for array in device.arrays if array.nbytes == 2048]
        for seed in range(4):
            assert np.array_equal(session.run([tiles(4, seed=seed)])[0], 2 * tiles(4, seed=seed))
            assert np.array_equal(session.run([tiles(1, seed=seed)])[0], 2 * tiles(1, seed=seed))
        assert block.freed
        assert session.scratch_bytes == 4096
        session.give_back()
        assert (session.held_bytes, len(fake.graphs.graphs)) == (0, 0)
        assert all(array.freed for array in device.arrays)
        device.free_bytes = 3000
        with pytest.raises(DeviceMemoryError, match=short):
            session.run([tiles(4)])
        assert np.array_equal(session.run([tiles(1)])[0], 2 * tiles(1))


def test_a_gpu_that_is_too_small_is_told_from_a_plan_that_does_not_run(fake: FakeTensorRt) -> None:
    from enum import IntFlag

    diagnostics = IntFlag("EngineInvalidityDiagnostics", {"MALFORMED_ENGINE": 1, "INSUFFICIENT_GPU_MEMORY": 4})
    found = SimpleNamespace(diagnostics=4)
    runtime = SimpleNamespace(get_engine_validity=lambda plan: ("invalid", found.diagnostics))
    rtx = ModuleType("tensorrt_rtx")
    vars(rtx).update(
        __version__="1.7.1", ILogger=fake.ILogger, Runtime=lambda sink: runtime,
        EngineValidity=SimpleNamespace(INVALID="invalid"), EngineInvalidityDiagnostics=diagnostics,
    )  # fmt: skip
    with pytest.raises(DeviceMemoryError, match="the GPU's memory is too small; free what others hold"):
        tensorrt_runtime.deserialize(rtx, b"plan")
    found.diagnostics = 1
    with pytest.raises(EngineError, match="the plan is damaged; use --backend onnxruntime"):
        tensorrt_runtime.deserialize(rtx, b"plan")


def test_shapes_outside_the_plan_name_the_rebuild(fake: FakeTensorRt) -> None:
    device = FakeDevice()
    with session_of(fake, device) as session:
        assert session.output_shapes([(4, 1, 8, 8)]) == [(4, 1, 8, 8)]
        taken = "built for 8x8 px at batch 4, 8x8 px at batch 1 .* build again with --tile"
        with pytest.raises(TileError, match=f"an input of 1x1x16x16 asked, the plan was {taken}"):
            session.run([tiles(1, size=16)])
        with pytest.raises(TileError, match=taken):
            session.output_shapes([(2, 1, 8, 8)])
        x, y = device.empty((1, 1, 8, 8), "f2"), device.empty((1, 1, 8, 8), "f4")
        with pytest.raises(BackendError, match="arrays of 1x1x8x8 float16, 1x1x8x8 float32 given"):
            session.run_device([x], [y])  # type: ignore[list-item]
        with pytest.raises(BackendError, match="2 input"):
            session.run([tiles(1), tiles(1)])


def test_a_failing_run_is_an_error_and_the_next_may_succeed(fake: FakeTensorRt) -> None:
    with session_of(fake) as session:
        fake.fails = True
        with pytest.raises(BackendError, match="TensorRT fails to run 8x8 px at batch 1"):
            session.run([tiles(1)])
        fake.fails = False
        assert np.array_equal(session.run([tiles(1)])[0], 2 * tiles(1))
        fake.fails = True  # while it is being recorded
        with pytest.raises(BackendError, match="fails to run"):
            session.run([tiles(1)])
        assert fake.graphs.recording is None
    with pytest.raises(EngineError, match="refuses the plan: it gives no reason; build the engine again"):
        tensorrt_runtime.deserialize(fake, b"other")


def test_identical_rows_must_agree(fake: FakeTensorRt) -> None:
    with session_of(fake) as session:
        tensorrt.check_rows(session, 1e-3)
        fake.wrong_rows = True
    with session_of(fake) as session, pytest.raises(BackendError, match="8x8 px at batch 4: identical rows"):
        tensorrt.check_rows(session, 1e-3)
