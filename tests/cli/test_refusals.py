"""What is refused, and how: one line (fact, value, way out), exit code 2, nothing half-written, no traceback."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tifffile
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from unet_rt.cli.demo import shipped_model
from unet_rt.cli.main import main
from unet_rt.system import facts as machine

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.onnxruntime
Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], here: Path) -> Callable[..., str]:
    """Runs a command that must be refused in one line and leave every file as it was; returns the line."""

    def files() -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in here.rglob("*")}

    def run(*argv: object, code: int = 2) -> str:
        before = files()
        got = main([str(part) for part in argv])
        out, err = capsys.readouterr()
        assert got == code, err
        assert out == ""
        assert err.startswith("unet-rt: "), err
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        assert "internal error" not in err
        assert files() == before
        return err

    return run


@pytest.fixture
def pixels(sample_images: list[Array]) -> Array:
    """A real-looking grey image, (300, 260) uint16."""
    return sample_images[0]


def bad_image(kind: str, path: Path, pixels: Array) -> Path:
    """Writes an image that cannot be predicted; ``path`` lacks its suffix."""
    grey = (pixels // 16).clip(0, 255).astype(np.uint8)
    if kind in ("nan", "inf"):
        real = pixels.astype(np.float32)
        real[7, 9] = np.nan if kind == "nan" else np.inf
        tifffile.imwrite(path := path.with_suffix(".tif"), real)
    elif kind.startswith("empty"):
        (path := path.with_suffix("." + kind.removeprefix("empty "))).touch()
    elif kind == "truncated png":
        Image.fromarray(grey).save(path := path.with_suffix(".png"))
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "truncated tif":
        tifffile.imwrite(path := path.with_suffix(".tif"), pixels)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "truncated npy":
        np.save(path := path.with_suffix(".npy"), pixels)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "gigantic npy":
        with (path := path.with_suffix(".npy")).open("wb") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 10**12)}
            np.lib.format.write_array_header_1_0(stream, header)
    elif kind == "gigantic png":
        (path := path.with_suffix(".png")).write_bytes(_png(2**31 - 1, 2**31 - 1))
    elif kind == "gigantic tif":
        tifffile.imwrite(path := path.with_suffix(".tif"), grey)
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            for tag in ("ImageWidth", "ImageLength"):
                tiff.pages[0].tags[tag].overwrite(2**31 - 1)
    elif kind == "colour":
        Image.fromarray(np.dstack([grey, grey // 2, grey // 3])).save(path := path.with_suffix(".png"))
    elif kind == "five channels":
        stack = np.stack([pixels] * 5)
        tifffile.imwrite(path := path.with_suffix(".tif"), stack, imagej=True, metadata={"axes": "CYX"})
    elif kind == "see-through":
        alpha = np.where(np.arange(len(grey))[:, None] < 9, 0, 255) + np.zeros_like(grey)
        Image.fromarray(np.dstack([grey, grey, grey, alpha.astype(np.uint8)])).save(path := path.with_suffix(".png"))
    elif kind == "complex":
        np.save(path := path.with_suffix(".npy"), pixels.astype(np.complex64))
    elif kind == "pickled":
        np.save(path := path.with_suffix(".npy"), np.array([{}, 1], object), allow_pickle=True)
    elif kind == "one axis":
        np.save(path := path.with_suffix(".npy"), np.arange(10.0))
    elif kind == "no pixels":
        np.save(path := path.with_suffix(".npy"), np.zeros((0, 10), np.uint8))
    elif kind == "text":
        (path := path.with_suffix(".png")).write_text("hello, I am no image\n")
    return path


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("nan", ("NaN", "(7, 9)", "replace")),
        ("inf", ("infinite", "(7, 9)", "replace")),
        ("empty tif", ("0 bytes",)),
        ("empty png", ("0 bytes",)),
        ("empty npy", ("0 bytes",)),
        ("truncated png", ("truncated", "copy it again")),
        ("truncated tif", ("truncated", "2,000", "copy it again")),
        ("truncated npy", ("truncated", "2,000", "copy it again")),
        ("gigantic npy", ("truncated",)),
        ("gigantic png", ("2,147,483,647", "TIFF")),
        ("gigantic tif", ("2147483647", "truncated or malicious")),
        ("colour", ("colour image", "--channels luma")),
        ("five channels", ("5 channels", "takes 1", "--channels 0")),
        ("see-through", ("alpha", "--channels 0")),
        ("complex", ("complex64",)),
        ("pickled", ("pickled",)),
        ("one axis", ("YX",)),
        ("no pixels", ("empty",)),
        ("text", ("not an image", "PNG")),
    ],
)
def test_bad_images(
    kind: str, texts: Sequence[str], engine_folder: Path, pixels: Array, here: Path, refused: Callable[..., str]
) -> None:
    path = bad_image(kind, here / "image", pixels)
    line = refused("predict", engine_folder, path, "--out", "mask.tif")
    assert path.name in line
    assert all(text in line for text in texts), line


def _edit(folder: Path, change: Callable[[dict[str, Any]], object], forge: bool = True) -> None:
    """Changes ``spec.json``; ``forge``: with a key that fits, as another version of the program would write."""
    document = json.loads((folder / "spec.json").read_text())
    change(document)
    if forge:
        document.pop("key")
        document["key"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (folder / "spec.json").write_text(json.dumps(document))


def _cut(folder: Path, kind: str) -> None:
    path = next(folder.glob(f"{kind}-*"))
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (lambda f: _edit(f, lambda d: d.update(schema=[2, 0])), ("schema 2.0", "upgrade")),
        (lambda f: _edit(f, lambda d: d.update(halo_limit=0), forge=False), ("changed", "build again")),
        (lambda f: _edit(f, lambda d: d.update(schema="x")), ("damaged", "build the engine again")),
        (lambda f: _edit(f, lambda d: d.update(tile=["a", "b"])), ("damaged", "tile")),
        (lambda f: _edit(f, lambda d: d.update(tile=[-8, 0])), ("damaged", "tile")),
        (lambda f: _edit(f, lambda d: d["contract"].update(task="sing")), ("damaged", "sing")),
        (lambda f: _edit(f, lambda d: d.update(batch=-1)), ("damaged", "batch is -1", "build it again")),
        (lambda f: _edit(f, lambda d: d.update(run_batch=True)), ("damaged", "run_batch is True")),
        (lambda f: _edit(f, lambda d: d.update(bytes_per_px="much")), ("damaged", "bytes_per_px is 'much'")),
        (lambda f: _edit(f, lambda d: d.update(precision="fp8")), ("damaged", "precision is 'fp8'", "bf16")),
        (lambda f: _edit(f, lambda d: d.update(overlap=[8])), ("damaged", "overlap has 1 spatial axes, sizes 2")),
        (lambda f: _edit(f, lambda d: d.update(something_new=1)), ("damaged", "unknown field something_new")),
        (lambda f: _edit(f, lambda d: d["outputs"][0].update(stride="x")), ("damaged", "outputs[0]: stride is 'x'")),
        (lambda f: _edit(f, lambda d: d["outputs"][0].update(exact=1)), ("damaged", "outputs[0]: exact is 1")),
        (lambda f: _edit(f, lambda d: d["sizes"][0].update(stride=0)), ("damaged", "sizes[0].stride is 0")),
        (lambda f: _edit(f, lambda d: d["inputs"][0].update(channels=None)), ("damaged", "inputs[0].channels is None")),
        (lambda f: _edit(f, lambda d: d["files"]["graph"].update(name="../../etc/passwd")), ("outside its folder",)),
        (lambda f: _edit(f, lambda d: d["files"].pop("parity")), ("no record of parity", "--accept-unverified")),
        (lambda f: _edit(f, lambda d: d.update(backend="abacus")), ("abacus", "onnxruntime")),
        (lambda f: (f / "spec.json").write_text("{"), ("damaged", "build the engine again")),
        (lambda f: (f / "spec.json").write_bytes(b"\xff\xfe\x00"), ("cannot be read",)),
        (lambda f: (f / "spec.json").unlink(), ("not an engine folder", "unet-rt build")),
        (lambda f: next(f.glob("graph-*")).unlink(), ("missing",)),
        (lambda f: next(f.glob("exam-*")).unlink(), ("missing",)),
        (lambda f: _cut(f, "graph"), ("SHA-256",)),
        (lambda f: _cut(f, "model"), ("SHA-256",)),
    ],
)
def test_corrupt_engines(
    damage: Callable[[Path], object],
    texts: Sequence[str],
    engine_folder: Path,
    pixels: Array,
    here: Path,
    refused: Callable[..., str],
) -> None:
    folder = Path(shutil.copytree(engine_folder, here / "copy.urt"))
    np.save("image.npy", pixels)
    damage(folder)
    line = refused("predict", folder, "image.npy", "--out", "mask.tif")
    assert all(text in line for text in texts), line


def test_a_newer_minor_schema_is_read(engine_folder: Path, pixels: Array, here: Path) -> None:
    folder = Path(shutil.copytree(engine_folder, here / "copy.urt"))
    _edit(folder, lambda d: d.update(schema=[1, 99], something_new=[1, 2, 3]))
    np.save("image.npy", pixels[:64, :64])
    assert main(["predict", str(folder), "image.npy", "--out", "mask.npy"]) == 0


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--out", "mask.jpg"], (".jpg", ".png, .tif")),
        (["--out", "mask"], ("mask", "suffix", ".tif")),
        (["--out", ""], ("--out is empty",)),
        (["--out", "nowhere/mask.tif"], ("nowhere", "does not exist")),
        (["--out", "image.npy", "--overwrite"], ("image.npy", "never replaces")),
        (["--out", "./link.npy", "--overwrite"], ("never replaces",)),
        (["--out", "there.tif"], ("there.tif", "--overwrite")),
        (["--out", "x.png", "--output", "probability"], ("PNG", "x.tif")),
        (["--out", "x.npy", "--output", "probability", "--overlay"], ("--overlay", "--output mask")),
        (["--out", "x.npy", "--output", "logits"], ("logits", "--help")),
        (["--out", "x.tif", "--mask-values", "0"], ("2 numbers",)),
        (["--out", "x.tif", "--mask-values", "0,300"], ("0 to 255",)),
        (["--out", "x.tif", "--mask-values", "5,5"], ("same value", "0,255")),
        (["--out", "x.tif", "--mask-values", "a,b"], ("a,b", "0,255")),
        (["--out", "x.tif", "--normalize", "magic"], ("magic", "percentile=1,99.8")),
        (["--out", "x.tif", "--normalize", "minmax"], ("percentile", "build it again")),
        (["--out", "x.tif", "--tile", "100x100"], ("100", "stride 8", "96 or 104")),
        (["--out", "x.tif", "--tile", "16x16"], ("16", "keeps nothing")),
        (["--out", "x.tif", "--tile", "192x192x192"], ("3 number(s)", "2 spatial axes")),
        (["--out", "x.tif", "--tile", "0x192"], ("0x192", "1 or more")),
        (["--out", "x.tif", "--tile", "axb"], ("axb", "512x384")),
        (["--out", "x.tif", "--device", "cuda"], ("cuda", "cpu")),
        (["--out", "x.tif", "--device", "abacus"], ("abacus", "cpu")),
        (["--out", "x.tif", "--threads", "-1"], ("-1", "0 for")),
        (["--out", "x.tif", "--threads", "100000"], ("100000", "0 for")),
        (["--out", "x.tif", "--threads", "x"], ("'x'", "--help")),
        (["--out", "x.tif", "--batch", "0"], ("batch of 0", "1 or more")),
        (["--out", "x.tif", "--channels", "3"], ("channel 3", "--channels")),
        (["--out", "x.tif", "--axes", "ZYX"], ("ZYX", "3 axes")),
        (["--out", "x.tif", "--axes", "QQ"], ("QQ", "ZYX")),
        (["--out", "x.tif", "--mask", "small.npy"], ("unet-rt: small.npy: the region", "draw it on the image")),
        (
            ["--out", "x.png", "--output", "instances", "--split", "border"],
            ("class called border", "--split watershed"),
        ),
        (["--out", "x.tif", "--split", "watershed"], ("--split", "--output instances")),
        ([], ("--out", "--help")),
    ],
)
def test_wrong_options_of_predict(
    options: Sequence[str], texts: Sequence[str], engine_folder: Path, pixels: Array, refused: Callable[..., str]
) -> None:
    np.save("image.npy", pixels)
    np.save("small.npy", pixels[:9, :9])
    Path("link.npy").symlink_to("image.npy")
    Path("there.tif").write_bytes(b"kept")
    Path("mask").write_bytes(b"kept")
    line = refused("predict", engine_folder, "image.npy", *options)
    assert all(text in line for text in texts), line


@pytest.mark.parametrize(
    ("images", "out", "texts"),
    [
        (["nowhere.png"], "out", ("nowhere.png", "no such file")),
        (["none"], "out", ("none", "no image", "notes.txt", "PNG")),
        (["a", "b"], "one.tif", ("2 images", "folder")),
        (["a", "b"], "there.tif", ("there.tif is a file", "folder")),
        (["a", "b"], "out", ("a/x.npy and b/x.npy", "out/x.tif", "different folders")),
        (["none/notes.txt"], "out", ("unet-rt: none/notes.txt: ", "not an image")),
    ],
)
def test_wrong_images_and_folders(
    images: Sequence[str],
    out: str,
    texts: Sequence[str],
    engine_folder: Path,
    pixels: Array,
    refused: Callable[..., str],
) -> None:
    for folder in ("a", "b", "none"):
        Path(folder).mkdir()
    for folder in ("a", "b"):
        np.save(f"{folder}/x.npy", pixels[:64, :64])
    Path("there.tif").write_bytes(b"kept")
    Path("none/notes.txt").write_text("nothing to see")
    line = refused("predict", engine_folder, *images, "--out", out)
    assert all(text in line for text in texts), line


def test_existing_outputs_in_a_folder_are_kept(engine_folder: Path, pixels: Array, refused: Callable[..., str]) -> None:
    Path("images").mkdir()
    Path("out").mkdir()
    for name in ("a", "b"):
        np.save(f"images/{name}.npy", pixels[:64, :64])
    Path("out/b.tif").write_bytes(b"kept")
    assert "out/b.tif" in refused("predict", engine_folder, "images", "--out", "out")
    Path("out/b.tif").unlink()
    Path("out/a.overlay.png").write_bytes(b"kept")
    assert "--overwrite" in refused("predict", engine_folder, "images", "--out", "out", "--overlay")


def _network(path: str, channels: int, outputs: int, last: str | None = None) -> Path:
    weights = np.random.default_rng(0).normal(size=(outputs, channels, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y" if last is None else "z"], pads=[1, 1, 1, 1])]
    initial = [numpy_helper.from_array(weights, "w")]
    if last == "InstanceNormalization":
        initial += [numpy_helper.from_array(np.full(outputs, v, np.float32), n) for n, v in (("s", 1), ("b", 0))]
        nodes.append(helper.make_node(last, ["z", "s", "b"], ["y"]))
    elif last is not None:
        nodes.append(helper.make_node(last, ["z"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", outputs, "H", "W"])],
        initial,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return Path(path)


def _matrix(path: str) -> Path:
    """A graph of rows, without spatial axes."""
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.ones((10, 2), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return Path(path)


def bad_model(kind: str) -> Path:
    """Something given in place of an ONNX U-Net."""
    path = Path("model.onnx")
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes(shipped_model().read_bytes()[:200_000])
    elif kind == "image":
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(path, "PNG")
    elif kind == "folder":
        path.mkdir()
    elif kind == "no spatial axes":
        _matrix("model.onnx")
    elif kind == "a number beside the image":
        model = onnx.load(_network("model.onnx", 1, 2, "Relu"))
        model.graph.input.insert(0, helper.make_tensor_value_info("noise_level", TensorProto.FLOAT, [1]))
        model.graph.node.insert(1, helper.make_node("Add", ["z", "noise_level"], ["sum"]))
        model.graph.node[2].input[0] = "sum"
        onnx.save(model, path)
    return path


@pytest.mark.parametrize("verb", ["inspect", "build"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("missing", "does not exist"),
        ("empty", "0 bytes"),
        ("text", "no complete ONNX graph"),
        ("truncated", "no complete ONNX graph"),
        ("image", "PNG image"),
        ("no spatial axes", "not an image"),
        ("a number beside the image", "input noise_level [1] is not an image"),
    ],
)
def test_bad_models(verb: str, kind: str, text: str, refused: Callable[..., str]) -> None:
    line = refused(verb, bad_model(kind))
    assert text in line


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--normalize", "magic"], ("magic", "zscore")),
        ([], ("no normalisation is declared", "uint16", "--normalize", "scale=255")),
        (["--normalize-scope", "channel"], ("--normalize",)),
        (["--normalize", "percentile=99,1"], ("99,1", "rise")),
        (["--normalize", "scale=0"], ("scale 0", "above 0")),
        (["--normalize", "zscore", "--backend", "abacus"], ("abacus", "onnxruntime")),
        (["--normalize", "zscore", "--device", "abacus"], ("abacus", "cuda[:N]")),
        (["--normalize", "zscore", "--precision", "int3"], ("int3", "bf16")),
        (["--normalize", "zscore", "--task", "multiclass"], ("multiclass", "--task binary")),
        (["--normalize", "zscore", "--threshold", "x"], ("'x'", "0.5")),
        (["--normalize", "zscore", "--threshold", "0.2,0.3"], ("2 thresholds", "one threshold")),
        (["--normalize", "zscore", "--threshold", "7"], ("7", "0 to 1")),
        (["--normalize", "zscore", "--classes", "a,b,c"], ("3 classes", "a, b, c")),
        (["--normalize", "zscore", "--budget", "foo=1"], ("foo", "label_change")),
        (["--normalize", "zscore", "--budget", "dice"], ("'dice'", "KEY=NUMBER")),
        (["--normalize", "zscore", "--halo", "much"], ("much", "measured")),
        (["--normalize", "zscore", "--halo", "-3"], ("-3", "measured")),
        (["--normalize", "zscore", "--tile", "7x7x7"], ("7x7x7", "2 spatial axes")),
        (["--normalize", "zscore", "--tile", "2x2"], ("2 px", "keeps nothing")),
        (["--normalize", "zscore", "--overlap", "3x3"], ("--overlap", "exactly")),
        (["--normalize", "zscore", "--contract", "nowhere.json"], ("nowhere.json", "check the path")),
        (["--normalize", "zscore", "--contract", "notes.txt"], ("notes.txt", "not JSON")),
        (["--normalize", "zscore", "--out", "there"], ("there", "not an engine")),
        (["--normalize", "zscore", "--out", "notes.txt"], ("notes.txt is a file",)),
        (["--normalize", "zscore", "--channels", "0,1"], ("channel 1", "the image has 1", "--channels")),
        (["--normalize", "zscore", "--samples", "nowhere"], ("nowhere", "no such file")),
        (["--normalize", "zscore", "--samples", "flat.npy"], ("flat.npy", "proves nothing", "every pixel is 7")),
        (["--normalize", "zscore", "--samples", "nan.npy"], ("nan.npy", "NaN")),
    ],
)
def test_wrong_options_of_build(
    options: Sequence[str], texts: Sequence[str], pixels: Array, refused: Callable[..., str]
) -> None:
    model = _network("model.onnx", 1, 1, "Sigmoid")
    Path("there").mkdir()
    Path("there/file").touch()
    Path("notes.txt").write_text("no JSON")
    np.save("image.npy", pixels)
    np.save("flat.npy", np.full((99, 99), 7, np.uint8))
    holes = pixels.astype(np.float32)
    holes[3, 4] = np.nan
    np.save("nan.npy", holes)
    samples = [] if "--samples" in options else ["--samples", "image.npy"]
    line = refused("build", model, *samples, *options)
    assert all(text in line for text in texts), line


# What a machine with a driver and a GPU may lack: the backend, modules that are not there, and what is said.
LACKING = {
    "TensorRT": (
        "tensorrt",
        {"tensorrt", "tensorrt_rtx"},
        ("TensorRT is not installed", "pip install tensorrt-cu13", "pip install tensorrt-rtx-cu13"),
    ),
    "ONNX Runtime": ("onnxruntime", {"onnxruntime"}, ("not installed; pip install onnxruntime-gpu",)),
    "ONNX Runtime for CUDA": ("onnxruntime", set(), ("this is the CPU wheel", "pip install onnxruntime-gpu")),
    "PyCUDA": ("onnxruntime", {"pycuda"}, ("PyCUDA is not installed", "conda-forge", "CUDA_ENABLE_CURAND = False")),
    "a PyCUDA that works": (
        "onnxruntime",
        set(),
        ("PyCUDA cannot be imported", "conda-forge", "CUDA_ENABLE_CURAND = False"),
    ),
    "our kernels": ("onnxruntime", {"unet_rt._cuda"}, ("no CUDA kernels", "UNET_RT_CUDA=ON pip install")),
}


@pytest.fixture
def lacking(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, set[str]], None]:
    """Gives the machine a GPU, and takes modules and libraries away from it."""

    def lack(what: str, absent: set[str]) -> None:
        monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda(("Some GPU",), "13.1", None))
        real, there = importlib.util.find_spec, {"unet_rt._cuda", "pycuda"}
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: (
                None if name in absent else ModuleSpec(name, None) if name in there else real(name, *rest)
            ),
        )
        driver = ModuleType("pycuda.driver")
        monkeypatch.setitem(sys.modules, "pycuda", ModuleType("pycuda"))
        # None: the import fails, as where a library that it was built with is gone.
        monkeypatch.setitem(sys.modules, "pycuda.driver", None if what == "a PyCUDA that works" else driver)
        monkeypatch.setitem(sys.modules, "unet_rt._cuda", SimpleNamespace())
        providers = ["CPUExecutionProvider"] if what == "ONNX Runtime for CUDA" else ["CUDAExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)

    return lack


@pytest.mark.parametrize("what", LACKING)
def test_what_a_gpu_needs_is_said(
    what: str, pixels: Array, refused: Callable[..., str], lacking: Callable[[str, set[str]], None]
) -> None:
    backend, absent, texts = LACKING[what]
    lacking(what, absent)
    np.save("image.npy", pixels)
    options = ("--samples", "image.npy", "--device", "cuda", "--out", "x.urt")
    line = refused("build", shipped_model(), "--backend", backend, *options)
    assert all(text in line for text in texts), line


@pytest.mark.parametrize("backend", [(), ("--backend", "tensorrt"), ("--backend", "onnxruntime")])
def test_a_missing_driver_is_said(
    backend: Sequence[str], pixels: Array, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda((), "", "no NVIDIA driver is installed"))
    np.save("image.npy", pixels)
    line = refused("build", shipped_model(), "--samples", "image.npy", "--device", "cuda", *backend, "--out", "x.urt")
    assert "cuda was asked: no NVIDIA driver is installed; install the driver, or use --device cpu" in line


def test_one_channel_is_binary_or_a_regression_and_both_are_named(pixels: Array, refused: Callable[..., str]) -> None:
    np.save("image.npy", pixels)
    line = refused("build", _network("model.onnx", 1, 1), "--samples", "image.npy", "--normalize", "zscore")
    assert "--task binary" in line
    assert "--task regression" in line


def test_wrong_channel_counts(pixels: Array, refused: Callable[..., str]) -> None:
    np.save("image.npy", pixels)
    line = refused("build", _network("model.onnx", 3, 2), "--samples", "image.npy", "--normalize", "zscore")
    assert "1 channel" in line
    assert "takes 3" in line
    assert "--channels 0,0,0" in line


def test_a_network_that_cannot_be_tiled_needs_its_tile(pixels: Array, refused: Callable[..., str]) -> None:
    model = _network("model.onnx", 1, 2, "InstanceNormalization")
    np.save("image.npy", pixels)
    line = refused("build", model, "--samples", "image.npy", "--normalize", "zscore")
    assert "InstanceNormalization" in line
    assert "--tile" in line
    build = ["build", str(model), "--samples", "image.npy", "--normalize", "zscore", "--backend", "onnxruntime"]
    assert main([*build, "--tile", "64x64", "--out", "norm.urt"]) == 0


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--images", "nowhere"], ("nowhere", "no such file")),
        (["--labels", "image.npy"], ("--images",)),
        (["--images", "image.npy", "--labels", "other.npy"], ("image.npy", "file name")),
        (["--images", "image.npy", "--baseline", "nowhere.onnx"], ("nowhere.onnx", "does not exist")),
        (["--images", "image.npy", "--baseline", "four.onnx"], ("four.onnx", "1 to 4", "1 to 2")),
        (["--budget", "foo"], ("'foo'", "KEY=NUMBER")),
        (["--images", "image.npy", "--tile", "100x100"], ("100", "96 or 104")),
    ],
)
def test_wrong_options_of_verify(
    options: Sequence[str], texts: Sequence[str], engine_folder: Path, pixels: Array, refused: Callable[..., str]
) -> None:
    np.save("image.npy", pixels)
    np.save("other.npy", pixels)
    _network("four.onnx", 1, 4)
    line = refused("verify", engine_folder, *options)
    assert all(text in line for text in texts), line


@pytest.mark.parametrize(
    "argv",
    [
        ["inspect", "nowhere.onnx"],
        ["build", "nowhere.onnx"],
        ["build"],
        ["predict", "nowhere.urt", "image.npy", "--out", "mask.tif"],
        ["predict", "nowhere.urt", "image.npy", "--out", "mask.tif", "--tile", "axb"],
        ["verify", "nowhere.urt"],
    ],
)
def test_json_owns_stdout_where_a_command_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    np.save("image.npy", np.zeros((9, 9), np.uint8))
    assert main([*argv, "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert set(error) == {"type", "message"}
    assert err == f"unet-rt: {error['message']}\n"


def test_a_traceback_comes_with_debug_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nowhere.onnx", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("unet-rt: nowhere.onnx does not exist")


def test_a_failure_of_our_own_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: object) -> None:
        raise ZeroDivisionError("division by\nzero")

    monkeypatch.setattr("unet_rt.graph.report.inspect", broken)
    assert main(["inspect", "model.onnx"]) == 2
    assert capsys.readouterr().err == (
        "unet-rt: internal error, please report it with the output of --debug: division by zero\n"
    )
