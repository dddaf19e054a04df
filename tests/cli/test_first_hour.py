"""What a newcomer meets in the first hour with a model of their own: questions asked at once, ways out that work."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tifffile
from onnx import TensorProto, helper, numpy_helper

import unet_rt as urt
from unet_rt.building import choice
from unet_rt.building.report import Candidate
from unet_rt.cli.main import main
from unet_rt.cli.printing import Narrator
from unet_rt.contract.contract import Contract
from unet_rt.engine import parity
from unet_rt.engine.budget import Budget
from unet_rt.images.source import Source

pytestmark = pytest.mark.onnxruntime
Array = np.ndarray[Any, np.dtype[Any]]
NETWORK = """
import warnings
from torch import nn
import helpers_of_mine
warnings.warn("of another library")
class Net(nn.Sequential):
    def __init__(self, classes=2):
        super().__init__(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, classes, 1))
class Tail(nn.Module):
    pass
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def images(sample_images: list[Array]) -> Path:
    folder = Path("images")
    folder.mkdir()
    for k, pixels in enumerate(sample_images):
        tifffile.imwrite(folder / f"{k}.tif", pixels)
    return folder


@pytest.fixture
def bare(here: Path) -> Path:
    """A network that says nothing of its pixels: an edge of one channel."""
    weight = np.array([[[[0, -1, 0], [-1, 4, -1], [0, -1, 0]]]], np.float32)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1, "H", "W"]) for name in "xy")
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    graph = helper.make_graph([node], "edge", [x], [y], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "bare.onnx")
    return Path("bare.onnx")


