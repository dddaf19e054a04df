"""From image to mask: unet-rt's engines against MONAI's sliding window over eager PyTorch, and where the time goes.

    python benchmarks/bench_predict.py [--net nuclei|nuclei-wide|paper] [--size 4096] [--no-baselines] [--out FILE]

The same trained network and the same drawn image for everybody, as many threads as the process may use. One process;
rounds are interleaved, after each has run a small image to warm up; medians with the fastest and slowest. Engines (of each
precision the one that build chooses among all backends):
opening the TIFF, statistics, normalisation, tiles, inference, stitching, decision, writing the mask. MONAI
(``sliding_window_inference``, windows of 512 px, ``sw_batch_size`` 1) gets the normalised image as a tensor, so reading,
normalising and writing are not in its time:

- *defaults*: overlap 0.25, constant weights; on the whole image
- *Gaussian*: overlap 0.25, Gaussian weights; on the centre of half the side
- *nnU-Net's setting*: overlap 0.5, Gaussian weights; on the centre of half the side
- *nnU-Net's setting, mirrored*: the same, mean of the four mirror images; on the centre of a quarter of the side

MONAI's window cannot run a network without padding, so the paper's U-Net (``--net paper``, a quarter of an hour) stands
beside the paper's own way by hand: eager, mirrored borders, a window of 572 px for every 388 px, on the centre of a quarter
of the side.

Speeds of smaller images are comparable as Mpx/s: fewer windows per pixel reach over an edge there. Labels are compared
with whole-image FP32 inference on the centre (at most 1024 px), which everybody tiles as it tiles the image.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paper_net
import record
import tifffile
import torch

import unet_rt as urt
from unet_rt.backends import eager
from unet_rt.drawing.microscopy import microscopy
from unet_rt.images.normalize import affine, normalize_pixels
from unet_rt.images.open import open_image
from unet_rt.prediction.report import RunReport
from unet_rt.prediction.work import Spans
from unet_rt.system import limits as machine
from unet_rt.training.evaluate import predict_whole

Array = np.ndarray[Any, np.dtype[Any]]
Labels = np.ndarray[Any, np.dtype[np.uint8]]
WINDOW = 512  # MONAI's
ALONE = 6  # tiles that the engine's own time is taken from, at most
MIRRORS = ((), (2,), (3,), (2, 3))


def labels(values: np.ndarray) -> Labels:
    return values[0].argmax(axis=0).astype(np.uint8)


def whole(module: torch.nn.Module, x: np.ndarray) -> Labels:
    with torch.inference_mode():
        return labels(module(torch.from_numpy(x)).numpy())


def monai(
    module: torch.nn.Module, x: np.ndarray, side: int, *, overlap: float, mode: str, mirrored: bool = False
) -> Labels:
    window = (min(side, x.shape[2]),) * 2
    total: np.ndarray | float = 0.0
    for axes in MIRRORS if mirrored else ((),):
        turned = np.ascontiguousarray(np.flip(x, axes))
        total = total + np.flip(eager.sliding_window(module, turned, window, overlap=overlap, mode=mode), axes)
    return labels(np.asarray(total))


@dataclass
class Ours:
    """An engine from file to file, and each time right after that the engine alone: machines drift."""

    engine: urt.Engine
    image: Path
    mask: Path
    x: Array  # the whole image, normalised, (1, C, Y, X)
    report: RunReport | None = None  # of the last run
    trace: Spans = field(default_factory=list)  # of the last run
    tile_s: list[float] = field(default_factory=list)  # seconds of one tile, after each run

    def end_to_end(self) -> None:
        reports: list[RunReport] = []
        self.trace = []
        urt.predict(self.engine, self.image, out=self.mask, overwrite=True, report=reports.append, trace=self.trace)
        (self.report,) = reports

    def tiles_alone(self) -> None:
        """Tiles of the last run's size, one after the other, as many as it had and at most ``ALONE``; nothing else."""
        assert self.report is not None
        tile = self.report.tile
        cut = np.ascontiguousarray(self.x[..., : tile[0], : tile[1]])
        beyond = [(0, 0), (0, 0), *((0, t - n) for t, n in zip(tile, cut.shape[2:], strict=True))]
        cut = np.pad(cut, beyond, mode="reflect")
        count = min(ALONE, self.report.tiles)
        begun = time.perf_counter()
        for _ in range(count):
            self.engine.run(cut)
        self.tile_s.append((time.perf_counter() - begun) / count)

    def overhead(self, times: list[float]) -> dict[str, Any]:
        """What a run takes over its tiles alone, round by round; ``times`` are the seconds of the runs."""
        assert self.report is not None
        ratios = [a / (b * self.report.tiles) for a, b in zip(times, self.tile_s, strict=True)]
        return {
            "tile": list(self.report.tile),
            "tiles": self.report.tiles,
            "tile_ms": statistics.median(self.tile_s) * 1e3,
            "end_to_end": statistics.median(ratios),
            "end_to_end_low": min(ratios),
            "end_to_end_high": max(ratios),
            "stages": self.report.stages,
        }


