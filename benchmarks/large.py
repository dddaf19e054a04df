"""Images larger than memory: what `predict` takes, keeps and gives back. Every part writes its own record.

    python benchmarks/large.py sparse [--size 100000]    # a sparse Zarr to an OME-Zarr mask: resident memory over time
    python benchmarks/large.py kill [--kills 50]         # kill -9 at random moments; bytes of the result
    python benchmarks/large.py dask                      # two workers against one process, one of them killed
    python benchmarks/large.py memory                    # --memory 1GB against 4GB: labels, time, tiles
    python benchmarks/large.py overhead [--size 16384]   # a tiled TIFF end to end against the engine's own tile times

The network is the one that ships with the package, FP32; pixels are drawn micrographs. Of the sparse image one stretch in
some hundred holds pixels, the rest is its fill value, as on a slide: tiles that are alike are run once, so its time says
nothing of the network's. Normalisation is declared (no pass over the image for statistics). Every part but ``kill`` runs
predictions in processes of their own, so that resident memory is theirs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import record

import unet_rt as urt
from unet_rt.cli.demo import shipped_model
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.drawing.microscopy import microscopy
from unet_rt.system import limits as machine
from unet_rt.system import timing as bench

LONGEST_S = 1.2  # from the start of a prediction to its kill
DRAWN = 2048  # side of the micrograph that the images are made of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("sparse", "kill", "dask", "memory", "overhead", "child"))
    parser.add_argument("--size", type=int)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    parser.add_argument("--child", help="of this script only: the options of one prediction, as JSON")
    args = parser.parse_args()
    if args.part == "child":
        child(json.loads(args.child))
        return
    with tempfile.TemporaryDirectory() as name:
        figures = globals()[args.part](args, Path(name))
    print(json.dumps({k: v for k, v in figures.items() if k != "resident_mb"}, indent=1))
    record.write(f"large-{args.part}", figures, args.out)


def engine(folder: Path, divisor: int = 1) -> Path:
    """The shipped network with declared numbers of normalisation (for grey levels ``divisor`` times as low), exact halo."""
    samples = [microscopy((900, 900), seed=s).image // divisor for s in range(3)]
    low, high = np.percentile(samples[0] * divisor, (1, 99.8))
    fixed = Normalization("fixed", mean=(float(low) / divisor,), std=(float(high - low) / divisor,))
    urt.build(
        shipped_model(), samples=samples, out=folder / "nuclei.urt", precision="fp32", halo="exact",
        contract=Contract(normalization=fixed), tile=(2048, 2048),
    ).close()  # fmt: skip
    return folder / "nuclei.urt"


def drawn(shape: tuple[int, int], seed: int = 7) -> Any:
    """A micrograph repeated with shifts, so that no two tiles are alike: drawing a large one takes too long."""
    tile = microscopy((DRAWN, DRAWN), seed=seed).image
    image = np.empty(shape, tile.dtype)
    for i, j in np.ndindex(*(-(-n // DRAWN) for n in shape)):
        part = image[i * DRAWN : (i + 1) * DRAWN, j * DRAWN : (j + 1) * DRAWN]
        part[...] = np.roll(tile, (613 * i + 101 * j, 431 * j + 57 * i), axis=(0, 1))[: part.shape[0], : part.shape[1]]
    return image


# --- one prediction in a process of its own ----------------------------------------------------------------------------


def child(options: dict[str, Any]) -> None:
    """Predicts; prints a line ``ready`` when the engine has run once, and at the end the report with memory over time."""
    import threading

    from unet_rt.prediction import blocks

    blocks.TILES = options.pop("tiles_per_block", blocks.TILES)
    with urt.load(options.pop("engine")) as loaded:
        image, once = options.pop("image"), options.pop("once", None)
        if once:
            loaded.run(np.zeros((1, 1, *once), np.float32))
        before = machine.rss_bytes()
        print("ready", flush=True)
        seen: list[tuple[float, float]] = []
        over, begun = threading.Event(), time.perf_counter()

        def watch() -> None:
            while not over.wait(0.25):
                seen.append((time.perf_counter() - begun, machine.rss_bytes() / 1e6))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        reports: list[urt.RunReport] = []
        urt.predict(loaded, image, report=reports.append, **options)
        over.set()
        watcher.join()
    done = reports[0].to_json() | {
        "before_mb": before / 1e6,
        "resident_mb": [[round(t, 1), round(m, 1)] for t, m in seen],
    }
    print(json.dumps(done))


def command(**options: Any) -> list[str]:
    return [sys.executable, __file__, "child", "--child", json.dumps(options)]


def run(**options: Any) -> dict[str, Any]:
    done = subprocess.run(command(**options), check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# --- parts ---------------------------------------------------------------------------------------------------------


def sparse(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import zarr

    size = args.size or 100_000
    image = zarr.create_array(
        folder / "image.zarr", shape=(size, size), chunks=(2048, 2048), dtype="uint8", fill_value=3
    )
    pixels = (microscopy((DRAWN, DRAWN), seed=7).image / 16).clip(0, 255).astype(np.uint8)
    places = [(k * size // 7, (3 * k) % 7 * size // 7) for k in range(7)]
    for y, x in places:
        image[y : y + DRAWN, x : x + DRAWN] = pixels[: size - y, : size - x]
    begun = time.perf_counter()
    with urt.load(engine(folder, divisor=16)) as loaded:
        planning = time.perf_counter()
        from unet_rt.images.open import open_image
        from unet_rt.prediction.plan import make_plan
        from unet_rt.prediction.request import Request, settle

        with open_image(folder / "image.zarr", loaded.spec.contract, network_channels=1) as source:
            asked = settle(Request(out=folder / "mask.zarr"), loaded, source)
            plan = make_plan(loaded, source, asked).blocks
            planned = time.perf_counter() - planning
    done = run(
        engine=str(folder / "nuclei.urt"), image=str(folder / "image.zarr"), out=str(folder / "mask.zarr"),
        memory_bytes=1_800_000_000,
    )  # fmt: skip
    found = zarr.open_group(folder / "mask.zarr", mode="r")["0"]
    y, x = places[3]
    part = np.asarray(found[y : y + DRAWN, x : x + DRAWN])
    memory = [m for _, m in done["resident_mb"]]
    half = len(memory) // 2
    return {
        "size": size,
        "seconds": round(time.perf_counter() - begun, 1),
        "opening_and_planning_s": round(planned, 3),
        "blocks": len(plan),
        "tile": done["tile"],
        "tiles": done["tiles"],
        "peak_mb": max(memory),
        "median_mb_of_first_and_second_half": [statistics.median(memory[:half]), statistics.median(memory[half:])],
        "nuclei_share_of_a_drawn_part": float(part.mean()),
        "stages": done["stages"],
        "resident_mb": done["resident_mb"][:: max(1, len(memory) // 400)],
    }


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if path.is_file():
            total.update(path.relative_to(folder.parent).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def kill(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    size = args.size or 5120
    image = folder / "image.npy"
    np.save(image, drawn((size, size)))
    built, results = engine(folder), {}
    rng = random.Random(0)
    for name in ("mask.zarr", "mask.tif"):
        options = {"engine": str(built), "image": str(image), "tile": [512, 512], "shard": [0, 1], "tiles_per_block": 1}
        whole = folder / "whole" / name
        whole.parent.mkdir(exist_ok=True)
        run(**options, out=str(whole))
        kills = 0
        out = folder / name
        stages = []
        while kills < args.kills // 2 and not out.exists():
            process = subprocess.Popen(command(**options, out=str(out)), stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()
            # Some come before a block has ended; all of them together are less than the prediction takes.
            time.sleep(rng.uniform(0.0, LONGEST_S))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            marks = folder / f".{name}.stage" / "done"
            stages.append(len(list(marks.iterdir())) if marks.exists() else 0)
        if not out.exists():
            run(**options, out=str(out))
        results[name] = {"kills": kills, "blocks_after_each_kill": stages, "equal": digest(out) == digest(whole)
                         if name.endswith("tif") else _same_zarr(out, whole)}  # fmt: skip
    return {"size": size, **results}


def _same_zarr(one: Path, other: Path) -> bool:
    """Every file alike."""
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()) for f in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def dask(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import tifffile

    size = args.size or 8192
    image = folder / "image.tif"
    tifffile.imwrite(image, drawn((size, size)), tile=(512, 512), photometric="minisblack")
    built = engine(folder)
    options = {"engine": str(built), "image": str(image), "tile": [1024, 1024]}
    times: dict[str, list[float]] = {"one process": [], "two workers": []}
    for k in range(args.rounds):
        for label, more in (("one process", {}), ("two workers", {"scheduler": "local:2"})):
            begun = time.perf_counter()
            run(**options, **more, out=str(folder / f"{label}-{k}.tif"))
            times[label].append(time.perf_counter() - begun)
    digests = {hashlib.sha256((folder / f"{label}-0.tif").read_bytes()).hexdigest() for label in times}
    medians = {label: statistics.median(t) for label, t in times.items()}
    return {
        "size": size,
        "seconds": {label: [round(t, 2) for t in each] for label, each in times.items()},
        "ratio": medians["two workers"] / medians["one process"],
        "identical_bytes": len(digests) == 1,
    }


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    size = args.size or 8192
    image = folder / "image.npy"
    np.save(image, drawn((size, size)))
    built = engine(folder)
    rows = {}
    for name in ("1GB", "4GB"):
        amount = int(name[0]) * 10**9
        begun = time.perf_counter()
        done = run(engine=str(built), image=str(image), out=str(folder / f"{name}.npy"), memory_bytes=amount)
        rows[name] = {
            "seconds": round(time.perf_counter() - begun, 1),
            "tile": done["tile"],
            "peak_mb": max(m for _, m in done["resident_mb"]),
        }
    differ = (np.load(folder / "1GB.npy") != np.load(folder / "4GB.npy")).sum()
    return {"size": size, "rows": rows, "labels_that_differ": int(differ)}


def overhead(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import tifffile

    size = args.size or 16384
    image = folder / "image.tif"
    tifffile.imwrite(image, drawn((size, size)), tile=(512, 512), photometric="minisblack", compression="zlib")
    built = engine(folder)
    ends, engines, reports = [], [], []
    with urt.load(built) as loaded:
        for k in range(args.rounds):
            begun = time.perf_counter()
            urt.predict(loaded, image, out=folder / f"{k}.tif", report=reports.append)
            ends.append(time.perf_counter() - begun)
            report = reports[-1]
            x = drawn(tuple(report.tile)).astype(np.float32)[None, None] / 4000
            (timing,) = bench.interleave([lambda x=x: loaded.run(x)], runs=3, seconds=60)
            engines.append(timing.median_s * report.tiles)
    pairs = [a / b for a, b in zip(ends, engines, strict=True)]
    return {
        "size": size,
        "tile": list(reports[-1].tile),
        "tiles": reports[-1].tiles,
        "end_to_end_s": ends,
        "tiles_alone_s": engines,
        "ratios": pairs,
        "ratio": statistics.median(pairs),
        "stages": reports[-1].stages,
        "load": os.getloadavg(),
    }


if __name__ == "__main__":
    main()