def test_everything_that_is_missing_is_asked_at_once(
    bare: Path, images: Path, sample_images: list[Array], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Channels, normalisation and task in one refusal, with the command; no image is read in full, no network is run."""
    colour = np.stack([sample_images[0] // 16, sample_images[0] // 20, sample_images[0] // 32], -1).astype(np.uint8)
    tifffile.imwrite(images / "0.tif", np.tile(colour, (40, 10, 1)), photometric="rgb", tile=(256, 256))
    read = list[int]()
    real = Source.read

    def counted(self: Source, *window: Any) -> Any:
        pixels = real(self, *window)
        read.append(pixels.size)
        return pixels

    argv = ["build", "bare.onnx", "--samples", "images", "--precision", "fp32", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", counted)
        patch.setattr("unet_rt.baseline.model.baseline_runner", lambda: pytest.fail("the network was run"))
        assert main(argv) == 2
    out, err = capsys.readouterr()
    assert '"IncompleteContractError"' in out
    assert "bare.onnx leaves 3 things open" in err
    asked = (
        "--channels luma",
        "(2) no normalisation is declared, and 0.tif holds uint8",
        "(3) the output has one channel",
    )
    assert all(text in err for text in asked)
    command = err.strip().rpartition("then: unet-rt ")[2]
    assert shlex.split(command)[:6] == argv[:6]
    assert 0 < sum(read) <= colour.size * 400 / 2
    # the command with the user's words in it: nothing more is asked
    words = {"YOUR_CHANNELS": "luma", "YOUR_NORMALIZE": "zscore", "YOUR_TASK": "regression"}
    (images / "0.tif").unlink()
    given = [words.get(word, word) for word in shlex.split(command) if word not in ("--channels", "YOUR_CHANNELS")]
    assert main([*given, "--backend", "onnxruntime", "--tile", "128"]) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--normalize", "zscore"], "the output has one channel"),
        (["--task", "binary"], "no normalisation is declared"),
    ],
)
def test_what_is_declared_is_not_asked(options: list[str], text: str, bare: Path, images: Path, capsys: Any) -> None:
    assert main(["build", str(bare), "--samples", str(images), *options]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert "(1)" not in err


def test_the_tile_of_the_training_is_asked_with_the_rest(here: Path, images: Path) -> None:
    shape = ["N", 1, "H", "W"]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    ones = [numpy_helper.from_array(np.full(1, v, np.float32), n) for n, v in (("s", 1), ("b", 0))]
    node = helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"])
    graph = helper.make_graph([node], "norm", [x], [y], ones)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "norm.onnx")
    with pytest.raises(urt.ContractError, match=r"leaves 3 things open.*--tile HxW") as caught:
        urt.build("norm.onnx", samples=images)
    assert caught.value.options == ("--normalize", "--task", "--tile")  # type: ignore[attr-defined]


def test_candidates_are_told_as_they_are_measured(bare: Path, sample_images: list[Array]) -> None:
    """With the time used and left, and before the build has ended."""
    told, done = list[tuple[str, bool]](), list[Any]()
    contract = Contract(normalization=urt.Normalization("zscore"), task="regression")
    urt.build(
        bare, samples=sample_images, contract=contract, backend="onnxruntime", tile=128, search_minutes=1,
        tell=lambda text: told.append((text, bool(done))), report=done.append, out="x.urt",
    ).close()  # fmt: skip
    lines = [text for text, after in told if not after]
    fp32, *_ = (text for text in lines if "onnxruntime fp32" in text)
    assert "ms for a tile of 128x128 px" in fp32
    assert "inside the budget" in fp32
    assert " s, " in fp32
    assert " s left: " in fp32
    measured = {c.title for c in done[0].candidates}
    assert {text.partition(" s left: ")[2].partition(":")[0] for text in lines} == measured


def test_without_a_terminal_a_line_says_that_it_still_runs(capsys: Any) -> None:
    with Narrator(every_s=0.05) as narrator:
        narrator.say("building openvino int8")
        time.sleep(0.3)
        narrator.tell("openvino fp32: 12 ms")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("  building openvino int8 ... for 0 s")
    assert lines.count("  openvino fp32: 12 ms") == 1
    assert 2 < len(lines) < 9
    with Narrator() as narrator:  # what is quick says nothing
        narrator.say("reading")
    assert capsys.readouterr().err == ""


def test_a_search_whose_time_is_up_judges_one_window(
    sample_images: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine became slower after the windows were chosen: each candidate costs one window more, and that is said."""
    reports = list[Any]()
    left = [False]

    def late(*_: Any, **__: Any) -> Any:
        left[0] = True
        return timings(*_, **__)

    from unet_rt.building import candidates, job

    timings = candidates.interleaved_times
    monkeypatch.setattr(candidates, "interleaved_times", late)
    monkeypatch.setattr(job.Deadline, "left", lambda self, share=1.0: -1.0 if left[0] else share * self.seconds)
    urt.build(
        urt.shipped_model(), samples=sample_images, backend="onnxruntime", precision="fp32", tile=192, out="x.urt",
        report=reports.append,
    ).close()  # fmt: skip
    assert any("onnxruntime fp32 was judged on 1 of 3 sample windows" in note for note in reports[0].notes)
    (candidate,) = reports[0].candidates
    assert len(candidate.verdict.images) == 1


@pytest.mark.parametrize(
    ("halo_limit", "seam", "precision", "advised"),
    [(None, 0.0, "int8", False), (8, 1e-5, "int8", False), (8, 0.02, "int8", True), (8, 1e-5, "fp32", True)],
)
def test_the_exact_halo_is_advised_where_seams_are_the_matter(
    halo_limit: int | None, seam: float, precision: Any, advised: bool
) -> None:
    contract = Contract(task="multiclass", output_is="logits")
    values = np.random.default_rng(5).normal(size=(2, 64, 64)).astype(np.float32)
    turned = np.concatenate([values[:, :60], values[::-1, 60:]], axis=1)
    verdict = parity.judge([parity.compare(values, turned, contract, "a.tif")], Budget().of(precision))
    candidate = Candidate("openvino", precision, (64, 64), verdict=verdict)
    job: Any = SimpleNamespace(budget=Budget(), remarks=SimpleNamespace(left_out=[], warnings=[]))
    spec = SimpleNamespace(halo_limit=halo_limit, contract=contract)
    tiling: Any = SimpleNamespace(spec=spec, seams={8: seam})
    trials: Any = SimpleNamespace(candidates=[candidate])
    nothing: Any = None
    with pytest.raises(urt.ParityError) as error:
        choice.choose(job, tiling, trials, nothing, nothing)
    assert ("--halo exact" in str(error.value)) == advised
    assert "--budget label_change=" in str(error.value)


@pytest.mark.parametrize("verb", [["predict", "m.onnx", "a.tif", "--out", "b.tif"], ["verify", "m.onnx"]])
def test_a_model_in_place_of_an_engine_is_answered_with_the_command(verb: list[str], capsys: Any) -> None:
    for name in ("m.onnx", "a.tif"):
        Path(name).write_bytes(b"x")
    assert main(verb) == 2
    assert "unet-rt build m.onnx --samples YOUR_IMAGES --out m.urt" in capsys.readouterr().err
    assert not Path("b.tif").exists()


def test_predict_opens_engines_and_takes_lists(engine_folder: Path, sample_images: list[Array]) -> None:
    with urt.load(engine_folder) as engine:
        wanted = [urt.predict(engine, image) for image in sample_images]
    got = urt.predict(str(engine_folder), sample_images, tile=192)
    assert isinstance(got, list)
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert np.array_equal(urt.predict(engine_folder, sample_images[0]), wanted[0])
    assert urt.predict(engine_folder, []) == []
    with pytest.raises(urt.OutputError, match="3 images do not go into one file"):
        urt.predict(engine_folder, sample_images, out="masks.tif")
    Path("m.onnx").write_bytes(b"x")
    with pytest.raises(urt.EngineError, match=r"m.onnx is an ONNX file.*unet-rt build m.onnx"):
        urt.predict("m.onnx", sample_images[0])


def test_classes_are_named_at_predict(engine_folder: Path, images: Path, capsys: Any) -> None:
    argv = ["predict", str(engine_folder), "images/0.tif", "--out", "mask.tif", "--overwrite"]
    assert main([*argv, "--classes", "glass,cell"]) == 0
    out = capsys.readouterr().out
    assert "glass " in out
    assert "cell " in out
    assert main([*argv, "--output", "instances", "--areas", "areas.csv", "--classes", "glass,cell"]) == 0
    assert "cell" in Path("areas.csv").read_text()
    capsys.readouterr()
    assert main([*argv, "--classes", "a,b,c"]) == 2
    assert "3 classes are named (a, b, c)" in capsys.readouterr().err
    assert main(argv) == 0  # and nobody else's names are changed
    assert "nucleus " in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.parametrize("where", ["my_net:Net", "my_net.py:Net", "sub/my_net.py:Net"])
def test_a_module_is_found_where_the_user_is(where: str, here: Path) -> None:
    """As the installed command runs: the working directory is on no path, and warnings of others are not shown."""
    import torch
    from torch import nn

    folder = Path(where.partition(":")[0]).parent
    folder.mkdir(exist_ok=True)
    (folder / "my_net.py").write_text(NETWORK)
    (folder / "helpers_of_mine.py").write_text(
        "import logging\nlogging.getLogger('other').warning('a log of another')\n"
    )
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).state_dict(), "w.pt")
    words = ["export", "w.pt", "--module", where, "--out", "m.onnx", "--sizes", "32,40"]
    paths = [str(Path(path).resolve()) for path in sys.path if path not in ("", str(here))]
    code = f"import sys; sys.path[:] = {paths!r}; sys.argv[1:] = {words!r}; from unet_rt.cli.main import main; "
    code += "sys.exit(main())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert onnx.load("m.onnx").graph.output


