"""Networks with several outputs: images are judged each by what it means, what is no image is left out and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tifffile
from onnx import TensorProto, helper

import unet_rt as urt
from unet_rt import backends
from unet_rt.cli.demo import shipped_model
from unet_rt.cli.main import main
from unet_rt.cli.texts import build_text, inspect_text, verify_text
from unet_rt.contract.contract import Contract, Head
from unet_rt.contract.json import contract_from_json
from unet_rt.contract.task import resolve_heads
from unet_rt.engine import exam
from unet_rt.engine.budget import Budget
from unet_rt.graph.report import inspect
from unet_rt.images.normalize import affine, normalize_pixels
from unet_rt.images.open import open_image

pytestmark = pytest.mark.onnxruntime
Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped network with four outputs more: shares of classes, labels, probabilities, and logits at half the size."""
    model = onnx.load(str(shipped_model()))
    graph = model.graph
    batch, logits = graph.output[0].type.tensor_type.shape.dim[0].dim_param, graph.output[0]
    graph.node.extend(
        [
            helper.make_node("GlobalAveragePool", ["output"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["shares"]),
            helper.make_node("ArgMax", ["output"], ["labels"], axis=1),
            helper.make_node("Sigmoid", ["output"], ["probability"]),
            helper.make_node("AveragePool", ["output"], ["half"], kernel_shape=[2, 2], strides=[2, 2]),
        ]
    )
    kept = onnx.ValueInfoProto()
    kept.CopyFrom(logits)
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info("shares", TensorProto.FLOAT, [batch, 2]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [batch, 1, "h", "w"]),
            kept,
            helper.make_tensor_value_info("probability", TensorProto.FLOAT, [batch, 2, "h", "w"]),
            helper.make_tensor_value_info("half", TensorProto.FLOAT, [batch, 2, "hh", "hw"]),
        ]
    )
    path = tmp_path_factory.mktemp("five") / "five.onnx"
    onnx.save_model(model, str(path))
    return path


class Changed:
    """A session whose output number ``output`` is changed."""

    def __init__(self, session: Any, output: int, change: Callable[[Array], Array]) -> None:
        self._session, self._output, self._change = session, output, change

    def run(self, inputs: Any) -> list[Array]:
        results = list(self._session.run(inputs))
        results[self._output] = self._change(results[self._output])
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


OPTIONS: dict[str, Any] = {
    "backend": "onnxruntime",
    "precision": "fp32",
    "tile": (128, 128),
    "halo": "exact",
    "threads": 1,
}


@pytest.fixture(scope="module")
def windows(sample_images: list[Array]) -> list[Array]:
    """Two pieces of micrographs, a little larger than a tile."""
    return [sample_images[0][40:190, :141], sample_images[2][:133, 60:200]]


@pytest.fixture(scope="module")
def built(five: Path, tmp_path_factory: pytest.TempPathFactory, windows: list[Array]) -> tuple[Path, Any]:
    reports: list[Any] = []
    folder = tmp_path_factory.mktemp("heads") / "five.urt"
    urt.build(five, out=folder, samples=windows, report=reports.append, **OPTIONS).close()
    return folder, reports[0]


def test_what_is_no_image_has_no_say_in_exactness(five: Path) -> None:
    report, alone = inspect(five), inspect(shipped_model())
    assert [o.name for o in report.images] == ["labels", "output", "probability", "half"]
    assert report.exact
    assert report.sizes == alone.sizes
    assert report.parameters == alone.parameters
    assert [o.field for o in report.outputs if o.name == "output"] == [alone.outputs[0].field]
    assert report.outputs[0].field == ()
    assert "no image: left out by build" in inspect_text(report)


