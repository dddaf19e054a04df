"""ncnn: U-Nets of every kind are converted right, at sizes other than the converted one, or refused by name."""

from __future__ import annotations

from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import unet_rt as urt
from unet_rt import backends
from unet_rt.backends.ncnn import backend as ncnn_backend
from unet_rt.backends.ncnn import convert as ncnn_convert
from unet_rt.backends.session import Array, Session
from unet_rt.cli.demo import shipped_model
from unet_rt.errors import BackendError, ParityError

pytestmark = [pytest.mark.ncnn, pytest.mark.onnxruntime]

# float32 keeps 24 bits; Winograd's F(6 x 6, 3 x 3) multiplies what is rounded by up to about 100 (Barabasz and others,
# 2020): 6e-6 of a layer's values. Networks of ten layers in a row, whose errors add up like a random walk: 2e-5.
ROUNDING = 2e-5


def converted(
    model: onnx.ModelProto | Path, folder: Path, *, tile: tuple[int, ...], device: str = "cpu", precision: str = "fp32"
) -> tuple[Session, Session]:
    """Sessions in ncnn and in ONNX Runtime."""
    path = model if isinstance(model, Path) else folder / "model.onnx"
    if not isinstance(model, Path):
        onnx.save(model, path)
    graph, weights = folder / "graph.onnx", folder / "weights.bin"
    settings = ncnn_backend.build(
        path, graph, precision=precision, device=device, blob=weights, tiles=[tile, tuple(n + 16 for n in tile), tile]
    )
    path.unlink() if path.parent == folder else None  # what runs needs neither it ...
    session = ncnn_backend.load(graph, precision=precision, device=device, threads=2, blob=weights, settings=settings)
    return session, backends.get("onnxruntime").load(graph, precision="fp32", threads=2)


def compare(found: list[Array], wanted: list[Array], tolerance: float = ROUNDING) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert one.dtype == np.float32
        assert np.abs(one - other).max() <= tolerance * np.ptp(other)


