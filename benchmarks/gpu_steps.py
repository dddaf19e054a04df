"""Where the cuDNN backend's time goes: each step of a plan, its bytes, its arithmetic and its share of the roof.

    python benchmarks/gpu_steps.py [--batch 16] [--tile 572] [--graph FILE] [--repeats 20] [--out FILE]

Times are CUDA events around the steps of whole runs (so that what lies in the L2 cache is what would lie there), the
median of the repeats. Beside them: the whole run from a CUDA graph, and alternatives: the first layer by cuDNN, the first
engine that cuDNN's heuristics name instead of the fastest, a pooling without the crop. Engines that were passed over are
named with the reason: what they got wrong, or how they failed. What fails is named and left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402

from unet_rt.backends import cudnn_session  # noqa: E402
from unet_rt.backends.cudnn_plan import Convolve, Plan, Pool  # noqa: E402
from unet_rt.device import Device  # noqa: E402

FIGURES: dict[str, Any] = {"failed": []}


@contextmanager
def part(what: str) -> Iterator[None]:
    """A measurement whose failure is named and ends nothing else."""
    print(f"\n== {what}", flush=True)
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the record
        traceback.print_exc(limit=-6, file=sys.stdout)
        FIGURES["failed"].append({"what": what, "why": f"{type(error).__name__}: {error}"[:1500]})


def timed(gpu: Device, stream: Any, work: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of ``work``."""
    for _ in range(3):
        work()
    marks = [gpu.event(timing=True) for _ in range(repeats + 1)]
    stream.record(marks[0])
    for mark in marks[1:]:
        work()
        stream.record(mark)
    marks[-1].synchronize()
    return 1e3 * statistics.median(b.seconds_since(a) for a, b in itertools.pairwise(marks))


def copy_speed(gpu: Device) -> float:
    """Bytes per second, read and written, of a copy larger than any cache."""
    stream = gpu.stream()
    a, b = gpu.empty((1 << 30,), np.uint8), gpu.empty((1 << 30,), np.uint8)
    gpu.zero(a, stream)
    ms = timed(gpu, stream, lambda: gpu.copy(b, a, stream), 10)
    stream.synchronize()
    a.free()
    b.free()
    return 2 * (1 << 30) / ms * 1e3


def gemm_speed() -> float:
    """FLOP/s of a large float16 product, by PyTorch; 0 without it."""
    try:
        import torch
    except ImportError:
        return 0.0
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    for _ in range(3):
        a @ a
    mark: Any = torch.cuda.Event
    start, end = mark(enable_timing=True), mark(enable_timing=True)
    start.record()
    for _ in range(20):
        a @ a
    end.record()
    end.synchronize()
    return float(2 * 8192**3 * 20 / (start.elapsed_time(end) * 1e-3))


class Run:
    """A session with arrays on the device for one shape."""

    def __init__(self, graph: Path, shape: Sequence[int], **options: Any) -> None:
        begun = time.perf_counter()
        self.session = cudnn_session.CudnnSession(graph, "cuda:0", **options)
        self.gpu = Device.open(0)
        out = self.session.output_shapes([shape])
        self.setup_s = time.perf_counter() - begun
        self.plan: Plan
        self.plan, self.calls = self.session.steps([shape])
        rng = np.random.default_rng(0)
        self.input = self.gpu.empty(shape, np.float16)
        self.outputs = [self.gpu.empty(s, np.float16) for s in out]
        self.gpu.copy_in(self.input, rng.standard_normal(shape).astype(np.float16), self.session.stream)

    def whole(self, repeats: int) -> float:
        """Milliseconds of a run from its CUDA graph."""
        return timed(
            self.gpu,
            self.session.stream,
            lambda: self.session.run_device([self.input], self.outputs),
            repeats,
        )

    def each(self, repeats: int) -> list[float]:
        """Median milliseconds of every step, in whole runs."""
        stream = self.session.stream
        ins, outs = [self.input.pointer], [a.pointer for a in self.outputs]
        rounds = []
        with self.gpu.activate():
            for _ in range(repeats + 2):
                marks = [self.gpu.event(timing=True) for _ in range(len(self.calls) + 1)]
                stream.record(marks[0])
                for call, mark in zip(self.calls, marks[1:], strict=True):
                    call(ins, outs, stream.handle)
                    stream.record(mark)
                marks[-1].synchronize()
                rounds.append([1e3 * b.seconds_since(a) for a, b in itertools.pairwise(marks)])
        return [statistics.median(column) for column in zip(*rounds[2:], strict=True)]

    def close(self) -> None:
        self.session.close()
        for array in (self.input, *self.outputs):
            array.free()


