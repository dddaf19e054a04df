"""How long building takes: one engine without a search, INT8 with its search, the default build, and loading.

    python benchmarks/bench_build.py [--net nuclei|paper] [--seconds 240] [--out FILE]

Wall time of one run each (a build is what a user waits for once), from the ONNX file to the engine folder; samples are
six drawn micrographs. ``search`` is the part of it from the baseline's results to the choice: candidates made, measured
and judged, layers put back, tiles tried. Loading: from the folder to the first tile's result, in a process of its own,
median of three. What has no time left in ``--seconds`` is not run and named in the record.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import paper_net
import record

import unet_rt as urt
from unet_rt import backends
from unet_rt.building.report import BuildReport
from unet_rt.system import limits as machine

LOAD = """
import sys, time
begun = time.perf_counter()
import numpy as np
import unet_rt as urt
with urt.load(sys.argv[1]) as engine:
    engine.run(np.zeros((1, engine.spec.channels, *engine.spec.tile), np.float32))
print(time.perf_counter() - begun)
"""


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=240)
    parser.add_argument("--net", choices=("nuclei", "paper"), default="nuclei")
    args = parser.parse_args(argv)
    net = paper_net.paper() if args.net == "paper" else paper_net.nuclei()
    samples = paper_net.drawn(2, 200) if args.quick else paper_net.drawn(6, 640)
    kinds: list[tuple[str, dict[str, Any]]] = []
    for name in backends.usable("cpu"):
        fixed: dict[str, Any] = {"backend": name}
        if args.quick:
            fixed |= {"tile": (192, 192), "halo": "exact"}
        kinds.append((f"{name} fp32", {**fixed, "precision": "fp32"}))
        if not args.quick and "int8" in backends.get(name).precisions("cpu"):
            kinds.append((f"{name} int8", {**fixed, "precision": "int8"}))
    if not args.quick:
        kinds.append(("default: all backends and precisions", {}))
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for k, (name, options) in enumerate(kinds):
            if time.perf_counter() - begun > args.seconds:
                skipped[name] = f"no time left of {args.seconds:g} s"
                continue
            try:
                rows.append({"name": name, **built(net.onnx, samples, Path(folder) / f"{k}.urt", options)})
            except urt.UnetRtError as error:
                skipped[name] = str(error)
                continue
            row = rows[-1]
            print(
                f"  {name:40s} {row['seconds']:7.1f} s, searching {row['search_s']:6.1f} s, "
                f"{row['candidates']} candidates; loaded in {row['load_s']:.2f} s",
                flush=True,
            )
    for name, why in skipped.items():
        print(f"  {name:40s} not run: {why}")
    figures = {"net": args.net, "parameters": net.parameters, "threads": machine.threads(), "rows": rows}
    print(record.write(f"build-{args.net}", {**figures, "skipped": skipped}, args.out, quick=args.quick))
    return 0


def built(model: Path, samples: list[Any], out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One build: its seconds, those of its search, and how long its engine takes to load."""
    reports: list[BuildReport] = []
    begun = time.perf_counter()
    urt.build(model, samples=samples, out=out, device="cpu", report=reports.append, **options).close()
    seconds, reached = time.perf_counter() - begun, reports[0].reached
    loads = [float(subprocess.run([sys.executable, "-c", LOAD, str(out)], **CAPTURED).stdout) for _ in range(3)]
    return {
        "seconds": seconds,
        "search_s": reached["choice"] - reached["tiling"],
        "candidates": len(reports[0].candidates),
        "chosen": f"{reports[0].spec.backend} {reports[0].spec.precision}",
        "load_s": statistics.median(loads),
    }


CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "check": True}


if __name__ == "__main__":
    raise SystemExit(main())
