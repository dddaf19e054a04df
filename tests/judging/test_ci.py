"""Parity in other people's CI: files that services read, pytest's own tests, the GitHub Action run as a script."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper
from PIL import Image

import unet_rt as urt
from unet_rt.cli.demo import shipped_model
from unet_rt.cli.main import main
from unet_rt.drawing.microscopy import microscopy
from unet_rt.judging.verify import verify

pytestmark = pytest.mark.onnxruntime
ACTION = Path(__file__).parents[2] / "action.yml"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(urt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an engine, images, and two released models: the engine's own and one whose weights changed."""
    root = tmp_path_factory.mktemp("ci")
    (root / "images").mkdir()
    for seed in range(2):
        Image.fromarray(microscopy((224, 256), seed=seed, dtype=np.uint8).image).save(
            root / "images" / f"cells-{seed}.png"
        )
    built: Any = {"precision": "fp32", "backend": "onnxruntime", "device": "cpu", "tile": (128, 128), "threads": 1}
    urt.build(shipped_model(), samples=root / "images", out=root / "model.urt", **built).close()
    shutil.copyfile(shipped_model(), root / "same.onnx")
    proto = onnx.load(str(shipped_model()))
    bias = next(t for t in proto.graph.initializer if t.name == proto.graph.node[-1].input[2])
    moved = numpy_helper.to_array(bias).copy()
    moved[-1] += 1.0
    bias.CopyFrom(numpy_helper.from_array(moved, bias.name))
    onnx.save(proto, str(root / "changed.onnx"))
    return root