KINDS = {
    "plain": networks.UNetSpec(),
    "wide enough for Winograd": networks.UNetSpec(channels=32, depth=1),
    "valid": networks.UNetSpec(valid=True, channels=16),
    "three channels, batch norm": networks.UNetSpec(inputs=3, norm="batch", up="nearest"),
    "nnU-Net's": networks.UNetSpec(norm="instance", up="transposed", classes=3),
    "transposed of 3": networks.UNetSpec(up="transposed3"),
    "bilinear, strided": networks.UNetSpec(up="bilinear", down="conv"),
    "residual, reflected": networks.UNetSpec(residual=True, pad_mode="reflect", up="shuffle"),
    "softmax": networks.UNetSpec(final="softmax", down="avg"),
    "dilated": networks.UNetSpec(dilation=2, depth=1),
    "volume": networks.UNetSpec(dims=3, depth=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_give_what_onnx_runtime_gives(kind: str, tmp_path: Path) -> None:
    """At the converted size, at another one, and for several tiles in a batch."""
    spec = KINDS[kind]
    tile = (16,) * 3 if spec.dims == 3 else (92, 92) if spec.valid else (64, 64)
    model = networks.export(networks.build(spec), [(1, spec.inputs, *tile)], free_batch=True)
    ours, theirs = converted(model, tmp_path, tile=tile)
    with ours, theirs:
        for size, batch in ((tile, 1), (tuple(n + 8 * (k + 1) for k, n in enumerate(tile)), 2)):
            x = networks.texture((batch, spec.inputs, *size))
            compare(ours.run([x]), theirs.run([x]))
        assert (ours.precision, ours.device, ours.threads) == ("fp32", "cpu", 2)
        assert ours.version.startswith("ncnn 1.")
    with pytest.raises(BackendError, match="closed"):
        ours.run([x])


def test_the_shipped_network_and_its_labels(tmp_path: Path, sample_images: list[Array]) -> None:
    ours, theirs = converted(shipped_model(), tmp_path, tile=(64, 64))
    image = sample_images[0].astype(np.float32)
    x = ((image - np.percentile(image, 1)) / np.ptp(np.percentile(image, (1, 99.8))))[None, None, :256, :256]
    with ours, theirs:
        found, wanted = ours.run([x])[0], theirs.run([x])[0]
    compare([found], [wanted])
    assert 0.02 < (wanted.argmax(1) == 1).mean() < 0.9
    assert (found.argmax(1) != wanted.argmax(1)).mean() < 1e-4


@pytest.mark.parametrize("more", [0, 2])
def test_a_size_that_the_converter_writes_down_is_refused(more: int, tmp_path: Path) -> None:
    """Up-sampling to the size of the image is a factor; where it is none, the network would be wrong at other tiles."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Add", ["shape", "more"], ["size"]),
        helper.make_node(
            "Resize", ["small", "", "", "size"], ["y"], mode="linear", coordinate_transformation_mode="half_pixel"
        ),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", 1, [1, 1, "h", "w"])], [value("y", 1, [1, 1, "a", "b"])],
        [numpy_helper.from_array(np.array([0, 0, more, more]), "more")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if not more:
        ours, theirs = converted(model, tmp_path, tile=(64, 64))
        with ours, theirs:
            x = networks.texture((1, 1, 90, 74))
            compare(ours.run([x]), theirs.run([x]))
        return
    with pytest.raises(BackendError, match=r"size of the tile into layer .* use another --backend"):
        converted(model, tmp_path, tile=(64, 64))


def test_what_it_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = networks.export(networks.build(networks.UNetSpec(final="argmax")), [(1, 1, 64, 64)])
    with pytest.raises(BackendError, match=r"ncnn cannot load .*ArgMax .* another --backend"):
        converted(model, tmp_path, tile=(64, 64))
    with pytest.raises(BackendError, match="no int8"):
        ncnn_backend.build(tmp_path, tmp_path, precision="int8", blob=tmp_path, tiles=[(64, 64)])
    real = ncnn_convert.importlib.util.find_spec
    monkeypatch.setattr(ncnn_convert.importlib.util, "find_spec", lambda name: None if name == "pnnx" else real(name))
    with pytest.raises(BackendError, match="pip install pnnx"):
        converted(shipped_model(), tmp_path, tile=(64, 64))


def test_devices_are_used_or_refused() -> None:
    assert "use --device vulkan" in str(ncnn_backend.missing("cuda:0"))
    for name in ("vulkan:x", "vulcan", "vulkan:"):
        with pytest.raises(BackendError, match=r"auto, cpu, cuda\[:N\] or vulkan\[:N\]"):
            backends.device(name)
    with pytest.raises(BackendError, match=r"vulkan:99 was asked, (and )?Vulkan lists"):
        backends.device("vulkan:99")


@pytest.mark.vulkan
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", ROUNDING), ("fp16", 4e-3)])
def test_vulkan(precision: str, tolerance: float, tmp_path: Path) -> None:
    """On whatever device there is, Mesa's software one in CI. FP16 keeps 11 bits: eight layers, 5e-4 each."""
    ours, theirs = converted(shipped_model(), tmp_path, tile=(48, 48), device="vulkan:0", precision=precision)
    with ours, theirs:
        for size in ((48, 48), (56, 72)):
            x = networks.texture((1, 1, *size))
            compare(ours.run([x]), theirs.run([x]), tolerance)
        assert (ours.precision, ours.device) == (precision, "vulkan:0")


def test_engines_are_equal_up_to_rounding_and_say_so(tmp_path: Path, sample_images: list[Array]) -> None:
    """Winograd's sums depend on the place in the tile, those of ONNX Runtime's 2-D convolutions do not."""
    options = {"samples": sample_images[1:2], "precision": "fp32", "tile": (256, 256), "halo": "exact"}
    masks = list[Array]()
    for name, kind in (("ncnn", "rounding"), ("onnxruntime", "bits")):
        with urt.build(shipped_model(), out=tmp_path / f"{name}.urt", backend=name, **options) as engine:
            equal = engine.spec.equal
            assert equal is not None
            assert equal.kind == kind
            assert 0 <= equal.difference < ROUNDING
            assert (equal.difference > 0) == (kind == "rounding")
            assert (equal.labels or 0.0) <= 1e-4
            assert equal.tiles >= 4
            masks.append(urt.predict(engine, sample_images[0]))
            assert np.array_equal(urt.predict(engine, sample_images[0]), masks[-1])  # the same tiles, the same bits
    assert (masks[0] != masks[1]).mean() < 1e-4
    with urt.load(tmp_path / "ncnn.urt") as engine:
        assert (engine.spec.backend, engine.spec.device, engine.spec.tiles) == ("ncnn", "cpu", ())
        assert np.array_equal(urt.predict(engine, sample_images[0]), masks[0])
    with pytest.raises(ParityError, match=r"equal up to rounding.*--equal rounding"):
        urt.build(shipped_model(), out=tmp_path / "b.urt", backend="ncnn", equal="bits", **options)
    assert not (tmp_path / "b.urt").exists()
