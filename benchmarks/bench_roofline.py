"""A roofline of this machine: peak matrix products and copy bandwidth, and what engines and kernels reach of them.

    python benchmarks/bench_roofline.py [--seconds 60] [--out FILE]

Peaks are measured, not looked up: products of 2048 x 2048 matrices with PyTorch (oneDNN, MKL) and NumPy (OpenBLAS), the
faster of the two, in FP32, and in BF16 and INT8 where the processor has instructions for them (else they are emulated, and
no roof); the copy of 256 MB with ``np.copyto`` by all threads, read plus written. Engines: multiply-adds of the network as
written (``unet-rt inspect``), whatever a library computes, over the time of a tile. Kernels: bytes read and written
(``bench_kernels.py``) over their time; small ones live in caches and may pass the roof.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bench_kernels
import numpy as np
import paper_net
import record
import torch
from bench_engine import tile_of

import unet_rt as urt
from unet_rt import backends
from unet_rt.graph import report as graph
from unet_rt.system import facts as machine
from unet_rt.system import limits
from unet_rt.system import timing as bench


def main(argv: list[str] | None = None) -> int:
    args = record.parser(__doc__, seconds=60).parse_args(argv)
    threads = limits.threads()
    torch.set_num_threads(1 if args.quick else threads)
    seconds = 1.0 if args.quick else args.seconds / 4
    products, skipped = peaks(256 if args.quick else 2048, seconds)
    copied = copy_rate(2**22 if args.quick else 2**28, threads, seconds)
    roof = {row["name"]: row["gflop_s"] for row in products}
    print(f"{machine.cpu_name()}, {threads} threads; copy {copied['gb_s']:.1f} GB/s")
    for row in products:
        print(f"  product {row['name']:6s} {row['gflop_s']:8.1f} GFLOP/s ({row['library']})")
    rows = engines(threads, args.quick, seconds, roof)
    kernels = kernel_rows(512 if args.quick else 2048, threads, 1 if args.quick else 7, copied["gb_s"])
    for row in rows:
        print(f"  {row['name']:36s} {row['gflop_s']:8.1f} GFLOP/s, {row['share']:.0%} of the {row['roof']} product")
    for row in kernels:
        print(f"  {row['name']:44s} {row['gb_s']:6.1f} GB/s, {row['share']:.0%} of the copy")
    for name, why in skipped.items():
        print(f"  {name} not measured: {why}")
    figures = {
        "threads": threads,
        "products": products,
        "copy": copied,
        "engines": rows,
        "kernels": kernels,
        "skipped": skipped,
    }
    print(record.write("roofline", figures, args.out, quick=args.quick))
    return 0


def peaks(side: int, seconds: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The fastest product of two square matrices per precision."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((side, side)).astype(np.float32) for _ in range(2))
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("fp32", "NumPy"): lambda: a @ b,
        ("fp32", "PyTorch"): lambda: ta @ tb,
    }
    skipped: dict[str, str] = {}
    features = machine.cpu_features()
    if features & record.NATIVE["bf16"]:
        ha, hb = ta.bfloat16(), tb.bfloat16()
        calls["bf16", "PyTorch"] = lambda: ha @ hb
    else:
        skipped["bf16"] = "the processor has no instructions for it"
    if features & record.NATIVE["int8"]:
        ia, ib = (torch.from_numpy(rng.integers(-128, 128, (side, side)).astype(np.int8)) for _ in range(2))
        calls["int8", "PyTorch"] = lambda: torch._int_mm(ia, ib)
    else:
        skipped["int8"] = "the processor has no instructions for it"
    timings = bench.interleave(list(calls.values()), runs=15, seconds=seconds)
    best: dict[str, dict[str, Any]] = {}
    for (precision, library), timing in zip(calls, timings, strict=True):
        # the roof is what can be reached: the fastest run
        rate = 2 * side**3 / timing.low_s / 1e9
        if precision not in best or rate > best[precision]["gflop_s"]:
            best[precision] = {
                "name": precision,
                "library": library,
                "gflop_s": rate,
                "side": side,
                **record.spread(timing),
            }
    return list(best.values()), skipped


def copy_rate(size: int, threads: int, seconds: float) -> dict[str, Any]:
    with ThreadPoolExecutor(threads) as pool:
        copy = bench_kernels.copy_of(2 * size, threads, pool)
        (timing,) = bench.interleave([copy], runs=15, seconds=seconds)
    return {"bytes": 2 * size, "gb_s": 2 * size / timing.low_s / 1e9, **record.spread(timing)}


def engines(threads: int, quick: bool, seconds: float, roof: dict[str, float]) -> list[dict[str, Any]]:
    """Every backend's FP32 (and BF16) engine at one tile."""
    net = paper_net.nuclei()
    tile = 192 if quick else 512
    x = tile_of(net.contract, tile)
    report = graph.inspect(net.onnx)
    out = report.outputs[0].field
    work = report.flops_per_pixel * out[0].out_size(tile) * out[1].out_size(tile)
    built: dict[tuple[str, str], urt.Engine] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in backends.usable("cpu"):
            for precision in ("fp32", "bf16"):
                if precision in backends.get(name).precisions("cpu"):
                    built[name, precision] = urt.build(
                        net.onnx,
                        samples=paper_net.drawn(2, 200 if quick else 640),
                        out=Path(folder) / f"{name}-{precision}.urt",
                        backend=name,
                        precision=precision,
                        device="cpu",
                        tile=(tile, tile),
                        halo="exact",
                    )
        timings = bench.interleave([lambda e=e: e.run(x) for e in built.values()], runs=15, seconds=seconds)
        for engine in built.values():
            engine.close()
    rows = []
    for (name, precision), timing in zip(built, timings, strict=True):
        against = precision if precision in roof else "fp32"
        rate = work / timing.median_s / 1e9
        row = {"name": f"unet-rt {name} {precision}", "tile": tile, "gflop_s": rate, "roof": against}
        rows.append({**row, "share": rate / roof[against], **record.spread(timing)})
    return rows


def kernel_rows(size: int, threads: int, rounds: int, copy_gb_s: float) -> list[dict[str, Any]]:
    cases = [*bench_kernels.gather_cases(size, threads), *bench_kernels.stitch_cases(size, threads)]
    cases += bench_kernels.other_cases(size, threads)
    rows = []
    for result in bench_kernels.measure(cases, threads, rounds):
        rate = result["bytes"] / result["kernel_ms"] / 1e6
        rows.append({"name": result["name"], "gb_s": rate, "share": rate / copy_gb_s})
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
