"""Predictions: tiled equals whole bit for bit on every backend, whatever the image, its storage and what is asked for."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from flat_image import open_image
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import unet_rt as urt
from unet_rt import backends
from unet_rt.baseline.model import open_model
from unet_rt.baseline.tiles import untiled_spec
from unet_rt.cli.demo import shipped_model
from unet_rt.cli.texts import run_text
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.drawing.microscopy import microscopy
from unet_rt.engine.engine import Engine
from unet_rt.errors import PixelRangeWarning
from unet_rt.images.normalize import affine, normalize_pixels
from unet_rt.outputs.pictures import COLOURS
from unet_rt.prediction.report import RunReport
from unet_rt.prediction.run import run
from unet_rt.prediction.work import Computation, Work
from unet_rt.tiling.decision import Decision
from unet_rt.tiling.grid import square_tile

Array = np.ndarray[Any, np.dtype[Any]]
BACKENDS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("onnxruntime", "openvino")]
NONE = Normalization("none")
LOGITS = Contract(task="multiclass", output_is="logits", normalization=NONE)


@pytest.fixture(scope="session")
def engine_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    """Engines by ONNX file, backend and contract, each loaded once; nothing is measured, so that it is quick."""
    folder = tmp_path_factory.mktemp("graphs")

    @cache
    def load(path: Path, backend: str = "onnxruntime", contract: Contract | None = None, threads: int = 1) -> Engine:
        work = folder / f"{path.stem}-{backend}-{threads}-{len(list(folder.iterdir()))}"
        work.mkdir()
        model = open_model(path, work, options=contract)
        spec = untiled_spec(model)
        tile = square_tile(spec.sizes, spec.outputs, 256**2 if spec.spatial == 2 else 24**3)
        spec = replace(spec, backend=backend, tile=tile)
        graph = work / "built.onnx"
        backends.get(backend).build(model.graph, graph, precision="fp32", device="cpu")
        return Engine(spec, backends.get(backend).load(graph, precision="fp32", device="cpu", threads=threads))

    return load


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """ONNX files of generated networks, by their parameters."""
    pytest.importorskip("torch")
    import networks

    folder = tmp_path_factory.mktemp("networks")

    @cache
    def make(**parameters: Any) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.onnx"
        spec = networks.UNetSpec(**parameters)
        side = 32 if spec.dims == 2 else 16
        networks.export(networks.build(spec), [(1, spec.inputs, *(side,) * spec.dims)], path, free_batch=True)
        return path

    return make


@pytest.fixture(scope="session")
def nuclei(engine_for) -> Engine:
    """The trained network that ships with the package, in ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    return engine_for(shipped_model())


@pytest.fixture(scope="session")
def image() -> Array:
    """A drawn micrograph, uint16, of odd sizes: several tiles of 120 px."""
    return microscopy((203, 171), seed=77).image


def session_run(engine: Engine, pixels: Array) -> Array:
    """The eager equivalent: ``pixels`` (C, *spatial), normalised, mirrored to an accepted size; run; cropped."""
    spec = engine.spec
    spatial = pixels.shape[1:]
    pads = [(0, 0)]
    for k, n in enumerate(spatial):
        before = max(0, spec.outputs[0].field[k].shrink[0])
        size = spec.canvas_shape(spatial)[k]
        pads.append((before, size - n - before))
    padded = np.pad(pixels, pads, mode="reflect" if min(spatial) > 1 else "edge")
    (out, *_) = engine.run(padded[None])
    return out[0][(slice(None), *(slice(0, n) for n in spatial))]


def percentile(pixels: Array, over: Array | None = None) -> Array:
    """What the shipped network's contract declares, in plain NumPy."""
    low, high = np.percentile(pixels if over is None else over, (1.0, 99.8))
    return (pixels.astype(np.float32) - np.float32(low)) / np.float32(high - low + 1e-6)


