"""The comparison of networks on membranes: its record, its picture, and what pages say of it, from drawn slices."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="the networks are torch's; pip install unet-rt[train]")
pytest.importorskip("skimage", reason="scores Rand errors; pip install unet-rt[train]")

from unet_rt.drawing.microscopy import microscopy
from unet_rt.drawing.scene import Scene

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.torch
NAMES = ["00.png", "18.png", "21.png", "22.png"]  # trained on, tuned on, two reported on
PX = 160


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    found = {}
    for name in ("membranes", "tables"):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    monkeypatch.setattr(found["membranes"], "SHOWN_FROM_PX", 20)
    monkeypatch.setattr(found["membranes"], "SHOWN_PX", 120)
    yield found
    for name in found:
        del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("slices")
    for seed, name in enumerate(NAMES):
        m = microscopy((PX, PX), seed=seed, scene=Scene(radius_px=22, cover=0.7, cluster=6), dtype=np.uint8)
        for folder, pixels in (("image", m.image), ("label", 255 * (m.truth > 0).astype(np.uint8))):
            (home / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(home / folder / name)
    return home


def keep(out: Path, data: Path, network: str, shift_px: int, *, slices: int = 1, elastic_px: float = 10.0) -> None:
    """A run whose every border is ``shift_px`` off."""
    out.mkdir(exist_ok=True)
    found = {}
    for name in NAMES[1:]:
        with Image.open(data / "label" / name) as picture:
            moved = np.asarray(picture)[:, np.maximum(np.arange(PX) - shift_px, 0)]
        found[name] = (moved > 0).astype(np.float16)
    name = f"{network}-{slices}-{elastic_px:g}"
    np.savez_compressed(out / f"{name}.npz", **found)
    recipe = {"augmentation": {"elastic_px": elastic_px}, "batch": 2, "tile_px": 256, "optimizer": "adam",
              "learning_rate": 2e-3, "balance": 0.5, "seed": 0}  # fmt: skip
    document: dict[str, Any] = {
        "network": {"network": network, "width": 16}, "parameters": 1942306, "recipe": recipe, "steps": 500,
        "training": NAMES[:1] * slices, "tuning": NAMES[1:2], "test": NAMES[2:], "device": "CPU", "torch": "2.13.0",
        "history": [[250, 0.3, 0.7, 1.0], [500, 0.2, 0.8, 2.0]], "tuning_iou": 0.8,
    }  # fmt: skip
    (out / f"{name}.json").write_text(json.dumps(document))


def test_the_table_is_that_of_the_masks(
    benchmarks: dict[str, ModuleType], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for network, shift_px in (("SegNet", 3), ("UNet", 0), ("FCN8s", 1)):
        keep(tmp_path / "runs", data, network, shift_px)
    monkeypatch.setattr(sys, "argv", ["membranes.py", "report"])
    record = tmp_path / "membranes.json"
    words = ["report", "--data", str(data), "--out", str(tmp_path / "runs"), "--record", str(record)]
    assert benchmarks["membranes"].main(words) == 0
    document = json.loads(record.read_text())
    perfect, by_one, by_three = (row["figures"] for row in document["rows"])
    assert [row["network"] for row in document["rows"]] == ["UNet", "FCN8s", "SegNet"]
    assert document["rows"][0]["best_step"] == 500
    assert (perfect["IoU"], perfect["membrane IoU"], perfect["pixel error"], perfect["Rand error"]) == (1, 1, 0, 0)
    # a border that is 1 px off is wrong within 2 px of the true one; one that is 3 px off also farther away
    assert 0 < by_one["pixel error near"] < by_three["pixel error near"]
    assert by_one["pixel error far"] == 0 < by_three["pixel error far"]
    assert by_one["pixel error"] < by_three["pixel error"] < document["all_cell"]["pixel error"]
    with Image.open(record.with_suffix(".png")) as picture:
        assert picture.width > picture.height > 2 * 120
    monkeypatch.setattr(benchmarks["tables"], "RESULTS", tmp_path)
    text = benchmarks["tables"].block("membranes")
    assert f"| {by_three['pixel error near']:.4f} | {by_three['pixel error far']:.4f} |" in text
    assert "500 steps of 2 tiles of 256 px" in text


def test_the_plot_has_a_point_per_run(
    benchmarks: dict[str, ModuleType], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    for slices, elastic_px, shift_px in ((1, 10.0, 2), (1, 0.0, 3), (18, 10.0, 0)):
        keep(runs, data, "UNet", shift_px, slices=slices, elastic_px=elastic_px)
    record = tmp_path / "membranes-slices.json"
    monkeypatch.setattr(sys, "argv", ["membranes.py", "plot"])
    words = ["plot", "--data", str(data), "--out", str(runs), "--record", str(record)]
    assert benchmarks["membranes"].main(words) == 0
    tables = benchmarks["tables"]
    (tmp_path / "engine-paper.json").write_text((BENCHMARKS / "results" / "engine-paper.json").read_text())
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.plots()[tmp_path / "membranes-slices.svg"].count("<circle") == 2 * 3  # cells and membranes
    lines = tables.block("membranes-slices").splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 1", "| 18"]
    assert " 1.0000 |  |" in lines[-1]  # there is no plain run on 18


def test_an_empty_folder_is_named(benchmarks: dict[str, ModuleType], data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no run; train one first"):
        benchmarks["membranes"].main(["report", "--data", str(data), "--out", str(tmp_path)])
