"""Predictions of changing sizes, engines loaded and closed, threads, forks, for an hour: is anything growing?

    python tests/fire/soak.py --minutes 60 [--record build/soak.json] [--plot build/soak.svg]

Resident memory, open descriptors and threads are taken after every round; a line is fitted to the second half. They are
flat where the line's slope times an hour is below the bounds below.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]

import numpy as np
from fire import commit, small_engine

GROWTH = {"memory_mb": 64.0, "descriptors": 1.0, "threads": 1.0}  # per hour that is no growth
SIZES = ((72, 80), (300, 280), (511, 257), (640, 900))


def figures() -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory_mb": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
    }


def one_round(engine_folder: Path, work: Path, draw: random.Random) -> None:
    """An engine from loading to closing, on images of several sizes and outputs of every kind, in threads and a fork."""
    import unet_rt as urt
    from unet_rt.drawing.microscopy import microscopy

    with urt.load(engine_folder) as engine:
        for _ in range(3):
            image = microscopy(draw.choice(SIZES), seed=draw.randrange(4)).image
            first = urt.predict(engine, image)
            out = work / f"m{draw.choice(('.npy', '.tif', '.png', '.zarr'))}"
            urt.predict(engine, image, out=out, overwrite=True)
            np.testing.assert_array_equal(first, urt.predict(engine, image, tile=(192, 192)))
    errors: list[BaseException] = []

    def alone() -> None:
        try:
            with urt.load(engine_folder) as mine:
                urt.predict(mine, image)
        except BaseException as error:  # noqa: BLE001 - handed to the round
            errors.append(error)

    threads = [threading.Thread(target=alone) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--engine", type=Path, help="an engine of the shipped network (default: it is built)")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    draw, rows, start = random.Random(0), list[dict[str, float]](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        engine = args.engine or small_engine(Path(work))
        while time.monotonic() - start < 60 * args.minutes:
            one_round(engine, Path(work), draw)
            gc.collect()
            rows.append({"hours": (time.monotonic() - start) / 3600, **figures()})
    half = rows[len(rows) // 2 :]
    hours = np.array([row["hours"] for row in half])
    slopes = {}
    for name in GROWTH:
        values = np.array([row[name] for row in half])
        slopes[name] = float(np.polyfit(hours, values, 1)[0]) if len(half) > 2 else 0.0
    # A slope says nothing of a time much shorter than an hour: what it means over that time counts.
    seen = float(hours[-1] - hours[0]) if len(half) > 2 else 0.0
    flat = {name: slope * min(1.0, seen) <= GROWTH[name] for name, slope in slopes.items()}
    record = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "rounds": len(rows), "minutes": round(args.minutes, 1),
              "first": rows[0], "last": rows[-1], "per_hour": slopes, "flat": flat}  # fmt: skip
    print(json.dumps(record, indent=1))
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)
    return 0 if all(flat.values()) else 1


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Three curves over time, each scaled to its own largest value."""
    width, height = 640, 120
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * len(GROWTH)}" font-size="11">']
    for k, name in enumerate(GROWTH):
        most, end, base = max(row[name] for row in rows) or 1, rows[-1]["hours"] or 1, (k + 1) * height - 8
        points = " ".join(
            f"{row['hours'] / end * width:.1f},{base - row[name] / most * (height - 32):.1f}" for row in rows
        )
        parts.append(f'<polyline fill="none" stroke="#00695c" points="{points}"/>')
        parts.append(f'<text x="4" y="{k * height + 14}">{name}, at most {most:g}, over {end:.2f} h</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
