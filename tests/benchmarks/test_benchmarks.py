"""The benchmarks' own logic: timing, isolation, comparison, tables; every script once, at tiny sizes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import unet_rt as urt

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = [pytest.mark.torch, pytest.mark.onnxruntime]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``benchmarks/gpu.py`` as a module, its sections importable; networks are cached in a folder of the test's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield load("gpu")
    patch.undo()


# What every script writes with --quick, beside machine and versions; figures drawn from it.
QUICK = {
    "bench_startup": ("startup", ("startup",)),
    "bench_kernels": ("kernels", ("kernels",)),
    "bench_roofline": ("roofline", ("roofline",)),
    "bench_overhead": ("overhead-nuclei", ("overhead",)),
    "bench_latency": ("latency", ()),
    "bench_engine": ("engine-paper", ("engine-paper",)),
    "bench_scaling": ("scaling", ("scaling",)),
    "bench_memory": ("memory", ("memory",)),
    "bench_build": ("build-nuclei", ("build-nuclei",)),
    "bench_quality": ("quality-drawn", ("quality",)),
    "bench_train": ("train", ()),
}


LONG = ("bench_build", "bench_engine", "bench_memory", "bench_roofline", "bench_scaling")  # half a minute each


@pytest.mark.openvino
@pytest.mark.parametrize("script", [pytest.param(s, marks=pytest.mark.slow) if s in LONG else s for s in QUICK])
def test_every_script_runs(script: str, gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it writes is what the tables are drawn from, and agrees with itself."""
    name, blocks = QUICK[script]
    out = tmp_path / f"{name}.json"
    monkeypatch.setattr(sys, "argv", [script])
    if not _installed():  # child processes are to see the same
        monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    assert load(script).main(["--quick", "--out", str(out)]) == 0
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["machine"]["versions"]["numpy"]
    tables, record = load("tables"), load("record")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for block in blocks:
        assert re.search(r"\d", tables.BLOCKS[block]())
    same = record.compared(document, document)
    assert all(agree for *_, agree in same)
    if script not in ("bench_train", "bench_memory", "bench_build", "bench_quality"):  # which have no spread
        assert same


def _installed() -> bool:
    return Path(urt.__file__).parents[1] != BENCHMARKS.parent


