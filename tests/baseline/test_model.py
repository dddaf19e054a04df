"""Models as they are opened: files that lie apart, and graphs without the usual axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import unet_rt as urt
from unet_rt.baseline.model import open_model
from unet_rt.cli.demo import shipped_model
from unet_rt.contract.contract import Contract
from unet_rt.engine.folder import read_folder

pytestmark = pytest.mark.onnxruntime


def apart(path: Path) -> Path:
    """The shipped network with its weights in a file beside it, as PyTorch's exporter writes them."""
    onnx.save_model(
        onnx.load(shipped_model()), path, save_as_external_data=True, location="weights.data", size_threshold=0
    )
    return path


def build(model: Path, out: Path, samples) -> urt.Engine:
    options = {"backend": "onnxruntime", "precision": "fp32", "tile": (256, 256), "halo": "exact"}
    return urt.build(model, samples=samples, out=out, **options)


@pytest.mark.parametrize("name", ["model.onnx", "graph.onnx"])  # the second is a name that build uses itself
def test_weights_beside_the_graph_travel_with_the_engine(tmp_path, sample_images, name):
    (tmp_path / "export").mkdir()
    model = apart(tmp_path / "export" / name)
    build(model, tmp_path / "x.urt", sample_images).close()
    (tmp_path / "export" / "weights.data").unlink()
    kept, given = onnx.load(read_folder(tmp_path / "x.urt").file("model")), onnx.load(shipped_model())
    for a, b in zip(kept.graph.initializer, given.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b))
    assert urt.verify(tmp_path / "x.urt", sample_images[:1]).accepted


def test_weights_that_are_missing_are_said(tmp_path, sample_images):
    model = apart(tmp_path / "model.onnx")
    (tmp_path / "weights.data").unlink()
    with pytest.raises(urt.GraphError, match="cannot be read"):
        build(model, tmp_path / "x.urt", sample_images)


def test_weights_beyond_what_one_file_holds(tmp_path, sample_images, monkeypatch):
    """The limit is protobuf's, 2 GB; lowered here, as a network of that size takes minutes to write."""
    from unet_rt.graph import file as onnx_file

    model = apart(tmp_path / "model.onnx")
    monkeypatch.setattr(onnx_file, "LARGEST", 900_000)  # between the graph's bytes and those with its weights
    assert urt.inspect(model).exact
    with pytest.raises(urt.GraphError, match="it can be inspected but not built") as error:
        build(model, tmp_path / "x.urt", sample_images)
    size = shipped_model().stat().st_size
    assert 0.95 * size < int(str(error.value).split(" has ")[1].split(" bytes")[0].replace(",", "")) < 1.05 * size
    with pytest.raises(urt.GraphError, match=r"cannot be whole.*external data"):
        urt.inspect(shipped_model())


def fixed_to(side: int, path: Path) -> Path:
    """The shipped network as if it had been exported at ``side`` x ``side`` px."""
    proto = onnx.load(shipped_model())
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim[2:]:
            dim.dim_value = side
    onnx.save_model(proto, path)
    return path


def test_a_size_that_leaves_no_core_is_proven_free_beyond_it(tmp_path, sample_images, exact_folder):
    """At 48 px the halo of 53 leaves nothing that another size could be held against: tiles that keep something are."""
    path, image = fixed_to(48, tmp_path / "fixed.onnx"), sample_images[0][:90, :100]
    assert urt.inspect(path).exact  # and build says the same
    with build(path, tmp_path / "x.urt", sample_images) as engine, urt.load(exact_folder) as plain:
        assert engine.spec.free_size
        np.testing.assert_array_equal(urt.predict(engine, image), urt.predict(plain, image))


