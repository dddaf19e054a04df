"""The verb demo: the network that ships with unet-rt, a large drawn image, and everything a user would do with them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import GraphError, OutputError
from .options import add_verb, parse_side
from .printing import Bar, Narrator, print_json, text_stream

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..building.report import BuildReport
    from ..judging.verify import VerifyReport
    from ..prediction.report import RunReport
    from ..prediction.work import Progress

SHIPPED = ("nuclei", "membranes")
SAMPLES = 4
SAMPLE_PX = 768
ENGINE = "nuclei.urt"


def add_demo(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(verbs, "demo", _run, "build, predict and verify the network that ships with unet-rt on a drawn image")
    p.add_argument("--out", metavar="DIR", default="demo-output", help="folder for the results (default: demo-output)")
    p.add_argument("--size", type=parse_side, default=4096, metavar="PX", help="side of the image")


def _run(args: argparse.Namespace) -> int:
    begun = time.perf_counter()
    with Narrator() as narrator:
        result = demo(
            Path(args.out),
            size=args.size,
            say=lambda text: print(text, file=text_stream(args), flush=True),
            progress=Bar("demo", narrator),
        )
    if args.json:
        print_json(result)
    print(
        f"done in {time.perf_counter() - begun:.0f} s; look at {Path(args.out) / 'report.md'}", file=text_stream(args)
    )
    return 0


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
    import importlib.resources

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
    from ..judging.verify import verify
    from ..system.durable import Disk
    from .texts import verify_text

    _claim_folder(out)
    say(f"drawing {SAMPLES} sample images of {SAMPLE_PX} px and one of {size} x {size} px")
    truth = _draw_images(out, size)

    say("\nunet-rt build nuclei.onnx --samples samples")
    built = _build(out, say)

    say("\nunet-rt predict nuclei.urt image.tif --out mask.tif --overlay")
    run = _predict(out, say, progress)

    say("\nunet-rt verify nuclei.urt --images samples")
    checked = verify(out / ENGINE, out / "samples", picture=out / "worst-tile.png")
    say(verify_text(checked))

    iou, dice = _score(out / "mask.tif", truth)
    say(f"\nagainst the drawing's truth: IoU {iou:.4f}, Dice {dice:.4f}")
    text = _report_text(size, built, run, checked, f"IoU {iou:.4f}, Dice {dice:.4f}")
    Disk().write_whole(out / "report.md", text.encode())
    return {
        "folder": str(out),
        "engine": str(out / ENGINE),
        "mask": str(out / "mask.tif"),
        "overlay": str(out / "overlay.png"),
        "report": str(out / "report.md"),
        "iou": iou,
        "dice": dice,
        "build": built.to_json(),
        "predict": run.to_json(),
        "verify": checked.to_json(),
    }


def _claim_folder(out: Path) -> None:
    """Makes the folder, or takes an earlier demo's; OutputError where it is anything else."""
    marker = ".unet-rt-demo"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / marker).exists())):
        raise OutputError(f"{out} exists and is not an earlier demo's; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / marker).touch()


def _draw_images(out: Path, size: int) -> npt.NDArray[Any]:
    """Writes the samples and the large image, and returns the truth of that."""
    import shutil

    import tifffile

    from ..drawing.microscopy import microscopy

    samples = out / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    samples.mkdir()
    for k in range(SAMPLES):
        tifffile.imwrite(samples / f"sample-{k}.tif", microscopy((SAMPLE_PX, SAMPLE_PX), seed=9000 + k).image)
    scene = microscopy((size, size), seed=9100)
    tifffile.imwrite(out / "image.tif", scene.image)
    return scene.truth


def _build(out: Path, say: Callable[[str], None]) -> BuildReport:
    """Builds the engine of the network that ships with unet-rt, and says what came of it."""
    from ..building.build import build
    from .texts import build_text

    reports: list[BuildReport] = []
    build(
        shipped_model(),
        samples=out / "samples",
        out=out / ENGINE,
        overwrite=True,
        report=reports.append,
        say=lambda text: None,
    ).close()
    say(build_text(reports[0]))
    return reports[0]


def _predict(out: Path, say: Callable[[str], None], progress: Progress | None) -> RunReport:
    """Predicts the large image, and says what came of it."""
    from ..engine.load import load
    from ..prediction.predict import predict
    from .texts import run_text

    reports: list[RunReport] = []
    with load(out / ENGINE) as engine:
        predict(
            engine,
            out / "image.tif",
            out=out / "mask.tif",
            mask_values=(0, 255),
            overlay=out / "overlay.png",
            overwrite=True,
            progress=progress,
            report=reports.append,
        )
    say(run_text(reports[0], out / "mask.tif"))
    return reports[0]


def _score(path: Path, truth: npt.NDArray[Any]) -> tuple[float, float]:
    """IoU and Dice of a mask against the drawing's truth."""
    import numpy as np
    import tifffile

    from ..engine import parity as parity_module

    mask, drawn = tifffile.imread(path) > 0, truth > 0
    union = int(np.count_nonzero(mask | drawn))
    iou = int(np.count_nonzero(mask & drawn)) / union if union else 1.0
    return iou, parity_module.dice(mask, drawn)


def _report_text(size: int, built: BuildReport, run: RunReport, checked: VerifyReport, score: str) -> str:
    """The demo's report, as Markdown."""
    from .texts import build_text, run_text, verify_text

    worst = (
        "![worst tile](worst-tile.png)\n"
        if checked.picture is not None
        else "The engine changed no label of the samples.\n"
    )
    return (
        f"# unet-rt demo\n\nA drawn micrograph of {size} x {size} px, segmented by the network that ships with unet-rt.\n\n"
        f"![overlay](overlay.png)\n\n## Build\n\n```\n{build_text(built)}\n```\n\n"
        f"## Predict\n\n```\n{run_text(run, Path('mask.tif'))}\n```\n\n"
        f"Against the drawing's truth: {score}.\n\n"
        f"## Verify\n\n```\n{verify_text(checked)}\n```\n\n{worst}"
    )
