"""The pipeline on a GPU equals the one on the host bit for bit, given the same network outputs.

Without a GPU it runs on a device made of host memory (``host_device``), whose streams do their work as late, or as
early, as events allow, with kernels that run on the host.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_device import HostDevice, HostSession, host, use_host_kernels

import unet_rt as urt
from unet_rt import backends
from unet_rt.baseline.model import open_model
from unet_rt.baseline.tiles import blended_spec, untiled_spec
from unet_rt.cli.demo import shipped_model
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.drawing.microscopy import microscopy
from unet_rt.engine.engine import Engine, EngineView
from unet_rt.images.open import open_image
from unet_rt.kernels.device import DeviceArray, DeviceMemoryError
from unet_rt.prediction import bands, compute, rows
from unet_rt.prediction import device as predict_device
from unet_rt.prediction.report import RunReport
from unet_rt.prediction.store import ArrayStore
from unet_rt.prediction.work import Computation
from unet_rt.prediction.workspace import WORKSPACES
from unet_rt.tiling.grid import square_tile

pytestmark = pytest.mark.onnxruntime

Array = np.ndarray[Any, np.dtype[Any]]
NONE = Normalization("none")
LOGITS = Contract(task="multiclass", output_is="logits", normalization=NONE)
SCALE = Contract(task="multiclass", output_is="logits", normalization=Normalization("scale", scale=255.0))
EAGER = [subset for n in range(4) for subset in itertools.combinations(range(3), n)]


@pytest.fixture(scope="session")
def engine_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    """CPU engines by ONNX file and contract."""
    folder = tmp_path_factory.mktemp("graphs")

    @cache
    def load(path: Path, contract: Contract | None = None, tile: int = 0, blend: bool = False) -> Engine:
        work = folder / str(len(list(folder.iterdir())))
        work.mkdir()
        model = open_model(path, work, options=contract)
        spec = untiled_spec(model)
        if blend:
            spec = blended_spec(spec, (tile,) * spec.spatial, path)
        else:
            side = tile or (120 if spec.spatial == 2 else 24)
            spec = replace(spec, tile=square_tile(spec.sizes, spec.outputs, side**spec.spatial))
        graph = work / "built.onnx"
        backend = backends.get("onnxruntime")
        backend.build(model.graph, graph, precision="fp32", device="cpu")
        session = backend.load(graph, precision="fp32", device="cpu", threads=1)
        return Engine(replace(spec, backend="onnxruntime"), session)

    return load


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """ONNX files of generated networks, by their parameters."""
    pytest.importorskip("torch")
    import networks

    folder = tmp_path_factory.mktemp("networks")

    @cache
    def make(**parameters: Any) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.onnx"
        spec = networks.UNetSpec(**parameters)
        side = 32 if spec.dims == 2 else 16
        if spec.valid:
            side = 60
        networks.export(networks.build(spec), [(1, spec.inputs, *(side,) * spec.dims)], path, free_batch=True)
        return path

    return make


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """The same engine on a device of host memory."""

    def make(
        engine: Engine,
        *,
        eager: tuple[int, ...] = (),
        dtype: Any = np.float32,
        device: Any = None,
        bytes_per_px: int = 0,
    ) -> Engine:
        device = device or HostDevice(eager=eager)
        use_host_kernels(monkeypatch, device)
        session: Any = HostSession(engine, device, dtype, bytes_per_px)
        return Engine(replace(engine.spec, device="cuda:0"), session)

    return make


def session_of(engine: Engine) -> HostSession:
    session = engine._session
    assert isinstance(session, HostSession)
    return session


def both(cpu: Engine, gpu: Engine, image: Any, **options: Any) -> tuple[Array, Array]:
    """(expected, found); reports are compared as well."""
    reports: list[RunReport] = []
    expected = urt.predict(cpu, image, report=reports.append, **options)
    found = urt.predict(gpu, image, report=reports.append, **options)
    a, b = reports
    assert (a.tiles, a.tile, a.halo, a.class_share) == (b.tiles, b.tile, b.halo, b.class_share)
    assert (a.outside_range, a.mpx, a.notes, b.device) == (b.outside_range, b.mpx, b.notes, "cuda:0")
    assert set(a.stages) == set(b.stages)
    return expected, found


@pytest.fixture(scope="session")
def nuclei(engine_for) -> Engine:
    return engine_for(shipped_model(), tile=192)


@pytest.fixture(scope="session")
def image() -> Array:
    return microscopy((203, 171), seed=77).image


# --- the same result ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small(engine_for, network) -> Engine:
    """A network of little halo, so that small images have many tiles."""
    return engine_for(network(depth=1, classes=3), LOGITS, tile=40)


@pytest.fixture(scope="session")
def texture() -> Array:
    import networks

    return networks.texture((1, 1, 231, 71), seed=5)[0, 0]


@pytest.mark.parametrize("eager", EAGER, ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_whatever_order_the_streams_work_in(small, texture, on_device, eager, batch):
    """Streams: 0 computes, 1 copies in, 2 copies out. More rows of tiles than slots, so that all slots are reused."""
    gpu = on_device(small, eager=eager)
    expected, found = both(small, gpu, texture, tile=(40, 48), batch=batch)
    assert small.spec.grid(texture.shape, (40, 48)).shape[0] > 2 * rows.WINDOWS
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) == 3


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 5), (57, 131), (203, 171)])
@pytest.mark.parametrize("output", ["mask", "probability", "raw"])
def test_any_image_and_output(nuclei, image, on_device, shape, output):
    gpu = on_device(nuclei)
    expected, found = both(
        nuclei, gpu, np.ascontiguousarray(image[: shape[0], : shape[1]]), output=output, tile=(192, 160), batch=3
    )
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_batches_span_rows_and_planes_and_have_one_size(small, texture, on_device):
    gpu = on_device(small)
    stack = np.stack([texture, texture[::-1], texture[:, ::-1]])
    expected, found = both(small, gpu, stack, axes="TYX", tile=(48, 40), batch=8)
    np.testing.assert_array_equal(found, expected)
    count = 3 * small.spec.grid(texture.shape, (48, 40)).count
    assert [shape for (shape,) in session_of(gpu).runs] == [(8, 1, 48, 40)] * -(-count // 8)
    assert count % 8


@pytest.mark.parametrize("parameters", [{"inputs": 3, "norm": "batch"}, {"valid": True}])
def test_networks(engine_for, network, on_device, parameters):
    cpu = engine_for(network(**parameters), SCALE, tile=76)
    channels = parameters.get("inputs", 1)
    picture = np.random.default_rng(1).integers(0, 256, (151, 133, 3)[: 3 if channels == 3 else 2], np.uint8)
    for eager in ((), (1,), (0, 2)):
        for dtype in (np.float32, np.float16):
            gpu = on_device(cpu, eager=eager, dtype=dtype)
            as_host = Engine(cpu.spec, Rounded(session_of(gpu)))  # type: ignore[arg-type]
            for pixels in (picture, np.asfortranarray(picture), picture[::-1]):
                expected, found = both(as_host, gpu, pixels, output="raw", batch=2)
                np.testing.assert_array_equal(found, expected)


class Rounded:
    """The host's side of a :class:`HostSession`: the same numbers, but no device."""

    def __init__(self, session: HostSession) -> None:
        self.run, self.close = session.run, session.close


