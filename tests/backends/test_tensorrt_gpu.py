"""TensorRT on a GPU: engines against the FP32 baseline per precision, tile and batch; recorded runs; stale plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unet_rt
from unet_rt.backends.onnxruntime import backend as onnxruntime
from unet_rt.backends.tensorrt import backend as tensorrt
from unet_rt.backends.tensorrt.plan import Origin, read_header, read_plan, write_plan
from unet_rt.backends.tensorrt.session import TensorRtSession
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import BackendError, EngineError, TileError

onnx = pytest.importorskip("onnx")

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt, pytest.mark.onnxruntime]

NUCLEI = Path(unet_rt.__file__).parent / "data" / "nuclei.onnx"
TILES, BATCHES = [(256, 256), (128, 128)], [1, 4]
# Largest error of the logits relative to the largest logit, and share of pixels whose class changes. TF32 in place of
# FP32 would show at 1e-4.
BOUNDS = {"fp32": (1e-4, 1e-4), "fp16": (2e-2, 2e-3), "int8": (0.5, 3e-2)}


def pixels(batch: int, tile: tuple[int, int], seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Drawn micrographs, normalised: (batch, 1, *tile)."""
    found = [microscopy(tile, seed=seed + k).image.astype(np.float32) for k in range(batch)]
    return np.stack([(x - x.mean()) / x.std() for x in found])[:, None]


def unsupported(trt: Any) -> str | None:
    """Why a failure to build is the library's limit: TensorRT-RTX lists the compute capabilities that it builds for."""
    from unet_rt.kernels.device import Device

    major, minor = Device.open(0).compute_capability
    if trt.__name__ != "tensorrt_rtx" or hasattr(trt.ComputeCapability, f"SM{major}{minor}"):
        return None
    return f"TensorRT-RTX {trt.__version__} does not list compute capability {major}.{minor}"


def build(model: Path, folder: Path, precision: str, tiles: Any = TILES, batches: Any = BATCHES) -> Path:
    """Builds a plan; where the library refuses this GPU by its own list, the refusal must be an error of ours."""
    reason = tensorrt.missing("cuda:0")
    if reason is not None:
        pytest.skip(reason)
    trt = tensorrt._import()
    blob = folder / "engine.plan"
    try:
        tensorrt.build(
            model, folder / "graph.onnx", precision=precision, device="cuda:0", blob=blob, tiles=tiles, batches=batches
        )
    except BackendError as error:
        # Refusals of the library begin with its name; a wrong precision or rows that disagree are failures anywhere.
        if (why := unsupported(trt)) is not None and str(error).startswith("TensorRT-RTX"):
            pytest.xfail(f"{why}; {error}")
        raise
    return blob


def int8_model(folder: Path) -> Path:
    from unet_rt.building.calibration import calibrate
    from unet_rt.graph.passes.qdq import prepare_graph, quantise, tensors_to_probe

    prepared = prepare_graph(onnx.load(str(NUCLEI)))
    tiles = [[pixels(1, (256, 256), seed)] for seed in range(100, 104)]
    found = calibrate(prepared, tensors_to_probe(prepared), tiles)
    model = quantise(prepared, next(iter(found.ranges.values())), "tensorrt", means=found.means).model
    onnx.save(model, str(folder / "int8.onnx"))
    return folder / "int8.onnx"


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    model = int8_model(folder) if request.param == "int8" else NUCLEI
    return request.param, build(model, folder, request.param)


@pytest.fixture
def session(plan: tuple[str, Path]) -> Iterator[TensorRtSession]:
    precision, blob = plan
    with tensorrt.load(blob.with_name("graph.onnx"), precision=precision, device="cuda:0", blob=blob) as opened:
        yield opened


@pytest.fixture(scope="module")
def baseline() -> Iterator[Any]:
    with onnxruntime.load(NUCLEI, precision="fp32", device="cpu") as opened:
        yield opened


def test_the_plan_says_what_it_is(plan: tuple[str, Path]) -> None:
    precision, blob = plan
    header = read_header(blob)
    print(json.dumps({"layers": header.layers, "variant": header.variant, "gpu": header.origin.gpu}))
    assert (header.precision, len(header.profiles)) == (precision, 4)
    assert sum(header.layers.values()) == 18
    allowed = {"fp32": {"fp32"}, "fp16": {"fp16"}, "int8": {"int8", "fp16"}}[precision]
    assert set(header.layers) <= {*allowed, "unread"}
    assert tensorrt.stale(blob) is None


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("batch", [1, 3, 4, 6])
def test_engines_equal_the_baseline(session: TensorRtSession, baseline: Any, tile: tuple[int, int], batch: int) -> None:
    x = pixels(batch, tile, seed=7)
    wanted = np.concatenate([baseline.run([row[None]])[0] for row in x])
    (found,) = session.run([x])
    assert found.shape == wanted.shape
    found = found.astype(np.float32)
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    changed = float((found.argmax(1) != wanted.argmax(1)).mean())
    print(f"{session.precision} {tile} batch {batch}: error {error:.2e}, labels changed {changed:.2e}")
    assert error <= BOUNDS[session.precision][0]
    assert changed <= BOUNDS[session.precision][1]


