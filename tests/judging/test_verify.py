"""Verify and its pytest helper: an engine against its own FP32 graph, on its exam, on images, on labels, on real data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tifffile
from onnx import numpy_helper
from PIL import Image

import unet_rt as urt
from unet_rt import backends
from unet_rt.baseline.model import open_model
from unet_rt.baseline.samples import draw
from unet_rt.baseline.tiles import untiled_spec
from unet_rt.cli.main import main
from unet_rt.cli.texts import verify_text
from unet_rt.contract.contract import Contract, Head, Normalization
from unet_rt.drawing.microscopy import microscopy
from unet_rt.engine import parity
from unet_rt.engine.budget import Budget
from unet_rt.engine.engine import Engine
from unet_rt.engine.folder import read_folder
from unet_rt.engine.write import write_folder
from unet_rt.judging.truth import compare_to_labels
from unet_rt.judging.verify import verify
from unet_rt.outputs import pictures
from unet_rt.testing import assert_parity
from unet_rt.tiling.grid import square_tile

pytestmark = pytest.mark.onnxruntime
Array = np.ndarray[Any, np.dtype[Any]]
NUCLEI = Contract(task="binary", output_is="logits", normalization=Normalization("zscore", scope="image"))
QUICK: Any = {"tile": (192, 192), "threads": 1}  # larger tiles have fewer halos
FORGED = 4.0  # added to a logit of an engine that is not its model
BACKENDS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("onnxruntime", "openvino")]


def biased(model: Path, target: Path, by: float) -> Path:
    """The network with ``by`` added to the logit of its class 1: what a wrong rebuild might be."""
    proto = onnx.load(str(model))
    last = next(node for node in reversed(proto.graph.node) if node.op_type == "Conv")
    for tensor in proto.graph.initializer:
        if tensor.name == last.input[2]:
            bias = numpy_helper.to_array(tensor).copy()
            bias[1] += by
            tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    onnx.save(proto, str(target))
    return target


@pytest.fixture(scope="module")
def forged(exact_folder, tmp_path_factory) -> Path:
    """An engine whose built graph is not its model: class 1 is favoured."""
    opened = read_folder(exact_folder)
    folder = tmp_path_factory.mktemp("forged")
    files = {kind: opened.file(kind) for kind in opened.files}
    files["graph"] = biased(opened.file("graph"), folder / "graph.onnx", FORGED)
    write_folder(folder / "forged.urt", opened.spec, files)
    return folder / "forged.urt"


@pytest.fixture
def on_disk(tmp_path, sample_images) -> tuple[Path, Path]:
    """Folders of the sample images and of their true masks, matched by name."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for seed, image in enumerate(sample_images, 500):
        drawn = microscopy(image.shape, seed=seed)
        np.testing.assert_array_equal(drawn.image, image)
        tifffile.imwrite(images / f"cell-{seed}.tif", image)
        Image.fromarray((drawn.truth > 0).astype(np.uint8) * 255).save(labels / f"cell-{seed}.png")
    return images, labels


# --- exam and images ----------------------------------------------------------------------------------------------


def test_the_exam(engine_folder, sample_images):
    report = verify(engine_folder)
    assert (report.kind, report.accepted) == ("exam", True)
    assert len(report.verdict.images) == len(sample_images)
    assert report.verdict.label_change <= report.budget.label_change
    assert report.seams is None
    assert json.loads(json.dumps(report.to_json()))["accepted"] is True


def test_a_forged_engine_fails_its_exam(forged):
    report = verify(forged)
    assert not report.accepted
    assert "of labels change, budget" in report.verdict.reasons[0]


def test_images(engine_folder, exact_folder, sample_images):
    said: list[str] = []
    report = verify(exact_folder, sample_images, say=said.append)
    assert (report.kind, report.accepted, len(report.verdict.images)) == ("images", True, 3)
    assert len(said) == 3
    assert report.seams.max_abs == 0.0, "tiles are smaller than the images, and change nothing"
    measured = verify(engine_folder, sample_images)
    assert measured.accepted
    assert measured.seams.max_abs > 0.0, "seams of a measured halo are seen"
    assert measured.seams.label_change <= measured.budget.seam
    assert report.verdict.mean_label_change <= report.verdict.label_change
    assert [i.pixels for i in report.verdict.images] == [image.size for image in sample_images]
    few = verify(engine_folder, sample_images, count=2, **QUICK)
    assert [i.pixels for i in few.verdict.images] == [sample_images[0].size, sample_images[-1].size], "first to last"


