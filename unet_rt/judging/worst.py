"""A picture of the window on which an engine and its baseline differ most."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..baseline.samples import SampleWindow
from ..building.job import Say
from ..contract.contract import Contract
from ..engine import parity as parity_module
from ..engine.parity import Verdict
from ..engine.spec import EngineSpec
from ..errors import OutputError
from ..outputs import pictures
from .truth import Array


@dataclass(frozen=True)
class Picture:
    """Where the window that differs most is drawn, if anywhere, and whether also where the engine is inside its budget."""

    path: Path | None
    always: bool


@dataclass(frozen=True)
class Difference:
    """One output of one window, and the share of its budget that it uses."""

    used: float
    sample: SampleWindow
    wanted: Array
    got: Array
    contract: Contract


def draw_picture(
    picture: Picture, worst: Difference | None, spec: EngineSpec, verdict: Verdict, say: Say
) -> Path | None:
    """The path of a picture of the window that differs most; None where none is wanted, or nothing can be shown."""
    wanted = picture.path is not None and (picture.always or not verdict.accepted)
    if picture.path is None or not wanted or worst is None or worst.used <= 0 or spec.spatial != 2:
        return None
    try:
        return _draw_difference(worst, picture.path)
    except OutputError:
        if picture.always:
            raise
        say(f"{picture.path} cannot be written here; the verdict stands without it")
        return None


def _draw_difference(worst: Difference, path: Path) -> Path:
    """Draws image, both masks and their difference around the place where they differ most."""
    sample, wanted, got, contract = worst.sample, worst.wanted, worst.got, worst.contract
    if not contract.has_labels:
        error = np.abs(got[0] - wanted[0])
        a = b = np.zeros(error.shape, np.uint8)
        y, x = (int(v) for v in np.unravel_index(int(error.argmax()), error.shape))
        diff = np.repeat((error / max(float(error.max()), 1e-12) * 255).astype(np.uint8)[..., None], 3, axis=2)
    else:
        a, b = parity_module.labels(wanted, contract)[0], parity_module.labels(got, contract)[0]
        diff = pictures.difference(a, b)
        counts = (a != b).astype(np.int64)
        side = 64
        blocks = np.add.reduceat(
            np.add.reduceat(counts, np.arange(0, a.shape[0], side), 0), np.arange(0, a.shape[1], side), 1
        )
        y, x = (int(v) * side + side // 2 for v in np.unravel_index(int(blocks.argmax()), blocks.shape))
    half = 160
    rows = slice(max(0, int(y) - half), int(y) + half)
    columns = slice(max(0, int(x) - half), int(x) + half)
    image = pictures.grey(sample.pixels)
    if image.shape[:2] != a.shape:
        image = np.zeros((*a.shape, 3), np.uint8)
    panels = [("image", image[rows, columns])]
    if contract.has_labels:
        panels += [
            ("FP32, whole image", pictures.overlay(image, a)[rows, columns]),
            ("engine, tiled", pictures.overlay(image, b)[rows, columns]),
        ]
    panels.append(("difference", diff[rows, columns]))
    pictures.comparison(panels, path)
    return path