def test_a_size_that_the_numbers_do_not_bear_out_is_part_of_the_model(tmp_path, sample_images, monkeypatch):
    monkeypatch.setattr("unet_rt.graph.free._differs_beyond", lambda *_: "its tiles are not the whole")
    path, image = fixed_to(48, tmp_path / "fixed.onnx"), sample_images[0][:90, :100]
    options = {"backend": "onnxruntime", "precision": "fp32", "threads": 1, "samples": [image]}
    said = r"its tiles are not the whole; for other sizes export it .*dynamic_axes=.*its tiles are blended"
    with pytest.raises(urt.TileError, match=said):
        urt.build(path, out=tmp_path / "x.urt", halo="measured", **options)
    with urt.build(path, out=tmp_path / "x.urt", **options) as engine:
        assert (engine.spec.tile, engine.spec.overlap, engine.spec.free_size) == ((48, 48), (24, 24), False)
        assert urt.predict(engine, image).shape == (90, 100)


def test_a_graph_without_batch_axis_is_built_and_run(tmp_path, sample_images, exact_folder):
    """(C, Y, X) in, (K, Y, X) out: channels are channels, and tiles run one by one."""
    proto = onnx.load(shipped_model())
    graph = proto.graph
    x, y = graph.input[0], graph.output[0]
    zero = onnx.numpy_helper.from_array(np.array([0]), "zero")
    graph.initializer.append(zero)
    for node in graph.node:
        node.input[:] = ["x/batch" if name == x.name else name for name in node.input]
        node.output[:] = ["y/batch" if name == y.name else name for name in node.output]
    graph.node.insert(0, onnx.helper.make_node("Unsqueeze", [x.name, "zero"], ["x/batch"]))
    graph.node.append(onnx.helper.make_node("Squeeze", ["y/batch", "zero"], [y.name]))
    for value in (x, y):
        del value.type.tensor_type.shape.dim[0]
    del graph.value_info[:]
    onnx.save(proto, tmp_path / "model.onnx")
    assert urt.inspect(tmp_path / "model.onnx").outputs[0].axes == "CYX"
    image = sample_images[0]
    with build(tmp_path / "model.onnx", tmp_path / "x.urt", sample_images) as engine, urt.load(exact_folder) as plain:
        expected = urt.predict(plain, image)
        np.testing.assert_array_equal(urt.predict(engine, image), expected)
        np.testing.assert_array_equal(urt.predict(engine, image, batch=3), expected)


def test_default_overlap_of_unpadded_networks_leaves_no_gap(engine_folder):
    from dataclasses import replace
    from fractions import Fraction

    from unet_rt.baseline.tiles import blended_spec
    from unet_rt.tiling.field import AxisField, TileSizes

    field = AxisField(16, (107, 107), (0, 0), (92, 92), Fraction(1))
    spec = read_folder(engine_folder).spec
    outputs = (replace(spec.outputs[0], field=(field, field), exact=False, reasons=("InstanceNorm",)),)
    spec = replace(spec, outputs=outputs, sizes=(TileSizes(16, 12, 188),) * 2)
    assert blended_spec(spec, (572, 572), Path("m.onnx")).overlap == (286, 286)
    small = blended_spec(spec, (300, 300), Path("m.onnx"))
    assert small.overlap == (184, 184)
    assert small.grid((500, 700)).count > 4


@pytest.mark.parametrize("said", [(0.5,), (0.5, 0.5)])
def test_a_pixel_size_of_one_number_is_that_of_each_axis(tmp_path, said):
    (tmp_path / "work").mkdir()
    model = open_model(shipped_model(), tmp_path / "work", options=Contract(pixel_size_um=said))
    assert model.contract.pixel_size_um == (0.5, 0.5)


def test_a_pixel_size_of_other_axes_is_refused(tmp_path):
    (tmp_path / "work").mkdir()
    with pytest.raises(urt.ContractError, match=r"2 x 0.5 x 0.5 um, has 3 numbers, .* 2 spatial axes.*--pixel-size"):
        open_model(shipped_model(), tmp_path / "work", options=Contract(pixel_size_um=(2, 0.5, 0.5)))