def test_numbers_of_a_forged_engine(exact_folder, forged, sample_images):
    """Shares, Dice and errors are those of the two masks."""
    report = verify(forged, sample_images, **QUICK)
    assert not report.accepted
    with urt.load(exact_folder) as good, urt.load(forged, accept_unverified=True) as bad:
        a = [urt.predict(good, image) for image in sample_images]
        b = [urt.predict(bad, image) for image in sample_images]
        errors = [
            np.abs(urt.predict(good, i, output="raw") - urt.predict(bad, i, output="raw")).max() for i in sample_images
        ]
    changed = [np.mean(x != y) for x, y in zip(a, b, strict=True)]
    dice = [parity.dice(x == k, y == k) for x, y in zip(a, b, strict=True) for k in (0, 1)]
    # the baseline runs the graph as given, the engine its own form of it: they may round apart at a few pixels
    assert report.verdict.label_change == pytest.approx(max(changed), abs=2e-4)
    assert report.verdict.mean_label_change == pytest.approx(np.mean(changed), abs=2e-4)
    assert report.verdict.dice == pytest.approx(min(dice), abs=2e-3)
    assert report.verdict.max_abs == pytest.approx(max(errors), rel=1e-3)
    assert max(errors) == pytest.approx(FORGED, rel=1e-3)


def test_the_budget_can_be_another(forged, sample_images):
    wide = urt.Budget(label_change=1, dice=0)
    assert verify(forged, sample_images[:1], budget=wide, **QUICK).accepted
    assert verify(forged, budget=wide).accepted


def test_another_baseline(engine_folder, sample_images, tmp_path):
    other = biased(read_folder(engine_folder).file("model"), tmp_path / "other.onnx", -2.0)
    assert verify(engine_folder, sample_images[:1], baseline=read_folder(engine_folder).file("model"), **QUICK).accepted
    assert not verify(engine_folder, sample_images[:1], baseline=other, **QUICK).accepted


def test_without_an_exam(engine_folder, tmp_path):
    opened = read_folder(engine_folder)
    files = {kind: opened.file(kind) for kind in opened.files if kind != "exam"}
    write_folder(tmp_path / "x.urt", opened.spec, files)
    with pytest.raises(urt.EngineError, match="carries no exam; pass images"):
        verify(tmp_path / "x.urt")


@pytest.mark.torch
def test_what_growing_an_image_does_is_stated_apart(tmp_path):
    """A network that runs on any size sees zeros at the edge, not the mirrored pixel that makes the size even."""
    torch = pytest.importorskip("torch")
    import networks

    class Reduced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Conv2d(1, 2, 3, 2, 1)

        def forward(self, x: Any) -> Any:
            return self.one(x), self.two(x)

    path = tmp_path / "reduced.onnx"
    networks.export(networks.initialise(Reduced()), [(1, 1, 32, 32)], path)
    contract = Contract(task="multiclass", output_is="logits", normalization=Normalization("none"))
    odd, even = (networks.texture((1, 1, *shape), seed=4)[0, 0] for shape in ((81, 90), (80, 90)))
    options = {"contract": contract, "backend": "onnxruntime", "precision": "fp32", "tile": (48, 48)}
    urt.build(path, samples=[odd], out=tmp_path / "x.urt", **options).close()
    grown = verify(tmp_path / "x.urt", [odd])
    assert grown.accepted
    assert grown.seams.max_abs == 0.0
    assert 0 < grown.growth.label_change <= 1 / 81  # the last row only
    assert verify(tmp_path / "x.urt", [even]).growth is None


