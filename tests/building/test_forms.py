"""Networks as other tools export them: inspected, built, predicted and verified, against plain ONNX Runtime on the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

import forms
from forms import FORMS, Array, answers, images, normalised, trained, written
from onnx import numpy_helper

import unet_rt as urt
from unet_rt.building.report import BuildReport
from unet_rt.cli.main import main
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.engine.folder import read_folder

pytestmark = pytest.mark.onnxruntime
SAMPLES = images(3)
AS_LABELS = Normalization("percentile", scope="image", percentiles=(1.0, 99.8))
PART = {"qdq": "int8", "qoperator": "int8", "dynamic": "int8"}  # others are built in FP32
STRIDE, HALO = 8, 53


def built(path: Path, out: Path, **options: Any) -> BuildReport:
    reports: list[BuildReport] = []
    given = {"samples": SAMPLES, "backend": "onnxruntime", "tile": (144, 136), "halo": "exact", "threads": 1} | options
    urt.build(path, out=out, report=reports.append, **given).close()
    return reports[0]


def canvas(image: Array) -> Array:
    """(1, 1, Y, X): what the network gets of a whole image, its ends mirrored to multiples of the stride."""
    ends = [(0, 0), (0, 0), *((0, -n % STRIDE) for n in image.shape)]
    return np.pad(normalised(image), ends, mode="reflect")


def labels_of(result: Array, image: Array) -> Array:
    """Labels (Y, X) of what a file says of a canvas, whatever its axes and whether labels or values."""
    shape = tuple(n + -n % STRIDE for n in image.shape)
    if result.dtype.kind == "f":  # values, channels anywhere
        axis = result.shape.index(2, 1)
        result = result.argmax(axis)
    return result.reshape(shape)[: image.shape[0], : image.shape[1]]


WHOLE = ("argmax", "softmax-argmax-kept-int32", "argmax-nhwc", "argmax-nhwc-kept-int32", "fp16", "fp16-ends", "qdq",
         "qoperator", "initialisers-ir3", "flat-last", "flat-permuted", "flat-first")  # fmt: skip


@pytest.mark.parametrize("form", WHOLE)
def test_tiles_and_the_whole_are_what_the_file_says(form: str, tmp_path: Path) -> None:
    path = written(form, tmp_path)
    report = urt.inspect(path)
    (output,) = report.outputs
    assert (output.exact, output.channels, report.sizes[0].stride) == (True, 2, STRIDE)
    assert [f.halo for f in output.field] == [(HALO, HALO)] * 2
    made = built(path, tmp_path / "x.urt", precision=PART.get(form, "fp32"))
    assert made.spec.contract.task == "multiclass"
    pixels = canvas(SAMPLES[0])
    if form.startswith("argmax-nhwc"):
        pixels = pixels.transpose(0, 2, 3, 1)
    half = form == "fp16"
    right = labels_of(answers(path, pixels.astype(np.float16 if half else np.float32))[0], SAMPLES[0])
    assert 0.1 < right.mean() < 0.3
    # What FP16 rounds moves what lies on the fence; the budget of FP16 is the bound.
    allowed = 1e-3 if form.startswith("fp16") else 0.0
    with urt.load(tmp_path / "x.urt") as engine:
        for tile in (None, (128, 120)):
            mask = urt.predict(engine, SAMPLES[0], tile=tile)
            assert (mask != right).mean() <= allowed
        share = urt.predict(engine, SAMPLES[0], output="probability")
    (logits,) = answers(trained(), canvas(SAMPLES[0]))
    truth = 1 / (1 + np.exp(logits[0, 0] - logits[0, 1]))[: share.shape[-2], : share.shape[-1]]
    # Sums of FP32 in another order, rounding to FP16 (2^-11 of logits within 8), 256 levels of INT8
    np.testing.assert_allclose(
        share[1], truth, atol={"qdq": 0.3, "qoperator": 0.3}.get(form, 2e-2 if allowed else 1e-5)
    )
    verdict = urt.verify(tmp_path / "x.urt", SAMPLES[:1])
    assert verdict.accepted
    assert verdict.verdict.label_change == 0


def test_fp16_is_held_against_itself(tmp_path: Path) -> None:
    """The widened graph is the baseline, and the file's own answers are what that is compared with."""
    report = built(written("fp16", tmp_path), tmp_path / "x.urt", precision="fp32")
    (note,) = [text for text in report.notes if "computes in FP16" in text]
    assert "the file itself differs in 0.0" in note
    assert report.spec.inputs[0].dtype == "float32"
    model = onnx.load(read_folder(tmp_path / "x.urt").file("model"))
    assert model.graph.initializer[0].data_type == onnx.TensorProto.FLOAT16, "as given"


