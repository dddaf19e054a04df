"""Quality, not only speed: truth metrics of whole-image inference, trained-size tiles, measured halo and exact halo.

    python benchmarks/bench_quality.py [--data DIR [--only NAME,..]] [--model MODEL.onnx] [--limit N] [--out FILE]

A network with zero padding has seen its tile's edge at every training step; on larger tiles, inner samples see none. It
has been warned that this may lower the quality (nnUNet#2105). Here every way is held against the same truth:

- *whole*: the network on the whole image
- *exact halo*: in tiles, the computed halo discarded (the same samples as whole, so the same figures)
- *measured halo*: in tiles, the smallest halo inside the seam budget on these images
- *trained tiles, Gaussian*: tiles of the trained size, half overlapped, blended, as nnU-Net predicts
- *trained tiles, side by side*: tiles of the trained size without any overlap

``--data`` holds ``image/*.png`` and ``label/*.png`` (grey images with a label above 0 for the foreground; colour images are
left out, and so are bright ones: the median above the middle of their range); without it, drawn microscopy with its truth.
Mean IoU and Dice over images; the difference to *whole* is paired per image, with a 95 % interval by bootstrap.
The record ``quality-isbi2012`` is of the U-Net that docs/explanation/membranes.md trains, exported
(``unet-rt export runs/UNet-w16-default-18.pt --out isbi.onnx``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import record
from PIL import Image

from unet_rt.baseline.model import baseline_engine, open_model
from unet_rt.baseline.results import raw_result
from unet_rt.baseline.samples import SampleWindow, draw
from unet_rt.baseline.tiles import untiled_spec, whole_grid
from unet_rt.cli.demo import shipped_model
from unet_rt.drawing.microscopy import microscopy
from unet_rt.engine import parity
from unet_rt.engine.engine import Engine
from unet_rt.engine.spec import EngineSpec
from unet_rt.tiling.grid import TileGrid, square_tile, tile_grid
from unet_rt.training.metrics import dice, iou

SEAM = 1e-5  # share of labels, as build's default budget


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=180)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path, default=shipped_model())
    parser.add_argument("--name", help="of the record: quality-NAME")
    parser.add_argument("--only", metavar="NAME,..", help="names without suffix: images that training did not see")
    parser.add_argument("--limit", type=int, default=40, help="at most so many images")
    args = parser.parse_args(argv)
    only = args.only.split(",") if args.only else None
    images = list(pairs(args.data, only, 2 if args.quick else args.limit, 256 if args.quick else 512))
    if not images:
        raise SystemExit(f"{args.data} holds none of the images asked for")
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(args.model, Path(folder))
        spec = untiled_spec(model)
        trained = spec.contract.trained_tile
        if trained is None or not spec.exact:
            raise SystemExit(f"{args.model} declares no trained tile, or cannot be tiled exactly: nothing to compare")
        with baseline_engine(model, spec) as engine:
            given: dict[str, Any] = {"spatial": 2, "network_channels": 1, "count": 1, "max_px": 2**22}
            samples = [draw([image], spec.contract, **given)[0] for image, _ in images]
            truths = [truth for _, truth in images]
            rows, limit = measured(engine, spec, samples, truths, trained)
    print(f"{args.model.name}, {len(images)} images of {args.data or 'drawn microscopy'}; trained tile {trained}")
    for row in rows:
        print(
            f"  {row['name']:28s} IoU {row['iou']:.4f}, Dice {row['dice']:.4f}, IoU minus whole "
            f"{row['difference']:+.5f} ({row['difference_low']:+.5f} to {row['difference_high']:+.5f}), "
            f"labels changed {row['changed_labels']:.4%}"
        )
    name = args.name or (args.data.name if args.data else "drawn")
    figures = {
        "data": name,
        "images": len(images),
        "only": only,
        "model": args.model.name,
        "trained_tile": list(trained),
        "halo": max(max(f.halo) for o in spec.outputs for f in o.field),
        "measured_halo": limit,
        "rows": rows,
    }
    print(record.write(f"quality-{name}", figures, args.out, quick=args.quick))
    return 0


def pairs(data: Path | None, only: list[str] | None, limit: int, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and their foreground."""
    if data is None:
        for seed in range(min(limit, 12)):
            drawn = microscopy((side, side), seed=7000 + seed)
            yield drawn.image, drawn.truth > 0
        return
    found = 0
    for path in sorted((data / "image").glob("*.png")):
        if only is not None and path.stem not in only:
            continue
        with Image.open(path) as picture, Image.open(data / "label" / path.name) as label:
            image, truth = np.asarray(picture), np.asarray(label) > 0
        if image.ndim == 3 and (image[..., :1] != image[..., :3]).any():
            continue
        image = image[..., 0] if image.ndim == 3 else image
        if data.name.startswith("dsb") and np.median(image) > (int(image.min()) + int(image.max())) / 2:
            continue
        yield image, truth
        found += 1
        if found == limit:
            return


