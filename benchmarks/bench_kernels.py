"""How fast the CPU kernels are, as ratios measured in one interleaved run.

Method: every kernel, its NumPy twin (``tests/helpers/reference.py``) and ``np.copyto`` of as many bytes as the kernel reads
and writes (half read, half written) run in turns, with the same number of threads (for several, ``np.copyto`` of one
part per thread; the twin has one), on arrays that were written before, so that no page is new. Reported are medians,
and from them

- ``bandwidth``: time of ``np.copyto`` / time of the kernel: 1 is the speed of a copy of the same bytes;
- ``twin``: time of the twin / time of the kernel. Where a kernel only moves float32 (``copy``, ``crop_concat``), NumPy
  itself runs at the speed of memory, and the twin is slower only by the copies it makes on the way.

Run: ``python benchmarks/bench_kernels.py [--threads N] [--rounds N] [--out FILE]``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "tests" / "helpers")]

import record
import reference

from unet_rt.kernels import calls as kernels
from unet_rt.kernels import native
from unet_rt.kernels.request import Affine, Operation, Placement

Case = tuple[str, int, Callable[[], Any], Callable[[], Any]]  # name, bytes touched, kernel, twin


def gather_cases(size: int, threads: int) -> Iterator[Case]:
    """One tile of ``size`` px, mirrored 16 px at two edges, normalised."""
    rng = np.random.default_rng(0)
    layouts: list[tuple[str, str, str, Callable[[NDArray[Any]], NDArray[Any]], int]] = [
        ("uint8", "float32", "grey", lambda a: a, 1),
        ("uint16", "float32", "grey", lambda a: a, 1),
        ("float32", "float32", "grey", lambda a: a, 1),
        ("int32", "float32", "grey", lambda a: a, 1),
        ("uint8", "float16", "grey", lambda a: a, 1),
        ("uint8", "float32", "RGB interleaved", lambda a: np.moveaxis(a.transpose(1, 2, 0).copy(), -1, 0), 3),
    ]
    for dtype, out_dtype, layout, arrange, channels in layouts:
        image = arrange(rng.integers(0, 200, (channels, size, size)).astype(dtype))
        out = np.zeros((1, channels, size, size), out_dtype)
        offset, divisor = np.full(channels, 3.1, np.float32), np.full(channels, 57.3, np.float32)
        numbers = Affine(offset, divisor, None)
        starts = [[-16, -16]]

        def kernel(image: Any = image, out: Any = out, starts: Any = starts, numbers: Affine = numbers) -> None:
            kernels.tile_gather(image, starts, out, affine=numbers, threads=threads)

        def twin(image: Any = image, out: Any = out, starts: Any = starts, numbers: Affine = numbers) -> None:
            reference.tile_gather(
                image, starts, out.shape[2:], out.dtype, offset=numbers.offset, divisor=numbers.divisor
            )

        yield f"tile_gather {dtype} {layout} to {out_dtype}", image.nbytes + out.nbytes, kernel, twin


def stitch_cases(size: int, threads: int) -> Iterator[Case]:
    """The core of one tile, 48 px less on every side."""
    rng = np.random.default_rng(1)
    core = size - 96
    parts = [np.array([place]) for place in ((48, 48), (0, 0), (core, core))]
    for op, channels, dtype in [
        ("copy", 1, "float32"),
        ("copy", 3, "float32"),
        ("copy", 3, "float16"),
        ("argmax", 2, "float32"),
        ("argmax", 5, "float32"),
        ("argmax", 5, "float16"),
        ("threshold", 1, "float32"),
        ("threshold", 3, "float32"),
        ("sigmoid", 1, "float32"),
        ("softmax", 3, "float32"),
    ]:
        tiles = rng.standard_normal((1, channels, size, size)).astype(dtype)
        shape = (core, core) if op == "argmax" else (channels, core, core)
        out = np.zeros(shape, np.uint8 if op in ("argmax", "threshold") else np.float32)
        options: dict[str, Any] = {"op": op, "threshold": 0.0 if op == "threshold" else None}

        def kernel(tiles: Any = tiles, out: Any = out, options: Any = options) -> None:
            kernels.tile_stitch(tiles, Placement(*parts), out, Operation(**options), threads=threads)

        def twin(tiles: Any = tiles, out: Any = out, options: Any = options) -> None:
            reference.tile_stitch(tiles, *parts, out, **options)

        used = channels * core * core * tiles.itemsize
        yield f"tile_stitch {op}, {channels} x {dtype}", used + out.nbytes, kernel, twin


def other_cases(size: int, threads: int) -> Iterator[Case]:
    """Blending of a tile, and a skip connection."""
    rng = np.random.default_rng(2)
    tiles = rng.standard_normal((1, 2, size, size)).astype(np.float32)
    weight = rng.uniform(0.1, 1, (size, size)).astype(np.float32)
    total, weights = np.zeros((2, size, size), np.float32), np.zeros((size, size), np.float32)
    parts = [np.array([place]) for place in ((0, 0), (0, 0), (size, size))]
    yield (
        "tile_blend, 2 x float32",
        tiles.nbytes + 2 * total.nbytes + 4 * weights.nbytes,
        lambda: kernels.tile_blend(tiles, Placement(*parts), weight, total, weights, threads=threads),
        lambda: reference.tile_blend(tiles, *parts, weight, total, weights),
    )
    up = tiles[:, :, 4:-4, 4:-4].copy()
    out = np.zeros((1, 4, size - 8, size - 8), np.float32)
    yield (
        "crop_concat, 2 + 2 x float32",
        2 * out.nbytes,
        lambda: kernels.crop_concat(tiles, up, out, threads=threads),
        lambda: reference.crop_concat(tiles, up),
    )


def copy_of(touched: int, threads: int, pool: ThreadPoolExecutor) -> Callable[[], Any]:
    """``np.copyto`` that reads and writes ``touched`` bytes in all."""
    source, target = (np.ones(touched // 2, np.uint8) for _ in range(2))
    if threads == 1:
        return lambda: np.copyto(target, source)
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    return lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs))


def measure(cases: list[Case], threads: int, rounds: int) -> list[dict[str, Any]]:
    """Medians in ms of each case's kernel, copy and twin, in turns."""
    results = []
    with ThreadPoolExecutor(threads) as pool:
        for name, touched, kernel, twin in cases:
            calls = {"kernel": kernel, "copy": copy_of(touched, threads, pool), "twin": twin}
            times: dict[str, list[float]] = {key: [] for key in calls}
            for turn in range(rounds + 1):  # the first turn only warms up
                for key, call in calls.items():
                    begin = time.perf_counter()
                    call()
                    if turn:
                        times[key].append((time.perf_counter() - begin) * 1e3)
            ms = {key: median(values) for key, values in times.items()}
            results.append(
                {
                    "name": name,
                    "bytes": touched,
                    **{f"{key}_ms": round(value, 4) for key, value in ms.items()},
                    "median_ms": round(ms["kernel"], 4),
                    "low_ms": round(min(times["kernel"]), 4),
                    "high_ms": round(max(times["kernel"]), 4),
                    "bandwidth": round(ms["copy"] / ms["kernel"], 3),
                    "twin": round(ms["twin"] / ms["kernel"], 2),
                }
            )
    return results


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a table, writes the record."""
    parser = record.parser(__doc__, seconds=60)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as this process may use")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=2048, help="tile size in px")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.size = 1, 160
    threads = options.threads or native.default_threads()
    cases = [*gather_cases(options.size, threads), *stitch_cases(options.size, threads)]
    results = measure([*cases, *other_cases(options.size, threads)], threads, options.rounds)
    print(f"{'':44} {'kernel ms':>10} {'copyto ms':>10} {'twin ms':>9} {'bandwidth':>10} {'x twin':>7}")
    for r in results:
        print(
            f"{r['name']:44} {r['kernel_ms']:10.2f} {r['copy_ms']:10.2f} {r['twin_ms']:9.1f} {r['bandwidth']:10.2f} "
            f"{r['twin']:7.1f}"
        )
    figures = {"threads": threads, "rounds": options.rounds, "tile_px": options.size, "results": results}
    print(record.write("kernels", figures, options.out, quick=options.quick))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
