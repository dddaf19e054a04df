"""Latency per tile: eager PyTorch in named settings, the libraries used directly, and engines of unet-rt.

    python benchmarks/bench_engine.py [--net paper|nuclei] [--tile 572] [--seconds 300] [--out FILE]

One process, one interleaved run after a warm-up round of every contender, medians with the fastest and slowest run,
batch 1, as many threads as the process may use. The network is trained and the tile is real (drawn) microscopy, so that
the share of labels equal to eager FP32's stands beside every time. Included: from a float32 NumPy array to a float32
NumPy array. Not included: building, compiling, the first run.
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
from unet_rt import bench, machine
from unet_rt.synthetic import microscopy

Contender = Callable[[], np.ndarray]


def tile_of(contract: urt.Contract, tile: int, seed: int = 4242) -> np.ndarray:
    """(1, 1, tile, tile): drawn microscopy, normalised as the contract says."""
    from unet_rt.image import open_image
    from unet_rt.normalize import affine, normalised

    pixels = microscopy((tile, tile), seed=seed).image
    with open_image(pixels, contract, spatial=2) as source:
        numbers = affine(contract.normalization, source).plane(0)
    return normalised(pixels[None], numbers)[None]


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


def bare_onnxruntime(model: Path, x: np.ndarray, threads: int) -> Contender:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0]


def bare_openvino(model: Path, x: np.ndarray, threads: int, precision: str) -> Contender:
    import openvino

    core = openvino.Core()
    network = core.read_model(str(model))
    network.reshape(list(x.shape))
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    return lambda: np.array(request.infer([x])[0])


def engine(model: Path, folder: Path, x: np.ndarray, backend: str, precision: str) -> Contender:
    samples = [microscopy((700, 700), seed=s).image for s in range(2)]
    tile = x.shape[2:]
    built = urt.build(
        model,
        samples=samples if precision != "fp32" else None,
        out=folder / f"{backend}-{precision}.urt",
        backend=backend,
        precision=precision,
        tile=tile,
    )
    return lambda: built.run(x)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("paper", "nuclei"), default="paper")
    parser.add_argument("--tile", type=int)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out")
    args = parser.parse_args()
    threads = machine.threads()
    torch.set_num_threads(threads)
    net = paper_net.paper() if args.net == "paper" else paper_net.nuclei()
    tile = args.tile or (572 if args.net == "paper" else 512)
    x = tile_of(net.contract, tile)
    contenders: dict[str, Contender] = {
        "eager FP32": eager(net.module(), x, channels_last=False, dtype=None),
        "eager FP32 channels_last": eager(net.module(), x, channels_last=True, dtype=None),
        "autocast BF16 channels_last": eager(net.module(), x, channels_last=True, dtype=torch.bfloat16),
    }
    if not args.no_compile:
        contenders["torch.compile FP32"] = compiled(net.module(), x)
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        engines: dict[str, Contender] = {}
        for backend in ("onnxruntime", "openvino"):
            for precision in ("fp32", "bf16"):
                name = f"unet-rt {backend} {precision}"
                try:
                    engines[name] = engine(net.onnx, Path(folder), x, backend, precision)
                except urt.BackendError as error:
                    skipped[name] = str(error)
        # after the engines: their backends import the libraries without telemetry
        contenders["ONNX Runtime FP32, bare"] = bare_onnxruntime(net.onnx, x, threads)
        contenders["OpenVINO FP32, bare"] = bare_openvino(net.onnx, x, threads, "f32")
        contenders.update(engines)
        timings = bench.interleave(list(contenders.values()), runs=args.runs, seconds=args.seconds)
        baseline = contenders["eager FP32"]()
        labels = baseline.argmax(axis=1)
        rows: list[dict[str, Any]] = []
        for (name, contender), timing in zip(contenders.items(), timings, strict=True):
            result = contender()
            rows.append(
                {
                    "name": name,
                    "median_ms": timing.median_s * 1e3,
                    "low_ms": timing.low_s * 1e3,
                    "high_ms": timing.high_s * 1e3,
                    "runs": timing.runs,
                    "speed": timings[0].median_s / timing.median_s,
                    "label_agreement": float((result.argmax(axis=1) == labels).mean()),
                    "max_abs_error": float(np.abs(result - baseline).max()),
                }
            )
    print(f"{args.net}, {net.parameters:,} parameters, tile {tile} px, batch 1, {threads} threads; eager FP32 = 1")
    for row in rows:
        print(
            f"  {row['name']:32s} {row['median_ms']:8.0f} ms ({row['low_ms']:.0f} to {row['high_ms']:.0f})  "
            f"{row['speed']:5.2f} x  labels equal {row['label_agreement']:.4%}"
        )
    for name, why in skipped.items():
        print(f"  {name:32s} not run: {why}")
    figures = {"net": args.net, "parameters": net.parameters, "tile": tile, "threads": threads, "rows": rows}
    print(record.write(f"engine-{args.net}", {**figures, "skipped": skipped}, args.out))


if __name__ == "__main__":
    main()