@pytest.mark.torch
def test_what_growing_an_image_does_to_further_outputs(tmp_path):
    """Nothing changes in the first, each pixel's own; the others see the edge. The worst that has a say is named."""
    torch = pytest.importorskip("torch")
    import networks

    class Reduced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (torch.nn.Conv2d(1, 2, *how) for how in ((1,), (3, 2, 1), (3, 1, 1)))

        def forward(self, x: Any) -> Any:
            return self.one(x), self.two(x), self.three(x)

    path = tmp_path / "reduced.onnx"
    networks.export(networks.initialise(Reduced()), [(1, 1, 32, 32)], path)
    names = [value.name for value in onnx.load(str(path)).graph.output]
    image = networks.texture((1, 1, 81, 400), seed=4)[0, 0]
    options = {"backend": "onnxruntime", "precision": "fp32", "tile": (48, 48)}
    first = {"task": "multiclass", "output_is": "logits", "normalization": Normalization("none")}
    said = {}
    for task in ("multiclass", "regression"):
        heads = (Head(names[1], task, "logits" if task == "multiclass" else "values"), Head(names[2]))
        folder = tmp_path / f"{task}.urt"
        urt.build(path, samples=[image], out=folder, contract=Contract(**first, heads=heads), **options).close()
        report = verify(folder, [image])
        assert report.accepted
        assert report.growth.head == names[1], "the third output has no say"
        assert json.loads(json.dumps(report.to_json()))["growth"]["head"] == names[1]
        (said[task],) = (line for line in verify_text(report).splitlines() if "growing images" in line)
        if task == "multiclass":
            assert 0 < report.growth.label_change <= 1 / 41  # the last row only
    assert f"% of labels of output {names[1]}, near" in said["multiclass"]
    assert f"% of the range of values of output {names[1]}, near" in said["regression"]


# --- labels -------------------------------------------------------------------------------------------------------


def test_labels(exact_folder, forged, on_disk):
    images, labels = on_disk
    with urt.load(exact_folder) as good, urt.load(forged, accept_unverified=True) as bad:
        scores: dict[str, list[float]] = {"good": [], "bad": [], "good iou": [], "bad iou": []}
        for path in sorted(images.iterdir()):
            truth = np.array(Image.open(labels / f"{path.stem}.png")) > 0
            for name, engine in (("good", good), ("bad", bad)):
                mask = urt.predict(engine, path) > 0
                both = np.sum(mask & truth)
                scores[name].append(2 * both / (mask.sum() + truth.sum()))
                scores[f"{name} iou"].append(both / np.sum(mask | truth))
    report = verify(exact_folder, images, labels=labels, **QUICK)
    assert report.truth.engine_dice == pytest.approx(np.mean(scores["good"]), abs=1e-3)
    assert report.truth.engine_iou == pytest.approx(np.mean(scores["good iou"]), abs=1e-3)
    assert report.truth.engine_dice > 0.8
    assert report.truth.drop <= 1e-3
    assert report.accepted
    wrong = verify(forged, str(images), labels=sorted(labels.iterdir()), **QUICK)
    assert wrong.truth.engine_dice == pytest.approx(np.mean(scores["bad"]), abs=1e-3)
    assert wrong.truth.engine_iou == pytest.approx(np.mean(scores["bad iou"]), abs=1e-3)
    assert wrong.truth.baseline_dice == pytest.approx(report.truth.engine_dice, abs=1e-3)
    assert wrong.truth.engine_dice < wrong.truth.baseline_dice - 0.02
    drops = [good - bad for good, bad in zip(scores["good iou"], scores["bad iou"], strict=True)]
    assert wrong.truth.drop == pytest.approx(max(drops), abs=2e-3), "of the worst image, and IoU loses more than Dice"
    assert wrong.truth.image.startswith("cell-")
    assert "below FP32 against the labels, budget 0.02" in wrong.verdict.reasons[-1]
    wide = Budget(label_change=1, dice=0, error=float("inf"), truth=0.01)
    only = verify(forged, images, labels=labels, budget=wide, **QUICK)
    assert not only.accepted
    assert len(only.verdict.reasons) == 1
    assert verify(forged, images, labels=labels, budget=replace(wide, truth=1), **QUICK).accepted