def test_fp16_that_leaves_its_range_is_refused(tmp_path: Path) -> None:
    """Activations beyond 65504 are infinite in the file's own arithmetic, and none of the baseline's."""
    model = forms.in_half(trained(), False)
    (first,) = [t for t in model.graph.initializer if t.name == model.graph.node[0].input[1]]
    loud = numpy_helper.to_array(first).astype(np.float32) * 6e4
    first.CopyFrom(numpy_helper.from_array(np.clip(loud, -65504, 65504).astype(np.float16), first.name))
    onnx.save(model, tmp_path / "loud.onnx")
    with pytest.raises(urt.ParityError, match=r"computes in FP16, and its own answers .* give the FP32 graph"):
        built(tmp_path / "loud.onnx", tmp_path / "x.urt", precision="fp32")
    assert not (tmp_path / "x.urt").exists()


def test_folds_in_fp16_are_averaged_and_quantised_ones_are_not(tmp_path: Path) -> None:
    half, whole = written("fp16", tmp_path), tmp_path / "whole.onnx"
    onnx.save(trained(), whole)
    out = tmp_path / "x.urt"
    urt.build(
        [half, whole],
        samples=SAMPLES[:1],
        out=out,
        halo="exact",
        threads=1,
        backend="onnxruntime",
        precision="fp32",
        tile=(144, 136),
    ).close()
    with pytest.raises(
        urt.GraphError, match=r"qdq\.onnx is quantised already, and several networks are averaged in FP32"
    ):
        urt.build([whole, written("qdq", tmp_path)], samples=SAMPLES, out=tmp_path / "y.urt")


@pytest.mark.parametrize("form", ["qdq", "dynamic"])
def test_quantised_files_run_as_given(form: str, tmp_path: Path) -> None:
    path, out = written(form, tmp_path), tmp_path / "x.urt"
    options = {"halo": "auto", "precision": "auto", "backend": "auto"}
    samples = None if form == "qdq" else SAMPLES  # generated ones prove that a file agrees with itself
    report = built(path, out, samples=samples, tile=(512, 512) if form == "qdq" else (128, 128), **options)
    assert {c.key for c in report.candidates} == {("onnxruntime", "int8", "")}
    record = read_folder(out).parity
    assert record is not None
    assert record["baseline"]["precision"] == "int8"
    assert record["verdict"]["label_change"] == 0
    with urt.load(out) as engine:
        assert urt.predict(engine, SAMPLES[0]).mean() > 0.05
    with pytest.raises(
        urt.ContractError, match="runs as given: INT8 in ONNX Runtime on the CPU; leave --precision fp32"
    ):
        built(path, tmp_path / "y.urt", precision="fp32")
    with pytest.raises(urt.ContractError, match="leave --backend openvino"):
        built(path, tmp_path / "y.urt", precision="auto", backend="openvino")


def test_dynamic_quantisation_is_not_exact(tmp_path: Path) -> None:
    """Its ranges are those of a tile: the tile is part of the model."""
    path = written("dynamic", tmp_path)
    report = urt.inspect(path)
    assert not report.exact
    assert "DynamicQuantizeLinear" in report.outputs[0].reasons[0]
    assert not any("from the image" in reason for reason in report.outputs[0].reasons)
    built(path, tmp_path / "x.urt", precision="auto", halo="auto", tile=(160, 144))
    image = images(1, 200)[0][:160, :144]  # one tile, whose answer is the file's
    (right,) = answers(path, normalised(image))
    with urt.load(tmp_path / "x.urt") as engine:
        mask = urt.predict(engine, image)
    assert (mask == right[0].argmax(0)).all()


def test_one_size_is_freed_whatever_form_the_end_has(tmp_path: Path) -> None:
    path = written("flat-last-256", tmp_path)
    report = built(path, tmp_path / "x.urt", precision="fp32")
    assert report.spec.free_size
    assert any("its last Reshape is undone" in note for note in report.notes)
    with urt.load(tmp_path / "x.urt") as engine:
        mask = urt.predict(engine, SAMPLES[0])
    (logits,) = answers(trained(), canvas(SAMPLES[0]))
    assert (mask == labels_of(logits, SAMPLES[0])).all()