def picture_width(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.size[0]


def run_verify(place: Path, out: Path, *more: str) -> int:
    files = ["--junit", str(out / "v.xml"), "--markdown", str(out / "v.md"), "--picture", str(out / "worst.png")]
    return main(
        ["verify", str(place / "model.urt"), "--images", str(place / "images"), "--threads", "1", *files, *more]
    )


def test_a_model_that_changed_is_a_failure_with_a_picture(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_verify(place, tmp_path, "--baseline", str(place / "changed.onnx")) == 1
    suite = ElementTree.parse(tmp_path / "v.xml").getroot()[0]
    failed = {case.get("name") for case in suite if case.find("failure") is not None}
    assert (
        {case.get("name") for case in suite} == {"cells-0.png", "cells-1.png", "all images inside the budget"} == failed
    )
    assert (suite.get("tests"), suite.get("failures")) == ("3", "3")
    attached = re.search(r"\[\[ATTACHMENT\|(.*)\]\]", suite[-1].findtext("system-out") or "")
    assert attached is not None
    assert picture_width(Path(attached[1])) > 200
    text = (tmp_path / "v.md").read_text(encoding="utf-8")
    assert "is outside its budget" in text
    assert "](worst.png)" in text
    assert len(re.findall(r"^\| cells-\d.png \|.*❌ \|$", text, re.MULTILINE)) == 2


@pytest.mark.parametrize("baseline", ["same.onnx", "model.urt", None])
def test_the_model_itself_passes(place: Path, tmp_path: Path, baseline: str | None, capsys: Any) -> None:
    more = [] if baseline is None else ["--baseline", str(place / baseline)]
    assert run_verify(place, tmp_path, *more) == 0
    suite = ElementTree.parse(tmp_path / "v.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("3", "0")
    assert "is inside its budget" in (tmp_path / "v.md").read_text(encoding="utf-8")
    assert "❌" not in (tmp_path / "v.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("bound", "code"), [("1e-3", 1), ("1e3", 0)])
def test_speed_is_a_verdict_of_its_own(place: Path, tmp_path: Path, bound: str, code: int, capsys: Any) -> None:
    """No engine takes a thousandth of a bare library's time, nor a thousand times as long."""
    assert run_verify(place, tmp_path, "--speed", bound) == code
    cases = {case.get("name"): case.find("failure") for case in ElementTree.parse(tmp_path / "v.xml").getroot()[0]}
    assert cases["all images inside the budget"] is None
    assert (cases["speed"] is not None) == bool(code)
    assert "times as long as in ONNX Runtime alone" in (tmp_path / "v.md").read_text(encoding="utf-8")
    assert "times as long as in ONNX Runtime alone" in capsys.readouterr().out


def test_speed_needs_an_image_and_a_ratio(place: Path) -> None:
    with pytest.raises(urt.ImageError, match="pass --images"):
        verify(place / "model.urt", speed=1.0)
    with pytest.raises(urt.ContractError, match="is no ratio"):
        verify(place / "model.urt", place / "images", speed=-1.0, threads=1)


def run_pytest(place: Path, folder: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-p", "unet_rt.pytest_plugin", "-p", "no:cacheprovider", "-q", *options]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_pytest_gets_a_test_per_image(place: Path, tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own():\n    assert True\n", encoding="utf-8")
    named = ["--unet-rt-engine", str(place / "model.urt"), "--unet-rt-images", str(place / "images")]
    changed = ["--unet-rt-baseline", str(place / "changed.onnx")]
    code, said = run_pytest(place, tmp_path, "--junit-xml", "r.xml", "-k", "cells-1 or own", *changed, *named)
    assert code == 1, said
    assert "1 failed, 1 passed, 1 deselected" in said
    assert "cells-1.png: labels change" in said or "labels" in said
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()[0]
    case = next(case for case in suite if case.get("name") == "cells-1.png")
    properties = {p.get("name"): str(p.get("value")) for p in case.iter("property")}
    assert picture_width(Path(properties["picture"])) > 200
    assert Path(properties["picture"]).parent == tmp_path / "unet-rt-pictures"
    code, said = run_pytest(place, tmp_path, *named)
    assert (code, "3 passed" in said) == (0, True), said
    code, said = run_pytest(place, tmp_path, *named[:2])  # its exam
    assert (code, "2 passed" in said) == (0, True), said


def test_pytest_says_what_is_wrong_with_the_options(place: Path, tmp_path: Path) -> None:
    code, said = run_pytest(place, tmp_path, "--unet-rt-images", str(place / "images"))
    assert (code, "name the engine folder as well" in said) == (4, True), said
    wrong = ["--unet-rt-engine", "no.urt", "--unet-rt-budget", "labels=much"]
    code, said = run_pytest(place, tmp_path, *wrong)
    assert (code, "not KEY=NUMBER" in said) == (4, True), said


@pytest.mark.skipif(shutil.which("bash") is None, reason="the action's steps are bash")
@pytest.mark.parametrize(("baseline", "code"), [("changed.onnx", 1), ("same.onnx", 0)])
def test_the_action_s_steps_give_a_verdict_and_a_summary(place: Path, tmp_path: Path, baseline: str, code: int) -> None:
    """As GitHub runs them: inputs by the environment, outputs by files."""
    steps = [step for step in yaml.safe_load(ACTION.read_text(encoding="utf-8"))["runs"]["steps"] if "run" in step]
    inputs = {
        "python": sys.executable, "engine": place / "model.urt", "baseline": place / baseline,
        "images": place / "images", "budget": "label_change=1e-3 dice=0.99", "speed": "",
    }  # fmt: skip
    values = {f"${{{{ inputs.{name} }}}}": str(value) for name, value in inputs.items()}
    values |= {
        "${{ github.action_path }}": str(ACTION.parent),
        "${{ steps.keep.outputs.artifact-url }}": "https://x/artifact",
    }
    files = {name: str(tmp_path / name.lower()) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    codes = []
    for step in steps:
        told = {name: values[value] for name, value in step["env"].items()}
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", step["run"]],
            cwd=tmp_path, env={**ENVIRONMENT, **files, "RUNNER_TEMP": str(tmp_path), **told},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        codes.append(done.returncode)
    assert codes == [0, code, 0], done.stderr
    report = Path(Path(files["GITHUB_OUTPUT"]).read_text(encoding="utf-8").partition("=")[2].strip())
    assert json.loads((report / "verify.json").read_text(encoding="utf-8"))["accepted"] is (code == 0)
    assert (report / "verify-worst.png").is_file() == (code == 1)
    summary = Path(files["GITHUB_STEP_SUMMARY"]).read_text(encoding="utf-8")
    assert ("outside its budget" in summary) == (code == 1)
    assert "(https://x/artifact)" in summary