def test_a_volume(engine_for, network, on_device):
    import networks

    cpu = engine_for(network(dims=3, depth=1, convs=1), LOGITS)
    volume = networks.texture((1, 1, 41, 30, 26), seed=2)[0, 0]
    expected, found = both(cpu, on_device(cpu), volume, batch=3)
    assert len(np.unique(expected)) == 2
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("eager", EAGER, ids=str)
def test_blended(engine_for, network, on_device, eager):
    import networks

    cpu = engine_for(network(norm="instance"), LOGITS, tile=48, blend=True)
    pixels = networks.texture((1, 1, 171, 101), seed=9)[0, 0]
    gpu = on_device(cpu, eager=eager)
    for output in ("raw", "mask"):
        expected, found = both(cpu, gpu, np.stack([pixels, pixels[::-1]]), axes="TYX", output=output, batch=4)
        assert cpu.spec.grid(pixels.shape).shape[0] > 2 * bands.BANDS
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("placement", ["monai", "nnunet"])
def test_blended_as_other_tools_do(engine_for, network, on_device, placement):
    """Their windows, weights and zeros around, per channel, also where the image is smaller than the window."""
    import networks

    contract = replace(LOGITS, normalization=Normalization("fixed", mean=(3.0, -2.0), std=(2.0, 5.0)))
    even = engine_for(network(norm="instance", inputs=2), contract, tile=48, blend=True)
    undeclared = replace(even.spec, contract=replace(even.spec.contract, border=None))
    cpu = EngineView(even, blended_spec(undeclared, (48, 48), Path("m.onnx"), placement=placement))
    for shape in ((171, 101), (31, 70), (20, 33)):
        pixels = np.concatenate([networks.texture((1, 1, *shape), seed=k)[0] for k in range(2)])
        expected, found = both(cpu, on_device(cpu), pixels, axes="CYX", output="raw", batch=4)
        np.testing.assert_array_equal(found, expected)
        assert not np.array_equal(urt.predict(even, pixels, axes="CYX", output="raw"), expected)


def test_multilabel_and_binary(engine_for, network, on_device):
    import networks

    pixels = networks.texture((1, 1, 90, 74), seed=9)[0, 0]
    for classes, task in ((3, "multilabel"), (1, "binary")):
        contract = Contract(task=task, output_is="logits", threshold=(0.4,), normalization=NONE)  # type: ignore[arg-type]
        cpu = engine_for(network(classes=classes, depth=1), contract, tile=40)
        for options in ({}, {"mask_values": (3, 9)}, {"output": "probability"}):
            expected, found = both(cpu, on_device(cpu), pixels, batch=2, **options)
            assert found.shape == expected.shape
            np.testing.assert_array_equal(found, expected)


def test_files(nuclei, image, on_device, tmp_path):
    gpu = on_device(nuclei)
    np.save(tmp_path / "image.npy", image)
    urt.predict(gpu, tmp_path / "image.npy", out=tmp_path / "mask.npy", overlay=tmp_path / "overlay.png", batch=2)
    np.testing.assert_array_equal(np.load(tmp_path / "mask.npy"), urt.predict(nuclei, image))
    urt.predict(nuclei, image, out=tmp_path / "other.npy", overlay=tmp_path / "expected.png")
    assert (tmp_path / "overlay.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


# --- images on the device -----------------------------------------------------------------------------------------


class OnDevice:
    """An array on a device of host memory, as another library would hand it over."""

    def __init__(self, device: HostDevice, pixels: Array) -> None:
        self.array = device.empty(pixels.shape, pixels.dtype)
        self.stream = device.stream()
        self.stream.enqueue(lambda: np.copyto(host(self.array), pixels))  # made by work that has not run yet

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.array.__cuda_array_interface__, "stream": self.stream.handle}


@pytest.fixture
def shared_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[HostDevice], None]:
    def use(device: HostDevice) -> None:
        def from_array(array: OnDevice, name: str) -> Any:
            return array.array, array.stream.handle

        monkeypatch.setattr("unet_rt.kernels.device.from_array", from_array)

    return use


@pytest.mark.parametrize("eager", [(), (0,), (0, 1, 2)], ids=str)
def test_an_image_on_the_device_stays_there(nuclei, image, on_device, shared_with, eager):
    gpu = on_device(nuclei, eager=eager)
    device = session_of(gpu).stream.device
    shared_with(device)
    for options in ({}, {"output": "raw"}, {"mask_values": (0, 255)}):
        found = urt.predict(gpu, OnDevice(device, image), batch=3, tile=(192, 160), **options)
        assert isinstance(found, DeviceArray)
        expected = urt.predict(nuclei, image, **options)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(host(found), expected)


def test_channels_of_an_image_on_the_device(engine_for, network, on_device, shared_with):
    cpu = engine_for(network(inputs=3, norm="batch"), SCALE, tile=76)
    gpu = on_device(cpu)
    device = session_of(gpu).stream.device
    shared_with(device)
    picture = np.random.default_rng(1).integers(0, 256, (91, 83, 3), np.uint8)
    for channels in (None, (2, 1, 0), (0, 0, 0), (0, 2, 1)):
        for axes, pixels in (("YXC", picture), ("CYX", np.ascontiguousarray(np.moveaxis(picture, -1, 0)))):
            options = {"axes": axes, "channels": channels, "output": "raw"}
            found = urt.predict(gpu, OnDevice(device, pixels), batch=2, **options)
            np.testing.assert_array_equal(host(found), urt.predict(cpu, pixels, **options))
    four = np.random.default_rng(1).integers(0, 256, (2, 4, 91, 83), np.uint8)
    found = urt.predict(gpu, OnDevice(device, four), output="raw", axes="TCYX", channels=(1, 2, 3))
    np.testing.assert_array_equal(host(found), urt.predict(cpu, four, output="raw", axes="TCYX", channels=(1, 2, 3)))


