"""Builds: what is refused, what is measured and recorded, and which engine comes out."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tifffile

import unet_rt as urt
from unet_rt import backends
from unet_rt.baseline.model import open_model
from unet_rt.baseline.samples import draw
from unet_rt.baseline.tiles import kept_share, untiled_spec
from unet_rt.building import choice as build_choice
from unet_rt.building import engines as build_engines
from unet_rt.building import int8 as build_int8
from unet_rt.building import job as build_job
from unet_rt.building import record as build_record
from unet_rt.building import tiling as build_tiling
from unet_rt.building.report import BuildReport, Candidate
from unet_rt.cli.demo import shipped_model
from unet_rt.cli.texts import build_text
from unet_rt.contract import metadata as contract_io
from unet_rt.contract.contract import Contract, Head, Normalization
from unet_rt.engine.folder import read_folder
from unet_rt.judging.verify import verify
from unet_rt.system import facts as machine
from unet_rt.system import limits
from unet_rt.tiling.stitch import blend_weight

pytestmark = pytest.mark.onnxruntime
Array = np.ndarray[Any, np.dtype[Any]]
MODULE = importlib.import_module("unet_rt.building.build")  # the package's name ``build`` is the function
NONE = Normalization("none")
LOGITS = Contract(task="multiclass", output_is="logits", normalization=NONE)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are compared at small tiles, and one larger tile is tried."""
    monkeypatch.setattr(build_tiling, "PROBE_PX", 160**2)
    monkeypatch.setattr(build_tiling, "TILE_AREAS", (224**2,))


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """ONNX files of generated networks, by their parameters."""
    pytest.importorskip("torch")
    import networks

    folder = tmp_path_factory.mktemp("networks")

    @cache
    def make(size: int = 32, free: bool = True, **parameters: Any) -> Path:
        path = folder / f"network-{len(list(folder.iterdir()))}.onnx"
        spec = networks.UNetSpec(**({"depth": 1} | parameters))
        networks.export(networks.build(spec), [(1, spec.inputs, size, size)], path, free=free, free_batch=free)
        return path

    return make


@pytest.fixture(scope="session")
def textures() -> list[Array]:
    pytest.importorskip("torch")
    import networks

    return [
        networks.texture((1, 1, *shape), seed=seed)[0, 0]
        for seed, shape in enumerate([(150, 130), (97, 161), (128, 128)])
    ]


def built(model: Path, out: Path, **options: Any) -> tuple[BuildReport, urt.Engine]:
    reports: list[BuildReport] = []
    options = {"backend": "onnxruntime", "precision": "fp32", "threads": 1} | options
    engine = urt.build(model, out=out, report=reports.append, **options)
    return reports[0], engine


def refused(error: type[Exception], text: str, model: Path, folder: Path, **options: Any) -> None:
    """The build fails with this text and leaves the folder as it was."""
    with pytest.raises(error, match=text):
        built(model, folder / "x.urt", **options)
    assert list(folder.iterdir()) == []


# --- without and with samples -------------------------------------------------------------------------------------