# --- tiled equals whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@settings(
    deadline=None,
    max_examples=6,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # no shrinking: every shape is compiled anew
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.integers(2, 260), st.integers(2, 260), st.integers(15, 26), st.integers(15, 26), st.integers(1, 3))
def test_tiled_equals_whole_bit_for_bit(engine_for, backend, height, width, a, b, batch):
    engine = engine_for(shipped_model(), backend)
    image = microscopy((260, 260), seed=3).image[:height, :width]
    whole = session_run(engine, percentile(image)[None])
    tiled = urt.predict(engine, image, tile=(a * 8, b * 8), batch=batch, output="raw")
    np.testing.assert_array_equal(tiled, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seams_are_where_tiles_are(engine_for, backend, image):
    """The same comparison fails with a halo one sample too small: equality is not for want of seams."""
    engine = engine_for(shipped_model(), backend)
    whole = session_run(engine, percentile(image)[None])
    less = Engine(
        replace(engine.spec, halo="given", halo_limit=engine.spec.outputs[0].field[0].halo[0] - 1), engine._session
    )
    tiled = urt.predict(less, image, tile=(160, 136), output="raw")
    assert 0 < np.abs(tiled - whole).max() < 0.1 * np.abs(whole).max()
    np.testing.assert_array_equal(urt.predict(engine, image, tile=(160, 136), output="raw"), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "parameters",
    [
        {"inputs": 3, "norm": "batch"},
        {"valid": True, "depth": 1},
        {"up": "bilinear", "down": "avg", "depth": 1, "residual": True},
        {"dims": 3, "depth": 1, "convs": 1},
    ],
    ids=lambda p: "-".join(map(str, p)),
)
def test_generated_networks(engine_for, network, backend, parameters):
    import networks

    engine = engine_for(network(**parameters), backend, LOGITS)
    dims = engine.spec.spatial
    shape = (67, 53) if dims == 2 else (19, 37, 26)
    image = networks.texture((1, parameters.get("inputs", 1), *shape), seed=5)[0]
    whole = session_run(engine, image)
    smallest = square_tile(engine.spec.sizes, engine.spec.outputs, 1)
    tile = tuple(t + 2 * s.stride for t, s in zip(smallest, engine.spec.sizes, strict=True))
    found: list[RunReport] = []
    tiled = urt.predict(engine, image, axes="C" + "ZYX"[-dims:], tile=tile, output="raw", report=found.append)
    assert found[0].tiles > 1
    np.testing.assert_array_equal(tiled, whole)


def test_two_inputs_three_scales(engine_for, tmp_path):
    """Channels are dealt to the inputs in order; each output is stitched at its own scale."""
    pytest.importorskip("torch")
    import networks

    path = tmp_path / "scales.onnx"
    networks.export(networks.initialise(networks.TwoScales()), [(1, 1, 32, 32), (1, 2, 32, 32)], path)
    engine = engine_for(path, "onnxruntime", Contract(task="regression", output_is="values", normalization=NONE))
    image = networks.texture((1, 3, 45, 38), seed=6)[0]
    whole = engine.run(np.pad(image, [(0, 0), (0, 1), (0, 0)], mode="reflect")[None])
    grid = engine.spec.grid((45, 38), tuple(s.at_least(20) for s in engine.spec.sizes))
    assert grid.count > 1
    for k, expected in enumerate(whole):
        shape = grid.out_shape(k)
        assert shape == [(45, 38), (23, 19), (90, 76)][k]
        result = np.full((expected.shape[1], *shape), np.nan, np.float32)

        def keep(work: Work, start: int, band: Array, result: Array = result) -> None:
            result[:, start : start + band.shape[1]] = band

        decision = Decision("copy", expected.shape[1], np.dtype(np.float32))
        with open_image(image, engine.spec.contract, axes="CYX", spatial=2, network_channels=3) as source:
            run(Computation(engine, source, decision, affine(NONE, source), output=k), [Work(0, grid)], keep)
        np.testing.assert_array_equal(result, expected[0][:, : shape[0], : shape[1]])


def test_channels_last(engine_for, tmp_path):
    pytest.importorskip("torch")
    import networks

    path = tmp_path / "last.onnx"
    net = networks.ChannelsLast(networks.build(networks.UNetSpec(inputs=3, classes=4, depth=1)))
    networks.export(net, [(1, 32, 32, 3)], path, spatial=(1, 2))
    engine = engine_for(path, "onnxruntime", LOGITS)
    image = np.ascontiguousarray(np.moveaxis(networks.texture((1, 3, 45, 38), seed=6)[0], 0, -1))
    result = urt.predict(engine, image, axes="YXC", tile=(32, 28), output="raw")
    np.testing.assert_array_equal(result, session_run(engine, np.moveaxis(image, -1, 0)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (8, 8)])
def test_images_smaller_than_the_smallest_tile(nuclei, image, shape):
    small = image[: shape[0], : shape[1]]
    result = urt.predict(nuclei, small, output="raw")
    assert result.shape == (2, *shape)
    pixels = percentile(small)
    canvas = nuclei.spec.canvas_shape(shape)
    rows, columns = (
        np.pad(np.arange(n), (0, c - n), mode="reflect" if n > 1 else "edge")
        for n, c in zip(shape, canvas, strict=True)
    )
    expected = nuclei.run(pixels[rows][:, columns][None, None])[0][0][:, : shape[0], : shape[1]]
    np.testing.assert_array_equal(result, expected)


# --- batches and threads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_and_threads_change_nothing(engine_for, backend, image):
    one = urt.predict(engine_for(shipped_model(), backend), image, tile=(160, 136), output="raw")
    two = engine_for(shipped_model(), backend, None, 2)
    assert two._session.threads == 2
    for batch, threads in [(1, 2), (2, 1), (5, 2)]:
        np.testing.assert_array_equal(
            urt.predict(two, image, tile=(160, 136), output="raw", batch=batch, threads=threads), one
        )


# --- storage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stack() -> Array:
    """(T, Z, Y, X) uint16, every plane another picture and of another brightness."""
    planes = [microscopy((90, 74), seed=k).image // (k + 1) for k in range(6)]
    return np.stack(planes).reshape(2, 3, 90, 74)


def test_planes_of_a_stack_share_statistics_where_that_is_asked_for(nuclei, stack):
    together = replace(nuclei.spec.contract.normalization, scope="channel")
    result = urt.predict(nuclei, stack, axes="TZYX", output="raw", normalization=together)
    assert result.shape == (2, 3, 2, 90, 74)
    for t, z in np.ndindex(2, 3):
        np.testing.assert_array_equal(result[t, z], session_run(nuclei, percentile(stack[t, z], over=stack)[None]))


def test_planes_of_their_own_statistics(engine_for, stack):
    """Scope ``slice``: a plane of a stack is predicted as if it were alone."""
    normalization = Normalization("percentile", scope="slice")
    engine = engine_for(shipped_model(), "onnxruntime", Contract(normalization=normalization))
    result = urt.predict(engine, stack, axes="TZYX")
    for t, z in np.ndindex(2, 3):
        np.testing.assert_array_equal(result[t, z], urt.predict(engine, stack[t, z]))
    assert (urt.predict(engine, stack[1, 2]) != urt.predict(engine, stack[0, 0])).any()


def test_a_stack_from_a_file_to_a_file(nuclei, stack, tmp_path):
    expected = urt.predict(nuclei, stack, axes="TZYX", mask_values=(0, 255))
    assert 0 < expected.mean() < 255
    ome = tmp_path / "stack.ome.tif"
    tifffile.imwrite(ome, stack, metadata={"axes": "TZYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25})
    imagej = tmp_path / "stack.tif"
    tifffile.imwrite(imagej, stack, imagej=True, metadata={"axes": "TZYX"})
    for path in (ome, imagej):
        for target in (
            tmp_path / f"{path.stem}-mask.ome.tif",
            tmp_path / f"{path.stem}-mask.tif",
            tmp_path / f"{path.stem}.npy",
        ):
            assert urt.predict(nuclei, path, out=target, mask_values=(0, 255)) == target
            written = np.load(target) if target.suffix == ".npy" else tifffile.imread(target)
            np.testing.assert_array_equal(written.reshape(expected.shape), expected)
    with tifffile.TiffFile(tmp_path / "stack.ome-mask.ome.tif") as file:
        assert file.series[0].axes == "TZYX"
        assert 'PhysicalSizeX="0.25"' in file.ome_metadata


def test_floating_point_pixels(nuclei, image):
    for dtype in (np.float32, np.float64, np.float16):
        pixels = (image / 65535).astype(dtype)
        result = urt.predict(nuclei, pixels, tile=(160, 136), output="raw")
        assert result.dtype == np.float32
        if dtype == np.float32:
            np.testing.assert_array_equal(result, session_run(nuclei, percentile(pixels)[None]))


def test_strides_and_byte_order_change_nothing(nuclei, image):
    expected = urt.predict(nuclei, image)
    padded = np.zeros((image.shape[0] * 2, image.shape[1] + 9), np.uint16)
    padded[::2, 4:-5] = image
    flipped = np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1]
    for same in (np.asfortranarray(image), padded[::2, 4:-5], flipped, image.astype(">u2"), image.astype(np.int32)):
        np.testing.assert_array_equal(urt.predict(nuclei, same), expected)


@pytest.mark.torch
def test_torch_tensors_come_in_by_dlpack(nuclei, image):
    import torch

    tensor = torch.from_numpy(image.astype(np.int32))
    expected = urt.predict(nuclei, image)
    found = urt.predict(nuclei, tensor)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(urt.predict(nuclei, tensor.T), urt.predict(nuclei, image.T))


def test_colours(engine_for, network, tmp_path):
    """A network of three channels: colours in their order, from an array or a PNG, and exchanged where that is asked."""
    scale = Contract(task="multiclass", output_is="logits", normalization=Normalization("scale", scale=255.0))
    engine = engine_for(network(inputs=3, norm="batch"), "onnxruntime", scale)
    picture = np.random.default_rng(0).integers(0, 256, (45, 51, 3), np.uint8)
    expected = session_run(engine, np.moveaxis(picture, -1, 0).astype(np.float32) / np.float32(255))
    path = tmp_path / "colours.png"
    Image.fromarray(picture).save(path)
    for image in (picture, path, np.moveaxis(picture, -1, 0)):
        np.testing.assert_array_equal(urt.predict(engine, image, output="raw"), expected)
    exchanged = urt.predict(engine, picture, channels=(2, 1, 0), output="raw")
    np.testing.assert_array_equal(exchanged, urt.predict(engine, picture[..., ::-1], output="raw"))
    assert (exchanged != expected).any()
    with pytest.raises(urt.ContractError):
        urt.predict(engine, picture[..., 0])


def test_a_volume(engine_for, network, tmp_path):
    import networks

    engine = engine_for(network(dims=3, depth=1, convs=1), "onnxruntime", LOGITS)
    volume = networks.texture((1, 1, 21, 30, 26), seed=2)[0, 0]
    expected = session_run(engine, volume[None]).argmax(axis=0)
    assert len(np.unique(expected)) == 2
    np.testing.assert_array_equal(urt.predict(engine, volume), expected)
    path = tmp_path / "volume.tif"
    tifffile.imwrite(path, volume, imagej=True, metadata={"axes": "ZYX"})
    urt.predict(engine, path, out=tmp_path / "mask.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "mask.tif"), expected)


# --- what is asked for --------------------------------------------------------------------------------------------


def softmax(raw: Array) -> Array:
    e = np.exp(raw.astype(np.float64) - raw.max(axis=0))
    return e / e.sum(axis=0)


def test_kinds_of_output(nuclei, image):
    raw = urt.predict(nuclei, image, output="raw")
    assert (raw.shape, raw.dtype) == ((2, *image.shape), np.float32)
    probability = urt.predict(nuclei, image, output="probability")
    assert (probability.shape, probability.dtype) == ((2, *image.shape), np.float32)
    np.testing.assert_allclose(probability, softmax(raw), rtol=16 * np.finfo(np.float32).eps, atol=1e-37)
    mask = urt.predict(nuclei, image)
    assert (mask.shape, mask.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(mask, raw.argmax(axis=0))
    assert 0.02 < mask.mean() < 0.9
    np.testing.assert_array_equal(urt.predict(nuclei, image, mask_values=(7, 200)), np.array([7, 200])[mask])
    with pytest.raises(urt.ContractError, match="mask-values"):
        urt.predict(nuclei, image, mask_values=(0, 1, 2))


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".png"])
def test_a_file_holds_what_the_array_holds(nuclei, image, tmp_path, suffix):
    target = tmp_path / f"mask{suffix}"
    assert urt.predict(nuclei, image, out=target, mask_values=(0, 255), tile=(160, 136)) == target
    read = {".npy": np.load, ".tif": tifffile.imread, ".png": lambda p: np.array(Image.open(p))}[suffix]
    np.testing.assert_array_equal(read(target), urt.predict(nuclei, image, mask_values=(0, 255)))
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def one_channel(network: Callable[..., Path], **more: Any) -> Path:
    return network(classes=1, depth=1, **more)


def test_binary_by_threshold(engine_for, network):
    import networks

    pixels = networks.texture((1, 1, 60, 44), seed=9)[0, 0]
    for threshold in (0.5, 0.8):
        contract = Contract(task="binary", output_is="logits", threshold=(threshold,), normalization=NONE)
        engine = engine_for(one_channel(network), "onnxruntime", contract)
        raw = urt.predict(engine, pixels, output="raw")
        mask = urt.predict(engine, pixels)
        assert mask.shape == pixels.shape
        sigmoid = 1 / (1 + np.exp(-raw[0].astype(np.float64)))
        near = np.abs(sigmoid - threshold) < 1e-6
        np.testing.assert_array_equal(mask[~near], (sigmoid > threshold)[~near])
        assert 0 < mask.mean() < 1
        np.testing.assert_allclose(urt.predict(engine, pixels, output="probability")[0], sigmoid, rtol=1e-6)
    ending = Contract(task="binary", output_is="probabilities", normalization=NONE)
    engine = engine_for(one_channel(network, final="sigmoid"), "onnxruntime", ending)
    probability = urt.predict(engine, pixels, output="probability")
    np.testing.assert_array_equal(probability, urt.predict(engine, pixels, output="raw"))
    np.testing.assert_array_equal(urt.predict(engine, pixels), probability[0] > 0.5)


def test_multilabel(engine_for, network):
    import networks

    pixels = networks.texture((1, 1, 60, 44), seed=9)[0, 0]
    contract = Contract(task="multilabel", output_is="logits", threshold=(0.5, 0.3, 0.5), normalization=NONE)
    engine = engine_for(network(classes=3, depth=1), "onnxruntime", contract)
    raw = urt.predict(engine, pixels, output="raw")
    limit = np.log(np.array([0.5, 0.3, 0.5]) / (1 - np.array([0.5, 0.3, 0.5]))).astype(np.float32)
    mask = urt.predict(engine, pixels, mask_values=(0, 9))
    assert (mask.shape, mask.dtype) == ((3, *pixels.shape), np.uint8)
    np.testing.assert_array_equal(mask, 9 * (raw > limit.reshape(3, 1, 1)))


def test_regression(engine_for, network):
    import networks

    pixels = networks.texture((1, 1, 60, 44), seed=9)[0, 0]
    contract = Contract(task="regression", output_is="values", normalization=NONE)
    engine = engine_for(one_channel(network), "onnxruntime", contract)
    result = urt.predict(engine, pixels)
    assert (result.shape, result.dtype) == ((1, *pixels.shape), np.float32)
    np.testing.assert_array_equal(result, session_run(engine, pixels[None]))
    for kind in ("mask", "probability"):
        with pytest.raises(urt.ContractError, match="regression has no"):
            urt.predict(engine, pixels, output=kind)


# --- normalisation ------------------------------------------------------------------------------------------------


def test_integer_pixels_need_a_normalisation(engine_for, network):
    engine = engine_for(network(depth=1), "onnxruntime", Contract(task="multiclass", output_is="logits"))
    pixels = np.random.default_rng(1).integers(12, 240, (40, 36), np.uint8)
    with pytest.raises(urt.ContractError, match=f"uint8 pixels from {pixels.min()} to {pixels.max()}"):
        urt.predict(engine, pixels)
    given = urt.predict(engine, pixels, normalization=Normalization("scale", scale=255.0), output="raw")
    floats = pixels.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(given, session_run(engine, floats[None]))
    np.testing.assert_array_equal(urt.predict(engine, floats, output="raw"), given)  # floats are taken as they are


def test_a_declared_normalisation_holds(nuclei, image):
    declared = nuclei.spec.contract.normalization
    expected = urt.predict(nuclei, image)
    np.testing.assert_array_equal(urt.predict(nuclei, image, normalization=declared), expected)
    with pytest.raises(urt.ContractError, match="built and proven with normalisation percentile"):
        urt.predict(nuclei, image, normalization=Normalization("zscore"))


# --- progress, report, overlay ------------------------------------------------------------------------------------


def test_progress_and_report(nuclei, stack):
    steps: list[tuple[int, int]] = []
    found: list[RunReport] = []
    planes = stack[0]
    mask = urt.predict(nuclei, planes, axes="ZYX", batch=2, progress=lambda *s: steps.append(s), report=found.append)
    (report,) = found
    assert steps[0] == (0, report.tiles)
    assert steps[-1] == (report.tiles, report.tiles)
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(steps))
    assert report.tiles == 3 * nuclei.spec.grid((90, 74)).count
    assert "ZYX 3x90x74 uint16" in report.reading
    assert "over 3 planes" in report.reading
    assert (report.backend, report.precision, report.device) == ("onnxruntime", "fp32", "cpu")
    assert report.mpx == pytest.approx(planes.size / 1e6)
    assert report.mpx_per_s == pytest.approx(report.mpx / report.seconds)
    assert set(report.stages) == {"read", "gather", "infer", "stitch", "write"}
    assert 0 < report.stages["infer"] <= report.seconds
    assert report.halo == ((53, 53), (53, 53))
    assert report.class_share == pytest.approx({"background": (mask == 0).mean(), "nucleus": (mask == 1).mean()})
    assert report.outside_range is None
    assert report.peak_rss_bytes > 1e7
    assert report.to_json()["mpx_per_s"] == report.mpx_per_s


def test_a_single_tile_is_predicted_in_the_caller_s_thread(nuclei, image, monkeypatch, tmp_path):
    """What it is worth to a program that predicts one small picture after the other; a block of one tile is no other."""
    cut, steps, found = image[:96, :80], list[tuple[int, int]](), list[RunReport]()
    expected, shares = urt.predict(nuclei, cut, report=found.append), found[0].class_share
    np.save(tmp_path / "region.npy", np.ones(cut.shape, np.uint8))
    monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread is started"))
    for options in ({}, {"out": tmp_path / "mask.npy"}, {"region": tmp_path / "region.npy"}):
        given = urt.predict(nuclei, cut, progress=lambda *s: steps.append(s), report=found.append, **options)
        np.testing.assert_array_equal(given if "out" not in options else np.load(given), expected)
        assert (found[-1].tiles, found[-1].class_share) == (1, shares)
    assert steps == [(0, 1), (1, 1)] * 3


@pytest.mark.parametrize("tile", [(160, 136), (208, 176)])
def test_pixels_outside_the_range_are_counted_once(nuclei, image, tile):
    """As the network gets them: a camera of twice the gain changes grey levels, and nothing that the network sees."""
    with open_image(image, nuclei.spec.contract) as source:
        numbers = affine(nuclei.spec.contract.normalization, source).plane(0)
    x = normalize_pixels(image[None], numbers)
    low, high = (float(v) for v in np.percentile(x, (5, 90)))
    engine = Engine(replace(nuclei.spec, options={"input_range": [[low, high]]}), nuclei._session)
    found: list[RunReport] = []
    for picture in (image, 2 * image.astype(np.uint32)):
        urt.predict(engine, picture, tile=tile, report=found.append)
    outside = np.count_nonzero((x < low) | (x > high)) / x.size
    assert 0.05 < outside < 0.2
    assert found[0].outside_range == pytest.approx(outside, abs=2 / x.size)
    assert found[1].outside_range == pytest.approx(outside, abs=2 / x.size)
    assert found[0].range_warning == ""


@pytest.mark.onnxruntime
def test_many_pixels_outside_the_range_are_a_warning(nuclei, image, tmp_path):
    """Also where nobody asks for a report; the text for people begins with it."""
    with open_image(image, nuclei.spec.contract) as source:
        x = normalize_pixels(image[None], affine(nuclei.spec.contract.normalization, source).plane(0))
    low, high = (float(v) for v in np.percentile(x, (15, 90)))
    engine = Engine(replace(nuclei.spec, options={"input_range": [[low, high]]}), nuclei._session)
    for out in (None, tmp_path / "mask.tif", tmp_path / "mask.zarr"):
        with pytest.warns(
            PixelRangeWarning, match=r"array: 2[345]% of pixels, normalised, lie outside the range seen at build"
        ):
            urt.predict(engine, image, out=out)
    found: list[RunReport] = []
    with pytest.warns(PixelRangeWarning):
        urt.predict(engine, image[:96, :80], report=found.append)
    assert run_text(found[0]).startswith("WARNING: array: ")


@pytest.mark.onnxruntime
def test_fractions_for_a_network_of_grey_levels_are_refused(engine_for, image, tmp_path):
    scaled = Contract(normalization=Normalization("scale", scale=4095), value_range=(60.0, 4000.0))
    engine = engine_for(shipped_model(), "onnxruntime", scaled)
    out = tmp_path / "mask.zarr"
    with pytest.raises(urt.ContractError, match="were divided by 65535, as ToTensor does; multiply them by 65535"):
        urt.predict(engine, (image / 65535).astype(np.float32), out=out)
    assert list(tmp_path.iterdir()) == []


def test_an_overlay_shows_the_mask_on_the_image(nuclei, image, tmp_path):
    overlay = tmp_path / "overlay.png"
    mask = urt.predict(nuclei, image, overlay=overlay, tile=(160, 136), mask_values=(0, 255)) > 0
    picture = np.array(Image.open(overlay))
    assert picture.shape == (*image.shape, 3)
    edge = np.zeros_like(mask)
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    grey = (picture[..., 0] == picture[..., 1]) & (picture[..., 1] == picture[..., 2])
    assert grey[~mask & ~edge].all(), "background stays as it is"
    assert (picture[edge] == COLOURS[1]).all(), "outlines have the label's colour"
    low, high = np.percentile(np.repeat(image[None], 3, axis=0).astype(np.float32), (0.5, 99.5))
    expected = np.clip((image - np.float32(low)) * np.float32(255.0 / (high - low)), 0, 255)
    assert (
        np.abs(picture[..., 0].astype(float) - expected)[~mask & ~edge].max() < 1 + 1e-3
    )  # rounded down, from a float32 quotient
    tinted = 0.75 * expected[..., None] + 0.25 * COLOURS[1]
    assert np.abs(picture - tinted)[mask & ~edge].max() <= 2
    with pytest.raises(urt.ContractError, match="overlay shows a mask"):
        urt.predict(nuclei, image, overlay=tmp_path / "b.png", output="raw")
    assert not (tmp_path / "b.png").exists()


# --- refusals, and what they leave behind -------------------------------------------------------------------------


def stored(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers(engine_for, network, tmp_path, value):
    engine = engine_for(network(depth=1), "onnxruntime", LOGITS)
    pixels = np.zeros((60, 44), np.float32)
    pixels[50, 3] = value
    with pytest.raises(urt.ImageError, match="NaN or infinite pixels"):
        urt.predict(engine, pixels, out=tmp_path / "mask.tif", tile=(28, 28))
    assert stored(tmp_path) == []


class Failing:
    """A session that gives way at a given run."""

    precision, device, version, threads = "fp32", "cpu", "none 0", 1

    def __init__(self, engine: Engine, at: int, error: BaseException):
        self.engine, self.left, self.error = engine, at, error

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.engine._session.run(inputs)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("suffix", [".tif", ".npy", ".png"])
@pytest.mark.parametrize(
    "error", [urt.BackendError("out of memory"), KeyboardInterrupt(), SystemExit(143)], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("at", [0, 2])
def test_a_failure_in_the_middle_leaves_nothing_behind(nuclei, image, tmp_path, suffix, error, at):
    failing = Engine(nuclei.spec, Failing(nuclei, at, error))
    before = threading.active_count()
    overlay = tmp_path / "overlay.png"
    with pytest.raises(type(error)):
        urt.predict(failing, image, out=tmp_path / f"mask{suffix}", overlay=overlay, tile=(160, 136))
    assert stored(tmp_path) == []
    assert threading.active_count() == before


def test_a_failure_keeps_the_old_output(nuclei, image, tmp_path):
    target = tmp_path / "mask.npy"
    urt.predict(nuclei, image, out=target)
    old = target.read_bytes()
    with pytest.raises(urt.OutputError, match="exists already"):
        urt.predict(nuclei, image[::-1], out=target)
    with pytest.raises(urt.BackendError):
        urt.predict(
            Engine(nuclei.spec, Failing(nuclei, 1, urt.BackendError("x"))),
            image,
            out=target,
            overwrite=True,
            tile=(160, 136),
        )
    assert target.read_bytes() == old
    urt.predict(nuclei, image[::-1], out=target, overwrite=True)
    assert target.read_bytes() != old
    assert stored(tmp_path) == ["mask.npy"]


@pytest.mark.parametrize("where", ["reading", "writing", "progress"])
def test_a_failure_in_another_stage_reaches_the_caller(nuclei, image, tmp_path, monkeypatch, where):
    from unet_rt.images.source import Source
    from unet_rt.outputs import tiff as output

    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) >= 2:
            raise OSError(28, "No space left on device")

    options: dict[str, Any] = {}
    if where == "reading":
        real_read = Source.read

        def read(self: Source, *args: Any) -> Array:
            fail()
            return real_read(self, *args)

        def affine_then_fail(*args: Any) -> Any:
            numbers = affine(*args)  # the statistics may read the image; the tiles may not
            monkeypatch.setattr(Source, "read", read)
            return numbers

        monkeypatch.setattr("unet_rt.prediction.plan.affine", affine_then_fail)
    elif where == "writing":
        monkeypatch.setattr(output.PackedTiffWriter, "write", fail)
    else:
        options["progress"] = fail
    before = threading.active_count()
    with pytest.raises((OSError, urt.OutputError), match="No space left"):
        urt.predict(nuclei, image, out=tmp_path / "mask.tif", tile=(160, 136), **options)
    assert len(calls) >= 2
    assert stored(tmp_path) == []
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("pixels", "options", "error"),
    [
        (np.zeros((0, 40), np.uint8), {}, urt.ImageError),
        (np.zeros((40, 0), np.uint8), {}, urt.ImageError),
        (np.zeros((4, 40, 40), np.uint8), {"axes": "CYX"}, urt.ContractError),
        (np.zeros((40, 40), complex), {}, urt.ImageError),
        (np.zeros((40, 40), np.uint8), {"tile": (100, 120)}, urt.TileError),
        (np.zeros((400, 400), np.uint8), {"tile": (64, 64)}, urt.TileError),
        (np.zeros((40, 40), np.uint8), {"tile": (64, 64, 64)}, urt.TileError),
        (np.zeros((40, 40), np.uint8), {"batch": 0}, urt.ContractError),
        (Path("nowhere.tif"), {}, urt.ImageError),
        ("a folder", {}, urt.ImageError),
    ],
)
def test_refusals(nuclei, pixels, options, error, tmp_path):
    pixels = tmp_path if isinstance(pixels, str) else pixels
    (tmp_path / "out").mkdir()
    with pytest.raises(error):
        urt.predict(nuclei, pixels, out=tmp_path / "out" / "mask.npy", **options)
    assert stored(tmp_path / "out") == []


def test_an_image_is_never_replaced_by_its_mask(engine_folder, tmp_path, sample_images):
    path = tmp_path / "a.npy"
    np.save(path, sample_images[0])
    before = path.read_bytes()
    with urt.load(engine_folder) as engine, pytest.raises(urt.OutputError, match="is the image itself"):
        urt.predict(engine, path, out=path, overwrite=True)
    assert path.read_bytes() == before


def test_larger_batches_than_parity_was_judged_with_are_said(engine_folder, sample_images):
    reports = []
    with urt.load(engine_folder) as engine:
        masks = [urt.predict(engine, sample_images[1], batch=n, report=reports.append) for n in (1, 2, 3)]
        assert engine.folder.parity["batch"] == [1, 2]
    assert [report.notes for report in reports] == [[], [], [reports[2].notes[0]]]
    assert "3 tiles per run, and parity was judged with up to 2" in reports[2].notes[0]
    np.testing.assert_array_equal(masks[0], masks[2])


@pytest.mark.onnxruntime
@pytest.mark.parametrize("scope", [None, "image"])
def test_a_plane_of_a_stack_is_predicted_as_it_is_alone(
    scope: Any, engine_for: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the scope is left open, or ``image``; the report says over what statistics were taken, an option changes it."""
    first = microscopy((120, 140), seed=4).image
    stack = np.stack([first, np.minimum(first * 3 + 200, 65535).astype(first.dtype)])
    engine = engine_for(shipped_model(), contract=Contract(normalization=Normalization("zscore", scope=scope)))
    contract = engine.spec.contract
    notes: list[str] = []
    found = urt.predict(engine, stack, output="probability", report=lambda r: notes.extend(r.notes))
    for plane, each in enumerate(stack):
        np.testing.assert_array_equal(found[plane], urt.predict(engine, each, output="probability"))
    means, deviations = ([f"{f(each):.4g}" for each in stack] for f in (np.mean, np.std))
    numbers = f"mean {' to '.join(means)}, deviation {' to '.join(deviations)}"
    assert f"normalisation zscore: statistics of each of 2 planes by itself: {numbers}" in notes
    pooled = Normalization("zscore", scope="channel")
    together = urt.predict(
        engine, stack, output="probability", normalization=pooled, report=lambda r: notes.extend(r.notes)
    )
    assert np.abs(together - found).max() > 1e-3
    numbers = f"mean {stack.mean():.4g}, deviation {stack.std():.4g}"
    assert f"normalisation zscore: statistics of all of 2 planes together: {numbers}" in notes
    with pytest.raises(urt.ContractError, match="built and proven with normalisation zscore"):
        urt.predict(engine, stack, normalization=Normalization("minmax"))
    declared = replace(contract, normalization=pooled)
    monkeypatch.setattr(engine, "spec", replace(engine.spec, contract=declared))
    with pytest.raises(urt.ContractError, match="scope channel; build it again"):
        urt.predict(engine, stack, normalization=Normalization("zscore", scope="slice"))
