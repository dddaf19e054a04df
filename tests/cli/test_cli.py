"""The command line as a stranger uses it: outputs, exit codes, who owns stdout, and what interruptions leave behind."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tifffile
from onnx import numpy_helper
from PIL import Image

import unet_rt as urt
from unet_rt.building import job as build_job
from unet_rt.cli.demo import shipped_model
from unet_rt.cli.main import main
from unet_rt.cli.parser import make_parser
from unet_rt.cli.printing import Bar, Narrator
from unet_rt.outputs.pictures import COLOURS

pytestmark = pytest.mark.onnxruntime
Array = np.ndarray[Any, np.dtype[Any]]
Outcome = tuple[int, str, str]
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(part) for part in argv])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def images(sample_images: list[Array]) -> Path:
    """A folder of one TIFF, one npy and one 8-bit PNG of different sizes."""
    folder = Path("images")
    folder.mkdir()
    first, second, third = sample_images
    tifffile.imwrite(folder / "a.tif", first)
    np.save(folder / "b.npy", second)
    Image.fromarray((third // 16).clip(0, 255).astype(np.uint8)).save(folder / "c.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def command(*argv: object) -> list[str]:
    return [sys.executable, "-m", "unet_rt", *(str(part) for part in argv)]


def environment() -> dict[str, str]:
    """Of child processes: the tested package, whether it is installed or a source tree on the path."""
    parent = str(Path(urt.__file__).resolve().parents[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([parent, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }


# --- help -----------------------------------------------------------------------------------------------------------


def test_help_explains_every_verb_and_option(cli: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    (verbs,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    known = {
        "bench",
        "inspect",
        "build",
        "predict",
        "verify",
        "pack",
        "unpack",
        "doctor",
        "demo",
        "train",
        "export",
        "serve",
    }
    assert set(verbs.choices) == known
    for name, parser in verbs.choices.items():
        for action in parser._actions:
            assert action.help, f"{name} {action.dest} is not explained"
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: unet-rt {name} ")
        assert max(map(len, text.splitlines())) <= 100


def test_no_verb_shows_the_verbs(cli: Callable[..., Outcome]) -> None:
    code, out, err = cli()
    assert (code, out) == (2, "")
    assert all(verb in err for verb in ("inspect", "build", "predict", "verify", "doctor", "demo"))


def test_an_unknown_verb_is_one_line(cli: Callable[..., Outcome]) -> None:
    code, out, err = cli("frobnicate")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "frobnicate" in err
    assert "'predict'" in err


def test_a_model_swallowed_by_an_option_is_explained(cli: Callable[..., Outcome]) -> None:
    code, _, err = cli("build", "--samples", "images", "model.onnx")
    assert code == 2
    assert "MODEL.onnx ... [options]" in err


def test_names_of_any_script_on_a_terminal_of_one(engine_folder: Path, images: Path) -> None:
    (images / "c.png").rename("zellkörper.png")
    done = subprocess.run(
        command("predict", engine_folder, "zellkörper.png", "--out", "mäske.npy"),
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "zellk\\xf6rper.png" in done.stdout
    assert np.load("mäske.npy").shape == (257, 257)


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_json_has_the_documented_keys(cli: Callable[..., Outcome]) -> None:
    code, out, err = cli("inspect", shipped_model(), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert {"inputs", "parameters", "flops_per_pixel", "cost", "outputs"} <= set(found)
    assert found["parameters"] > 0
    assert found["flops_per_pixel"] > 0
    assert set(found["cost"]) == {"512", "1024", "2048", "4096"}
    (output,) = found["outputs"]
    keys = {"name", "axes", "stride", "reach", "halo", "shrink", "scale", "exact", "reasons"}
    assert keys <= set(output)
    assert output["axes"] == "NCYX"
    assert output["stride"] == [8, 8]
    assert output["scale"] == ["1/1", "1/1"]
    assert output["exact"] is True
    assert output["reasons"] == []
    for pair in ("reach", "halo", "shrink"):
        assert set(output[pair]) == {"before", "after"}
        assert len(output[pair]["before"]) == len(output[pair]["after"]) == 2
    halo = output["halo"]["before"][0]
    assert found["cost"]["1024"]["ratio"] == pytest.approx((1024 / ((1024 - 2 * halo) // 8 * 8)) ** 2, rel=0.02)


def test_inspect_reads_like_a_page(cli: Callable[..., Outcome]) -> None:
    code, out, err = cli("inspect", shipped_model())
    assert (code, err) == (0, "")
    assert "multiples of 8 px" in out
    assert "253,034 parameters, 38.3 kFLOP per output pixel" in out
    assert "exact: tiles equal the whole image" in out
    assert "1024x1024 px" in out
    assert max(map(len, out.splitlines())) <= 110


# --- build ----------------------------------------------------------------------------------------------------------


def test_build_without_samples_ends_with_the_command_that_proves_more(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One generated sample is enough here.
    monkeypatch.setattr(build_job, "PARITY_SHARE", 0.0)
    options = ["--backend", "onnxruntime", "--tile", "320x320", "--border", "edge"]
    code, out, err = cli("build", shipped_model(), *options)
    assert code == 0, err
    assert "synthetic" in out
    last = out.splitlines()[-1]
    argv = shlex.split(last[last.index("unet-rt build") :])[1:]
    args = make_parser().parse_args(argv)
    assert (args.backend, args.tile, args.border, args.overwrite) == ("onnxruntime", (320, 320), "edge", True)
    assert (args.model, args.samples, args.out) == ([str(shipped_model())], ["YOUR_IMAGES"], "nuclei.urt")
    assert json.loads(Path("nuclei.urt/spec.json").read_text())["contract"]["border"] == "edge"


def test_build_explains_what_it_saw_and_chose(cli: Callable[..., Outcome], images: Path) -> None:
    options = [
        "--samples",
        images,
        "--backend",
        "onnxruntime",
        "--tile",
        "256x256",
        "--halo",
        "exact",
        "--out",
        "e.urt",
    ]
    code, out, err = cli("build", shipped_model(), *options, "--precision", "fp32", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["kind"] == "samples"
    assert report["candidates"][report["chosen"]]["verdict"]["accepted"] is True
    for text in ("normalisation percentile", "background", "nucleus", "kept Mpx/s", "->", "e.urt", "3 sample windows"):
        assert text in err, text


def test_a_missed_budget_is_no_engine_and_exit_code_1(cli: Callable[..., Outcome], images: Path) -> None:
    options = ["--samples", images, "--backend", "onnxruntime", "--precision", "fp32", "--tile", "192x192"]
    code, out, err = cli("build", shipped_model(), *options, "--halo", "0", "--budget", "label_change=1e-9", "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "ParityError"
    assert "--halo exact" in err
    assert "--precision fp32" not in err
    assert not Path("nuclei.urt").exists()


def test_a_black_mask_is_a_loud_warning_that_names_normalisation(cli: Callable[..., Outcome], images: Path) -> None:
    options = ["--samples", images, "--backend", "onnxruntime", "--precision", "fp32", "--tile", "256x256"]
    code, _, err = cli("build", shipped_model(), *options, "--halo", "exact", "--normalize", "scale=1e9")
    assert code == 0
    assert "WARNING" in err
    assert "--normalize first" in err


# --- predict --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tif", ".png", ".npy"])
def test_predict_writes_the_mask_of_the_library(
    suffix: str, cli: Callable[..., Outcome], engine_folder: Path, images: Path
) -> None:
    out = Path("mask" + suffix)
    code, text, err = cli("predict", engine_folder, images / "a.tif", "--out", out, "--mask-values", "0,255")
    assert (code, err) == (0, "")
    mask = np.load(out) if suffix == ".npy" else np.array(Image.open(out))
    with urt.load(engine_folder) as engine:
        wanted = urt.predict(engine, images / "a.tif")
    assert set(np.unique(mask)) == {0, 255}
    np.testing.assert_array_equal(mask > 0, np.asarray(wanted) > 0)
    share = (mask > 0).mean()
    for part in ("a.tif YX 300x260 uint16", "onnxruntime fp32 on cpu", "Mpx/s", "seconds busy", "peak memory", "halo"):
        assert part in text, part
    assert f"nucleus {share:.2%}" in text
    assert f"-> {out}" in text


def test_one_image_of_several_is_predicted_by_its_name(
    cli: Callable[..., Outcome], engine_folder: Path, sample_images: list[Array]
) -> None:
    first, second = (image[:200, :220] for image in sample_images[:2])
    with tifffile.TiffWriter("wells.ome.tif", ome=True) as writer:
        for name, image in (("A1", first), ("B2", second)):
            writer.write(image, metadata={"axes": "YX", "Name": name})
    code, _, err = cli("predict", engine_folder, "wells.ome.tif", "--out", "a.npy")
    assert code != 0
    assert "0 A1 (YX 200x220), 1 B2 (YX 200x220)" in err
    for series in ("B2", "1"):
        assert cli("predict", engine_folder, "wells.ome.tif", "--out", f"{series}.npy", "--series", series)[0] == 0
        with urt.load(engine_folder) as engine:
            np.testing.assert_array_equal(np.load(f"{series}.npy"), urt.predict(engine, second))


def test_planes_are_normalised_together_where_that_is_asked_for(
    cli: Callable[..., Outcome], engine_folder: Path, sample_images: list[Array]
) -> None:
    """An engine of a network that ``train`` made, whose contract says ``image``."""
    with urt.load(engine_folder) as engine:
        assert engine.spec.contract.normalization.scope == "image"
    first = sample_images[0][:200, :220]
    tifffile.imwrite("stack.tif", np.stack([first, first // 3]), metadata={"axes": "ZYX"})
    for options, over in (
        ((), "each of 2 planes by itself"),
        (("--normalize-scope", "channel"), "all of 2 planes together"),
    ):
        code, out, err = cli("predict", engine_folder, "stack.tif", "--out", "a.npy", "--overwrite", *options)
        assert code == 0, err
        assert f"normalisation percentile: statistics of {over}: low " in out


def test_predict_of_a_folder_fills_a_folder(cli: Callable[..., Outcome], engine_folder: Path, images: Path) -> None:
    code, out, err = cli("predict", engine_folder, images, "--out", "new/masks", "--overlay", "--json")
    assert code == 0, err
    reports = json.loads(out)
    assert [r["image"] for r in reports] == ["a.tif", "b.npy", "c.png"]
    names = {p.name for p in Path("new/masks").iterdir()}
    assert names == {f"{n}{s}" for n in "abc" for s in (".tif", ".overlay.png")}
    shapes = [(300, 260), (211, 330), (257, 257)]
    for report, shape in zip(reports, shapes, strict=True):
        mask = tifffile.imread(report["out"])
        assert mask.shape == shape
        assert mask.dtype == np.uint8
        assert report["class_share"]["nucleus"] == pytest.approx((mask == 1).mean())
        assert 0.01 < report["class_share"]["nucleus"] < 0.7
    code, _, err = cli("predict", engine_folder, images, "--out", "new/masks")
    assert code == 2
    assert "--overwrite" in err
    assert cli("predict", engine_folder, images, "--out", "new/masks", "--overwrite")[0] == 0


def test_zarr_folders_and_urls_are_images_and_zarr_is_an_output(
    cli: Callable[..., Outcome], engine_folder: Path, images: Path
) -> None:
    zarr, fsspec = pytest.importorskip("zarr"), pytest.importorskip("fsspec")
    pixels = tifffile.imread(images / "a.tif")
    group = zarr.create_group("in/cells.ome.zarr")
    for level in (0, 1):
        group.create_array(str(level), data=np.ascontiguousarray(pixels[:: level + 1, :: level + 1]), chunks=(64, 64))
    steps = [{"path": str(n), "coordinateTransformations": [{"type": "scale", "scale": [n + 1] * 2}]} for n in (0, 1)]
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": steps}]}
    fsspec.filesystem("memory").pipe("/bucket/url.tif", (images / "a.tif").read_bytes())
    code, _, err = cli("predict", engine_folder, "in", "memory://bucket/url.tif", "--out", "masks")
    assert code == 0, err
    first, second = (tifffile.imread(f"masks/{name}.tif") for name in ("cells", "url"))
    np.testing.assert_array_equal(first, second)
    for again in ([], ["--overwrite"]):  # the folder is there the second time
        code, text, err = cli("predict", engine_folder, "in", "--out", "mask.ome.zarr", "--level", 1, *again)
        assert code == 0, err
        assert "cells.ome.zarr YX 150x130 uint16" in text
        assert zarr.open_group("mask.ome.zarr", mode="r")["0"].shape == (150, 130)
    code, _, err = cli("predict", engine_folder, "in", "memory://bucket/url.tif", "--out", "mask.ome.zarr")
    assert code == 2
    assert "2 images need a folder" in err
    code, _, err = cli("predict", engine_folder, "in", "--out", "in/cells.ome.zarr", "--overwrite")
    assert code == 2
    assert "is an image to be predicted" in err


def test_overlays_draw_outlines_in_the_colour_of_the_label(
    cli: Callable[..., Outcome], engine_folder: Path, images: Path
) -> None:
    for values in ("0,1", "0,255", "7,3"):
        options = ["--out", "mask.npy", "--overlay", "--overwrite", "--mask-values", values]
        assert cli("predict", engine_folder, images / "a.tif", *options)[0] == 0
        mask = np.load("mask.npy") == int(values.split(",")[1])
        picture = np.array(Image.open("mask.overlay.png"))
        assert picture.shape == (*mask.shape, 3)
        coloured = (picture == COLOURS[1]).all(axis=-1)
        inner = mask.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                inner &= np.roll(mask, step, axis)
        assert coloured.any()
        assert coloured[mask & ~inner][10:-10].mean() > 0.3
        grey = (picture == picture[..., :1]).all(axis=-1)
        assert grey[~mask].mean() > 0.9  # what is background stays as it was
        assert not grey[inner & (picture.max(axis=-1) < 250)].any()


def test_a_png_of_labels_says_why_it_looks_black(
    cli: Callable[..., Outcome], engine_folder: Path, images: Path
) -> None:
    assert "--mask-values" in cli("predict", engine_folder, images / "a.tif", "--out", "a.png")[1]
    seen = cli("predict", engine_folder, images / "a.tif", "--out", "b.png", "--mask-values", "0,255")[1]
    assert "--mask-values" not in seen


@pytest.mark.parametrize(("shape", "tile"), [((1, 1), "192x192"), ((40, 33), "192x192"), ((9, 400), "2000x2000")])
def test_images_smaller_than_a_tile_are_grown(
    shape: tuple[int, int], tile: str, cli: Callable[..., Outcome], engine_folder: Path, sample_images: list[Array]
) -> None:
    np.save("small.npy", np.tile(sample_images[0], (1, 2))[: shape[0], : shape[1]])
    code, _, err = cli("predict", engine_folder, "small.npy", "--out", "mask.npy", "--tile", tile)
    assert (code, err) == (0, "")
    assert np.load("mask.npy").shape == shape


def test_probabilities_and_batches(cli: Callable[..., Outcome], engine_folder: Path, images: Path) -> None:
    for batch in (1, 7):
        options = ["--output", "probability", "--batch", batch, "--tile", "128x128", "--overwrite"]
        assert cli("predict", engine_folder, images / "b.npy", "--out", f"p{batch}.npy", *options)[0] == 0
    one, seven = np.load("p1.npy"), np.load("p7.npy")
    assert one.shape == (2, 211, 330)
    assert one.dtype == np.float32
    np.testing.assert_allclose(one.sum(axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(one, seven, atol=1e-6)


def test_real_micrographs_of_every_kind(
    cli: Callable[..., Outcome], engine_folder: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(shared / "data/em3d/sample1_input.h5") as file:
        volume = file["main"][:3]
    tifffile.imwrite("em.tif", volume, imagej=True, metadata={"axes": "ZYX", "spacing": 0.04, "unit": "micron"})
    code, out, _ = cli("predict", engine_folder, "em.tif", "--out", "em-mask.tif")
    assert code == 0
    assert "em.tif ZYX 3x192x192 uint8: 1 channel, 2-D network over 3 planes" in out
    assert tifffile.imread("em-mask.tif").shape == (3, 192, 192)
    colour = shared / "data/dsb2018/image/00ae65c1c663.png"
    code, _, err = cli("predict", engine_folder, colour, "--out", "colour.tif")
    assert code == 2
    assert "--channels luma" in err
    assert cli("predict", engine_folder, colour, "--out", "colour.tif", "--channels", "luma")[0] == 0
    grey = np.array(Image.open(shared / "data/dsb2018/image/0402a81e7526.png"))
    assert grey.shape == (260, 347)
    truth = np.array(Image.open(shared / "data/dsb2018/label/0402a81e7526.png")) > 0
    Image.fromarray(np.dstack([grey, grey, grey, np.full_like(grey, 255)])).save("rgba.png")
    assert cli("predict", engine_folder, "rgba.png", "--out", "rgba.npy")[0] == 0
    mask = np.load("rgba.npy") > 0
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.75


def test_a_read_only_engine_is_not_touched(cli: Callable[..., Outcome], engine_folder: Path, images: Path) -> None:
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in engine_folder.iterdir()}
    engine_folder.chmod(0o555)
    try:
        assert cli("predict", engine_folder, images / "a.tif", "--out", "mask.tif")[0] == 0
        assert cli("verify", engine_folder)[0] == 0
    finally:
        engine_folder.chmod(0o755)
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in engine_folder.iterdir()} == before
    assert {p.name for p in Path().iterdir()} == {"images", "mask.tif"}


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_says_yes_with_exit_code_0(cli: Callable[..., Outcome], engine_folder: Path, images: Path) -> None:
    code, out, _ = cli("verify", engine_folder)
    assert code == 0
    assert "on its exam: inside the budget" in out
    code, out, err = cli("verify", engine_folder, "--images", images, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["accepted"] is True
    assert len(report["verdict"]["images"]) == 3
    assert "3 windows" in err
    assert not Path("verify-worst.png").exists()


def test_verify_says_no_with_exit_code_1_and_a_picture(
    cli: Callable[..., Outcome], engine_folder: Path, images: Path
) -> None:
    other = onnx.load(str(shipped_model()))
    last = next(n for n in reversed(other.graph.node) if n.op_type == "Conv")
    (bias,) = (i for i in other.graph.initializer if i.name == last.input[2])
    moved = numpy_helper.to_array(bias) + np.array([0.0, 0.5], np.float32)
    bias.CopyFrom(numpy_helper.from_array(moved, bias.name))
    onnx.save(other, "other.onnx")
    code, out, err = cli("verify", engine_folder, "--images", images, "--baseline", "other.onnx", "--json")
    assert code == 1
    report = json.loads(out)
    assert report["accepted"] is False
    assert report["verdict"]["label_change"] > report["budget"]["label_change"]
    assert "OUTSIDE the budget" in err
    picture = np.array(Image.open(report["picture"]))
    assert Path(report["picture"]) == Path("verify-worst.png")
    height, width = picture.shape[:2]
    assert width > 3 * height * 0.8  # four panels side by side
    assert (picture[18:, -height // 2 :] == 255).all(axis=-1).any()  # the last one shows where labels differ


# --- stdout, stderr, terminals --------------------------------------------------------------------------------------


def test_json_owns_stdout(engine_folder: Path, images: Path) -> None:
    for argv in (
        ["inspect", shipped_model()],
        ["predict", engine_folder, images / "a.tif", "--out", "mask.tif", "--overlay"],
        ["predict", engine_folder, images / "a.tif", "--out", "mask.tif"],
        ["doctor"],
        ["verify", engine_folder],
    ):
        done = subprocess.run(command(*argv, "--json"), env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode in (0, 2), done.stderr
        document = json.loads(done.stdout)
        assert ("error" in document) == (done.returncode == 2)
        assert "Traceback" not in done.stderr
        assert "\r" not in done.stderr  # progress bars are for terminals


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals(
    cli: Callable[..., Outcome], engine_folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("verify", engine_folder, "--images", images)[2] == ""
    terminal = _Terminal()
    with contextlib.redirect_stderr(terminal):
        assert main(["verify", str(engine_folder), "--images", str(images)]) == 0
    assert "3/3: c.png" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\033[K")  # and leaves the line empty


def test_bars_of_long_predictions_show_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = Bar("large.tif", Narrator())
    for done in range(5):
        bar(done, 8)
        now[0] += 3
    shown = terminal.getvalue()
    assert "large.tif" in shown
    assert "4/8" in shown
    assert "<00:" in shown


@POSIX
def test_a_closed_pipe_ends_quietly_and_keeps_the_mask(engine_folder: Path, images: Path) -> None:
    for argv in (["inspect", shipped_model()], ["predict", engine_folder, images / "a.tif", "--out", "mask.tif"]):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            done = subprocess.run(
                command(*argv), env=environment(), stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 141
        assert done.stderr == ""
    assert tifffile.imread("mask.tif").shape == (300, 260)


# --- interruptions, full disks --------------------------------------------------------------------------------------


def _interrupted(argv: Sequence[object], number: int, folder: Path) -> Outcome:
    """Sends a signal once the output is being written."""
    with subprocess.Popen(
        command(*argv),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # shells start background jobs, CI's among them, with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not any(".part" in p.name for p in folder.iterdir()):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, out, err


@POSIX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("name", ["mask.tif", "mask.png", "mask.npy"])
def test_interrupted_predictions_leave_nothing(
    number: int, code: int, name: str, engine_folder: Path, here: Path
) -> None:
    np.save("large.npy", np.random.default_rng(0).integers(0, 4000, (4000, 3000), np.uint16))
    folder = here / "out"
    folder.mkdir()
    argv = ["predict", engine_folder, "large.npy", "--out", folder / name, "--tile", "128x128", "--threads", "1"]
    if name.endswith(".npy"):
        (folder / name).write_bytes(b"an older result")
        argv += ["--overwrite", "--json"]
    got, out, err = _interrupted(argv, number, folder)
    assert got == code
    assert err.count("\n") == 1
    assert "no half-written output is left" in err
    if name.endswith(".npy"):
        assert json.loads(out)["error"]["type"] in ("Terminated", "Interrupted")
        assert (folder / name).read_bytes() == b"an older result"
        (folder / name).unlink()
    assert list(folder.iterdir()) == []


@POSIX
@pytest.mark.parametrize(("name", "limit"), [("mask.npy", 20_000), ("mask.tif", 600), ("mask.png", 600)])
def test_a_full_disk_leaves_nothing(name: str, limit: int, engine_folder: Path, images: Path, here: Path) -> None:
    import resource

    folder = here / "out"
    folder.mkdir()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        command("predict", engine_folder, images / "a.tif", "--out", folder / name, "--tile", "192x192"),
        env={**environment(), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited,  # no threads run at this point of the child
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert name in done.stderr
    assert "free some space" in done.stderr
    assert list(folder.iterdir()) == []


def test_one_bad_image_of_a_folder_is_named_and_the_others_stay(
    cli: Callable[..., Outcome], engine_folder: Path, images: Path
) -> None:
    (images / "b.npy").write_bytes(b"\x93NUMPY broken")
    code, out, err = cli("predict", engine_folder, images, "--out", "masks", "--json")
    assert code == 2
    assert "b.npy" in err
    assert "1 of 3 images were not predicted" in err
    reports = json.loads(out)
    assert [Path(r["image"]).name for r in reports] == ["a.tif", "b.npy", "c.png"]
    assert ["error" in r for r in reports] == [False, True, False]
    assert sorted(p.name for p in Path("masks").iterdir()) == ["a.tif", "c.tif"]


# --- signals during the start, streams that are closed or full ---------------------------------------------------------


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("error", ["", "raise ImportError('broken')", "raise RuntimeError"])
def test_a_signal_that_a_library_made_an_error_of_is_still_a_signal(number: int, error: str) -> None:
    """While a backend is imported, the interruption comes back as whatever the library raises."""
    program = (
        "import os, sys, importlib.util\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name != 'onnx': return None\n"
        f"        try: os.kill(os.getpid(), {int(number)})\n"
        f"        except BaseException: {error or 'raise'}\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from unet_rt.cli.main import main\n"
        f"sys.exit(main(['inspect', {str(shipped_model())!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 128 + number
    assert done.stderr.count("\n") == 1
    assert "no half-written output is left" in done.stderr


@POSIX
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_streams_may_be_closed(closed: tuple[int, ...], engine_folder: Path, images: Path) -> None:
    """The file that is opened next must not get the number of stderr, into which libraries print."""

    def close() -> None:
        for number in closed:
            os.close(number)

    for argv, code in ((["predict", engine_folder, images / "a.tif", "--out", "mask.png"], 0), (["inspect", "no"], 2)):
        done = subprocess.run(
            command(*argv), env=environment(), capture_output=True, text=True, check=False, preexec_fn=close
        )
        assert done.returncode == code, done.stderr
    assert np.asarray(Image.open("mask.png")).shape == (300, 260)


@POSIX
def test_nobody_needs_to_hear_an_error(engine_folder: Path, images: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    reader, writer = os.pipe()
    os.close(reader)
    with full.open("wb") as no_room, os.fdopen(writer, "wb") as no_reader:
        for stream in (no_room, no_reader):
            for argv, code in ((["inspect", shipped_model(), "--json"], 0), (["inspect", "no"], 2)):
                done = subprocess.run(
                    command(*argv), env=environment(), stdout=subprocess.PIPE, stderr=stream, text=True, check=False
                )
                assert done.returncode == code
