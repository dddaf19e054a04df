"""What each pass does to speed and result, per backend: fold, up_conv, QDQ, half.

    python benchmarks/bench_passes.py [--net nuclei|nuclei4|paper] [--tile 512] [--runs 7] [--seconds 60]

Every pass is timed against the same graph without it, interleaved, one tile, batch 1, in the library itself (ONNX Runtime
and OpenVINO on the CPU, as many threads as the process may use).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import record
from bench_engine import tile_of
from bench_precision import NETS

from unet_rt import backends
from unet_rt.building.calibration import calibrate
from unet_rt.building.quantiser import form_of
from unet_rt.graph.passes import qdq
from unet_rt.graph.passes.fold import fold
from unet_rt.graph.passes.half import half
from unet_rt.graph.passes.up_conv import up_conv
from unet_rt.system import limits as machine
from unet_rt.system import timing as bench

Array = np.ndarray[Any, Any]


class Bare:
    """A graph in one of the libraries, FP32 or what the graph holds; no pass of ours on the way."""

    def __init__(self, backend: str, model: onnx.ModelProto, folder: Path, shape: tuple[int, ...]):
        path = folder / f"{backend}-{len(list(folder.iterdir()))}.onnx"
        onnx.save(model, path)
        if backend == "onnxruntime":
            import onnxruntime

            from unet_rt.backends.onnxruntime.library import session_options

            options = session_options(onnxruntime, machine.threads())
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name
            self.run: Callable[[Array], Array] = lambda x: session.run(None, {name: x})[0]
        else:
            import openvino

            found = openvino.Core().read_model(str(path))
            found.reshape({0: list(shape)})
            config = {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": machine.threads(),
                "INFERENCE_PRECISION_HINT": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            }
            request = openvino.Core().compile_model(found, "CPU", config).create_infer_request()
            self.run = lambda x: request.infer({0: x}, share_inputs=True, share_outputs=True)[0]


def pairs(model: onnx.ModelProto, tiles: list[Array]) -> dict[str, tuple[onnx.ModelProto, Callable[[str], Any], str]]:
    """Per pass the graph before it, after it by backend, and what the result is compared as."""

    def copy(change: Callable[[onnx.ModelProto], Any]) -> onnx.ModelProto:
        made = onnx.ModelProto()
        made.CopyFrom(model)
        change(made)
        return made

    prepared = qdq.prepare_graph(model)
    found = calibrate(prepared, qdq.tensors_to_probe(prepared), [[x] for x in tiles])

    def quantised(backend: str) -> onnx.ModelProto:
        return qdq.quantise(prepared, found.ranges["mse"], form_of(backend), means=found.means).model

    halved = copy(lambda m: half(m, keep_io=True))
    return {
        "fold": (model, lambda _: copy(fold), "values"),
        "up_conv": (model, lambda _: copy(up_conv), "values"),
        "QDQ": (model, quantised, "labels"),
        "half": (model, lambda _: halved, "labels"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=sorted(NETS), default="nuclei")
    parser.add_argument("--tile", type=int)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60, help="for each pass and backend")
    parser.add_argument("--out")
    args = parser.parse_args()
    make, side = NETS[args.net]
    net, tile = make(), args.tile or side
    x = tile_of(net.contract, tile)
    model = onnx.load(net.onnx)
    tiles = [tile_of(net.contract, tile, seed=seed) for seed in range(2, 5)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, (before, after, compared) in pairs(model, tiles).items():
            for backend in ("onnxruntime", "openvino"):
                if backend not in backends.usable("cpu"):
                    continue
                rows.append(row(name, backend, before, after(backend), compared, x, Path(temporary), args))
                print(
                    "{name:10s} {backend:12s} {before_ms:8.1f} -> {after_ms:8.1f} ms, "
                    "{speed:.3f} x ({speed_low:.3f} to {speed_high:.3f}); {difference}".format(**rows[-1]),
                    flush=True,
                )
    figures = {"net": args.net, "parameters": net.parameters, "tile": tile, "threads": machine.threads(), "rows": rows}
    print(record.write(f"passes-{args.net}", figures, args.out))


def row(
    name: str,
    backend: str,
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    compared: str,
    x: Array,
    folder: Path,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Times and difference of one pass in one library."""
    old, new = Bare(backend, before, folder, x.shape), Bare(backend, after, folder, x.shape)
    timings = bench.interleave([lambda: old.run(x), lambda: new.run(x)], runs=args.runs, seconds=args.seconds)
    a, b = np.array(old.run(x)), np.array(new.run(x))
    if compared == "values":
        difference = f"largest error {np.abs(a - b).max():.2e} of {np.abs(a).max():.3g}"
    else:
        difference = f"{np.mean(b.argmax(1) != a.argmax(1)):.4%} of labels"
    one, two = timings
    return {
        "name": name,
        "backend": backend,
        "before_ms": one.median_s * 1e3,
        "after_ms": two.median_s * 1e3,
        "speed": one.median_s / two.median_s,
        "speed_low": one.low_s / two.high_s,
        "speed_high": one.high_s / two.low_s,
        "runs": one.runs,
        "difference": difference,
    }


if __name__ == "__main__":
    main()
