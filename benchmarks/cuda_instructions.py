"""How many instructions the CUDA kernels need per sample, counted without a GPU: their PTX, interpreted.

    python benchmarks/cuda_instructions.py [--out FILE]

Kernels that shall be bound by memory must need few: an H200 moves 4.2 TB/s and issues some 10^12 instructions of warps
(of 32 samples) a second, so that 20 instructions per sample take as long as 13 bytes of it; of integer arithmetic, which
addresses are made of, it issues half as many. PTX is not machine code (64-bit additions become two instructions, loads of
parameters none), so counts are for comparing forms of one kernel. Tiles are of the paper's network: 572 px in, 388 out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "tests" / "helpers")]

import record
from device_kernels import DeviceKernels, WatchedMemory, device_kernels

WARP = 32


def cases(kernels: DeviceKernels) -> Iterator[tuple[str, int, Any]]:
    """(name, samples, call)."""
    rng = np.random.default_rng(0)
    for pixel in ("uint8", "uint16", "float32"):
        window = rng.integers(0, 200, (1, 200, 1300)).astype(pixel)
        for dtype in ("float32", "float16"):
            out = np.empty((2, 1, 128, 572), dtype)

            def gather(window: Any = window, out: Any = out) -> None:
                kernels.tile_gather(window, [[3, 7], [5, 395]], out, offset=3.0, divisor=7.0)

            yield f"tile_gather {pixel} to {dtype}", out.size, gather
    starts = [[0, 0], [0, 388], [128, 0], [128, 388]]
    for dtype in ("float32", "float16"):
        for op in ("copy", "softmax", "sigmoid", "argmax", "threshold"):
            channels = 1 if op in ("sigmoid", "threshold") else 2
            tiles = rng.standard_normal((4, channels, 128, 388)).astype(dtype)
            shape = (256, 776) if op == "argmax" else (channels, 256, 776)
            out = np.zeros(shape, np.uint8 if op in ("argmax", "threshold") else np.float32)
            options: dict[str, Any] = {"op": op, **({"threshold": 0.5} if op == "threshold" else {})}

            def stitch(tiles: Any = tiles, out: Any = out, options: Any = options) -> None:
                kernels.tile_stitch(tiles, [[0, 0]] * 4, starts, [[128, 388]] * 4, out, **options)

            yield f"tile_stitch {op}, {channels} x {dtype}", 4 * 128 * 388, stitch
        total, weights = np.zeros((2, 192, 600), np.float32), np.zeros((192, 600), np.float32)
        weight = rng.random((128, 388), np.float32)
        tiles = rng.standard_normal((4, 2, 128, 388)).astype(dtype)

        def blend(tiles: Any = tiles, total: Any = total, weights: Any = weights, weight: Any = weight) -> None:
            at = [[0, 0], [0, 194], [64, 0], [64, 194]]
            kernels.tile_blend(tiles, [[0, 0]] * 4, at, [[128, 388]] * 4, weight, total, weights)

        yield f"tile_blend, 2 x {dtype}", 4 * 128 * 388, blend
    for dtype in ("float32", "float16", "int8"):
        skip, up = (
            rng.integers(-9, 9, (1, 4, 64, 568)).astype(dtype),
            rng.integers(-9, 9, (1, 4, 40, 392)).astype(dtype),
        )
        out = np.empty((1, 8, 40, 392), dtype)

        def concat(skip: Any = skip, up: Any = up, out: Any = out) -> None:
            kernels.crop_concat(skip, up, out)

        yield f"crop_concat {dtype}", out.size, concat


def main(argv: list[str] | None = None) -> int:
    args = record.parser(__doc__ or "", seconds=60).parse_args(argv)
    found: dict[str, float] = {}
    with device_kernels("compiled") as kernels:
        assert issubclass(kernels.memory, WatchedMemory)
        memory = kernels.memory.watch
        for name, samples, call in cases(kernels):
            memory.instructions = 0
            call()
            found[name] = memory.instructions * WARP / samples
            print(f"  {name:40s} {found[name]:7.1f} instructions per sample")
            if args.quick:
                break
    path = record.write("cuda-instructions", {"per_sample": found}, args.out, quick=args.quick)
    print(path or "nothing written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