# name -> (settings, divisor of the side that it is timed on)
MONAI: dict[str, tuple[dict[str, Any], int]] = {
    "MONAI defaults, eager FP32": ({"overlap": 0.25, "mode": "constant"}, 1),
    "MONAI Gaussian, eager FP32": ({"overlap": 0.25, "mode": "gaussian"}, 2),
    "MONAI in nnU-Net's setting, eager FP32": ({"overlap": 0.5, "mode": "gaussian"}, 2),
    "MONAI in nnU-Net's setting, mirrored, eager FP32": ({"overlap": 0.5, "mode": "gaussian", "mirrored": True}, 4),
}


def overlap_tile(module: torch.nn.Module, x: np.ndarray) -> Labels:
    """The overlap-tile strategy of the paper (figure 2), by hand; ``x`` (1, C, Y, X)."""
    window, kept = 572, 388
    margin = (window - kept) // 2
    height, width = x.shape[2:]
    grown = np.pad(x, [(0, 0), (0, 0), *((margin, margin + -n % kept) for n in (height, width))], mode="reflect")
    found = np.empty((height, width), np.uint8)
    for top in range(0, height, kept):
        for left in range(0, width, kept):
            part = np.ascontiguousarray(grown[..., top : top + window, left : left + window])
            place = found[top : top + kept, left : left + kept]
            place[:] = whole(module, part)[: place.shape[0], : place.shape[1]]
    return found


# name -> (labels of a module and an input, divisor of the side that it is timed on)
Baseline = tuple[Callable[[torch.nn.Module, np.ndarray], Labels], int]


def baselines(net: str, side: int) -> dict[str, Baseline]:
    """What others do, by name; ``side``: of MONAI's window."""
    if net == "paper":
        return {"the paper's overlap-tile by hand, eager FP32": (overlap_tile, 4)}
    return {
        name: (lambda module, x, setting=setting: monai(module, x, side, **setting), divisor)
        for name, (setting, divisor) in MONAI.items()
    }


