"""Draws the figures of README.md and other pages from ``benchmarks/results/*.json``; none is typed by hand.

    python benchmarks/tables.py           # rewrites the marked blocks, and the plots in benchmarks/results/
    python benchmarks/tables.py --check   # exit status 1 where they are not what the records say

A block stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; NAME is a function in ``BLOCKS``.
Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "membranes.md")
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


def number(value: float, digits: int = 3) -> str:
    """``digits`` significant ones, thousands apart: 2,340, 12.3, 0.0457."""
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:#.{digits}g}".rstrip(".")
    return text if "e" not in text else f"{value:.{digits}f}"


def spread(low: float, high: float, digits: int = 3) -> str:
    return f"{number(low, digits)} to {number(high, digits)}"


def rounded_range(values: Sequence[float], digits: int = 1) -> str:
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# ---------------------------------------------------------------------------------------------------------------- CPU


def engine_paper() -> str:
    data = record("engine-paper")
    rows = [
        (
            row["name"],
            f"{row['median_ms']:,.0f} ({row['low_ms']:,.0f} to {row['high_ms']:,.0f})",
            f"{row['speed']:.2f}",
            f"{row['label_agreement']:.4%}",
        )
        for row in data["rows"]
    ]
    quiet = {row["name"]: row["speed"] for row in record("engine-paper-quiet")["rows"]}
    ours = [f"{quiet[row['name']]:.2f}" for row in data["rows"][-2:]]
    head = ("", "ms, median (range)", "eager FP32 = 1", "labels equal to eager FP32")
    return (
        f"**One tile** of the paper's U-Net ({data['parameters']:,} parameters, trained weights, "
        f"{data['tile']} x {data['tile']} px, batch 1, FP32 unless said;\n`{data['command']}`):\n\n"
        f"{table(head, rows)}\n\n"
        f"The machine was noisy in that run; a quieter one (`engine-paper-quiet.json`) gave {ours[0]} and {ours[1]} for the "
        "last two."
    )


def predict_nuclei() -> str:
    data, idle = record("predict-nuclei"), record("predict-nuclei-idle")
    slowest = max(data["median_s"].values())
    rows = [
        (name, number(seconds), f"{slowest / seconds:.2f}", f"{data['seams'][name]:.4%}")
        for name, seconds in data["median_s"].items()
    ]
    (alone,), (later,) = data["overhead"].values(), idle["overhead"].values()
    head = ("", "s, median", "MONAI = 1", "labels not those of whole-image inference")
    side = data["size"]
    return (
        f"**End to end**, a TIFF of {side} x {side} px to a mask, with the network that ships "
        f"({data['parameters']:,} parameters;\n`{data['command']}`); MONAI's window is 512 px, overlap 0.25, Gaussian,\n"
        "and its time holds neither reading nor writing; labels were compared on the centre 2048 x 2048 px, in tiles of at "
        f"most 768 px:\n\n{table(head, rows)}\n\n"
        f"That is {alone['ratio']:.2f} times the engine's own time for the same {alone['tiles']} tiles run alone "
        f"({later['ratio']:.2f} in a later run on an idle machine,\n`predict-nuclei-idle.json`)."
    )


def memory() -> str:
    data = record("memory")
    side = data["side"]
    return (
        f"A {side:,} x {side:,} px uint16 TIFF takes\n{data['beyond_engine_bytes'] / 1e6:.0f} MB beyond the engine "
        "(`bench_memory.py`)."
    )


def startup() -> str:
    beyond = record("startup")["beyond_numpy_ms"]
    alone = record("startup")["median_ms"]
    return (
        f"`import unet_rt` takes {alone['import unet_rt']:.0f} ms (it loads names when they are used);\n"
        f"what a program that predicts imports takes {beyond['image line']:.0f} ms beyond NumPy's own import "
        "(`bench_startup.py`)."
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
    text = f"**INT8**, the same network and tile, calibrated on drawn micrographs (`{found['command']}`):"
    return "\n".join([text, "", *lines])


def gpu_anchors() -> str:
    rows = [r for r in record("gpu_anchors")["rows"] if r["name"].startswith("torch.compile") and "ms" in r]
    each = "; ".join(
        f"{r['name'].removeprefix('torch.compile ')}, batch {r['batch']}: {r['tiles_per_s']:,.0f}" for r in rows
    )
    return f"torch.compile, FP16 channels_last, random weights, an earlier run on a card of the same kind, tiles/s: {each}."


BLOCKS: dict[str, Callable[[], str]] = {
    "engine-paper": engine_paper,
    "predict-nuclei": predict_nuclei,
    "memory": memory,
    "startup": startup,
    "kernels": kernels,
    "precision-paper": precision_paper,
    "membranes": membranes,
    "membranes-slices": membranes_slices,
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


def bars(title: str, rows: Sequence[tuple[str, float, float, float]], unit: str) -> str:
    """An SVG of horizontal bars: (name, median, low, high), the whisker from fastest to slowest."""
    wide, name_px, row_px, top = 860, 330, 26, 44
    room = wide - name_px - 90
    most = max(high for _, _, _, high in rows)
    height = top + row_px * len(rows) + 12

    def x(value: float) -> float:
        return name_px + room * value / most

    font = 'font-family="sans-serif" font-size="13"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{height}" {font}>',
        f'<rect width="{wide}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for k, (name, median, low, high) in enumerate(rows):
        y = top + row_px * k
        colour = "#0072b2" if name.startswith("unet-rt") else "#999999"  # Okabe & Ito
        middle = y + row_px / 2 - 3
        parts += [
            f'<text x="{name_px - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{name_px}" y="{y}" width="{room * median / most:.1f}" height="{row_px - 6}" fill="{colour}"/>',
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}" stroke="black"/>',
            f'<text x="{x(high) + 6:.1f}" y="{y + 15}">{number(median)} {escape(unit)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def curves(title: str, x_label: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG of lines with their points: name -> (x, y) in order of x."""
    wide, height, left, right, top, bottom = 640, 400, 64, 24, 68, 48
    points = [point for line in series.values() for point in line]
    most_x = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 8)
    first, last = math.floor(low / step), math.ceil(high / step)

    def x_of(x: float) -> float:
        return left + (wide - left - right) * x / most_x

    def y_of(y: float) -> float:
        return height - bottom - (height - top - bottom) * (y / step - first) / max(last - first, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{wide}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
        f'<text x="{(left + wide - right) / 2}" y="{height - 10}" text-anchor="middle">{escape(x_label)}</text>',
    ]
    for k in range(first, last + 1):
        y = y_of(k * step)
        parts += [
            f'<line x1="{left}" x2="{wide - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>',
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{k * step:.3g}</text>',
        ]
    for x in sorted({x for x, _ in points}):
        parts.append(f'<text x="{x_of(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>')
    for k, (name, line) in enumerate(series.items()):
        colour = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")[k % 4]  # Okabe & Ito
        way = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="4" fill="{colour}"/>' for x, y in line]
        x = left + (wide - left - right) * k / len(series)
        parts.append(f'<text x="{x:.1f}" y="50" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def plots() -> dict[Path, str]:
    """Pictures by their paths: of every record that is there."""
    data = record("engine-paper")
    found = {
        RESULTS / "engine-paper.svg": bars(
            f"The paper's U-Net, one tile of {data['tile']} px, {data['threads']} threads: ms, less is better",
            [(r["name"], r["median_ms"], r["low_ms"], r["high_ms"]) for r in data["rows"]],
            "ms",
        )
    }
    if (RESULTS / "membranes-slices.json").exists():
        rows = record("membranes-slices")["rows"]
        found[RESULTS / "membranes-slices.svg"] = curves(
            f"IoU on three slices of ISBI 2012 that were not trained on, {rows[0]['steps']} steps",
            "training slices",
            {
                f"{what}, {'augmented' if way else 'plain'}": sorted(
                    (r["training_slices"], r["figures"][key]) for r in rows if r["augmented"] == way
                )
                for what, key in (("cells", "IoU"), ("membranes", "membrane IoU"))
                for way in (True, False)
            },
        )
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
