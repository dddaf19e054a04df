"""What unet-rt adds to the library it runs on: an engine's tile against the same library called directly.

    python benchmarks/bench_overhead.py [--net nuclei|paper] [--tile 512] [--seconds 60] [--out FILE]

The same tile and threads for both, FP32 engines of ONNX Runtime and OpenVINO. One interleaved run, every other round
backwards. The ratio is the median over rounds, with its 95 % interval. Exit status 1 where the whole interval
lies above 1.03.

``own graph``: the library on the graph that the engine runs; ``given graph``: on the user's ONNX file, as the user would
(for ONNX Runtime the engine's up-convolutions are rewritten, so that a tile's bits are the whole image's).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paper_net
import record
from bench_engine import tile_of

import unet_rt as urt
from unet_rt import backends
from unet_rt.backends import openvino
from unet_rt.backends.onnxruntime import cpu as onnxruntime
from unet_rt.engine.folder import read_folder
from unet_rt.system import limits as machine
from unet_rt.system import timing as bench

LIMIT = 1.03
BARE = {"onnxruntime": onnxruntime.bare, "openvino": openvino.bare}


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=60)
    parser.add_argument("--net", choices=("nuclei", "paper"), default="nuclei")
    parser.add_argument("--tile", type=int)
    args = parser.parse_args(argv)
    net = paper_net.paper() if args.net == "paper" else paper_net.nuclei()
    tile = args.tile or (572 if args.net == "paper" else 512)
    tile = 192 if args.quick else tile
    threads = machine.threads()
    x = tile_of(net.contract, tile)
    pairs: list[tuple[str, Callable[[], object], Callable[[], object]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in backends.usable("cpu"):
            if name not in BARE:
                continue
            out = Path(folder) / f"{name}.urt"
            options = {"backend": name, "precision": "fp32", "device": "cpu", "tile": (tile, tile), "halo": "exact"}
            engine = urt.build(net.onnx, samples=paper_net.drawn(2, 200 if args.quick else 640), out=out, **options)
            graphs = {"own graph": read_folder(out).file("graph"), "given graph": net.onnx}
            for said, graph in graphs.items():
                bare = BARE[name](graph, threads)
                if not np.array_equal(bare([x])[0], engine.run(x)[0]) and said == "own graph":
                    raise SystemExit(f"{name}: engine and library give different answers for the same graph")
                pairs.append((f"{name} fp32, {said}", lambda e=engine: e.run(x), lambda b=bare: b([x])))
        calls = [call for _, ours, theirs in pairs for call in (ours, theirs)]
        runs = 2 if args.quick else 200
        timings = bench.interleave(calls, runs=runs, seconds=1 if args.quick else args.seconds)
    rows, above = [], []
    for k, (name, *_) in enumerate(pairs):
        ours, theirs = timings[2 * k : 2 * k + 2]
        ratio = bench.ratio(ours, theirs)
        rows.append(
            {
                "name": name,
                **record.spread(ours),
                "bare": record.spread(theirs),
                "ratio": ratio.median,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
            }
        )
        print(
            f"  {name:32s} {ours.median_s * 1e3:8.1f} ms, bare {theirs.median_s * 1e3:8.1f} ms, {ours.runs} rounds: "
            f"{ratio.median:.3f} times ({ratio.low:.3f} to {ratio.high:.3f})"
        )
        if ratio.low > LIMIT and not args.quick:
            above.append(name)
    figures = {"net": args.net, "tile": tile, "threads": threads, "limit": LIMIT, "rows": rows}
    print(record.write(f"overhead-{args.net}", figures, args.out, quick=args.quick))
    for name in above:
        print(f"{name}: the whole interval lies above {LIMIT}")
    return 1 if above else 0


if __name__ == "__main__":
    raise SystemExit(main())