def test_every_image_is_judged(built: tuple[Path, Any], windows: list[Array]) -> None:
    folder, report = built
    assert [o.name for o in report.spec.outputs] == ["output", "probability", "half"]
    assert report.spec.contract.task == "multiclass"
    assert report.spec.contract.heads == (
        Head("probability", "multilabel", "probabilities", (), (0.5,)),  # its last operator tells
        Head("half"),  # and this one's does not
    )
    assert any("output shares is left out: it is no image" in note for note in report.notes)
    assert any("output labels is left out: it holds labels" in note for note in report.notes)
    assert "output  half: 2 channels: task left open, values" in build_text(report)
    verdict = report.candidates[report.chosen].verdict
    assert sorted({image.head for image in verdict.images}) == ["half", "output", "probability"]
    assert len(verdict.images) == 3 * len(windows)
    with urt.load(folder) as engine:
        assert engine.spec == report.spec
        assert {"input", "output_0", "output_1", "output_2"} == set(engine.folder.exam())
    found = urt.verify(folder, windows, threads=1)
    assert found.accepted
    assert found.seams.max_abs == 0
    assert len(found.verdict.images) == 3 * len(windows)
    assert urt.verify(folder).accepted  # the exam


def test_the_first_image_is_that_of_the_network_alone(
    built: tuple[Path, Any], engine_folder: Path, windows: list[Array]
) -> None:
    with urt.load(built[0]) as engine, urt.load(engine_folder) as alone:
        for image in windows:
            np.testing.assert_array_equal(urt.predict(engine, image), urt.predict(alone, image))


def test_another_output_is_predicted(built: tuple[Path, Any], windows: list[Array]) -> None:
    """Each is what the network returns for the whole image, at its own scale, by its own decision."""
    image = windows[0][:144, :136]  # sizes that the network takes as they are: the canvas is the image
    reports: list[Any] = []
    with urt.load(built[0]) as engine, open_image(image, engine.spec.contract) as source:
        numbers = affine(engine.spec.contract.normalization, source).plane(0)
        logits, probability, half = (y[0] for y in engine.run(normalize_pixels(image[None], numbers)[None]))
        np.testing.assert_array_equal(
            urt.predict(engine, image, head="half", output="raw", report=reports.append), half
        )
        assert reports[0].notes == [
            "output half of output, probability, half",
            "output half has 1/2 x 1/2 samples per pixel: its results are written at that size, not the image's",
        ]
        np.testing.assert_array_equal(urt.predict(engine, image, head="probability", output="raw"), probability)
        np.testing.assert_array_equal(urt.predict(engine, image, head="probability"), probability > 0.5)
        np.testing.assert_array_equal(
            urt.predict(engine, image, head="output", report=reports.append), logits.argmax(0)
        )
        np.testing.assert_array_equal(urt.predict(engine, image), logits.argmax(0))
        assert set(reports[1].class_share) == {"background", "nucleus"}
        with pytest.raises(urt.ContractError, match="no output 'shares'"):
            urt.predict(engine, image, head="shares")
        with pytest.raises(urt.ContractError, match="was left open"):
            urt.predict(engine, image, head="half", output="mask")


@pytest.mark.parametrize(("output", "name"), [(1, "probability"), (2, "half")])
def test_an_output_that_is_wrong_is_found(
    five: Path,
    built: tuple[Path, Any],
    windows: list[Array],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: int,
    name: str,
) -> None:
    """By build, and by the exam, where its meaning is known; the first output is right in either."""
    declared = Contract(heads=(Head("half", "regression", "values"),))
    module = backends.get("onnxruntime")
    real = module.load

    def load(*args: Any, **kwargs: Any) -> Any:
        session = real(*args, **kwargs)
        return session if "graph.onnx" in str(args[0]) else Changed(session, output, lambda y: y[:, ::-1])

    with urt.load(built[0]) as engine:
        heads = (engine.spec.contract.heads[0], *declared.heads)
        engine.spec = replace(engine.spec, contract=replace(engine.spec.contract, heads=heads))
        engine._session = Changed(engine._session, output, lambda y: y[:, ::-1])
        verdict = exam.sit(engine, engine.folder.exam())
    assert not verdict.accepted
    assert all(f"output {name}" in reason for reason in verdict.reasons)
    monkeypatch.setattr(module, "load", load)
    with pytest.raises(urt.ParityError, match=f"output {name}: "):
        urt.build(five, contract=declared, out=tmp_path / "x.urt", samples=windows, **OPTIONS)
    assert not (tmp_path / "x.urt").exists()