def centre(array: np.ndarray, side: int) -> np.ndarray:
    """The middle of the last two axes, at a multiple of 16 px."""
    cuts = [slice(s := (n - min(side, n)) // 32 * 16, s + min(side, n)) for n in array.shape[-2:]]
    return array[(..., *cuts)]


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=240)
    parser.add_argument("--net", choices=("nuclei", "nuclei-wide", "paper"), default="nuclei")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    parser.add_argument("--search-minutes", type=float, default=10, help="of each build, at most")
    parser.add_argument("--no-baselines", action="store_true", help="engines only")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.rounds, args.precisions, args.seconds = 320, 1, "fp32", 1.0
    torch.set_num_threads(1 if args.quick else machine.threads())
    net = paper_net.paper() if args.net == "paper" else paper_net.nuclei(widen=4 if args.net == "nuclei-wide" else 1)
    module = net.module()
    pixels = microscopy((args.size, args.size), seed=4343).image
    judged = min(args.size, 1024)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "image.tif"
        tifffile.imwrite(image, pixels, tile=(512, 512))
        engines, skipped = built(net, folder, args)
        with open_image(pixels, net.contract, spatial=2) as source:
            numbers = affine(net.contract.normalization, source).plane(0)
        x = normalize_pixels(pixels[None], numbers)[None]
        ours = {label: Ours(engine, image, folder / "mask.tif", x) for label, engine in engines.items()}
        contenders: dict[str, tuple[Callable[[], object], int]] = {}
        for label, one in ours.items():
            urt.predict(one.engine, centre(pixels, 1024))
            contenders[label] = (one.end_to_end, args.size)
        others = {} if args.no_baselines else baselines(args.net, 128 if args.quick else WINDOW)
        for label, (run, divisor) in others.items():
            part = centre(x, args.size // divisor)
            run(module, centre(x, min(512, part.shape[2])))  # imports, allocations
            contenders[label] = (lambda p=part, r=run: r(module, p), part.shape[2])  # type: ignore[misc]
        calls = {label: call for label, (call, _) in contenders.items()}
        timings = timed(calls, args.rounds, args.seconds, {label: one.tiles_alone for label, one in ours.items()})
        rows = []
        truth = predict_whole(module, centre(x, judged)[0]).argmax(axis=0)
        for (label, (_, px)), times in zip(contenders.items(), timings, strict=True):
            row: dict[str, Any] = {"name": label, "side": px, **figures_of(times)}
            row["mpx_per_s"] = px**2 / 1e6 / row["median_s"]
            if label in engines:
                got = engine_labels(engines[label], centre(pixels, judged), numbers)
                row |= ours[label].overhead(times)
            else:
                got = others[label][0](module, centre(x, judged))
            row["changed_labels"] = float((got != truth).mean())
            rows.append(row)
    first = next(iter(ours))
    slowest = next((row["mpx_per_s"] for row in rows if row["name"] in others), None)
    print(f"{args.net}, {net.parameters:,} parameters, {args.size} x {args.size} px, {machine.threads()} threads")
    for row in rows:
        speed = f"{row['mpx_per_s'] / slowest:5.2f} x" if slowest else ""
        alone = (
            f"; {row['end_to_end']:.3f} ({row['end_to_end_low']:.3f} to {row['end_to_end_high']:.3f}) of the engine's own "
            f"time for {row['tiles']} tiles"
            if "tiles" in row
            else ""
        )
        print(
            f"  {row['name']:50s} {row['side']:5d} px {row['median_s']:7.1f} s ({row['low_s']:.1f} to {row['high_s']:.1f}) "
            f"{row['mpx_per_s']:6.3f} Mpx/s {speed} labels changed {row['changed_labels']:.5%}{alone}"
        )
    for label, why in skipped.items():
        print(f"  {label:50s} not run: {why}")
    figures = {
        "net": args.net,
        "parameters": net.parameters,
        "size": args.size,
        "judged": judged,
        "threads": machine.threads(),
        "rows": rows,
        "skipped": skipped,
        "spans": {"name": first, "spans": since_begun(ours[first].trace)},
    }
    print(record.write(f"predict-{args.net}", figures, args.out, quick=args.quick))
    return 0


def built(net: paper_net.Net, folder: Path, args: argparse.Namespace) -> tuple[dict[str, urt.Engine], dict[str, str]]:
    """Engines by name, one per precision, as build chooses them; and why others are missing."""
    engines: dict[str, urt.Engine] = {}
    skipped: dict[str, str] = {}
    samples = paper_net.drawn(2, 200) if args.quick else paper_net.drawn(4, 640 if args.net == "paper" else 1024)
    for precision in args.precisions.split(","):
        begun = time.perf_counter()
        try:
            engine = urt.build(
                net.onnx,
                samples=samples,
                out=folder / f"{precision}.urt",
                precision=precision,
                device="cpu",
                halo="exact",
                search_minutes=args.search_minutes,
                tile=(192, 192) if args.quick else None,
            )
        except urt.UnetRtError as error:
            skipped[f"unet-rt {precision}"] = str(error)
        else:
            engines[f"unet-rt {engine.spec.backend} {precision}"] = engine
        print(f"{precision} built in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return engines, skipped


def timed(
    calls: dict[str, Callable[[], object]], rounds: int, seconds: float, after: dict[str, Callable[[], object]]
) -> list[list[float]]:
    """Seconds of every call, round by round; after two, what has used up its share of ``seconds`` is not run again.

    ``after``: What is called behind a call of that name, outside its time.
    """
    times: dict[str, list[float]] = {label: [] for label in calls}
    for k in range(rounds):
        for label, call in calls.items():
            before = times[label]
            if len(before) >= 2 and sum(before) + before[-1] > seconds / len(calls):
                continue
            begun = time.perf_counter()
            call()
            before.append(time.perf_counter() - begun)
            print(f"round {k + 1} of {rounds}: {label} {before[-1]:.1f} s", file=sys.stderr, flush=True)
            if label in after:
                after[label]()
    return list(times.values())


def figures_of(times: list[float]) -> dict[str, Any]:
    return {"median_s": statistics.median(times), "low_s": min(times), "high_s": max(times), "runs": len(times)}


def since_begun(spans: Spans) -> Spans:
    """The same, in seconds from the first start, sorted by stage."""
    begun = min(start for _, start, _ in spans)
    return [(stage, round(start - begun, 4), round(stop - begun, 4)) for stage, start, stop in sorted(spans, key=str)]


def engine_labels(engine: urt.Engine, pixels: np.ndarray, numbers: Any) -> Labels:
    """Labels of a crop, with the whole image's statistics, in tiles of at most 768 px."""
    from unet_rt.images.normalize import OnePlane
    from unet_rt.prediction.run import run
    from unet_rt.prediction.work import Computation, Work
    from unet_rt.tiling.decision import decide

    spec = engine.spec
    result = np.empty(pixels.shape, np.uint8)

    def keep(work: Work, start: int, band: np.ndarray) -> None:
        result[start : start + len(band)] = band

    with open_image(pixels, spec.contract, spatial=2) as source:
        grid = spec.grid(source.shape, max_px=768 * 768)
        decision = decide(spec.contract, spec.outputs[0].channels, "mask")
        run(Computation(engine, source, decision, OnePlane(numbers)), [Work(0, grid)], keep)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
