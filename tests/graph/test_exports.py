"""Exports as people have them: baked sizes freed, or refused with what to do; never an internal error."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from test_graph import floats, one, single, weights
from test_graph_free import fixed, run

from unet_rt.baseline.model import open_model
from unet_rt.cli.main import main
from unet_rt.errors import GraphError
from unet_rt.graph.analysis import analyse
from unet_rt.graph.file import read_graph
from unet_rt.graph.passes.free_sizes import free_sizes
from unet_rt.graph.report import check_images, inspect

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
networks = pytest.importorskip("networks")
mainstream = pytest.importorskip("mainstream")
node = helper.make_node

pytestmark = [pytest.mark.torch, pytest.mark.onnxruntime]

BAKED: dict[str, tuple[Callable[[], Any], tuple[bool, ...]]] = {
    "nearest": (lambda: mainstream.SizedDecoder(), (False, True)),
    "bilinear": (lambda: mainstream.SizedDecoder("bilinear", depth=2), (False,)),
    "deeper than its tile": (lambda: mainstream.SizedDecoder("bilinear", depth=4), (False,)),
    "shuffle": (lambda: mainstream.Shuffled(False), (False, True)),
    "shuffle by views": (lambda: mainstream.Shuffled(True, 2), (True,)),
    "blocks of 4": (lambda: mainstream.Shuffled(True, 4), (False,)),
    "channels": (lambda: mainstream.ChannelShuffle(), (False,)),
}


@pytest.mark.parametrize(("name", "dynamo"), [(name, d) for name, (_, all_) in BAKED.items() for d in all_])
def test_baked_sizes_are_freed_into_the_network_itself(name: str, dynamo: bool, tmp_path: Path) -> None:
    network = networks.initialise(BAKED[name][0]())
    model = networks.export(network, [(1, 1, 96, 64)], dynamo=dynamo, free=False)
    assert one(inspect(model)).exact
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path))
    opened = open_model(path, tmp_path)  # what inspect says, build does
    assert (opened.exact, opened.fixed, {s.fixed for s in opened.report.sizes}) == (True, (), {None})
    freed = onnx.load(str(opened.graph))
    image = networks.texture((1, 1, 96, 64))
    assert np.array_equal(run(freed, [image])[0], run(model, [image])[0])
    other = networks.texture((2, 1, 64, 160))
    with torch.no_grad():
        expected = network(torch.from_numpy(other)).numpy()
    assert np.abs(run(freed, [other])[0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_channels_in_any_order_are_kept() -> None:
    """Blocks of 3 channels, where SpaceToDepth counts otherwise than PyTorch does."""
    model = networks.export(networks.initialise(mainstream.Shuffled(True, 2, 3)), [(1, 3, 16, 24)], free=False)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    assert free_sizes(copy, analyse(read_graph(model)).walk((16, 24)).tensors) == 2
    assert [n.op_type for n in copy.graph.node if n.op_type in ("SpaceToDepth", "Gather", "DepthToSpace")] == [
        "SpaceToDepth", "Gather", "DepthToSpace",
    ]  # fmt: skip
    image = networks.texture((1, 3, 16, 24))
    assert np.array_equal(run(copy, [image])[0], run(model, [image])[0])
    once = copy.SerializeToString()
    assert free_sizes(copy, analyse(read_graph(copy)).walk((16, 24)).tensors) == 0
    assert copy.SerializeToString() == once


def test_what_cannot_be_freed_says_how_to_export_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = networks.initialise(mainstream.SizedDecoder("align_corners", depth=2))
    report = inspect(networks.export(network, [(1, 1, 64, 64)], free=False))
    reason = one(report).reasons[0]
    assert not one(report).exact
    assert all(reason in why for why in report.reasons_fixed)
    line = re.search(r"torch\.onnx\.export\(.*\)$", reason)
    assert line is not None
    monkeypatch.chdir(tmp_path)
    with networks.quiet():
        exec(line[0], {"torch": torch, "model": network.eval(), "image": torch.zeros(1, 1, 64, 64)})
    assert {s.fixed for s in inspect("free.onnx").sizes} == {None}


@pytest.mark.parametrize(
    ("make", "size"), [(mainstream.Atrous, 65), (mainstream.SizedDecoder, 65), (mainstream.Atrous, 129)]
)
def test_sizes_that_strides_do_not_divide_are_blended_at_scale_1(make: Any, size: int, tmp_path: Path) -> None:
    import unet_rt as urt
    from unet_rt.contract.contract import Contract, Normalization

    path = tmp_path / "m.onnx"
    onnx.save(fixed(make(), size), str(path))
    f = one(inspect(path)).field[0]
    assert (f.scale, f.shrink, f.out_size(size), {s.fixed for s in inspect(path).sizes}) == (1, (0, 0), size, {size})
    contract = Contract(task="regression", output_is="values", normalization=Normalization("none"))
    image = networks.texture((1, 1, 150, 140))[0, 0]
    more: Any = {"backend": "onnxruntime", "precision": "fp32", "threads": 1, "contract": contract}
    with urt.build(path, samples=[image], out=tmp_path / "m.urt", **more) as engine:
        assert (engine.spec.tile, engine.spec.exact) == ((size, size), False)
        assert urt.predict(engine, image, output="raw").shape == (2, 150, 140)


def test_an_encoder_at_such_a_size_is_exact_at_others(tmp_path: Path) -> None:
    encoder = torch.nn.Sequential(mainstream.Block(1, 4, 2), mainstream.Block(4, 2, 2))
    path = tmp_path / "m.onnx"
    onnx.save(fixed(encoder, 65), str(path))
    for report in (inspect(path), open_model(path, tmp_path).report):
        assert (one(report).exact, one(report).field[0].scale, one(report).field[0].shrink) == (
            True,
            Fraction(1, 4),
            (0, 0),
        )
        assert {(s.stride, s.remainder, s.fixed) for s in report.sizes} == {(4, 0, None)}


def test_a_network_fixed_to_a_rectangle_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = networks.export(
        networks.initialise(mainstream.SizedDecoder("align_corners", 2)), [(1, 1, 64, 96)], free=False
    )
    report = inspect(model)
    assert {entry["tile"] for entry in report.cost.values()} == {(64, 96)}
    assert report.to_json()["cost"]["512"]["activation_bytes"] == report.activation_bytes((64, 96))
    onnx.save(model, str(tmp_path / "m.onnx"))
    assert main(["inspect", str(tmp_path / "m.onnx")]) == 0
    assert capsys.readouterr().out.count("64x96 px  ") == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_an_adaptive_pool_keeps_its_size(parts: int) -> None:
    """Freed, its kernel would be that of the export: another network than the one that was exported."""

    def pyramid(x: Any) -> Any:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, parts)
        return x + torch.nn.functional.interpolate(pooled, size=x.shape[2:])

    report = inspect(fixed(networks.Layers(pyramid), 32))
    assert (one(report).exact, {s.fixed for s in report.sizes}) == (False, {32})
    assert any(" pools over " in reason for reason in one(report).reasons), one(report).reasons


# ------------------------------------------------------------------------------------------------------------- refused


def trained(op: str) -> onnx.ModelProto:
    if op == "Dropout":
        nodes = [node("Dropout", ["x", "half", "on"], ["y"])]
        return single(nodes, {"half": np.float32(0.5), "on": np.array(True)})
    nodes = [node(op, ["x", "one", "one", "one", "one"], ["y", "mean", "variance"], training_mode=1)]
    return single(nodes, {"one": floats(1, 1)})


@pytest.mark.parametrize("op", ["BatchNormalization", "Dropout"])
def test_training_mode_is_refused_with_its_remedy(op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(trained(op), str(path))
    assert main(["inspect", str(path)]) == 2
    assert "call model.eval() before exporting" in capsys.readouterr().err
    with pytest.raises(GraphError, match=r"training mode; call model.eval\(\) before exporting"):
        open_model(path, tmp_path)


def test_a_network_of_one_axis_is_refused_by_inspect_as_by_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signal = helper.make_graph(
        [node("Conv", ["x", "w"], ["y"], pads=[1, 1])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 64])],
        [onnx.numpy_helper.from_array(weights(1, 1, 3), "w")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(signal, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    assert main(["inspect", str(path)]) == 2
    assert "has one spatial axis; 2 (images) and 3 (volumes) are supported" in capsys.readouterr().err
    with pytest.raises(GraphError, match="has one spatial axis"):
        open_model(path, tmp_path)


@pytest.mark.parametrize("level", ["EXTENDED", "ALL"])
def test_what_onnx_runtime_saved_is_fused_convolutions_or_refused(level: str, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(tmp_path / "m.onnx")
    spec = networks.UNetSpec(depth=1, channels=16)
    model = networks.export(networks.build(spec), [(1, 1, 32, 32)])
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    saved = onnx.load(str(tmp_path / "m.onnx"))
    if any(n.domain == "com.microsoft.nchwc" for n in saved.graph.node):
        with pytest.raises(GraphError, match=r"saved this file after .*give the original file"):
            inspect(saved)
    elif level == "EXTENDED":
        assert "FusedConv" in {n.op_type for n in saved.graph.node}
        assert one(inspect(saved)).field == one(inspect(model)).field


def test_operators_of_unknown_domains_are_not_taken_for_element_wise() -> None:
    model = single([node("Blur", ["x"], ["b"], domain="my.ops"), node("Relu", ["b"], ["y"])], {})
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    report = inspect(model)
    assert not report.exact
    assert "Blur 'b' is not an operator whose dependence is known" in one(report).reasons[0]
    with pytest.raises(GraphError, match=r"is not an image .*Blur"):
        check_images(report)


def test_an_output_of_another_size_is_said_by_build_and_predict(tmp_path: Path) -> None:
    import unet_rt as urt
    from unet_rt.contract.contract import Contract, Normalization

    encoder = torch.nn.Sequential(mainstream.Block(1, 4, 2), torch.nn.Conv2d(4, 1, 1))
    path, said, done = tmp_path / "m.onnx", list[str](), list[Any]()
    onnx.save(fixed(encoder, 64), str(path))
    contract = Contract(task="regression", output_is="values", normalization=Normalization("none"))
    more: Any = {"backend": "onnxruntime", "precision": "fp32", "threads": 1, "contract": contract}
    image = networks.texture((1, 1, 96, 80))[0, 0]
    with urt.build(
        path, samples=[image], out=tmp_path / "m.urt", report=lambda report: said.extend(report.notes), **more
    ) as engine:
        assert urt.predict(engine, image, output="raw", report=done.append).shape == (1, 48, 40)
    text = "has 1/2 x 1/2 samples per pixel: its results are written at that size, not the image's"
    assert any(text in note for note in said)
    assert any(text in note for note in done[0].notes)
