"""Answers made of a mask: objects with their outlines as JSON, and pictures in several sizes for the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.engine import Engine
from ..engine.parity import class_name
from ..errors import ContractError, size_text
from ..images.open import open_image
from ..images.reading import Reading
from ..outputs.objects import Objects, label_mask
from ..outputs.outlines import Outlined, write_geojson
from ..outputs.pictures import COLOURS
from ..prediction.report import RunReport
from .job import Job

Array = npt.NDArray[Any]
SMALLEST = 512  # pictures for the page are halved until they fit into a tile of it
# Of labels 0 to 255: background, then the colours of overlays, over and over.
PALETTE = COLOURS[np.where(np.arange(256) == 0, 0, (np.arange(256) - 1) % (len(COLOURS) - 1) + 1)]
SAMPLES = 2**20  # of the pixels that decide how grey levels are shown


def write_document(engine: Engine, job: Job, predict: Callable[[Engine, Job, Path], RunReport]) -> dict[str, Any]:
    """Predicts a mask, and writes its objects as ``objects.geojson`` and all that is said of it as ``answer.json``.

    Raises:
        ContractError: The result is no mask of labels of one picture.
    """
    folder, options = Path(job.folder), job.options
    contract = engine.spec.contract_of(engine.spec.head(options.head or None))
    if contract.task in ("multilabel", "regression") or engine.spec.spatial != 2:
        raise ContractError(
            f"format={options.format} lists objects of one 2-D mask, and the engine's task is {contract.task} in "
            f"{engine.spec.spatial} axes; use format=tif or npy"
        )
    report = predict(engine, job, folder / "mask.npy")
    mask = np.load(folder / "mask.npy", mmap_mode="r", allow_pickle=False)
    if mask.ndim != 2:
        raise ContractError(
            f"format={options.format} lists objects of one picture, and this is a stack of {size_text(mask.shape)}; "
            "use format=tif or npy"
        )
    reading = Reading(options.axes or None, options.channels or None)
    with open_image(
        job.image, engine.spec.contract, reading, spatial=2, network_channels=engine.spec.channels
    ) as image:
        labels = max(2, engine.spec.outputs[engine.spec.head(options.head or None)].channels)
        names = {k: class_name(contract, k) for k in range(labels)}
        ids, found = label_mask(
            mask, min_size=options.min_size, pixel_size_um=image.pixel_size_um or (), class_names=names
        )
        if options.format == "view":
            _write_levels(_picture(image.read(0, (0, 0), image.shape)), folder, "image")
    outlines = folder / "objects.geojson"
    picture = Outlined(found, lambda start, stop: ids[start[0] : stop[0], start[1] : stop[1]])
    write_geojson(outlines, [picture])
    document: dict[str, Any] = {
        "engine": job.engine,
        "shape": list(mask.shape),
        "classes": names,
        "report": report.to_json(),
        "objects": object_rows(found),
    }
    if options.format == "view":
        document["colours"] = {k: PALETTE[k].tolist() for k in names}
        document["levels"] = _write_levels(np.asarray(mask), folder, "mask")
        _write_png(mask, folder / "mask.png")
    else:
        document["geojson"] = json.loads(outlines.read_text("utf-8"))
    (folder / "answer.json").write_text(json.dumps(document), "utf-8")
    return {"file": str(folder / "answer.json"), "report": report.to_json()}


def object_rows(found: Objects) -> list[dict[str, Any]]:
    """One row per object: id, class, area, centre and box in pixels."""
    return [
        {
            "id": k + 1,
            "class": found.class_name(int(found.label[k])),
            "area_px": int(found.area_px[k]),
            "centroid": [round(float(v), 2) for v in found.centroid[k]],
            "box": [*found.start[k].tolist(), *found.stop[k].tolist()],
            "touches_edge": bool(found.touches_edge[k]),
        }
        for k in range(len(found))
    ]


def _picture(pixels: Array) -> Array:
    """(C, Y, X) pixels as (Y, X) or (Y, X, 3) uint8: as they are where they are 8 bits, else between two percentiles."""
    picked = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    if picked.dtype != np.uint8:
        every = max(1, int(np.sqrt(picked[0].size / SAMPLES)))
        low, high = np.percentile(picked[:, ::every, ::every].astype(np.float32), (0.5, 99.5))
        scale = 255.0 / max(float(high - low), 1e-9)
        shown = np.empty(picked.shape, np.uint8)
        for row in range(0, picked.shape[1], 256):  # in bands, so that no picture of floats is held
            band = picked[:, row : row + 256].astype(np.float32)
            shown[:, row : row + 256] = np.clip((band - low) * scale, 0, 255).astype(np.uint8)
        picked = shown
    return np.ascontiguousarray(picked[0] if len(picked) == 1 else np.moveaxis(picked, 0, -1))


def _write_levels(picture: Array, folder: Path, name: str) -> int:
    """Writes ``NAME-0.npy`` (full size), ``NAME-1.npy`` (half), ... and returns how many there are."""
    level = 0
    while True:
        np.save(folder / f"{name}-{level}.npy", picture, allow_pickle=False)
        if max(picture.shape[:2]) <= SMALLEST:
            return level + 1
        picture = np.ascontiguousarray(picture[::2, ::2])
        level += 1


def _write_png(mask: Array, path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.asarray(mask)).save(path, "PNG", compress_level=3)
