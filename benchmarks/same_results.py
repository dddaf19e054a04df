"""Whether two versions of unet-rt give the same: a record of results, bit by bit, and the comparison of two records.

    python benchmarks/same_results.py --out before.json [--data FOLDER] [--threads 2]
    python benchmarks/same_results.py --compare before.json after.json

Only public names are used, so that it runs on any version: ``PYTHONPATH=CHECKOUT python benchmarks/same_results.py ...``.
For every shipped network, two drawn ones (RGB with two outputs; volumes) and every ``.onnx`` under FOLDER (default: the
``models`` folder of ``shared`` beside the repository): what inspect says; then engines of ONNX Runtime and OpenVINO in
FP32 and INT8 at a fixed tile, their specs and records of parity, what they make of fixed tiles, and what predict and
verify make of images. Arrays and files stand in it as hashes. Left out is what depends on time, place or version: times,
memory, paths, versions, the machine. INT8 engines are built without time for a search, which would let timing choose; the
search itself is recorded by the rows and layer costs that it came to.

Exit status of a comparison: 1 where a field differs, and its name. Records of different machines or library versions may
differ in all hashes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from same_networks import Subject, noise, subjects

import unet_rt as urt

SHARED = Path(__file__).resolve().parents[2] / "shared"
LOOSE = urt.Budget(label_change=1, dice=0, error=1e9, truth=1)
NO_SEARCH = 1e-6  # minutes: plain INT8, whatever the machine's speed
LITTLE = 10**8  # bytes for an image that is predicted block by block
SEARCH = 60.0  # minutes: far more than it takes
KEPT_OF_PARITY = (
    "kind", "budget", "model_sha256", "graph_sha256", "baseline", "batch", "rows", "images", "verdict",
    "smaller_tile", "calibrated_on", "seams", "layers",
)  # fmt: skip
KEPT_OF_REPORT = ("reading", "backend", "precision", "tile", "halo", "tiles", "batch", "mpx", "class_share", "notes")
LEFT_OUT = {"peak_mb", "seconds", "latency_ms", "kept_mpx_per_s", "mpx_per_s", "low_ms", "high_ms", "fingerprint"}
ENGINES = (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8"))


# --- what is recorded ---------------------------------------------------------------------------------------------------


def sha(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def hash_of(value: Any) -> str:
    """An array, a file or a folder in a line."""
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return f"{data.dtype} {'x'.join(map(str, data.shape))} {sha(data.tobytes())}"
    path = Path(value)
    if not path.exists():
        return f"{path.name} is not there"
    if not path.is_dir():
        return f"{path.name} {path.stat().st_size} {sha(path.read_bytes())}"
    files = sorted(p for p in path.rglob("*") if p.is_file())
    parts = (p.relative_to(path).as_posix().encode() + b"\0" + p.read_bytes() for p in files)
    return f"{path.name} {len(files)} files {sha(*parts)}"


def plain(value: Any, work: Path) -> Any:
    """JSON without what depends on time and place."""
    if isinstance(value, dict):
        return {str(k): plain(v, work) for k, v in value.items() if k not in LEFT_OUT}
    if isinstance(value, list | tuple):
        return [plain(v, work) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str | Path):
        return without_time(str(value).replace(str(work), "WORK"))
    return value


def without_time(text: str) -> str:
    """A sentence without the times and amounts of memory in it."""
    return re.sub(r"\d[\d.,e+-]* ?(ms|s|MB|GB|GiB|MiB|kept Mpx/s|Mpx/s)\b", r"N \1", text)


def attempt(work: Path, verb: Callable[[], Any]) -> Any:
    """What ``verb`` returns, for the record; an error of the package as its type and text."""
    try:
        return plain(verb(), work)
    except urt.UnetRtError as error:
        return plain(f"{type(error).__name__}: {error}", work)


def spec_of(folder: Path) -> dict[str, Any]:
    """``spec.json`` without what depends on machine and time; of files the hash of those that hold no such thing."""
    spec = json.loads((folder / "spec.json").read_text())
    spec = dict(spec.get("spec", spec)) | {"files": spec.get("files")}
    options = dict(spec.get("options", {}))
    asked = {k: v for k, v in options.pop("asked", {}).items() if k in ("model", "contract", "samples")}
    files = spec["files"] or {}
    steady = {k: hash_of(folder / v["name"]) for k, v in files.items() if k not in ("parity", "engine", "calibration")}
    if "calibration" in files:  # names the libraries' versions
        found = json.loads((folder / files["calibration"]["name"]).read_text())
        steady["calibration"] = {k: v for k, v in found.items() if k not in ("versions", "made_on", "machine")}
    return {
        **spec,
        "options": {**options, "asked": asked},
        "made_on": None,
        "bytes_per_px": None,
        "key": None,
        "files": steady,
    }


def parity_of(folder: Path) -> dict[str, Any]:
    record = json.loads(next(folder.glob("parity-*.json")).read_text())
    return {k: record.get(k) for k in KEPT_OF_PARITY}


def record_subject(subject: Subject, work: Path, threads: int) -> dict[str, Any]:
    """Everything about one network."""
    said: dict[str, Any] = {"inspect": attempt(work, lambda: urt.inspect(subject.model).to_json())}
    said["samples"] = [hash_of(image) for image in subject.samples]
    for backend, precision in ENGINES:
        name = f"{backend}-{precision}"
        folder = work / f"{subject.name.replace('/', '-')}-{name}.urt"
        build = partial(
            urt.build, subject.model, samples=subject.samples, contract=subject.contract, axes=subject.axes,
            backend=backend, precision=precision, tile=subject.tile, budget=LOOSE, threads=threads,
            halo="auto" if name == "openvino-fp32" else "exact",
        )  # fmt: skip
        minutes = NO_SEARCH if precision == "int8" else SEARCH
        reports = list[Any]()
        try:
            engine = build(out=folder, search_minutes=minutes, report=reports.append)
        except urt.UnetRtError as error:
            said[name] = plain(f"{type(error).__name__}: {error}", work)
            continue
        here: dict[str, Any] = {"spec": plain(spec_of(folder), work), "parity": plain(parity_of(folder), work)}
        if precision == "fp32":  # notes of INT8 say what there was no time for, in words that may change with speed
            here["notes"] = plain([*reports[0].notes, *reports[0].warnings], work)
        with engine:
            here["run"] = runs(engine, subject)
            full = (backend, precision) == ENGINES[0] and subject.full
            place = work / folder.stem
            place.mkdir()
            here["predict"] = dict(predictions(engine, subject, place, threads, full=full))
        here["verify"] = attempt(work, partial(verified, folder, subject, threads))
        said[name] = here
    said["search"] = attempt(work, partial(searched, subject, work, threads))
    return said


def searched(subject: Subject, work: Path, threads: int) -> Any:
    """What the search for INT8 layers finds under a tight budget: rows of everything tried, not what timing chose."""
    folder, tight = work / "search.urt", urt.Budget(label_change=1.5e-3, dice=0.9, error=0.05)
    if subject.name != "nuclei":
        return None
    urt.build(
        subject.model, samples=subject.samples, contract=subject.contract, axes=subject.axes, backend="onnxruntime",
        precision="int8", tile=subject.tile, budget=tight, threads=threads, out=folder, overwrite=True,
        search_minutes=SEARCH,
    ).close()  # fmt: skip
    found = parity_of(folder)
    layers = [{k: v for k, v in layer.items() if k != "kept"} for layer in found["layers"]]  # kept: of the chosen one
    return {"rows": found["rows"], "layers": layers}


def runs(engine: urt.Engine, subject: Subject) -> list[str]:
    """The raw outputs of two fixed tiles."""
    shape = (2, engine.spec.channels, *engine.spec.tile)
    x = np.stack([noise(shape[2:], seed) for seed in range(shape[0] * shape[1])]).reshape(shape)
    return [hash_of(y) for y in engine.run((x / np.float32(255)).astype(np.float32))]


def verified(folder: Path, subject: Subject, threads: int) -> Any:
    exam = urt.verify(folder, threads=threads, picture_always=False)
    images = urt.verify(folder, subject.samples[:1], axes=subject.axes, threads=threads, picture_always=False)
    return [{k: v for k, v in report.to_json().items() if k != "picture"} for report in (exam, images)]


# --- images -------------------------------------------------------------------------------------------------------------


def image_of(subject: Subject, sides: tuple[int, ...], seed: int = 3) -> Any:
    """An image of ``sides`` cut from, or made of, the sample with this number."""
    image = subject.samples[seed % len(subject.samples)]
    pads = [(0, max(0, n - m)) for n, m in zip(sides, image.shape, strict=False)]
    grown = np.pad(image, [*pads, *[(0, 0)] * (image.ndim - len(pads))], mode="symmetric")
    return grown[tuple(slice(0, n) for n in sides)]


def predictions(
    engine: urt.Engine, subject: Subject, place: Path, threads: int, *, full: bool
) -> Iterator[tuple[str, Any]]:
    """(name, result) of every prediction; ``full``: of the cases that do not hang on the backend as well."""
    tile = subject.tile
    many = tuple(2 * n + 13 for n in tile) if subject.spatial == 2 else (21, 59, 67)
    sizes = {"small": tuple(n // 2 + 3 for n in tile), "one": tile, "many": many}
    images = {name: image_of(subject, sides) for name, sides in sizes.items()}

    def case(image: Any, **options: Any) -> Any:
        options = {"axes": subject.axes, "threads": threads} | options

        def verb() -> Any:
            reports = list[Any]()
            result = urt.predict(engine, image, report=reports.append, **options)
            said = {k: v for k, v in reports[0].to_json().items() if k in KEPT_OF_REPORT}
            if "memory_bytes" in options:  # blocks follow the memory that is there
                said = {}
            return {"result": hash_of(result), "report": said} if said else hash_of(result)

        return attempt(place, verb)

    for size, image in images.items():
        for output in ("mask", "probability", "raw", "instances"):
            if (full and output in ("mask", "raw")) or size == "many":
                yield f"{size} {output}", case(image, output=output)
    if not full:
        return
    several = engine.spec.outputs[1:]
    for head in several:
        yield f"head {head.name}", case(images["many"], head=head.name)
    yield from file_cases(case, images["many"], subject, place)
    yield from reading_cases(case, images, engine, subject, place)


def file_cases(case: Callable[..., Any], image: Any, subject: Subject, place: Path) -> Iterator[tuple[str, Any]]:
    """What is written, in one go, block by block, and by shards."""
    outputs = ("mask", "probability", "instances")
    for suffix in ("tif", "zarr", "npy", "png"):
        for output in outputs if suffix in ("tif", "zarr") else ("mask",):
            name = f"{output}.{suffix}"
            yield name, case(image, out=place / name, output=output)
    small = dict(tile=subject.tile, batch=1)  # as many blocks as memory asks for, the same tiles
    large = np.concatenate([image] * 2, axis=1)
    for suffix in ("tif", "zarr", "npy"):
        for output in ("mask", "probability", "instances") if suffix == "tif" else ("mask",):
            name = f"blocks-{output}.{suffix}"
            yield name, case(large, out=place / name, output=output, memory_bytes=resident() + LITTLE, **small)
    yield "blocks array", case(large, memory_bytes=resident() + LITTLE, **small)
    for suffix in ("tif", "zarr"):
        out = place / f"shards.{suffix}"
        for index in (1, 0):
            made = case(large, out=out, shard=(index, 2), memory_bytes=resident() + LITTLE, **small)
            yield f"shard {index} of 2 {suffix}", made
    if subject.spatial == 2:
        yield "overlay", case(image, out=place / "overlaid.png", overlay=place / "overlay.png")
        yield "overlay file", hash_of(place / "overlay.png")
        objects = place / "objects.tif"
        argv = [
            "--output",
            "instances",
            "--objects",
            "objects.csv",
            "--areas",
            "areas.csv",
            "--geojson",
            "objects.json",
        ]
        yield "tables", tables(subject, image, objects, argv)


def reading_cases(
    case: Callable[..., Any], images: dict[str, Any], engine: urt.Engine, subject: Subject, place: Path
) -> Iterator[tuple[str, Any]]:
    """How images are read, tiled and resampled."""
    image, small = images["many"], images["small"]
    yield "float32", case(image.astype(np.float32) / 7, output="probability")
    yield "uint16", case(image.astype(np.uint16) * 13, output="probability")
    yield "tile", case(image, tile=tuple(n - n // 4 // 16 * 16 for n in subject.tile))
    yield "batch", case(image, batch=3, output="raw")
    multiclass = engine.spec.contract.task == "multiclass"
    values = tuple(range(7, 9 if not multiclass else 7 + engine.spec.outputs[0].channels))
    yield "mask values", case(small, mask_values=values)
    region = np.zeros(image.shape[: subject.spatial], np.uint8)
    region[tuple(slice(n // 3, n // 2) for n in region.shape)] = 1
    np.save(place / "region.npy", region)
    yield "region", case(image, region=place / "region.npy")
    yield "resample", case(image, resample=True, pixel_size_um=(0.7,) * subject.spatial, output="probability")
    yield "resample mask", case(image, resample=True, pixel_size_um=(0.35,) * subject.spatial)
    yield "no channel", case(small[..., 0], axes=None)
    if subject.spatial == 2:
        yield "flip", case(small, tta="flip", output="probability")
        yield "d4", case(small, tta="d4")
    tifffile.imwrite(place / "tiled.tif", image, tile=(64, 64), compression="zlib", photometric="minisblack")
    tifffile.imwrite(place / "strips.tif", image, photometric="minisblack")
    np.save(place / "image.npy", image)
    for name in ("tiled.tif", "strips.tif", "image.npy"):
        yield f"from {name}", case(place / name)
    if subject.spatial == 2 and subject.axes is None:
        stack = np.stack([small, small[::-1], small.T[: small.shape[0], : small.shape[1]]])
        yield "stack", case(stack, axes="ZYX")
        yield "stack.tif", case(stack, axes="TYX", out=place / "stack.tif", output="probability")
        yield "stack.zarr", case(stack, axes="ZYX", out=place / "stack.zarr")
        colour = np.stack([small, small // 2, small // 3], axis=-1).astype(np.uint8)
        yield "luma", case(colour, channels="luma", output="raw")
        yield "channel 1 of 3", case(colour, channels=[1], output="raw")
        yield "too many channels", case(colour)


def tables(subject: Subject, image: Any, out: Path, argv: list[str]) -> Any:
    """Objects in tables, by the command line, which alone offers them."""
    try:
        from unet_rt.cli.main import main
    except ImportError:  # a version whose command line is one file
        from unet_rt.cli import main
    engine = next(out.parent.parent.glob(f"{out.parent.name}.urt"))
    np.save(out.parent / "objects.npy", image)
    words = [str(out.parent / word) if Path(word).suffix in (".csv", ".json") else word for word in argv]
    axes = ["--axes", subject.axes] if subject.axes else []
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["predict", str(engine), str(out.parent / "objects.npy"), "--out", str(out), *axes, *words])
    files = [Path(word) for word in words if Path(word).is_absolute()]
    return {"code": code, "files": {p.name: hash_of(p) for p in [out, *files]}}


def real_images(shared: Path) -> dict[str, Any]:
    """Real micrographs by the shipped networks, with the default engine of ONNX Runtime; {} without them."""
    import PIL.Image

    found = {
        "nuclei": sorted((shared / "data/dsb2018/image").glob("0*.png"))[:4],
        "membranes": sorted((shared / "data/isbi2012/image").glob("*.png"))[:2],
    }
    return {name: {p.name: np.asarray(PIL.Image.open(p)) for p in paths} for name, paths in found.items() if paths}


def record_real(data: Path | None, work: Path, threads: int) -> dict[str, Any]:
    said = dict[str, Any]()
    for name, images in (real_images(data.parent) if data is not None else {}).items():
        with urt.load(work / f"{name}-onnxruntime-fp32.urt") as engine:
            for file, pixels in images.items():
                colour = {"channels": "luma"} if pixels.ndim == 3 else {}
                if pixels.ndim == 3:
                    pixels = pixels[..., :3]
                predict = partial(urt.predict, engine, pixels, threads=threads, output="instances", **colour)
                said[f"{name} {file}"] = attempt(work, lambda predict=predict: hash_of(predict()))
    return said


def resident() -> int:
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- records ------------------------------------------------------------------------------------------------------------


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in a record."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{name} / {key}" if name else key)
    elif isinstance(value, list) and value:
        for k, item in enumerate(value):
            yield from leaves(item, f"{name}[{k}]")
    else:
        yield name, value


def compare(before: Path, after: Path) -> int:
    """Says what differs; 1 where something does."""
    old, new = (dict(leaves(json.loads(path.read_text()))) for path in (before, after))
    differ = [name for name in {**old, **new} if name not in old or name not in new or old[name] != new[name]]
    for name in differ:
        print(f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}")
    print(f"{len(differ)} of {len({**old, **new})} fields differ")
    return 1 if differ else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="the record to write")
    what.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two records")
    parser.add_argument("--data", type=Path, default=SHARED / "models", help="networks (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of libraries and kernels (default: 2)")
    parser.add_argument("--only", metavar="NAME", help="this network alone")
    args = parser.parse_args(argv)
    if args.compare:
        return compare(*args.compare)
    print(f"unet_rt {urt.__version__} from {Path(urt.__file__).parent}", file=sys.stderr)
    data = args.data if args.data.is_dir() else None
    said = dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="same-results-") as folder:
        work = Path(folder).resolve()
        for subject in subjects(data, work):
            if args.only in (None, subject.name):
                print(subject.name, file=sys.stderr)
                said[subject.name] = record_subject(subject, work, args.threads)
        if args.only is None:
            said["real images"] = record_real(data, work, args.threads)
    args.out.write_text(json.dumps(said, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