@pytest.mark.parametrize(("form", "dtype", "top"), [("uint8", np.uint8, 255), ("uint16", np.uint16, 65535)])
def test_networks_of_whole_numbers_normalise_themselves(form: str, dtype: Any, top: int, tmp_path: Path) -> None:
    path = written(form, tmp_path)
    grey = [np.rint(image / image.max() * top).astype(dtype) for image in SAMPLES]
    generated = [(None, (512, 512))] if form == "uint8" else []
    for samples, tile in (*generated, (grey, (144, 136))):
        report = built(path, tmp_path / "x.urt", samples=samples, tile=tile, precision="fp32", overwrite=True)
        assert report.spec.contract.normalization == Normalization("none")
        assert report.spec.takes_whole_numbers
    ends = [(0, -n % STRIDE) for n in grey[0].shape]
    (logits,) = answers(path, np.pad(grey[0], ends, mode="reflect")[None, None])
    right = labels_of(logits, grey[0])
    with urt.load(tmp_path / "x.urt") as engine:
        assert (urt.predict(engine, grey[0], tile=(128, 128)) == right).all()
        with pytest.raises(urt.BackendError, match=rf"whole numbers from 0 to {top} \(--normalize none\)"):
            urt.predict(engine, grey[0] + np.float32(0.5))
    assert urt.verify(tmp_path / "x.urt", grey[:1]).accepted
    with pytest.raises(urt.ContractError, match=f"takes {form}, whole grey levels.*use --normalize none"):
        built(path, tmp_path / "y.urt", samples=grey, contract=Contract(normalization=AS_LABELS))


def test_resampled_grey_levels_stay_whole(tmp_path: Path) -> None:
    contract = Contract(pixel_size_um=(0.5, 0.5))
    grey = [np.rint(image / image.max() * 255).astype(np.uint8) for image in SAMPLES]
    built(written("uint8", tmp_path), tmp_path / "x.urt", samples=grey, precision="fp32", contract=contract)
    with urt.load(tmp_path / "x.urt") as engine:
        mask = urt.predict(engine, grey[0], resample=True, pixel_size_um=(0.6, 0.6))
    assert mask.shape == grey[0].shape
    assert mask.mean() > 0.05


@pytest.mark.parametrize("form", ["argmax", "fp16", "qoperator", "initialisers", "flat-first"])
def test_inspect_says_what_the_file_is(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(written(form, tmp_path))]) == 0
    text = capsys.readouterr().out
    said = {
        "argmax": "rewritten: ArgMax at the end is left to unet-rt: the output is output, the 2 channels it chooses from",
        "fp16": "computes in fp16: build widens it to fp32, the baseline",
        "qoperator": "quantised: build runs it as given, in ONNX Runtime, and holds it against itself",
        "initialisers": "weights that were listed among the inputs are none",
        "flat-first": "is an image again, and no list of pixels",
    }
    assert said[form] in text
    assert "exact: tiles equal the whole image" in text


def test_weights_among_the_inputs_are_constants_again(tmp_path: Path) -> None:
    """Listed as inputs they may change at every run, and ONNX Runtime lays out, folds and fuses none of them."""
    import onnxruntime

    def optimised(model: Path) -> Counter[str]:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        return Counter(f"{node.domain}.{node.op_type}" for node in onnx.load(tmp_path / "optimised.onnx").graph.node)

    built(written("initialisers-ir3", tmp_path), tmp_path / "x.urt", precision="fp32")
    onnx.save(trained(), tmp_path / "plain.onnx")
    assert optimised(read_folder(tmp_path / "x.urt").file("graph")) == optimised(tmp_path / "plain.onnx")


def _sizes(values: Sequence[Any]) -> list[int]:
    return [len(v.type.tensor_type.shape.dim) for v in values]


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"slices", "dynamic", "qdq", "qoperator"}))
def test_a_second_call_changes_nothing(form: str, tmp_path: Path) -> None:
    from unet_rt.graph.given import settle

    given = onnx.load(written(form, tmp_path))
    before = given.SerializeToString()
    once, done = settle(given)
    assert given.SerializeToString() == before
    assert bool(done) == form.startswith(("argmax", "softmax", "init", "flat"))
    twice, more = settle(once)
    assert twice is once
    assert not more
    onnx.checker.check_model(once, full_check=True)
    assert _sizes(once.graph.output) == [4]
