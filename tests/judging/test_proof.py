"""The proof of a machine: each section is heard whatever becomes of the others, and what was found survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unet_rt as urt
from unet_rt.cli.main import main
from unet_rt.cli.proof import disagreements, proof_text
from unet_rt.graph.paper import write_paper
from unet_rt.judging.proof import kernels, run
from unet_rt.judging.proof.prove import prove, sections
from unet_rt.judging.proof.section import Section

PATH = os.pathsep.join([str(Path(urt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


def test_kernels_agree_with_numpy_and_other_sections_say_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", PATH)
    report = prove("cpu", {"cpu": "this"}, out=tmp_path / "r.json", only=["kernels", "nuclei-tensorrt"])
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == report
    rows = report["sections"]["kernels"]["kernels"]
    assert {row["name"].split()[0] for row in rows} == {
        "tile_gather", "tile_stitch", "tile_blend", "blend_finish", "crop_concat", "histogram"
    }  # fmt: skip
    assert all(row["agrees"] for row in rows)
    assert report["complete"]
    assert disagreements(report) == []
    assert report["sections"]["nuclei-tensorrt"]["failed"][0]["why"]
    text = proof_text(report)
    assert "all that ran agrees" in text
    assert "no result: nuclei-tensorrt: " in text


def test_a_kernel_that_is_wrong_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.calls.crop_concat

    def wrong(skip: Any, up: Any, out: Any, **more: Any) -> None:
        real(skip, up, out, **more)
        out[0, 0, 0, 0] = np.nextafter(out[0, 0, 0, 0], np.float32(9))

    monkeypatch.setattr(kernels.calls, "crop_concat", wrong)
    section = Section("kernels", "cpu", tmp_path, time.time() + 60, lambda _: None)
    kernels.section_kernels(section)
    report = {"unet_rt": "0", "device": "cpu", "seconds": 1.0, "sections": {"kernels": section.figures}}
    assert disagreements(report) == []  # one unit in the last place of a float is rounding
    monkeypatch.setattr(kernels.calls, "histogram", lambda values, counts: counts.fill(1))
    kernels.section_kernels(section)
    assert disagreements(report) == ["histogram on cpu"]
    assert "DISAGREES: histogram on cpu" in proof_text(report)


def test_an_interrupted_proof_leaves_what_it_found(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "unet_rt", "doctor", "--prove", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": PATH}
    with subprocess.Popen(
        [*command, "--only", "kernels", "nuclei-onnxruntime", "eager"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("[nuclei-onnxruntime]"):
                break
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(60) == 130
    report = json.loads(out.read_text(encoding="utf-8"))
    assert not report["complete"]
    assert len(report["sections"]["kernels"]["kernels"]) == 10
    assert "interrupted" in report["sections"]["nuclei-onnxruntime"]["ended"]
    assert report["sections"]["eager"] == {"ended": "not begun: interrupted"} or "failed" in report["sections"]["eager"]
    assert "nuclei-onnxruntime: interrupted" in proof_text(report)


def test_a_section_that_crashes_or_hangs_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "GRACE_S", 0.5)
    monkeypatch.setattr(run, "LEAST_S", 0.1)
    what = {
        "crash": "s.figures['doing'] = 'a kernel'; s.add('t', a=1); os.abort()",
        "hang": "s.add('t', a=2); time.sleep(60)",
        "good": "s.add('t', a=3)",
    }

    def command(name: str, limit: float, without: Sequence[str]) -> list[str]:
        begin = f"s = Section({name!r}, 'cpu', Path({str(tmp_path)!r}), 0, lambda _: None)\n"
        script = f"import os, time\nfrom pathlib import Path\nfrom {Section.__module__} import Section\n{begin}"
        return [sys.executable, "-c", script + ("s.add('t', a=0)" if without else what[name])]

    monkeypatch.setenv("PYTHONPATH", PATH)
    seen: list[int] = []
    runner = run.Runner(command, tmp_path, 600.0, lambda results: seen.append(len(results)), ("kernel",))
    found = runner.run({"crash": 60.0, "hang": 8.0, "good": 60.0})
    assert seen == [1, 2, 3]
    assert "in: a kernel" in found["crash"]["ended"]
    assert "run again without kernel" in found["crash"]["ended"]
    assert found["hang"] == {"t": [{"a": 2}], "ended": "stopped after 8 s"}
    assert found["good"] == {"t": [{"a": 3}]}
    late = run.Runner(command, tmp_path, 5.0, lambda _: None).run({"good": 60.0})
    assert "not begun" in late["good"]["ended"]


def test_every_network_meets_every_backend() -> None:
    names = list(sections("cpu"))
    for network in ("nuclei", "paper", "membranes"):
        assert {f"{network}-onnxruntime", f"{network}-openvino", f"{network}-tensorrt"} <= set(names)


def test_a_report_needs_a_place_that_can_be_written(capsys: Any) -> None:
    assert main(["doctor", "--prove", "--device", "cpu", "--only", "kernels", "--out", "/no/such/folder/r.json"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_papers_network_is_the_papers(tmp_path: Path) -> None:
    """Of an eighth of its width: 572 px become 388, with the reach that the paper's figure has."""
    write_paper(tmp_path / "paper.onnx", 8)
    output = urt.inspect(tmp_path / "paper.onnx").outputs[0]
    assert output.exact
    assert [output.field[0].out_size(572), output.field[0].stride, output.channels] == [388, 16, 2]


@pytest.mark.onnxruntime
def test_nodes_without_names_get_no_name_in_common(tmp_path: Path) -> None:
    """Names of nodes are optional in ONNX. Two up-convolutions without one became two nodes of one name, refused."""
    from unet_rt import backends

    write_paper(tmp_path / "paper.onnx", 4)
    backend = backends.get("onnxruntime")
    backend.build(tmp_path / "paper.onnx", tmp_path / "built.onnx", precision="fp32")
    with backend.load(tmp_path / "built.onnx", precision="fp32", threads=1) as session:
        assert session.run([np.zeros((1, 1, 188, 188), np.float32)])[0].shape == (1, 2, 4, 4)
