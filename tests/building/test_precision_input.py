"""What builds of reduced precision are given by mistake: other graphs, other pixels, budgets that nothing meets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper

import unet_rt as urt
from unet_rt.building import engines as build_engines
from unet_rt.building.report import BuildReport
from unet_rt.cli.demo import shipped_model
from unet_rt.cli.main import main
from unet_rt.contract.contract import Contract
from unet_rt.drawing.microscopy import microscopy
from unet_rt.graph.passes.half import half

pytestmark = pytest.mark.onnxruntime
SAMPLES = [microscopy((160, 160), seed=seed).image for seed in range(40, 43)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_engines, "CALIBRATION_PX", 128**2)


def built(model: Path, out: Path, **options: Any) -> BuildReport:
    reports: list[BuildReport] = []
    given = {"samples": SAMPLES, "backend": "onnxruntime", "tile": (128, 128), "halo": 8, "threads": 1} | options
    urt.build(model, out=out, report=reports.append, **given).close()
    return reports[0]


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_graph_of_lower_precision(kind: Any, tmp_path: Path) -> None:
    """Widened, and lowered again from there; of BF16, that ONNX Runtime does not run, nothing else is there to compare."""
    model = onnx.load(shipped_model())
    half(model, to=kind)
    onnx.save(model, tmp_path / "half.onnx")
    report = built(tmp_path / "half.onnx", tmp_path / "x.urt", precision="int8")
    (note,) = [text for text in report.notes if f"computes in {kind.upper()}: widened to FP32" in text]
    assert ("the file itself differs in" if kind == "fp16" else "the file itself was not compared") in note
    assert report.spec.precision == "int8"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_fp32_behind_an_fp16_input(precision: str, tmp_path: Path) -> None:
    """What casts its FP16 input and computes in FP32 is an FP32 graph; tiles are rounded for it."""
    model = onnx.load(shipped_model())
    (given,) = model.graph.input
    model.graph.node.insert(0, helper.make_node("Cast", ["input16"], ["input"], to=TensorProto.FLOAT))
    given.name = "input16"
    given.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "input16.onnx")
    report = built(tmp_path / "input16.onnx", tmp_path / "x.urt", precision=precision)
    assert report.spec.inputs[0].dtype == "float16"
    verdict = report.candidates[report.chosen].verdict
    assert verdict is not None
    assert verdict.accepted
    with urt.load(tmp_path / "x.urt") as engine:
        assert urt.predict(engine, SAMPLES[0]).mean() > 0.02


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (np.zeros((160, 160), np.uint16), "every pixel is 0"),
        (np.full((160, 160), 900, np.uint16), "every pixel is 900"),
        (np.random.default_rng(0).integers(0, 4000, (160, 160)).astype(np.uint16), "it is noise"),
    ],
)
def test_samples_that_cannot_calibrate(sample: np.ndarray[Any, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(urt.ImageError, match=text):
        built(shipped_model(), tmp_path / "x.urt", samples=[sample] * 4, precision="int8")


def test_samples_of_another_kind(tmp_path: Path) -> None:
    """Other channels are refused; other grey levels than declared are a warning, for any precision."""
    colour = np.stack(SAMPLES, axis=-1)
    with pytest.raises(urt.UnetRtError, match="--channels"):
        built(shipped_model(), tmp_path / "x.urt", samples=[colour] * 3, precision="int8")
    declared = Contract(value_range=(0.0, 255.0))
    report = built(shipped_model(), tmp_path / "x.urt", precision="fp32", contract=declared)
    assert any("the model declares 0 to 255" in text for text in report.warnings)
    small = [image.astype(np.float32) / 65535 for image in SAMPLES]
    report = built(shipped_model(), tmp_path / "y.urt", samples=small, precision="fp32", contract=declared)
    assert any("the model declares 0 to 255" in text for text in report.warnings)
    ((low, high),) = report.spec.options["input_range"]
    assert low < 0.1 < 0.9 < high, "percentiles 1 and 99.8 are 0 and 1"


def test_a_budget_of_nothing(tmp_path: Path) -> None:
    """FP32 in the library of the baseline is the baseline; INT8 never is."""
    budget = urt.Budget(label_change=0, dice=1)
    report = built(shipped_model(), tmp_path / "x.urt", precision="fp32", budget=budget, halo="exact", tile=(192, 192))
    verdict = report.candidates[report.chosen].verdict
    assert verdict is not None
    assert verdict.label_change == 0
    with pytest.raises(
        urt.ParityError, match=r"allow more with --budget label_change=\S+e-\d+ dice=0\.\d+.*pass --precision fp32"
    ):
        built(shipped_model(), tmp_path / "y.urt", precision="int8", budget=budget, search_minutes=0.05)
    declared = Contract(value_range=(0.0, 255.0))
    with pytest.raises(urt.ParityError, match=r"but look at this first: the samples run from .* declares 0 to 255"):
        built(
            shipped_model(), tmp_path / "y.urt", precision="int8", budget=budget, search_minutes=0.01, contract=declared
        )


def test_copies_of_one_image_are_one_image(tmp_path: Path) -> None:
    """It is cut in two, as if it had been given once: what calibrates never judges."""
    report = built(shipped_model(), tmp_path / "x.urt", precision="int8", samples=[SAMPLES[0]] * 4)
    assert any("3 of the samples are copies of others, and left out" in note for note in report.notes)
    assert any("the one sample window is cut" in note for note in report.notes)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("0", "--budget '0' is not KEY=NUMBER; pass e.g. --budget label_change=1e-3"),
        ("label_change=", "is not KEY=NUMBER"),
        ("label_change=-1", "label_change=-1.0 is outside 0 to 1; pass e.g. label_change=1e-3"),
        ("labels=0", "--budget knows class_px, dice, error, label_change, rounding, seam, truth, not labels"),
    ],
)
def test_budgets_on_the_command_line(given: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(shipped_model()), "--budget", given]) == 2
    assert text in capsys.readouterr().err


def test_a_graph_without_convolutions_has_nothing_for_int8(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.array([2.0], np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [weight],
    )
    path = tmp_path / "mul.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    contract = Contract(normalization=urt.Normalization("zscore"), task="regression", output_is="values")
    with pytest.raises(urt.UnetRtError, match="no convolution"):
        built(path, tmp_path / "x.urt", precision="int8", contract=contract, halo="exact")


def test_the_record_holds_every_batch_size(tmp_path: Path) -> None:
    """Per batch size and precision: labels per million, Dice per class, errors, whether rows are identical."""
    built(shipped_model(), tmp_path / "x.urt", precision="int8")
    from unet_rt.engine.folder import read_folder

    record = read_folder(tmp_path / "x.urt").parity
    assert record is not None
    rows = {(row["variant"], row["batch"]): row for row in record["rows"]}
    assert {batch for _, batch in rows} == {1, 2}
    assert {(row["backend"], row["device"], row["output"]) for row in record["rows"]} == {("onnxruntime", "cpu", "")}
    hashes = [{entry["sha256"] for entry in record[key]} for key in ("images", "calibrated_on")]
    assert all(hashes)
    assert hashes[0].isdisjoint(hashes[1])
    for row in rows.values():
        assert row["precision"] == "int8"
        assert row["identical_rows"]
        assert 0 <= row["labels_changed_per_million"] < 1e5
        assert row["dice"].keys() == {"background", "nucleus"}
        assert 0 < row["mean_abs"] < row["max_abs"]
