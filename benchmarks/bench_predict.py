"""From image file to mask file: unet-rt against its own tile times, and against MONAI's sliding window over eager PyTorch.

    python benchmarks/bench_predict.py [--net nuclei|nuclei-wide] [--size 4096] [--rounds 2] [--no-monai] [--out FILE]

The same trained network and the same drawn image for everybody, as many threads as the process may use. One process;
rounds are interleaved (every contender once per round, after each has run a small image to warm up), medians are
reported. Included: opening the TIFF, statistics, normalisation, tiles, inference, stitching, decision, writing the mask.
MONAI (`sliding_window_inference`, roi 512, overlap 0.25, Gaussian, sw_batch_size 1) gets the normalised image as a
tensor, so reading and normalising are not in its time, and writing is not either. Seams: labels that differ from
whole-image FP32 inference, counted on a centre crop of 2048 px (both tile it as they tile the image).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paper_net
import record
import tifffile
import torch

import unet_rt as urt
from unet_rt import bench, machine
from unet_rt.image import open_image
from unet_rt.normalize import affine, normalised
from unet_rt.pipeline import RunReport
from unet_rt.synthetic import microscopy


def monai(module: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    from monai.inferers import sliding_window_inference

    with torch.inference_mode():
        out = sliding_window_inference(x, (512, 512), 1, module, overlap=0.25, mode="gaussian")
        return out[0].argmax(dim=0).to(torch.uint8).numpy()


def whole(module: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return module(x)[0].argmax(dim=0).to(torch.uint8).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("nuclei", "nuclei-wide"), default="nuclei")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-monai", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(machine.threads())
    net = paper_net.nuclei(widen=4 if args.net == "nuclei-wide" else 1)
    module = net.module()
    pixels = microscopy((args.size, args.size), seed=4343).image
    rows: dict[str, list[float]] = {}
    runs: dict[str, list[RunReport]] = {}
    contenders: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "image.tif"
        tifffile.imwrite(image, pixels, tile=(512, 512))
        samples = [microscopy((1024, 1024), seed=s).image for s in range(3)]
        engines: dict[str, urt.Engine] = {}
        skipped: dict[str, str] = {}
        for precision in ("fp32", "bf16"):
            try:
                engines[precision] = urt.build(
                    net.onnx, samples=samples, out=folder / f"{precision}.urt", precision=precision
                )
            except urt.BackendError as error:
                skipped[precision] = str(error)
        for precision, engine in engines.items():
            label = f"unet-rt {engine.spec.backend} {precision}"
            runs[label] = []

            def end_to_end(engine: urt.Engine = engine, label: str = label) -> None:
                urt.predict(engine, image, out=folder / "mask.tif", overwrite=True, report=runs[label].append)

            contenders[label] = end_to_end
        with open_image(pixels, net.contract, spatial=2) as source:
            numbers = affine(net.contract.normalization, source).plane(0)
        x = torch.from_numpy(normalised(pixels[None], numbers)[None])
        if not args.no_monai:
            contenders["MONAI sliding window, eager FP32"] = lambda: monai(module, x)
            monai(module, x[..., :1024, :1024])
        for engine in engines.values():
            urt.predict(engine, pixels[:1024, :1024])
        for _ in range(args.rounds):
            for label, contender in contenders.items():
                begun = time.perf_counter()
                contender()
                rows.setdefault(label, []).append(time.perf_counter() - begun)
        # the engine's own time: the same tiles, one after the other, nothing else
        overhead: dict[str, Any] = {}
        for label, engine in zip(runs, engines.values(), strict=True):
            report = runs[label][-1]
            tile = np.ascontiguousarray(x[..., : report.tile[0], : report.tile[1]].numpy())
            padded = [(0, 0), (0, 0), *((0, t - n) for t, n in zip(report.tile, tile.shape[2:], strict=True))]
            tile = np.pad(tile, padded, mode="reflect")
            (timing,) = bench.interleave([lambda e=engine, t=tile: e.run(t)], runs=5, seconds=60)
            end = statistics.median(rows[label])
            overhead[label] = {
                "tile": list(report.tile),
                "tiles": report.tiles,
                "sum_of_tile_times_s": timing.median_s * report.tiles,
                "end_to_end_s": end,
                "ratio": end / (timing.median_s * report.tiles),
                "infer_s_in_run": statistics.median(r.stages["infer"] for r in runs[label]),
                "stages": report.stages,
            }
        crop = (slice(args.size // 2 - 1024, args.size // 2 + 1024),) * 2 if args.size > 2048 else (slice(None),) * 2
        part = x[(..., *crop)]
        truth = whole(module, part)
        seams = {}
        for label, engine in zip(runs, engines.values(), strict=True):
            seams[label] = float((_labels(engine, pixels[crop], numbers) != truth).mean())
        if not args.no_monai:
            seams["MONAI sliding window, eager FP32"] = float((monai(module, part) != truth).mean())
    medians = {label: statistics.median(t) for label, t in rows.items()}
    slowest = medians.get("MONAI sliding window, eager FP32")
    print(f"{args.net}, {net.parameters:,} parameters, {args.size} x {args.size} px, {machine.threads()} threads")
    for label, median in medians.items():
        speed = f"{slowest / median:5.2f} x" if slowest else ""
        print(
            f"  {label:36s} {median:8.1f} s ({min(rows[label]):.1f} to {max(rows[label]):.1f})  "
            f"{args.size**2 / median / 1e6:6.3f} Mpx/s  {speed}  labels not those of whole-image FP32: {seams[label]:.5%}"
        )
    for label, found in overhead.items():
        print(f"  {label}: end to end is {found['ratio']:.3f} of {found['tiles']} tiles of {found['tile']} run alone")
    figures = {
        "net": args.net,
        "parameters": net.parameters,
        "size": args.size,
        "threads": machine.threads(),
        "seconds": rows,
        "median_s": medians,
        "seams": seams,
        "overhead": overhead,
        "skipped": skipped,
    }
    print(record.write(f"predict-{args.net}", figures, args.out))


def _labels(engine: urt.Engine, pixels: np.ndarray, numbers: Any) -> np.ndarray:
    """Labels of a crop, with the whole image's statistics, in tiles of at most 768 px."""
    from unet_rt.normalize import OnePlane
    from unet_rt.pipeline import Work, run
    from unet_rt.stitch import decide

    spec = engine.spec
    result = np.empty(pixels.shape, np.uint8)

    def keep(work: Work, start: int, band: np.ndarray) -> None:
        result[start : start + len(band)] = band

    with open_image(pixels, spec.contract, spatial=2) as source:
        grid = spec.grid(source.shape, max_px=768 * 768)
        decision = decide(spec.contract, spec.outputs[0].channels, "mask")
        run(engine, source, [Work(0, grid)], decision, keep, OnePlane(numbers))
    return result


if __name__ == "__main__":
    main()
