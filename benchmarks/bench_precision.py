"""Speed and parity of every backend and precision beside eager PyTorch: what INT8 costs and wins.

    python benchmarks/bench_precision.py [--net paper|nuclei|nuclei4] [--tile 572] [--samples DIR] [--out FILE]

Engines are built by unet-rt (calibration, search and parity on samples that are drawn, or the user's), one per backend
and precision, and once more with ``--precision auto``. All are then timed in one interleaved run with eager PyTorch in
FP32, whose speed is 1: batch 1, as many threads as the process may use, from a float32 array to a float32 array; building
is timed apart. Parity is that of the worst sample, which calibrated nothing.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import paper_net
import record
import torch
from bench_engine import Contender, eager, tile_of

import unet_rt as urt
from unet_rt import backends
from unet_rt.building.report import BuildReport
from unet_rt.system import limits as machine
from unet_rt.system import timing as bench

NETS = {
    "paper": (paper_net.paper, 572),
    "nuclei": (paper_net.nuclei, 512),
    "nuclei4": (lambda: paper_net.nuclei(4), 512),
}


def built(
    net: paper_net.Net, folder: Path, samples: Any, tile: int, backend: str, precision: str
) -> tuple[urt.Engine, BuildReport, float]:
    reports: list[BuildReport] = []
    begun = time.perf_counter()
    engine = urt.build(
        net.onnx,
        samples=samples,
        out=folder / f"{backend}-{precision}.urt",
        backend=backend,
        precision=precision,
        device="cpu",
        tile=(tile, tile),
        halo="exact",
        say=lambda text: print(f"    {text}", flush=True),
        report=reports.append,
    )
    return engine, reports[0], time.perf_counter() - begun


def row(name: str, report: BuildReport, seconds: float) -> dict[str, Any]:
    """What the build of the engine ``name`` says of it."""
    chosen = report.candidates[report.chosen]
    verdict = chosen.verdict
    return {
        "name": name,
        "backend": chosen.backend,
        "precision": chosen.precision,
        "variant": chosen.variant,
        "kept": report.spec.options.get("int8", {}).get("kept", []),
        "label_change": None if verdict is None else verdict.label_change,
        "dice": None if verdict is None else verdict.dice,
        "relative": None if verdict is None else verdict.relative,
        "build_s": seconds,
        "candidates": [c.to_json() | {"verdict": None} for c in report.candidates],
    }


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=300)
    parser.add_argument("--net", choices=sorted(NETS), default="paper")
    parser.add_argument("--tile", type=int)
    parser.add_argument("--samples", help="folder of images (default: six drawn micrographs)")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--no-auto", action="store_true", help="leave --precision auto out")
    args = parser.parse_args(argv)
    if args.quick:
        args.net, args.tile, args.runs, args.no_auto = "nuclei", 192, 1, True
    threads = machine.threads()
    torch.set_num_threads(threads)
    make, side = NETS[args.net]
    net, tile = make(), args.tile or side
    x = tile_of(net.contract, tile)
    samples = args.samples or paper_net.drawn(2 if args.quick else 6, 200 if args.quick else 640)
    wanted = [
        (name, precision)
        for name in backends.usable("cpu")
        for precision in (("fp32",) if args.quick else ("fp32", "bf16", "int8"))
        if precision in backends.get(name).precisions("cpu")
    ]
    wanted += [] if args.no_auto else [("auto", "auto")]
    rows: list[dict[str, Any]] = [{"name": "eager FP32", "label_change": 0.0, "dice": 1.0}]
    contenders: list[Contender] = [eager(net.module(), x, channels_last=False, dtype=None)]
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend, precision in wanted:
            name = f"{backend} {precision}" if backend != "auto" else "--precision auto"
            print(name, flush=True)
            try:
                engine, report, seconds = built(net, Path(folder), samples, tile, backend, precision)
            except urt.UnetRtError as error:
                skipped[name] = str(error)
                continue
            rows.append(row(name, report, seconds))
            contenders.append(lambda engine=engine: engine.run(x)[0])  # type: ignore[misc]
        timings = bench.interleave(contenders, runs=args.runs, seconds=args.seconds)
        labels = [contender().argmax(axis=1) for contender in contenders]
    for entry, timing, found in zip(rows, timings, labels, strict=True):
        entry |= {
            "median_ms": timing.median_s * 1e3,
            "low_ms": timing.low_s * 1e3,
            "high_ms": timing.high_s * 1e3,
            "runs": timing.runs,
            "speed": timings[0].median_s / timing.median_s,
            "tile_label_agreement": float(np.mean(found == labels[0])),
        }
    print(f"{args.net}, {net.parameters:,} parameters, tile {tile} px, batch 1, {threads} threads; eager FP32 = 1")
    for entry in rows:
        what = entry["name"] + (f" = {entry['backend']} {entry['precision']}" if "auto" in entry["name"] else "")
        text = f"  {what:44s} {entry['median_ms']:8.0f} ms ({entry['low_ms']:.0f} to {entry['high_ms']:.0f}) "
        text += f"{entry['speed']:5.2f} x  labels changed, worst sample: {entry['label_change']:.4%}, "
        text += f"lowest Dice {entry['dice']:.4f}"
        text += f"; built in {entry['build_s']:.0f} s" if "build_s" in entry else ""
        print(text + (f"; {entry['variant']}" if entry.get("variant") else ""))
    for name, why in skipped.items():
        print(f"  {name:44s} not run: {why}")
    figures = {"net": args.net, "parameters": net.parameters, "tile": tile, "threads": threads, "rows": rows}
    print(record.write(f"precision-{args.net}", {**figures, "skipped": skipped}, args.out, quick=args.quick))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