def test_identical_rows_agree(session: TensorRtSession) -> None:
    tensorrt.check_rows(session, tensorrt._ROW_TOLERANCE[session.precision])
    for profile in session.header.profiles:
        x = np.repeat(pixels(1, (profile.tile[0], profile.tile[1])), profile.batch, axis=0)
        (found,) = session.run([x])
        differing = [k for k, row in enumerate(found) if not np.array_equal(row, found[0])]
        print(f"{session.precision} {profile}: rows that differ in bits from the first: {differing}")


def test_recorded_runs_give_the_same_bits(session: TensorRtSession) -> None:
    device = session.opened
    shape = session.header.profiles[0].inputs[0]
    (out,) = session.output_shapes([shape])
    x, y = device.empty(shape, session.input_dtypes[0]), device.empty(out, session.output_dtypes[0])
    for seed in range(5):  # plain, recorded, replayed three times
        given = pixels(shape[0], (shape[2], shape[3]), seed).astype(session.input_dtypes[0])
        device.copy_in(x, given, session.stream)
        session.run_device([x], [y])
        assert np.array_equal(y.to_host(session.stream), session.run([given])[0])
    session.forget([x, y])


def test_a_thousand_runs_take_no_memory(session: TensorRtSession) -> None:
    device = session.opened
    given = {p: pixels(p.batch, (p.tile[0], p.tile[1])) for p in session.header.profiles}
    for x in given.values():
        session.run([x])
    arrays = []
    for profile in session.header.profiles:
        (out,) = session.output_shapes(profile.inputs)
        arrays.append(
            (device.empty(profile.inputs[0], session.input_dtypes[0]), device.empty(out, session.output_dtypes[0]))
        )
    for _ in range(3):
        for x, y in arrays:
            session.run_device([x], [y])
    session.stream.synchronize()
    before, _ = device.memory()
    for k in range(1000):
        x, y = arrays[k % len(arrays)]
        session.run_device([x], [y])
    session.stream.synchronize()
    after, _ = device.memory()
    assert after >= before


def test_other_shapes_name_the_rebuild(session: TensorRtSession) -> None:
    with pytest.raises(TileError, match=r"built for 256x256 px at batch 4.* build again with --tile"):
        session.run([pixels(1, (192, 192))])


def test_a_stale_plan_is_refused_and_built_again(plan: tuple[str, Path], tmp_path: Path) -> None:
    precision, blob = plan
    header, data, compiled = read_plan(blob)
    old = tmp_path / "old.plan"
    there = Origin(**{**vars(header.origin), "driver": "1.0"})
    write_plan(old, replace(header, origin=there), data, compiled)
    reason = tensorrt.stale(old)
    assert reason is not None
    assert reason.startswith("old.plan belongs to driver 1.0, here ")
    with pytest.raises(EngineError, match="build the engine again on this machine"):
        tensorrt.load(blob.with_name("graph.onnx"), precision=precision, device="cuda:0", blob=old)
    rebuilt = build(blob.with_name("graph.onnx"), tmp_path, precision, TILES[1:], [1])
    assert tensorrt.stale(rebuilt) is None
    x = pixels(1, TILES[1])
    with (
        tensorrt.load(tmp_path / "graph.onnx", precision=precision, device="cuda:0", blob=rebuilt) as new,
        tensorrt.load(blob.with_name("graph.onnx"), precision=precision, device="cuda:0", blob=blob) as first,
    ):
        a, b = (s.run([x])[0].astype(np.float32) for s in (new, first))
    assert np.abs(a - b).max() <= tensorrt._ROW_TOLERANCE[precision] * np.abs(b).max()


@pytest.mark.torch
def test_forms_of_a_graph_are_measured(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import networks

    from unet_rt.models.stored import load_half

    network = load_half(NUCLEI.with_name("paper_w8.npz"))
    networks.export(network, [(1, 1, 188, 188)], tmp_path / "paper.onnx", free_batch=True)
    blob = build(tmp_path / "paper.onnx", tmp_path, "fp16", [(284, 284)], [4])
    header = read_header(blob)
    print(header.variant, header.measured_ms)
    assert {"native", "up_conv"} <= set(header.measured_ms)
    assert header.measured_ms[header.variant] == min(header.measured_ms.values())
    x = pixels(4, (284, 284))
    with (
        torch.inference_mode(),
        tensorrt.load(tmp_path / "graph.onnx", precision="fp16", device="cuda:0", blob=blob) as opened,
    ):
        wanted = network(torch.from_numpy(x)).numpy()
        (found,) = opened.run([x])
    changed = float((found.argmax(1) != wanted.argmax(1)).mean())
    assert changed <= 2e-3
    assert sorted(path.name for path in tmp_path.glob("graph*")) == ["graph.onnx"]
