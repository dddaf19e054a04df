"""The benchmarks' own logic: timing, isolation, tables; all of ``gpu.py`` on the CPU at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = [pytest.mark.torch, pytest.mark.onnxruntime]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``benchmarks/gpu.py`` as a module; networks are cached in a folder of the test's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield load("gpu")
    patch.undo()


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def contender(gpu: ModuleType, name: str, call: Any) -> Any:
    import torch

    return gpu.Contender(name, call, lambda: torch.zeros(1, 2, 1, 1), "fp32")


def test_slower_takes_longer_and_a_failure_is_only_its_own(gpu: ModuleType) -> None:
    calls = {"late": 0}

    def late() -> None:
        calls["late"] += 1
        if calls["late"] > 4:
            raise RuntimeError("out of memory")

    contenders = [
        contender(gpu, "slow", lambda: time.sleep(0.004)),
        contender(gpu, "late", late),
        contender(gpu, "quick", lambda: time.sleep(0.001)),
    ]
    times, failed = gpu.interleave(contenders, "cpu", rounds=3, seconds=10, sample_s=0.002)
    assert failed == {"late": "RuntimeError: out of memory"}
    assert set(times) == {"slow", "quick"}
    assert [len(t) for t in times.values()] == [3, 3]
    assert min(times["slow"]) >= 0.004
    assert min(times["quick"]) < 0.004


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
    assert tables.gpu_paper().count("unet-rt onnxruntime fp32") == 1
    assert len(tables.gpu_predict().splitlines()) == 2 + 2 * 2 * 2  # two networks, two sizes, two ways


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
    document = {"command": "python x.py", "machine": {"cpu": "a processor"}, "rows": [row, other, missing]}
    (tmp_path / "parity.json").write_text(json.dumps(document))
    text = tables.BLOCKS["parity"]()
    assert "| n | openvino | int8 (2 layers in FP32) | 0.210% (0.076%) | 0.9712 | 0.8500 (0.8510) | outside |" in text
    assert "error 1.0e-02 of the range" in text
    assert "not built: no BF16 here" in text
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

    import unet_rt as urt

    net = gpu.network("nuclei", True)
    pixels = gpu.drawn(320)
    numbers = gpu.numbers_of(net, pixels)
    module = net.module()
    from unet_rt.normalize import normalised

    with gpu.torch.inference_mode():
        whole = module(gpu.torch.from_numpy(normalised(pixels[None], numbers)[None]))[0].argmax(0)
    mask = whole.to(gpu.torch.uint8).numpy()
    assert urt.__version__
    changed, compared = gpu.changed_labels(net, pixels, numbers, mask, "cpu")
    assert compared > 10_000
    assert changed <= 1e-5
    shifted, _ = gpu.changed_labels(net, pixels, numbers, np.roll(mask, 1, axis=0), "cpu")
    assert shifted > 1e-3


def test_a_section_that_hangs_or_dies_costs_only_itself(gpu: ModuleType, tmp_path: Path) -> None:
    args = gpu.parser().parse_args(["--dry-run", "--work", str(tmp_path)])
    code, note = gpu.child(args, "machine", -9.9, ())
    assert (code, note) == (-1, "stopped after 0 s")
    (tmp_path / "section-roof.json").write_text('{"fp32_tflops": 1.5}')
    kept = gpu.collect(args, "roof", ["stopped after 50 s"])
    assert kept == {"fp32_tflops": 1.5, "ended": "stopped after 50 s"}
    assert "stopped after 50 s" in gpu.tables({"roof": kept})


def test_a_section_that_crashes_is_run_again_without_the_suspect(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[str]] = []

    def crashing(args: Any, name: str, limit: float, without: list[str]) -> tuple[int, str]:
        tried.append(list(without))
        figures: dict[str, Any] = {"rows": []}
        if "tile_blend" not in without:
            figures = {"doing": "tile_blend, 2 x float16, 64 tiles", "failed": [{"what": "x", "why": "illegal access"}]}
        (tmp_path / f"section-{name}.json").write_text(json.dumps(figures))
        return (0 if "tile_blend" in without else 70), ""

    monkeypatch.setattr(gpu, "child", crashing)
    arguments = ["--dry-run", "--only", "kernels", "--work", str(tmp_path), "--out", str(tmp_path / "gpu.json")]
    results = gpu.measure(gpu.parser().parse_args(arguments))
    assert tried == [[], ["tile_blend"]]
    assert "illegal access; run again without tile_blend" in results["kernels"]["ended"]
    assert results["kernels"]["rows"] == []


def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    from unet_rt import machine

    if machine.cuda().missing is None:
        pytest.skip("there is a device")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--only", "roof", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "== roof: no device: " in done.stdout
    assert "no_device" in json.loads((tmp_path / "gpu.json").read_text())["sections"]["roof"]
