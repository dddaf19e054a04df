"""The input contract: its words, its files, and what is decided where it is silent."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flat_image import open_image
from hypothesis import given
from hypothesis import strategies as st

from unet_rt.contract.bioimageio import contract_from_rdf
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.contract.json import contract_from_file, contract_from_json
from unet_rt.contract.metadata import contract_from_metadata, contract_to_metadata
from unet_rt.contract.task import resolve_task
from unet_rt.contract.words import format_normalization, parse_normalization
from unet_rt.errors import ContractError
from unet_rt.images.normalize import affine, missing_normalization, normalize_pixels

IMAGENET = Normalization("fixed", scale=255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


# The words of the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Normalization("none")),
        ("scale=255", Normalization("scale", scale=255)),
        ("dtype", Normalization("dtype")),
        ("minmax", Normalization("minmax")),
        ("percentile", Normalization("percentile", percentiles=(1, 99.8))),
        ("percentile=2,98", Normalization("percentile", percentiles=(2, 98))),
        ("zscore;eps=1e-3", Normalization("zscore", eps=1e-3)),
        ("imagenet", IMAGENET),
        ("mean=1;std=2;scale=9;clip=0,4", Normalization("fixed", scale=9, mean=(1,), std=(2,), clip=(0, 4))),
        ("mean=1,2,3", Normalization("fixed", mean=(1, 2, 3))),
        (" minmax ; clip = 100, 900 ", Normalization("minmax", clip=(100, 900))),
        ("percentile=1,99.8;clip_after=0,1", Normalization("percentile", clip_after=(0, 1))),
    ],
)  # fmt: skip
def test_normalisation_words(text: str, expected: Normalization) -> None:
    assert parse_normalization(text) == expected
    assert parse_normalization(format_normalization(expected)) == expected
    assert parse_normalization(text, "slice").scope == "slice"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is unknown; choose none"),
        ("percentle=1,99", "meant 'percentile'"),
        ("zscore;minmax", "names zscore and minmax"),
        ("zscore;scale=255", "names zscore and scale"),
        ("clip=0,1", "names no method"),
        ("zscore=3", "takes no number"),
        ("scale=255;scale=1", "gives scale twice"),
        ("scale=255;SCALE=1", "gives scale twice"),
        ("scale=abc", "is not a number"),
        ("scale=1,2", "one number, not 2"),
        ("scale=0", "must be above 0"),
        ("scale=nan", "must be finite"),
        ("percentile=5", "two numbers"),
        ("percentile=99,1", "must rise within 0 to 100"),
        ("percentile=0.01,0.99", "look like fractions"),
        ("mean=1;std=0", "std 0 must not be 0"),
        ("mean=1,2;std=1,2,3", "mean has 2 numbers and std 3"),
        ("minmax;clip=9,1", "clip 9,1 must rise"),
        ("minmax;clip_after=1,0", "clip_after 1,0 must rise"),
    ],
)
def test_wrong_words_say_what_is_right(text: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        parse_normalization(text)


def test_a_wrong_scope_is_refused() -> None:
    with pytest.raises(ContractError, match="scope 'tile' is unknown; choose image, channel, slice"):
        parse_normalization("zscore", "tile")


# JSON and metadata -------------------------------------------------------------------------------------------------

NUMBERS = st.floats(0.001, 1e6)
CONTRACTS = st.builds(
    Contract,
    axes=st.sampled_from([None, "NCYX", "NYXC", "NCZYX"]),
    channels=st.lists(st.text("abcµ ", min_size=1), max_size=3).map(tuple),
    value_range=st.none() | st.tuples(NUMBERS, NUMBERS),
    normalization=st.none()
    | st.builds(
        Normalization,
        st.sampled_from(["none", "scale", "dtype", "minmax", "percentile", "zscore", "fixed"]),
        scope=st.sampled_from(["image", "channel", "slice", None]),
        scale=NUMBERS,
        percentiles=st.tuples(st.floats(0, 40), st.floats(60, 100)),
        mean=st.lists(NUMBERS, min_size=3, max_size=3).map(tuple),
        std=st.lists(NUMBERS, min_size=3, max_size=3).map(tuple),
        clip=st.none() | st.tuples(st.floats(-9, 0), NUMBERS),
        clip_after=st.none() | st.tuples(st.floats(-9, 0), NUMBERS),
    ),
    task=st.sampled_from([None, "binary", "multiclass", "multilabel", "regression"]),
    output_is=st.sampled_from([None, "logits", "probabilities", "values"]),
    classes=st.lists(st.text("xyz"), max_size=3).map(tuple),
    threshold=st.lists(st.floats(0, 1), max_size=3).map(tuple),
    pixel_size_um=st.lists(NUMBERS, max_size=3).map(tuple),
    trained_tile=st.lists(st.integers(1, 4096), max_size=3).map(tuple),
    border=st.sampled_from(["mirror", "edge", "constant", "zero"]),
)


@given(CONTRACTS)
def test_contracts_survive_json_and_metadata(contract: Contract) -> None:
    assert contract_from_json(json.loads(json.dumps(contract.to_json()))) == contract
    assert contract_from_metadata(contract_to_metadata(contract)) == contract


def test_a_file_in_the_words_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"axes": "ncyx", "normalization": "percentile=1,99.8", "threshold": 0.4}')
    expected = Contract(axes="NCYX", normalization=Normalization("percentile"), threshold=(0.4,))
    assert contract_from_file(tmp_path / "c.json") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"normalisation": "none"}', r"unknown key 'normalisation' \(meant 'normalization'\?\)"),
        ('{"normalization": {"method": "zscor"}}', "meant 'zscore'"),
        ('{"normalization": {"method": "zscore", "esp": 1}}', "unknown key 'esp'"),
        ('{"normalization": {"scope": "image"}}', "has no method"),
        ('{"normalization": 3}', "must be an object"),
        ('{"task": "segmentation"}', "task 'segmentation' is unknown"),
        ('{"axes": "NCYY"}', "must be different letters"),
        ('{"threshold": [1.5]}', "must lie in 0 to 1"),
        ('{"trained_tile": [0.5]}', "must be whole pixels"),
        ('{"value_range": [1]}', "must have 2 numbers"),
        ('{"channels": "DAPI"}', "must be a list of names"),
        ('{"pixel_size_um": [-1]}', "must be above 0"),
        ('{"threshold": ["a"]}', "list of finite numbers"),
        ("[1]", "holds a list"),
        ("{", "not JSON"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ContractError, match=message) as caught:
        contract_from_file(tmp_path / "c.json")
    assert "c.json" in str(caught.value)
    with pytest.raises(ContractError, match="cannot be read"):
        contract_from_file(tmp_path / "missing.json")


def test_single_metadata_keys_win_over_the_whole() -> None:
    metadata = contract_to_metadata(Contract(task="binary", normalization=Normalization("minmax"), threshold=(0.3,)))
    metadata |= {
        "unet_rt.normalize": "mean=0.5;std=0.5;scale=255",
        "unet_rt.channels": "DAPI, GFP",
        "unet_rt.trained_tile": "512,256",
        "unet_rt.threshold": "0.7",
        "producer": "somebody else",
    }
    assert contract_from_metadata(metadata) == Contract(
        task="binary",
        normalization=Normalization("fixed", scale=255, mean=(0.5,), std=(0.5,)),
        channels=("DAPI", "GFP"),
        trained_tile=(512, 256),
        threshold=(0.7,),
    )
    scoped = contract_from_metadata({"unet_rt.normalize": "zscore", "unet_rt.normalize_scope": "slice"})
    assert scoped.normalization == Normalization("zscore", scope="slice")
    with pytest.raises(ContractError, match="unknown key 'normalise'"):
        contract_from_metadata({"unet_rt.normalise": "zscore"})
    assert contract_from_metadata({"author": "x"}) == Contract()


@pytest.mark.parametrize(
    ("pixel_range", "zero", "top"),
    [("NominalRange_0_255", 0, 255), ("normalized_0_1", 0, 1), ("Normalized_1_1", -1, 1)],
)
def test_onnx_image_keys(pixel_range: str, zero: float, top: float) -> None:
    contract = contract_from_metadata({"Image.NominalPixelRange": pixel_range, "Image.BitmapPixelFormat": "Bgr8"})
    assert contract.channels == ("blue", "green", "red")
    assert contract.normalization is not None
    pixels = np.array([[[0, 255]]], np.uint8)
    with open_image(pixels, Contract(), network_channels=1, axes="CYX") as source:
        values = normalize_pixels(pixels, affine(contract.normalization, source).plane(0))
    assert values.ravel().tolist() == [zero, top]
    with pytest.raises(ContractError, match="not supported"):
        contract_from_metadata({"Image.NominalPixelRange": "NominalRange_16_235"})
    with pytest.raises(ContractError, match="not supported"):
        contract_from_metadata({"Image.BitmapPixelFormat": "Rgba8"})


def test_integer_pixels_without_normalisation_are_refused_with_their_range() -> None:
    pixels = np.arange(200, 1400, dtype=np.uint16).reshape(30, 40)
    with open_image(pixels, Contract(), name="cells.tif") as source:
        text = str(missing_normalization(source))
    assert "cells.tif holds uint16 pixels from 200 to 1399" in text
    assert all(
        choice in text for choice in ("--normalize", "none", "scale=255", "percentile=1,99.8", "zscore", "imagenet")
    )


# bioimage.io -------------------------------------------------------------------------------------------------------

AXES_05 = [
    {"type": "batch"},
    {"type": "channel", "channel_names": ["nuclei"]},
    {"type": "space", "id": "y", "size": {"min": 64, "step": 16}, "scale": 0.5, "unit": "micrometer"},
    {"type": "space", "id": "x", "size": {"min": 64, "step": 16}, "scale": 650, "unit": "nanometer"},
]


def rdf_04(
    pre: list[Any], post: list[Any] | None = None, axes: str = "bcyx", shape: Any = (1, 3, 256, 512)
) -> dict[str, Any]:
    return {
        "format_version": "0.4.10",
        "inputs": [{"name": "raw", "axes": axes, "shape": shape, "preprocessing": pre}],
        "outputs": [{"name": "out", "axes": axes, "shape": shape, "postprocessing": post or []}],
        "weights": {"onnx": {"source": "weights.onnx"}},
    }


def rdf_05(
    pre: list[Any], post: list[Any] | None = None, axes: Any = AXES_05, names: Any = ("mask",)
) -> dict[str, Any]:
    out = [{"type": "batch"}, {"type": "channel", "channel_names": list(names)}]
    return {
        "format_version": "0.5.3",
        "inputs": [{"id": "raw", "axes": axes, "preprocessing": pre}],
        "outputs": [{"id": "out", "axes": out, "postprocessing": post or []}],
        "weights": {"onnx": {"source": "weights.onnx"}},
    }


def package(folder: Path, description: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "weights.onnx").write_bytes(b"weights")
    (folder / "rdf.yaml").write_text(yaml.safe_dump(description))
    return folder / "rdf.yaml"


def reference(step: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """What a bioimage.io consumer computes for a (C, Y, X) sample, step by step."""
    what, kwargs = step.get("id") or step["name"], step.get("kwargs", {})
    column = (-1, 1, 1)

    def of(key: str, default: float) -> np.ndarray:
        return np.asarray(kwargs.get(key, default), np.float64).reshape(column)

    if what == "scale_linear":
        return x * of("gain", 1) + of("offset", 0)
    if what == "fixed_zero_mean_unit_variance" or kwargs.get("mode") == "fixed":
        return (x - of("mean", 0)) / of("std", 1)
    if what == "clip":
        return x.clip(kwargs["min"], kwargs["max"])
    if what == "ensure_dtype":
        return x
    axes = kwargs.get("axes")
    over = None if axes is None or "channel" in axes or "c" in axes else (1, 2)
    if what == "zero_mean_unit_variance":
        return (x - x.mean(over, keepdims=True)) / (x.std(over, keepdims=True) + kwargs.get("eps", 1e-6))
    low, high = (kwargs.get(f"{end}_percentile", default) for end, default in (("min", 0), ("max", 100)))
    a, b = np.percentile(x, low, over, keepdims=True), np.percentile(x, high, over, keepdims=True)
    return (x - a) / (b - a + kwargs.get("eps", 1e-6))


def step(what: str, **kwargs: Any) -> dict[str, Any]:
    return {"id": what, "kwargs": kwargs} if kwargs else {"id": what}


XY = ["y", "x"]
THREE = [AXES_05[0], {"type": "channel", "channel_names": ["r", "g", "b"]}, *AXES_05[2:]]


CLIPPED = [step("scale_range", axes=XY), step("clip", min=0, max=1)]
RANGE = [step("scale_range", axes=["channel", *XY], min_percentile=5, max_percentile=90)]
MEANS = step("fixed_zero_mean_unit_variance", axis="channel", mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.1])


@pytest.mark.parametrize(
    ("steps", "method"),
    [
        ([], "none"),
        ([step("ensure_dtype", dtype="float32")], "none"),
        ([step("scale_linear", gain=1 / 255)], "scale"),
        ([step("scale_linear", gain=2, offset=-7)], "fixed"),
        ([step("scale_linear", axis="channel", gain=[1, 2, 3], offset=[4, 5, 6])], "fixed"),
        ([step("scale_linear", gain=1 / 255), MEANS], "fixed"),
        ([step("fixed_zero_mean_unit_variance", mean=103.5, std=13.7)], "fixed"),
        ([step("zero_mean_unit_variance")], "zscore"),
        ([step("zero_mean_unit_variance", axes=["channel", "y", "x"])], "zscore"),
        ([step("zero_mean_unit_variance", axes=XY, eps=0.01)], "zscore"),
        ([step("scale_range", axes=XY)], "minmax"),
        ([step("scale_range", axes=XY, min_percentile=1, max_percentile=99.8)], "percentile"),
        ([step("clip", min=20, max=180), step("scale_range", axes=XY, min_percentile=1)], "percentile"),
        ([step("scale_linear", gain=1 / 255), step("zero_mean_unit_variance", axes=XY, eps=0.05)], "zscore"),
        ([*RANGE, step("clip", min=0, max=1)], "percentile"),
        ([step("clip", min=20, max=90), *RANGE, step("clip", min=0.1, max=0.8)], "percentile"),
        ([step("scale_linear", gain=-2, offset=100), step("clip", min=-50, max=60)], "fixed"),
    ],
)  # fmt: skip
def test_preprocessing_is_what_a_consumer_computes(tmp_path: Path, steps: list[Any], method: str) -> None:
    contract, weights = contract_from_rdf(package(tmp_path / "p", rdf_05(steps, axes=THREE)))
    assert weights.read_bytes() == b"weights"
    assert contract.normalization is not None
    assert contract.normalization.method == method
    pixels = np.random.default_rng(3).gamma(2, 30, (3, 50, 60)).clip(0, 255).astype(np.uint8)
    expected = pixels.astype(np.float64)
    for one in steps:
        expected = reference(one, expected)
    with open_image(pixels, contract, axes="CYX") as source:
        found = normalize_pixels(pixels, affine(contract.normalization, source).plane(0))
    # offset and divisor are rounded to float32, and so is each of two operations: 4 half units of the largest term.
    numbers = affine(contract.normalization, open_image(pixels, contract, axes="CYX")).plane(0)
    largest = (255 + np.abs(numbers.offset).max()) / np.abs(numbers.divisor).min()
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 6e-8 * largest)


def test_a_clip_of_scaled_values_is_one_of_grey_levels_for_all_channels() -> None:
    pixels = np.random.default_rng(3).gamma(2, 30, (2, 50, 60)).clip(0, 255).astype(np.uint8)
    how = Normalization("percentile", percentiles=(5, 90), clip_after=(0, 1))
    with open_image(pixels[:1], Contract(), axes="CYX") as source:
        numbers = affine(how, source).plane(0)
        assert numbers.clip == pytest.approx(np.percentile(pixels[0], (5, 90)), abs=2e-6)
    with (
        open_image(pixels, Contract(), axes="CYX", network_channels=2) as source,
        pytest.raises(ContractError, match="other grey levels in each of 2 channels"),
    ):
        affine(how, source)


def test_version_0_4(tmp_path: Path) -> None:
    pre = [
        {
            "name": "zero_mean_unit_variance",
            "kwargs": {"mode": "fixed", "axes": "xy", "mean": [1, 2, 3], "std": [4, 5, 6]},
        }
    ]
    contract, _ = contract_from_rdf(package(tmp_path / "p", rdf_04(pre)))
    assert contract == Contract(
        axes="NCYX", trained_tile=(256, 512), normalization=Normalization("fixed", mean=(1, 2, 3), std=(4, 5, 6))
    )
    pre = [
        {
            "name": "scale_range",
            "kwargs": {"mode": "per_sample", "axes": "xy", "min_percentile": 1.0, "max_percentile": 99.8},
        }
    ]
    free = {"min": [1, 1, 64, 64], "step": [0, 0, 16, 16]}
    contract, _ = contract_from_rdf(package(tmp_path / "p", rdf_04(pre, [{"name": "sigmoid"}], shape=free)))
    assert contract == Contract(
        axes="NCYX", normalization=Normalization("percentile", scope="slice"), task="binary", output_is="logits"
    )


def test_version_0_5_axes_and_output(tmp_path: Path) -> None:
    description = rdf_05([], [step("sigmoid"), step("binarize", threshold=0.3)])
    contract, _ = contract_from_rdf(package(tmp_path / "p", description))
    assert contract.axes == "NCYX"
    assert contract.channels == ("nuclei",)
    assert contract.pixel_size_um == pytest.approx((0.5, 0.65))
    assert (contract.task, contract.output_is, contract.threshold) == ("binary", "logits", (0.3,))
    description = rdf_05([], [step("softmax")], names=("background", "border", "cell"))
    contract, _ = contract_from_rdf(package(tmp_path / "p", description))
    assert (contract.task, contract.classes) == ("multiclass", ("background", "border", "cell"))


@pytest.mark.parametrize(
    ("axes", "channels", "scope"),
    [
        (XY, THREE, "slice"),
        (["batch", *XY], THREE, "channel"),
        (["channel", *XY], THREE, "image"),
        (["channel", *XY], AXES_05, "slice"),  # one channel: together and apart are the same
        (None, AXES_05, "channel"),
    ],
)
def test_statistics_scopes(tmp_path: Path, axes: Any, channels: Any, scope: str) -> None:
    one = step("zero_mean_unit_variance") if axes is None else step("zero_mean_unit_variance", axes=axes)
    contract, _ = contract_from_rdf(package(tmp_path / "p", rdf_05([one], axes=channels)))
    assert contract.normalization is not None
    assert contract.normalization.scope == scope


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (rdf_05([step("binarize", threshold=3)]), "preprocessing binarize is not supported; declare .* --normalize"),
        (rdf_05([step("sigmoid")]), "preprocessing sigmoid"),
        (rdf_05([step("scale_range", axes=XY), step("scale_linear", gain=2)]), "scale_linear after minmax statistics"),
        (rdf_05([*CLIPPED, step("scale_linear", gain=2)]), "scale_linear after a clip of scaled values"),
        (rdf_05([step("clip", min_percentile=1, max_percentile=99)]), "clip unless it comes once before"),
        (rdf_05([step("clip", min=1, max=99), step("clip", min=0, max=1)]), "clip unless it comes once before"),
        (rdf_05([step("zero_mean_unit_variance", axes=["x"])]), "over axes without Y"),
        (rdf_05([step("scale_linear", axis="y", gain=[1, 2])]), "along axis y"),
        (rdf_05([step("scale_range", axes=XY, reference_tensor="other")]), "reference_tensor other"),
        (rdf_05([step("ensure_dtype", dtype="uint8")]), "ensure_dtype dtype uint8"),
        (rdf_04([{"name": "zero_mean_unit_variance", "kwargs": {"mode": "per_dataset", "axes": "xy"}}]), "per_dataset"),
        (rdf_05([], [step("scale_range")]), "postprocessing scale_range is not supported"),
        (rdf_05([], axes=[{"type": "index", "id": "index"}]), "axis 'index' is not supported"),
        (rdf_05([]) | {"format_version": "0.6.0"}, "format version 0.6.0 is not read"),
        (rdf_05([]) | {"weights": {"pytorch_state_dict": {}}}, r"no ONNX weights \(it has pytorch_state_dict\)"),
        (rdf_05([]) | {"weights": {"onnx": {"source": "https://x/w.onnx"}}}, "nothing is fetched here"),
        (rdf_05([]) | {"weights": {"onnx": {"source": "../w.onnx"}}}, "outside the package"),
        (rdf_05([]) | {"weights": {"onnx": {"source": "other.onnx"}}}, "not beside it"),
        (rdf_05([]) | {"weights": {"onnx": {"source": "weights.onnx", "sha256": "0" * 64}}}, "SHA-256 .* download"),
        ({"inputs": 3, "format_version": "0.5.3"}, "not a list of tensors"),
        ({"type": "dataset"}, "not the description"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, description: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        contract_from_rdf(package(tmp_path / "p", description))


def test_a_declared_normalisation_replaces_unsupported_steps(tmp_path: Path) -> None:
    rdf = package(tmp_path / "p", rdf_05([step("binarize", threshold=3)]))
    contract, _ = contract_from_rdf(rdf, normalization=Normalization("minmax"))
    assert contract.normalization == Normalization("minmax")


def test_folders_and_archives(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    description = rdf_05([step("scale_linear", gain=1 / 255)])
    description["weights"] = {"onnx": {"source": "weights.onnx", "sha256": digest}}
    rdf = package(tmp_path / "p", description)
    (tmp_path / "p" / "weights.onnx.data").write_bytes(b"external")
    expected, _ = contract_from_rdf(rdf)
    assert contract_from_rdf(rdf.parent)[0] == expected
    for above in ("", "model/"):
        with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
            for path in rdf.parent.iterdir():
                archive.write(path, above + path.name)
            archive.writestr("../evil.data", b"x")
        work = tmp_path / f"work{len(above)}"
        work.mkdir()
        contract, weights = contract_from_rdf(tmp_path / "p.zip", work)
        assert contract == expected
        assert weights.read_bytes() == b"weights"
        assert sorted(p.name for p in work.iterdir()) == ["weights.onnx", "weights.onnx.data"]
    _, weights = contract_from_rdf(tmp_path / "p.zip")
    assert weights.read_bytes() == b"weights"
    for path, message in ((tmp_path / "none", "no such file"), (tmp_path / "work0", r"holds no rdf\.yaml")):
        with pytest.raises(ContractError, match=message):
            contract_from_rdf(path)
    rdf.write_text("a: [1")
    with pytest.raises(ContractError, match="not YAML"):
        contract_from_rdf(rdf)


# Tasks -------------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(11)
LOGITS = RNG.normal(0, 4, (2, 3, 8, 9)).astype(np.float32)
SOFT = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
UNIT = RNG.random((2, 3, 8, 9)).astype(np.float32)


@pytest.mark.parametrize(
    ("declared", "channels", "final_op", "sample", "task", "output_is"),
    [
        ({}, 1, "Sigmoid", None, "binary", "probabilities"),
        ({}, 1, "HardSigmoid", None, "binary", "probabilities"),
        ({}, 1, "Relu", None, "regression", "values"),
        ({}, 3, "Softmax", None, "multiclass", "probabilities"),
        ({}, 3, "LogSoftmax", LOGITS - 20, "multiclass", "logits"),
        ({}, 3, "Sigmoid", UNIT, "multilabel", "probabilities"),
        ({}, 3, "Conv", None, "multiclass", "logits"),
        ({}, 3, "Conv", LOGITS, "multiclass", "logits"),
        ({}, 3, "Conv", (-4.0, 5.0), "multiclass", "logits"),
        ({}, 3, "Div", SOFT, "multiclass", "probabilities"),
        ({"task": "binary"}, 1, "Conv", LOGITS[:, :1], "binary", "logits"),
        ({"task": "binary"}, 1, "Clip", UNIT[:, :1], "binary", "probabilities"),
        ({"task": "regression"}, 1, "Conv", None, "regression", "values"),
        ({"task": "regression"}, 1, "Sigmoid", None, "regression", "values"),
        ({"task": "regression"}, 3, "Conv", None, "regression", "values"),
        ({"output_is": "logits"}, 1, "Conv", None, "binary", "logits"),
        ({"output_is": "probabilities"}, 1, "Conv", None, "binary", "probabilities"),
        ({"output_is": "values"}, 3, "Conv", None, "regression", "values"),
        ({"output_is": "logits"}, 3, "Relu", None, "multiclass", "logits"),
        ({"output_is": "probabilities"}, 3, "Clip", UNIT, "multilabel", "probabilities"),
        ({"output_is": "probabilities"}, 3, "Clip", SOFT, "multiclass", "probabilities"),
        ({"task": "multilabel"}, 3, "Conv", LOGITS, "multilabel", "logits"),
        ({"task": "multilabel"}, 3, "Conv", UNIT, "multilabel", "probabilities"),
        ({"task": "multiclass"}, 3, "Sigmoid", UNIT, "multiclass", "probabilities"),
    ],
)
def test_readings_of_an_output(
    declared: dict[str, Any], channels: int, final_op: str, sample: Any, task: str, output_is: str
) -> None:
    found = resolve_task(Contract(**declared), channels, final_op, sample)
    assert (found.task, found.output_is) == (task, output_is)
    assert found.threshold == ((0.5,) if task in ("binary", "multilabel") else ())


@pytest.mark.parametrize(
    ("declared", "channels", "final_op", "sample", "message"),
    [
        ({}, 1, "Conv", LOGITS[:, :1], r"values on samples .*--task binary or --task regression"),
        ({}, 1, "Conv", None, "logit of a binary mask or the value of a regression"),
        ({}, 1, "Tanh", None, "--task binary or --task regression"),
        ({}, 3, "Clip", UNIT, "do not add up to one.*--task multilabel or --task regression"),
        ({}, 3, "Clip", (0.0, 1.0), "--task multilabel or --task regression"),
        ({}, 3, "Relu", np.abs(LOGITS), "--task multiclass or --task regression"),
        ({"output_is": "probabilities"}, 3, "Conv", None, "--task multiclass or --task multilabel"),
        ({}, 1, "Softmax", None, "Softmax over one channel, which is 1 everywhere"),
        ({}, 3, "ArgMax", None, "its output are labels"),
        ({"task": "binary"}, 3, "Conv", None, "binary task has one output channel, this network 3"),
        ({"task": "multiclass"}, 1, "Sigmoid", None, "several output channels, this network one"),
        ({"task": "multilabel"}, 3, "Softmax", None, "ends in Softmax; use --task multiclass"),
        ({"output_is": "logits"}, 1, "Sigmoid", None, "declared logits, but the network ends in Sigmoid"),
        ({"task": "regression", "output_is": "logits"}, 1, "Conv", None, "contradict each other"),
        ({"task": "binary", "output_is": "values"}, 1, "Conv", None, "contradict each other"),
        ({"threshold": (0.5,)}, 3, "Softmax", None, "a multiclass output has none"),
        (
            {"threshold": (0.5, 0.4)},
            3,
            "Sigmoid",
            None,
            r"2 thresholds for 3 output channel\(s\); give one threshold, or 3",
        ),
        ({"classes": ("a", "b")}, 3, "Softmax", None, r"2 classes are named \(a, b\) for 3 output channels; name 3"),
        ({"classes": ("a", "b", "a")}, 3, "Softmax", None, r"two classes are named 'a' \(a, b, a\); give each"),
    ],
)
def test_two_readings_are_both_named(
    declared: dict[str, Any], channels: int, final_op: str, sample: Any, message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        resolve_task(Contract(**declared), channels, final_op, sample)


def test_thresholds_per_class_are_kept() -> None:
    assert resolve_task(Contract(threshold=(0.1, 0.5, 0.9)), 3, "Sigmoid").threshold == (0.1, 0.5, 0.9)


def test_a_border_given_wins_over_a_border_in_the_model():
    assert Contract(border="mirror").over(Contract(border="edge")).border == "mirror"
    assert Contract().over(Contract(border="edge")).border == "edge"