@pytest.mark.skipif("trace" not in signature(urt.predict).parameters, reason="this predict records no spans")
@pytest.mark.monai
@pytest.mark.filterwarnings("ignore")  # MONAI's imports and torch's own deprecations
def test_the_end_to_end_script_runs(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "predict-nuclei.json"
    monkeypatch.setattr(sys, "argv", ["bench_predict"])
    assert load("bench_predict").main(["--quick", "--out", str(out)]) == 0
    document = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["name"].partition(",")[0]: row for row in document["rows"]}
    ours = next(row for name, row in rows.items() if name.startswith("unet-rt"))
    assert ours["changed_labels"] <= 1e-5
    assert rows["MONAI defaults"]["changed_labels"] > ours["changed_labels"]
    stages = {stage for stage, *_ in document["spans"]["spans"]}
    assert stages == {"read", "gather", "infer", "stitch", "write"}
    tables = load("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "MONAI in nnU-Net's setting" in tables.BLOCKS["predict-nuclei"]()
    assert "pipeline.svg" in tables.BLOCKS["pipeline"]()


def test_figures_agree_where_their_ranges_meet(gpu: ModuleType, tmp_path: Path) -> None:
    record = load("record")

    def written(name: str, cpu: str, median: float, low: float, high: float) -> Path:
        row = {"name": "tile", "median_ms": median, "low_ms": low, "high_ms": high}
        document = {"machine": {"cpu": cpu, "threads": 2, "versions": {}}, "rows": [row, {**row, "name": "other"}]}
        path = tmp_path / name / "engine.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document))
        return path.parent

    first = written("first", "A", 10.0, 9.0, 12.0)
    assert record.main([str(first), str(written("same", "A", 12.5, 11.0, 14.0))]) == 0
    slower = written("slower", "A", 13.0, 12.5, 14.0)
    assert record.main([str(first), str(slower)]) == 1
    assert record.main([str(first), str(written("elsewhere", "B", 13.0, 12.5, 14.0))]) == 0
    names = [
        name for name, *_ in record.compared(*(json.loads((f / "engine.json").read_text()) for f in (first, slower)))
    ]
    assert names == ["tile ms", "other ms"]
    with pytest.raises(SystemExit, match="no record in common"):
        record.main([str(first), str(tmp_path)])


def test_a_field_that_differs_is_named(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = load("same_results").compare
    before, same, after = (tmp_path / f"{name}.json" for name in ("before", "same", "after"))
    before.write_text(json.dumps({"net": {"predict": ["a", "b"], "spec": {}}}))
    same.write_text(json.dumps({"net": {"spec": {}, "predict": ["a", "b"]}}))
    after.write_text(json.dumps({"net": {"predict": ["a", "c"]}}))
    assert compare(before, same) == 0
    assert compare(before, after) == 1
    said = capsys.readouterr().out
    assert "net / predict[1]: b -> c" in said
    assert "net / spec: {} -> absent" in said


def test_a_record_names_no_folder_of_this_machine(gpu: ModuleType, tmp_path: Path) -> None:
    model, near = tmp_path / "net.onnx", tmp_path / "a.pt"
    words = [str(tmp_path / "bench_x.py"), "--model", str(model), "--checkpoint", f"fcn={near}", "b=runs/b.pt"]
    words += ["--out", str(tmp_path / "x.json"), "--data", "../shared/data"]
    wanted = "python benchmarks/bench_x.py --model net.onnx --checkpoint fcn=a.pt b=runs/b.pt --data ../shared/data"
    assert load("record").command(words) == wanted


def test_the_guard_sees_a_kernel_that_lost_its_vectors(gpu: ModuleType) -> None:
    guard = load("guard_kernels")
    recorded = json.loads((BENCHMARKS / "results" / "instructions.json").read_text())["per_pixel"]
    name = "tile_gather uint8 grey to float32"
    assert guard.above(recorded, recorded) == []
    (said,) = guard.above({**recorded, name: 2 * recorded[name]}, recorded)
    assert said.startswith(name)


def test_the_kernels_need_no_more_instructions_than_recorded(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = load("guard_kernels")
    if (reason := guard.missing()) is not None:
        pytest.skip(reason)
    if not _installed():
        monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    recorded = json.loads((BENCHMARKS / "results" / "instructions.json").read_text())["per_pixel"]
    found = guard.count()
    assert found.keys() == recorded.keys()
    assert guard.above(found, recorded) == []


def test_spans_overlap_in_the_picture(gpu: ModuleType) -> None:
    recorded = [("read", 5.0, 5.5), ("infer", 5.5, 7.0), ("read", 5.5, 6.0), ("write", 7.0, 7.1)]
    drawn = load("plots").spans("run", recorded).svg()
    assert "read 48%" in drawn
    assert "infer 71%" in drawn
    assert drawn.count('fill="#0072b2"') == 2


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def part(name: str) -> ModuleType:
    """A module of the GPU's sections, the one that ``gpu.py`` imported."""
    return importlib.import_module(f"gpu_sections.{name}")


def contender(name: str, call: Any) -> Any:
    import torch

    return part("timing").Contender(name, call, lambda: torch.zeros(1, 2, 1, 1), "fp32")


def test_slower_takes_longer_and_a_failure_is_only_its_own(gpu: ModuleType) -> None:
    calls = {"late": 0}

    def late() -> None:
        calls["late"] += 1
        if calls["late"] > 4:
            raise RuntimeError("out of memory")

    contenders = [
        contender("slow", lambda: time.sleep(0.004)),
        contender("late", late),
        contender("quick", lambda: time.sleep(0.001)),
    ]
    times, failed = part("timing").interleave(contenders, "cpu", rounds=3, seconds=10, sample_s=0.002)
    assert failed == {"late": "RuntimeError: out of memory"}
    assert set(times) == {"slow", "quick"}
    assert [len(t) for t in times.values()] == [3, 3]
    assert min(times["slow"]) >= 0.004
    assert min(times["quick"]) < 0.004


@pytest.mark.parametrize("failing", [("eager FP32",), ("eager FP32", "other", "third")], ids=["first", "all"])
def test_a_table_outlives_the_first_contender(gpu: ModuleType, tmp_path: Path, failing: tuple[str, ...]) -> None:
    """It has no result left once it has failed; labels are held against those of the next one."""
    import torch

    def made(name: str) -> Any:
        last = list[Any]()

        def call() -> None:
            last.clear()
            if name in failing:
                raise torch.OutOfMemoryError("CUDA out of memory")
            last.append(torch.eye(2)[None, :, None])

        return part("timing").Contender(name, call, lambda: last[0], "fp32")

    section = part("section").Section.open("nuclei", True, tmp_path, time.time() + 60)
    contenders = [made(name) for name in ("eager FP32", "other", "third")]
    net = part("pixels").network("nuclei", True)
    part("engines").report_contenders(section, "nuclei", net, 64, 1, contenders, 5.0)
    rows = section.figures.get("rows", [])
    assert [row["name"] for row in rows] == [c.name for c in contenders if c.name not in failing]
    assert all((row["held_against"], row["label_agreement"]) == ("other", 1.0) for row in rows)
    assert len(section.figures["failed"]) == len(failing)
    assert ("to other" in gpu.tables({"nuclei": section.figures})) == bool(rows)


def test_a_dry_run_measures_everything(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = "machine,prepare,roof,kernels,build-onnxruntime,nuclei,predict-nuclei,repeat"
    out = tmp_path / "gpu.json"
    arguments = ["--dry-run", "--in-process", "--only", only, "--nets", "nuclei", "--out", str(out)]
    results = gpu.main([*arguments, "--work", str(tmp_path / "work")])
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["dry_run"]
    assert list(document["sections"]) == only.split(",")
    for name, figures in results.items():
        refused = [f["what"] for f in figures.get("failed", [])]
        assert refused == (["build nuclei onnxruntime fp16"] if name.startswith("build") else []), figures
    assert len(results["kernels"]["rows"]) == 30
    rows = {(r["name"], r["batch"]): r for r in results["nuclei"]["rows"]}
    for batch in (1, 2):
        assert rows["eager FP32", batch]["label_agreement"] == 1
        ours = rows["unet-rt onnxruntime fp32", batch]
        assert ours["label_agreement"] > 0.999
        assert ours["max_abs_error"] < 1e-3
        assert ours["low_ms"] <= ours["median_ms"] <= ours["high_ms"]
    for row in results["predict-nuclei"]["rows"]:
        assert row["labels_compared"] > 1000
        assert row["changed_labels"] <= 1e-4  # another library's rounding at most
        assert 0.02 < row["foreground"] < 0.98
        assert row["fixed_equal"]
        assert row["own_s"] > 0
    text = gpu.tables(results)
    assert "unet-rt onnxruntime fp32" in text
    assert "crop_concat" in text
    # what README would say of it, had it been a GPU: sections that a CPU cannot fill take those that it can
    sections = document["sections"]
    sections["machine"]["gpu"] = {"name": "GPU"}
    sections["paper"], sections["predict-paper"] = sections["nuclei"], sections["predict-nuclei"]
    for row in sections["kernels"]["rows"]:
        row |= {"share_graph": row["share"], "gb_s_graph": row["gb_s"]}
    tables = load("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    out.write_text(json.dumps(document), encoding="utf-8")
    for name in ("gpu-machine", "gpu-paper", "gpu-nuclei", "gpu-kernels", "gpu-predict"):
        assert re.search(r"\d", tables.BLOCKS[name]())
    assert tables.BLOCKS["gpu-paper"]().count("unet-rt onnxruntime fp32") == 1
    assert len(tables.BLOCKS["gpu-predict"]().splitlines()) == 2 + 2 * 2 * 2  # two networks, two sizes, two ways


def test_rows_of_parity_and_of_passes_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segmentation, a regression, what was not built; a pass before and after."""
    tables = load("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    held = {"images": 9, "labels_ppm_worst": 2100.0, "labels_ppm_mean": 760.0, "dice_lowest": 0.9712, "relative": 0.01}
    row = {"net": "n", "backend": "openvino", "precision": "int8", "variant": "2 layers in FP32", "accepted": False}
    row |= {"held_back": held, "truth": {"engine_dice": 0.85, "baseline_dice": 0.851}}
    other = {"net": "r", "backend": "openvino", "precision": "fp32", "accepted": True}
    other["held_back"] = held | {"labels_ppm_worst": None, "labels_ppm_mean": None, "dice_lowest": None}
    missing = {"net": "n", "backend": "openvino", "precision": "bf16", "note": "no BF16 here"}
    rows: list[dict[str, Any]] = [row, other, missing]
    document = {"command": "python x.py", "machine": {"cpu": "a processor"}, "rows": rows}
    (tmp_path / "parity.json").write_text(json.dumps(document))
    text = tables.BLOCKS["parity"]()
    assert "| n | openvino | int8 (2 layers in FP32) | 0.210% (0.076%) | 0.9712 | 0.8500 (0.8510) | outside |" in text
    assert "error 1.0e-02 of the range" in text
    assert text.endswith("\n\nNot built: openvino bf16 of n: no BF16 here.")
    rows.append(missing | {"net": "r"})
    (tmp_path / "parity.json").write_text(json.dumps(document))
    assert tables.BLOCKS["parity"]().endswith("\n\nNot built: openvino bf16 of every network: no BF16 here.")
    times = {"before_ms": 20.0, "after_ms": 10.0, "speed": 2.0, "speed_low": 1.9, "speed_high": 2.1}
    passes = {
        "net": "n",
        "tile": 64,
        "threads": 2,
        "rows": [{"name": "QDQ", "backend": "b", "difference": "d", **times}],
    }
    (tmp_path / "passes-n.json").write_text(json.dumps(passes))
    assert "| QDQ | b | 20.0 -> 10.0 | 2.00 (1.90 to 2.10) | d |" in tables.BLOCKS["passes"]()


def test_the_window_compared_keeps_the_phase(gpu: ModuleType) -> None:
    """A mask of another image, or of one shifted by a pixel, is seen."""
    import numpy as np

    pixels_of, changed_labels = part("pixels"), part("predict").changed_labels
    net = pixels_of.network("nuclei", True)
    pixels = pixels_of.drawn(320)
    numbers = pixels_of.numbers_of(net, pixels)
    module = net.module()
    import torch

    from unet_rt.images.normalize import normalize_pixels

    with torch.inference_mode():
        whole = module(torch.from_numpy(normalize_pixels(pixels[None], numbers)[None]))[0].argmax(0)
    mask = whole.to(torch.uint8).numpy()
    changed, compared = changed_labels(net, pixels, numbers, mask, "cpu")
    assert compared > 10_000
    assert changed <= 1e-5
    shifted, _ = changed_labels(net, pixels, numbers, np.roll(mask, 1, axis=0), "cpu")
    assert shifted > 1e-3


def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    from unet_rt.system import facts as machine

    if machine.cuda().missing is None:
        pytest.skip("there is a device")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--only", "roof", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "== roof: no device: " in done.stdout
    assert "no_device" in json.loads((tmp_path / "gpu.json").read_text())["sections"]["roof"]
