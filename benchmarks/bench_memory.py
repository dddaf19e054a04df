"""Resident memory of a prediction beyond the engine (loaded and run once at its tile and batch).

    python benchmarks/bench_memory.py [--side 10000] [--compressed] [--out FILE]

A drawn uint16 TIFF of side x side pixels becomes a mask file; a thread samples the resident memory every 10 ms.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import record
import tifffile

import unet_rt as urt
from unet_rt.cli.demo import shipped_model
from unet_rt.drawing.microscopy import microscopy
from unet_rt.prediction.report import RunReport
from unet_rt.system import limits as machine
from unet_rt.system.timing import MemoryWatch


def write_image(path: Path, side: int, compressed: bool) -> None:
    """A large drawn image, written strip by strip from a block that is repeated; this process keeps none of it."""
    block = microscopy((1000, 1000), seed=7).image
    # A few grey levels set the repetitions apart: tiles of equal pixels would be computed once.
    rows = np.tile(block, (1, -(-side // 1000)))[:, :side] + (np.arange(side) // 1000).astype(np.uint16)

    def strips():
        for start in range(0, side, 250):
            strip = rows[start % 1000 : start % 1000 + min(250, side - start)]
            yield strip + np.uint16(17 * (start // 1000))

    options = {"compression": "zlib"} if compressed else {}
    tifffile.imwrite(path, strips(), shape=(side, side), dtype=np.uint16, rowsperstrip=250, **options)


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=60)
    parser.add_argument("--side", type=int, default=10_000)
    parser.add_argument("--compressed", action="store_true")
    args = parser.parse_args(argv)
    if args.quick:
        args.side = 400
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_image(folder / "image.tif", args.side, args.compressed)
        # built in a process of its own: what building leaves behind would count as the engine's memory
        build = [
            sys.executable,
            "-Pm",  # not the package of the checkout, which may lie in the current folder
            "unet_rt.cli.main",
            "build",
            str(shipped_model()),
            "--out",
            str(folder / "engine.urt"),
            *(["--tile", "192x192", "--halo", "exact"] if args.quick else []),
        ]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        engine = urt.load(folder / "engine.urt")
        tile = np.zeros((1, 1, *engine.spec.tile), np.float32)
        tile[..., ::3, ::3] = 1
        engine.run(tile)
        runs: list[RunReport] = []
        with MemoryWatch() as watch:
            urt.predict(engine, folder / "image.tif", out=folder / "mask.tif", report=runs.append)
        run = runs[0]
    figures = {
        "side": args.side,
        "compressed": args.compressed,
        "backend": engine.spec.backend,
        "engine_tile": list(engine.spec.tile),
        "tile": list(run.tile),
        "rss_before_bytes": watch.before,
        "beyond_engine_bytes": watch.grown,
        "seconds": run.seconds,
        "mpx_per_s": run.mpx_per_s,
        "stages": run.stages,
        "threads": machine.threads(),
    }
    print(
        f"{args.side} x {args.side} uint16: {watch.grown / 1e6:.0f} MB beyond the engine ({watch.before / 1e6:.0f} MB), "
        f"{run.seconds:.0f} s, {run.mpx_per_s:.2f} Mpx/s, tile {run.tile}"
    )
    print(record.write("memory", figures, args.out, quick=args.quick))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