def table(run: Run, repeats: int, copy: float, gemm: float) -> list[dict[str, Any]]:
    """Steps with times and shares of the roof: the larger of arithmetic and traffic, each at its measured speed."""
    rows = []
    for step, ms in zip(run.plan.steps, run.each(repeats), strict=True):
        flops, moved = run.plan.flops(step), run.plan.traffic(step)
        rate = gemm if isinstance(step, Convolve) else 0.0
        least = 1e3 * max(flops / rate if rate else 0.0, moved / copy)
        row: dict[str, Any] = {
            "step": type(step).__name__,
            "name": step.name,
            "ms": round(ms, 4),
            "gb_s": round(moved / ms / 1e6),
            "tflops": round(flops / ms / 1e9, 1),
            "roof": round(least / ms, 3),
        }
        if isinstance(step, Convolve):
            key = cudnn_session.key_of(step.convolution)
            tried = run.session.trials.get(key, [])
            trials = sorted((t for t in tried if t.ms is not None), key=lambda t: t.ms or 0.0)
            row["engine"] = run.session.choices.names.get(key, "")
            row["trials"] = len(trials)
            row["first_ms"] = next((t.ms for t in tried if t.ms is not None), None)
            row["passed_over"] = {t.name: t.note for t in tried if t.note}
            row["best"] = [(t.name, round(t.ms or 0.0, 4)) for t in trials[:4]]
            row["shape"] = (
                f"{step.convolution.channels}->{step.convolution.filters} {step.convolution.kernel[0]}x"
                f"{step.convolution.kernel[1]} on {step.convolution.size[0]}x{step.convolution.size[1]}"
            )
        rows.append(row)
        print(
            f"{row['step']:9}{row['name'][-34:]:35}{row.get('shape', ''):30}{ms:8.4f} ms {row['gb_s']:6} GB/s "
            f"{row['tflops']:7} TFLOP/s  roof {row['roof']:6.1%}  {row.get('engine', '')[:34]}",
            flush=True,
        )
        for name, note in row.get("passed_over", {}).items():
            print(f"{'':9}passed over: {name}: {note}", flush=True)
    total = sum(r["ms"] for r in rows)
    kinds: dict[str, float] = {}
    for r in rows:
        kinds[r["step"]] = kinds.get(r["step"], 0.0) + r["ms"]
    print("sum", round(total, 3), "ms:", {k: round(v, 3) for k, v in kinds.items()}, flush=True)
    FIGURES["kinds"] = kinds
    return rows


def pools(run: Run, repeats: int) -> None:
    """The first pooling: with its crop in the same pass, without, and the crop copied on its own."""
    index, step = next((k, s) for k, s in enumerate(run.plan.steps) if isinstance(s, Pool) and s.crop is not None)
    assert isinstance(step, Pool)
    assert step.crop is not None
    ready = run.session._ready[next(reversed(run.session._ready))]
    block, stream, kernels = ready.block.pointer, run.session.stream, run.session._kernels

    def at(region: Any) -> tuple[int, int, int, int]:
        place = run.plan.place(region)
        return block + place[0], *place[1:]

    n = run.plan.batch
    sizes = (n, *step.source.size, step.source.channels)
    start, column = at(step.source), run.plan.place(step.source)
    begin = (start[0] + step.start[0] * column[2] + step.start[1] * column[3], *start[1:])
    crop = (n, *step.crop.size, step.source.channels)
    none = (0, 0, 0, 0)
    with run.gpu.activate():
        variants: dict[str, Callable[[], object]] = {
            "pool with crop": lambda: run.calls[index]([], [], stream.handle),
            "pool alone": lambda: kernels.steps_pool(start, sizes, at(step.target), none, none, stream.handle),
            "crop alone": lambda: kernels.steps_add(begin, none, at(step.crop), crop, 1.0, stream.handle),
        }
        for name, work in variants.items():
            ms = timed(run.gpu, stream, work, repeats)
            FIGURES.setdefault("pools", {})[name] = ms
            print(f"{name:20}{ms:8.4f} ms", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tile", type=int, default=572)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--graph", type=Path, help="an FP32 ONNX file; default: the paper's network")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "gpu_steps.json")
    args = parser.parse_args(argv)
    shape = (args.batch, args.channels, args.tile, args.tile)
    graph = args.graph
    if graph is None:
        import paper_net

        graph = paper_net.paper().onnx
    FIGURES.update(shape=shape, graph=graph.name)
    copy, gemm = 4.2e12, 7.56e14
    with part("roof"):
        copy = copy_speed(Device.open(0))
        gemm = gemm_speed() or gemm
        print(f"copy {copy / 1e12:.2f} TB/s, float16 product {gemm / 1e12:.0f} TFLOP/s")
    FIGURES.update(copy_bytes_s=copy, gemm_flops_s=gemm)

    def save() -> None:
        args.out.write_text(json.dumps(FIGURES, indent=1, default=str), encoding="utf-8")

    results: dict[str, Any] = FIGURES.setdefault("runs", {})

    def whole(label: str, run: Run) -> None:
        ms = run.whole(args.repeats)
        results[label] = {"ms": ms, "tiles_s": args.batch / ms * 1e3, "setup_s": run.setup_s}
        print(f"{label}: {ms:.3f} ms, {args.batch / ms * 1e3:.0f} tiles/s, ready after {run.setup_s:.1f} s", flush=True)
        save()

    with part("fastest engines by timing"):
        run = Run(graph, shape, most=0)
        try:
            whole("all engines timed", run)
            FIGURES["steps"] = table(run, args.repeats, copy, gemm)
            save()
            whole("all engines timed, again", run)
            with part("pooling and crop"):
                pools(run, args.repeats)
        finally:
            run.close()
    for label, options in {
        "first layer by cuDNN": {"most": 0, "direct": False},
        "six engines timed": {"most": 6},
        "heuristics alone": {"most": 1},
    }.items():
        with part(label):
            run = Run(graph, shape, **options)
            try:
                whole(label, run)
                if "direct" in options:
                    for step, ms in list(zip(run.plan.steps, run.each(args.repeats), strict=True))[:2]:
                        print(f"{type(step).__name__:9}{step.name[-34:]:35}{ms:8.4f} ms", flush=True)
            finally:
                run.close()
    for batch in sorted({1, 4} - {args.batch}):
        with part(f"batch {batch}"):
            run = Run(graph, (batch, *shape[1:]), most=0)
            try:
                ms = run.whole(50)
                results[f"batch {batch}"] = {"ms": ms, "tiles_s": batch / ms * 1e3}
                print(f"batch {batch}: {ms:.3f} ms, {batch / ms * 1e3:.0f} tiles/s")
            finally:
                run.close()
    save()
    print(f"\n{args.out}; failed: {[f['what'] for f in FIGURES['failed']] or 'nothing'}")
    return 1 if FIGURES["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