def test_no_option_at_all(network, tmp_path, monkeypatch):
    """FP32, all backends, generated tiles, a record that says so, and the command that would prove more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_job, "PARITY_SHARE", 0.0)  # one generated sample is enough here
    model = network(norm="batch")
    reports: list[BuildReport] = []
    with urt.build(model, report=reports.append) as engine:
        (report,) = reports
        assert report.folder == Path(model.name).with_suffix(".urt")
        assert (tmp_path / report.folder / "spec.json").exists()
        assert report.kind == "synthetic"
        assert {c.precision for c in report.candidates} == {"fp32"}
        assert {c.backend for c in report.candidates} == set(backends.usable("cpu"))
        assert engine.spec.precision == "fp32"
        record = engine.folder.parity
    assert list(report.reached) == ["samples", "tiling", "candidates", "choice"]
    assert 0 < report.reached["samples"] < report.reached["tiling"] < report.reached["candidates"]
    assert report.reached["candidates"] <= report.reached["choice"]
    assert record["kind"] == "synthetic"
    assert report.advice.startswith("unet-rt build")
    assert "--samples" in report.advice
    assert f"--out {report.folder} --overwrite" in report.advice
    assert build_text(report).splitlines()[-1].endswith(report.advice)
    urt.load(report.folder).close()  # such a record is good enough for FP32


def test_a_synthetic_record_is_for_fp32_only(network, tmp_path):
    refused(urt.ContractError, "bf16 needs samples", network(), tmp_path, precision="bf16", contract=LOGITS)


@pytest.mark.parametrize("form", ["folder", "list", "path", "arrays", "array", "stack"])
def test_forms_of_samples(network, textures, tmp_path, form):
    for k, texture in enumerate(textures):
        tifffile.imwrite(tmp_path / f"{k}.tif", texture)
    paths = sorted(tmp_path.glob("*.tif"))
    samples = {
        "folder": str(tmp_path), "list": paths, "path": paths[1], "arrays": textures, "array": textures[1],
        "stack": np.stack([textures[2], textures[2][::-1]]),
    }[form]  # fmt: skip
    more = {"axes": "TYX"} if form == "stack" else {}
    report, engine = built(network(), tmp_path / "x.urt", samples=samples, contract=LOGITS, **more)
    engine.close()
    count = {"folder": 3, "list": 3, "arrays": 3, "stack": 2}.get(form, 1)
    assert (report.kind, report.samples) == ("samples", count)
    assert report.advice == ""
    assert any("three or more prove more" in note for note in report.notes) == (form in ("path", "array", "stack"))
    record = engine.folder.parity
    assert [tuple(i["shape"][1:]) for i in record["images"]][-1] == (textures[2] if count > 1 else textures[1]).shape
    assert [i["sha256"] for i in record["images"]] == engine.spec.options["sample_sha256"]
    drawn = textures if count == 3 else [samples if isinstance(samples, np.ndarray) else textures[1]]
    expected = (min(t.min() for t in drawn), max(t.max() for t in drawn))
    assert engine.spec.contract.value_range == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (np.zeros((90, 90), np.float32), "every pixel is 0"),
        (np.full((90, 90), 7, np.float32), "every pixel is 7"),
        (np.random.default_rng(0).normal(size=(90, 90)).astype(np.float32), "it is noise"),
    ],
)
def test_samples_that_prove_nothing(network, textures, tmp_path, sample, text):
    refused(urt.ImageError, text, network(), tmp_path, samples=[sample, sample], contract=LOGITS)
    report, engine = built(network(), tmp_path / "x.urt", samples=[textures[0], sample], contract=LOGITS, tile=(64, 64))
    engine.close()
    assert report.samples == 1
    assert any(text in sentence for sentence in (*report.notes, *report.warnings)), "left out, and said so"


def test_other_samples_that_cannot_be(network, textures, tmp_path):
    broken = textures[0].copy()
    broken[5, 5] = np.nan
    refused(urt.ImageError, "NaN|infinite", network(), tmp_path, samples=[broken], contract=LOGITS)
    (tmp_path.parent / f"{tmp_path.name}-empty").mkdir()
    refused(
        urt.ImageError,
        "no image",
        network(),
        tmp_path,
        samples=tmp_path.parent / f"{tmp_path.name}-empty",
        contract=LOGITS,
    )
    refused(urt.ImageError, "nowhere", network(), tmp_path, samples=tmp_path / "nowhere", contract=LOGITS)


def test_integer_samples_need_a_normalisation(network, tmp_path, sample_images):
    declared = Contract(task="multiclass", output_is="logits")
    text = f"uint16 pixels from {sample_images[0].min()} to {sample_images[0].max()}"
    refused(urt.ContractError, text, network(), tmp_path, samples=sample_images, contract=declared)


# --- parity decides -----------------------------------------------------------------------------------------------


class Changed:
    """A session whose answers are changed."""

    def __init__(self, session: Any, change: Callable[[Array], Array]) -> None:
        self._session, self._change = session, change

    def run(self, inputs: Any) -> list[Array]:
        return [self._change(y) for y in self._session.run(inputs)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def spoil(monkeypatch: pytest.MonkeyPatch, backend: str, change: Callable[[Array], Array]) -> None:
    module = backends.get(backend)
    real = module.load
    monkeypatch.setattr(module, "load", lambda *a, **k: Changed(real(*a, **k), change))


def second_row_wrong(y: Array) -> Array:
    y = y.copy()
    y[1:, 0] += 50
    return y


@pytest.mark.openvino
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda y: y[:, ::-1], "of labels change, budget"),  # classes exchanged
        (second_row_wrong, "identical tiles of one batch"),  # right as long as tiles come one by one
    ],
    ids=["always", "in batches"],
)
def test_a_missed_budget_builds_nothing(network, textures, tmp_path, monkeypatch, change, text):
    spoil(monkeypatch, "openvino", change)
    refused(
        urt.ParityError, text, network(), tmp_path, samples=textures, contract=LOGITS, backend="openvino",
    )  # fmt: skip


@pytest.mark.openvino
def test_a_fast_candidate_that_is_wrong_is_not_chosen(network, textures, tmp_path, monkeypatch):
    spoil(monkeypatch, "openvino", lambda y: y[:, ::-1])
    report, engine = built(network(), tmp_path / "x.urt", samples=textures, contract=LOGITS, backend="auto")
    engine.close()
    wrong = [c for c in report.candidates if c.backend == "openvino"]
    assert [c.verdict.accepted for c in wrong] == [False]
    assert report.candidates[report.chosen].backend == engine.spec.backend == "onnxruntime"
    assert "outside the budget" in build_text(report)


@pytest.mark.openvino
def test_a_candidate_that_cannot_run_is_left_out(network, textures, tmp_path, monkeypatch):
    def fail(_: Array) -> Array:
        raise urt.BackendError("no kernel for this layer")

    spoil(monkeypatch, "openvino", fail)
    options = {"samples": textures, "contract": LOGITS}
    refused(
        urt.BackendError, "could be run: no kernel for this layer", network(), tmp_path, backend="openvino", **options
    )
    report, engine = built(network(), tmp_path / "x.urt", backend="auto", **options)
    engine.close()
    assert [c.note for c in report.candidates if c.backend == "openvino"] == ["no kernel for this layer"]
    assert report.candidates[report.chosen].backend == engine.spec.backend == "onnxruntime"
    assert "not tried: openvino fp32: no kernel for this layer" in build_text(report)


@pytest.mark.openvino
def test_a_backend_that_refuses_the_tile_is_left_out(network, textures, tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise urt.TileError("input x is 2x1x?x?, and tile and batch make it 1x1x160x160")

    monkeypatch.setattr(backends.get("openvino"), "build", refuse)
    options = {"samples": textures, "contract": LOGITS}
    refused(urt.TileError, "make it 1x1x160x160", network(), tmp_path, backend="openvino", **options)
    report, engine = built(network(), tmp_path / "x.urt", backend="auto", **options)
    engine.close()
    assert "make it 1x1x160x160" in next(c.note for c in report.candidates if c.backend == "openvino")
    assert engine.spec.backend == "onnxruntime"


@pytest.mark.openvino
def test_a_larger_tile_that_cannot_run_is_left_out(network, textures, tmp_path, monkeypatch):
    def fail(y: Array) -> Array:
        if y.shape[-1] > 192:  # the side of the exam's tiles
            raise urt.BackendError("memory is short")
        return y

    spoil(monkeypatch, "openvino", fail)
    report, engine = built(network(), tmp_path / "x.urt", samples=textures, contract=LOGITS, backend="openvino")
    engine.close()
    assert engine.spec.tile == (160, 160)
    assert [c.tile for c in report.candidates] == [(160, 160)]
    assert "tile 224x224 px was tried and left: memory is short" in report.notes


def test_a_build_that_fails_closes_what_it_opened(network, textures, tmp_path, monkeypatch):
    def none(*_: Any, **__: Any) -> None:
        raise urt.ParityError("no candidate is inside the budget")

    module = backends.get("onnxruntime")
    real, sessions = module.load, []
    monkeypatch.setattr(module, "load", lambda *a, **k: sessions.append(real(*a, **k)) or sessions[-1])
    monkeypatch.setattr(MODULE, "choose", none)
    refused(urt.ParityError, "no candidate", network(), tmp_path, samples=textures, contract=LOGITS)
    assert len(sessions) >= 2  # the baseline and the candidate
    for session in sessions:
        with pytest.raises(urt.BackendError, match="closed"):
            session.run([])


@pytest.mark.openvino
def test_the_budget_is_the_users(network, textures, tmp_path, monkeypatch):
    """One label in a thousand changed: outside the default budget of half of that, inside a larger one."""

    def change(y: Array) -> Array:
        y = y.copy()
        y.reshape(len(y), 2, -1)[:, :, ::331] *= -1
        return y

    spoil(monkeypatch, "openvino", change)
    options = {"samples": textures, "contract": LOGITS, "backend": "openvino"}
    refused(urt.ParityError, "of labels change", network(), tmp_path, budget=urt.Budget(label_change=5e-4), **options)
    budget = urt.Budget(label_change=0.02, dice=0.9, rounding=0.02)  # what is spoilt lies elsewhere in every tile
    report, engine = built(network(), tmp_path / "x.urt", budget=budget, **options)
    engine.close()
    assert 5e-4 < report.candidates[report.chosen].verdict.label_change < 0.02
    assert engine.folder.parity["budget"]["label_change"] == 0.02


@pytest.mark.openvino
def test_bf16_where_the_processor_has_it(network, textures, tmp_path):
    model = network(norm="batch", channels=8)
    options = {"samples": textures, "contract": LOGITS, "backend": "openvino", "precision": "bf16"}
    if "bf16" not in backends.get("openvino").precisions():
        refused(urt.BackendError, "BF16", model, tmp_path, **options)
        report, engine = built(model, tmp_path / "x.urt", **(options | {"precision": "auto"}))
        engine.close()
        (untried,) = [c for c in report.candidates if c.precision == "bf16"]
        assert "BF16" in untried.note
        assert engine.spec.precision == "fp32"
        return
    budget = urt.Budget(label_change=0.05, dice=0.9)
    report, engine = built(model, tmp_path / "x.urt", budget=budget, **options)
    with engine:
        assert engine.spec.precision == engine._session.precision == "bf16"
    assert report.candidates[report.chosen].verdict.max_abs > 0


# --- the tile -----------------------------------------------------------------------------------------------------


def test_the_tile_is_measured_or_given(network, textures, tmp_path):
    report, engine = built(network(), tmp_path / "a.urt", samples=textures, contract=LOGITS)
    engine.close()
    assert {c.tile for c in report.candidates} == {(160, 160), (224, 224)}
    best = max(report.candidates, key=lambda c: c.kept_mpx_per_s)
    assert report.candidates[report.chosen] is best
    assert engine.spec.tile == best.tile
    report, engine = built(network(), tmp_path / "b.urt", samples=textures, contract=LOGITS, tile=(64, 96))
    engine.close()
    assert {c.tile for c in report.candidates} == {engine.spec.tile} == {(64, 96)}
    refused(
        urt.TileError, "not a multiple", network(), empty(tmp_path), samples=textures, contract=LOGITS, tile=(63, 96)
    )
    refused(
        urt.TileError,
        "overlap is for networks",
        network(),
        empty(tmp_path),
        samples=textures,
        contract=LOGITS,
        overlap=(8, 8),
    )


def empty(folder: Path) -> Path:
    folder = folder / "empty"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def instance(network) -> Path:
    return network(norm="instance", channels=8)


def test_an_inexact_network_needs_a_tile(instance, textures, tmp_path):
    options = {"samples": textures, "contract": LOGITS}
    refused(urt.ContractError, r"cannot be tiled exactly \(.*InstanceNorm.*--tile HxW", instance, tmp_path, **options)
    for halo in ("exact", "measured", 16):
        refused(urt.TileError, "cannot be tiled exactly", instance, tmp_path, halo=halo, tile=(64, 64), **options)
    refused(urt.TileError, "is not accepted", instance, tmp_path, tile=(63, 64), **options)
    refused(urt.TileError, "overlap 64 px", instance, tmp_path, tile=(64, 64), overlap=(64, 0), **options)
    refused(urt.TileError, "2 numbers", instance, tmp_path, tile=(64, 64, 64), **options)
    refused(
        urt.TileError, "overlap 16x16x16 needs 2 numbers", instance, tmp_path, tile=64, overlap=(16, 16, 16), **options
    )


def test_the_mismatch_of_an_inexact_network_is_that_of_its_worst_output(instance, textures, tmp_path):
    model = onnx.load(str(instance))
    logits = model.graph.output[0]
    seen = onnx.ValueInfoProto()
    seen.CopyFrom(model.graph.input[0])
    seen.name = "seen"  # the image again: the first output, and tiles do nothing to it
    model.graph.node.append(onnx.helper.make_node("Identity", [model.graph.input[0].name], ["seen"]))
    del model.graph.output[:]
    model.graph.output.extend([seen, logits])
    onnx.save(model, tmp_path / "two.onnx")
    contract = Contract(
        task="regression",
        output_is="values",
        normalization=NONE,
        heads=(Head(logits.name, "multiclass", "logits"),),
    )
    report, engine = built(
        tmp_path / "two.onnx", tmp_path / "x.urt", samples=textures, contract=contract, tile=(64, 64)
    )
    engine.close()
    assert report.whole_mismatch.head == logits.name
    assert report.whole_mismatch.label_change > 0
    assert f"of labels of output {logits.name} differ" in build_text(report)


def blended_by_hand(engine: urt.Engine, image: Array, tile: int, step: int) -> Array:
    """Tiles of the FP32 graph as given, Gaussian weights, in float64."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(engine.folder.file("model")))
    name = session.get_inputs()[0].name
    size = [-(-n // 2) * 2 for n in image.shape]
    padded = np.pad(image, [(0, s - n) for s, n in zip(size, image.shape, strict=True)], mode="reflect")
    weight = blend_weight((tile, tile), "gaussian").astype(np.float64)
    total, weights = np.zeros((2, *size)), np.zeros(size)
    for y in spread(size[0], tile, step):
        for x in spread(size[1], tile, step):
            window = (slice(y, y + tile), slice(x, x + tile))
            total[(slice(None), *window)] += weight * session.run(None, {name: padded[window][None, None]})[0][0]
            weights[window] += weight
    return (total / weights)[:, : image.shape[0], : image.shape[1]]


def spread(size: int, tile: int, step: int) -> list[int]:
    """Even origins from 0 to flush, at most a step apart; the network's stride is 2."""
    count = -(-(size - tile) // step) + 1
    return [int((size - tile) / 2 * k / max(1, count - 1) + 0.5) * 2 for k in range(count)]


def test_an_inexact_network_with_its_tile(instance, textures, tmp_path):
    report, engine = built(instance, tmp_path / "x.urt", samples=textures, contract=LOGITS, tile=(64, 64))
    with engine:
        assert (engine.spec.tile, engine.spec.overlap, engine.spec.blend) == ((64, 64), (32, 32), "gaussian")
        assert not engine.spec.exact
        assert any("InstanceNorm" in note and "part of the model" in note for note in report.notes)
        assert {c.tile for c in report.candidates} == {(64, 64)}, "the tile is never chosen by speed"
        verdict = report.candidates[report.chosen].verdict
        assert verdict.label_change == 0.0
        # what the tile does to the answer is reported, and far above the rounding that is judged
        assert report.whole_mismatch.max_abs > 100 * verdict.max_abs
        assert report.whole_mismatch.label_change > 0
        assert "against the whole image" in build_text(report)
        for image in textures[:2]:
            result = urt.predict(engine, image, output="raw")
            expected = blended_by_hand(engine, image, 64, 32)
            # float32 rounding of a network of 6 convolutions and of at most 16 weighted tiles
            np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max())
        with pytest.raises(urt.TileError, match="part of the model"):
            urt.predict(engine, textures[0], tile=(96, 96))
    report = verify(tmp_path / "x.urt", textures)
    assert report.accepted
    assert report.seams is None
    assert "same tiles" in report.notes[0]


def test_the_trained_tile_of_the_contract(instance, textures, tmp_path):
    contract = replace(LOGITS, trained_tile=(48, 80))
    _, engine = built(instance, tmp_path / "x.urt", samples=textures, contract=contract, blend="constant")
    engine.close()
    assert (engine.spec.tile, engine.spec.overlap, engine.spec.blend) == ((48, 80), (24, 40), "constant")
    _, engine = built(
        instance, tmp_path / "y.urt", samples=textures, contract=contract, tile=(64, 64), overlap=(16, 0)
    )  # fmt: skip
    engine.close()
    assert (engine.spec.tile, engine.spec.overlap) == ((64, 64), (16, 0))


# --- the halo -----------------------------------------------------------------------------------------------------


def test_a_measured_halo(tmp_path, sample_images):
    """Smaller than the exact one, within the seam budget on every sample, and outside of it one step below."""
    budget = urt.Budget(seam=1e-4)
    samples = [image[:200, :200] for image in sample_images]
    report, engine = built(
        shipped_model(), tmp_path / "x.urt", samples=samples, halo="measured", budget=budget, tile=(160, 160)
    )
    with engine:
        spec = engine.spec
        exact = max(max(f.halo) for f in spec.outputs[0].field)
        assert spec.halo == "measured"
        assert 0 < spec.halo_limit < exact
        assert report.seams[spec.halo_limit] <= budget.seam < report.seams[spec.halo_limit - 8]
        assert engine.folder.parity["seams"] == {str(k): v for k, v in report.seams.items()}
        assert any(f"measured halo {spec.halo_limit} samples" in note for note in report.notes)
        changed = []
        for image in samples:
            whole = urt.Engine(replace(spec, halo="exact", halo_limit=None), engine._session)
            mask = urt.predict(whole, image, tile=spec.canvas_shape(image.shape))
            changed.append(np.mean(mask != urt.predict(engine, image)))
        assert max(changed) <= budget.labels
        assert urt.predict(engine, sample_images[0]).shape == sample_images[0].shape


def test_a_given_halo(textures, network, tmp_path):
    model = network(depth=2)
    exact = urt.inspect(model).outputs[0].field[0].halo[0]
    assert exact > 8
    options = {"samples": textures, "contract": LOGITS, "tile": (64, 64)}
    report, engine = built(model, tmp_path / "less.urt", halo=4, budget=urt.Budget(label_change=1, dice=0), **options)
    engine.close()
    assert (engine.spec.halo, engine.spec.halo_limit) == ("given", 4)
    assert any(f"halo 4 samples as given; {exact} would be exact" in note for note in report.notes)
    assert report.candidates[report.chosen].verdict.max_abs > 1e-3  # its seams are part of its parity
    _, engine = built(model, tmp_path / "more.urt", halo=exact + 50, **options)
    engine.close()
    assert (engine.spec.halo, engine.spec.halo_limit) == ("exact", None)
    refused(urt.TileError, "halo", model, empty(tmp_path), halo="big", **options)
    refused(urt.ContractError, "needs images", model, empty(tmp_path), halo="measured", contract=LOGITS)


# --- fixed sizes --------------------------------------------------------------------------------------------------


def test_a_fixed_size_becomes_free(network, textures, tmp_path):
    model = network(64, free=False)
    report, engine = built(model, tmp_path / "x.urt", samples=textures, contract=LOGITS)
    with engine:
        assert engine.spec.free_size
        assert engine.spec.batch is None
        assert any(note.startswith("Y (64 px) made free") for note in report.notes)
        raw = urt.predict(engine, textures[0], tile=(96, 64), output="raw")
        np.testing.assert_array_equal(raw, urt.predict(engine, textures[0], tile=(160, 160), output="raw"))
    given = onnx.load(str(engine.folder.file("model")))
    assert [d.dim_value for d in given.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 64, 64], "kept as given"


@pytest.fixture(scope="session")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose up-sampling goes from corner to corner of a size in pixels; its batch is 2, as its rows mix."""
    torch = pytest.importorskip("torch")
    import networks

    class Baked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = networks.Layers(
                lambda x: torch.nn.functional.interpolate(
                    torch.nn.functional.max_pool2d(x, 2), size=(32, 32), mode="bilinear", align_corners=True
                )
            )
            self.head = torch.nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: Any) -> Any:
            return self.head(self.layers(x))

    path = tmp_path_factory.mktemp("baked") / "baked.onnx"
    networks.export(networks.initialise(Baked()), [(2, 1, 32, 32)], path, free=False)
    return path


def test_a_size_that_cannot_be_freed_is_the_tile(baked, textures, tmp_path):
    report, engine = built(baked, tmp_path / "x.urt", samples=textures, contract=LOGITS)
    with engine:
        assert [s.fixed for s in engine.spec.sizes] == [32, 32]
        assert engine.spec.tile == (32, 32)
        assert any("Y is fixed" in note for note in report.notes)
        for shape in ((20, 11), (75, 41)):
            image = textures[0][: shape[0], : shape[1]]
            assert urt.predict(engine, image).shape == shape
        with pytest.raises(urt.TileError, match="32"):
            urt.predict(engine, textures[0], tile=(64, 64))
    refused(urt.TileError, "32", baked, empty(tmp_path), samples=textures, contract=LOGITS, tile=(64, 64))


def test_a_batch_that_cannot_be_freed_is_padded(textures, tmp_path):
    """A graph for two rows and no other number: measured with two at every tile; a short last batch is padded."""
    torch = pytest.importorskip("torch")
    import networks

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: Any) -> Any:
            y = self.conv(x)
            return torch.cat([y[0:1], y[1:2]], 0)

    path = tmp_path / "two.onnx"
    networks.export(networks.initialise(Two()), [(2, 1, 32, 32)], path, free=True)
    report, engine = built(path, tmp_path / "x.urt", samples=textures, contract=LOGITS)
    with engine:
        assert engine.spec.batch == engine.spec.run_batch == 2
        assert [(c.tile, c.batch) for c in report.candidates] == [((160, 160), 2), ((224, 224), 2)]
        assert any("N is fixed to 2" in note for note in report.notes)
        raw = [urt.predict(engine, textures[0], output="raw", tile=(48, 48), batch=batch) for batch in (1, 2, 3)]
        for other in raw[1:]:
            np.testing.assert_array_equal(other, raw[0])
        x = np.pad(textures[0], 0)[None, None]
        np.testing.assert_array_equal(engine._session.run([np.repeat(x, 2, axis=0)])[0][0], raw[0])


def test_on_a_gpu_a_fixed_batch_is_the_only_one(network, tmp_path, monkeypatch):
    model = open_model(network(), tmp_path, options=LOGITS)
    spec = replace(untiled_spec(model), device="cuda:0", tile=(64, 64))
    monkeypatch.setattr(build_engines, "fits", lambda model, device, tile, batch: batch < 16)
    assert build_engines.batches_to_try(model, spec) == (1, 4)
    assert build_engines.batches_to_try(model, replace(spec, batch=3)) == (3,)
    no_batch_axis = replace(spec, inputs=(replace(spec.inputs[0], axes="CYX"),))
    assert build_engines.batches_to_try(model, no_batch_axis) == (1,)
    assert build_engines.batches_to_try(model, replace(spec, device="cpu")) == (1,)


# --- plans --------------------------------------------------------------------------------------------------------


class PlanSession:
    """A session on the CPU that runs the shapes of a plan and no others."""

    def __init__(self, session: Any, plan: dict[str, Any], flawed: tuple[int, ...] | None) -> None:
        self._session, self._plan, self._flawed = session, plan, flawed
        self.precision, self.device, self.threads = session.precision, session.device, session.threads
        self.version, self.close = "planner 1", session.close

    def run(self, inputs: list[Array]) -> list[Array]:
        batch, _, *tile = inputs[0].shape
        assert tile in self._plan["tiles"]
        assert batch in self._plan["batches"]
        outputs: list[Array] = self._session.run(inputs)
        return [y[:, ::-1] for y in outputs] if tuple(tile) == self._flawed else outputs


class Planner:
    """TensorRT, had it a CPU: its plan is ONNX Runtime's graph, and the shapes that it may be run with."""

    def __init__(self) -> None:
        self.real = backends.get("onnxruntime")
        self.built: list[list[list[int]]] = []  # tiles of every plan
        self.flawed: tuple[int, ...] | None = None  # a tile that gives wrong results
        self.stale_because: str | None = None

    any_tile = False
    variant = ""

    def missing(self, device: str = "cpu") -> None:
        return None

    def precisions(self, device: str = "cpu") -> tuple[str, ...]:
        return ("fp32",)

    def build(self, model: Path, graph: Path, *, blob: Path, tiles: Any, batches: Any, **options: Any) -> None:
        self.real.build(model, graph, **options)
        self.built.append([list(tile) for tile in tiles])
        blob.write_text(json.dumps({"tiles": self.built[-1], "batches": list(batches)}))

    def load(self, graph: Path, *, blob: Path, **options: Any) -> PlanSession:
        return PlanSession(self.real.load(graph, **options), json.loads(blob.read_text()), self.flawed)

    def stale(self, blob: Path, device: str) -> str | None:
        return self.stale_because


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Planner:
    made, get = Planner(), backends.get
    monkeypatch.setattr(backends, "get", lambda name: made if name == "tensorrt" else get(name))
    return made


PLANNED: dict[str, Any] = {"contract": LOGITS, "backend": "tensorrt", "device": "cpu", "halo": "exact"}


@pytest.mark.parametrize("tile", [None, (112, 96)], ids=["chosen", "asked for"])
def test_a_plan_takes_a_smaller_tile_as_well(network, textures, tmp_path, planner, monkeypatch, tile):
    report, engine = built(network(), tmp_path / "x.urt", samples=textures, tile=tile, **PLANNED)
    spec, record = engine.spec, engine.folder.parity
    large, small = spec.tiles
    assert large == spec.tile == (tile or large)
    assert small == tuple(n // 2 for n in large)
    assert [s.fixed for s in spec.sizes] == list(large)
    # Candidates are compared by plans for one tile each; the chosen one's is made again for both.
    assert [len(tiles) for tiles in planner.built] == [1] * (len(planner.built) - 1) + [2]
    assert record["smaller_tile"]["tile"] == list(small)
    assert record["smaller_tile"]["verdict"]["accepted"]
    # On the CPU the values are the baseline's, on windows larger and smaller than a tile, which grows their canvas: to the
    # bit where ONNX Runtime sums a graph of fixed size as one of free size (AVX2), else (AVX-512) to float32 rounding.
    for verdict in (record["verdict"], record["smaller_tile"]["verdict"]):
        assert len(verdict["images"]) == 3
        assert max(image["relative"] for image in verdict["images"]) < 1e-5
    assert any(f"tiles of {small[0]}x{small[1]} px are in the plan, too" in note for note in report.notes)
    for image in (textures[0], textures[1][:40, :50], np.tile(textures[0], (2, 2))):
        raw = [urt.predict(engine, image, output="raw", tile=t) for t in spec.tiles]
        np.testing.assert_array_equal(raw[1], raw[0])
    with pytest.raises(urt.TileError, match=r"not in the engine's plan, .* --backend tensorrt --device cpu"):
        urt.predict(engine, textures[0], tile=(48, 64))
    engine.close()
    planner.built.clear()
    planner.stale_because = "it is another GPU's"
    urt.load(tmp_path / "x.urt").close()
    assert planner.built == [[list(large), list(small)]]
    planner.flawed = small  # what was made again sits the exam at both tiles
    with pytest.raises(urt.ParityError, match=f"its corner of {small[0]}x{small[1]} px"):
        urt.load(tmp_path / "x.urt")


@pytest.mark.parametrize("why", ["wrong there", "measured halo", "not exact", "its halo leaves none"])
def test_a_plan_for_one_tile(network, textures, tmp_path, planner, why):
    options, parameters = dict(PLANNED), {}
    if why == "wrong there":
        planner.flawed, options["tile"] = (56, 48), (112, 96)
    elif why == "measured halo":
        options |= {"halo": 4, "tile": (112, 96), "budget": urt.Budget(label_change=0.1)}
    elif why == "not exact":
        parameters, options = {"norm": "instance"}, {**options, "halo": "auto", "tile": (64, 64)}
    else:
        options["tile"] = (24, 24)
    report, engine = built(network(**parameters), tmp_path / "x.urt", samples=textures, **options)
    with engine:
        assert engine.spec.tiles == (engine.spec.tile,)
        assert engine.folder.parity["smaller_tile"] is None
        urt.predict(engine, textures[0])
    said = [note for note in report.notes if note.startswith("the plan takes ")]
    if why == "wrong there":
        assert "56x48 px was tried and left: at 56x48 px" in said[0]
    elif why == "its halo leaves none":
        assert said == ["the plan takes no smaller tile than 24x24 px: the halo leaves none"]
    elif why == "measured halo":
        assert said == ["the plan takes one tile: as the halo is not exact, another would change the result"]
    else:
        assert not said, "the report says that the tile is part of the model"


# --- the contract -------------------------------------------------------------------------------------------------


def with_metadata(model: Path, target: Path, contract: Contract) -> Path:
    proto = onnx.load(str(model))
    onnx.helper.set_model_props(proto, contract_io.contract_to_metadata(contract))
    onnx.save(proto, str(target))
    return target


def test_options_win_over_the_file_and_the_file_over_metadata(network, textures, tmp_path):
    declared = Contract(
        task="multiclass", output_is="logits", classes=("a", "b"), normalization=Normalization("zscore"), border="edge"
    )
    model = with_metadata(network(), tmp_path / "m.onnx", declared)
    file = tmp_path / "contract.json"
    file.write_text(json.dumps({"classes": ["c", "d"], "normalization": "minmax", "pixel_size_um": [0.5, 0.5]}))
    (tmp_path / "work").mkdir()
    found = open_model(model, tmp_path / "work", contract=file, options=Contract(classes=("e", "f"))).contract
    assert (found.classes, found.normalization.method) == (("e", "f"), "minmax")
    assert (found.border, found.pixel_size_um, found.axes) == ("edge", (0.5, 0.5), "NCYX")
    _, engine = built(model, tmp_path / "x.urt", samples=textures, contract=file)
    engine.close()
    assert engine.spec.contract.classes == ("c", "d")
    assert engine.spec.contract.normalization.method == "minmax"
    assert engine.spec.contract.border == "edge"


def test_two_possible_readings_are_named(network, textures, tmp_path):
    refused(
        urt.ContractError, "--task binary or --task regression", network(classes=1), tmp_path,
        samples=textures, contract=Contract(normalization=NONE),
    )  # fmt: skip
    _, engine = built(
        network(classes=1, final="sigmoid"), tmp_path / "x.urt", samples=textures, contract=Contract(normalization=NONE)
    )
    engine.close()
    assert (engine.spec.contract.task, engine.spec.contract.output_is) == ("binary", "probabilities")
    assert engine.spec.contract.threshold == (0.5,)


def test_a_regression_is_judged_by_its_error(network, textures, tmp_path):
    contract = Contract(task="regression", normalization=NONE)
    report, engine = built(network(classes=1), tmp_path / "x.urt", samples=textures, contract=contract)
    engine.close()
    verdict = report.candidates[report.chosen].verdict
    assert verdict.label_change is None
    assert verdict.relative < 1e-5
    low, high = report.first["output_range"]
    assert low < high


def test_a_constant_mask_is_a_warning_that_names_normalisation(tmp_path, sample_images):
    wrong = Contract(normalization=Normalization("scale", scale=1e9))
    options = {"samples": sample_images, "tile": (256, 256), "halo": "exact"}
    report, engine = built(shipped_model(), tmp_path / "x.urt", contract=wrong, **options)
    engine.close()
    (warning,) = report.warnings
    assert "is constant" in warning
    assert "--normalize first" in warning
    assert 1.0 in report.first["class_share"].values()
    right, engine = built(shipped_model(), tmp_path / "y.urt", **options)
    engine.close()
    assert right.warnings == ()
    assert right.first["class_share"]["nucleus"] == pytest.approx(1 - right.first["class_share"]["background"])
    assert 0.02 < right.first["class_share"]["nucleus"] < 0.9
    assert abs(right.first["input_mean"]) < 1  # percentiles 1 and 99.8 are 0 and 1


# --- the folder ---------------------------------------------------------------------------------------------------


def test_the_exam_travels_or_not(network, textures, tmp_path):
    options = {"samples": textures, "contract": LOGITS, "tile": (64, 64)}
    _, engine = built(network(), tmp_path / "with.urt", **options)
    engine.close()
    exam = read_folder(tmp_path / "with.urt").exam()
    assert set(exam) == {"input", "output_0"}
    assert len(exam["input"]) == len(exam["output_0"]) == len(textures)
    assert exam["input"].dtype == np.float32
    import onnxruntime

    session = onnxruntime.InferenceSession(str(engine.folder.file("model")))
    expected = session.run(None, {session.get_inputs()[0].name: exam["input"]})[0]
    np.testing.assert_allclose(exam["output_0"], expected, atol=1e-5 * np.abs(expected).max())
    _, engine = built(network(), tmp_path / "without.urt", keep_exam=False, **options)
    engine.close()
    assert read_folder(tmp_path / "without.urt").exam() is None
    assert verify(tmp_path / "with.urt").kind == "exam"
    with pytest.raises(urt.EngineError, match="carries no exam"):
        verify(tmp_path / "without.urt")


@pytest.mark.parametrize("wrong", [(), (1,), (0, 1, 2)])
def test_a_tile_that_an_accepted_engine_misses_is_no_exam(engine_folder, sample_images, wrong):
    """A tile may hold more of what changes than the window that was judged: it would refuse the engine everywhere."""
    remarks = build_job.Remarks(lambda _: None)
    with urt.load(engine_folder) as engine:
        windows = draw(sample_images[:3], engine.spec.contract, spatial=2, network_channels=1)
        tiles = []

        def run(x: Array) -> list[Array]:
            tiles.append(x)
            return [np.roll(y, len(tiles) - 1 in wrong, axis=1) for y in engine.run(x)]  # classes exchanged, or not

        job = SimpleNamespace(baseline=engine, budget=urt.Budget(), threads=1, remarks=remarks)
        exam = build_record.exam_tiles(job, engine.spec, SimpleNamespace(run=run), windows)
    kept = [x for k, x in enumerate(tiles) if k not in wrong]
    assert len(tiles) == 3
    assert bool(remarks.notes) == bool(wrong)
    assert bool(remarks.warnings) == (not kept) == (exam == {})
    if kept:
        np.testing.assert_array_equal(exam["input"], np.concatenate(kept))
        assert len(exam["output_0"]) == len(kept)
    if wrong:
        assert remarks.notes[0].startswith(f"{len(wrong)} of 3 tiles are left out of the exam")


@pytest.mark.parametrize(("inside", "searched"), [(True, False), (False, True)])
def test_a_fast_precision_outside_the_budget_does_not_end_the_search(monkeypatch, inside, searched):
    """INT8 that is slower than BF16 is worth searching on where BF16 is of no use."""
    calls, remarks = [], build_job.Remarks(lambda _: None)
    monkeypatch.setattr("unet_rt.building.int8.put_back", lambda *args: calls.append(args))
    seconds = {"fp32": 4.0, "bf16": 1.0, "int8": 2.0}
    missed = SimpleNamespace(engine="int8", verdict=SimpleNamespace(accepted=False))
    returned, verdicts = build_int8.return_layers(
        SimpleNamespace(deadline=None, remarks=remarks),
        object(),
        {"openvino": [missed]},
        {("openvino", "fp32", ""): "fp32", ("openvino", "bf16", ""): "bf16"},
        make=lambda name: None,
        drop=None,
        judge=lambda engine: SimpleNamespace(accepted=inside),
        seconds=seconds.get,
    )
    assert bool(calls) == searched
    assert returned == {}
    assert [key[1] for key in verdicts] == ["bf16"], "judged once"
    said = "was not brought inside the budget" if searched else "no layers were returned to FP32"
    assert said in remarks.notes[0]


@pytest.mark.parametrize(("seconds", "tried"), [(1e6, 3), (-1.0, 1)])
def test_a_tile_that_keeps_much_more_is_tried_whatever_the_time(exact_folder, monkeypatch, seconds, tried):
    """The halo throws away a third of 512 x 512 samples, a fifth of 1024 x 1024, and little less of what is larger."""
    spec = replace(read_folder(exact_folder).spec, tile=(512, 512))
    monkeypatch.setattr(build_tiling, "TILE_AREAS", (512**2, 1024**2, 1536**2, 2048**2))
    tiles = build_tiling.tried_tiles(spec)
    shares = [kept_share(spec, tile) for tile in tiles]
    assert shares[1] > build_choice.WORTH_WAITING * shares[0]
    assert shares[2] < build_choice.WORTH_WAITING * shares[1]
    monkeypatch.setattr(limits, "memory_bytes", lambda: 2**40)
    remarks = build_job.Remarks(lambda _: None)
    job = SimpleNamespace(deadline=SimpleNamespace(left=lambda share: seconds), remarks=remarks)
    first = SimpleNamespace(best=Candidate("openvino", "fp32", tiles[0], latency_ms=500.0), bytes_per_px=1000.0)
    found = build_choice._larger_tiles(job, SimpleNamespace(spec=spec), first)
    assert found == tiles[1 : 1 + tried]
    assert remarks.left_out == ([] if tried == 3 else [f"tiles above {tiles[1][0]}x{tiles[1][1]} px were not tried"])


def test_an_engine_is_not_overwritten(network, textures, tmp_path, monkeypatch):
    options = {"samples": textures, "contract": LOGITS, "tile": (64, 64)}
    built(network(), tmp_path / "x.urt", **options)[1].close()
    before = {p.name for p in (tmp_path / "x.urt").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("unet_rt.baseline.folds.open_models", lambda *a, **k: pytest.fail("work was done early"))
        with pytest.raises(urt.OutputError, match="--overwrite"):
            built(network(), tmp_path / "x.urt", **options | {"tile": (80, 80)})
    assert {p.name for p in (tmp_path / "x.urt").iterdir()} == before
    built(network(norm="batch"), tmp_path / "x.urt", overwrite=True, **options)[1].close()
    assert {p.name for p in (tmp_path / "x.urt").iterdir()} != before


def test_the_record(network, textures, tmp_path):
    report, engine = built(network(), tmp_path / "x.urt", samples=textures, contract=LOGITS, tile=(64, 64))
    engine.close()
    record = engine.folder.parity
    assert record["graph_sha256"] == engine.folder.files["graph"]["sha256"]
    assert record["fingerprint"]["cpu"] == machine.cpu_name()
    assert record["verdict"]["accepted"]
    assert record["baseline"] == {"backend": "onnxruntime", "precision": "fp32", "whole": True}
    assert json.loads(json.dumps(report.to_json()))["candidates"][0]["verdict"]["accepted"]
    assert engine.folder.file("model").read_bytes() == network().read_bytes()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"precision": "int4"}, urt.ContractError, "int4"),
        ({"backend": "tensorflow"}, urt.BackendError, "tensorflow"),
        ({"device": "cuda:0"}, urt.BackendError, "cuda"),
    ],
)
def test_options_that_cannot_be(network, textures, tmp_path, options, error, text):
    refused(error, text, network(), tmp_path, samples=textures, contract=LOGITS, **options)