def test_an_output_of_unknown_meaning_is_measured_and_not_judged(built: tuple[Path, Any], windows: list[Array]) -> None:
    """No budget was given for it, so it keeps nothing from use: its numbers are in the record, and are said."""
    folder, report = built
    assert any("output half is not judged, only measured" in note for note in report.notes)
    images = json.loads(next(folder.glob("parity-*.json")).read_text())["verdict"]["images"]
    assert {image["head"]: image["judged"] for image in images} == {"output": True, "probability": True, "half": False}
    with urt.load(folder) as engine:
        engine._session = Changed(engine._session, 2, lambda y: y + 1)
        verdict = exam.sit(engine, engine.folder.exam())
    assert verdict.accepted
    assert verdict.relative == 0, "the numbers of a verdict are those that it is reached by"
    assert min(image.relative for image in verdict.images if image.head == "half") > Budget().error
    found = urt.verify(folder, windows[:1], threads=1)
    assert "output half, not judged: largest error 0.00e+00" in verify_text(found)


def test_a_record_is_held_against_the_budget_of_values_too(built: tuple[Path, Any]) -> None:
    """A verdict that calls itself accepted is not believed, nor excused by the labels of another output."""
    with urt.load(built[0]) as engine:
        folder = engine.folder
    for judged, text in ((True, "misses its budget"), (False, None)):
        parity = json.loads(json.dumps(folder.parity))
        for image in parity["verdict"]["images"]:
            if image["head"] == "half":
                image.update(relative=0.5, judged=judged)
        changed = replace(folder, parity=parity)
        if text is None:
            exam.check_record(changed)
        else:
            with pytest.raises(urt.EngineError, match=text):
                exam.check_record(changed)
    for images in (5, [{}], ["x"]):
        parity["verdict"]["images"] = images
        with pytest.raises(urt.EngineError, match="is damaged"):
            exam.check_record(replace(folder, parity=parity))


def test_outputs_are_declared_in_the_contract(five: Path, windows: list[Array], tmp_path: Path) -> None:
    path = tmp_path / "contract.json"
    heads = [
        {"name": "half", "task": "multiclass", "output_is": "logits", "classes": ["background", "nucleus"]},
        {"name": "probability", "task": "multilabel", "threshold": [0.5, 0.9]},
    ]
    path.write_text(json.dumps({"heads": heads}))
    engine = urt.build(five, contract=path, out=tmp_path / "x.urt", samples=windows[:1], **OPTIONS)
    engine.close()
    assert engine.spec.contract_of(2).classes == ("background", "nucleus")
    assert engine.spec.contract_of(1).threshold == (0.5, 0.9)
    assert engine.spec.contract_of(0).task == "multiclass"
    assert contract_from_json(json.loads(json.dumps(engine.spec.contract.to_json()))) == engine.spec.contract
    image = engine.folder.parity["verdict"]["images"][2]
    assert (image["head"], image["label_change"]) == ("half", 0.0)
    assert set(image["dice"]) == {"background", "nucleus"}


@pytest.mark.parametrize(
    ("heads", "text"),
    [
        ([{"name": "x"}], "declares a head 'x'; the outputs are a, b"),
        ([{"name": "b", "task": "binary"}], "output b: a binary task has one output channel"),
        ([{"name": "b"}, {"name": "b"}], "named twice"),
        ([{"task": "binary"}], "each with the name"),
        ([{"name": "b", "colour": "red"}], "unknown key 'colour'"),
        ([{"name": "b", "threshold": [2]}], "must lie in 0 to 1"),
        ({"b": {}}, "must be a list"),
    ],
)
def test_heads_that_cannot_be(heads: Any, text: str) -> None:
    with pytest.raises(urt.ContractError, match=text):
        resolve_heads(contract_from_json({"heads": heads}), [("a", 2, "Softmax"), ("b", 2, "Conv")], [None, None])


