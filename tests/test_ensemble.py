"""Several folds as one graph: the mean of the members' own probabilities, through the whole of build and predict."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime", reason="members are run in ONNX Runtime; pip install unet-rt[cpu]")
torch = pytest.importorskip("torch", reason="folds are trained with torch; pip install unet-rt[torch]")

import onnx  # noqa: E402
from onnx import numpy_helper  # noqa: E402

import unet_rt as urt  # noqa: E402
from unet_rt import cli, ensemble  # noqa: E402
from unet_rt.contract import Contract  # noqa: E402
from unet_rt.contract_io import contract_from_metadata, contract_to_metadata  # noqa: E402
from unet_rt.demo import shipped_model  # noqa: E402
from unet_rt.engine import sha256  # noqa: E402
from unet_rt.errors import ContractError, GraphError  # noqa: E402
from unet_rt.export import export  # noqa: E402
from unet_rt.model import Model, open_models  # noqa: E402
from unet_rt.models import UNet, UNetSpec, unet_from_onnx  # noqa: E402
from unet_rt.synthetic import microscopy  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.onnxruntime]

EPS = float(np.finfo(np.float32).eps)


def network_input(seed: int, side: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """(pixels as the shipped network gets them (1, 1, Y, X), truth (Y, X))."""
    drawn = microscopy((side, side), seed=seed)
    low, high = np.percentile(drawn.image, [1, 99.8])
    return ((drawn.image - low) / (high - low + 1e-6)).astype(np.float32)[None, None], drawn.truth > 0


def trained(network: Any, seed: int, steps: int) -> Any:
    """The network after some steps on images of its own: what one fold of a cross-validation is to another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiles are small
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    network.train()
    for step in range(steps):
        x, truth = network_input(1000 * seed + step)
        logits = network(torch.from_numpy(x))
        y = torch.from_numpy(truth[None].astype(np.int64))
        cut = (y.shape[-1] - logits.shape[-1]) // 2
        loss = torch.nn.functional.cross_entropy(logits, y[:, cut : y.shape[1] - cut, cut : y.shape[2] - cut])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return network.eval()


@pytest.fixture(scope="module")
def contract() -> Contract:
    proto = onnx.load(shipped_model())
    return contract_from_metadata({p.key: p.value for p in proto.metadata_props})


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory, contract: Contract) -> list[Path]:
    """The shipped network, and two that went on learning from it, each on other images."""
    folder = tmp_path_factory.mktemp("folds")
    spec = UNetSpec(width=12, depth=3, padding="same", norm="none", dropout=0.0, up="bilinear")
    paths = [shipped_model()]
    for seed in (1, 2):
        network = trained(unet_from_onnx(onnx.load(shipped_model()), spec), seed, 4)
        paths.append(export(network, folder / f"fold{seed}.onnx", contract=contract, sizes=[64, 80]).path)
    return paths


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory, contract: Contract) -> dict[str, Path]:
    """Two smaller networks after some training, with same and with valid padding."""
    folder, paths = tmp_path_factory.mktemp("shallow"), {}
    for padding in ("same", "valid"):
        torch.manual_seed(3)
        network = trained(UNet(width=4, depth=2, padding=padding, dropout=0.0), 3, 6)
        paths[padding] = export(network, folder / f"{padding}.onnx", contract=contract, sizes=[92, 108]).path
    return paths