def test_labels_of_windows_of_a_large_image(engine_folder, tmp_path, monkeypatch):
    """Windows are drawn from a large image; their labels are cut at the same place."""
    drawn = microscopy((420, 380), seed=31)
    image, truth = drawn.image.copy(), drawn.truth > 0
    ground = int(np.median(image[~truth]))
    image[:240], truth[:240] = np.where(truth, ground, image)[:240], False  # cells in the lower part only
    tifffile.imwrite(tmp_path / "a.tif", image)
    labels = tmp_path / "labels"
    labels.mkdir()
    tifffile.imwrite(labels / "a.tif", truth.astype(np.uint8))
    from unet_rt.baseline import samples

    monkeypatch.setattr(samples.draw, "__kwdefaults__", {**samples.draw.__kwdefaults__, "max_px": 200 * 200})
    report = verify(engine_folder, tmp_path / "a.tif", labels=labels)
    (found,) = report.verdict.images
    assert found.pixels == 200 * 200
    assert "[" in found.name
    assert "[0:" not in found.name, found.name
    assert report.truth.engine_dice > 0.8


def test_labels_that_cannot_be(engine_folder, on_disk, sample_images):
    images, labels = on_disk
    with pytest.raises(urt.ImageError, match="labels without images"):
        verify(engine_folder, labels=labels)
    with pytest.raises(urt.ImageError, match="matched by name"):
        verify(engine_folder, sample_images, labels=labels)
    (labels / "cell-500.png").rename(labels / "other.png")
    with pytest.raises(urt.ImageError, match=r"no label for cell-500\.tif"):
        verify(engine_folder, images, labels=labels)
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(labels / "cell-500.png")
    with pytest.raises(urt.ImageError, match="one size"):
        verify(engine_folder, images, labels=labels)
    wide = np.zeros((2000, 2000), np.uint8)  # its corner would fit
    Image.fromarray(wide).save(labels / "cell-500.png")
    with pytest.raises(
        urt.ImageError, match=r"the label is 2000x2000 px and the image \d+x\d+; they must be of one size"
    ):
        verify(engine_folder, images, labels=labels)
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(labels / "cell-500.tif")
    with pytest.raises(urt.ImageError, match=r"cell-500\.png and cell-500\.tif for cell-500\.tif"):
        verify(engine_folder, images, labels=labels)


def test_labels_of_other_classes_are_refused(tmp_path):
    """0, 127, 255 for three classes: every reference would be empty, and nothing could be lost against it."""
    tifffile.imwrite(tmp_path / "a.tif", microscopy((96, 80), seed=1).image)
    contract = Contract(task="multiclass", output_is="logits", normalization=Normalization("zscore"))
    (sample,) = draw([tmp_path / "a.tif"], contract, spatial=2, network_channels=1)
    logits = np.random.default_rng(0).normal(size=(3, 96, 80)).astype(np.float32)
    labels = tmp_path / "labels"
    labels.mkdir()
    classes = logits.argmax(axis=0).astype(np.uint8)
    tifffile.imwrite(labels / "a.tif", classes)
    assert compare_to_labels(sample, labels, logits, logits, contract, Budget()).engine_dice == 1
    tifffile.imwrite(labels / "a.tif", np.array([0, 127, 255], np.uint8)[classes])
    with pytest.raises(
        urt.ImageError, match="the label holds 127, 255, and the classes are 0 to 2; give labels of class"
    ):
        compare_to_labels(sample, labels, logits, logits, contract, Budget())


@pytest.mark.parametrize("damaged", [{}, {"budget": {"labels_of": 1}}, {"budget": 3}])
def test_a_record_without_a_budget(engine_folder, tmp_path, sample_images, damaged):
    opened = read_folder(engine_folder)
    files = {kind: opened.file(kind) for kind in opened.files}
    record = json.loads(files["parity"].read_text())
    del record["budget"]
    files["parity"] = tmp_path / "parity.json"
    files["parity"].write_text(json.dumps(record | damaged))
    write_folder(tmp_path / "damaged.urt", opened.spec, files)
    with pytest.raises(urt.EngineError, match=r"names no budget that can be read .* or name one with --budget"):
        verify(tmp_path / "damaged.urt", sample_images)
    assert verify(tmp_path / "damaged.urt", sample_images[:1], budget=Budget(), **QUICK).accepted