def test_options_win_over_the_head_of_the_first_output() -> None:
    outputs = [("a", 1, "Conv"), ("b", 1, "Conv")]
    said = contract_from_json({"task": "regression", "heads": [{"name": "a", "task": "binary"}]})
    assert resolve_heads(said, outputs, [None, None]).task == "regression"
    said = contract_from_json({"heads": [{"name": "a", "task": "binary"}]})
    found = resolve_heads(said, outputs, [None, None])
    assert (found.task, found.heads) == ("binary", (Head("b"),))
    with pytest.raises(urt.ContractError, match="output a: the output has one channel"):
        resolve_heads(Contract(), outputs, [None, None])


def test_an_output_is_found_by_name(built: tuple[Path, Any]) -> None:
    spec = built[1].spec
    assert (spec.head(None), spec.head("half")) == (0, 2)
    with pytest.raises(urt.ContractError, match="no output 'shares'; its outputs are output, probability, half"):
        spec.head("shares")


def test_a_regression_beside_labels_is_judged_by_its_error() -> None:
    """The labels of one output do not excuse another's values."""
    from unet_rt.engine.parity import ImageParity, judge

    label = ImageParity("a", 100, 0.0, {}, {}, 0.0, 0.0, 0.0, "mask")
    value = ImageParity("a", 100, None, {}, {}, 1.0, 0.1, 0.5, "distance")
    verdict = judge([label, value], Budget())
    assert not verdict.accepted
    assert verdict.reasons == ("a, output distance: largest error 5.00e-01 of the output's range, budget 1.00e-02",)


def test_tiles_run_once_for_all_outputs(built: tuple[Path, Any], windows: list[Array]) -> None:
    from unet_rt.baseline.results import raw_result, raw_results
    from unet_rt.baseline.samples import draw

    runs = []

    def count(y: Array) -> Array:
        runs.append(len(y))
        return y

    with urt.load(built[0]) as engine:
        (sample,) = draw(windows[:1], engine.spec.contract, spatial=2, network_channels=1)
        grid = engine.spec.grid(sample.shape, (128, 128))
        expected = [raw_result(engine, sample, grid, output=k) for k in range(3)]
        engine._session = Changed(engine._session, 0, count)
        found = raw_results(engine, sample, grid)
    assert 0 < sum(runs) <= grid.count
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_labels_belong_to_the_output_that_is_named(
    built: tuple[Path, Any], windows: list[Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number per pixel for classes, a channel per class where they overlap, and nothing for values."""
    (tmp_path / "images").mkdir()
    with urt.load(built[0]) as engine:
        for k, window in enumerate(windows):
            tifffile.imwrite(tmp_path / "images" / f"{k}.tif", window)
            for head in ("output", "probability"):
                (tmp_path / head).mkdir(exist_ok=True)
                mask = urt.predict(engine, window, head=head)
                mask[..., :30, :] = 0  # labels that are not quite the network's
                tifffile.imwrite(tmp_path / head / f"{k}.tif", mask)
                wanted = (mask > 0) if mask.ndim == 3 else (mask > 0)[None]
                assert wanted.any(axis=(1, 2)).all()
    command = ["verify", str(built[0]), "--images", str(tmp_path / "images"), "--labels"]
    for options, head in (([], "output"), (["--head", "output"], "output"), (["--head", "probability"], "probability")):
        assert main([*command, str(tmp_path / head), *options, "--json"]) == 0
        truth = json.loads(capsys.readouterr().out)["truth"]
        assert truth["head"] == head
        assert 0.5 < truth["engine_iou"] < truth["engine_dice"] < 1
        assert (truth["engine_dice"], truth["drop"]) == (truth["baseline_dice"], 0)
    for head, text in (("half", "no task"), ("shares", "no output 'shares'"), ("probability", "channels")):
        with pytest.raises(urt.UnetRtError, match=text):
            urt.verify(built[0], tmp_path / "images", labels=tmp_path / "output", head=head)
    with pytest.raises(urt.ContractError, match="pass --labels as well"):
        urt.verify(built[0], tmp_path / "images", head="half")
