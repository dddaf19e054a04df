"""Measuring: ratios that noise cannot fool, engines beside the libraries used directly, and the verb ``bench``."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from host_device import HostDevice, HostSession
from onnx import helper, numpy_helper
from PIL import Image

import unet_rt as urt
from unet_rt.baseline.results import raw_result
from unet_rt.baseline.samples import draw
from unet_rt.building import measure as build_timing
from unet_rt.cli.demo import shipped_model
from unet_rt.cli.main import main
from unet_rt.cli.texts import bench_text
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.engine.engine import Engine
from unet_rt.judging import rounds
from unet_rt.judging.bench import BenchReport, bench
from unet_rt.judging.contenders import tiles_by_hand
from unet_rt.kernels.device import Device
from unet_rt.outputs import charts
from unet_rt.system import timing as system_timing
from unet_rt.tiling.grid import tile_grid

pytestmark = pytest.mark.onnxruntime
Array = np.ndarray[Any, np.dtype[Any]]


def timing(*times: float) -> system_timing.Timing:
    return system_timing.Timing(statistics.median(times), min(times), max(times), len(times), 0, times)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """The same engine on a device of host memory; options are those of its spec."""

    def make(engine: Engine, **options: Any) -> Engine:
        device = HostDevice()
        monkeypatch.setattr(Device, "open", classmethod(lambda cls, index=0: device))
        return Engine(replace(engine.spec, device="cuda:0", **options), HostSession(engine, device))  # type: ignore[arg-type]

    return make


def test_noise_that_both_share_cancels() -> None:
    rng = np.random.default_rng(5)
    noise = rng.lognormal(0, 1, 21)  # rounds that differ by a factor of ten
    found = system_timing.ratio(timing(*(2.0 * noise)), timing(*noise))
    assert found == system_timing.Ratio(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(7), 0
    for _ in range(200):
        times = rng.lognormal(0.0, 0.1, (2, 25))
        found = system_timing.ratio(timing(*times[0]), timing(*times[1]))
        assert found.low <= found.median <= found.high
        held += found.low <= 1.0 <= found.high
    # 95 % of 200, and four standard deviations below
    assert held >= 178


@pytest.mark.parametrize(("fixed", "size"), [(None, 2), (3, 3)])
def test_on_a_device_a_batch_has_the_size_that_the_graph_takes(
    engine_folder: Path, on_device: Callable[..., Engine], fixed: int | None, size: int
) -> None:
    with urt.load(engine_folder) as cpu:
        gpu = on_device(cpu, batch=fixed)
        session: Any = gpu._session
        with closing(build_timing.DeviceRun(gpu, np.zeros((2, 1, 64, 64), np.float32))) as run:
            run()
        assert set(session.runs) == {((size, 1, 64, 64),)}
        assert session.stream.device.held == 0


def test_nothing_rests_between_runs_on_a_device(
    engine_folder: Path,
    on_device: Callable[..., Engine],
    sample_images: list[Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rest is for threads of the host that spin; a GPU lowers its clocks meanwhile."""
    rests, real = list[float | None](), system_timing.interleave

    def interleave(contenders: Any, **options: Any) -> Any:
        rests.append(options.get("rest_s"))
        return real(contenders, **options)

    monkeypatch.setattr("unet_rt.system.timing.interleave", interleave)
    with urt.load(engine_folder) as cpu:
        (sample,) = draw(sample_images[:1], cpu.spec.contract, spatial=2, network_channels=1, count=1)
        gpu = on_device(cpu)
        for engines in ((gpu, gpu), (cpu, cpu), (cpu, gpu)):
            runs = [(engine, (64, 64), 1) for engine in engines]
            assert all(
                isinstance(t, system_timing.Timing)
                for t in build_timing.interleaved_times(runs, sample, 1, runs=1, warm_up=0)
            )
    assert rests == [0.0, None, None]


