"""Start-up: ``import unet_rt`` and ``unet-rt --help`` beyond NumPy's own import; medians of warm starts, interleaved.

``import unet_rt`` loads names when they are used (not even NumPy); ``image line`` is what a program that predicts pays.

python benchmarks/bench_startup.py [--runs 15] [--out FILE]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import record

STARTS = {
    "import numpy": "import numpy",
    "import unet_rt": "import unet_rt",
    "image line": "from unet_rt import load, predict",
    "unet-rt --help": "import sys; sys.argv = ['unet-rt', '--help']; from unet_rt.cli.main import main; main()",
}


def start(code: str) -> float:
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", f"try:\n    {code}\nexcept SystemExit:\n    pass"], check=True, stdout=subprocess.DEVNULL
    )
    return (time.perf_counter() - begun) * 1e3


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=30)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args(argv)
    runs = 1 if args.quick else args.runs
    begun = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    for turn in range(runs + 2):
        if turn >= 5 and time.perf_counter() - begun > args.seconds:
            break
        for name, code in STARTS.items():
            spent = start(code)
            if turn >= 2:
                times[name].append(spent)
    medians = {name: statistics.median(t) for name, t in times.items()}
    numpy = medians["import numpy"]
    for name, median in medians.items():
        print(
            f"  {name:16s} {median:6.0f} ms   beyond NumPy {median - numpy:5.0f} ms   "
            f"({min(times[name]):.0f} to {max(times[name]):.0f})"
        )
    rows = [
        {"name": n, "median_ms": medians[n], "low_ms": min(t), "high_ms": max(t), "beyond_numpy_ms": medians[n] - numpy}
        for n, t in times.items()
    ]
    print(record.write("startup", {"rows": rows}, args.out, quick=args.quick))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
