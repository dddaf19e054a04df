"""How cost grows: with the image's side, the tile, the batch, the channels, the network's width, the threads.

    python benchmarks/bench_scaling.py [--sides 1024,2048,4096,8192,16384] [--seconds 300] [--out FILE]

The network that ships, an FP32 engine, drawn microscopy. Every image side is a process of its own: seconds from file to
file, and resident memory beyond the loaded engine. A side that would not end within ``--seconds`` is left out, and the
record says so. The other figures are of engine runs, interleaved, medians with the fastest and slowest.

Halo overhead: the same image in the same tiles, once with the exact halo and once with none (then tiles lie side by side,
and the seams are wrong); the ratio of the seconds in the engine, beside the ratio of tiles computed and the formula of
``unet-rt inspect`` for inner tiles.

Channels: the first convolution is repeated for every channel and divided by their number, so that the same image in all
channels gives the same answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import paper_net
import record
from bench_engine import tile_of
from bench_memory import write_image
from onnx import numpy_helper

import unet_rt as urt
from unet_rt.drawing.microscopy import microscopy
from unet_rt.images.normalize import affine
from unet_rt.images.open import open_image
from unet_rt.prediction.report import RunReport
from unet_rt.prediction.run import run
from unet_rt.prediction.work import Computation, Work
from unet_rt.system import limits as machine
from unet_rt.system import timing as bench
from unet_rt.tiling.decision import decide
from unet_rt.tiling.grid import cost_ratio


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=300)
    parser.add_argument("--sides", default="1024,2048,4096,8192,16384")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--one", nargs=3, metavar=("ENGINE", "IMAGE", "MASK"), help="used by the script itself")
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(*args.one)))
        return 0
    sides = [256] if args.quick else [int(side) for side in args.sides.split(",")]
    tiles = [192] if args.quick else [256, 384, 512, 768, 1024, 1536]
    runs = 1 if args.quick else 7
    begun = time.perf_counter()
    net = paper_net.nuclei()
    found: dict[str, Any] = {"threads": machine.threads(), "skipped": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = (tiles[-1],) * 2 if args.quick else (1024, 1024)
        engine = built(net.onnx, folder / "engine.urt", largest, args.backend)
        found["backend"] = engine.spec.backend
        found["tile_sizes"] = tile_sizes(engine, net, tiles, runs)
        found["halo"] = [halo(engine, tile, 384 if args.quick else 1536) for tile in tiles if tile <= 768]
        found["batches"] = batches(
            engine, net, [1, 2] if args.quick else [1, 2, 4, 8], 192 if args.quick else 256, runs
        )
        found["thread_counts"] = thread_counts(folder / "engine.urt", net, 192 if args.quick else 512, runs)
        found["channels"] = channels(net, folder, [1, 2] if args.quick else [1, 3, 8], 192 if args.quick else 512, runs)
        found["widths"] = widths(folder, [1] if args.quick else [1, 2, 4], 192 if args.quick else 512, runs)
        engine.close()
        show(found)
        found["sides"] = rows = []
        for side in sides:
            left = args.seconds - (time.perf_counter() - begun)
            expected = rows[-1]["seconds"] * (side / rows[-1]["side"]) ** 2 if rows else 0.0
            if expected > left and not args.quick:
                found["skipped"][f"{side} px"] = (
                    f"about {expected:.0f} s, and {max(left, 0):.0f} s of --seconds were left"
                )
                continue
            write_image(folder / "image.tif", side, compressed=False)
            command = [
                sys.executable,
                __file__,
                "--one",
                *(str(folder / n) for n in ("engine.urt", "image.tif", "mask.tif")),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"side": side, **json.loads(done.stdout.splitlines()[-1])})
            r = rows[-1]
            print(
                f"  {side:6d} px: {r['seconds']:7.1f} s, {r['mpx_per_s']:.3f} Mpx/s, "
                f"{r['beyond_engine_bytes'] / 1e6:.0f} MB beyond the engine, {r['tiles']} tiles of {r['tile']}",
                flush=True,
            )
    for what, why in found["skipped"].items():
        print(f"  {what} not run: {why}")
    print(record.write("scaling", found, args.out, quick=args.quick))
    return 0


def built(model: Path, out: Path, tile: tuple[int, ...], backend: str, channels: int = 1) -> urt.Engine:
    samples = [np.stack([image] * channels) for image in paper_net.drawn(2, max(200, tile[0]))]
    where: dict[str, Any] = {"tile": tile, "halo": "exact", "device": "cpu", "backend": backend}
    return urt.build(model, samples=samples, axes="CYX", out=out, precision="fp32", **where)


def one(engine: str, image: str, mask: str) -> dict[str, Any]:
    """One prediction in a process of its own."""
    with urt.load(engine) as loaded:
        tile = np.zeros((1, 1, *loaded.spec.tile), np.float32)
        tile[..., ::3, ::3] = 1
        loaded.run(tile)
        reports: list[RunReport] = []
        with bench.MemoryWatch() as watch:
            urt.predict(loaded, image, out=mask, overwrite=True, report=reports.append)
    (report,) = reports
    return {
        "seconds": report.seconds,
        "mpx_per_s": report.mpx_per_s,
        "beyond_engine_bytes": watch.grown,
        "tile": list(report.tile),
        "tiles": report.tiles,
    }


def interleaved(calls: dict[Any, Callable[[], object]], runs: int) -> dict[Any, dict[str, Any]]:
    """At most ten seconds each: there are six of them."""
    timings = bench.interleave(list(calls.values()), runs=runs, seconds=10)
    return {key: record.spread(timing) for key, timing in zip(calls, timings, strict=True)}


def tile_sizes(engine: urt.Engine, net: paper_net.Net, tiles: list[int], runs: int) -> list[dict[str, Any]]:
    """Time of one square tile of each size, and what of it is kept."""
    arrays = {tile: tile_of(net.contract, tile) for tile in tiles}
    times = interleaved({t: (lambda x=x: engine.run(x)) for t, x in arrays.items()}, runs)
    rows = []
    for tile, figures in times.items():
        ratio = cost_ratio((tile, tile), engine.spec.sizes, engine.spec.outputs)
        kept = 0.0 if ratio is None else tile**2 / ratio / 1e3 / figures["median_ms"]
        computed = tile**2 / 1e3 / figures["median_ms"]
        rows.append({"tile": tile, **figures, "computed_mpx_per_s": computed, "kept_mpx_per_s": kept})
    return rows


def halo(engine: urt.Engine, tile: int, side: int) -> dict[str, Any]:
    """Seconds in the engine with the exact halo over those with none, the same image and tile."""
    pixels = microscopy((side, side), seed=11).image
    exact = engine.spec
    spent: dict[str, list[float]] = {"exact": [], "none": []}
    counts = {}
    for _ in range(3):
        for name, spec in (("exact", exact), ("none", replace(exact, halo="given", halo_limit=0))):
            engine.spec = spec
            with open_image(pixels, spec.contract, spatial=2) as source:
                grid = spec.grid(source.shape, (tile, tile))
                decision = decide(spec.contract, spec.outputs[0].channels, "mask")
                numbers = affine(spec.contract.normalization, source)
                computation = Computation(engine, source, decision, numbers)
                report = run(computation, [Work(0, grid)], lambda work, start, band: None)
            spent[name].append(report.stages["infer"])
            counts[name] = grid.computed_px
    engine.spec = exact
    ratios = [a / b for a, b in zip(spent["exact"], spent["none"], strict=True)]
    return {
        "tile": tile,
        "side": side,
        "median_measured": float(np.median(ratios)),
        "low_measured": min(ratios),
        "high_measured": max(ratios),
        "computed_px": counts["exact"] / counts["none"],
        "formula": cost_ratio((tile, tile), engine.spec.sizes, engine.spec.outputs),
    }


def batches(engine: urt.Engine, net: paper_net.Net, sizes: list[int], tile: int, runs: int) -> list[dict[str, Any]]:
    x = tile_of(net.contract, tile)
    arrays = {n: np.repeat(x, n, axis=0) for n in sizes}
    calls = {n: (lambda x=x: engine.run(x)) for n, x in arrays.items()}
    return [
        {"batch": n, "tile": tile, **f, "tiles_per_s": n / f["median_ms"] * 1e3}
        for n, f in interleaved(calls, runs).items()
    ]


def thread_counts(folder: Path, net: paper_net.Net, tile: int, runs: int) -> list[dict[str, Any]]:
    x = tile_of(net.contract, tile)
    most = machine.threads()
    counts = sorted({1 << k for k in range(most.bit_length()) if 1 << k <= most} | {most})
    engines = {n: urt.load(folder, threads=n) for n in counts}
    times = interleaved({n: (lambda e=e: e.run(x)) for n, e in engines.items()}, runs)
    for engine in engines.values():
        engine.close()
    return [{"threads": n, "tile": tile, **f} for n, f in times.items()]


def channels(net: paper_net.Net, folder: Path, counts: list[int], tile: int, runs: int) -> list[dict[str, Any]]:
    x = tile_of(net.contract, tile)
    engines = {}
    for n in counts:
        path = folder / f"channels-{n}.onnx"
        onnx.save(with_channels(onnx.load(net.onnx), n), path)
        engines[n] = built(path, folder / f"channels-{n}.urt", (tile, tile), "onnxruntime", n)
    arrays = {n: np.repeat(x, n, axis=1) for n in counts}
    calls = {n: (lambda e=e, x=arrays[n]: e.run(x)) for n, e in engines.items()}
    answers = {n: call()[0].argmax(axis=1) for n, call in calls.items()}
    times = interleaved(calls, runs)
    for engine in engines.values():
        engine.close()
    first = answers[counts[0]]
    return [
        {
            "name": f"{n} channels",
            "tile": tile,
            "channels": n,
            **f,
            "label_agreement": float((answers[n] == first).mean()),
        }
        for n, f in times.items()
    ]


def with_channels(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """The network for ``count`` channels: its first convolution repeated, divided by their number."""
    given = model.graph.input[0]
    first = next(node for node in model.graph.node if given.name in node.input)
    if first.op_type != "Conv":
        raise SystemExit(f"the network begins with {first.op_type}, not a convolution")
    weight = next(t for t in model.graph.initializer if t.name == first.input[1])
    repeated = np.repeat(numpy_helper.to_array(weight), count, axis=1) / np.float32(count)
    weight.CopyFrom(numpy_helper.from_array(repeated, weight.name))
    given.type.tensor_type.shape.dim[1].dim_value = count
    del model.graph.value_info[:]
    for entry in model.metadata_props:  # the contract names one channel
        if count > 1 and '"channels"' in entry.value:
            contract = json.loads(entry.value)
            contract["channels"] = [f"{name} {k}" for k in range(count) for name in contract["channels"][:1]]
            entry.value = json.dumps(contract)
    return model


def widths(folder: Path, factors: list[int], tile: int, runs: int) -> list[dict[str, Any]]:
    engines, parameters = {}, {}
    for n in factors:
        net = paper_net.nuclei(widen=n)
        engines[n], parameters[n] = (
            built(net.onnx, folder / f"wide-{n}.urt", (tile, tile), "onnxruntime"),
            net.parameters,
        )
    x = tile_of(net.contract, tile)
    times = interleaved({n: (lambda e=e: e.run(x)) for n, e in engines.items()}, runs)
    for engine in engines.values():
        engine.close()
    return [
        {"name": f"{n} x width", "tile": tile, "factor": n, "parameters": parameters[n], **f} for n, f in times.items()
    ]


def show(found: dict[str, Any]) -> None:
    for r in found["tile_sizes"]:
        print(f"  tile {r['tile']:5d}: {r['median_ms']:8.1f} ms, {r['kept_mpx_per_s']:.3f} kept Mpx/s")
    for r in found["halo"]:
        print(
            f"  halo at tile {r['tile']:5d}: {r['median_measured']:.3f} times the time "
            f"({r['low_measured']:.3f} to {r['high_measured']:.3f}), {r['computed_px']:.3f} times the pixels; "
            f"formula {r['formula'] or 0:.3f}"
        )
    for key in ("batches", "thread_counts", "channels", "widths"):
        for r in found[key]:
            what = r.get("name") or f"{key.split('_')[0]} {r.get('batch') or r.get('threads')}"
            print(f"  {what:16s} tile {r['tile']}: {r['median_ms']:8.1f} ms ({r['low_ms']:.1f} to {r['high_ms']:.1f})")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
