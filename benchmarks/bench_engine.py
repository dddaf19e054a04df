"""Latency per tile: eager PyTorch in named settings, the libraries used directly, and engines of unet-rt.

    python benchmarks/bench_engine.py [--net paper|nuclei] [--tile 572] [--batches 1,4] [--seconds 120] [--out FILE]

One process, per batch one interleaved run after a warm-up round of every contender, medians with the fastest and slowest
run; speeds are medians of the rounds' ratios, with a 95 % interval in the record; as many threads as the process may use.
The network is trained and the tile is real (drawn) microscopy, so that the share of labels equal to eager FP32's stands
beside every time. Included: from a float32 NumPy array to a float32 NumPy array. Not included: building, compiling, the
first run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paper_net
import record
import torch

import unet_rt as urt
from unet_rt import backends
from unet_rt.backends import openvino
from unet_rt.backends.onnxruntime import backend as onnxruntime
from unet_rt.drawing.microscopy import microscopy
from unet_rt.system import facts as machine
from unet_rt.system import limits
from unet_rt.system import timing as bench

Contender = Callable[[], np.ndarray]


def tile_of(contract: urt.Contract, tile: int, seed: int = 4242) -> np.ndarray:
    """(1, 1, tile, tile): drawn microscopy, normalised as the contract says."""
    from unet_rt.images.normalize import affine, normalize_pixels
    from unet_rt.images.open import open_image

    pixels = microscopy((tile, tile), seed=seed).image
    with open_image(pixels, contract, spatial=2) as source:
        numbers = affine(contract.normalization, source).plane(0)
    return normalize_pixels(pixels[None], numbers)[None]


def eager(module: torch.nn.Module, x: np.ndarray, *, channels_last: bool, dtype: torch.dtype | None) -> Contender:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = module.to(memory_format=layout)

    def run() -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return module(torch.from_numpy(x).to(memory_format=layout)).float().numpy()

    return run


def compiled(module: torch.nn.Module, x: np.ndarray) -> Contender:
    function = torch.compile(module)

    def run() -> np.ndarray:
        with torch.inference_mode():
            return function(torch.from_numpy(x)).numpy()

    return run


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=120)
    parser.add_argument("--net", choices=("paper", "nuclei"), default="paper")
    parser.add_argument("--tile", type=int)
    parser.add_argument("--batches", default="1", metavar="1,4", help="tiles per run")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument(
        "--int8", default="openvino", metavar="NAME,..", help="backends to build INT8 engines for; none"
    )
    parser.add_argument(
        "--emulated", action="store_true", help="time BF16 also where the processor has no instructions"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args(argv)
    if args.quick:
        args.net, args.tile, args.batches, args.runs, args.int8, args.no_compile = "nuclei", 192, "1,2", 1, "none", True
    threads = limits.threads()
    torch.set_num_threads(1 if args.quick else threads)
    net = paper_net.paper() if args.net == "paper" else paper_net.nuclei()
    tile = args.tile or (572 if args.net == "paper" else 512)
    x = tile_of(net.contract, tile)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        engines, skipped = built(
            net, Path(folder), tile, [] if args.int8 == "none" else args.int8.split(","), args.quick
        )
        for batch in (int(n) for n in args.batches.split(",")):
            rows += measured(net, engines, np.repeat(x, batch, axis=0), threads, args, skipped)
        for engine in engines.values():
            engine.close()
    print(f"{args.net}, {net.parameters:,} parameters, tile {tile} px, {threads} threads; eager FP32 = 1")
    for row in rows:
        print(
            f"  batch {row['batch']}: {row['name']:32s} {row['median_ms']:8.0f} ms ({row['low_ms']:.0f} to "
            f"{row['high_ms']:.0f})  {row['speed']:5.2f} x  {row['tiles_per_s']:.3f} tiles/s  "
            f"labels equal {row['label_agreement']:.4%}"
        )
    for name, why in skipped.items():
        print(f"  {name:32s} not run: {why}")
    figures = {"net": args.net, "parameters": net.parameters, "tile": tile, "threads": threads, "rows": rows}
    print(record.write(f"engine-{args.net}", {**figures, "skipped": skipped}, args.out, quick=args.quick))
    return 0


def built(
    net: paper_net.Net, folder: Path, tile: int, int8: list[str], quick: bool
) -> tuple[dict[str, urt.Engine], dict[str, str]]:
    """Engines by name, and why others are missing."""
    engines: dict[str, urt.Engine] = {}
    skipped: dict[str, str] = {}
    samples = paper_net.drawn(2, 200) if quick else paper_net.drawn(4, 400)
    for backend in backends.usable("cpu"):
        for precision in ("fp32", "bf16", *(["int8"] if backend in int8 else [])):
            name = f"unet-rt {backend} {precision}"
            try:
                engines[name] = urt.build(
                    net.onnx,
                    samples=samples,
                    out=folder / f"{backend}-{precision}.urt",
                    backend=backend,
                    precision=precision,
                    device="cpu",
                    tile=(tile, tile),
                    halo="exact",
                )
            except (urt.BackendError, urt.ParityError) as error:
                skipped[name] = str(error)
    return engines, skipped


def measured(
    net: paper_net.Net,
    engines: dict[str, urt.Engine],
    x: np.ndarray,
    threads: int,
    args: argparse.Namespace,
    skipped: dict[str, str],
) -> list[dict[str, Any]]:
    """One interleaved run of everybody at one batch; the first is eager FP32, whose speed is 1."""
    contenders: dict[str, Contender] = {
        "eager FP32": eager(net.module(), x, channels_last=False, dtype=None),
        "eager FP32 channels_last": eager(net.module(), x, channels_last=True, dtype=None),
    }
    half = "autocast BF16 channels_last"
    if args.emulated or machine.cpu_features() & record.NATIVE["bf16"]:
        contenders[half] = eager(net.module(), x, channels_last=True, dtype=torch.bfloat16)
    else:
        skipped[half] = "the processor has no BF16 instructions, and emulated it takes minutes (--emulated)"
    if args.no_compile:
        skipped["torch.compile FP32"] = "left out by --no-compile"
    else:
        contenders["torch.compile FP32"] = compiled(net.module(), x)
    for name, library in (("ONNX Runtime", onnxruntime), ("OpenVINO", openvino)):
        reason = library.missing()
        if reason is None:
            bare = library.bare(net.onnx, threads)
            contenders[f"{name} FP32, bare"] = lambda bare=bare: bare([x])[0]  # type: ignore[misc]
        else:
            skipped[f"{name} FP32, bare"] = reason
    for name, engine in engines.items():
        contenders[name] = lambda engine=engine: engine.run(x)[0]  # type: ignore[misc]
    timings = bench.interleave(list(contenders.values()), runs=args.runs, seconds=1 if args.quick else args.seconds)
    baseline = contenders["eager FP32"]()
    labels = baseline.argmax(axis=1)
    rows: list[dict[str, Any]] = []
    for (name, contender), timing in zip(contenders.items(), timings, strict=True):
        result = contender()
        ratio = bench.ratio(timings[0], timing)
        rows.append(
            {
                "name": name,
                "batch": len(x),
                **record.spread(timing),
                "tiles_per_s": len(x) / timing.median_s,
                "speed": ratio.median,
                "speed_low": ratio.low,
                "speed_high": ratio.high,
                "label_agreement": float((result.argmax(axis=1) == labels).mean()),
                "max_abs_error": float(np.abs(result - baseline).max()),
            }
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
