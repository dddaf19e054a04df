"""Draws the figures of the pages from ``benchmarks/results/*.json``; none is typed by hand.

    python benchmarks/tables.py           # rewrites the marked blocks, and the plots in benchmarks/results/
    python benchmarks/tables.py --check   # exit status 1 where they are not what the records say

A block stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->`` in README.md, benchmarks/README.md or any
page under docs/; NAME is a template of ``figures.txt``, filled by ``figures.py``. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import render
from figures import SOURCES, contenders, gpu_sections
from front import front
from plots import bars, spans

from unet_rt.outputs.charts import Axes, Sheet, lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEMPLATES = render.templates(Path(__file__).resolve().with_name("figures.txt"))
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)


def pages() -> list[Path]:
    """Where blocks may stand."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def block(name: str) -> str:
    """The text of a block: a template filled with its record, once for each where there are several."""
    records = render.Records(RESULTS)
    source = front if name == "front" else SOURCES.get(name)
    found = records(name) if source is None else source(records)
    return "\n\n".join(render.draw(TEMPLATES[name], one) for one in (found if isinstance(found, list) else [found]))


BLOCKS: dict[str, Callable[[], str]] = {name: partial(block, name) for name in TEMPLATES}


def filled(text: str, page: Path | None = None) -> str:
    """``text`` with every marked block drawn anew; pictures lie where ``page`` (README.md) finds them.

    Raises:
        SystemExit: A block has no template, or no record.
    """
    results = os.path.relpath(ROOT / "benchmarks" / "results", (page or ROOT / "README.md").parent).replace(os.sep, "/")

    def draw(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in BLOCKS:
            raise SystemExit(f"there are no figures called {name!r}; choose one of {', '.join(BLOCKS)}")
        return f"{begin}{BLOCKS[name]().replace('](benchmarks/results/', f']({results}/')}\n{end}"

    return BLOCK.sub(draw, text)


# --------------------------------------------------------------------------------------------------------------- plots


def plots() -> dict[Path, str]:
    """Pictures by their paths: of every record that is there."""
    records = render.Records(RESULTS)
    drawers = (engine_plot, slices_plot, sparse_plot, pipeline_plot, scaling_plots, gpu_plots)
    return {RESULTS / f"{name}.svg": sheet.svg() for drawer in drawers for name, sheet in drawer(records).items()}


def engine_plot(records: render.Records) -> dict[str, Sheet]:
    data = records("engine-paper")
    title = f"The paper's U-Net, one tile of {data['tile']} px, {data['threads']} threads: ms, less is better"
    rows = [(r["name"], r["median_ms"], r["low_ms"], r["high_ms"]) for r in data["rows"] if r.get("batch", 1) == 1]
    return {"engine-paper": bars(title, rows, "ms")}


def slices_plot(records: render.Records) -> dict[str, Sheet]:
    found = dict[str, Sheet]()
    for rows in (data["rows"] for data in records.some("membranes-slices")):
        title = f"IoU on three slices of ISBI 2012 that were not trained on, {rows[0]['steps']} steps"
        series = {
            f"{what}, {'augmented' if way else 'plain'}": sorted(
                (r["training_slices"], r["figures"][key]) for r in rows if r["augmented"] == way
            )
            for what, key in (("cells", "IoU"), ("membranes", "membrane IoU"))
            for way in (True, False)
        }
        found["membranes-slices"] = lines(Axes(title, "training slices"), series)
    return found


def sparse_plot(records: render.Records) -> dict[str, Sheet]:
    found = dict[str, Sheet]()
    for data in records.some("large-sparse"):
        title = f"Resident memory, {data['size']:,} x {data['size']:,} px, MB"
        points = [(t, m) for t, m in data["resident_mb"]][:: max(1, len(data["resident_mb"]) // 12)]
        found["large-sparse"] = lines(Axes(title, "s", zero=True), {"MB": points})
    return found


def pipeline_plot(records: render.Records) -> dict[str, Sheet]:
    found = dict[str, Sheet]()
    for data in records.some("predict-nuclei"):
        if "spans" in data:
            title = f"{data['size']} x {data['size']} px, {data['spans']['name']}: busy stages"
            found["pipeline"] = spans(title, data["spans"]["spans"])
    return found


SCALING = {  # title, abscissa, (name, rows, x, y) of each line
    "side": ("Mpx/s by the image's side", "side in px", [("Mpx/s", "sides", "side", "mpx_per_s")]),
    "memory": ("Memory beyond the engine, MB", "side in px", [("MB", "sides", "side", "beyond_engine_mb")]),
    "tile": (
        "Mpx/s by the tile",
        "tile in px",
        [("computed", "tile_sizes", "tile", "computed_mpx_per_s"), ("kept", "tile_sizes", "tile", "kept_mpx_per_s")],
    ),
    "halo": (
        "Cost of the exact halo, times none",
        "tile in px",
        [
            ("measured", "halo", "tile", "median_measured"),
            ("pixels computed", "halo", "tile", "computed_px"),
            ("formula", "halo", "tile", "formula"),
        ],
    ),
    "batch": ("ms by batch, tile {batches[0][tile]} px", "batch", [("ms", "batches", "batch", "median_ms")]),
    "threads": (
        "ms by threads, tile {thread_counts[0][tile]} px",
        "threads",
        [("ms", "thread_counts", "threads", "median_ms")],
    ),
    "channels": (
        "ms by channels, tile {channels[0][tile]} px",
        "channels",
        [("ms", "channels", "channels", "median_ms")],
    ),
    "width": (
        "ms by width, times the shipped, tile {widths[0][tile]} px",
        "width",
        [("ms", "widths", "factor", "median_ms")],
    ),
}


def scaling_plots(records: render.Records) -> dict[str, Sheet]:
    """How cost grows with each of what it hangs on."""
    found = dict[str, Sheet]()
    for data in records.some("scaling"):
        sides = [row | {"beyond_engine_mb": max(row["beyond_engine_bytes"] / 1e6, 1)} for row in data["sides"]]
        for name, (title, label, drawn) in SCALING.items():
            series = {
                said: [(row[x], row[y]) for row in (data | {"sides": sides})[rows] if row[y]]
                for said, rows, x, y in drawn
            }
            log = name in ("side", "memory")
            axes = Axes(render.fill(title, data), label, log_x=log, log_y=log, zero=not log)
            found[f"scaling-{name}"] = lines(axes, series)
    return found


def gpu_plots(records: render.Records) -> dict[str, Sheet]:
    found = dict[str, Sheet]()
    for _ in records.some("gpu"):
        sections = gpu_sections(records)
        for batch in (1, 16):
            rows = [r for r in contenders(sections, "paper") if r["batch"] == batch]
            if rows and sections.get("paper", {}).get("rows"):
                title = (
                    f"The paper's U-Net on {sections['machine']['gpu']['name']}, batch {batch}: tiles/s, more is better"
                )
                ordered = sorted(rows, key=lambda r: float(r["tiles_per_s"]))
                values = [
                    (r["name"], r["tiles_per_s"], batch / r["high_ms"] * 1e3, batch / r["low_ms"] * 1e3)
                    for r in ordered
                ]
                found[f"gpu-paper-batch-{batch}"] = bars(title, values, "tiles/s")
    return found


def stale() -> list[Path]:
    """Files that are not what the records say."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    wrong = [page for page, text in texts.items() if text != filled(text, page)]
    return wrong + [p for p, text in plots().items() if not p.exists() or p.read_text(encoding="utf-8") != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where something is stale")
    check = parser.parse_args().check
    wrong = stale()
    for path in wrong:
        print(path.relative_to(ROOT))
    if check:
        sys.exit(1 if wrong else 0)
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (drawn := filled(text, page)) != text:
            page.write_text(drawn, encoding="utf-8")
    for path, text in plots().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
