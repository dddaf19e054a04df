"""``--memory``: what a process takes, sampled from outside, stays below the bound until the output is whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import unet_rt as urt
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import ContractError, ImageError

pytestmark = [
    pytest.mark.onnxruntime,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is sampled from /proc"),
]
BOUND_MB = 290
SIDE = 4800
PREDICT = "import sys; from unet_rt.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of two convolutions, so that memory goes into pixels, and a large image."""
    onnx = pytest.importorskip("onnx")
    helper, folder = onnx.helper, tmp_path_factory.mktemp("memory")
    kernel = np.full((4, 1, 3, 3), 1 / 9, np.float32) * np.arange(1, 5, dtype=np.float32).reshape(4, 1, 1, 1)
    mix = np.array([[-1, -1, 0.5, 0.5], [1, 1, -0.5, 0.2]], np.float32).reshape(2, 4, 1, 1)
    weights = [onnx.numpy_helper.from_array(kernel, "k"), onnx.numpy_helper.from_array(mix, "m")]
    weights.append(onnx.numpy_helper.from_array(np.array([0.4, -0.4], np.float32), "b"))
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["a", "m", "b"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, 1, ["n", c, "h", "w"])] for name, c in (("x", 1), ("y", 2))]
    graph = helper.make_graph(nodes, "g", ends[0], ends[1], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "m.onnx")
    part = microscopy((600, 600), seed=3).image
    image = np.tile(part, (SIDE // 600, SIDE // 600))
    tifffile.imwrite(folder / "large.tif", image, tile=(256, 256), compression="zlib", compressionargs={"level": 1})
    tifffile.imwrite(folder / "strip.tif", image, rowsperstrip=SIDE, compression="zlib", compressionargs={"level": 1})
    contract = urt.Contract(task="multiclass", normalization=urt.Normalization("scale", scale=4095))
    options: dict[str, Any] = {"backend": "onnxruntime", "precision": "fp32", "tile": (512, 512), "contract": contract}
    urt.build(folder / "m.onnx", samples=[part], out=folder / "e.urt", **options).close()
    return folder


def sampled(*arguments: Any) -> tuple[int, dict[str, Any]]:
    """(largest resident memory seen, report) of a process that predicts."""
    command = [sys.executable, "-c", PREDICT, "predict", *map(str, arguments), "--json"]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while child.poll() is None:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            most = max([most, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))])
            time.sleep(0.01)
        out, err = (stream.read() if stream else b"" for stream in (child.stdout, child.stderr))
    assert child.returncode == 0, err
    return most, json.loads(out)[0]


@pytest.mark.parametrize(
    ("name", "output"),
    [("mask.tif", "mask"), ("prob.npy", "probability"), ("prob.zarr", "probability"), ("ids.tif", "instances")],
)
def test_the_whole_run_stays_within_its_bound(name: str, output: str, folder: Path, tmp_path: Path) -> None:
    options = ("--out", tmp_path / name, "--output", output, "--memory", f"{BOUND_MB}MB")
    most, report = sampled(folder / "e.urt", folder / "large.tif", *options)
    assert most < BOUND_MB * 10**6
    # The kernel counts pages of running threads by and by.
    assert 0.98 * most <= report["peak_rss_bytes"] < BOUND_MB * 10**6


def test_what_decodes_only_whole_is_said_before_it_is_decoded(folder: Path, tmp_path: Path) -> None:
    with urt.load(folder / "e.urt") as engine:
        options: dict[str, Any] = {"out": tmp_path / "a.tif", "memory_bytes": resident() + 70 * 10**6}
        with pytest.raises(ImageError, match=r"46 MB, which decode only whole: about 92 MB, and \d+ MB are left"):
            urt.predict(engine, folder / "strip.tif", **options)
        with pytest.raises(ContractError, match=r"too little memory .*use a larger --memory"):
            urt.predict(engine, folder / "large.tif", **options | {"memory_bytes": 10**7})
    assert list(tmp_path.iterdir()) == []


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