def ways(
    spec: EngineSpec, sample: SampleWindow, trained: tuple[int, ...], limit: int
) -> dict[str, tuple[EngineSpec, TileGrid]]:
    """The tiles of every way for one image, with the spec that they belong to."""
    half = tuple(t // 2 for t in trained)
    cut = replace(spec, halo="measured", halo_limit=limit)
    bare = replace(spec, halo="given", halo_limit=0)
    blended = replace(spec, overlap=half)
    smaller = tuple(min(t, n) for t, n in zip(trained, spec.canvas_shape(sample.shape), strict=True))
    return {
        "whole": (spec, whole_grid(spec, sample.shape)),
        "exact halo": (spec, tile_grid(sample.shape, seamed(spec, sample), spec.sizes, spec.outputs)),
        "measured halo": (cut, tile_grid(sample.shape, seamed(cut, sample), spec.sizes, cut.used_outputs())),
        "trained tiles, Gaussian": (blended, tile_grid(sample.shape, smaller, spec.sizes, spec.outputs, overlap=half)),
        "trained tiles, side by side": (bare, tile_grid(sample.shape, smaller, spec.sizes, bare.used_outputs())),
    }


def seamed(spec: EngineSpec, sample: SampleWindow) -> tuple[int, ...]:
    """A tile of about a quarter of the image."""
    return square_tile(spec.sizes, spec.used_outputs(), max(sample.shape[0] * sample.shape[1] // 4, 1))


def result(engine: Engine, spec: EngineSpec, sample: SampleWindow, grid: TileGrid) -> np.ndarray:
    engine.spec = spec
    found: np.ndarray = parity.labels(raw_result(engine, sample, grid), spec.contract)[0] > 0
    return found


def measured_halo(engine: Engine, spec: EngineSpec, samples: list[SampleWindow], wholes: list[np.ndarray]) -> int:
    """The smallest halo, in steps of 8, whose seams change at most ``SEAM`` of the labels on the worst image."""
    exact = max(max(f.halo) for o in spec.outputs for f in o.field)
    low, high = 0, -(-exact // 8)
    while low < high:
        middle = (low + high) // 2
        cut = replace(spec, halo="measured", halo_limit=8 * middle)
        error = 0.0
        for sample, whole in zip(samples, wholes, strict=True):
            grid = tile_grid(sample.shape, seamed(cut, sample), spec.sizes, cut.used_outputs())
            error = max(error, float((result(engine, cut, sample, grid) != whole).mean()))
        low, high = (low, middle) if error <= SEAM else (middle + 1, high)
    return min(8 * high, exact)


def measured(
    engine: Engine, spec: EngineSpec, samples: list[SampleWindow], truths: list[np.ndarray], trained: tuple[int, ...]
) -> tuple[list[dict[str, Any]], int]:
    wholes = [result(engine, spec, sample, whole_grid(spec, sample.shape)) for sample in samples]
    limit = measured_halo(engine, spec, samples[:8], wholes[:8])
    scores: dict[str, list[tuple[float, float, float]]] = {}
    for sample, truth, whole in zip(samples, truths, wholes, strict=True):
        for name, (used, grid) in ways(spec, sample, trained, limit).items():
            mask = result(engine, used, sample, grid)
            scores.setdefault(name, []).append((iou(mask, truth), dice(mask, truth), float((mask != whole).mean())))
    first = np.array(scores["whole"])[:, 0]
    rng, rows = np.random.default_rng(0), []
    for name, values in scores.items():
        table = np.array(values)
        difference = table[:, 0] - first
        means = difference[rng.integers(0, len(difference), (2000, len(difference)))].mean(axis=1)
        low, high = np.percentile(means, (2.5, 97.5))
        rows.append(
            {
                "name": name,
                "iou": float(table[:, 0].mean()),
                "dice": float(table[:, 1].mean()),
                "difference": float(difference.mean()),
                "difference_low": float(low),
                "difference_high": float(high),
                "worst_image": float(difference.min()),
                "changed_labels": float(table[:, 2].mean()),
            }
        )
    return rows, limit


if __name__ == "__main__":
    raise SystemExit(main())
