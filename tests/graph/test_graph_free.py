"""Freeing of fixed sizes: only where the analysis and the numbers agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from unet_rt.graph.analysis import analyse
from unet_rt.graph.file import read_graph
from unet_rt.graph.free import free_spatial
from unet_rt.graph.passes.free_crops import free_crops
from unet_rt.graph.report import inspect

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
networks = pytest.importorskip("networks")
F = torch.nn.functional
UNetSpec = networks.UNetSpec

SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"


def run(model: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """One run with ONNX Runtime on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return list(session.run(None, dict(zip(names, inputs, strict=True))))
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        raise RuntimeError(str(error)) from error


def dims(model: onnx.ModelProto) -> list[Any]:
    return [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]


def fixed(network: Any, size: int = 32, dynamo: bool = False) -> onnx.ModelProto:
    return networks.export(networks.initialise(network), [(1, 1, size, size)], dynamo=dynamo, free=False)


def test_shared_nuclei_network_becomes_free() -> None:
    path = SHARED / "nuclei" / "weights.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    model = onnx.load(path)
    before = model.SerializeToString()
    freed, reasons = free_spatial(model, run)
    assert (dims(freed), reasons) == (["N", 1, "Y", "X"], ())
    assert model.SerializeToString() == before
    report = inspect(freed)
    assert (report.batch, {s.fixed for s in report.sizes}, report.outputs[0].exact) == (None, {None}, True)


@pytest.mark.parametrize(
    "spec", [UNetSpec(depth=1), UNetSpec(depth=1, up="bilinear", norm="batch", down="conv")], ids=str
)
def test_same_padded_networks_become_free(spec: Any) -> None:
    model = fixed(networks.UNet(spec))
    freed, reasons = free_spatial(model, run)
    assert (dims(freed), reasons) == (["N", 1, "Y", "X"], ())
    image = networks.texture((1, 1, 32, 32))
    assert np.array_equal(run(freed, [image])[0], run(model, [image])[0])
    assert run(freed, [networks.texture((3, 1, 40, 56))])[0].shape == (3, 2, 40, 56)


KEPT = {
    "baked size": lambda: networks.Layers(lambda x: F.interpolate(F.max_pool2d(x, 2), size=(40, 40))),
    "baked pool": lambda: networks.Layers(lambda x: x + F.interpolate(F.avg_pool2d(x, 32), size=x.shape[2:])),
    "instance norm": lambda: networks.UNet(UNetSpec(depth=1, norm="instance")),
    "reshape": lambda: networks.Layers(networks.WindowAttention()),
    "parameter": lambda: Plane(),
}


@pytest.mark.parametrize("depth", [1, 2])
def test_crops_of_unpadded_networks_become_free(depth: int) -> None:
    network = networks.initialise(networks.UNet(UNetSpec(depth=depth, valid=True)))
    model = fixed(network, 76)
    freed, reasons = free_spatial(model, run)
    assert (dims(freed), reasons) == (["N", 1, "Y", "X"], ())
    assert inspect(freed).outputs[0].exact
    assert inspect(model).outputs[0].exact  # which says what build will make of it
    image = networks.texture((1, 1, 92, 108))
    with torch.no_grad():
        expected = network(torch.from_numpy(image)).numpy()
    assert np.abs(run(freed, [image])[0] - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())


def test_free_crops_leaves_other_slices_alone_and_is_idempotent() -> None:
    model = fixed(networks.UNet(UNetSpec(depth=2, valid=True)), 76)
    assert free_crops(model) == 4  # two axes of two skips
    once = model.SerializeToString()
    assert free_crops(model) == 0
    assert model.SerializeToString() == once
    cut = fixed(networks.Layers(lambda x: x[:, :, 4:28, 4:28]))  # a crop of the result: 24 px, or 4 less at either end?
    before = cut.SerializeToString()
    assert free_crops(cut) == 0
    assert cut.SerializeToString() == before


class Plane(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A learned value per pixel (a positional embedding)."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = torch.nn.Parameter(torch.linspace(0, 1, 32 * 32).reshape(1, 1, 32, 32))

    def forward(self, x: Any) -> Any:
        return x + self.plane


@pytest.mark.parametrize("name", KEPT)
def test_baked_sizes_stay_and_say_why(name: str) -> None:
    model = fixed(KEPT[name]())
    freed, reasons = free_spatial(model, run)
    assert dims(freed)[2:] == [32, 32]
    assert sum(r.startswith(("Y is fixed", "X is fixed")) for r in reasons) == 2
    report = inspect(model)
    assert {s.fixed for s in report.sizes} == {32}
    assert not report.outputs[0].exact


def test_a_baked_size_is_reported_with_the_field_it_has_at_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_rt.graph.analysis.free_crops", lambda model: 0)
    report = inspect(fixed(networks.UNet(UNetSpec(valid=True)), 76))
    f = report.outputs[0].field[0]
    assert (f.shrink, f.stride, f.out_size(76)) == ((20, 20), 4, 36)
    assert "76x76 px only" in report.outputs[0].reasons[0]
    assert report.cost[512]["tile"] == (76, 76)


def test_numbers_overrule_the_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    """An analysis that wrongly finds the size free is caught by the numbers."""

    def careless(model: onnx.ModelProto) -> Any:
        good, graph = analyse(graph_of_free), read_graph(model)
        outputs = tuple(replace(o, name=v.name) for o, v in zip(good.outputs, graph.outputs, strict=True))
        return replace(good, graph=graph, outputs=outputs, batch=None), model

    network = networks.initialise(networks.Layers(lambda x: F.interpolate(F.avg_pool2d(x, 32), size=(32, 32))))
    same = networks.initialise(networks.Layers(lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2)))
    graph_of_free = read_graph(networks.export(same, [(1, 1, 32, 32)], free=False))
    model = networks.export(network, [(1, 1, 32, 32)], free=False)
    monkeypatch.setattr("unet_rt.graph.free.analyse_model", careless)
    freed, reasons = free_spatial(model, run)
    assert dims(freed)[2:] == [32, 32]
    assert any("output" in r for r in reasons), reasons


def test_rows_that_mix_keep_the_batch_fixed() -> None:
    """Adding the mean of the batch tells nothing apart in a batch of one."""
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("ReduceMean", ["c", "zero"], ["m"], keepdims=1),
            helper.make_node("Add", ["c", "m"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 32, 32])],
        [
            numpy_helper.from_array(np.random.default_rng(0).normal(size=(2, 1, 3, 3)).astype(np.float32), "w"),
            numpy_helper.from_array(np.array([0]), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    freed, reasons = free_spatial(model, run)
    assert dims(freed) == [1, 1, "Y", "X"]
    assert len(reasons) == 1
    assert reasons[0].startswith("N is fixed to 1: beside another row")


def test_without_a_backend_the_batch_stays() -> None:
    freed, reasons = free_spatial(fixed(networks.UNet(UNetSpec(depth=1))))
    assert dims(freed) == [1, 1, "Y", "X"]
    assert reasons == ("N is fixed to 1: no backend is at hand to prove that rows do not mix",)


def test_a_free_model_comes_back_as_it_is() -> None:
    model = networks.export(networks.build(UNetSpec(depth=1)), [(1, 1, 32, 32)], free_batch=True)
    freed, reasons = free_spatial(model, run)
    assert freed is model
    assert reasons == ()