@pytest.mark.torch
@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["export", "net.py", "--out", "m.onnx"], ["unet-rt export YOUR_WEIGHTS.pt --out m.onnx --module net.py:Net"]),
        (
            ["bench", "e.urt", "--checkpoint", "net.py"],
            ["bench e.urt --checkpoint YOUR_WEIGHTS.pt --module net.py:Net"],
        ),
        (["bench", "e.urt", "--module", "a:b"], ["unet-rt bench e.urt --module a:b --checkpoint YOUR_WEIGHTS.pt"]),
        (["export", "w.pt", "--module", "net.py:Nets", "--out", "m.onnx"], ["net.py has no Nets"]),
        (["export", "w.pt", "--module", "nets.py:Net", "--out", "m.onnx"], ["nets.py does not exist"]),
        (
            ["export", "w.pt", "--module", "nets:Net", "--out", "m.onnx"],
            ["No module named 'nets'", "my_networks.py:Net"],
        ),
        (["export", "w.pt", "--module", "net.py:make", "--out", "m.onnx"], ["missing 1 required", "--arguments"]),
        (["export", "w.pt", "--module", "bad.py:make", "--out", "m.onnx"], ["bad.py cannot be imported: SyntaxError"]),
        (
            ["export", "whole.pt", "--module", "net.py:Net", "--out", "m.onnx"],
            ["holds more than weights", "state_dict()"],
        ),
        (["build", "net.py"], ["net.py is Python code", "unet-rt export"]),
    ],
)
def test_code_and_weights_that_are_mixed_up(words: list[str], texts: list[str], capsys: Any) -> None:
    import torch

    Path("net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    pass\ndef make(width):\n    return width\n"
    )
    Path("bad.py").write_text("def make(:\n")
    torch.save({}, "w.pt")
    torch.save(torch.nn.Identity(), "whole.pt")
    before = sorted(Path().iterdir())
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("unet-rt: ")
    assert err.count("\n") == 1
    assert all(text in err for text in texts), err
    assert [path for path in sorted(Path().iterdir()) if path.name != "__pycache__"] == before


def test_the_help_of_sizes_names_volumes(capsys: Any) -> None:
    for verb in ("build", "predict", "verify", "bench"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert "--tile N|HxW|DxHxW" in capsys.readouterr().out


def test_the_list_of_what_is_missing_is_quick(bare: Path, images: Path) -> None:
    """Under a second beyond what the command takes to start, by the processor's clock: others may use this machine."""

    def seconds(*words: str) -> float:
        paths = [str(Path(path).resolve()) for path in sys.path]
        code = (
            f"import sys, time; sys.path[:] = {paths!r}; from unet_rt.cli.main import main\n"
            f"import numpy, onnx, tifffile; begun = time.process_time(); code = main({list(words)!r})\n"
            "print(time.process_time() - begun); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "2 things open" in done.stderr
        return float(done.stdout)

    assert seconds("build", str(bare), "--samples", str(images)) < 1.0
