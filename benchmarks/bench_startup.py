"""Start-up: ``import unet_rt`` and ``unet-rt --help`` beyond NumPy's own import; medians of warm starts, interleaved.

``import unet_rt`` loads names when they are used (not even NumPy); ``image line`` is what a program that predicts pays.

python benchmarks/bench_startup.py [--runs 15] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import record

STARTS = {
    "import numpy": "import numpy",
    "import unet_rt": "import unet_rt",
    "image line": "from unet_rt import load, predict",
    "unet-rt --help": "import sys; sys.argv = ['unet-rt', '--help']; from unet_rt.cli import main; main()",
}


def start(code: str) -> float:
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", f"try:\n    {code}\nexcept SystemExit:\n    pass"], check=True, stdout=subprocess.DEVNULL
    )
    return (time.perf_counter() - begun) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    for turn in range(args.runs + 2):
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
    print(
        record.write(
            "startup", {"median_ms": medians, "beyond_numpy_ms": {n: m - numpy for n, m in medians.items()}}, args.out
        )
    )


if __name__ == "__main__":
    main()
