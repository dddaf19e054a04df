"""Draws the figures of the pages in :data:`PAGES` from ``benchmarks/results/*.json``; none is typed by hand.

    python benchmarks/tables.py           # rewrites the marked blocks, and the plots in benchmarks/results/
    python benchmarks/tables.py --check   # exit status 1 where they are not what the records say

A block stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; NAME is a function in ``BLOCKS``.
Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from plots import bars, lines, number, spans  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(ROOT / page for page in ("README.md", "benchmarks/README.md", "docs/membranes.md", "docs/precision.md"))
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)
Record = dict[str, Any]


def record(name: str) -> Record:
    """A record by its name.

    Raises:
        SystemExit: There is none.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path.relative_to(ROOT)} does not exist; run the benchmark that writes it")
    loaded: Record = json.loads(path.read_text(encoding="utf-8"))
    return loaded


# ------------------------------------------------------------------------------------------------------------ Markdown


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" if line[0] else "|" + " | ".join(line) + " |" for line in lines)


def spread(low: float, high: float, digits: int = 3) -> str:
    return f"{number(low, digits)} to {number(high, digits)}"


def rounded_range(values: Sequence[float], digits: int = 1) -> str:
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# ---------------------------------------------------------------------------------------------------------------- CPU


CPU_RECORDS = (
    "engine-paper",
    "predict-nuclei",
    "predict-paper",
    "precision-paper",
    "memory",
    "startup",
    "kernels",
    "scaling",
    "overhead-nuclei",
    "build-nuclei",
    "quality-drawn",
    "quality-dsb2018",
    "quality-isbi2012",
    "roofline",
    "train",
    *(f"large-{part}" for part in ("sparse", "kill", "dask", "memory", "overhead")),
)


def cpu_machine() -> str:
    """The machines of the CPU's records, in a sentence each."""
    found: dict[str, list[str]] = {}
    for name in CPU_RECORDS:
        if (RESULTS / f"{name}.json").exists():
            found.setdefault(_machine(record(name)["machine"]), []).append(name)
    if len(found) == 1:
        (said,) = found
        return f"{said}."
    return "\n".join(f"- {said}: {', '.join(f'`{name}`' for name in names)}" for said, names in found.items())