# --- the picture of the worst tile --------------------------------------------------------------------------------


def test_the_picture_shows_what_differs(exact_folder, forged, tmp_path):
    image = microscopy((136, 152), seed=41).image
    picture = tmp_path / "worst.png"
    assert verify(forged, [image], picture=picture).picture == picture
    with urt.load(exact_folder) as good, urt.load(forged, accept_unverified=True) as bad:
        a, b = urt.predict(good, image), urt.predict(bad, image)
    sheet = np.array(Image.open(picture))
    height, width = image.shape
    assert sheet.shape == (height + 18, 4 * (width + 8) - 8, 3)
    panels = [sheet[18:, k * (width + 8) :][:, :width] for k in range(4)]
    grey = pictures.grey(image[None])
    wanted = (grey, pictures.overlay(grey, a), pictures.overlay(grey, b), pictures.difference(a, b))
    for panel, expected in zip(panels, wanted, strict=True):
        assert np.mean((panel != expected).any(axis=-1)) < 1e-3  # the masks may round apart at single pixels
    assert 0.005 < (panels[3] > 0).mean() < 0.5


def test_no_picture_where_nothing_differs(engine_folder, sample_images, tmp_path):
    report = verify(engine_folder, sample_images[1:2], picture=tmp_path / "worst.png", **QUICK)
    assert report.verdict.label_change == 0.0
    assert report.picture is None
    assert list(tmp_path.iterdir()) == []


def test_no_picture_inside_the_budget_unless_asked(forged, sample_images, tmp_path):
    wide = urt.Budget(label_change=1, dice=0)
    picture = tmp_path / "worst.png"
    options = {"budget": wide, "picture": picture, **QUICK}
    assert verify(forged, sample_images[1:2], picture_always=False, **options).picture is None
    assert verify(forged, sample_images[1:2], **options).picture == picture


# --- exit codes and the helper for other people's tests -----------------------------------------------------------