def test_every_other_round_goes_backwards() -> None:
    order: list[str] = []
    found = system_timing.interleave([lambda: order.append("a"), lambda: order.append("b")], runs=3, warm_up=1)
    assert "".join(order) == "abbaabba"
    assert [len(t.times_s) for t in found] == [3, 3]


@pytest.mark.parametrize("overlap", [None, (64, 64)], ids=["placed", "blended"])
def test_tiles_by_hand_are_the_pipeline_s(engine_folder: Path, sample_images: list[Array], overlap: Any) -> None:
    with urt.load(engine_folder) as engine:
        engine.spec = replace(engine.spec, overlap=overlap)
        (sample,) = draw(sample_images[:1], engine.spec.contract, spatial=2, network_channels=1, count=1)
        grid = tile_grid(sample.shape, (192, 192), engine.spec.sizes, engine.spec.outputs, overlap=overlap)
        assert grid.count > 1
        by_hand, ours = tiles_by_hand(engine, sample, grid), raw_result(engine, sample, grid)
    if overlap is None:
        np.testing.assert_array_equal(by_hand, ours)
    else:  # sums of at most four weighted float32 values, in another order
        np.testing.assert_allclose(by_hand, ours, rtol=8 * 2.0**-23, atol=8 * 2.0**-23 * np.abs(ours).max())


@pytest.fixture(scope="module")
def report(engine_folder: Path, sample_images: list[Array]) -> BenchReport:
    names = ("onnxruntime", "openvino") if importlib.util.find_spec("openvino") else ("onnxruntime",)
    return bench(engine_folder, image=sample_images[0], baselines=names, tile=(192, 192), runs=2, seconds=1)


def test_an_engine_beside_the_libraries(report: BenchReport) -> None:
    rows = {row.name: row for row in report.rows}
    assert {"unet-rt onnxruntime fp32", "ONNX Runtime FP32, bare"} <= set(rows)
    assert [row.engine for row in rows.values()].count(True) == 1
    assert report.baseline == "ONNX Runtime FP32, bare"
    assert rows[report.baseline].speed == system_timing.Ratio(1.0, 1.0, 1.0)
    assert report.tiles > 1
    for name, row in rows.items():
        assert row.mpx_per_s == pytest.approx(report.shape[0] * report.shape[1] / 1e6 / row.window.median_s)
        assert row.window.peak_bytes > 0
        assert row.label_agreement is not None
        assert row.label_agreement >= 1 - 1e-4, name  # another library's rounding at most
        assert row.seam == 0, name
    json.dumps(report.to_json())


def test_the_table_names_everybody(report: BenchReport) -> None:
    text = bench_text(report)
    for row in report.rows:
        assert row.name in text
    assert f"speed: {report.baseline} = 1" in text