def _machine(data: Record) -> str:
    features = set(data["features"])
    vectors = next(
        (said for key, said in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON")) if key in features), ""
    )
    vnni = features & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
    bf16 = features & {"avx512_bf16", "amx_bf16", "bf16"}
    versions = data["versions"]
    libraries = [
        f"{said} {versions[key]}"
        for key, said in (("torch", "PyTorch"), ("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO"))
        if key in versions
    ]
    return (
        f"{data['threads']} cores of {data['cpu']} with {vectors}, {'with' if vnni else 'without'} VNNI and "
        f"{'with' if bf16 else 'without'} BF16 instructions; {', '.join(libraries)}"
    )


def engine_paper() -> str:
    data = record("engine-paper")
    rows = [
        (
            row["name"],
            f"{row['median_ms']:,.0f} ({row['low_ms']:,.0f} to {row['high_ms']:,.0f})",
            _speed(row),
            f"{row['label_agreement']:.4%}",
        )
        for row in data["rows"]
        if row.get("batch", 1) == 1
    ]
    head = ("", "ms, median (range)", "eager FP32 = 1", "labels equal to eager FP32")
    skipped = "".join(f"\n\nNot run: {name}: {why}." for name, why in data.get("skipped", {}).items())
    return (
        f"**One tile** of the paper's U-Net ({data['parameters']:,} parameters, trained weights, "
        f"{data['tile']} x {data['tile']} px, batch 1, FP32 unless said;\n`{data['command']}`):\n\n"
        f"{table(head, rows)}{skipped}"
    )


def _speed(row: Record) -> str:
    interval = f" ({row['speed_low']:.2f} to {row['speed_high']:.2f})" if "speed_low" in row else ""
    return f"{row['speed']:.2f}{interval}"


def predict_nuclei() -> str:
    data = record("predict-nuclei")
    side = data["size"]
    return (
        f"**End to end**, a TIFF of {side} x {side} px to a mask, with the network that ships "
        f"({data['parameters']:,} parameters;\n`{data['command']}`); 1 is {_base(data)['name']}, whose window is 512 px "
        f"and whose time\nholds neither reading nor writing; labels were compared on the centre {data['judged']} x "
        f"{data['judged']} px, in tiles of at most 768 px:\n\n{_predicted(data)}"
    )


def predict_paper() -> str:
    data = record("predict-paper")
    return (
        f"The same with the paper's U-Net ({data['parameters']:,} parameters; `{data['command']}`);\n"
        f"1 is {_base(data)['name']}: a window of 572 px for every 388 px, without reading and writing:\n\n"
        f"{_predicted(data)}"
    )


def _base(data: Record) -> Record:
    """The row that the others are compared with: the first that is not ours."""
    return next(row for row in data["rows"] if not row["name"].startswith("unet-rt"))


def _predicted(data: Record) -> str:
    base = _base(data)
    rows = [
        (
            row["name"],
            f"{row['side']} px",
            number(row["median_s"]) + (f" ({spread(row['low_s'], row['high_s'])})" if row["runs"] > 1 else ""),
            number(row["mpx_per_s"]),
            f"{row['mpx_per_s'] / base['mpx_per_s']:.2f}",
            f"{row['changed_labels']:.4%}",
        )
        for row in data["rows"]
    ]
    alone = "; ".join(
        f"{row['name']} {row['end_to_end']:.2f} times"
        + (f" ({row['end_to_end_low']:.2f} to {row['end_to_end_high']:.2f})" if row["runs"] > 1 else "")
        + f", {row['tiles']} tiles"
        for row in data["rows"]
        if "tiles" in row
    )
    what = "s, median (range)" if any(row["runs"] > 1 for row in data["rows"]) else "s, one run"
    first = "MONAI" if base["name"].startswith("MONAI") else "by hand"
    head = ("", "image", what, "Mpx/s", f"{first} = 1", "labels not those of whole-image inference")
    return f"{table(head, rows)}\n\nEnd to end against the engine's own time for the same tiles run alone: {alone}."


def pipeline() -> str:
    data = record("predict-nuclei")
    recorded = data["spans"]["spans"]
    long = max(stop for *_, stop in recorded)
    busy = sum(stop - start for stage, start, stop in recorded if stage == "infer")
    return (
        f"![where the time goes](benchmarks/results/pipeline.svg)\n\nWhere the time of one such run goes "
        f"({data['spans']['name']}, {long:.1f} s): the engine computes {busy / long:.0%} of it, the other stages overlap."
    )


def scaling() -> str:
    data = record("scaling")
    rows = [
        (
            f"{r['side']:,} px",
            number(r["seconds"]),
            number(r["mpx_per_s"]),
            f"{r['beyond_engine_bytes'] / 1e6:,.0f}",
            f"{r['tiles']:,} of {' x '.join(map(str, r['tile']))} px",
        )
        for r in data["sides"]
    ]
    halos = [
        (
            f"{r['tile']} px",
            _measured(r),
            f"{r['computed_px']:.2f}",
            "-" if r["formula"] is None else f"{r['formula']:.2f}",
        )
        for r in data["halo"]
    ]
    left = "".join(f"{what} was not run: {why}.\n\n" for what, why in data["skipped"].items())
    return (
        f"Image side, `{data['command']}`:\n\n"
        f"{table(('', 's', 'Mpx/s', 'MB beyond the engine', 'tiles'), rows)}\n\n"
        f"{left}What the exact halo costs, against the same tiles without any:\n\n"
        f"{table(('tile', 'time in the engine (range)', 'pixels computed', 'formula, inner tiles'), halos)}\n\n"
        + " ".join(f"![{name}](benchmarks/results/scaling-{name}.svg)" for name in scaling_plots(data))
    )


def _measured(row: Record) -> str:
    return f"{row['median_measured']:.2f} ({row['low_measured']:.2f} to {row['high_measured']:.2f})"


def scaling_plots(data: Record) -> dict[str, str]:
    """Plots of the record of scaling, by name."""
    found = {
        "side": lines(
            "Mpx/s by the image's side", "side in px",
            {"Mpx/s": [(r["side"], r["mpx_per_s"]) for r in data["sides"]]}, log=True,
        ),
        "memory": lines(
            "Memory beyond the engine, MB", "side in px",
            {"MB": [(r["side"], max(r["beyond_engine_bytes"] / 1e6, 1)) for r in data["sides"]]}, log=True,
        ),
        "tile": lines(
            "Mpx/s by the tile", "tile in px",
            {
                "computed": [(r["tile"], r["computed_mpx_per_s"]) for r in data["tile_sizes"]],
                "kept": [(r["tile"], r["kept_mpx_per_s"]) for r in data["tile_sizes"] if r["kept_mpx_per_s"]],
            },
        ),
        "halo": lines(
            "Cost of the exact halo, times none", "tile in px",
            {
                "measured": [(r["tile"], r["median_measured"]) for r in data["halo"]],
                "pixels computed": [(r["tile"], r["computed_px"]) for r in data["halo"]],
                "formula": [(r["tile"], r["formula"]) for r in data["halo"] if r["formula"] is not None],
            },
        ),
    }  # fmt: skip
    for name, key, x in (
        ("batch", "batches", "batch"), ("threads", "thread_counts", "threads"), ("channels", "channels", "channels"),
        ("width", "widths", "factor"),
    ):  # fmt: skip
        found[name] = lines(
            f"ms by {'width, times the shipped' if name == 'width' else name}, tile {data[key][0]['tile']} px",
            name,
            {"ms": [(r[x], r["median_ms"]) for r in data[key]]},
        )
    return found


def overhead() -> str:
    data = record("overhead-nuclei")
    rows = [
        (
            row["name"],
            f"{number(row['median_ms'])} ({spread(row['low_ms'], row['high_ms'])})",
            f"{number(row['bare']['median_ms'])} ({spread(row['bare']['low_ms'], row['bare']['high_ms'])})",
            f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
        )
        for row in data["rows"]
    ]
    head = ("", "unet-rt, ms (range)", "library bare, ms (range)", "ratio (95 % interval)")
    return (
        f"What unet-rt adds to the library it runs on, one tile of {data['tile']} px of the network that ships "
        f"(`{data['command']}`;\n*own graph*: bare on the graph that the engine runs, *given graph*: on the user's ONNX "
        f"file; limit {data['limit']}):\n\n{table(head, rows)}"
    )


def build_nuclei() -> str:
    data = record("build-nuclei")
    rows = [
        (
            row["name"],
            number(row["seconds"]),
            number(row["search_s"]),
            str(row["candidates"]),
            row["chosen"],
            f"{row['load_s']:.2f}",
        )
        for row in data["rows"]
    ]
    head = ("", "s", "of it searching", "candidates measured", "chosen", "load to first tile, s")
    left = "".join(f"\n\nNot run: {name}: {why}." for name, why in data["skipped"].items())
    return f"Building from six images of 640 px (`{data['command']}`, one run each):\n\n{table(head, rows)}{left}"


def quality() -> str:
    parts = []
    for name, said in (
        ("dsb2018", "Nuclei (dsb2018, fluorescence)"),
        ("isbi2012", "Membranes (isbi2012)"),
        ("drawn", "Drawn"),
    ):
        if not (RESULTS / f"quality-{name}.json").exists():
            continue
        data = record(f"quality-{name}")
        rows = [
            (
                row["name"]
                + (f" ({data['measured_halo']} of {data['halo']} samples)" if "measured" in row["name"] else ""),
                f"{row['iou']:.4f}",
                f"{row['dice']:.4f}",
                f"{row['difference']:+.4f} ({row['difference_low']:+.4f} to {row['difference_high']:+.4f})",
                f"{row['changed_labels']:.3%}",
            )
            for row in data["rows"]
        ]
        head = ("", "IoU", "Dice", "IoU minus whole's (95 % interval)", "labels not whole's")
        parts.append(
            f"{said}, {data['images']} images, trained on tiles of {' x '.join(map(str, data['trained_tile']))} px "
            f"(`{data['command']}`):\n\n{table(head, rows)}"
        )
    return "\n\n".join(parts)


def roofline() -> str:
    data = record("roofline")
    products = ", ".join(f"{row['name'].upper()} {row['gflop_s']:,.0f} ({row['library']})" for row in data["products"])
    engines = [
        (row["name"], f"{row['tile']} px", f"{row['gflop_s']:,.0f}", f"{row['share']:.0%} of {row['roof'].upper()}")
        for row in data["engines"]
    ]
    kernels = [(row["name"], f"{row['gb_s']:.1f}", f"{row['share']:.0%}") for row in data["kernels"]]
    left = "".join(f" {name.upper()}: {why}." for name, why in data["skipped"].items())
    return (
        f"{_machine(data['machine'])}, `{data['command']}`. Products of matrices, GFLOP/s: {products}; copy "
        f"{data['copy']['gb_s']:.1f} GB/s.{left}\n\n"
        f"{table(('', 'tile', 'GFLOP/s', 'share of the product'), engines)}\n\n"
        f"{table(('', 'GB/s', 'share of the copy'), kernels)}"
    )


def instructions() -> str:
    data = record("instructions")
    rows = [(name, f"{value:.2f}") for name, value in data["per_pixel"].items()]
    return table(("", "instructions per pixel"), rows)


def cuda_instructions() -> str:
    rows = [(name, f"{value:.1f}") for name, value in record("cuda-instructions")["per_sample"].items()]
    return table(("", "PTX instructions per sample"), rows)


def memory() -> str:
    data = record("memory")
    side = data["side"]
    return (
        f"A {side:,} x {side:,} px uint16 TIFF takes\n{data['beyond_engine_bytes'] / 1e6:.0f} MB beyond the engine "
        "(`bench_memory.py`)."
    )


def large() -> str:
    """One line per part of ``large.py`` that has a record."""
    lines_ = []
    if found := _optional("large-sparse"):
        low, high = found["median_mb_of_first_and_second_half"]
        lines_.append(
            f"- A sparse Zarr of {found['size']:,} x {found['size']:,} px to an OME-Zarr mask: resident memory at most "
            f"{found['peak_mb']:,.0f} MB, medians\n  of its halves {low:,.0f} and {high:,.0f} MB "
            f"([over time](benchmarks/results/large-sparse.svg)), {found['seconds'] / 60:.0f} min; opening and planning "
            f"{found['opening_and_planning_s']:.2f} s."
        )
    if found := _optional("large-kill"):
        parts = [(name, found[name]) for name in ("mask.zarr", "mask.tif")]
        kills = sum(part["kills"] for _, part in parts)
        same = all(part["equal"] for _, part in parts)
        lines_.append(
            f"- {kills} times `kill -9` in two predictions ({', '.join(name for name, _ in parts)}): the bytes of an "
            f"uninterrupted run: {'yes' if same else 'NO'}."
        )
    if found := _optional("large-dask"):
        lines_.append(
            f"- Two Dask workers on two cores against one process, {found['size']:,} px: {found['ratio']:.2f} times the "
            f"time, start of the workers included; identical bytes: {'yes' if found['identical_bytes'] else 'NO'}."
        )
    if found := _optional("large-memory"):
        rows = "; ".join(
            f"`--memory {name}` {row['seconds']:.0f} s with tiles of {'x'.join(map(str, row['tile']))} px, "
            f"{row['peak_mb']:,.0f} MB"
            for name, row in found["rows"].items()
        )
        lines_.append(f"- {found['size']:,} px: {rows}; labels that differ: {found['labels_that_differ']}.")
    if found := _optional("large-overhead"):
        lines_.append(
            f"- A tiled TIFF of {found['size']:,} x {found['size']:,} px, end to end: {found['ratio']:.2f} times the "
            f"engine's own time for its {found['tiles']} tiles."
        )
    return "Large images (`python benchmarks/large.py PART`):\n\n" + "\n".join(lines_)


def _optional(name: str) -> Record | None:
    return record(name) if (RESULTS / f"{name}.json").exists() else None


def startup() -> str:
    rows = {row["name"]: row for row in record("startup")["rows"]}
    return (
        f"`import unet_rt` takes {rows['import unet_rt']['median_ms']:.0f} ms (it loads names when they are used);\n"
        f"what a program that predicts imports takes {rows['image line']['beyond_numpy_ms']:.0f} ms beyond NumPy's own "
        "import (`bench_startup.py`)."
    )


def kernels() -> str:
    data = record("kernels")
    rows: list[Record] = data["results"]

    def of(key: str, *starts: str) -> list[float]:
        return [row[key] for row in rows if row["name"].startswith(starts)]

    others = [row["bandwidth"] for row in rows if "softmax" not in row["name"]]
    (softmax,) = of("bandwidth", "tile_stitch softmax")
    placing = [row["twin"] for row in rows if row["name"].startswith("tile_stitch copy") and "float32" in row["name"]]
    return (
        f"Kernels, {data['threads']} threads: {rounded_range(others)} times the speed of `np.copyto` on the same bytes "
        f"(softmax {softmax:.2f}); gather {rounded_range(of('twin', 'tile_gather'), 0)}, argmax\nand threshold "
        f"{rounded_range(of('twin', 'tile_stitch argmax', 'tile_stitch threshold'), 0)}, placing float32 "
        f"{rounded_range(placing, 0)} times the NumPy twin (`bench_kernels.py`)."
    )


# ----------------------------------------------------------------------------------------------------------- membranes


def membranes() -> str:
    data = record("membranes")
    rows: list[Record] = data["rows"]
    one, near = rows[0], data["band_px"]
    columns = {
        "pixel error": "pixel error",
        f"within {near:g} px of a border": "pixel error near",
        "farther": "pixel error far",
        "Rand error": "Rand error",
        "warping error": "warping error",
        "IoU of cells": "IoU",
        "IoU of membranes": "membrane IoU",
        "unsure pixels": "unsure",
    }
    named = [(f"{r['network']}, {r['parameters']:,} parameters", r["figures"]) for r in rows]
    lines = [
        (name, *(f"{found[key]:.{6 if key == 'warping error' else 4}f}" for key in columns.values()))
        for name, found in (*named, ("cell everywhere", data["all_cell"]))
    ]
    tuned = ", ".join(f"{r['network']} {r['at_threshold']['Rand error']:.4f}" for r in rows)
    paper = data["paper_other_hidden_slices"]
    return (
        f"{one['training_slices']} slices to train on, width {one['width']}, {one['steps']:,} steps of {one['batch']} tiles "
        f"of {one['tile_px']} px, {one['optimizer'].title()} at {one['learning_rate']:g}, augmented, seed {one['seed']}, on "
        f"{one['trained_on']['device']}:\n\n{table(('', *columns), lines)}\n\n"
        f"Rand error at the threshold that serves the tuning slices best: {tuned}.\n"
        f"The paper, on the challenge's hidden slices: warping error {paper['warping error']:.6f}, Rand error "
        f"{paper['Rand error']:.4f}, pixel error {paper['pixel error']:.4f}."
    )


def membranes_slices() -> str:
    rows: list[Record] = record("membranes-slices")["rows"]
    one = rows[0]
    found = {(r["training_slices"], r["augmented"]): r["figures"] for r in rows}
    lines = []
    for count in sorted({n for n, _ in found}):
        pair = [found.get((count, way)) for way in (True, False)]
        lines.append(
            (str(count), *(f"{f[key]:.4f}" if f else "" for key in ("IoU", "membrane IoU", "Rand error") for f in pair))
        )
    columns = ((f"{what}, augmented", "plain") for what in ("IoU of cells", "IoU of membranes", "Rand error"))
    head = ("slices", *(title for pair in columns for title in pair))
    return (
        f"U-Net of width {one['width']} ({one['parameters']:,} parameters), {one['steps']:,} steps of {one['batch']} tiles "
        f"of {one['tile_px']} px, seed {one['seed']}:\n\n{table(head, lines)}"
    )


def membranes_shipped() -> str:
    """The network that ships, on drawn sections and on real slices, beside one that was trained on such slices."""
    shipped: Record = json.loads((ROOT / "unet_rt" / "data" / "membranes.json").read_text(encoding="utf-8"))
    taught: Record = record("membranes")["rows"][0]
    drawn, real = (shipped["figures"][part] for part in ("test_drawn", "test_real"))
    columns = {
        "pixel error": "pixel_error",
        "Rand error": "rand_error",
        "IoU of cells": "iou_cells",
        "IoU of membranes": "iou_membranes",
    }
    names = ("pixel error", "Rand error", "IoU", "membrane IoU")  # of the comparison's record
    rows = [
        (f"drawn, {drawn['images']} sections not trained on: the network that ships", drawn, columns.values()),
        ("cell everywhere", drawn["cell_everywhere"], columns.values()),
        (f"ISBI 2012, slices 21 to {20 + real['images']}: the network that ships", real, columns.values()),
        ("cell everywhere", real["cell_everywhere"], columns.values()),
        (f"{taught['network']} of width {taught['width']}, trained on {taught['training_slices']} slices of it",
         taught["figures"], names),
    ]  # fmt: skip
    lines = [(name, *(f"{found[key]:.4f}" for key in keys)) for name, found, keys in rows]
    recipe = shipped["recipe"]
    return (
        f"U-Net of width {shipped['architecture']['width']} ({shipped['parameters']:,} parameters), {recipe['steps']:,} "
        f"steps of {recipe['batch']} tile of {recipe['tile_px']} px, seed {recipe['seed']}, trained on drawn sections "
        f"alone:\n\n{table(('', *columns), lines)}"
    )


# ---------------------------------------------------------------------------------------------------------------- GPU


def gpu_sections() -> dict[str, Record]:
    """Sections of the record of the GPU, those of a later call for ``compile-max`` besides."""
    sections: dict[str, Record] = dict(record("gpu")["sections"])
    for name in ("gpu-compile-max",):
        if (RESULTS / f"{name}.json").exists():
            later = record(name)["sections"]
            sections |= {key: value for key, value in later.items() if value.get("rows") and key not in sections}
            sections |= {key: value for key, value in later.items() if key.startswith("compile") and value.get("rows")}
    return sections


def gpu_machine() -> str:
    sections = gpu_sections()
    machine, roof = sections["machine"], sections["roof"]
    versions = machine["versions"]
    libraries = [
        f"{said} {versions[key]}"
        for key, said in (("torch", "PyTorch"), ("onnxruntime-gpu", "ONNX Runtime"), ("onnxruntime", "ONNX Runtime"))
        if key in versions
    ]
    if machine.get("cudnn"):
        major, rest = divmod(int(machine["cudnn"]), 10_000)
        libraries.append(f"cuDNN {major}.{rest // 100}.{rest % 100}")
    products = ", ".join(
        f"{key.upper()} {roof[f'{key}_tflops']:,.0f}"
        for key in ("fp32", "tf32", "bf16", "fp16", "int8")
        if f"{key}_tflops" in roof
    )
    return (
        f"One {machine['gpu']['name']}, driver {machine['smi'].get('driver_version', 'unknown')}, {', '.join(libraries)}. "
        f"Measured in the same call:\nproducts of 8192 x 8192 matrices {products} TFLOP/s, copy "
        f"{roof['copy_gb_s'] / 1e3:.1f} TB/s."
    )


def gpu_rows(batch: int, net: str, tile: int, sections: dict[str, Record]) -> list[Sequence[str]]:
    roof = sections["roof"]
    rows = [r for r in sections[net]["rows"] if (r["tile"], r["batch"]) == (tile, batch)]
    if net == "paper":  # what other sections measured beside the same eager FP32
        for name in ("compile-default", "compile-max"):
            found = sections.get(name, {}).get("rows", [])
            rows += [r for r in found if r["batch"] == batch and r["name"].startswith("torch.compile")]
    slowest = next(r["median_ms"] for r in rows if r["name"] == "eager FP32")
    lines = []
    for r in sorted(rows, key=lambda r: -float(r["median_ms"])):
        peak = roof.get(f"{r['roof']}_tflops")
        share = f"{r['tflops'] / peak:.0%} of {r['roof'].upper()}" if peak else ""
        lines.append(
            (
                r["name"],
                f"{number(r['median_ms'])} ({spread(r['low_ms'], r['high_ms'])})",
                number(r["tiles_per_s"], 4),
                f"{slowest / r['median_ms']:.2f}",
                share,
                f"{r['label_agreement']:.4%}",
            )
        )
    return lines


GPU_HEAD = ("", "ms per batch (range)", "tiles/s", "eager FP32 = 1", "share of matrix product", "labels equal")


def gpu_paper() -> str:
    sections = gpu_sections()
    tile = sections["paper"]["rows"][0]["tile"]
    parts = []
    for batch in sorted({int(r["batch"]) for r in sections["paper"]["rows"]} & {1, 16}, reverse=True):
        rows = gpu_rows(batch, "paper", tile, sections)
        parts.append(f"The paper's U-Net, {tile} x {tile} px, batch {batch}:\n\n{table(GPU_HEAD, rows)}")
    return "\n\n".join(parts)


def gpu_nuclei() -> str:
    sections = gpu_sections()
    keys = dict.fromkeys((int(r["tile"]), int(r["batch"])) for r in sections["nuclei"]["rows"])
    parts = []
    for tile, batch in keys:
        rows = gpu_rows(batch, "nuclei", tile, sections)
        parts.append(f"The network that ships, {tile} x {tile} px, batch {batch}:\n\n{table(GPU_HEAD, rows)}")
    return "\n\n".join(parts)


def gpu_kernels() -> str:
    rows = gpu_sections()["kernels"]["rows"]
    head = ("", "GB/s", "share of a copy of the same bytes", "launched from Python")
    return table(
        head,
        [
            (r["name"], f"{r['gb_s_graph']:,.0f}", f"{r['share_graph']:.2f}", f"{r['share']:.2f}")
            for r in rows
            if "share_graph" in r
        ],
    )


WAYS = {
    "fixed": "host to host, declared normalisation",
    "own": "host to host, the image's own statistics",
    "device": "CUDA tensor to CUDA tensor, declared normalisation",
}


def gpu_predict() -> str:
    sections = gpu_sections()
    lines = []
    for name, net in (("predict-paper", "paper's U-Net"), ("predict-nuclei", "network that ships")):
        for r in sections.get(name, {}).get("rows", []):
            for way, said in WAYS.items():
                if f"{way}_s" in r:
                    lines.append(
                        (
                            f"{net}, {r['engine'].removeprefix('unet-rt ')}, {r['side']} px, {said}",
                            f"{number(r[f'{way}_s'])} ({spread(r[f'{way}_low_s'], r[f'{way}_high_s'])})",
                            f"{r[f'{way}_mpx_per_s']:,.0f}",
                            f"{r[f'{way}_ratio']:.2f}",
                            f"{r['changed_labels']:.4%}" if "changed_labels" in r else "",
                        )
                    )
    head = ("", "s, median (range)", "Mpx/s", "engine alone = 1", "labels not those of eager FP32")
    return table(head, lines)


def precision_paper() -> str:
    found = record("precision-paper")
    rows = [
        (
            "eager FP32" if k == 0 else f"unet-rt {row['name']}",
            f"{row['median_ms']:,.0f} ({row['low_ms']:,.0f} to {row['high_ms']:,.0f})",
            f"{row['speed']:.2f}",
            f"{row['label_change']:.2%}",
            f"{row['dice']:.3f}",
        )
        for k, row in enumerate(found["rows"])
    ]
    head = ("", "ms, median (range)", "eager FP32 = 1", "labels changed, worst sample", "lowest Dice")
    lines = ["| " + " | ".join(head) + " |", "| --- | --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    command, _, left_out = found["command"].partition(" (")
    said = f"`{command}`" + (f", {left_out.removesuffix(')')}" if left_out else "")
    text = f"**INT8**, the same network and tile, calibrated on drawn micrographs ({said}):"
    return "\n".join([text, "", *lines])


def parity_rows() -> str:
    found = record("parity")
    lines, missing = [], dict[tuple[str, str], list[str]]()
    for row in found["rows"]:
        name = (row["net"], row["backend"], row["precision"] + (f" ({row['variant']})" if row.get("variant") else ""))
        held = row.get("held_back")
        if held is None:
            missing.setdefault((f"{row['backend']} {row['precision']}", row["note"]), []).append(row["net"])
            continue
        regression = held["labels_ppm_worst"] is None
        truth = row.get("truth")
        lines.append(
            (
                *name,
                f"error {held['relative']:.1e} of the range"
                if regression
                else f"{held['labels_ppm_worst'] / 1e4:.3f}% ({held['labels_ppm_mean'] / 1e4:.3f}%)",
                "" if held["dice_lowest"] is None else f"{held['dice_lowest']:.4f}",
                "" if truth is None else f"{truth['engine_dice']:.4f} ({truth['baseline_dice']:.4f})",
                "inside" if row["accepted"] else "outside",
            )
        )
    head = (
        "network", "backend", "precision", "labels changed, worst image (mean)", "lowest Dice against FP32",
        "Dice against the truth (FP32)", "default budget",
    )  # fmt: skip
    counts = sorted({row["held_back"]["images"] for row in found["rows"] if row.get("held_back")})
    images, count = " or ".join(map(str, counts)), len({row["net"] for row in found["rows"]})
    return (
        f"{images} images held back from the build for each network, on {found['machine']['cpu']}\n"
        f"(`{found['command']}`):\n\n{table(head, lines)}\n\n"
        + "\n\n".join(
            f"Not built: {what} of {'every network' if len(nets) == count else '; '.join(nets)}: {why}."
            for (what, why), nets in missing.items()
        )
    )


def passes() -> str:
    parts = []
    for path in sorted(RESULTS.glob("passes-*.json")):
        found: Record = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            (
                row["name"],
                row["backend"],
                f"{row['before_ms']:,.1f} -> {row['after_ms']:,.1f}",
                f"{row['speed']:.2f} ({row['speed_low']:.2f} to {row['speed_high']:.2f})",
                row["difference"],
            )
            for row in found["rows"]
        ]
        head = ("pass", "backend", "ms without -> with", "speed (range)", "result")
        parts.append(f"`{found['net']}`, {found['tile']} px, {found['threads']} threads:\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def gpu_anchors() -> str:
    rows = [r for r in record("gpu_anchors")["rows"] if r["name"].startswith("torch.compile") and "ms" in r]
    each = "; ".join(
        f"{r['name'].removeprefix('torch.compile ')}, batch {r['batch']}: {r['tiles_per_s']:,.0f}" for r in rows
    )
    return f"torch.compile, FP16 channels_last, random weights, an earlier run on a card of the same kind, tiles/s: {each}."


BLOCKS: dict[str, Callable[[], str]] = {
    "cpu-machine": cpu_machine,
    "pipeline": pipeline,
    "scaling": scaling,
    "overhead": overhead,
    "build-nuclei": build_nuclei,
    "quality": quality,
    "roofline": roofline,
    "instructions": instructions,
    "cuda-instructions": cuda_instructions,
    "engine-paper": engine_paper,
    "predict-nuclei": predict_nuclei,
    "predict-paper": predict_paper,
    "memory": memory,
    "large": large,
    "startup": startup,
    "kernels": kernels,
    "precision-paper": precision_paper,
    "membranes": membranes,
    "membranes-slices": membranes_slices,
    "membranes-shipped": membranes_shipped,
    "parity": parity_rows,
    "passes": passes,
    "gpu-machine": gpu_machine,
    "gpu-anchors": gpu_anchors,
    "gpu-paper": gpu_paper,
    "gpu-nuclei": gpu_nuclei,
    "gpu-kernels": gpu_kernels,
    "gpu-predict": gpu_predict,
}


def filled(text: str) -> str:
    """``text`` with every marked block drawn anew."""

    def draw(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in BLOCKS:
            raise SystemExit(f"there are no figures called {name!r}; choose one of {', '.join(BLOCKS)}")
        return f"{begin}{BLOCKS[name]()}\n{end}"

    return BLOCK.sub(draw, text)


# --------------------------------------------------------------------------------------------------------------- plots


def plots() -> dict[Path, str]:
    """Pictures by their paths: of every record that is there."""
    data = record("engine-paper")
    found = {
        RESULTS / "engine-paper.svg": bars(
            f"The paper's U-Net, one tile of {data['tile']} px, {data['threads']} threads: ms, less is better",
            [(r["name"], r["median_ms"], r["low_ms"], r["high_ms"]) for r in data["rows"] if r.get("batch", 1) == 1],
            "ms",
        )
    }
    if (RESULTS / "membranes-slices.json").exists():
        rows = record("membranes-slices")["rows"]
        found[RESULTS / "membranes-slices.svg"] = lines(
            f"IoU on three slices of ISBI 2012 that were not trained on, {rows[0]['steps']} steps",
            "training slices",
            {
                f"{what}, {'augmented' if way else 'plain'}": sorted(
                    (r["training_slices"], r["figures"][key]) for r in rows if r["augmented"] == way
                )
                for what, key in (("cells", "IoU"), ("membranes", "membrane IoU"))
                for way in (True, False)
            },
            zero=False,
        )
    if sparse := _optional("large-sparse"):
        found[RESULTS / "large-sparse.svg"] = lines(
            f"Resident memory, {sparse['size']:,} x {sparse['size']:,} px, MB", "s",
            {"MB": [(t, m) for t, m in sparse["resident_mb"]][:: max(1, len(sparse["resident_mb"]) // 12)]},
        )  # fmt: skip
    predicted = _optional("predict-nuclei")
    if predicted is not None and "spans" in predicted:
        size, name = predicted["size"], predicted["spans"]["name"]
        found[RESULTS / "pipeline.svg"] = spans(f"{size} x {size} px, {name}: busy stages", predicted["spans"]["spans"])
    if (RESULTS / "scaling.json").exists():
        drawn = scaling_plots(record("scaling"))
        found |= {RESULTS / f"scaling-{name}.svg": text for name, text in drawn.items()}
    if (RESULTS / "gpu.json").exists():
        sections = gpu_sections()
        for batch in (1, 16):
            rows = [r for r in sections.get("paper", {}).get("rows", []) if r["batch"] == batch]
            if not rows:
                continue
            for name in ("compile-default", "compile-max"):
                others = sections.get(name, {}).get("rows", [])
                rows += [r for r in others if r["batch"] == batch and r["name"].startswith("torch.compile")]
            found[RESULTS / f"gpu-paper-batch-{batch}.svg"] = bars(
                f"The paper's U-Net on {sections['machine']['gpu']['name']}, batch {batch}: tiles/s, more is better",
                [
                    (r["name"], r["tiles_per_s"], batch / r["high_ms"] * 1e3, batch / r["low_ms"] * 1e3)
                    for r in sorted(rows, key=lambda r: float(r["tiles_per_s"]))
                ],
                "tiles/s",
            )
    return found


def stale() -> list[Path]:
    """Files that are not what the records say."""
    wrong = [page for page in PAGES if (text := page.read_text(encoding="utf-8")) != filled(text)]
    drawn = plots()
    return wrong + [p for p, text in drawn.items() if not p.exists() or p.read_text(encoding="utf-8") != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where something is stale")
    wrong = stale()
    for path in wrong:
        print(path.relative_to(ROOT))
    if parser.parse_args().check:
        sys.exit(1 if wrong else 0)
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    for path, text in plots().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