def test_exit_codes(engine_folder, forged, on_disk, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = on_disk
    assert main(["verify", str(engine_folder)]) == 0
    assert "inside the budget" in capsys.readouterr().out
    assert main(["verify", str(forged), "--images", str(images), "--labels", str(labels), "--json"]) == 1
    found = capsys.readouterr()
    answer = json.loads(found.out)
    assert answer["accepted"] is False
    assert 0 < answer["truth"]["engine_dice"] < answer["truth"]["baseline_dice"] <= 1
    assert "OUTSIDE the budget" in found.err
    assert Path(answer["picture"]).exists()
    assert main(["verify", str(tmp_path / "nothing.urt")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_three_lines_in_somebodys_ci(engine_folder, forged, sample_images):
    assert assert_parity(engine_folder).kind == "exam"
    assert assert_parity(engine_folder, images=sample_images[:1], **QUICK).accepted
    with pytest.raises(AssertionError, match=r"is outside its budget: .*of labels change"):
        assert_parity(forged, images=sample_images[:1], **QUICK)
    with pytest.raises(AssertionError, match="exam tile"):
        assert_parity(forged)
    assert assert_parity(forged, budget=urt.Budget(label_change=1, dice=0)).accepted


# --- real networks and images -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory) -> Callable[[str, str], Engine]:
    """The shared networks as engines, freed where they are fixed; nothing is measured."""
    loaded: dict[tuple[str, str], Engine] = {}
    contracts = {
        "nuclei/weights.onnx": replace(NUCLEI, threshold=(0.5,)),
        "strain/unet.onnx": Contract(
            task="regression", output_is="values", normalization=Normalization("scale", scale=255.0)
        ),
    }

    def load(name: str, backend: str) -> Engine:
        if (name, backend) not in loaded:
            work = tmp_path_factory.mktemp("real")
            model = open_model(shared / "models" / name, work, options=contracts[name])
            spec = untiled_spec(model)
            tile = square_tile(spec.sizes, spec.outputs, 256**2)
            backends.get(backend).build(model.graph, work / "built.onnx", precision="fp32", device="cpu")
            session = backends.get(backend).load(work / "built.onnx", precision="fp32", device="cpu", threads=1)
            loaded[name, backend] = Engine(replace(spec, backend=backend, tile=tile), session)
        return loaded[name, backend]

    return load


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_authors_own_output(real, shared, backend):
    """The nuclei network, fixed to 512 px, at tiles of other sizes gives what its authors published."""
    folder = shared / "models" / "nuclei"
    image, published = np.load(folder / "test_input.npy")[0, 0], np.load(folder / "test_output.npy")[0]
    engine = real("nuclei/weights.onnx", backend)
    assert engine.spec.free_size
    results = []
    for tile in ((512, 512), (200, 296), (384, 384)):
        result = urt.predict(engine, image, tile=tile, output="probability")
        assert np.abs(result - published).max() < 1e-5
        results.append(result)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "tile"), [("0402a81e7526.png", (200, 160)), ("df53d0b6c2c4.png", (168, 256))])
def test_fluorescence_images_of_odd_size(real, shared, backend, name, tile):
    path = shared / "data" / "dsb2018" / "image" / name
    engine = real("nuclei/weights.onnx", backend)
    pixels = np.array(Image.open(path))
    assert pixels.shape == (260, 347)
    mean, std = np.float32(pixels.mean(dtype=np.float64)), np.float32(pixels.std(dtype=np.float64) + 1e-6)
    normalised = (pixels.astype(np.float32) - mean) / std
    padded = np.pad(normalised, [(0, 4), (0, 5)], mode="reflect")
    whole = engine.run(padded[None, None])[0][0][:, :260, :347]
    np.testing.assert_array_equal(urt.predict(engine, path, tile=tile, output="raw"), whole)
    mask = urt.predict(engine, path, tile=tile)
    truth = np.array(Image.open(shared / "data" / "dsb2018" / "label" / name)) > 0
    assert parity.dice(mask > 0, truth) > 0.85


def test_strain_is_a_regression(real, shared):
    """Against the authors' targets: a mean absolute error of 0.0042, whatever the tile."""
    folder = shared / "models" / "strain"
    engine = real("strain/unet.onnx", "onnxruntime")
    errors = []
    for path in sorted((folder / "input").iterdir()):
        result = urt.predict(engine, path, channels="luma")
        assert result.shape == (1, 224, 224)
        target = np.array(Image.open(folder / "target" / path.name).convert("L")) / 255
        errors.append(np.abs(result[0] - target).mean())
    assert len(errors) == 20
    assert np.mean(errors) == pytest.approx(0.00421, abs=1e-5)
    path = folder / "input" / "file01_00050.png"
    tiled = urt.predict(engine, path, channels="luma", tile=(96, 112))
    np.testing.assert_array_equal(tiled, urt.predict(engine, path, channels="luma", tile=(224, 224)))


def test_a_real_network_from_its_fixed_graph_to_a_verdict(shared, tmp_path):
    """Build as it is, verify on other images than it was built on."""
    images = shared / "data" / "dsb2018" / "image"
    samples, others = tmp_path / "samples", tmp_path / "others"
    for folder, names in ((samples, ["df53d0b6c2c4"]), (others, ["9bb6e39d5f44"])):
        folder.mkdir()
        for name in names:
            shutil.copy(images / f"{name}.png", folder)
    urt.build(
        shared / "models" / "nuclei" / "weights.onnx", samples=samples, out=tmp_path / "n.urt", contract=NUCLEI,
        backend="onnxruntime", precision="fp32", tile=(200, 208), halo="exact", threads=1,
    ).close()  # fmt: skip
    report = assert_parity(tmp_path / "n.urt", others, threads=1)
    assert report.seams.max_abs == 0.0
    report = verify(tmp_path / "n.urt", others, labels=shared / "data" / "dsb2018" / "label")
    assert report.truth.engine_dice > 0.85
