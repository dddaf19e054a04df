"""The demo: the network that ships with unet-rt, a large drawn image, and everything a user would do with them."""

from __future__ import annotations

import importlib.resources
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..building.build import build
from ..building.report import BuildReport
from ..drawing.microscopy import microscopy
from ..engine import parity as parity_module
from ..engine.load import load
from ..errors import GraphError, OutputError
from ..judging.verify import verify
from ..prediction.predict import predict
from ..prediction.report import RunReport
from ..prediction.work import Progress
from ..system.durable import Disk
from .texts import build_text, run_text, verify_text

SHIPPED = ("nuclei", "membranes")
SAMPLES = 4
SAMPLE_PX = 768


def shipped_model(name: Literal["nuclei", "membranes"] = "nuclei") -> Path:
    """A trained ONNX U-Net that ships with the package; its recipe and figures lie beside it, in ``NAME.json``.

    Args:
        name: ``nuclei`` in fluorescence microscopy (same-padded), or cells and their ``membranes`` in electron
            microscopy (valid-padded, the paper's network at an eighth of its width; trained on drawn sections alone).

    Raises:
        GraphError: there is no such network.
    """
    if name not in SHIPPED:
        raise GraphError(f"no network called {name!r} ships with unet-rt; choose {' or '.join(SHIPPED)}")
    return Path(str(importlib.resources.files("unet_rt") / "data" / f"{name}.onnx"))


def demo(
    out: Path, *, size: int = 4096, say: Callable[[str], None], progress: Progress | None = None
) -> dict[str, Any]:
    """Draws, builds, predicts, verifies; leaves mask, overlay and report in ``out``.

    Args:
        out: Folder for the results; replaced only where it is an earlier demo's.
        size: Side of the drawn image in pixels.
        say: Receives what is being done.
        progress: As for ``predict``.

    Returns:
        Paths and figures, as JSON values.

    Raises:
        OutputError: ``out`` exists and is not a demo's.
    """
    import tifffile

    marker = ".unet-rt-demo"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / marker).exists())):
        raise OutputError(f"{out} exists and is not an earlier demo's; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / marker).touch()

    say(f"drawing {SAMPLES} sample images of {SAMPLE_PX} px and one of {size} x {size} px")
    samples = out / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    samples.mkdir()
    for k in range(SAMPLES):
        tifffile.imwrite(samples / f"sample-{k}.tif", microscopy((SAMPLE_PX, SAMPLE_PX), seed=9000 + k).image)
    drawn = microscopy((size, size), seed=9100)
    image = out / "image.tif"
    tifffile.imwrite(image, drawn.image)

    say("\nunet-rt build nuclei.onnx --samples samples")
    builds: list[BuildReport] = []
    engine_folder = out / "nuclei.urt"
    build(
        shipped_model(), samples=samples, out=engine_folder, overwrite=True, report=builds.append, say=lambda text: None
    ).close()
    say(build_text(builds[0]))

    say("\nunet-rt predict nuclei.urt image.tif --out mask.tif --overlay")
    runs: list[RunReport] = []
    with load(engine_folder) as engine:
        predict(
            engine,
            image,
            out=out / "mask.tif",
            mask_values=(0, 255),
            overlay=out / "overlay.png",
            overwrite=True,
            progress=progress,
            report=runs.append,
        )
    say(run_text(runs[0], out / "mask.tif"))

    say("\nunet-rt verify nuclei.urt --images samples")
    checked = verify(engine_folder, samples, picture=out / "worst-tile.png")
    say(verify_text(checked))

    mask = tifffile.imread(out / "mask.tif") > 0
    truth = drawn.truth > 0
    union = int(np.count_nonzero(mask | truth))
    iou = int(np.count_nonzero(mask & truth)) / union if union else 1.0
    dice = parity_module.dice(mask, truth)
    say(f"\nagainst the drawing's truth: IoU {iou:.4f}, Dice {dice:.4f}")
    worst = (
        "![worst tile](worst-tile.png)\n"
        if checked.picture is not None
        else "The engine changed no label of the samples.\n"
    )
    text = (
        f"# unet-rt demo\n\nA drawn micrograph of {size} x {size} px, segmented by the network that ships with unet-rt.\n\n"
        f"![overlay](overlay.png)\n\n## Build\n\n```\n{build_text(builds[0])}\n```\n\n"
        f"## Predict\n\n```\n{run_text(runs[0], Path('mask.tif'))}\n```\n\n"
        f"Against the drawing's truth: IoU {iou:.4f}, Dice {dice:.4f}.\n\n"
        f"## Verify\n\n```\n{verify_text(checked)}\n```\n\n{worst}"
    )
    Disk().write_whole(out / "report.md", text.encode())
    return {
        "folder": str(out),
        "engine": str(engine_folder),
        "mask": str(out / "mask.tif"),
        "overlay": str(out / "overlay.png"),
        "report": str(out / "report.md"),
        "iou": iou,
        "dice": dice,
        "build": builds[0].to_json(),
        "predict": runs[0].to_json(),
        "verify": checked.to_json(),
    }
