"""Folders of images: tables of all, what goes on after an interruption, what is left alone."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage import measure

import unet_rt as urt
from unet_rt.cli.folder import Item, advice_text
from unet_rt.cli.main import main
from unet_rt.cli.texts import run_text
from unet_rt.prediction.report import RunReport

pytestmark = pytest.mark.onnxruntime
Array = np.ndarray[Any, np.dtype[Any]]
Outcome = tuple[int, str, str]


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
    """A folder of a TIFF with its pixel size, a PNG and a stack of two channels and two moments."""
    folder = Path("images")
    folder.mkdir()
    first, second, third = sample_images
    form = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(folder / "a.tif", first[:200, :200], **form)
    Image.fromarray((second[:200, :200] // 16).clip(0, 255).astype(np.uint8)).save(folder / "b.png")
    stack = np.stack([first[50:200, 60:210], third[:150, :150], second[:150, 9:159], third[9:159, :150]])
    stack = stack.reshape(2, 2, 150, 150)
    tifffile.imwrite(folder / "c.tif", stack, imagej=True, metadata={"axes": "TCYX", "mode": "composite"})
    return folder


def rows(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


INSTANCES = ("--output", "instances", "--channels", "0", "--min-size", "5")


def test_a_folder_has_one_table_outlines_and_a_summary(
    cli: Callable[..., Outcome], exact_folder: Path, images: Path
) -> None:
    tables = ("--objects", "all.csv", "--areas", "classes.csv", "--geojson", "outlines")
    code, out, err = cli("predict", exact_folder, images, "--out", "ids", *INSTANCES, *tables)
    assert (code, err) == (0, "")
    table, found = rows("all.csv"), {}
    for name, planes in (("a.tif", 1), ("b.png", 1), ("c.tif", 2)):
        ids = tifffile.imread(Path("ids") / f"{name[0]}.tif")
        assert ids.dtype == np.uint16
        ids = ids.reshape(planes, *ids.shape[-2:])
        pixels = np.asarray(Image.open(images / name)) if name == "b.png" else tifffile.imread(images / name)
        pixels = pixels.reshape(planes, -1, *ids.shape[-2:])
        own = [row for row in table if row["image"] == name]
        assert [row["plane"] for row in own] == sorted(row["plane"] for row in own)
        for plane in range(planes):
            regions = measure.regionprops(ids[plane], np.moveaxis(pixels[plane], 0, -1))
            lines = [row for row in own if int(row["plane"]) == plane]
            assert len(lines) == len(regions) > 3
            for row, region in zip(lines, regions, strict=True):
                assert int(row["id"]) == region.label
                assert int(row["area_px"]) == region.area
                assert row["area_um2"] == (str(region.area / 4) if name == "a.tif" else "")
                assert [row["t"], row["z"]] == ([str(plane), ""] if name == "c.tif" else ["", ""])
                box = tuple(int(row[f"{what}_{axis}"]) for what in ("start", "stop") for axis in "yx")
                assert box == region.bbox
                means = [float(row[f"mean_{k}"]) for k in range(pixels.shape[1])]
                np.testing.assert_allclose(means, region.intensity_mean, rtol=1e-12)
                assert [row["mean_1"] == ""] == [name != "c.tif"]
        areas = np.array([int(row["area_px"]) for row in own])
        found[name] = areas
        features = json.loads((Path("outlines") / f"{name[0]}.geojson").read_text())["features"]
        assert [f["properties"]["measurements"]["area px"] for f in features] == areas.tolist()
        planes_of = [f["geometry"].get("plane") for f in features]
        expected = [{"c": -1, "z": 0, "t": int(row["plane"])} for row in own]
        assert planes_of == (expected if name == "c.tif" else [None] * len(own))
    for row in rows("ids/summary.csv"):
        areas = found[row["image"]]
        size = 2 * 150 * 150 if row["image"] == "c.tif" else 200 * 200
        assert (int(row["objects"]), float(row["median_area_px"])) == (len(areas), np.median(areas))
        assert float(row["area_share"]) == pytest.approx(areas.sum() / size)
        assert f"{len(areas)} objects, median " in out
    assert {row["image"] for row in rows("classes.csv")} == set(found)
    assert sorted(path.name for path in Path().iterdir()) == ["all.csv", "classes.csv", "ids", "images", "outlines"]


def test_what_is_there_is_skipped_and_its_lines_are_kept(
    cli: Callable[..., Outcome], exact_folder: Path, images: Path
) -> None:
    whole = ("predict", exact_folder, images, "--out", "ids", *INSTANCES, "--objects", "all.csv")
    assert cli(*whole)[0] == 0
    table, summary = rows("all.csv"), rows("ids/summary.csv")
    code, _, err = cli(*whole)
    assert code == 2
    assert "ids/a.tif exists; pass --overwrite to replace it, --skip-existing to keep it" in err
    Path("ids/b.tif").unlink()
    Path("ids/a.tif").write_bytes(b"kept")
    code, out, err = cli(*whole, "--skip-existing", "--json")
    assert (code, [one.get("state") for one in json.loads(out)]) == (0, ["skipped", "skipped", None])
    assert "2 of 3 images: skipped" in err
    assert Path("ids/a.tif").read_bytes() == b"kept"

    def by_image(row: dict[str, str]) -> str:
        return row["image"]

    assert sorted(rows("all.csv"), key=by_image) == table
    assert sorted(rows("ids/summary.csv"), key=by_image) == summary
    Path("ids/summary.csv").unlink()
    assert "2 skipped images, a.tif first, are not in the tables" in (
        Path("ids/b.tif").unlink() or cli(*whole, "--skip-existing")[2]
    )
    assert cli("predict", exact_folder, images / "a.tif", "--out", "ids/a.tif", "--skip-existing")[0] == 0
    assert Path("ids/a.tif").read_bytes() == b"kept"
    assert cli(*whole, "--skip-existing", "--overwrite")[0] == 2


def test_a_folder_that_was_cut_off_goes_on(
    cli: Callable[..., Outcome], exact_folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unet_rt.prediction import predict as module

    tables = ("--objects", "all.csv", "--geojson", "gj")
    command = ("predict", exact_folder, images, "--out", "new/ids", *INSTANCES, *tables)
    assert cli("predict", exact_folder, images, "--out", "whole", *INSTANCES, "--objects", "whole.csv")[0] == 0

    def until(stop: int) -> tuple[Outcome, list[str]]:
        """The command, with Ctrl-C at the image of that number; and the images that it was at."""
        run, begun = module.run_blocks, list[str]()

        def interrupted(*args: Any, **options: Any) -> Any:
            begun.append(args[0].image.name)
            if len(begun) == stop:
                raise KeyboardInterrupt
            return run(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(module, "run_blocks", interrupted)
            return cli(*command), begun

    (code, _, err), _ = until(1)
    assert (code, sorted(path.name for path in Path().iterdir())) == (130, ["images", "whole", "whole.csv"])
    assert "goes on" not in err
    (code, _, err), _ = until(2)
    assert code == 130
    assert "1 of 3 images are done and kept in new/ids; the same command goes on with the rest" in err
    assert sorted(path.name for path in Path("new/ids").iterdir()) == ["a.tif"]
    assert not Path("all.csv").exists()
    assert cli(*command, "--min-size", "9")[0] == 2, "another command does not go on with this one's images"
    Path("new/ids/b.tif").write_bytes(b"a kill came between this output and its mark")
    (code, out, err), begun = until(99)
    assert (code, begun) == (0, ["b.png", "c.tif"]), err
    assert "1 of 3 images: done by an earlier run" in out
    assert rows("all.csv") == rows("whole.csv")
    assert Path("new/ids/summary.csv").read_bytes() == Path("whole/summary.csv").read_bytes()
    for name in "abc":
        np.testing.assert_array_equal(tifffile.imread(f"new/ids/{name}.tif"), tifffile.imread(f"whole/{name}.tif"))
    assert [path.name for path in Path("new").iterdir()] == ["ids"]
    assert cli(*command)[0] == 2, "a finished command does not go on"


def test_an_image_that_changed_is_predicted_again(
    cli: Callable[..., Outcome], exact_folder: Path, images: Path
) -> None:
    good = (images / "b.png").read_bytes()
    (images / "b.png").write_bytes(good[:50])
    command = ("predict", exact_folder, images, "--out", "ids", "--channels", "0")
    code, _, err = cli(*command)
    assert code == 2
    assert "error: images/b.png: " in err
    assert "1 of 3 images were not predicted; the same command tries them again" in err
    (images / "b.png").write_bytes(good)
    pixels = tifffile.imread(images / "a.tif")
    tifffile.imwrite(images / "a.tif", pixels[:150])
    code, out, err = cli(*command)
    assert (code, err) == (0, "")
    assert "1 of 3 images: done by an earlier run" in out
    assert [tifffile.imread(f"ids/{name}.tif").shape[-2:] for name in "abc"] == [(150, 200), (200, 200), (150, 150)]
    assert sorted(path.name for path in Path().iterdir()) == ["ids", "images"]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_says_what_is_kept(exact_folder: Path, here: Path, sample_images: list[Array]) -> None:
    Path("images").mkdir()
    for k in range(40):
        np.save(f"images/{k:02d}.npy", sample_images[0])
    argv = [sys.executable, "-m", "unet_rt", "predict", exact_folder, "images", "--out", "masks"]
    parent = str(Path(urt.__file__).resolve().parents[1])
    with subprocess.Popen(
        list(map(str, argv)),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([parent, os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while len(list(Path().glob("masks/*.tif"))) < 2:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    done = int(err.partition(" of 40 images are done and kept in masks; the same command goes on")[0])
    assert done >= 1
    assert len(list(Path("masks").glob("*.tif"))) in (done, done + 1)


def test_odd_images_are_named_once() -> None:
    def report(share: float | None) -> RunReport:
        return RunReport("", "", "", "", "", outside_range=share)

    items = [Item(Path("in") / name, Path(name), None, None) for name in "abc"]
    odd = list(zip(items, map(report, (0.06, None, 0.3)), strict=True))
    text = advice_text(odd, 0.05)
    assert text == (
        "2 of 3 images have more than 5% of pixels outside the range seen at build, most in/c (30%): look whether the "
        "results are right"
    )
    assert "look whether the result is right" in advice_text(odd[:1], 0.05)
    assert advice_text(odd[1:2], 0.05) == ""
    assert "look whether" not in run_text(report(0.04))


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--geojson", "one.geojson"), ("3 images", "one.geojson", "folder")),
        (("--objects", "all.csv", "--shard", "0/2"), ("shards", "one by one")),
    ],
)
def test_what_makes_no_sense_is_refused(
    cli: Callable[..., Outcome], exact_folder: Path, images: Path, options: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    code, _, err = cli("predict", exact_folder, images, "--out", "ids", "--output", "instances", *options)
    assert code == 2
    assert all(text in err for text in texts), err
    assert [path.name for path in Path().iterdir()] == ["images"]