def test_results_on_the_device_can_be_counted_and_drawn(nuclei, image, on_device, shared_with, tmp_path):
    gpu = on_device(nuclei)
    device = session_of(gpu).stream.device
    shared_with(device)
    reports: list[RunReport] = []
    urt.predict(gpu, OnDevice(device, image), report=reports.append, overlay=tmp_path / "a.png")
    urt.predict(nuclei, image, report=reports.append, overlay=tmp_path / "b.png")
    assert reports[0].class_share == reports[1].class_share
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    urt.predict(gpu, OnDevice(device, image), out=tmp_path / "mask.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "mask.npy"), urt.predict(nuclei, image))


def test_a_large_image_on_the_device_is_written_in_one_go(nuclei, image, on_device, shared_with, tmp_path, monkeypatch):
    """On the host it would be made in blocks, which are kept; what lies on a device is predicted as it is."""
    monkeypatch.setattr("unet_rt.prediction.blocks.LARGE_PX", 1)
    gpu = on_device(nuclei)
    device = session_of(gpu).stream.device
    shared_with(device)
    urt.predict(gpu, OnDevice(device, image), out=tmp_path / "mask.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "mask.npy"), urt.predict(nuclei, image))
    with pytest.raises(urt.ImageError, match="lies on a GPU, where images are predicted as they are"):
        urt.predict(gpu, OnDevice(device, image), out=tmp_path / "mask.zarr")


def test_an_image_on_another_device_is_refused(nuclei, image, on_device, shared_with):
    gpu = on_device(nuclei)
    other = HostDevice(index=1)
    shared_with(other)
    with pytest.raises(urt.ImageError, match=r"cuda:1 and the engine runs on cuda:0"):
        urt.predict(gpu, OnDevice(other, image))
    with pytest.raises(urt.ImageError, match=r"cuda:1 and the engine runs on cpu"):
        urt.predict(nuclei, OnDevice(other, image))


# --- what goes wrong, and what is left behind ---------------------------------------------------------------------


@pytest.mark.parametrize("eager", [(), (0, 1, 2)], ids=str)
def test_non_finite_pixels_are_refused(engine_for, network, on_device, eager):
    cpu = engine_for(network(), LOGITS, tile=48)
    pixels = np.random.default_rng(0).normal(size=(231, 60)).astype(np.float32)
    pixels[170, 33] = np.nan
    gpu = on_device(cpu, eager=eager)
    with pytest.raises(urt.ImageError, match=r"NaN or infinite pixels \(as float32\) in plane 0, rows"):
        urt.predict(gpu, pixels, batch=3)
    with pytest.raises(urt.ImageError, match=r"NaN or infinite pixels \(as float32\) in plane 1, rows"):
        urt.predict(gpu, np.stack([np.zeros_like(pixels), pixels]), axes="TYX", batch=3)
    assert np.isfinite(urt.predict(gpu, np.nan_to_num(pixels), batch=3, output="raw")).all()


@pytest.mark.parametrize("where", ["reading", "inferring", "writing", "progress", "interrupt"])
def test_a_failure_anywhere_reaches_the_caller(small, texture, on_device, tmp_path, monkeypatch, where):
    nuclei, tall = small, texture
    gpu = on_device(nuclei)
    urt.predict(gpu, tall, tile=(40, 48))
    device = session_of(gpu).stream.device
    held, threads, calls = device.held, threading.active_count(), itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) >= 2:
            raise KeyboardInterrupt if where == "interrupt" else OSError(28, "No space left on device")

    options: dict[str, Any] = {}
    if where == "reading":
        monkeypatch.setattr("unet_rt.prediction.rows.pack", fail)
    elif where == "inferring":
        session_of(gpu).fail_at = len(session_of(gpu).runs) + 5
    elif where == "writing":
        monkeypatch.setattr("unet_rt.prediction.work.count_labels", fail)
    else:
        options["progress"] = fail
    with pytest.raises((OSError, RuntimeError, TypeError, KeyboardInterrupt)):
        urt.predict(gpu, tall, out=tmp_path / "mask.npy", tile=(40, 48), **options)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads
    assert device.held == held
    for stream in device.streams.values():
        assert stream._next == len(stream._work)  # nothing is left to run on memory that may be gone
    monkeypatch.undo()
    session_of(gpu).fail_at = -1
    use_host_kernels(monkeypatch, device)
    np.testing.assert_array_equal(urt.predict(gpu, tall, tile=(40, 48)), urt.predict(nuclei, tall, tile=(40, 48)))


def test_device_memory_does_not_grow(small, texture, on_device):
    nuclei, image = small, texture
    gpu = on_device(nuclei)
    device = session_of(gpu).stream.device
    before = device.held
    small = urt.predict(gpu, image, tile=(40, 48), batch=2)
    held = device.held
    urt.predict(gpu, np.concatenate([image] * 6), tile=(40, 48), batch=2)
    assert device.held - held < 1024, "a longer image takes no more memory"
    for _ in range(20):
        np.testing.assert_array_equal(urt.predict(gpu, image, tile=(40, 48), batch=2), small)
    assert device.held - held < 1024
    urt.predict(gpu, image, tile=(40, 48), batch=2, output="raw")
    gpu.close()
    assert device.held == before


def test_smaller_batches_where_memory_is_short(small, texture, on_device):
    gpu = on_device(small)
    device = session_of(gpu).stream.device
    urt.predict(gpu, texture, tile=(40, 48), batch=4)
    device.limit = device.held
    reports: list[RunReport] = []
    found = urt.predict(gpu, texture, tile=(40, 48), batch=16, report=reports.append)
    np.testing.assert_array_equal(found, urt.predict(small, texture, tile=(40, 48)))
    assert session_of(gpu).runs[-1][0][0] == 4
    assert reports[0].notes == ["the device is out of memory; 4 tiles per run instead of 8"]
    assert reports[0].batch == 4
    device.limit = 100
    with pytest.raises(urt.BackendError, match="out of memory"):
        urt.predict(gpu, texture, tile=(48, 48), batch=16)
    assert device.held == 0


def test_memory_that_is_short_is_found_out_once(small, texture, on_device, monkeypatch):
    """Later groups of blocks run the batch that the first one ended with."""
    monkeypatch.setattr("unet_rt.prediction.blocks.TILES", 2)
    monkeypatch.setattr("unet_rt.prediction.run.DEVICE_WORKS", 2)
    gpu, options = on_device(small), {"tile": (40, 48), "memory_bytes": 2**40}
    device = session_of(gpu).stream.device
    urt.predict(gpu, texture, batch=4, **options)
    device.limit, refused, real = device.held, list[Any](), device.empty

    def empty(shape: Any, dtype: Any) -> Any:
        try:
            return real(shape, dtype)
        except DeviceMemoryError:
            refused.append(shape)
            raise

    monkeypatch.setattr(device, "empty", empty)
    reports: list[RunReport] = []
    found = urt.predict(gpu, texture, batch=16, report=reports.append, **options)
    np.testing.assert_array_equal(found, urt.predict(small, texture, tile=(40, 48)))
    assert reports[0].batch == 4
    assert len(refused) == 2  # of 16 tiles, and of 8


def test_the_batches_of_a_plan_are_all_tried(small, texture, on_device):
    """Of 1, 4 and 16 tiles: 16 are too many, and so the next is 4, though half of 16 would be held by 16 only."""
    plan = planned(small, (40, 48), batches=(1, 4, 16))
    assert [plan.fewer(n) for n in (16, 10, 4, 3, 1)] == [4, 4, 1, 1, 1]
    assert [small.fewer(n) for n in (16, 5, 1)] == [8, 2, 1]
    gpu = on_device(plan, bytes_per_px=100)
    session_of(gpu).stream.device.limit = 8 * 100 * 40 * 48
    reports: list[RunReport] = []
    found = urt.predict(gpu, texture, report=reports.append)
    np.testing.assert_array_equal(found, urt.predict(plan, texture))
    assert reports[0].notes == ["the device is out of memory; 4 tiles per run instead of 16"]


# --- smaller tiles ------------------------------------------------------------------------------------------------


def planned(engine: Engine, *tiles: tuple[int, ...], batches: tuple[int, ...] = (1, 4)) -> Engine:
    """The engine as one of a plan for these tiles and batches."""
    sizes = tuple(replace(s, fixed=t) for s, t in zip(engine.spec.sizes, tiles[0], strict=True))
    spec = replace(engine.spec, tile=tiles[0], tiles=tiles, sizes=sizes, batches=batches, run_batch=batches[-1])
    return Engine(spec, engine._session)


def short_of_memory(engine: Engine, holds: int) -> HostDevice:
    """Its device, with memory for runs of so many pixels beside 0.3 MB of buffers."""
    session = session_of(engine)
    device = session.stream.device
    device.limit = holds * session._bytes_per_px + 300_000
    return device


LARGE, SMALL = (64, 80), (32, 40)
NOTE = "the device is out of memory; tiles of 32x40 px instead of 64x80, for the same result"


@pytest.mark.parametrize("shape", [(231, 71), (50, 30), (70, 71)], ids=str)
@pytest.mark.parametrize("output", ["mask", "raw"])
def test_a_plan_falls_to_its_smaller_tile(small, texture, on_device, shape, output):
    """On the canvas of the larger one: an image smaller than that has the same pixels behind its ends."""
    plan = planned(small, LARGE, SMALL)
    gpu = on_device(plan, bytes_per_px=1000)
    device = short_of_memory(gpu, 2000)
    pixels, reports = np.ascontiguousarray(texture[: shape[0], : shape[1]]), list[RunReport]()
    found = urt.predict(gpu, pixels, output=output, report=reports.append)
    np.testing.assert_array_equal(found, urt.predict(plan, pixels, output=output))
    assert {run[0] for run in session_of(gpu).runs} == {(1, 1, *SMALL)}
    (report,) = reports
    assert (report.tile, report.batch) == (SMALL, 1)
    assert report.notes == [NOTE, "the device is out of memory; 1 tiles per run instead of 4"]
    again = urt.predict(gpu, pixels, output=output)
    np.testing.assert_array_equal(again, found)
    device.limit = 2**34  # memory that was short is there again, and so is the tile
    urt.predict(gpu, pixels, output=output, report=reports.append)
    assert (reports[1].tile, reports[1].notes) == (LARGE, [])


def test_what_larger_tiles_took_is_given_back_first(small, texture, on_device):
    """Memory holds what a run of the larger tile takes, and not the pixels and results beside it."""
    plan, reports = planned(small, LARGE, SMALL), list[RunReport]()
    gpu = on_device(plan, bytes_per_px=1000)
    session_of(gpu).stream.device.limit = 1000 * LARGE[0] * LARGE[1] + 60_000
    found = urt.predict(gpu, texture, batch=1, report=reports.append)
    np.testing.assert_array_equal(found, urt.predict(plan, texture))
    assert (reports[0].tile, reports[0].notes) == (SMALL, [NOTE])


def test_what_earlier_predictions_took_is_given_back_first(small, texture, on_device):
    """Memory would hold the tile, but for that."""
    gpu, reports = on_device(planned(small, LARGE, SMALL), bytes_per_px=1000), list[RunReport]()
    short_of_memory(gpu, LARGE[0] * LARGE[1])
    urt.predict(gpu, texture, tile=SMALL)
    urt.predict(gpu, texture, batch=1, report=reports.append)
    assert (reports[0].tile, reports[0].batch, reports[0].notes) == (LARGE, 1, [])


def test_an_engine_of_any_size_falls_to_smaller_tiles(small, texture, on_device, shared_with):
    gpu = on_device(Engine(replace(small.spec, tile=(64, 64)), small._session), bytes_per_px=1000)
    device = short_of_memory(gpu, 1500)
    reports: list[RunReport] = []
    found = urt.predict(gpu, texture, output="raw", batch=2, report=reports.append)
    np.testing.assert_array_equal(found, urt.predict(small, texture, output="raw"))
    (report,) = reports
    first = gpu.spec.grid(texture.shape).tile
    assert report.tile[0] * report.tile[1] <= 1800
    assert report.notes[0].startswith("the device is out of memory; tiles of ")
    assert f"instead of {first[0]}x{first[1]}" in report.notes[0]
    device.limit = 2**34
    shared_with(device)
    given = OnDevice(device, texture)
    gpu.close()
    short_of_memory(gpu, 1500).limit += device.held + 4 * texture.nbytes
    on_gpu = urt.predict(gpu, given, output="raw", report=reports.append)
    np.testing.assert_array_equal(host(on_gpu), found)
    assert reports[1].tile[0] * reports[1].tile[1] < first[0] * first[1]


def test_a_tile_that_was_asked_for_stays(small, texture, on_device, tmp_path):
    gpu = on_device(planned(small, LARGE, SMALL), bytes_per_px=1000)
    device = short_of_memory(gpu, 2000)
    refused = r"out of memory; --tile 64x80 was asked: use --tile 32x40, or leave --tile away"
    for options in ({}, {"out": tmp_path / "mask.npy"}, {"memory_bytes": 2**40}, {"out": tmp_path / "mask.zarr"}):
        with pytest.raises(DeviceMemoryError, match=refused):
            urt.predict(gpu, texture, tile=LARGE, **options)
    assert device.held == 0
    expected = urt.predict(planned(small, LARGE), texture)
    np.testing.assert_array_equal(urt.predict(gpu, texture, tile=SMALL), expected)
    gpu = on_device(small, bytes_per_px=1000)
    short_of_memory(gpu, 2000)
    with pytest.raises(DeviceMemoryError, match=r"--tile 64x48 was asked: use --tile \d+x\d+, or leave"):
        urt.predict(gpu, texture, tile=(64, 48))


@pytest.mark.parametrize("why", ["one tile", "measured halo", "given halo", "blended", "too little for either"])
def test_no_smaller_tile_is_an_error(small, texture, on_device, engine_for, network, why):
    engine = planned(small, LARGE, SMALL)
    if why == "one tile":
        engine = planned(small, LARGE)
    elif why == "blended":
        engine = engine_for(network(norm="instance"), LOGITS, tile=48, blend=True)
    elif "halo" in why:
        engine = Engine(replace(engine.spec, halo=why.split()[0], halo_limit=1), engine._session)
    gpu = on_device(engine, bytes_per_px=1000)
    device = short_of_memory(gpu, 500 if "little" in why else 2000)
    with pytest.raises(DeviceMemoryError, match=r"^the device is out of memory$"):
        urt.predict(gpu, texture)
    assert device.held == 0
    assert not session_of(gpu).runs


def test_what_was_begun_does_not_begin_again(small, texture, on_device):
    gpu = on_device(planned(small, LARGE, SMALL), bytes_per_px=1000)
    session_of(gpu).fail_at, session_of(gpu).failure = 3, DeviceMemoryError("others took it all")
    with pytest.raises(DeviceMemoryError, match=r"^others took it all$"):
        urt.predict(gpu, texture, batch=1)
    assert {run[0][2:] for run in session_of(gpu).runs} == {LARGE}


@pytest.mark.parametrize("options", [{}, {"region": True}, {"out": "mask.npy"}, {"out": "mask.zarr"}], ids=str)
def test_blocks_are_filled_by_smaller_tiles(small, texture, on_device, monkeypatch, tmp_path, options):
    """The blocks stay: other shards, and what an earlier run has kept, know nothing of tiles."""
    monkeypatch.setattr("unet_rt.prediction.blocks.TILES", 2)
    monkeypatch.setattr("unet_rt.prediction.run.DEVICE_WORKS", 2)
    wide, plan = np.concatenate([texture] * 3, axis=1), planned(small, LARGE, SMALL)
    if "region" in options:  # blocks that need no tile are kept before the first tile finds no memory
        wanted = np.zeros(wide.shape, np.uint8)
        wanted[150:, 100:] = 1
        np.save(tmp_path / "region.npy", wanted)
        options = {"region": tmp_path / "region.npy"}
    gpu, reports, told = on_device(plan, bytes_per_px=1000), list[RunReport](), list[tuple[int, int]]()
    inside = {key: value for key, value in options.items() if key == "region"}
    expected = urt.predict(plan, wide, memory_bytes=2**40, report=reports.append, **inside)
    options = {key: tmp_path / value for key, value in options.items()}
    short_of_memory(gpu, 2000)
    found = urt.predict(
        gpu, wide, memory_bytes=2**40, report=reports.append, progress=lambda *n: told.append(n), **options
    )
    if "out" in options:
        found = open_image(found, Contract(), spatial=2).read(0, (0, 0), wide.shape)[0]
    np.testing.assert_array_equal(found, expected)
    large, report = reports
    assert (report.notes[0], large.notes) == (NOTE, [])
    assert (report.tile, large.tile) == (SMALL, LARGE)
    assert report.class_share == large.class_share, "no block is counted twice"
    assert report.tiles == len([n for run in session_of(gpu).runs for n in range(run[0][0])])
    assert told[-1][0] == told[-1][1]
    assert {run[0] for run in session_of(gpu).runs} == {(1, 1, *SMALL)}


def test_no_block_is_kept_twice(small, texture, on_device, monkeypatch, tmp_path):
    """Those that need no tile are kept before the first tile finds no memory."""
    monkeypatch.setattr("unet_rt.prediction.blocks.TILES", 1)
    wanted = np.zeros(texture.shape, np.uint8)
    wanted[200:] = 1
    np.save(tmp_path / "region.npy", wanted)
    kept, keep = list[int](), ArrayStore.keep
    monkeypatch.setattr(
        ArrayStore, "keep", lambda store, block, *rest: kept.append(block.number) or keep(store, block, *rest)
    )
    plan = planned(small, LARGE, SMALL)
    gpu = on_device(plan, bytes_per_px=1000)
    short_of_memory(gpu, 2000)
    found = urt.predict(gpu, texture, region=tmp_path / "region.npy")
    np.testing.assert_array_equal(found, np.where(wanted, urt.predict(plan, texture), 0))
    assert kept == list(range(len(kept)))
    assert len(kept) > 3


def test_tiles_do_not_change_once_some_were_run(small, texture, on_device, monkeypatch):
    """Others took the memory after the first blocks: what was computed is not reported twice, or lost from the report."""
    monkeypatch.setattr("unet_rt.prediction.blocks.TILES", 2)
    monkeypatch.setattr("unet_rt.prediction.run.DEVICE_WORKS", 1)
    gpu, real = on_device(planned(small, LARGE, SMALL), bytes_per_px=1000), predict_device.run

    def run(*arguments: Any, **options: Any) -> RunReport:
        report = real(*arguments, **options)
        WORKSPACES[session_of(gpu)].free()
        session_of(gpu).give_back()
        short_of_memory(gpu, 2000)
        return report

    monkeypatch.setattr(predict_device, "run", run)
    with pytest.raises(DeviceMemoryError, match=r"^the device is out of memory$"):
        urt.predict(gpu, np.concatenate([texture] * 3, axis=1), memory_bytes=2**40)
    assert {run[0][2:] for run in session_of(gpu).runs} == {LARGE}


def test_an_interrupted_run_goes_on_with_smaller_tiles(small, texture, on_device, monkeypatch, tmp_path):
    monkeypatch.setattr("unet_rt.prediction.blocks.TILES", 2)
    monkeypatch.setattr("unet_rt.prediction.run.DEVICE_WORKS", 2)
    plan, out, reports = planned(small, LARGE, SMALL, batches=(1,)), tmp_path / "mask.zarr", list[RunReport]()
    gpu = on_device(plan, bytes_per_px=1000)
    gpu.folder = SimpleNamespace(files={"graph": {"sha256": "0"}}, parity=None)  # what a stage tells an engine by
    wide = np.concatenate([texture] * 3, axis=1)
    np.save(tmp_path / "image.npy", wide)
    session_of(gpu).fail_at, session_of(gpu).failure = 5, DeviceMemoryError("others took it all")
    with pytest.raises(DeviceMemoryError, match="others took it all"):
        urt.predict(gpu, tmp_path / "image.npy", out=out)
    gpu.close()
    short_of_memory(gpu, 2000)
    session_of(gpu).fail_at = -1
    urt.predict(gpu, tmp_path / "image.npy", out=out, report=reports.append)
    found = open_image(out, Contract(), spatial=2).read(0, (0, 0), wide.shape)[0]
    np.testing.assert_array_equal(found, urt.predict(plan, wide))
    assert any("were there from an earlier run" in note for note in reports[0].notes)
    assert NOTE in reports[0].notes


def test_a_head_is_predicted_where_the_engine_runs(small, texture, on_device):
    """It is another number of an output, and no other engine: tiles do not go by the host."""
    gpu, head = on_device(small), small.spec.outputs[0].name
    found = urt.predict(gpu, texture, tile=(40, 48), batch=3, head=head)
    np.testing.assert_array_equal(found, urt.predict(small, texture, tile=(40, 48)))
    assert {shape for (shape,) in session_of(gpu).runs} == {(3, 1, 40, 48)}


def test_views_fall_to_smaller_tiles_as_well(small, texture, on_device):
    options: dict[str, Any] = {"tta": "flip"}
    plan, wide = planned(small, LARGE, SMALL), np.concatenate([texture[:100]] * 3, axis=1)
    gpu, reports = on_device(plan, bytes_per_px=1000), list[RunReport]()
    short_of_memory(gpu, 2000)
    found = urt.predict(gpu, wide, output="raw", report=reports.append, **options)
    np.testing.assert_array_equal(found, urt.predict(plan, wide, output="raw", **options))
    assert (reports[0].tile, reports[0].batch) == (SMALL, 1)
    assert NOTE in reports[0].notes
    short_of_memory(gpu, 2 * LARGE[0] * LARGE[1])
    urt.predict(gpu, wide, output="raw", report=reports.append, **options)
    assert (reports[1].tile, reports[1].batch) == (LARGE, 1)
    assert "the device is out of memory; 1 tiles per run instead of 4" in reports[1].notes
    session_of(gpu).give_back()
    urt.predict(gpu, wide, tile=SMALL, **options)  # what it takes is in the way, and is given back
    short_of_memory(gpu, LARGE[0] * LARGE[1])
    urt.predict(gpu, wide, output="raw", report=reports.append, batch=1, **options)
    assert (reports[2].tile, reports[2].notes[:1]) == (LARGE, [])
    session_of(gpu).give_back()
    short_of_memory(gpu, 2000)
    with pytest.raises(DeviceMemoryError, match="--tile 64x80 was asked: use --tile 32x40"):
        urt.predict(gpu, wide, tile=LARGE, **options)


@pytest.mark.parametrize(("what", "most_px"), [("plain", 2800), ("tta", 2800), ("blocks", 1824)])
def test_tiles_are_sized_by_the_device_s_memory(small, texture, on_device, tmp_path, what, most_px):
    """Not by the host's; and what an engine holds since its last prediction is its own to use.

    8 MB, 1000 bytes per pixel: 0.35 of them for a run; of blocks 0.25, with 96 bytes more for tiles that wait.
    """
    np.save(tmp_path / "region.npy", np.ones(texture.shape, np.uint8))
    options = {"plain": {}, "tta": {"tta": "flip"}, "blocks": {"region": tmp_path / "region.npy"}}[what]
    spec = replace(small.spec, tile=(96, 96), bytes_per_px=1000.0)
    gpu, reports = on_device(Engine(spec, small._session), bytes_per_px=700), list[RunReport]()
    device = session_of(gpu).stream.device
    device.limit = 8_000_000
    for _ in range(2):
        urt.predict(gpu, texture, batch=1, report=reports.append, **options)
        assert device.held > 1_000_000
    first, second = (report.tile for report in reports)
    assert first == second
    assert 0.5 * most_px < first[0] * first[1] <= most_px
    assert not any(report.notes for report in reports)


def test_other_tiles_than_those_of_a_plan_name_the_rebuild(small, texture, on_device):
    for engine in (planned(small, LARGE, SMALL), on_device(planned(small, LARGE, SMALL))):
        for tile in ((48, 48), (64, 40), (32, 80)):
            with pytest.raises(urt.TileError) as raised:
                urt.predict(engine, texture, tile=tile)
            where = engine.spec.device
            assert str(raised.value) == (
                f"tile {tile[0]}x{tile[1]} px is not in the engine's plan, which takes 64x80 or 32x40 px; use one of "
                "these, or build it: unet-rt build MODEL.onnx --samples IMAGES --backend onnxruntime "
                f"--device {where} --tile {tile[0]}x{tile[1]}"
            )
    with pytest.raises(urt.TileError, match="spatial axes"):
        urt.predict(planned(small, LARGE, SMALL), texture, tile=(48, 48, 48))


def test_two_threads_take_turns(small, texture, on_device):
    nuclei, image = small, texture
    gpu = on_device(nuclei)
    images = [image, image[::-1].copy(), image[:, ::-1].copy()]
    expected = [urt.predict(nuclei, each) for each in images]
    found: dict[int, Array] = {}
    threads = [
        threading.Thread(target=lambda k=k: found.setdefault(k, urt.predict(gpu, images[k], batch=2))) for k in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(3):
        np.testing.assert_array_equal(found[k], expected[k])


@pytest.mark.parametrize("masked", [False, True], ids=["by number", "by what they hold"])
def test_blocks_are_taken_some_at_a_time(small, texture, on_device, monkeypatch, tmp_path, masked):
    """Blocks wait with their masks, so a group of them is small; batches have one size in all groups."""
    monkeypatch.setattr("unet_rt.prediction.blocks.TILES", 2)
    monkeypatch.setattr("unet_rt.prediction.run.DEVICE_WORKS", 64 if masked else 2)
    monkeypatch.setattr("unet_rt.prediction.run.DEVICE_HELD_BYTES", 1)
    groups, earlier, held = list[list[int]](), list[Any](), list[int]()
    real, make = predict_device.run, compute._work

    def made(*arguments: Any) -> Any:
        held.append(sum(work() is not None for work in earlier))
        return make(*arguments)

    def run(computation: Computation, works: Any, *arguments: Any, **options: Any) -> RunReport:
        earlier.extend(map(weakref.ref, works))
        groups.append([work.held_bytes for work in works])
        return real(computation, works, *arguments, **options)

    monkeypatch.setattr(predict_device, "run", run)
    monkeypatch.setattr(compute, "_work", made)
    wanted = np.zeros(texture.shape, np.uint8)
    wanted[5:190, :60] = 1
    np.save(tmp_path / "region.npy", wanted)
    options = {"region": tmp_path / "region.npy"} if masked else {"memory_bytes": 2**40}
    gpu, told = on_device(small), list[tuple[int, int]]()
    expected, found = both(small, gpu, texture, tile=(40, 48), batch=4, progress=lambda *n: told.append(n), **options)
    np.testing.assert_array_equal(found, expected)
    assert len(groups) > 4
    assert {len(group) for group in groups[:-1]} == {1 if masked else 2}
    assert all(bool(size) == masked for group in groups for size in group)
    assert max(held) <= 1  # of all blocks that were computed, while others are made
    assert {shape for (shape,) in session_of(gpu).runs} == {(4, 1, 40, 48)}
    assert told[-1][0] == told[-1][1]


def test_progress_counts_to_the_end(small, texture, on_device):
    nuclei, image = small, texture
    told: list[tuple[int, int]] = []
    urt.predict(on_device(nuclei), image, tile=(40, 48), batch=2, progress=lambda *n: told.append(n))
    count = nuclei.spec.grid(image.shape, (40, 48)).count
    assert told[0] == (0, count)
    assert told[-1] == (count, count)
    assert sorted(told) == told


# --- on a GPU -----------------------------------------------------------------------------------------------------


class OnHost:
    """A GPU's session without its way in for arrays that lie there: the pipeline of the host runs it."""

    def __init__(self, session: Any) -> None:
        self.run, self.version = session.run, session.version


@pytest.fixture(scope="module")
def gpu_engine(engine_for, tmp_path_factory) -> Iterator[Callable[..., Engine]]:
    """The same engines on the first GPU, in ONNX Runtime with its own choice of settings; nothing is timed."""
    from unet_rt.backends.onnxruntime.cuda import CudaSession
    from unet_rt.graph.passes.half import half

    folder, opened = tmp_path_factory.mktemp("halved"), list[Engine]()

    @cache
    def load(
        path: Path, contract: Contract | None = None, tile: int = 0, blend: bool = False, half_: bool = False
    ) -> Engine:
        import onnx

        cpu = engine_for(path, contract, tile, blend)
        with_batch = folder / f"{len(opened)}.onnx"
        proto = onnx.load(str(open_model(path, Path(tempfile.mkdtemp(dir=folder)), options=contract).graph))
        if half_:
            half(proto)
        onnx.save_model(proto, str(with_batch))
        precision = "fp16" if half_ else "fp32"
        spec = replace(cpu.spec, device="cuda:0", precision=precision)
        opened.append(Engine(spec, CudaSession(with_batch, precision, "cuda:0")))
        return opened[-1]

    yield load
    for engine in opened:
        engine.close()


def on_host(engine: Engine) -> Engine:
    return Engine(engine.spec, OnHost(engine._session))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("half_", [False, True], ids=["fp32", "fp16"])
def test_gpu_pipeline_equals_the_host_pipeline_around_the_same_session(gpu_engine, image, half_):
    """One tile per run on both sides: the session runs the same shapes on the same tiles, so all bits must agree."""
    gpu = gpu_engine(shipped_model(), None, 192, False, half_)
    tall = np.concatenate([image, image[::-1]])
    for output in ("mask", "probability", "raw"):
        expected, found = both(on_host(gpu), gpu, tall, output=output, batch=1, tile=(160, 192))
        np.testing.assert_array_equal(found, expected)
    assert urt.predict(gpu, tall).any()


@pytest.mark.gpu
@pytest.mark.torch
@pytest.mark.parametrize("what", ["valid", "colours", "volume", "blended", "multilabel"])
def test_gpu_networks(gpu_engine, network, what):
    import networks

    rng = np.random.default_rng(1)
    texture = networks.texture((1, 1, 171, 101), seed=9)[0, 0]
    options: dict[str, Any] = {}
    if what == "valid":
        gpu, pixels = gpu_engine(network(valid=True), SCALE, 76), rng.integers(0, 256, (151, 133), np.uint8)
    elif what == "colours":
        gpu, pixels = (
            gpu_engine(network(inputs=3, norm="batch"), SCALE, 76),
            rng.integers(0, 256, (91, 83, 3), np.uint8),
        )
    elif what == "volume":
        volume = networks.texture((1, 1, 41, 30, 26), seed=2)[0, 0]
        gpu, pixels = gpu_engine(network(dims=3, depth=1, convs=1), LOGITS), volume
    elif what == "blended":
        gpu, pixels = gpu_engine(network(norm="instance"), LOGITS, 48, True), np.stack([texture, texture[::-1]])
        options = {"axes": "TYX"}
    else:
        contract = Contract(task="multilabel", output_is="logits", threshold=(0.4,), normalization=NONE)
        gpu, pixels = gpu_engine(network(classes=3, depth=1), contract, 40), texture
    for output in ("raw", "mask"):
        expected, found = both(on_host(gpu), gpu, pixels, output=output, batch=1, **options)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.gpu
def test_gpu_tiled_equals_whole(gpu_engine, nuclei, image):
    """Other shapes are other convolution kernels on a GPU, and other roundings: bounded by what they are for one shape.

    The bound is what the GPU and the CPU differ by on the whole image, times 8. A seam is far above it.
    """
    gpu = gpu_engine(shipped_model(), None, 192)
    big = Engine(replace(gpu.spec, tile=(512, 512)), gpu._session)
    picture = np.concatenate([image, image[::-1]])[:400]
    whole = urt.predict(big, picture, output="raw")
    assert big.spec.grid(picture.shape).count == 1
    on_cpu = urt.predict(Engine(replace(nuclei.spec, tile=(512, 512)), nuclei._session), picture, output="raw")
    most = float(np.abs(whole).max())
    rounding = max(float(np.abs(whole - on_cpu).max()), most * 2.0**-23)
    assert 8 * rounding < 1e-3 * most
    for batch in (1, 4):
        tiled = urt.predict(gpu, picture, output="raw", tile=(160, 160), batch=batch)
        print(f"batch {batch}: {np.count_nonzero(tiled != whole)} of {whole.size} differ, bound {8 * rounding:.3g}")
        np.testing.assert_allclose(tiled, whole, rtol=0, atol=8 * rounding)
    halo = gpu.spec.outputs[0].field[0].halo[0]
    less = Engine(replace(gpu.spec, halo="given", halo_limit=halo // 2), gpu._session)
    seams = np.abs(urt.predict(less, picture, output="raw", tile=(160, 160)) - whole).max()
    assert seams > 8 * rounding


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["host", "device"])
def test_gpu_memory_does_not_grow(gpu_engine, image, where):
    gpu = gpu_engine(shipped_model(), None, 192)
    session = gpu.device_session
    assert session is not None
    device = session.stream.device
    pixels: Any = np.ascontiguousarray(image[:128, :144])
    expected = urt.predict(gpu, pixels)
    if where == "device":
        own = device.empty(pixels.shape, pixels.dtype)
        device.copy_in(own, pixels, session.stream)
        session.stream.synchronize()
        pixels = own

    def check() -> None:
        found = urt.predict(gpu, pixels)
        np.testing.assert_array_equal(found if where == "host" else found.to_host(), expected)

    for _ in range(20):
        check()
    gc.collect()
    before = device.memory()[0]
    for _ in range(1000):
        urt.predict(gpu, pixels)
    check()
    gc.collect()
    assert before - device.memory()[0] <= 2 << 20, "1,000 predictions took device memory"


@pytest.mark.gpu
@pytest.mark.torch
def test_gpu_tensors_stay_on_their_device_and_stream(gpu_engine, image):
    import torch

    gpu = gpu_engine(shipped_model(), None, 192)
    numbers = image.astype(np.int32)  # the host's pixels: of one dtype they are normalised to the same bits
    expected = [urt.predict(gpu, numbers, batch=k + 1) for k in range(3)]
    raw = urt.predict(gpu, numbers, output="raw")
    side = torch.cuda.Stream()
    for stream in (side, torch.cuda.default_stream()):
        with torch.cuda.stream(stream):
            for k in range(3):
                tensor = torch.zeros(image.shape, dtype=torch.int32, device="cuda")
                source = torch.from_numpy(numbers).cuda()
                torch.cuda._sleep(50_000_000)  # the pixels arrive late on this stream
                tensor.copy_(source)
                mask = urt.predict(gpu, tensor, batch=k + 1)
                assert mask.device == tensor.device
                assert mask.dtype == torch.uint8
                tensor.zero_()  # further work of the stream comes after the prediction
                np.testing.assert_array_equal((mask + 1).cpu().numpy(), expected[k] + 1)
            found = urt.predict(gpu, source, output="raw")
            np.testing.assert_array_equal(found.cpu().numpy(), raw)
            turned = urt.predict(gpu, source.T, output="raw")
            np.testing.assert_array_equal(turned.cpu().numpy(), urt.predict(gpu, numbers.T, output="raw"))
    reports: list[RunReport] = []
    urt.predict(gpu, source, report=reports.append)
    urt.predict(gpu, numbers, report=reports.append)
    assert reports[0].class_share == reports[1].class_share
    bad = torch.zeros(image.shape, device="cuda")
    bad[100, 50] = float("inf")
    scale = Normalization("scale", scale=255.0)
    unscaled = Engine(replace(gpu.spec, contract=replace(gpu.spec.contract, normalization=scale)), gpu._session)
    with pytest.raises(urt.ImageError, match=r"NaN or infinite pixels \(as float32\) in plane 0"):
        urt.predict(unscaled, bad)
    with pytest.raises(urt.ImageError, match="the engine runs on cpu"):
        urt.predict(Engine(replace(gpu.spec, device="cpu"), OnHost(gpu._session)), bad)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_gpu_two_threads(gpu_engine, image):
    """Two threads with one engine take turns; two engines work at once."""
    first = gpu_engine(shipped_model(), None, 192)
    second = gpu_engine(shipped_model(), None, 192, False, True)
    images = [image, image[::-1].copy()]
    wanted = {(e, k): urt.predict(e, images[k]) for e in (first, second) for k in range(2)}
    for engines in ((first, first), (first, second)):
        failures: list[BaseException] = []

        def work(engine: Engine, k: int, failures: list[BaseException] = failures) -> None:
            try:
                for _ in range(20):
                    np.testing.assert_array_equal(urt.predict(engine, images[k]), wanted[engine, k])
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        threads = [threading.Thread(target=work, args=(engine, k)) for k, engine in enumerate(engines)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


@pytest.mark.gpu
def test_gpu_failures_leave_nothing_behind(gpu_engine, nuclei, image, tmp_path):
    gpu = gpu_engine(shipped_model(), None, 192)
    session = gpu.device_session
    assert session is not None
    urt.predict(gpu, image, tile=(160, 192))  # a shape of its own costs memory once
    urt.predict(gpu, image)
    before, threads, calls = session.stream.device.memory()[0], threading.active_count(), itertools.count()

    def interrupt(*_: Any) -> None:
        if next(calls) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        urt.predict(gpu, np.concatenate([image] * 20), out=tmp_path / "mask.npy", tile=(160, 192), progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads
    urt.predict(gpu, image)
    assert before - session.stream.device.memory()[0] <= 2 << 20