def outputs(path: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def mean_probability(paths: Sequence[Path], x: np.ndarray) -> tuple[np.ndarray, float]:
    """(mean of the members' probabilities in float64, a bound of what float32 may change).

    A member's logits are the same sums in both, up to their order: some eps of the largest. A softmax passes on at most
    half of it and adds some eps of its own.
    """
    logits = [outputs(path, x).astype(np.float64) for path in paths]
    shares = [np.exp(z - z.max(axis=1, keepdims=True)) for z in logits]
    mean = np.mean([s / s.sum(axis=1, keepdims=True) for s in shares], axis=0)
    return mean, EPS * (8 + 16 * max(float(np.abs(z).max()) for z in logits))


def merged(paths: Sequence[Path], work: Path, **options: Any) -> Model:
    work.mkdir(exist_ok=True)
    return open_models(paths, work, **options)


def changed(path: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, target)
    return target


def declare(contract: Contract) -> Callable[[onnx.ModelProto], None]:
    return lambda proto: onnx.helper.set_model_props(proto, contract_to_metadata(contract))


def test_the_merged_graph_is_the_mean_of_its_members(folds, contract, tmp_path):
    model = merged(folds, tmp_path)
    x, truth = network_input(77, 256)
    expected, bound = mean_probability(folds, x)
    assert np.abs(outputs(model.given, x) - expected).max() <= bound
    assert np.abs(outputs(model.graph, x) - expected).max() <= bound
    alone = [mean_probability([path], x)[0] for path in folds]
    assert min(np.abs(expected - one).max() for one in alone) > 100 * bound, "the folds are one and the same"
    mask = expected[0].argmax(0) > 0
    assert (mask & truth).sum() / (mask | truth).sum() > 0.7

    onnx.checker.check_model(onnx.load(model.given), full_check=True)
    assert model.contract == replace(contract, output_is="probabilities", axes="NCYX", border="mirror")
    recorded = json.loads(model.report.metadata[ensemble.MEMBERS_KEY])
    assert recorded == [{"name": path.name, "sha256": sha256(path)} for path in folds]
    assert model.members == tuple(path.name for path in folds)


def test_the_halo_is_the_largest_of_the_members(folds, shallow, tmp_path):
    alone = [merged([path], tmp_path / str(k)) for k, path in enumerate((folds[1], shallow["same"]))]
    both = merged([folds[1], shallow["same"]], tmp_path / "both")
    assert both.exact
    halos = [[f.halo for f in model.report.outputs[0].field] for model in (*alone, both)]
    assert halos[2] == [tuple(np.maximum(a, b).tolist()) for a, b in zip(*halos[:2], strict=True)]
    assert halos[0] != halos[1]
    assert [s.stride for s in both.report.sizes] == [8, 8]


def test_build_predict_and_verify_take_folds_as_one_network(folds, tmp_path, capsys):
    samples = tmp_path / "samples"
    samples.mkdir()
    for k in range(3):
        np.save(samples / f"{k}.npy", microscopy((170, 190), seed=500 + k).image)
    folder = tmp_path / "folds.urt"
    words = ["build", *map(str, folds), "--samples", str(samples), "--out", str(folder), "--precision", "fp32"]
    assert cli.main([*words, "--backend", "onnxruntime", "--tile", "160x160", "--halo", "exact"]) == 0
    assert "the mean probability of 3 networks: nuclei.onnx, fold1.onnx, fold2.onnx" in capsys.readouterr().out
    image = microscopy((250, 300), seed=40).image
    with urt.load(folder) as engine:
        assert engine.spec.contract.output_is == "probabilities"
        whole = urt.predict(engine, image, output="probability", tile=(256, 304))
        tiled = urt.predict(engine, image, output="probability", tile=(160, 176))
        mask = urt.predict(engine, image)
    np.testing.assert_array_equal(tiled, whole)
    np.testing.assert_array_equal(mask, whole.argmax(0))
    low, high = np.percentile(image, [1, 99.8])
    x = ((image - low) / (high - low + 1e-6)).astype(np.float32)
    x = np.pad(x, ((0, 6), (0, 4)), mode="reflect")[None, None]  # to a multiple of 8
    expected, bound = mean_probability(folds, x)
    # The percentiles may differ by rounding, which the networks pass on a hundredfold at most.
    assert np.abs(whole - expected[0, :, :250, :300]).max() <= 100 * bound
    assert urt.verify(folder, samples).accepted


def to_binary(contract: Contract) -> Callable[[onnx.ModelProto], None]:
    """One logit: that of the nuclei over the background, whose sigmoid is the softmax of the two."""

    def change(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            if tensor.name.startswith("head."):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(array[1:] - array[:1], tensor.name))
        proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
        declare(contract)(proto)

    return change


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_one_channel_is_averaged_as_its_task_says(folds, contract, tmp_path, task):
    binary = replace(contract, task=task, output_is="logits" if task == "binary" else "values", classes=())
    paths = [changed(path, tmp_path / f"one{k}.onnx", to_binary(binary)) for k, path in enumerate(folds)]
    model = merged(paths, tmp_path / "work")
    x, _ = network_input(78)
    expected, bound = mean_probability(folds, x)
    if task == "regression":
        logits = [outputs(path, x) for path in paths]
        expected, bound = np.mean(logits, axis=0, dtype=np.float64), 16 * EPS * float(np.abs(logits).max())
    assert np.abs(outputs(model.graph, x) - expected[:, -1:]).max() <= 4 * bound
    assert model.contract.output_is == ("values" if task == "regression" else "probabilities")


def test_what_members_leave_open_is_found_by_running_them(folds, contract, tmp_path):
    """A Softmax written out by hand returns probabilities, and nothing but its numbers says so."""

    def with_softmax(proto: onnx.ModelProto) -> None:
        name = proto.graph.output[0].name
        for node in proto.graph.node:
            node.output[:] = ["logits" if o == name else o for o in node.output]
        make, axes = onnx.helper.make_node, numpy_helper.from_array(np.array([1]), "axes")
        proto.graph.initializer.append(axes)
        proto.graph.node.extend(
            [
                make("Exp", ["logits"], ["shares"]),
                make("ReduceSum", ["shares", "axes"], ["all"], keepdims=1),
                make("Div", ["shares", "all"], [name]),
            ]
        )
        declare(replace(contract, task=None, output_is=None))(proto)

    paths = [changed(path, tmp_path / f"soft{k}.onnx", with_softmax) for k, path in enumerate(folds[:2])]
    x, _ = network_input(79)
    expected, bound = mean_probability(folds[:2], x)
    assert np.abs(outputs(merged(paths, tmp_path / "work").graph, x) - expected).max() <= 2 * bound


def set_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 17


def with_three_classes(contract: Contract) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            if tensor.name.startswith("head."):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.concatenate([array, array[1:]]), tensor.name))
        proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3
        declare(replace(contract, classes=()))(proto)

    return change


