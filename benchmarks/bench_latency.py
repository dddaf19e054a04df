"""What a prediction costs beyond the network: ``urt.predict`` of an array of one tile against ``engine.run`` of that tile.

    python benchmarks/bench_latency.py [--tiles 64,256,512] [--seconds 30] [--out FILE]

The shipped network for nuclei in FP32 on ONNX Runtime. One interleaved run per tile, every other round backwards.
What is added is the median over rounds of the difference; the range leaves out the fastest and the slowest quarter.
Exit status 1 where the median is above 1 ms.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import paper_net
import record
from bench_engine import tile_of

import unet_rt as urt
from unet_rt.system import limits as machine
from unet_rt.system import timing as bench

LIMIT_MS = 1.0


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=30)
    parser.add_argument("--tiles", default="64,256,512", help="sides in pixels")
    args = parser.parse_args(argv)
    sides = [64] if args.quick else [int(side) for side in args.tiles.split(",")]
    net = paper_net.nuclei()
    timings: list[bench.Timing] = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "nuclei.urt"
        samples = paper_net.drawn(2, 200 if args.quick else 640)
        options = {"backend": "onnxruntime", "precision": "fp32", "device": "cpu", "halo": "exact"}
        urt.build(net.onnx, samples=samples, out=out, tile=(max(512, *sides),) * 2, **options)
        with urt.load(out) as engine:
            for side in sides:
                image = paper_net.drawn(1, side)[0][:side, :side]
                reports: list[urt.RunReport] = []
                urt.predict(engine, image, report=reports.append)
                if (reports[0].tile, reports[0].tiles) != ((side, side), 1):
                    raise SystemExit(f"{side} px: predicted in {reports[0].tiles} tiles of {reports[0].tile}")
                calls = [partial(engine.run, tile_of(net.contract, side)), partial(urt.predict, engine, image)]
                seconds = 1 if args.quick else args.seconds / len(sides)
                timings += bench.interleave(calls, runs=2 if args.quick else 400, seconds=seconds)
    rows, above = [], []
    for k, side in enumerate(sides):
        ours, bare = timings[2 * k + 1], timings[2 * k]
        added = np.sort(np.subtract(ours.times_s, bare.times_s)) * 1e3
        low, median, high = (float(n) for n in np.percentile(added, (25, 50, 75)))
        ratio = bench.ratio(ours, bare)
        rows.append(
            {
                "tile": side,
                **record.spread(ours),
                "run": record.spread(bare),
                "added": {"median_ms": median, "low_ms": low, "high_ms": high},
                "ratio": ratio.median,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
            }
        )
        print(
            f"  {side:4d} px {ours.median_s * 1e3:8.2f} ms, its tile {bare.median_s * 1e3:8.2f} ms, {ours.runs} rounds: "
            f"{median:.2f} ms more ({low:.2f} to {high:.2f}), {ratio.median:.3f} times"
        )
        if median > LIMIT_MS and not args.quick:
            above.append(side)
    figures = {"net": "nuclei", "threads": machine.threads(), "limit_ms": LIMIT_MS, "rows": rows}
    print(record.write("latency", figures, args.out, quick=args.quick))
    for side in above:
        print(f"{side} px: more than {LIMIT_MS} ms are added")
    return 1 if above else 0


if __name__ == "__main__":
    raise SystemExit(main())
