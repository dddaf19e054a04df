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

import onnx
from onnx import numpy_helper

import unet_rt as urt
from unet_rt.baseline import folds as ensemble
from unet_rt.baseline.folds import (
    merge,
    open_models,
)
from unet_rt.baseline.model import Model, open_model
from unet_rt.cli.demo import shipped_model
from unet_rt.cli.main import main
from unet_rt.contract.contract import (
    Contract,
    Head,
    Normalization,
)
from unet_rt.contract.metadata import (
    contract_from_metadata,
    contract_to_metadata,
)
from unet_rt.drawing.microscopy import microscopy
from unet_rt.engine.folder import sha256
from unet_rt.errors import (
    ContractError,
    GraphError,
)
from unet_rt.graph.passes.half import half
from unet_rt.graph.report import inspect
from unet_rt.models.stored import unet_from_onnx
from unet_rt.models.unet import UNet, UNetSpec
from unet_rt.training.export import export

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
def shallow(tmp_path_factory: pytest.TempPathFactory, contract: Contract) -> Path:
    """A smaller network after some training."""
    torch.manual_seed(3)
    network = trained(UNet(UNetSpec(width=4, depth=2, padding="same", dropout=0.0)), 3, 6)
    path = tmp_path_factory.mktemp("shallow") / "shallow.onnx"
    return export(network, path, contract=contract, sizes=[64, 80]).path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, folds: list[Path]) -> list[Model]:
    """The folds as models."""
    return [open_model(path, tmp_path_factory.mktemp("opened")) for path in folds]


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


def merged(members: Sequence[Model], path: Path) -> Path:
    merge(members, path)
    return path


def changed(path: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, target)
    return target


def declare(contract: Contract) -> Callable[[onnx.ModelProto], None]:
    return lambda proto: onnx.helper.set_model_props(proto, contract_to_metadata(contract))


def test_the_merged_graph_is_the_mean_of_its_members(folds, opened, contract, tmp_path):
    path = merged(opened, tmp_path / "ensemble.onnx")
    x, truth = network_input(77, 256)
    expected, bound = mean_probability(folds, x)
    assert np.abs(outputs(path, x) - expected).max() <= bound
    alone = [mean_probability([path], x)[0] for path in folds]
    assert min(np.abs(expected - one).max() for one in alone) > 100 * bound, "the folds are one and the same"
    mask = expected[0].argmax(0) > 0
    assert (mask & truth).sum() / (mask | truth).sum() > 0.7

    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    metadata = {p.key: p.value for p in proto.metadata_props}
    expected_contract = replace(contract, output_is="probabilities", axes="NCYX", border="mirror")
    assert contract_from_metadata(metadata) == expected_contract
    recorded = json.loads(metadata[ensemble.MEMBERS_KEY])
    assert recorded == [{"name": path.name, "sha256": sha256(path)} for path in folds]


def test_the_halo_is_the_largest_of_the_members(opened, shallow, tmp_path):
    members = [opened[1], open_model(shallow, tmp_path)]
    both = inspect(merged(members, tmp_path / "ensemble.onnx"))
    assert both.exact
    halos = [[f.halo for f in report.outputs[0].field] for report in (members[0].report, members[1].report, both)]
    assert halos[2] == [tuple(np.maximum(a, b).tolist()) for a, b in zip(*halos[:2], strict=True)]
    assert halos[0] != halos[1]
    assert [s.stride for s in both.sizes] == [8, 8]


def test_build_predict_and_verify_take_folds_as_one_network(folds, tmp_path, capsys):
    samples = tmp_path / "samples"
    samples.mkdir()
    for k in range(3):
        np.save(samples / f"{k}.npy", microscopy((170, 190), seed=500 + k).image)
    folder = tmp_path / "folds.urt"
    words = ["build", *map(str, folds[:2]), "--samples", str(samples), "--out", str(folder), "--precision", "fp32"]
    assert main([*words, "--backend", "onnxruntime", "--tile", "160x160", "--halo", "exact"]) == 0
    assert "the mean probability of 2 networks: nuclei.onnx, fold1.onnx" in capsys.readouterr().out
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
    expected, bound = mean_probability(folds[:2], x)
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


def test_one_channel_is_averaged_as_its_task_says(folds, contract, tmp_path):
    binary = replace(contract, task="binary", output_is="logits", classes=())
    paths = [changed(path, tmp_path / f"one{k}.onnx", to_binary(binary)) for k, path in enumerate(folds[:2])]
    members = []
    for path in paths:
        (tmp_path / path.stem).mkdir()
        members.append(open_model(path, tmp_path / path.stem))
    x, _ = network_input(78)
    expected, bound = mean_probability(folds[:2], x)  # the sigmoid of a difference is the softmax of the two
    assert np.abs(outputs(merged(members, tmp_path / "binary.onnx"), x) - expected[:, 1:]).max() <= 4 * bound

    values = replace(members[0].contract, task="regression", output_is="values")
    members = [replace(member, contract=values) for member in members]
    logits = [outputs(path, x) for path in paths]
    mean, bound = np.mean(logits, axis=0, dtype=np.float64), 16 * EPS * float(np.abs(logits).max())
    path = merged(members, tmp_path / "values.onnx")
    assert np.abs(outputs(path, x) - mean).max() <= bound
    metadata = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert contract_from_metadata(metadata).output_is == "values"


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
    assert np.abs(outputs(open_models(paths, tmp_path).graph, x) - expected).max() <= 2 * bound