def test_files_that_are_no_models(tmp_path):
    for name, content in [("a.onnx", b""), ("b.onnx", b"not a model"), ("c.onnx", None)]:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        folder = tmp_path / f"{name}-out"
        folder.mkdir()
        refused(urt.GraphError, name, path, folder)


def test_without_samples_a_task_may_stay_open(network, tmp_path, monkeypatch, capsys):
    """Generated tiles cannot tell a mask's logit from a value, and FP32 is proven on the values; the readings are named."""
    from unet_rt.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_job, "PARITY_SHARE", 0.0)
    model = network(classes=1)
    assert main(["build", str(model), "--out", "x.urt", "--backend", "onnxruntime"]) == 0
    out, err = capsys.readouterr()
    assert "--task binary or --task regression; until then predict gives the values themselves (--output raw)" in err
    assert "task left open" in out
    assert out.splitlines()[-1].endswith(
        "--samples YOUR_IMAGES --overwrite --normalize YOUR_NORMALIZE --task YOUR_TASK"
    )
    with urt.load("x.urt") as engine:
        assert engine.spec.contract.task is None
        assert engine.folder.parity["verdict"]["label_change"] is None
        image = np.zeros((40, 30), np.float32)
        assert urt.predict(engine, image, output="raw").shape == (1, 40, 30)
        with pytest.raises(
            urt.ContractError, match="make no mask; use --output raw, or build again with --task binary"
        ):
            urt.predict(engine, image)
    assert urt.verify("x.urt").accepted