def test_members_that_differ_are_refused_with_the_difference(folds, shallow, contract, tmp_path):
    other = replace(contract, normalization=replace(contract.normalization, percentiles=(0.0, 100.0)))
    swapped = replace(contract, classes=("nucleus", "background"))
    nameless = changed(folds[1], tmp_path / "nameless.onnx", declare(replace(contract, classes=())))
    pairs: list[tuple[Path, Path, type[Exception], str]] = [
        (folds[0], changed(folds[1], tmp_path / "a.onnx", declare(other)), ContractError, "agree in normalization"),
        (folds[0], changed(folds[1], tmp_path / "b.onnx", declare(swapped)), ContractError, "classes.*'nucleus'"),
        (folds[0], changed(folds[1], tmp_path / "c.onnx", set_opset), GraphError, "nuclei.onnx uses.*18.*17"),
        (nameless, changed(folds[1], tmp_path / "d.onnx", with_three_classes(contract)), ContractError, "number of ch"),
        (folds[0], shallow["valid"], ContractError, "output size"),
    ]
    for k, (a, b, error, text) in enumerate(pairs):
        with pytest.raises(error, match=text):
            merged([a, b], tmp_path / f"work{k}")


def test_options_settle_a_difference(folds, contract, tmp_path):
    other = replace(contract, classes=("a", "b"))
    second = changed(folds[1], tmp_path / "b.onnx", declare(other))
    model = merged([folds[0], second], tmp_path / "work", options=Contract(classes=("ground", "cell")))
    assert model.contract.classes == ("ground", "cell")


def test_what_no_file_holds_is_refused(folds, tmp_path, monkeypatch):
    monkeypatch.setattr(ensemble, "LARGEST_FILE", 2**21)
    with pytest.raises(GraphError, match=r"pass the 2.15 GB that one ONNX file holds"):
        merged(folds, tmp_path)


def test_no_model_is_refused(tmp_path):
    with pytest.raises(ContractError, match="no model is given"):
        urt.build([], out=tmp_path / "x.urt")