def with_second(contract: Contract) -> Callable[[onnx.ModelProto], None]:
    """A second output, of weights of its own, as nested networks have for deep supervision."""

    def change(proto: onnx.ModelProto) -> None:
        first = proto.graph.output[0]
        weights = np.ones((2, 2, 1, 1), np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(weights, "second.weight"))
        proto.graph.node.append(onnx.helper.make_node("Conv", [first.name, "second.weight"], ["second"], "second"))
        proto.graph.output.append(onnx.helper.make_tensor_value_info("second", 1, ["n", 2, "h", "w"]))
        declare(contract)(proto)

    return change


def test_of_several_outputs_the_first_is_averaged_as_its_head_says(folds, contract, tmp_path):
    """What heads declare of the first output counts; what they say of others, and what computes those, is left behind."""
    bare = replace(contract, task=None, output_is=None, classes=(), threshold=())
    paths = [changed(path, tmp_path / f"two{k}.onnx", with_second(bare)) for k, path in enumerate(folds[:2])]
    name = onnx.load(paths[0]).graph.output[0].name
    heads = (Head(name, "multilabel", "logits", ("a", "b"), (0.3,)), Head("second", "regression", "values"))
    model = open_models(paths, tmp_path, options=Contract(heads=heads))
    assert model.contract.heads == ()
    assert (model.contract.task, model.contract.output_is) == ("multilabel", "probabilities")
    assert (model.contract.classes, model.contract.threshold) == (("a", "b"), (0.3,))
    assert [o.name for o in model.report.outputs] == [name]
    proto = onnx.load(model.graph)
    assert not [t.name for t in proto.graph.initializer if "second" in t.name]
    assert not [n.name for n in proto.graph.node if "second" in n.name]
    x, _ = network_input(80)
    logits = [outputs(path, x).astype(np.float64) for path in folds[:2]]
    bound = EPS * (8 + 16 * max(float(np.abs(z).max()) for z in logits))
    assert np.abs(outputs(model.graph, x) - np.mean([1 / (1 + np.exp(-z)) for z in logits], axis=0)).max() <= bound
    with pytest.raises(ContractError, match="declares a head 'third'; the outputs are"):
        open_models(paths, tmp_path, options=Contract(heads=(Head("third", "regression", "values"),)))


def to_double(proto: onnx.ModelProto) -> None:
    """Weights, input and output in FP64."""
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.name.endswith("scales"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    del proto.graph.value_info[:]


def test_folds_of_other_element_types(folds, tmp_path):
    """FP64 is averaged in FP64; folds of two types are told apart; FP16 is widened first."""
    doubles = [changed(path, tmp_path / f"double{k}.onnx", to_double) for k, path in enumerate(folds[:2])]
    onnx.checker.check_model(onnx.load(open_models(doubles, tmp_path).graph), full_check=True)
    with pytest.raises(ContractError, match=r"agree in .*double1.onnx"):
        open_models([folds[0], doubles[1]], tmp_path)

    def to_half(proto: onnx.ModelProto) -> None:
        half(proto)

    lower = changed(folds[1], tmp_path / "lower.onnx", to_half)
    onnx.checker.check_model(onnx.load(open_models([folds[1], lower], tmp_path).graph), full_check=True)


def test_members_that_differ_are_refused_with_the_difference(opened, tmp_path):
    one, two = opened[:2]

    def declares(**values: Any) -> Model:
        return replace(two, contract=replace(two.contract, **values))

    def output(**values: Any) -> Model:
        return replace(two, report=replace(two.report, outputs=(replace(two.report.outputs[0], **values),)))

    def older(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].version = 17

    cut = tuple(replace(f, shrink=(20, 20)) for f in two.report.outputs[0].field)
    inputs = (replace(two.report.inputs[0], dtype="float64"),)
    pairs: list[tuple[Model, type[Exception], str]] = [
        (declares(normalization=Normalization("minmax")), ContractError, "agree in normalization: nuclei.onnx has"),
        (declares(classes=("nucleus", "background")), ContractError, "classes.*'nucleus', 'background'"),
        (declares(output_is="probabilities"), ContractError, "output is: .*logits.*probabilities"),
        (replace(two, report=replace(two.report, inputs=inputs)), ContractError, "inputs.*float32.*float64"),
        (output(field=cut), ContractError, "output size.*0.*40"),
        (output(axes="NYXC"), ContractError, "output .axes, number of channels.*NCYX.*NYXC"),
        (
            replace(two, graph=changed(two.graph, tmp_path / "older.onnx", older)),
            GraphError,
            "nuclei.onnx uses.*18.*17.*same opset",
        ),
    ]
    for other, error, text in pairs:
        with pytest.raises(error, match=text):
            merge([one, other], tmp_path / "ensemble.onnx")
    assert not (tmp_path / "ensemble.onnx").exists()


def test_options_settle_a_difference(folds, contract, tmp_path):
    second = changed(folds[1], tmp_path / "b.onnx", declare(replace(contract, classes=("a", "b"))))
    with pytest.raises(ContractError, match="classes"):
        merge([open_model(path, tmp_path) for path in (folds[0], second)], tmp_path / "ensemble.onnx")
    model = open_models([folds[0], second], tmp_path, options=Contract(classes=("ground", "cell")))
    assert model.contract.classes == ("ground", "cell")
    assert model.members == ("nuclei.onnx", "b.onnx")


def test_what_no_file_holds_is_refused(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("unet_rt.baseline.folds.LARGEST", 2**21)
    with pytest.raises(GraphError, match="that one ONNX file holds"):
        merge(opened, tmp_path / "ensemble.onnx")


def test_no_model_is_refused(tmp_path):
    with pytest.raises(ContractError, match="no model is given"):
        urt.build([], out=tmp_path / "x.urt")