def test_one_document_whatever_becomes_of_the_picture(
    report: BenchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A contender whose values are not finite has no place in the picture; a folder stands where the other should be."""
    broken = replace(report.rows[0], label_agreement=None, relative_error=float("inf"))
    found = replace(report, rows=(broken, *report.rows[1:]))
    monkeypatch.setattr("unet_rt.judging.bench.bench", lambda *_, **__: found)
    assert main(["bench", "model.urt", "--plot", str(tmp_path / "plot.png"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(found.rows)
    with Image.open(tmp_path / "plot.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 4
    (tmp_path / "folder.png").mkdir()
    assert main(["bench", "model.urt", "--plot", str(tmp_path / "folder.png"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "OutputError"


@pytest.mark.torch
@pytest.mark.monai
@pytest.mark.filterwarnings("ignore")  # MONAI's imports and torch's own deprecations
def test_monai_leaves_seams(engine_folder: Path, sample_images: list[Array]) -> None:
    names = ("onnxruntime", "monai", "monai-gaussian")
    found = bench(engine_folder, image=sample_images[0], baselines=names, tile=(192, 192), runs=1, seconds=1)
    seams = {row.name: row.seam for row in found.rows}
    constant, gaussian = (
        seams[f"MONAI sliding window ({mode}), ONNX Runtime FP32"] for mode in ("constant", "gaussian")
    )
    assert constant is not None
    assert gaussian is not None
    assert 0 < gaussian < constant < 0.05  # a quarter of overlap; smooth weights hide the worst of it


@pytest.mark.torch
@pytest.mark.monai
@pytest.mark.filterwarnings("ignore")  # MONAI's imports and torch's own deprecations
@pytest.mark.parametrize("placement", ["even", "monai"])
def test_monai_agrees_with_tiles_placed_as_its_own(tmp_path: Path, placement: Any) -> None:
    """Its row of a network that cannot be exact, over the same library as the engine."""
    placements = pytest.importorskip("placements")
    pixels, _ = placements.pictures((201, 165))
    urt.build(
        placements.export(2, tmp_path), samples=[pixels], out=tmp_path / "x.urt", contract=placements.CONTRACT, axes="CYX",
        backend="onnxruntime", precision="fp32", tile=(96, 64), overlap=(24, 16), placement=placement, threads=1,
    ).close()  # fmt: skip
    names = ("onnxruntime", "monai-gaussian")
    found = bench(tmp_path / "x.urt", image=pixels, axes="CYX", baselines=names, runs=1, seconds=1)
    shares = {row.name: row.label_agreement for row in found.rows}
    assert (shares["MONAI sliding window (gaussian), ONNX Runtime FP32"] == 1) == (placement == "monai")


def test_without_torch_the_rest_is_measured(
    engine_folder: Path, sample_images: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("torch", "monai", "openvino") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    found = bench(engine_folder, image=sample_images[1], runs=1, seconds=1)
    assert {row.name for row in found.rows} == {"unet-rt onnxruntime fp32", "ONNX Runtime FP32, bare"}
    assert "pip install torch" in found.skipped["eager"]
    assert "pip install monai" in found.skipped["monai"]
    assert "pip install openvino" in found.skipped["openvino"]


@pytest.mark.torch
def test_eager_pytorch_is_the_first_baseline(
    engine_folder: Path, tmp_path: Path, sample_images: list[Array], capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint beside an engine, from the command line: one JSON document, and one picture."""
    from unet_rt.models.checkpoint import save_checkpoint
    from unet_rt.models.stored import unet_from_onnx
    from unet_rt.models.unet import UNetSpec

    shipped, checkpoint, image = shipped_model(), tmp_path / "nuclei.pt", tmp_path / "image.npy"
    architecture = json.loads(shipped.with_suffix(".json").read_text())["architecture"]
    with urt.load(engine_folder) as engine:
        contract = engine.spec.contract
    save_checkpoint(checkpoint, unet_from_onnx(onnx.load(shipped), UNetSpec(**architecture)), contract, {})
    np.save(image, sample_images[0][:160, :200])
    plot = tmp_path / "plot.png"
    arguments = [
        "--checkpoint",
        str(checkpoint),
        "--baselines",
        "onnxruntime",
        "eager",
        "--runs",
        "1",
        "--threads",
        "1",
        "--json",
    ]
    code = main(["bench", str(engine_folder), "--image", str(image), *arguments, "--plot", str(plot)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    found = json.loads(captured.out)
    rows = {row["name"]: row for row in found["rows"]}
    assert found["baseline"] == "eager PyTorch FP32"
    assert rows["eager PyTorch FP32"]["label_agreement"] >= 1 - 1e-4
    with Image.open(plot) as picture:
        assert picture.size[0] > 300
        assert len(set(picture.convert("L").tobytes())) > 4


@pytest.mark.parametrize(("pad", "task"), [(1, "multiclass"), (0, "multiclass"), (0, "regression")])
def test_engines_are_built_from_an_onnx_file(
    pad: int, task: str, tmp_path: Path, sample_images: list[Array], capsys: pytest.CaptureFixture[str]
) -> None:
    weight = np.array([[[[0, -1, 0], [-1, -2, -1], [0, -1, 0]]], [[[0, 1, 0], [1, 2, 1], [0, 1, 0]]]], np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[pad] * 4)
    shapes = {"x": ["N", 1, "H", "W"], "y": ["N", 2, "H", "W"]}
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items())
    graph = helper.make_graph([node], "edges", [x], [y], [numpy_helper.from_array(weight, "w")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "edges.onnx"
    )
    np.save(tmp_path / "image.npy", sample_images[0])
    contract = ["--normalize", "zscore", "--task", task, *(["--output-is", "logits"] if task == "multiclass" else [])]
    measured = [
        "--image",
        str(tmp_path / "image.npy"),
        "--baselines",
        "onnxruntime",
        "--runs",
        "1",
        "--tile",
        "128x128",
    ]
    assert main(["bench", str(tmp_path / "edges.onnx"), *contract, *measured, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert "unet-rt onnxruntime fp32" in rows
    assert found["tile"] == [128, 128]
    assert found["tiles"] == 9  # 300 x 260 px in steps of 126 px: a sample of halo, or of shrink
    assert all(row["seam"] == 0 for row in rows.values())
    assert all(row["relative_error"] < 1e-5 for row in rows.values())
    assert all((row["label_agreement"] is None) == (task == "regression") for row in rows.values())
    assert any("FP32 alone" in note for note in found["notes"])


def test_an_engine_whose_task_was_left_open(tmp_path: Path, sample_images: list[Array]) -> None:
    """Its values are what is timed and compared: one channel, an edge, that may be a mask or a distance."""
    weight = np.array([[[[0, -1, 0], [-1, 4, -1], [0, -1, 0]]]], np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 1, "H", "W"]) for n in ("x", "y"))
    graph = helper.make_graph([node], "edges", [x], [y], [numpy_helper.from_array(weight, "w")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "one.onnx"
    )
    contract = Contract(normalization=Normalization("zscore"))
    urt.build(
        tmp_path / "one.onnx", contract=contract, out=tmp_path / "one.urt", backend="onnxruntime", tile=(128, 128)
    ).close()
    found = bench(
        tmp_path / "one.urt",
        image=sample_images[0][:160, :160],
        baselines=["onnxruntime"],
        runs=1,
        seconds=1,
    )
    assert [row.label_agreement for row in found.rows] == [None, None]
    assert all(row.relative_error < 1e-5 for row in found.rows)
    assert "ONNX Runtime FP32, bare" in bench_text(found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--baselines", "tensorflow"], "there is no baseline 'tensorflow'; choose from onnxruntime"),
        (["--baselines", "eager"], "baseline eager: a graph has no module to run; give the network's checkpoint"),
        (["--samples", "image.npy"], "is an engine, which has its contract and is built already"),
        (["--normalize", "zscore"], "is an engine, which has its contract and is built already"),
        (["--module", "a:b"], "say how --checkpoint is read; pass it as well"),
        (["--arguments", "{}"], "say how --checkpoint is read; pass it as well"),
        (["--image", "missing.png"], "missing.png"),
        (["--tile", "100x100"], "tile 100 px is not a multiple of stride 8; use 96 or 104"),
        (["--runs", "0"], "'0' is not a number from 1"),
        (["--plot", "no/such/plot.png"], "no/such is not a folder"),
    ],
)
def test_wrong_use_is_said(
    arguments: list[str],
    said: str,
    engine_folder: Path,
    sample_images: list[Array],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("image.npy", sample_images[2])
    options = [] if "--image" in arguments else ["--image", "image.npy"]
    assert main(["bench", str(engine_folder), *options, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_round_that_scatters_twofold_is_taken_again() -> None:
    """One time in ten is four times the usual, another contender's never: those rounds do not count, and that is said."""
    calls = [0]

    def now_and_then() -> rounds.Run:
        calls[0] += 1
        return rounds.Run(0.4 if calls[0] in (3, 6) else 0.1, 0.02)

    steady = partial(rounds.Run, 0.2, 0.3)
    found = rounds.take_rounds([now_and_then, steady], runs=7, seconds=60, warm_up=1, rest_s=0)
    assert found.timings[0].times_s == (0.1,) * 7
    assert [t.runs for t in found.timings] == [7, 7]
    assert found.repeated == 2
    assert calls[0] == 1 + 7 + 2
    assert system_timing.ratio(found.timings[1], found.timings[0]).low == pytest.approx(2)
    said = " ".join(found.notes(["ours", "theirs"], "tile"))
    assert "tile: 2 rounds in which a time was twice the usual were taken again" in said
    assert "theirs waited 30% of its time for a processor" in said
    turns = itertools.cycle([0.1, 0.3])
    never = rounds.take_rounds([lambda: rounds.Run(next(turns), None)], runs=4, seconds=60, rest_s=0)
    assert "scatter 3.0-fold even so" in " ".join(never.notes(["ours"], "window"))


def test_few_rounds_claim_no_narrow_interval() -> None:
    """Five rounds hold the median between their lowest and highest with 94 %: anything narrower would be a claim."""
    found = system_timing.ratio(timing(2.2, 6.2, 14.9, 3.0, 4.0), timing(*[1.0] * 5))
    assert found == system_timing.Ratio(4.0, 2.2, 14.9)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux says how long threads waited")
def test_waiting_for_a_processor_is_seen() -> None:
    """Four threads of hashing on one processor wait three quarters of their time."""
    if system_timing.waited_s() is None:
        pytest.skip("the kernel keeps no statistics of its schedule")
    code = (
        "import os, threading, hashlib, time; from unet_rt.system.timing import waited_s\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); data, stop = bytes(10**6), time.monotonic() + 1\n"
        "def work():\n    while time.monotonic() < stop: hashlib.sha256(data).digest()\n"
        "threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "before = waited_s(); [t.start() for t in threads]; time.sleep(0.8); print(waited_s() - before)\n"
    )
    paths = os.pathsep.join(str(Path(part).resolve()) for part in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) > 1.0  # of 2.4 that four threads wait in 0.8 s


@pytest.mark.torch
def test_a_module_that_no_other_process_can_import_is_refused(
    engine_folder: Path, sample_images: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    class Local(torch.nn.Module):
        pass

    Local.__module__, Local.__qualname__ = "__main__", "Local"  # as in a notebook
    monkeypatch.setattr(sys.modules["__main__"], "Local", Local, raising=False)
    with pytest.raises(urt.BackendError, match="a process of its own, which cannot import the module"):
        bench(engine_folder, image=sample_images[0], baselines=["eager"], module=Local().eval(), runs=1, seconds=1)


def test_contenders_run_in_processes_of_their_own(report: BenchReport) -> None:
    """Nobody's memory is another's: the first run of each takes its own, which one process would have only once."""
    assert all(row.window.peak_bytes > 1e6 for row in report.rows)
    assert all(row.waited is None or 0 <= row.waited <= 1 for row in report.rows)
    assert all(row.tile.runs == row.window.runs == 2 for row in report.rows)


def test_the_axis_of_agreement_ends_at_100_percent(tmp_path: Path) -> None:
    sheet = charts.scatter(charts.Axes("agreement in %", "Mpx/s", most=100.0), [("a", 1.0, 99.9), ("b", 2.0, 100.0)])
    numbers = [float(s.text) for s in sheet.shapes if isinstance(s, charts.Text) and s.anchor == "end"]
    assert max(numbers) == 100.0
    top = min(s.middle[1] for s in sheet.shapes if isinstance(s, charts.Ring))
    assert top == charts.TOP  # the upper edge of the frame
